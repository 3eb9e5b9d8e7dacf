"""Weights in an Orbax checkpoint: found in a folder, checked, restored to any mesh, written as a stream.

It does not know about models: the caller says which arrays it expects, by dotted name and shape, and where
each goes. Names are paths in the saved tree, one array per layer: `layers.3.mlp.up_proj.weight`. nnx.State
and plain dicts are both read (Orbax writes a State's leaf as `….weight.value`), wherever they stand in the
tree: optimizer state and counters beside them are left alone, and the mesh they were saved from is not asked.

Folders that are understood:
- as `checkpoints.convert` writes them: `jaxserve.json`, which says where the weights are, and `weights/`;
- an Orbax checkpoint (a folder with `_METADATA`) itself, or one beside config.json, under any name;
- what Orbax's CheckpointManager writes: a folder for each step, of which the last is taken.
"""

import json
import math
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NoReturn

import numpy as np

from checkpoints.files import CheckpointError, listing, quote, read_object

if TYPE_CHECKING:
    import jax
    from jax.sharding import Sharding

ABOUT: Final = "jaxserve.json"
FORMAT_VERSION: Final = 1
WEIGHTS: Final = "weights"

_METADATA: Final = "_METADATA"
_TRACES: Final = ("_CHECKPOINT_METADATA", "commit_success.txt", "manifest.ocdbt")  # beside _METADATA
_UNFINISHED: Final = ".orbax-checkpoint-tmp"
_STEP: Final = re.compile(r"(?:.*_)?(\d+)")  # "5" or "step_5"
# What optimizers keep has the model's names too: momentum must never be served as the model.
_OPTIMIZER: Final = frozenset("opt opt_state optim optimizer moments mu nu trace momentum velocity".split())
_MAX_ABOUT_BYTES: Final = 64 << 20
_WEIGHT_DTYPES: Final = ("float16", "bfloat16", "float32")
_CHUNK_BYTES: Final = 16 << 20  # what is read at least for any part of an array
_BATCH_BYTES: Final = 256 << 20  # arrays restored together; a larger one is restored alone

TreePath = tuple[str, ...]  # of a leaf, from the root of the saved tree


@dataclass(frozen=True, slots=True)
class Stored:
    """An array of a checkpoint: where it stands in the tree, and what it is."""

    path: TreePath
    shape: tuple[int, ...]
    dtype: np.dtype[Any]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class OrbaxCheckpoint:
    """A checkpoint whose arrays are those that were expected, by name. `folder` holds its `_METADATA`."""

    folder: Path
    arrays: Mapping[str, Stored]


@dataclass(frozen=True, slots=True)
class Leaf:
    """An array to be saved. `read` makes it and `release` lets go of what it was made from."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    read: Callable[[], np.ndarray]
    release: Callable[[], None] = lambda: None


# -- finding -----------------------------------------------------------------------------------------------


def is_orbax(folder: Path) -> bool:
    """Whether the folder has Orbax's layout, be it whole or half-written. One with *.safetensors has not."""
    if os.path.lexists(folder / ABOUT):
        return True
    if any(folder.glob("*.safetensors")):
        return False
    return bool(_places(folder) or _unfinished(folder))


def read_about(folder: Path) -> dict[str, Any]:
    """What `jaxserve.json` says, `{}` where there is none. Raises CheckpointError for a later version's."""
    file = folder / ABOUT
    if not os.path.lexists(file):
        return {}
    about = read_object(file, limit=_MAX_ABOUT_BYTES, unique_keys=True)
    version = about.get("format_version")
    if version != FORMAT_VERSION:
        raise CheckpointError(
            f"{file}: format_version is {quote(str(version))}, and this jaxserve reads {FORMAT_VERSION}; "
            "convert the model again, or use the jaxserve that wrote it"
        )
    return about


def weight_files(folder: Path) -> list[Path]:
    """Every file that the weights may depend on, sorted. Raises CheckpointError where there is none."""
    roots, _ = _roots(folder, read_about(folder))
    return sorted({file for root in roots for file in root.rglob("*") if file.is_file()})


def _roots(folder: Path, about: Mapping[str, Any]) -> tuple[list[Path], TreePath | None]:
    """The Orbax checkpoints to look in, and where in their trees, if jaxserve.json says so."""
    if not about:
        return _places(folder) or _explain_none(folder), None
    file = folder / ABOUT
    weights, tree = about.get("weights"), about.get("tree")
    if not isinstance(weights, str) or not _is_inside(weights):
        raise CheckpointError(f'{file}: "weights" is {quote(str(weights))}, which is no folder inside of it')
    if not isinstance(tree, str):
        raise CheckpointError(f'{file}: "tree" is {quote(str(tree))}, expected a dotted path, or ""')
    _check_files(folder, about.get("files", {}))
    place = folder / weights
    if not (place / _METADATA).is_file():
        raise CheckpointError(f"{place}: has no {_METADATA}, so it is no (whole) Orbax checkpoint; {_AGAIN}")
    return [place], tuple(filter(None, tree.split(".")))


_AGAIN: Final = "copy it again, or convert or save it again"


def _is_inside(relative: str) -> bool:
    parts = Path(relative).parts
    return bool(relative) and not os.path.isabs(relative) and ".." not in parts and "\0" not in relative


def _check_files(folder: Path, files: object) -> None:
    """Raises CheckpointError unless every file that jaxserve.json lists is there in its size."""
    file = folder / ABOUT
    if not isinstance(files, dict):
        raise CheckpointError(f'{file}: "files" is no object that gives the size of each file')
    for name, size in files.items():
        if not _is_inside(name):
            raise CheckpointError(f"{file}: names the file {quote(name)}, which is not inside the folder")
        try:
            actual = os.stat(folder / name).st_size
        except OSError as error:
            raise CheckpointError(
                f"{folder / name}: cannot be read ({error.strerror or error}); {_AGAIN}"
            ) from error
        if actual != size:
            raise CheckpointError(
                f"{folder / name}: has {actual} bytes, {ABOUT} says {str(size)[:20]}; {_AGAIN}"
            )


def _places(folder: Path) -> list[Path]:
    """Folders with `_METADATA`: this one, else those in it, else those of the last step in it."""
    if (folder / _METADATA).is_file():
        return [folder]
    try:
        inner = [entry for entry in folder.iterdir() if entry.is_dir() and _UNFINISHED not in entry.name]
    except OSError:
        return []
    steps = {int(match[1]): entry for entry in inner if (match := _STEP.fullmatch(entry.name))}
    if steps:
        last = steps[max(steps)]
        if (last / _METADATA).is_file():
            return [last]
        # a last step that is not whole must not quietly become the one before it
        if (found := _items(last)) or any(os.path.lexists(last / name) for name in _TRACES):
            return found or [last]
    return _items(folder)


def _items(folder: Path) -> list[Path]:
    found = (file.parent for file in folder.glob(f"*/{_METADATA}"))
    return sorted(item for item in found if _UNFINISHED not in item.name)


def _unfinished(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.glob(f"*{_UNFINISHED}*"))


def _explain_none(folder: Path) -> NoReturn:
    if unfinished := _unfinished(folder):
        raise CheckpointError(
            f"{folder / unfinished[0]}: is a save that Orbax did not finish, and there is no other; "
            "save again"
        )
    raise CheckpointError(f"{folder}: has no Orbax checkpoint (a folder with {_METADATA})")


# -- opening -----------------------------------------------------------------------------------------------


def open_orbax(folder: Path, shapes: Mapping[str, tuple[int, ...]]) -> OrbaxCheckpoint:
    """The folder's checkpoint, if it holds exactly these arrays (dotted name to shape) of the model.

    Reads what the checkpoint says of itself, and no weight. Beside the model's own top names ("ends",
    "layers") anything may stand. Raises CheckpointError naming keys that are missing, unknown, of another
    shape or no float; files that are missing or cut off; a checkpoint that is not whole; or, where a name is
    found in several places equally near the root, those.
    """
    roots, tree = _roots(folder, read_about(folder))
    if not shapes:
        raise ValueError("no array is expected")
    names = {tuple(name.split(".")): name for name in shapes}
    found: list[tuple[Path, TreePath, dict[TreePath, Stored]]] = []
    for root in roots:
        if tree is None and root != folder and root.name in _OPTIMIZER:
            continue
        stored = _read_tree(root)
        for prefix in _prefixes(stored, names) if tree is None else [tree]:
            depth = len(prefix)
            below = {key[depth:]: entry for key, entry in stored.items() if key[:depth] == prefix}
            found.append((root, prefix, below))
    if not found:
        raise CheckpointError(
            f"{roots[0] if len(roots) == 1 else folder}: holds none of the model's arrays: expected "
            f"{listing(shapes)}, as nnx.state of the model gives them; use the model's own checkpoint"
        )
    whole = [entry for entry in found if names.keys() <= entry[2].keys()] or found
    nearest = min(len(prefix) for _, prefix, _ in whole)
    chosen = [entry for entry in whole if len(entry[1]) == nearest]
    if len(chosen) > 1:
        where = [f"{root.name}: {'.'.join(prefix) or 'the top'}" for root, prefix, _ in chosen]
        raise CheckpointError(
            f"{folder}: the model is there more than once: {listing(where, 'place')}; say which in {ABOUT}: "
            f'{{"format_version": {FORMAT_VERSION}, "weights": FOLDER, "tree": PATH}}'
        )
    root, _, below = chosen[0]
    _check(root, below, {key: tuple(shapes[name]) for key, name in names.items()})
    return OrbaxCheckpoint(root, {name: below[key] for key, name in names.items()})


def _read_tree(root: Path) -> dict[TreePath, Stored]:
    """Every array in the checkpoint, by its path without nnx's ".value" at the end."""
    import orbax.checkpoint as ocp

    try:
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
            metadata = reader.metadata(root.resolve()).item_metadata
        if metadata is None:
            raise ValueError("its metadata cannot be read")
        tree = metadata.tree
    except Exception as error:  # Orbax and tensorstore raise whatever the broken file led to
        raise CheckpointError(
            f"{root}: is no (whole) Orbax checkpoint: {_first_line(error)}; {_AGAIN}"
        ) from error
    arrays: dict[TreePath, Stored] = {}
    for path, entry in _flatten(tree, ()):
        if getattr(entry, "shape", None) is None or getattr(entry, "dtype", None) is None:
            continue  # an empty node, a text
        key = path[:-1] if path[-1:] == ("value",) else path
        arrays[key] = Stored(path, tuple(entry.shape), np.dtype(entry.dtype))
    return arrays


def _flatten(tree: Any, path: TreePath) -> Iterator[tuple[TreePath, Any]]:
    if isinstance(tree, Mapping):
        for key, inner in tree.items():
            yield from _flatten(inner, (*path, str(key)))
    elif isinstance(tree, list | tuple):
        for index, inner in enumerate(tree):
            yield from _flatten(inner, (*path, str(index)))
    else:
        yield path, tree


def _prefixes(stored: Iterable[TreePath], names: Iterable[TreePath]) -> list[TreePath]:
    """Where in the tree the model may stand: in front of any of its names, not in an optimizer's state."""
    endings: dict[str, list[TreePath]] = {}
    for name in names:
        endings.setdefault(name[-1], []).append(name)
    prefixes = {
        key[: len(key) - len(name)]
        for key in stored
        for name in endings.get(key[-1] if key else "", ())
        if key[len(key) - len(name) :] == name
    }
    return sorted(prefix for prefix in prefixes if _OPTIMIZER.isdisjoint(prefix))


def _check(root: Path, below: Mapping[TreePath, Stored], wanted: Mapping[TreePath, tuple[int, ...]]) -> None:
    tops = {name[0] for name in wanted}
    missing = {".".join(name) for name in wanted.keys() - below.keys()}
    unknown = {
        ".".join(entry.path)
        for key, entry in below.items()
        if key[:1] and key[0] in tops and key not in wanted and _is_float(entry.dtype)
    }
    faults = [f"lacks {listing(missing)}"] if missing else []
    faults += [f"has unknown {listing(unknown)}"] if unknown else []
    if faults:
        raise CheckpointError(
            f"{root}: the weights are not those of this model: {'; '.join(faults)}; config.json and the "
            "weights must come from the same model, one array for each layer"
        )
    misshaped = [
        f"{quote('.'.join(name))} is {below[name].shape}, expected {shape}"
        for name, shape in wanted.items()
        if below[name].shape != shape
    ]
    if misshaped:
        more = f" and {len(misshaped) - 5} more" if len(misshaped) > 5 else ""
        raise CheckpointError(
            f"{root}: {len(misshaped)} of another shape than config.json leads to: "
            f"{', '.join(misshaped[:5])}{more}; config.json and the weights must come from the same model"
        )
    for name in wanted:
        if below[name].dtype.name not in _WEIGHT_DTYPES:
            raise CheckpointError(
                f"{root}: key {quote('.'.join(name))} is {below[name].dtype}, and weights must be "
                f"{', '.join(_WEIGHT_DTYPES)}"
            )


def _is_float(dtype: np.dtype[Any]) -> bool:
    """Counters and random keys of a training state are none."""
    return dtype.name in _WEIGHT_DTYPES or dtype.kind in "fc"


# -- restoring ---------------------------------------------------------------------------------------------


def restore(
    checkpoint: OrbaxCheckpoint, shardings: Mapping[str, "Sharding"], *, batch_bytes: int = _BATCH_BYTES
) -> Iterator[tuple[str, "jax.Array"]]:
    """Yields each of the named arrays at its sharding, in the dtype it was saved in.

    Some `batch_bytes` are read at a time, or one array if that is larger; each device's part goes to it
    alone. Raises CheckpointError naming the key where an array cannot be read.
    """
    batch: dict[str, Stored] = {}
    for name in shardings:
        entry = checkpoint.arrays[name]
        if batch and sum(one.nbytes for one in batch.values()) + entry.nbytes > batch_bytes:
            yield from _drain(_restore_batch(checkpoint, batch, shardings))
            batch = {}
        batch[name] = entry
    yield from _drain(_restore_batch(checkpoint, batch, shardings))


def _drain(arrays: dict[str, "jax.Array"]) -> Iterator[tuple[str, "jax.Array"]]:
    while arrays:  # so that none is kept here once the caller is done with it
        yield arrays.popitem()


def _restore_batch(
    checkpoint: OrbaxCheckpoint, batch: Mapping[str, Stored], shardings: Mapping[str, "Sharding"]
) -> dict[str, "jax.Array"]:
    try:
        return _restore_together(checkpoint.folder, batch, shardings)
    except Exception as error:
        if len(batch) > 1:  # once more by itself, to find which
            for name in batch:
                _restore_batch(checkpoint, {name: batch[name]}, shardings)
        keys = ", ".join(map(quote, batch))
        raise CheckpointError(
            f"{checkpoint.folder}: key {keys} cannot be restored: {_first_line(error)}; {_AGAIN}"
        ) from error


def _restore_together(
    folder: Path, batch: Mapping[str, Stored], shardings: Mapping[str, "Sharding"]
) -> dict[str, "jax.Array"]:
    import jax
    import orbax.checkpoint as ocp

    item: dict[str, Any] = {}
    arguments: dict[str, Any] = {}
    for name, entry in batch.items():
        sharding = shardings[name]
        _put(item, entry.path, jax.ShapeDtypeStruct(entry.shape, entry.dtype, sharding=sharding))
        how = ocp.ArrayRestoreArgs(sharding=sharding, global_shape=entry.shape, dtype=entry.dtype)
        _put(arguments, entry.path, how)
    how_all = ocp.args.PyTreeRestore(item, restore_args=arguments, partial_restore=True)
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
        restored = reader.restore(folder.resolve(), args=how_all)
    return {name: _get(restored, entry.path) for name, entry in batch.items()}


# -- saving ------------------------------------------------------------------------------------------------


def save(folder: Path, leaves: Iterable[Leaf], *, wrote: Callable[[Leaf], None] = lambda leaf: None) -> None:
    """Writes an Orbax checkpoint, one array after the other, each made when its turn comes.

    `wrote` is called after each. `folder` must not exist; it appears when everything is written. The arrays
    are marked as `np.ndarray`, so that Orbax restores them without anything of ours.
    """
    import jax
    import orbax.checkpoint as ocp

    class Streamed(ocp.type_handlers.NumpyHandler):  # type: ignore[misc]
        """Orbax's own would copy all arrays first; this waits for each to be written before the next."""

        async def serialize(self, values: Any, infos: Any, args: Any = None) -> list[Any]:
            for leaf, info, how in zip(values, infos, args, strict=True):
                array = leaf.read()
                if array.shape != leaf.shape or array.dtype != leaf.dtype:
                    raise ValueError(f"{array.shape=} {array.dtype=} is not what was said: {leaf}")
                for written in await super().serialize([array], [info], [how]):
                    written.result()
                del array
                leaf.release()
                wrote(leaf)
            return []

    tree: dict[str, Any] = {}
    for leaf in leaves:
        _put(tree, tuple(leaf.name.split(".")), leaf)
    handler = ocp.PyTreeCheckpointHandler(
        type_handler_registry=ocp.type_handlers.create_type_handler_registry(
            (Leaf, Streamed(deepcopy_host_arrays=False)), (jax.Array, ocp.type_handlers.ArrayHandler())
        )
    )
    chunks = jax.tree.map(lambda _: ocp.SaveArgs(chunk_byte_size=_CHUNK_BYTES), tree)
    with ocp.Checkpointer(handler) as writer:
        writer.save(folder.resolve(), args=ocp.args.PyTreeSave(tree, save_args=chunks))


def write_about(folder: Path, **facts: object) -> None:
    """Writes jaxserve.json for a folder whose weights are in `weights/`, with its files' sizes."""
    inside = (file for file in (folder / WEIGHTS).rglob("*") if file.is_file())
    names = sorted(file.relative_to(folder).as_posix() for file in inside)
    about = {
        "format_version": FORMAT_VERSION,
        "weights": WEIGHTS,
        "tree": "",
        **facts,
        "files": {name: os.stat(folder / name).st_size for name in names},
    }
    with open(folder / ABOUT, "w", encoding="utf-8") as file:
        file.write(json.dumps(about, indent=1, ensure_ascii=False) + "\n")
        file.flush()
        os.fsync(file.fileno())


def _put(tree: dict[str, Any], path: TreePath, value: object) -> None:
    for key in path[:-1]:
        tree = tree.setdefault(key, {})
    tree[path[-1]] = value


def _get(tree: Any, path: TreePath) -> Any:
    for key in path:
        tree = tree[key]
    return tree


def _first_line(error: BaseException) -> str:
    """Of what it all began with: Orbax wraps what tensorstore says."""
    while (cause := error.__cause__ or error.__context__) is not None:
        error = cause
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0][:300] if text else ''}"
