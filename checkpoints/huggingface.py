"""Reads a Hugging Face model folder: finds or downloads it, its config, and its weights tensor by tensor.

It does not know about models, meshes or JAX: the caller says which keys it expects (`Target`), as what, and
places each array. Nothing is read into memory as a whole; tensors are views of mapped files until they are
converted, so a model larger than memory loads onto its devices one tensor, or one shard of one, at a time.

Life of a load: `resolve_model` → `read_config` → `open_checkpoint` (all headers checked) → `load`, which
compares names, shapes and dtypes first and only then yields; or `check`, then `read_target(…, index)` from
inside `jax.make_array_from_callback`, which reads each device's part alone.

Folder layout as written by transformers' `save_pretrained`: `model.safetensors`, or `*.safetensors` shards
with `model.safetensors.index.json`, whose "weight_map" gives the shard of each key. Pickles are never opened.
"""

import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import ml_dtypes
import numpy as np
from numpy.typing import DTypeLike

from checkpoints.files import CheckpointError, listing, quote, read_object
from checkpoints.hub import resolve_model
from checkpoints.safetensors_reader import MAX_HEADER_BYTES, SafetensorsFile, TensorInfo, weight_dtype

__all__ = [
    "Checkpoint", "CheckpointError", "Target", "TensorInfo", "check", "load", "open_checkpoint",
    "read_config", "read_json", "read_target", "resolve_model",
]  # fmt: skip

_SINGLE: Final = "model.safetensors"
_INDEX: Final = "model.safetensors.index.json"
_PICKLES: Final = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
_MAX_JSON_BYTES: Final = 16 << 20
_COMPARE_ELEMENTS: Final = 2 << 20


def read_config(folder: Path) -> dict[str, Any]:
    """The object in config.json. Raises CheckpointError as `read_json`."""
    return read_json(folder, "config.json")


def read_json(folder: Path, name: str, *, required: bool = True) -> dict[str, Any]:
    """The JSON object in `folder/name`; `{}` where it is missing and not `required`.

    Raises CheckpointError: missing, not a regular file, over 16 MiB, not UTF-8, not JSON, not an object.
    """
    path = folder / name
    if not os.path.lexists(path):
        if not required:
            return {}
        raise CheckpointError(f"{folder}: has no {name}; a model folder needs one")
    return read_object(path, limit=_MAX_JSON_BYTES, unique_keys=False)


class Checkpoint:
    """The tensors of a folder, by name, over all shards (see `SafetensorsFile`). Reading is thread-safe."""

    folder: Path
    names: tuple[str, ...]  # sorted

    def __init__(self, folder: Path, files: Iterable[SafetensorsFile]) -> None:
        self.folder = folder
        self._file_of = {name: file for file in files for name in file.tensors}
        self.names = tuple(sorted(self._file_of))

    def __contains__(self, name: object) -> bool:
        return name in self._file_of

    def path_of(self, name: str) -> Path:
        """The file that holds `name`, for messages."""
        return self._file(name).path

    def info(self, name: str) -> TensorInfo:
        """Shape and dtype (the format's word, such as "BF16") without touching the data."""
        return self._file(name).tensors[name]

    def read(self, name: str) -> np.ndarray:
        """The tensor as a read-only view of the file: f16, bf16 or f32, not copied, perhaps unaligned.

        Raises CheckpointError for an unknown name or another dtype.
        """
        return self._file(name).read(name)

    def read_slice(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        """`read(name)[index]`: only the pages it covers are read from disk once it is used.

        `index` holds a slice of step 1 within the bounds for each leading axis, as JAX hands to the callback
        of `jax.make_array_from_callback`. Raises ValueError for any other, where numpy would clip silently.
        """
        array = self.read(name)
        inside = len(index) <= array.ndim and all(
            (cut.start or 0) >= 0 and (cut.stop is None or 0 <= cut.stop <= size) and cut.step in (None, 1)
            for cut, size in zip(index, array.shape, strict=False)
        )
        if not inside:
            raise ValueError(f"{name!r}: {index=} is not slices of step 1 within {array.shape=}")
        return array[index] if index else array  # numpy's array[()] would be no array where there are no axes

    def release(self, name: str) -> None:
        """Lets go of the memory that holds the tensor's pages; arrays of it stay valid and are read again."""
        self._file(name).release(name)

    def _file(self, name: str) -> SafetensorsFile:
        if name not in self._file_of:
            raise CheckpointError(f"{self.folder}: has no key {quote(name)}")
        return self._file_of[name]


def open_checkpoint(folder: Path) -> Checkpoint:
    """Opens `model.safetensors`, else the index and its shards, else the only *.safetensors.

    The order is transformers'. Reads every header and checks it, and no data. Raises CheckpointError: no
    safetensors, pickles only, shards without an index, an index that does not match its shards key for key,
    the same key in two shards, or any fault in a file.
    """
    if not os.path.isdir(folder):
        raise CheckpointError(f"{folder}: is not a folder")
    if os.path.lexists(folder / _SINGLE):
        return Checkpoint(folder, [SafetensorsFile(folder / _SINGLE)])
    if os.path.lexists(folder / _INDEX):
        return Checkpoint(folder, _open_shards(folder))
    try:
        found = sorted(os.listdir(folder))
    except OSError as error:
        raise CheckpointError(f"{folder}: cannot be listed ({error.strerror or error})") from error
    shards = [name for name in found if name.endswith(".safetensors")]
    if len(shards) == 1:
        return Checkpoint(folder, [SafetensorsFile(folder / shards[0])])
    if shards:
        raise CheckpointError(f"{folder}: has {listing(shards, 'shard')}, but no {_INDEX}; add it")
    pickles = [name for name in found if name.endswith(_PICKLES)]
    if pickles:
        raise CheckpointError(
            f"{folder}: has its weights as pickle only ({pickles[0]}), and a pickle can run code when it is "
            "opened; if you trust it, convert it to safetensors with transformers' save_pretrained"
        )
    raise CheckpointError(f"{folder}: has no weights (*.safetensors)")


def _open_shards(folder: Path) -> list[SafetensorsFile]:
    index = folder / _INDEX
    weight_map = read_object(index, limit=MAX_HEADER_BYTES, unique_keys=True).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f'{index}: has no "weight_map" object that gives a file for each key')
    keys_of: dict[str, set[str]] = {}
    for key, shard in weight_map.items():
        # A bare file name: anything else ("../x", "/x", "a\\b") could reach out of the folder.
        if not isinstance(shard, str) or not re.fullmatch(r"[^/\\\0]+\.safetensors", shard):
            raise CheckpointError(
                f"{index}: key {quote(key)} is said to be in {quote(str(shard))}, which is not the plain "
                "name of a .safetensors file; the index is refused"
            )
        keys_of.setdefault(shard, set()).add(key)
    absent = [shard for shard in keys_of if not os.path.exists(folder / shard)]
    if absent:
        raise CheckpointError(f"{index}: the folder lacks {listing(absent, 'file')}; download again")

    files = []
    for shard, keys in sorted(keys_of.items()):
        file = SafetensorsFile(folder / shard)
        lacking, extra = keys - file.tensors.keys(), file.tensors.keys() - keys
        twice = extra & weight_map.keys()
        faults = (
            ("lacks what the index places in it", lacking),
            ("holds what the index places in another shard, so it is there twice", twice),
            ("holds what the index does not name", extra),
        )
        for fault, at in faults:
            if at:
                raise CheckpointError(f"{file.path}: {fault}, {listing(at)}; download it and {_INDEX} again")
        files.append(file)
    return files


@dataclass(frozen=True, slots=True)
class Target:
    """What the caller wants of one checkpoint key.

    `shape` and `dtype` (f16, bf16 or f32) are the array's as it is handed over. `axes`, where given, is the
    permutation from the stored tensor to it, as for numpy's transpose: stored [out, in] → (1, 0) → [in, out].
    """

    key: str
    shape: tuple[int, ...]
    dtype: DTypeLike
    axes: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if self.axes is not None and sorted(self.axes) != list(range(len(self.shape))):
            raise ValueError(f"{self.key}: {self.axes=} is not a permutation of the axes of {self.shape=}")
        if np.dtype(self.dtype) not in (np.float16, np.float32, ml_dtypes.bfloat16):
            raise ValueError(f"{self.key}: {self.dtype=} is none of float16, bfloat16, float32")

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """The shape that the tensor has in the file."""
        if self.axes is None:
            return self.shape
        return tuple(self.shape[self.axes.index(axis)] for axis in range(len(self.shape)))


def check(
    checkpoint: Checkpoint,
    targets: Iterable[Target],
    *,
    ignored: Iterable[str | re.Pattern[str]] = (),
    tied: Mapping[str, str] | None = None,
) -> None:
    """Raises CheckpointError unless the checkpoint holds exactly the targets' keys, in their shapes.

    `ignored`: patterns that match whole keys which may be there and are not read, for buffers such as
    `model.layers.0.self_attn.rotary_emb.inv_freq`. `tied`: {"lm_head.weight": "model.embed_tokens.weight"}
    says that the first key may be there as a copy of the second; a copy that differs raises. Only such pairs
    are read, everything else is judged from the headers. Raises ValueError for two targets with one key.
    """
    wanted: dict[str, Target] = {}
    for target in targets:
        if target.key in wanted:
            raise ValueError(f"two targets have the key {target.key!r}")
        wanted[target.key] = target
    aliases = {alias: key for alias, key in (tied or {}).items() if alias not in wanted}
    patterns = [re.compile(pattern) for pattern in ignored]

    missing = wanted.keys() - set(checkpoint.names)
    spare = set(checkpoint.names) - wanted.keys() - aliases.keys()
    unknown = {name for name in spare if not any(pattern.fullmatch(name) for pattern in patterns)}
    faults = [f"lacks {listing(missing)}"] if missing else []
    faults += [f"has unknown {listing(unknown)}"] if unknown else []
    if faults:
        raise CheckpointError(
            f"{checkpoint.folder}: the weights are not those of this model: {'; '.join(faults)}; "
            "config.json and the weights must come from the same model"
        )
    misshaped = []
    for name, target in wanted.items():
        info = checkpoint.info(name)
        weight_dtype(info, name, checkpoint.path_of(name))
        if info.shape != target.stored_shape:
            misshaped.append(_shape_fault(info, target))
    if misshaped:
        more = f" and {len(misshaped) - 5} more" if len(misshaped) > 5 else ""
        raise CheckpointError(
            f"{checkpoint.folder}: {len(misshaped)} of another shape than config.json leads to: "
            f"{', '.join(misshaped[:5])}{more}; config.json and the weights must come from the same model"
        )
    for alias, name in aliases.items():
        if alias in checkpoint and name in checkpoint and not _equal(checkpoint, alias, name):
            raise CheckpointError(
                f"{checkpoint.path_of(alias)}: key {quote(alias)} differs from {quote(name)}, but config.json"
                ' ties them; if the model has its own output head, set "tie_word_embeddings": false'
            )


def load(
    checkpoint: Checkpoint,
    targets: Iterable[Target],
    *,
    ignored: Iterable[str | re.Pattern[str]] = (),
    tied: Mapping[str, str] | None = None,
) -> Iterator[tuple[Target, np.ndarray]]:
    """Checks at once (see `check`), then yields every target with its array, in the order of the files.

    Arrays are as `read_target` gives them. To hold one tensor at a time, place the array and `del` it before
    the loop goes on. Raises CheckpointError, from the call itself for all but a value too large for f16.
    """
    targets = list(targets)
    check(checkpoint, targets, ignored=ignored, tied=tied)
    targets.sort(key=lambda target: (checkpoint.path_of(target.key), checkpoint.info(target.key).begin))

    def arrays() -> Iterator[tuple[Target, np.ndarray]]:
        for target in targets:
            yield target, read_target(checkpoint, target)
            checkpoint.release(target.key)

    return arrays()


def read_target(checkpoint: Checkpoint, target: Target, index: tuple[slice, ...] | None = None) -> np.ndarray:
    """`target`'s array, or its part at `index` (slices of `target.shape`): C-contiguous and aligned.

    A read-only view of the file where stored dtype and order fit; else one copy of that part, in the target's
    dtype, and nothing more. Raises CheckpointError where the stored shape is another, or where a finite value
    would become infinite in f16.
    """
    info = checkpoint.info(target.key)
    if info.shape != target.stored_shape:
        raise CheckpointError(f"{checkpoint.path_of(target.key)}: key {_shape_fault(info, target)}")
    axes = target.axes or tuple(range(len(target.shape)))
    where = (*(index or ()), *(slice(None),) * (len(target.shape) - len(index or ())))
    array = checkpoint.read_slice(target.key, tuple(where[axes.index(axis)] for axis in range(len(axes))))
    array = array.transpose(axes)
    dtype = np.dtype(target.dtype)
    if array.dtype == dtype:
        return np.require(array, requirements=["C", "A"])
    with np.errstate(all="ignore"):
        result = array.astype(dtype, order="C")
    # bf16 reaches 3e38 and f16 only 65504, so 1e5 would quietly turn into infinity.
    if dtype == np.float16 and np.count_nonzero(np.isinf(result)) != np.count_nonzero(np.isinf(array)):
        raise CheckpointError(
            f"{checkpoint.path_of(target.key)}: key {quote(target.key)} has values beyond float16's 65504; "
            "use bfloat16 or float32"
        )
    return result


def _shape_fault(info: TensorInfo, target: Target) -> str:
    return f"{quote(target.key)} is {info.shape}, expected {target.stored_shape}"


def _equal(checkpoint: Checkpoint, first: str, second: str) -> bool:
    """Whether two tensors hold the same bits (or, in two dtypes, the same f32 values), a piece at a time."""
    if checkpoint.info(first).shape != checkpoint.info(second).shape:
        return False
    a, b = checkpoint.read(first).reshape(-1), checkpoint.read(second).reshape(-1)
    as_bits = a.dtype == b.dtype
    for begin in range(0, a.size, _COMPARE_ELEMENTS):
        piece = slice(begin, begin + _COMPARE_ELEMENTS)
        piece_a, piece_b = a[piece], b[piece]
        if not as_bits:
            piece_a, piece_b = piece_a.astype(np.float32), piece_b.astype(np.float32)
        if not np.array_equal(piece_a.view(np.uint8), piece_b.view(np.uint8)):
            return False
    checkpoint.release(first)
    checkpoint.release(second)
    return True
