"""`convert`: what it writes serves as the model it came from, whole or not at all, and in bounded memory."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from checkpoints import convert as converting
from checkpoints import orbax_io, remote
from checkpoints.convert import convert
from checkpoints.files import CheckpointError
from checkpoints.orbax_io import Leaf
from jaxserve import build
from jaxserve.cli.convert import convert_model
from jaxserve.config import EngineOptions
from jaxserve.models.decoder import Decoder, Layout, Params
from jaxserve.scheduler.types import SamplingParams, check_request
from jaxserve.weights import load_params, model_digest, open_weights
from tests import tiny
from tests.checkpoints import memory

ROOT = Path(__file__).resolve().parents[2]
HEADS = {"hidden_size": 64, "num_attention_heads": 8, "num_key_value_heads": 8, "intermediate_size": 96}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {"model_type": "qwen2", "tie_word_embeddings": True},
    "qwen3": {"model_type": "qwen3", "head_dim": 16},
    "mixtral": {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2},
}


def quiet(line: str) -> None:
    pass


def decoder(folder: Path, dtype: Any = "auto") -> Decoder:
    loaded = build.read_model(str(folder), EngineOptions(dtype=dtype))
    return Decoder(loaded.config, loaded.dtype)


def params_of(folder: Path, tensor: int = 1, layout: Layout = "scan", dtype: Any = "auto") -> Params:
    model, mesh = decoder(folder, dtype), build.make_mesh(build.parse_mesh(f"tensor={tensor}"))
    return load_params(model, open_weights(model, folder), mesh, layout)


def write_family(folder: Path, dtype: Any = np.float32, **changes: Any) -> Path:
    """A random model of any family."""
    folder.mkdir(parents=True)
    stored = np.dtype(dtype).name
    config = tiny.CONFIG | HEADS | {"torch_dtype": stored} | changes
    (folder / "config.json").write_text(json.dumps(config))
    rng = np.random.default_rng(0)
    tensors: dict[str, np.ndarray] = {}
    for weight in decoder(folder).weights:
        for layer in range(config["num_hidden_layers"]) if weight.per_layer else (None,):
            for key in weight.checkpoint_keys(layer):
                tensors[key] = rng.standard_normal(weight.checkpoint_shape, np.float32).astype(dtype)
    save_file(tensors, folder / "model.safetensors")
    return folder


def assert_same(one: Params, other: Params) -> None:
    """Every bit, and where it lies."""
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        assert a.dtype == b.dtype
        assert a.sharding == b.sharding
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


@pytest.fixture(scope="module")
def hf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tiny.write_model(tmp_path_factory.mktemp("models") / "tiny")
    (folder / "generation_config.json").write_text('{"temperature": 0.5}')
    (folder / "chat_template.jinja").write_text("{{ messages[0].content }}")
    (folder / "LICENSE").write_text("as you like")
    (folder / "notes.md").write_text("not needed")
    return folder


@pytest.fixture(scope="module")
def out(hf: Path) -> Path:
    out = hf.parent / "converted"
    convert_model(str(hf), str(out), progress=quiet)
    return out


# -- the same weights --------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_every_bit_on_every_mesh(tmp_path: Path, family: str) -> None:
    source = write_family(tmp_path / "hf", ml_dtypes.bfloat16, **FAMILIES[family])
    convert_model(str(source), str(tmp_path / "out"), progress=quiet)
    for tensor, layout in ((1, "scan"), (2, "unrolled"), (4, "scan"), (8, "scan")):
        assert_same(
            params_of(source, tensor, layout),  # type: ignore[arg-type]
            params_of(tmp_path / "out", tensor, layout),  # type: ignore[arg-type]
        )


@pytest.mark.parametrize("tensor", [2, 8])
def test_what_a_mesh_wrote_restores_on_others(tmp_path: Path, tensor: int) -> None:
    """A tree as a training program keeps it, one dict per layer, saved from many devices."""
    import orbax.checkpoint as ocp

    source = write_family(tmp_path / "hf")
    written = params_of(source, tensor, "unrolled")
    tree = {"ends": written["ends"], "layers": dict(enumerate(written["layers"]))}
    with ocp.StandardCheckpointer() as writer:
        writer.save(tmp_path / "run" / "100", {"params": tree})
    (tmp_path / "run" / "config.json").write_text((source / "config.json").read_text())
    for other, layout in ((1, "scan"), (1, "unrolled"), (4, "scan")):
        assert_same(
            params_of(source, other, layout),  # type: ignore[arg-type]
            params_of(tmp_path / "run", other, layout),  # type: ignore[arg-type]
        )


def test_each_weight_keeps_its_dtype_unless_told(tmp_path: Path) -> None:
    source = tiny.write_model(tmp_path / "hf", torch_dtype="bfloat16")  # stored as f32
    values = tiny.tensors(tiny.CONFIG)
    norm = "model.norm.weight"
    save_file(values | {norm: values[norm].astype(np.float16)}, source / "model.safetensors")
    convert_model(str(source), str(tmp_path / "out"), progress=quiet)
    assert json.loads((tmp_path / "out/jaxserve.json").read_text())["dtypes"] == ["float16", "float32"]
    for dtype in ("auto", "float32"):
        assert_same(params_of(source, dtype=dtype), params_of(tmp_path / "out", dtype=dtype))
    convert_model(str(source), str(tmp_path / "half"), "float16", progress=quiet)
    assert json.loads((tmp_path / "half/jaxserve.json").read_text())["dtypes"] == ["float16"]
    assert json.loads((tmp_path / "half/config.json").read_text())["torch_dtype"] == "float16"
    assert_same(params_of(source, dtype="float16"), params_of(tmp_path / "half"))


def test_values_beyond_float16(tmp_path: Path) -> None:
    source = tiny.write_model(tmp_path / "hf")
    values = tiny.tensors(tiny.CONFIG)
    key = "model.layers.1.mlp.up_proj.weight"
    values[key][3, 4] = 1e5
    save_file(values, source / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"layers\.1\.mlp\.up_proj\.weight.*beyond float16's 65504"):
        convert_model(str(source), str(tmp_path / "half"), "float16", progress=quiet)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf"]
    convert_model(str(source), str(tmp_path / "out"), progress=quiet)
    for layout in ("scan", "unrolled"):
        with pytest.raises(CheckpointError, match=r"1 key: 'layers\.1\.mlp\.up_proj\.weight': values beyond"):
            params_of(tmp_path / "out", layout=layout, dtype="float16")  # type: ignore[arg-type]


OPTIONS = EngineOptions(max_slots=2, page_size=16, prefill_chunk=32, memory_fraction=0.5)


def greedy(folder: str, mesh: str) -> list[list[int]]:
    engine = build.build_engine(
        folder,
        EngineOptions(max_slots=2, page_size=16, prefill_chunk=32, memory_fraction=0.5, mesh=mesh),
    )
    replies = []
    for i, prompt in enumerate(([1], list(range(40)), [5] * 70)):
        reply: list[int] = []
        params = SamplingParams(temperature=0.0, max_tokens=12)
        request = check_request(f"r{i}", prompt, params, engine.limits, 0.0)
        engine.submit((request, lambda output, reply=reply: reply.extend(output.token_ids)))  # type: ignore[misc]
        while engine.step():
            pass
        replies.append(reply)
    return replies


def test_it_serves_the_same_tokens(hf: Path, out: Path) -> None:
    expected = greedy(str(hf), "tensor=1")
    assert [len(reply) for reply in expected] == [12, 12, 12]
    assert greedy(str(out), "tensor=1") == expected
    assert greedy(out.as_uri(), "tensor=2") == expected


# -- what is in the folder ---------------------------------------------------------------------------------


def test_the_folder_says_what_it_is(hf: Path, out: Path) -> None:
    about = json.loads((out / "jaxserve.json").read_text())
    sizes = {
        file.relative_to(out).as_posix(): file.stat().st_size
        for file in (out / "weights").rglob("*")
        if file.is_file()
    }
    assert about.pop("files") == sizes
    assert about.pop("written_by").startswith("jaxserve ")
    assert about == {
        "format_version": 1,
        "weights": "weights",
        "tree": "",
        "dtypes": ["float32"],
        "parameters": sum(array.size for array in tiny.tensors(tiny.CONFIG).values()),
        "source": {"name": "tiny", "fingerprint": f"blake2b:{model_digest(hf, weights=True)}"},
    }


def test_what_serving_needs_beside_the_weights_comes_along(hf: Path, out: Path) -> None:
    names = ["LICENSE", "chat_template.jinja", "config.json", "generation_config.json"]
    assert sorted(path.name for path in out.iterdir()) == [*names, "jaxserve.json", "weights"]
    for name in names:
        assert (out / name).read_bytes() == (hf / name).read_bytes()
    assert build.sampling_defaults(out) == {"temperature": 0.5}


def test_other_weights_have_another_digest(tmp_path: Path, hf: Path, out: Path) -> None:
    """It keeps the response cache from answering for another model."""
    convert_model(str(hf), str(tmp_path / "out"), progress=quiet)
    other = tiny.write_model(tmp_path / "other", seed=1)
    convert_model(str(other), str(tmp_path / "other-out"), progress=quiet)
    assert (
        len({model_digest(folder, weights=True) for folder in (hf, other, out, tmp_path / "other-out")}) == 4
    )
    assert model_digest(out, weights=True) == model_digest(out, weights=True)


# -- whole or not at all -----------------------------------------------------------------------------------


def leaf(name: str, value: float = 1.0) -> Leaf:
    return Leaf(name, (4,), np.dtype(np.float32), lambda: np.full(4, value, np.float32))


def failing() -> Iterator[Leaf]:
    def read() -> np.ndarray:
        raise OSError("the disk is gone")

    yield leaf("a")
    yield Leaf("b", (4,), np.dtype(np.float32), read)


def test_a_failure_leaves_nothing(tmp_path: Path, hf: Path) -> None:
    with pytest.raises(OSError, match="the disk is gone"):
        convert(hf, tmp_path / "out", failing(), facts={})
    assert list(tmp_path.iterdir()) == []


def test_a_failure_leaves_what_was_there(tmp_path: Path, hf: Path) -> None:
    convert(hf, tmp_path / "out", [leaf("a", 2.0)], facts={"mark": 1})
    before = (tmp_path / "out/jaxserve.json").read_text()
    with pytest.raises(OSError, match="the disk is gone"):
        convert(hf, tmp_path / "out", failing(), facts={}, overwrite=True)
    assert (tmp_path / "out/jaxserve.json").read_text() == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_what_exists_is_refused(tmp_path: Path, hf: Path) -> None:
    target = tmp_path / "out"
    convert(hf, target, [leaf("a")], facts={"mark": 1})
    with pytest.raises(CheckpointError, match=r"out: exists; give another folder, or --overwrite"):
        convert(hf, target, [leaf("a")], facts={})
    convert(hf, target, [leaf("b")], facts={"mark": 2}, overwrite=True)
    assert json.loads((target / "jaxserve.json").read_text())["mark"] == 2
    assert orbax_io.open_orbax(target, {"b": (4,)})
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    link = tmp_path / "link"
    link.symlink_to(target)
    (tmp_path / "mine").mkdir()
    (tmp_path / "file").write_text("")
    for name in ("link", "mine", "file"):
        with pytest.raises(CheckpointError, match=f"{name}: is no converted model .* remove it first"):
            convert(hf, tmp_path / name, [leaf("a")], facts={}, overwrite=True)


def test_the_source_is_not_written_to(tmp_path: Path) -> None:
    source = tiny.write_model(tmp_path / "models" / "hf")
    for target in (source / "out", tmp_path / "models"):
        with pytest.raises(CheckpointError, match=r"holds the model that is converted or lies in it"):
            convert(source, target, [leaf("a")], facts={}, overwrite=True)
    with pytest.raises(CheckpointError, match=r"s3://bucket/x: OUT must be a local folder"):
        convert_model(str(source), "s3://bucket/x", progress=quiet)


def test_two_at_a_time(tmp_path: Path, hf: Path) -> None:
    partial = tmp_path / ".out.partial"
    partial.mkdir()
    lock = os.open(partial, os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)
    try:
        with pytest.raises(CheckpointError, match=r"another process is converting to \S*out"):
            convert(hf, tmp_path / "out", [leaf("a")], facts={})
    finally:
        os.close(lock)
    assert partial.is_dir()


def test_one_that_was_killed_is_taken_over(tmp_path: Path, hf: Path) -> None:
    program = (
        "import sys, time, numpy as np; from pathlib import Path\n"
        "from checkpoints.convert import convert; from checkpoints.orbax_io import Leaf\n"
        "def read():\n"
        "    print('reading', flush=True); time.sleep(60)\n"
        "one = Leaf('a', (4,), np.dtype(np.float32), lambda: np.ones(4, np.float32))\n"
        "two = Leaf('b', (4,), np.dtype(np.float32), read)\n"
        "convert(Path(sys.argv[1]), Path(sys.argv[2]), [one, two], facts={})\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program, str(hf), str(tmp_path / "out")],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    with process:
        assert process.stdout is not None
        assert process.stdout.readline() == "reading\n"
        process.send_signal(signal.SIGKILL)
    assert [path.name for path in tmp_path.iterdir()] == [".out.partial"]
    convert(hf, tmp_path / "out", [leaf("c")], facts={})
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert orbax_io.open_orbax(tmp_path / "out", {"c": (4,)})


def test_a_folder_that_is_no_model_is_refused_by_key(tmp_path: Path, out: Path) -> None:
    source = tiny.write_model(tmp_path / "hf")
    values = tiny.tensors(tiny.CONFIG)
    values["model.layers.7.mlp.up_proj.weight"] = values.pop("model.layers.1.mlp.up_proj.weight")
    save_file(values, source / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"lacks 1 key: 'model\.layers\.1\.mlp\.up_proj\.weight'"):
        convert_model(str(source), str(tmp_path / "out"), progress=quiet)
    with pytest.raises(CheckpointError, match=r"converted: has Orbax's layout already"):
        convert_model(str(out), str(tmp_path / "out"), progress=quiet)
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_a_damaged_folder_is_found_before_anything_is_compiled(tmp_path: Path, hf: Path) -> None:
    target = tmp_path / "out"
    convert_model(str(hf), str(target), progress=quiet)
    data = max((target / "weights").rglob("d/*"), key=lambda file: file.stat().st_size)
    data.write_bytes(data.read_bytes()[:-1])
    lines: list[str] = []
    with pytest.raises(CheckpointError, match=rf"{data.name}: has \d+ bytes"):
        build.dry_run(str(target), OPTIONS, lines.append)
    assert not any("compiled" in line for line in lines)


def test_small_files_are_chosen_by_name(tmp_path: Path) -> None:
    for name in ("a.json", "model.safetensors.index.json", "x.bin", "tokenizer.model", "merges.txt"):
        (tmp_path / name).write_text("{}")
    (tmp_path / "folder.json").mkdir()
    kept = [file.name for file in converting.small_files(tmp_path)]
    assert kept == ["a.json", "merges.txt", "tokenizer.model"]


# -- URLs --------------------------------------------------------------------------------------------------


@pytest.fixture
def bucket(out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The converted model in fsspec's own memory."""
    import fsspec  # type: ignore[import-untyped]

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    files = fsspec.filesystem("memory")
    files.put(str(out), "/bucket/my-model", recursive=True)
    yield "memory://bucket/my-model"
    files.rm("/bucket", recursive=True)


def test_a_url_that_fsspec_knows(bucket: str, out: Path) -> None:
    loaded = build.read_model(bucket, EngineOptions())
    assert loaded.name == build.model_name(bucket + "/") == loaded.folder.name == "my-model"
    assert_same(params_of(out, 2), params_of(loaded.folder, 2))
    assert greedy(bucket, "tensor=1") == greedy(str(out), "tensor=1")


def test_a_url_is_copied_once_and_again_when_it_changes(bucket: str) -> None:
    import fsspec

    first = remote.fetch(bucket)
    inode = first.stat().st_ino
    assert remote.fetch(bucket) == first
    assert first.stat().st_ino == inode
    time.sleep(0.01)
    fsspec.filesystem("memory").pipe("/bucket/my-model/config.json", b"{}")
    second = remote.fetch(bucket)
    assert second != first
    assert (second / "config.json").read_text() == "{}"
    assert (first / "config.json").read_text() != "{}"


def test_a_url_without_the_weights(bucket: str) -> None:
    folder = remote.fetch(bucket, weights=False)
    assert (folder / "config.json").is_file()
    assert not (folder / "weights").exists()
    assert (remote.fetch(bucket) / "weights").is_dir()
    assert build.read_model(bucket, EngineOptions(load_format="dummy")).folder == folder


def test_a_copy_that_fails_leaves_nothing(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from fsspec.implementations.memory import MemoryFileSystem  # type: ignore[import-untyped]

    real = MemoryFileSystem.get_file

    def broken(self: Any, name: str, target: str, **options: Any) -> None:
        if "manifest" in name:
            raise TimeoutError("the network is gone")
        real(self, name, target, **options)

    with monkeypatch.context() as patch:
        patch.setattr(MemoryFileSystem, "get_file", broken)
        with pytest.raises(CheckpointError, match=r"copying failed: TimeoutError: the network is gone"):
            remote.fetch(bucket)
    assert (remote.fetch(bucket) / "weights/manifest.ocdbt").is_file()


def test_file_urls_are_the_folder_itself(out: Path) -> None:
    assert remote.fetch(out.as_uri()) == out
    with pytest.raises(CheckpointError, match=r"file:///no/such: there is no such folder"):
        remote.fetch("file:///no/such")


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("memory://nothing/here", r"memory://nothing/here: there is no such folder, or it is empty"),
        ("nonsense://a/b", r"nonsense://a/b: .*nonsense"),
        ("dropbox://a/b", r"dropbox://a/b: .*dropbox"),
    ],
)
def test_urls_that_cannot_be_used(url: str, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        build.read_model(url, EngineOptions())


def test_a_listing_that_reaches_out_of_the_folder(monkeypatch: pytest.MonkeyPatch, bucket: str) -> None:
    from fsspec.implementations.memory import MemoryFileSystem

    listed = {"/bucket/my-model/../../x": {"size": 1}}
    with monkeypatch.context() as patch:
        patch.setattr(MemoryFileSystem, "find", lambda *args, **options: listed)
        with pytest.raises(
            CheckpointError, match=r"names '/bucket/my-model/\.\./\.\./x', which is not inside"
        ):
            remote.fetch(bucket)


@pytest.mark.parametrize("model", ["owner/name", "name", "/a/b", "./a", "~/a", "C:", ""])
def test_what_is_no_url(model: str) -> None:
    assert not remote.is_url(model)


# -- memory ------------------------------------------------------------------------------------------------


def measured(what: str, folder: Path, mesh: str = "tensor=1") -> dict[str, int]:
    done = subprocess.run(
        [sys.executable, "-m", "tests.checkpoints.memory", what, str(folder), mesh],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=1200,
    )
    assert done.returncode == 0, done.stderr
    figures: dict[str, int] = json.loads(done.stdout)
    return figures


@pytest.mark.slow
def test_three_gigabytes_pass_through_a_fraction(tmp_path: Path) -> None:
    """Anonymous memory, beyond what was there before: of a conversion in all, of a restore beside the weights
    (which on CPU lie in the host's memory)."""
    size = memory.write_large(tmp_path / "hf", memory.LARGE, shards=4)
    assert size > 2.9e9
    figures = measured("convert", tmp_path)
    assert figures["peak"] - figures["base"] < 1.5e9
    for mesh in ("tensor=1", "tensor=8"):
        figures = measured("out", tmp_path, mesh)
        assert figures["weights"] == size
        assert figures["peak"] - figures["base"] - figures["weights"] < 1.5e9


def test_memory_is_seen() -> None:
    with memory.Peak() as peak:
        block = np.ones(100_000_000, np.uint8)
        time.sleep(0.1)
        del block
        time.sleep(0.1)
    assert peak.value - peak.base > 90_000_000
