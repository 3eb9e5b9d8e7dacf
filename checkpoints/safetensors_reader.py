"""One safetensors file: checks its header byte by byte, then hands out tensors as views of the mapped file.

It does not know about models, shards or devices. Nothing but the header is read until a tensor is touched.

Format (https://huggingface.co/docs/safetensors/index#format, and the limits of the reference implementation,
huggingface/safetensors `safetensors/src/tensor.rs`): a little-endian u64 header length, that many bytes of
UTF-8 JSON `{name: {"dtype", "shape", "data_offsets": [begin, end]}}` (offsets in bytes from the header's end)
with an optional `"__metadata__"` of strings, then the data, which the tensors cover without hole or overlap.
Little-endian hosts only, as are all that JAX runs on.
"""

import math
import mmap
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import ml_dtypes
import numpy as np

from checkpoints.files import CheckpointError, open_regular, parse_object, quote

MAX_HEADER_BYTES: Final = 100_000_000  # the reference implementation's limit
_MAX_RANK: Final = 32  # numpy 1 held at most 32 axes, numpy 2 holds 64; weights have at most 5
_MAX_INT: Final = 2**63 - 1

# Size of an element in bits (the reference implementation's `Dtype::bitsize`; F4 and F6 are packed).
_BITS: Final[Mapping[str, int]] = {
    "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "I16": 16, "U16": 16, "F16": 16, "BF16": 16,
    "I32": 32, "U32": 32, "F32": 32,
    "C64": 64, "F64": 64, "I64": 64, "U64": 64,
}  # fmt: skip

# What weights may be stored as. The rest is known by size, so that a file holding it can be opened.
WEIGHT_DTYPES: Final[Mapping[str, np.dtype[Any]]] = {
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F32": np.dtype(np.float32),
}


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Where a tensor lies: `dtype` is the format's word ("BF16"), `begin` and `end` are bytes of the file."""

    shape: tuple[int, ...]
    dtype: str
    begin: int
    end: int


class SafetensorsFile:
    """A mapped safetensors file whose header has been checked.

    The mapping lives as long as this object or any array read from it. As with every mapped file, shrinking
    the file in place while it is mapped kills the process (SIGBUS); replacing it by a rename is safe.
    """

    path: Path
    tensors: Mapping[str, TensorInfo]

    def __init__(self, path: Path) -> None:
        """Reads the header only. Raises CheckpointError for anything but a sound safetensors file."""
        self.path = path
        with open_regular(path) as file:
            size = os.fstat(file.fileno()).st_size
            try:
                prefix = file.read(8)
                length = _header_length(prefix, size, path)
                header = file.read(length)
                self._map = mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ)
            except CheckpointError:
                raise
            except (OSError, ValueError) as error:  # ValueError: the file has just become shorter
                raise CheckpointError(f"{path}: cannot be mapped ({error})") from error
        self.tensors = parse_header(header, size, str(path))

    def read(self, name: str) -> np.ndarray:
        """The tensor as a read-only view of the file, not copied; perhaps unaligned, as the format allows it.

        Raises KeyError for an unknown name, CheckpointError for a dtype that weights cannot have.
        """
        info = self.tensors[name]
        dtype = weight_dtype(info, name, self.path)
        count = (info.end - info.begin) // dtype.itemsize
        return np.frombuffer(self._map, dtype, count, info.begin).reshape(info.shape)

    def release(self, name: str) -> None:
        """Tells the kernel that this tensor's pages are not needed in memory; arrays of it stay valid.

        Only for the resident size: the pages are clean and would be dropped under pressure anyway.
        """
        info = self.tensors[name]
        begin = -(-info.begin // mmap.PAGESIZE) * mmap.PAGESIZE  # the pages wholly inside the tensor
        length = info.end // mmap.PAGESIZE * mmap.PAGESIZE - begin
        if length > 0 and hasattr(mmap, "MADV_DONTNEED"):
            self._map.madvise(mmap.MADV_DONTNEED, begin, length)


def weight_dtype(info: TensorInfo, name: str, path: Path) -> np.dtype[Any]:
    """numpy's dtype of a tensor stored as F16, BF16 or F32; CheckpointError for any other."""
    dtype = WEIGHT_DTYPES.get(info.dtype)
    if dtype is None:
        raise CheckpointError(
            f"{path}: key {quote(name)} is {info.dtype}, and weights must be {', '.join(WEIGHT_DTYPES)}; "
            "use the model's unquantised checkpoint, or convert it to one of these"
        )
    return dtype


def _header_length(prefix: bytes, size: int, path: Path) -> int:
    """Bytes of the header, from the first eight bytes of a file of `size` bytes."""
    if size < 8:
        raise CheckpointError(f"{path}: has {size} bytes, too few for a safetensors file; download it again")
    if prefix == b"version ":  # https://git-lfs.com, the pointer that stands for a file not fetched
        raise CheckpointError(
            f"{path}: is a Git LFS pointer, not the weights; run `git lfs pull` in its folder"
        )
    length = int.from_bytes(prefix, "little")
    if length > MAX_HEADER_BYTES or length > size - 8:
        limit = "100 MB" if length > MAX_HEADER_BYTES else f"the file's own {size} bytes"
        raise CheckpointError(
            f"{path}: says that its header has {length} bytes, which is more than {limit}; "
            "the file is cut off or is not safetensors: download it again"
        )
    return length


def parse_header(raw: bytes, size: int, where: str) -> dict[str, TensorInfo]:
    """Tensors by name from a header's bytes, for a file of `size` bytes in all; `where` begins each message.

    Raises CheckpointError unless every field is as the format says and the tensors cover the data exactly.
    """
    if not raw.startswith(b"{"):
        raise CheckpointError(f"{where}: its header does not begin with '{{'; it is not a safetensors file")
    header = parse_object(raw, f"{where}: header", unique_keys=True)
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise CheckpointError(f"{where}: its __metadata__ is not an object of strings")

    start = 8 + len(raw)
    tensors = {name: _parse_tensor(name, entry, start, size, where) for name, entry in header.items()}
    covered = start
    for name, info in sorted(tensors.items(), key=lambda item: (item[1].begin, item[1].end)):
        if info.begin != covered:
            fault = "overlaps the tensor before it" if info.begin < covered else "leaves a hole before it"
            raise CheckpointError(f"{where}: key {quote(name)} {fault} in the file; the header is damaged")
        covered = info.end
    if covered != size:
        raise CheckpointError(
            f"{where}: its tensors end at byte {covered} of {size}; download the file again"
        )
    return tensors


def _parse_tensor(name: str, entry: object, start: int, size: int, where: str) -> TensorInfo:
    def fail(what: str) -> CheckpointError:
        return CheckpointError(
            f"{where}: key {quote(name)} {what}; the header is damaged, download the file again"
        )

    if not name.isascii() and any("\ud800" <= char <= "\udfff" for char in name):
        raise fail("is not valid Unicode")
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise fail("is not an object of exactly dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _BITS:
        raise fail(
            f"has the unknown dtype {quote(str(dtype)) if isinstance(dtype, str) else type(dtype).__name__}"
        )
    if not isinstance(shape, list) or len(shape) > _MAX_RANK or not all(map(_is_size, shape)):
        raise fail(f"has a shape that is not a list of at most {_MAX_RANK} integers from 0 to 2**63 - 1")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(_is_size, offsets)):
        raise fail("has data_offsets that are not two integers from 0 to 2**63 - 1")
    begin, end = offsets
    if begin > end or start + end > size:
        raise fail(f"has data_offsets [{begin}, {end}], outside the {size - start} bytes of data")
    # Bounded without the zeros too: numpy refuses the shape (0, 2**62) although it holds nothing.
    if math.prod(dim for dim in shape if dim) * _BITS[dtype] > _MAX_INT:
        raise fail(f"has the impossible shape {shape}")
    if math.prod(shape) * _BITS[dtype] != (end - begin) * 8:
        raise fail(f"has {end - begin} bytes, which shape {shape} in {dtype} does not need")
    return TensorInfo(tuple(shape), dtype, start + begin, start + end)


def _is_size(value: object) -> bool:
    return type(value) is int and 0 <= value <= _MAX_INT  # `type`, since True is an instance of int
