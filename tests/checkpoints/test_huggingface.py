"""The Hugging Face folder reader: sound folders against the safetensors library, and hostile ones."""

import json
import os
import random
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import huggingface_hub
import ml_dtypes
import numpy as np
import pytest
import safetensors
import safetensors.numpy
from huggingface_hub import errors as hub_errors
from huggingface_hub.utils import filter_repo_objects  # type: ignore[attr-defined]

from checkpoints.huggingface import (
    Checkpoint,
    CheckpointError,
    Target,
    check,
    load,
    open_checkpoint,
    read_config,
    read_json,
    read_target,
    resolve_model,
)

BF16 = np.dtype(ml_dtypes.bfloat16)
F16 = np.dtype(np.float16)
F32 = np.dtype(np.float32)
ROOT = Path(__file__).resolve().parents[2]


def tensor(*shape: int, dtype: Any = F32, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def bits(array: np.ndarray) -> bytes:
    return np.ascontiguousarray(array).tobytes()


def write_raw(path: Path, header: object, data: bytes) -> Path:
    """A safetensors file from a header as it stands: bytes, or an object for JSON."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(raw).to_bytes(8, "little") + raw + data)
    return path


def write_folder(folder: Path, *shards: Mapping[str, np.ndarray]) -> Path:
    """A model folder: one file for one shard, else shards with their index."""
    folder.mkdir(parents=True, exist_ok=True)
    if len(shards) == 1:
        safetensors.numpy.save_file(dict(shards[0]), folder / "model.safetensors")
        return folder
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        name = f"model-{number:05}-of-{len(shards):05}.safetensors"
        safetensors.numpy.save_file(dict(shard), folder / name)
        weight_map |= dict.fromkeys(shard, name)
    write_index(folder, weight_map)
    return folder


def write_index(folder: Path, weight_map: object) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def entry(dtype: object = "F32", shape: object = (2,), offsets: object = (0, 8)) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


# Sound folders


@pytest.mark.parametrize("dtype", [BF16, F16, F32], ids=str)
def test_reads_what_safetensors_numpy_wrote(tmp_path: Path, dtype: np.dtype[Any]) -> None:
    tensors = {
        "matrix": tensor(5, 7, dtype=dtype),
        "vector": tensor(3, dtype=dtype, seed=1),
        "scalar": tensor(dtype=dtype, seed=2),
        "empty": np.empty((0, 4), dtype),
        "empty at the end": np.empty((3, 0), dtype),
    }
    checkpoint = open_checkpoint(write_folder(tmp_path, tensors))
    assert checkpoint.names == tuple(sorted(tensors))
    for name, expected in tensors.items():
        array = checkpoint.read(name)
        assert (array.shape, array.dtype, bits(array)) == (expected.shape, dtype, bits(expected))
        assert not array.flags.writeable
        assert checkpoint.info(name).shape == expected.shape
        assert checkpoint.info(name).dtype == {BF16: "BF16", F16: "F16", F32: "F32"}[dtype]


def test_reads_what_safetensors_torch_wrote(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    torch_files = pytest.importorskip("safetensors.torch")
    torch.manual_seed(0)
    dtypes = {"a": torch.bfloat16, "b": torch.float16, "c": torch.float32}
    tensors = {name: torch.randn(3, 4).to(dtype) for name, dtype in dtypes.items()}
    torch_files.save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    checkpoint = open_checkpoint(tmp_path)
    for name, expected in tensors.items():
        assert bits(checkpoint.read(name)) == expected.view(torch.uint8).numpy().tobytes()
        np.testing.assert_array_equal(checkpoint.read(name).astype(F32), expected.float().numpy())


def test_reads_shards_by_their_index_and_leaves_other_files_alone(tmp_path: Path) -> None:
    write_folder(tmp_path, {"a": tensor(2), "b": tensor(3, seed=1)}, {"c": tensor(4, seed=2)})
    (tmp_path / "consolidated.safetensors").write_bytes(b"never looked at")
    (tmp_path / "pytorch_model.bin").write_bytes(b"never looked at")
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.names == ("a", "b", "c")
    assert checkpoint.path_of("c").name == "model-00002-of-00002.safetensors"
    assert bits(checkpoint.read("c")) == bits(tensor(4, seed=2))


def test_symlinks_are_followed_as_the_hub_cache_needs(tmp_path: Path) -> None:
    write_folder(tmp_path / "blobs", {"a": tensor(2)})
    folder = tmp_path / "snapshot"
    folder.mkdir()
    (folder / "model.safetensors").symlink_to(tmp_path / "blobs" / "model.safetensors")
    assert bits(open_checkpoint(folder).read("a")) == bits(tensor(2))
    (tmp_path / "blobs" / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="broken link"):
        open_checkpoint(folder)


def test_one_file_of_another_name_needs_no_index(tmp_path: Path) -> None:
    write_folder(tmp_path, {"a": tensor(2)})
    (tmp_path / "model.safetensors").rename(tmp_path / "weights.safetensors")
    assert open_checkpoint(tmp_path).names == ("a",)


def test_array_outlives_its_checkpoint_and_its_file(tmp_path: Path) -> None:
    array = open_checkpoint(write_folder(tmp_path, {"a": tensor(1000)})).read("a")
    (tmp_path / "model.safetensors").unlink()
    assert bits(array) == bits(tensor(1000))


def test_other_dtypes_open_but_do_not_read_as_weights(tmp_path: Path) -> None:
    sizes = {"F64": 8, "I64": 8, "U64": 8, "C64": 8, "I32": 4, "U32": 4, "I16": 2, "U16": 2, "I8": 1, "U8": 1}
    sizes |= dict.fromkeys(["BOOL", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"], 1)
    header: dict[str, object] = {}
    end = 0
    for dtype, size in sizes.items():
        header[f"x.{dtype}"] = entry(dtype, [4], [end, end + 4 * size])
        end += 4 * size
    for dtype, size in {"F4": 2, "F6_E2M3": 3, "F6_E3M2": 3}.items():  # four elements, packed
        header[f"x.{dtype}"] = entry(dtype, [4], [end, end + size])
        end += size
    header["x"] = entry("F32", [2], [end, end + 8])  # 4-byte elements at no multiple of 4
    write_raw(tmp_path / "model.safetensors", header, bytes(end) + bits(tensor(2)))
    checkpoint = open_checkpoint(tmp_path)
    assert bits(checkpoint.read("x")) == bits(tensor(2))
    assert read_target(checkpoint, Target("x", (2,), F32)).flags.aligned
    with safetensors.safe_open(tmp_path / "model.safetensors", "np") as reference:
        assert sorted(reference.keys()) == list(checkpoint.names)
    for name in set(header) - {"x"}:
        dtype = name.removeprefix("x.")
        with pytest.raises(
            CheckpointError, match=rf"'{name}' is {dtype}, and weights must be F16, BF16, F32"
        ):
            checkpoint.read(name)
        with pytest.raises(CheckpointError, match=f"'{name}' is {dtype}"):
            check(checkpoint, [Target(name, (4,), F32)], ignored=[r"x.*"])


# Slices and targets


def test_read_slice_is_numpy_indexing(tmp_path: Path) -> None:
    whole = tensor(6, 8, 4)
    checkpoint = open_checkpoint(write_folder(tmp_path, {"a": whole, "s": tensor()}))
    for index in [(), (slice(None),), (slice(2, 4),), (slice(0, 3, None), slice(4, 8), slice(None))]:
        np.testing.assert_array_equal(checkpoint.read_slice("a", index), whole[index])
    assert checkpoint.read_slice("s", ()).shape == ()
    for index in [
        (slice(0, 7),),
        (slice(-2, None),),
        (slice(0, 6, 2),),
        (slice(None),) * 4,
        (slice(None, -1),),
    ]:
        with pytest.raises(ValueError, match="slices of step 1"):
            checkpoint.read_slice("a", index)
    with pytest.raises(CheckpointError, match="no key 'b'"):
        checkpoint.read_slice("b", ())


@pytest.mark.parametrize("stored", [BF16, F16, F32], ids=str)
@pytest.mark.parametrize("wanted", [BF16, F16, F32], ids=str)
def test_read_target_permutes_slices_and_casts(
    tmp_path: Path, stored: np.dtype[Any], wanted: np.dtype[Any]
) -> None:
    whole = tensor(4, 6, 8, dtype=stored)
    checkpoint = open_checkpoint(write_folder(tmp_path, {"a": whole, "s": tensor(dtype=stored)}))
    index = (slice(2, 6), slice(None), slice(1, 5))
    for axes in [None, (0, 1, 2), (1, 2, 0), (2, 0, 1), (2, 1, 0)]:
        expected = (whole if axes is None else whole.transpose(axes)).astype(wanted)
        target = Target("a", expected.shape, wanted, axes)
        assert target.stored_shape == whole.shape
        array = read_target(checkpoint, target)
        assert array.dtype == wanted and array.flags.c_contiguous and array.flags.aligned
        assert array.shape == expected.shape and bits(array) == bits(expected)
        inside = tuple(slice(cut.start, None if cut.stop is None else min(cut.stop, size))
                       for cut, size in zip(index, expected.shape, strict=True))  # fmt: skip
        part = read_target(checkpoint, target, inside)
        assert part.flags.c_contiguous and bits(part) == bits(expected[inside])
    assert read_target(checkpoint, Target("s", (), wanted)).shape == ()


def test_same_dtype_and_order_is_not_copied(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(write_folder(tmp_path, {"a": tensor(4, 4)}))
    array = read_target(checkpoint, Target("a", (4, 4), F32), (slice(1, 2), slice(None)))
    assert np.shares_memory(array, checkpoint.read("a"))


def test_value_beyond_float16_raises_instead_of_becoming_infinite(tmp_path: Path) -> None:
    big = np.array([1.0, 1e5], BF16)
    checkpoint = open_checkpoint(write_folder(tmp_path, {"a": big, "inf": np.array([np.inf, np.nan], F32)}))
    with pytest.raises(CheckpointError, match="'a' has values beyond float16"):
        read_target(checkpoint, Target("a", (2,), F16))
    assert np.isinf(read_target(checkpoint, Target("inf", (2,), F16))[0])


def test_target_that_makes_no_sense_raises() -> None:
    with pytest.raises(ValueError, match="not a permutation"):
        Target("a", (2, 3), F32, (0, 0))
    with pytest.raises(ValueError, match="none of float16"):
        Target("a", (2, 3), np.int8)
    with pytest.raises(ValueError, match="two targets"):
        check(Checkpoint(Path(), []), [Target("a", (), F32), Target("a", (), F32)])


def test_load_yields_each_target_once_in_file_order(tmp_path: Path) -> None:
    shards = [{"b": tensor(2, 3), "a": tensor(4, seed=1)}, {"c": tensor(3, 2, seed=2)}]
    checkpoint = open_checkpoint(write_folder(tmp_path, *shards))
    targets = [Target("c", (2, 3), BF16, (1, 0)), Target("b", (2, 3), F32), Target("a", (4,), F16)]
    loaded = list(load(checkpoint, targets))
    assert [target.key for target, _ in loaded] == ["a", "b", "c"]
    whole = shards[0] | shards[1]
    for target, array in loaded:
        expected = whole[target.key].T if target.axes else whole[target.key]
        assert bits(array) == bits(expected.astype(target.dtype))


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="Linux tells its peak memory there")
def test_memory_stays_bounded(tmp_path: Path) -> None:
    """256 MB of f32 become bf16, and the process never holds more than a few tensors of 8 MB."""
    count, each = 32, 8 << 20
    header = {f"x.{i}": entry("F32", [each // 4], [i * each, (i + 1) * each]) for i in range(count)}
    with open(write_raw(tmp_path / "model.safetensors", header, b""), "r+b") as file:
        file.truncate(file.seek(0, 2) + count * each)  # a hole: reads as zeros, takes no disk
    script = f"""
import numpy as np, ml_dtypes
from pathlib import Path
from checkpoints.huggingface import Target, load, open_checkpoint

def peak():  # not ru_maxrss, which begins at the size of the process that forked this one
    return int(Path('/proc/self/status').read_text().split('VmHWM:')[1].split()[0])

for dtype in (ml_dtypes.bfloat16, np.float32):
    checkpoint = open_checkpoint(Path({str(tmp_path)!r}))
    targets = [Target(name, ({each // 4},), dtype) for name in checkpoint.names]
    before = peak()
    for _, array in load(checkpoint, targets):
        assert not array.astype(np.float32).any()
        del array
    print(peak() - before)
"""
    run = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert all(int(line) << 10 < 8 * each for line in run.stdout.split()), run.stdout


# What must match


def expect(folder: Path, targets: list[Target], pattern: str, **options: Any) -> None:
    with pytest.raises(CheckpointError, match=pattern) as caught:
        load(open_checkpoint(folder), targets, **options)
    assert str(folder) in str(caught.value)


def test_unknown_and_missing_keys_are_both_named(tmp_path: Path) -> None:
    write_folder(tmp_path, {f"x.{i}": tensor(1) for i in range(7)} | {"a": tensor(1)})
    a = Target("a", (1,), F32)
    expect(tmp_path, [a], r"has unknown 7 keys: 'x.0', 'x.1', 'x.2', 'x.3', 'x.4' and 2 more")
    expect(tmp_path, [a, Target("b", (1,), F32)], r"lacks 1 key: 'b'; has unknown 7 keys: 'x.0'")
    expect(tmp_path, [a], r"unknown 6 keys: 'x.1'", ignored=[r"x\.0", "x"])  # patterns match whole keys
    load(open_checkpoint(tmp_path), [a], ignored=[r"x\.\d+"])


def test_wrong_shapes_are_named(tmp_path: Path) -> None:
    write_folder(tmp_path, {"a": tensor(2, 3), "b": tensor(4)})
    b = Target("b", (4,), F32)
    expect(
        tmp_path, [Target("a", (3, 2), F32), b], r"1 of another shape .*'a' is \(2, 3\), expected \(3, 2\)"
    )
    expect(tmp_path, [Target("a", (6,), F32), b], r"'a' is \(2, 3\), expected \(6,\)")
    expect(tmp_path, [Target("a", (2, 3), F32, (1, 0)), b], r"'a' is \(2, 3\), expected \(3, 2\)")
    with pytest.raises(CheckpointError, match="expected"):
        read_target(open_checkpoint(tmp_path), Target("a", (2, 2), F32), (slice(0, 1), slice(0, 1)))


def test_tied_head_may_be_there_only_as_a_copy(tmp_path: Path) -> None:
    embedding = tensor(50, 4)
    tied = {"head": "embedding"}
    targets = [Target("embedding", (50, 4), F32)]
    other = embedding.copy()
    other[-1, -1] += 1
    heads = {
        "same": embedding,
        "other": other,
        "fewer": embedding[:-1],
        "reshaped": embedding.reshape(4, 50),
        "f16": embedding.astype(F16),
    }
    for name, head in heads.items():
        write_folder(tmp_path / name, {"embedding": embedding, "head": head})
    write_folder(tmp_path / "none", {"embedding": embedding})
    write_folder(
        tmp_path / "cast", {"embedding": embedding.astype(BF16), "head": embedding.astype(BF16).astype(F32)}
    )
    for name in ["same", "none", "cast"]:
        assert len(list(load(open_checkpoint(tmp_path / name), targets, tied=tied))) == 1
    for name in heads.keys() - {"same"}:
        expect(tmp_path / name, targets, "'head' differs from 'embedding'.*tie_word_embeddings", tied=tied)
    expect(tmp_path / "same", targets, "unknown 1 key: 'head'")
    both = [*targets, Target("head", (50, 4), F32)]
    assert len(list(load(open_checkpoint(tmp_path / "other"), both, tied=tied))) == 2  # a target is no copy


# Folders and indices


@pytest.mark.parametrize("name", ["pytorch_model.bin", "a.pt", "a.pth", "a.ckpt", "a.pkl", "a.pickle"])
def test_pickles_are_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"\x80\x04.")
    with pytest.raises(CheckpointError, match=rf"pickle only \({name}\).*can run code.*safetensors"):
        open_checkpoint(tmp_path)


def test_folders_without_usable_weights(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is not a folder"):
        open_checkpoint(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="has no weights"):
        open_checkpoint(tmp_path)
    write_folder(tmp_path, {"a": tensor(1)}, {"b": tensor(1)})
    (tmp_path / "model.safetensors.index.json").unlink()
    with pytest.raises(
        CheckpointError, match=r"has 2 shards: 'model-00001.*but no model\.safetensors\.index"
    ):
        open_checkpoint(tmp_path)
    (tmp_path / "model.safetensors").mkdir()
    with pytest.raises(CheckpointError, match=r"model\.safetensors: is a folder, expected a file"):
        open_checkpoint(tmp_path)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes")
def test_a_pipe_does_not_hang(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="device or pipe"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize(
    "shard",
    ["../model-1.safetensors", "/etc/x.safetensors", "sub/x.safetensors", "sub\\x.safetensors", "x.bin", "",
     "..", ".safetensors", "x.safetensors\0", "a\nb", 3, None, ["a"], True],
    ids=repr,
)  # fmt: skip
def test_index_that_names_no_plain_file_is_refused(tmp_path: Path, shard: object) -> None:
    folder = write_folder(tmp_path / "model", {"a": tensor(1)}, {"b": tensor(1)})
    safetensors.numpy.save_file({"a": tensor(1)}, tmp_path / "model-1.safetensors")
    write_index(folder, {"a": shard, "b": "model-00002-of-00002.safetensors"})
    with pytest.raises(CheckpointError, match=r"key 'a' is said to be in .* index is refused"):
        open_checkpoint(folder)


def test_index_and_shards_must_agree(tmp_path: Path) -> None:
    first, second = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"

    def fails(pattern: str, index: object, *shards: Mapping[str, np.ndarray]) -> None:
        write_folder(tmp_path, *shards)
        write_index(tmp_path, index)
        with pytest.raises(CheckpointError, match=pattern):
            open_checkpoint(tmp_path)

    a, b, ab = {"a": tensor(1)}, {"b": tensor(1)}, {"a": tensor(1), "b": tensor(1)}
    fails(
        "00002.*: lacks what the index places in it, 1 key: 'c'", {"a": first, "b": second, "c": second}, a, b
    )
    fails("00001.*: holds what the index does not name, 1 key: 'b'", {"a": first}, ab, b)
    fails("00001.*: holds .* twice, 1 key: 'b'", {"a": first, "b": second}, ab, b)
    fails("lacks 1 file: 'gone.safetensors'", {"a": first, "b": "gone.safetensors"}, a, b)
    fails('no "weight_map"', {}, a, b)
    fails('no "weight_map"', ["a"], a, b)
    twice = f'{{"weight_map": {{"a": "{first}", "a": "{second}"}}}}'
    (tmp_path / "model.safetensors.index.json").write_text(twice)
    with pytest.raises(CheckpointError, match="key 'a' is there twice"):
        open_checkpoint(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text('{"metadata": {}}')
    with pytest.raises(CheckpointError, match='no "weight_map"'):
        open_checkpoint(tmp_path)


# Damaged and hostile files: (header, data) → what the message says

DATA = bytes(16)
F32_AT = entry("F32", [4], [0, 16])
F32_JSON = json.dumps(F32_AT).encode()
BAD_HEADERS: dict[str, tuple[object, bytes, str]] = {
    "not JSON": (b'{"a": ', DATA, "is not JSON"),
    "not UTF-8": (b'{"\xff": 1}', DATA, "is not UTF-8"),
    "an array": (b"[]", DATA, "does not begin with"),
    "leading space": (b" {}", b"", "does not begin with"),
    "two values": (b"{}{}", b"", "is not JSON"),
    "too deep": (b'{"a":' + b"[" * 100_000, DATA, "nested too deeply"),
    "duplicate tensor": (b'{"a":%s,"a":%s}' % (F32_JSON, F32_JSON), DATA, "'a' is there twice"),
    "duplicate field": (b'{"a":{"dtype":"F32","dtype":"F16"}}', DATA, "'dtype' is there twice"),
    "metadata not strings": ({"__metadata__": {"format": 1}, "a": F32_AT}, DATA, "__metadata__"),
    "metadata an array": ({"__metadata__": [], "a": F32_AT}, DATA, "__metadata__"),
    "entry a number": ({"a": 1}, DATA, "'a' is not an object"),
    "field missing": ({"a": {"dtype": "F32", "shape": [4]}}, DATA, "'a' is not an object of exactly"),
    "field too many": ({"a": F32_AT | {"x": 1}}, DATA, "'a' is not an object of exactly"),
    "dtype unknown": ({"a": entry("F31", [4], [0, 16])}, DATA, "'a' has the unknown dtype 'F31'"),
    "dtype a list": ({"a": entry(["F32"], [4], [0, 16])}, DATA, "unknown dtype list"),
    "dtype null": ({"a": entry(None, [4], [0, 16])}, DATA, "unknown dtype NoneType"),
    "shape a number": ({"a": entry("F32", 4, [0, 16])}, DATA, "has a shape that"),
    "shape negative": ({"a": entry("F32", [-4], [0, 16])}, DATA, "has a shape that"),
    "shape two negatives": ({"a": entry("F32", [-2, -2], [0, 16])}, DATA, "has a shape that"),
    "shape bool": ({"a": entry("F32", [4, True], [0, 16])}, DATA, "has a shape that"),
    "shape float": ({"a": entry("F32", [4.0], [0, 16])}, DATA, "has a shape that"),
    "shape string": ({"a": entry("F32", ["4"], [0, 16])}, DATA, "has a shape that"),
    "shape NaN": (b'{"a":{"dtype":"F32","shape":[NaN],"data_offsets":[0,16]}}', DATA, "has a shape that"),
    "shape over 64 bits": ({"a": entry("F32", [2**64 + 4], [0, 16])}, DATA, "has a shape that"),
    "shape of 10,000 digits": (b'{"a":{"dtype":"F32","shape":[%s]}}' % (b"9" * 10_000), DATA, "is not JSON"),
    "shape of rank 33": ({"a": entry("F32", [1] * 33, [0, 4])}, DATA[:4], "has a shape that"),
    "shape that wraps": ({"a": entry("F32", [2**32, 2**32, 4], [0, 16])}, DATA, "impossible shape"),
    "shape empty but huge": ({"a": entry("F32", [0, 2**62], [0, 0])}, b"", "impossible shape"),
    "shape too small": ({"a": entry("F32", [3], [0, 16])}, DATA, "has 16 bytes, which shape"),
    "shape too large": ({"a": entry("F32", [5], [0, 16])}, DATA, "has 16 bytes, which shape"),
    "shape of half a byte": ({"a": entry("F4", [3], [0, 1])}, DATA[:1], "has 1 bytes, which shape"),
    "offsets one": ({"a": entry("F32", [4], [16])}, DATA, "has data_offsets that"),
    "offsets three": ({"a": entry("F32", [4], [0, 16, 16])}, DATA, "has data_offsets that"),
    "offsets bool": ({"a": entry("F32", [4], [False, 16])}, DATA, "has data_offsets that"),
    "offsets float": ({"a": entry("F32", [4], [0, 16.0])}, DATA, "has data_offsets that"),
    "offsets negative": ({"a": entry("F32", [4], [-16, 0])}, DATA, "has data_offsets that"),
    "offsets over 64 bits": ({"a": entry("F32", [4], [2**64, 2**64 + 16])}, DATA, "has data_offsets that"),
    "offsets reversed": ({"a": entry("F32", [4], [16, 0])}, DATA, "outside the 16 bytes"),
    "offsets out of bounds": ({"a": entry("F32", [4], [4, 20])}, DATA, "outside the 16 bytes"),
    "overlap": ({"a": entry("F32", [3], [0, 12]), "b": entry("F32", [2], [8, 16])}, DATA, "'b' overlaps"),
    "the same bytes": ({"a": F32_AT, "b": F32_AT}, DATA, "overlaps"),
    "hole at the start": ({"a": entry("F32", [2], [8, 16])}, DATA, "'a' leaves a hole"),
    "hole inside": ({"a": entry("F32", [1], [0, 4]), "b": entry("U8", [8], [8, 16])}, DATA, "'b' leaves a"),
    "hole at the end": ({"a": entry("F32", [2], [0, 8])}, DATA, "end at byte"),
    "data and no tensors": (b"{}", DATA, "end at byte"),
    "lone surrogate": (b'{"\\ud800":%s}' % F32_JSON, DATA, r"'\\ud800' is not valid Unicode"),
    "endless key": ({"k" * 10**6: 1}, DATA, r"key 'k{120}'… \(1000000 characters\) is not"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_HEADERS)
def test_bad_header_raises(tmp_path: Path, case: str) -> None:
    header, data, pattern = BAD_HEADERS[case]
    path = write_raw(tmp_path / "model.safetensors", header, data)
    with pytest.raises(CheckpointError, match=pattern) as caught:
        open_checkpoint(tmp_path)
    message = str(caught.value)
    assert message.startswith(str(path)) and len(message) < 1000
    message.encode()  # can be printed


BAD_FILES: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "has 0 bytes, too few"),
    "seven bytes": (b"\0" * 7, "has 7 bytes, too few"),
    "no header": (b"\0" * 8, "does not begin with"),
    "header cut off": ((100).to_bytes(8, "little") + b"{}", "more than the file's own 10 bytes"),
    "header of 2**64 - 1": (b"\xff" * 8 + b"{}", "more than 100 MB"),
    "a Git LFS pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n", "git lfs pull"),
    "a pickle": (b"\x80\x04\x95\x0b\0\0\0\0\0\0\0\x8c\x07builtin", "more than"),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_bad_file_raises(tmp_path: Path, case: str) -> None:
    raw, pattern = BAD_FILES[case]
    (tmp_path / "model.safetensors").write_bytes(raw)
    with pytest.raises(CheckpointError, match=pattern):
        open_checkpoint(tmp_path)


def test_header_over_the_limit_is_not_read(tmp_path: Path) -> None:
    with open(tmp_path / "model.safetensors", "wb") as file:
        file.write((100_000_001).to_bytes(8, "little") + b"{}")
        file.truncate(200_000_000)  # sparse: the file is as long as its header says
    tracemalloc.start()
    with pytest.raises(CheckpointError, match="more than 100 MB"):
        open_checkpoint(tmp_path)
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()


def test_truncated_data_raises_at_every_length(tmp_path: Path) -> None:
    path = write_folder(tmp_path, {"a": tensor(3), "b": tensor(2, dtype=BF16)}) / "model.safetensors"
    raw = path.read_bytes()
    for length in range(len(raw)):
        path.write_bytes(raw[:length])
        with pytest.raises(CheckpointError, match=r"model\.safetensors"):
            open_checkpoint(tmp_path)


def test_checks_hold_under_python_O(tmp_path: Path) -> None:
    for number, (header, data, _) in enumerate(BAD_HEADERS.values()):
        (tmp_path / f"header {number}").mkdir()
        write_raw(tmp_path / f"header {number}" / "model.safetensors", header, data)
    for number, (raw, _) in enumerate(BAD_FILES.values()):
        (tmp_path / f"file {number}").mkdir()
        (tmp_path / f"file {number}" / "model.safetensors").write_bytes(raw)
    write_index(
        write_folder(tmp_path / "index", {"a": tensor(1)}, {"b": tensor(1)}), {"a": "../x.safetensors"}
    )
    write_folder(tmp_path / "shape", {"a": tensor(2)})
    write_folder(tmp_path / "key", {"b": tensor(1)})
    write_folder(tmp_path / "tied", {"a": tensor(1), "head": tensor(1, seed=1)})
    script = """
import sys
from pathlib import Path
from checkpoints.huggingface import CheckpointError, Target, load, open_checkpoint
refused = 0
for folder in sorted(Path(sys.argv[1]).iterdir()):
    try:
        load(open_checkpoint(folder), [Target("a", (1,), "float32")], tied={"head": "a"})
        print("accepted", folder.name)
    except CheckpointError:
        refused += 1
print(__debug__, refused)
"""
    run = subprocess.run(
        [sys.executable, "-O", "-c", script, str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (run.stdout, run.stderr) == (f"False {len(BAD_HEADERS) + len(BAD_FILES) + 4}\n", "")


def _flip(raw: bytearray, at: int, rng: random.Random) -> None:
    raw[at] ^= 1 << rng.randrange(8)


def _replace(raw: bytearray, at: int, rng: random.Random) -> None:
    raw[at] = rng.choice(b'0123456789[]{}",:-. \\eENFu')


def _truncate(raw: bytearray, at: int, rng: random.Random) -> None:
    del raw[at:]


def _remove(raw: bytearray, at: int, rng: random.Random) -> None:
    del raw[at : at + rng.randrange(1, 9)]


def _double(raw: bytearray, at: int, rng: random.Random) -> None:
    raw[at:at] = raw[at : at + rng.randrange(1, 40)]


@pytest.mark.parametrize("damage", [_flip, _replace, _truncate, _remove, _double])
@pytest.mark.parametrize("keep_length", [True, False], ids=["length true", "length stale"])
def test_damaged_file_reads_or_raises(
    tmp_path: Path, damage: Callable[[bytearray, int, random.Random], None], keep_length: bool
) -> None:
    """Only CheckpointError, little memory, no long waits; what we accept, the library reads alike."""
    rng = random.Random(f"{damage.__name__} {keep_length}")
    tensors = {"model.a": tensor(3, 2), "model.b": tensor(4, dtype=BF16), "c\u00e9": tensor(dtype=F16)}
    path = write_folder(tmp_path, tensors) / "model.safetensors"
    sound = path.read_bytes()
    header_end = 8 + int.from_bytes(sound[:8], "little")
    accepted = 0
    for _ in range(60):
        start = 8 if keep_length else 0
        raw = bytearray(sound[start:header_end])
        for _ in range(rng.randrange(1, 3)):
            if raw:
                damage(raw, rng.randrange(len(raw)), rng)
        head = len(raw).to_bytes(8, "little") if keep_length else b""
        path.write_bytes(head + bytes(raw) + sound[header_end:])
        tracemalloc.start()
        began = time.monotonic()
        try:
            checkpoint = open_checkpoint(tmp_path)
            arrays = {}
            for name in checkpoint.names:
                try:
                    arrays[name] = checkpoint.read(name)
                except CheckpointError as error:
                    assert "weights must be" in str(error)
        except CheckpointError as error:
            assert str(path) in str(error)
        else:
            accepted += 1
            reference = dict(safetensors.deserialize(path.read_bytes()))  # type: ignore[no-untyped-call]
            assert sorted(reference) == list(checkpoint.names)
            for name, array in arrays.items():
                assert list(array.shape) == reference[name]["shape"]
                assert bits(array) == bytes(reference[name]["data"])
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
        tracemalloc.stop()
        assert time.monotonic() - began < 5
    assert accepted < 60


def test_damaged_index_or_config_reads_or_raises(tmp_path: Path) -> None:
    write_folder(tmp_path, {"a": tensor(1)}, {"b": tensor(1)})
    path = tmp_path / "model.safetensors.index.json"
    sound = path.read_bytes()
    rng = random.Random(0)
    for _ in range(150):
        raw = bytearray(sound)
        rng.choice([_flip, _replace, _truncate, _remove, _double])(raw, rng.randrange(len(raw)), rng)
        path.write_bytes(raw)
        for read in (lambda: open_checkpoint(tmp_path), lambda: read_json(tmp_path, path.name)):
            try:
                read()
            except CheckpointError as error:
                assert str(tmp_path) in str(error)


# Config


def test_read_config(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"has no config\.json"):
        read_config(tmp_path)
    assert read_json(tmp_path, "generation_config.json", required=False) == {}
    path = tmp_path / "config.json"
    # Infinity is not JSON, but Python's json, and so transformers, writes it.
    path.write_text('{"model_type": "x", "limit": [0.0, Infinity]}')
    assert read_config(tmp_path) == {"model_type": "x", "limit": [0.0, float("inf")]}
    bad = {
        b"": "is not JSON",
        b"{": "is not JSON",
        b"\xef\xbb\xbf{}": "is not JSON",
        b"9" * 5000: "is not JSON",
        b"[1]": "holds a JSON list",
        b"null": "holds a JSON NoneType",
        b"\xff{}": "is not UTF-8",
        b"[" * 10**6: "nested too deeply",
        b"{" + b" " * (16 << 20) + b"}": "16 MiB",
    }
    for raw, pattern in bad.items():
        path.write_bytes(raw)
        with pytest.raises(CheckpointError, match=pattern) as caught:
            read_config(tmp_path)
        assert str(path) in str(caught.value)
    path.unlink()
    path.mkdir()
    for required in (True, False):
        with pytest.raises(CheckpointError, match="is a folder"):
            read_json(tmp_path, "config.json", required=required)


# Finding the model


def test_local_folder_is_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve_model(str(tmp_path)) == tmp_path
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "m").mkdir()
    assert resolve_model("~/m") == tmp_path / "m"
    with pytest.raises(CheckpointError, match="a revision"):
        resolve_model(str(tmp_path), revision="main")
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="is not a folder"):
        resolve_model(str(tmp_path / "file"))


@pytest.mark.parametrize(
    "model",
    ["", ".", "..", "./x", "../x", "/no/such", "a/b/c", "~nobody/x", "a b", "a--b/c", "a..b", "x" * 97,
     "y" * 9999, "a/b\n", "a\0b", "é/b", "/"],
    ids=lambda model: repr(model[:12]),
)  # fmt: skip
def test_what_is_neither_folder_nor_hub_id(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub, "snapshot_download", pytest.fail)
    monkeypatch.chdir(tmp_path)
    if model in (".", "..", "/"):
        assert resolve_model(model) == Path(model)
        return
    with pytest.raises(CheckpointError, match="no such folder, and it is not a hub id"):
        resolve_model(model)


def test_hub_download_takes_no_pickles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[dict[str, Any]] = []

    def download(model: str, **options: Any) -> str:
        calls.append({"model": model} | options)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    files = ["config.json", "model.safetensors", "model-00001-of-00002.safetensors", "tokenizer.model",
             "model.safetensors.index.json", "chat_template.jinja", "pytorch_model.bin", "x.pt", "x.py",
             "x.gguf", "onnx/config.json", "original/model.safetensors",
             "consolidated.safetensors"]  # fmt: skip
    chosen = []
    for weights in (True, False):
        assert resolve_model("owner/name", revision="v1", weights=weights) == tmp_path
        call = calls.pop()
        assert (call["model"], call["revision"]) == ("owner/name", "v1")
        patterns = {key: call[key] for key in ("allow_patterns", "ignore_patterns")}
        chosen.append(list(filter_repo_objects(files, **patterns)))
    assert chosen[0] == files[:6]
    assert chosen[1] == [name for name in files[:6] if not name.endswith(".safetensors")]


def _http(kind: type[Exception]) -> Exception:
    error = kind.__new__(
        kind
    )  # its constructor wants a response of whichever HTTP library the hub client uses
    Exception.__init__(error, "reason")
    return error


@pytest.mark.parametrize(
    ("error", "pattern"),
    [
        (_http(hub_errors.RepositoryNotFoundError), "nor such a model on the hub"),
        (_http(hub_errors.GatedRepoError), "is gated; accept its terms"),
        (_http(hub_errors.RevisionNotFoundError), "no revision v1"),
        (hub_errors.HFValidationError("bad"), "not a hub id: bad"),
        (hub_errors.LocalEntryNotFoundError("x"), "at revision v1: .*cache, and the hub cannot be reached"),
        (hub_errors.OfflineModeIsEnabled("x"), "cache"),
        (OSError(28, "No space left on device"), "download failed: OSError: .*No space left"),
        (RuntimeError("proxy"), "download failed: RuntimeError: proxy"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
def test_hub_errors_are_told(error: Exception, pattern: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def download(*_: Any, **__: Any) -> str:
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    with pytest.raises(CheckpointError, match=pattern) as caught:
        resolve_model("owner/no-such-name", revision="v1")
    assert "owner/no-such-name" in str(caught.value)


def test_offline_uses_the_cache_alone(tmp_path: Path) -> None:
    cached = tmp_path / "hub" / "models--owner--cached"
    commit = "0" * 40
    (cached / "snapshots" / commit).mkdir(parents=True)
    (cached / "snapshots" / commit / "config.json").write_text("{}")
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text(commit)
    script = """
from checkpoints.huggingface import CheckpointError, resolve_model
print(resolve_model("owner/cached", weights=False))
try:
    resolve_model("owner/other")
except CheckpointError as error:
    print(error)
"""
    environment = os.environ | {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    environment = {
        key: value
        for key, value in environment.items()
        if key not in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE")
    }
    run = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    )
    folder, message = run.stdout.splitlines()
    assert folder == str(cached / "snapshots" / commit)
    assert message.startswith("owner/other: there is no such folder") and "HF_HUB_OFFLINE is set" in message


# The package


def test_leaf_imports_nothing_of_ours_and_no_jax() -> None:
    script = "import sys, checkpoints.huggingface; print(sorted({n.split('.')[0] for n in sys.modules}))"
    run = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    for module in (
        "jax",
        "jaxserve",
        "sharding",
        "pallas_kernels",
        "torch",
        "safetensors",
        "huggingface_hub",
    ):
        assert f"'{module}'" not in run.stdout
