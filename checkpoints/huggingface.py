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
from checkpoints.safetensors_reader import MAX_HEADER_BYTES, SafetensorsFile, TensorInfo, weight_dtype

__all__ = [
    "Checkpoint", "CheckpointError", "Target", "TensorInfo", "check", "load", "open_checkpoint", "read_config",
    "read_json", "read_target", "resolve_model",
]  # fmt: skip

_SINGLE: Final = "model.safetensors"
_INDEX: Final = "model.safetensors.index.json"
_PICKLES: Final = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
_MAX_JSON_BYTES: Final = 16 << 20
_COMPARE_BYTES: Final = 8 << 20
_HUB_ID: Final = re.compile(r"(?:[\w.-]+/)?[\w.-]+", re.ASCII)
_SMALL_FILES: Final = ["*.json", "*.jinja", "tokenizer.model"]
# Some repositories hold the weights twice: in subfolders (onnx/, original/) or as Mistral's consolidated files.
_NOT_DOWNLOADED: Final = ["*/*", "consolidated*"]


def resolve_model(model: str, *, revision: str | None = None, weights: bool = True) -> Path:
    """The folder of `model`: a local folder, or a hub id, downloaded or found in the hub's cache.

    `revision` is a branch, tag or commit, for hub ids only. `weights=False` fetches config and tokenizer
    alone. HF_HUB_OFFLINE, HF_HOME and HF_TOKEN act as huggingface_hub documents. Raises CheckpointError.
    """
    folder = Path(model).expanduser() if model else None
    if folder is not None and folder.is_dir():
        if revision is not None:
            raise CheckpointError(f"{folder}: is a local folder, so a revision ({revision}) cannot be chosen")
        return folder
    if folder is not None and os.path.lexists(folder):
        raise CheckpointError(f"{folder}: is not a folder; MODEL is the folder that holds config.json, or a hub id")
    if not _HUB_ID.fullmatch(model) or model.startswith(".") or ".." in model or "--" in model or len(model) > 96:
        raise CheckpointError(f"{quote(model)}: there is no such folder, and it is not a hub id (owner/name)")
    return _download(model, revision, [*_SMALL_FILES, "*.safetensors"] if weights else _SMALL_FILES)


def _download(model: str, revision: str | None, patterns: list[str]) -> Path:
    import huggingface_hub  # here, since it takes a quarter of a second that a local folder need not wait for
    from huggingface_hub import errors

    at = f" at revision {revision}" if revision else ""
    try:
        return Path(
            huggingface_hub.snapshot_download(
                model, revision=revision, allow_patterns=patterns, ignore_patterns=_NOT_DOWNLOADED
            )
        )
    except errors.HFValidationError as error:
        raise CheckpointError(f"{model}: there is no such folder, and it is not a hub id: {error}") from error
    except errors.GatedRepoError as error:
        raise CheckpointError(
            f"{model}: is gated; accept its terms at https://huggingface.co/{model} and set HF_TOKEN"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise CheckpointError(
            f"{model}: there is no such folder, nor such a model on the hub; check the name, or set HF_TOKEN "
            "if it is private"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise CheckpointError(f"{model}: the hub has no revision {revision}") from error
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled) as error:
        offline = huggingface_hub.constants.HF_HUB_OFFLINE
        why = "HF_HUB_OFFLINE is set" if offline else "the hub cannot be reached"
        raise CheckpointError(
            f"{model}{at}: there is no such folder, it is not (wholly) in the hub's cache, and {why}; "
            f"run `hf download {model}` with a connection, or give a local folder"
        ) from error
    except Exception as error:  # also the errors of its HTTP library, which is another in each major version
        raise CheckpointError(f"{model}{at}: download failed: {type(error).__name__}: {error}") from error


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
    """The tensors of a folder, by name, over all its shards. Reading is thread-safe; see `SafetensorsFile`."""

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

        `index` holds one slice of step 1 within the bounds for each leading axis, as JAX hands to the callback
        of `jax.make_array_from_callback`. Raises ValueError for any other, where numpy would clip in silence.
        """
        array = self.read(name)
        inside = len(index) <= array.ndim and all(
            (cut.start or 0) >= 0 and (cut.stop is None or 0 <= cut.stop <= size) and cut.step in (None, 1)
            for cut, size in zip(index, array.shape, strict=False)
        )
        if not inside:
            raise ValueError(f"{index=} is not one slice of step 1 for each axis within {array.shape=} of {name!r}")
        return array[(*index, ...)]  # the ellipsis keeps a tensor without axes an array

    def release(self, name: str) -> None:
        """Lets go of the memory that holds the tensor's pages; arrays of it stay valid (read again if used)."""
        self._file(name).release(name)

    def _file(self, name: str) -> SafetensorsFile:
        if name not in self._file_of:
            raise CheckpointError(f"{self.folder}: has no key {quote(name)}")
        return self._file_of[name]


def open_checkpoint(folder: Path) -> Checkpoint:
    """Opens the folder's weights: `model.safetensors`, else the index and its shards, else the one *.safetensors.

    (transformers looks in this order too.) Reads every header and checks it, and no data. Raises
    CheckpointError: no safetensors, pickles only, shards without an index, an index that does not match its
    shards key for key, the same key in two shards, or any fault in a file.
    """
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: is not a folder")
    if os.path.lexists(folder / _SINGLE):
        return Checkpoint(folder, [SafetensorsFile(folder / _SINGLE)])
    if os.path.lexists(folder / _INDEX):
        return Checkpoint(folder, _open_shards(folder))
    found = sorted(path.name for path in folder.iterdir())
    shards = [name for name in found if name.endswith(".safetensors")]
    if len(shards) == 1:
        return Checkpoint(folder, [SafetensorsFile(folder / shards[0])])
    if shards:
        raise CheckpointError(f"{folder}: has {len(shards)} safetensors files but no {_INDEX}; download it too")
    pickles = [name for name in found if name.endswith(_PICKLES)]
    if pickles:
        raise CheckpointError(
            f"{folder}: has its weights as pickle only ({pickles[0]}), and opening a pickle can run code that is "
            "in it; convert where you trust it: transformers' from_pretrained, then save_pretrained (safetensors)"
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
                f"{index}: key {quote(key)} is in {quote(str(shard))}, which is not the name of a .safetensors file "
                "in this folder; the index is refused"
            )
        keys_of.setdefault(shard, set()).add(key)
    absent = [shard for shard in keys_of if not (folder / shard).exists()]
    if absent:
        raise CheckpointError(f"{index}: names files that are missing, {listing(absent)}; download them again")

    files = []
    for shard, keys in sorted(keys_of.items()):
        file = SafetensorsFile(folder / shard)
        lacking, extra = keys - file.tensors.keys(), file.tensors.keys() - keys
        if lacking:
            raise CheckpointError(f"{file.path}: lacks what {_INDEX} says is in it, {listing(lacking)}; download both")
        twice = extra & weight_map.keys()
        if twice:
            raise CheckpointError(f"{file.path}: holds what is in another shard too, {listing(twice)}; remove one")
        if extra:
            raise CheckpointError(f"{file.path}: holds what {_INDEX} does not name, {listing(extra)}; download both")
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
    unknown = {
        name
        for name in checkpoint.names
        if name not in wanted and name not in aliases and not any(pattern.fullmatch(name) for pattern in patterns)
    }
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
            misshaped.append(f"{quote(name)} is {info.shape}, expected {target.stored_shape}")
    if misshaped:
        more = f" and {len(misshaped) - 5} more" if len(misshaped) > 5 else ""
        raise CheckpointError(
            f"{checkpoint.folder}: {len(misshaped)} with a shape that config.json does not lead to: "
            f"{', '.join(misshaped[:5])}{more}"
        )
    for alias, name in aliases.items():
        if alias in checkpoint and name in checkpoint and not _equal(checkpoint, alias, name):
            raise CheckpointError(
                f"{checkpoint.path_of(alias)}: key {quote(alias)} differs from {quote(name)}, though config.json ties "
                'them; if the model has its own output head, set "tie_word_embeddings": false'
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
    """`target`'s array, or its part at `index` (a slice for each axis of `target.shape`): C-contiguous, aligned.

    A read-only view of the file where stored dtype and order fit; else one copy of that part, in the target's
    dtype, and nothing more. Raises CheckpointError where a finite value would become infinite in f16.
    """
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


def _equal(checkpoint: Checkpoint, first: str, second: str) -> bool:
    """Whether two tensors hold the same bits (the same f32 values where their dtypes differ), a piece at a time."""
    if checkpoint.info(first).shape != checkpoint.info(second).shape:
        return False
    a, b = checkpoint.read(first).reshape(-1), checkpoint.read(second).reshape(-1)
    as_bits = a.dtype == b.dtype
    step = _COMPARE_BYTES // 4
    for begin in range(0, a.size, step):
        piece_a, piece_b = a[begin : begin + step], b[begin : begin + step]
        if not as_bits:
            piece_a, piece_b = piece_a.astype(np.float32), piece_b.astype(np.float32)
        if not np.array_equal(piece_a.view(np.uint8), piece_b.view(np.uint8)):
            return False
    return True
