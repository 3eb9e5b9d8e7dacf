"""Orbax checkpoints: from any mesh to any other, training checkpoints, and folders that cannot be used."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from checkpoints import orbax_io
from checkpoints.files import CheckpointError
from checkpoints.orbax_io import Leaf, open_orbax, restore

# Orbax reads in an event loop of its own; where one array cannot be read it closes the loop while the others'
# reads may still report to it.
pytestmark = pytest.mark.filterwarnings(
    "ignore:(?s)Exception ignored in.*Event loop is closed:pytest.PytestUnraisableExceptionWarning"
)
ROOT = Path(__file__).resolve().parents[2]
SHAPES = {
    "ends.norm.weight": (16,),
    "layers.0.mlp.weight": (24, 16),
    "layers.1.mlp.weight": (24, 16),
    "layers.0.experts": (4, 8, 16),
    "layers.1.experts": (4, 8, 16),
}


def values(dtype: Any = np.float32, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {name: rng.standard_normal(shape).astype(dtype) for name, shape in SHAPES.items()}


def tree_of(flat: Mapping[str, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for name, value in flat.items():
        *parents, last = name.split(".")
        inner = tree
        for parent in parents:
            inner = inner.setdefault(parent, {})
        inner[last] = value
    return tree


def mesh(*shape: int) -> Mesh:
    return Mesh(np.array(jax.devices()[: np.prod(shape)]).reshape(shape), ("a", "b")[: len(shape)])


def placed(array: np.ndarray, on: Mesh) -> NamedSharding:
    """Split along every axis of the mesh that divides an axis of the array."""
    spec: list[str | None] = [None] * array.ndim
    for axis, size in on.shape.items():
        for i in range(array.ndim):
            if spec[i] is None and array.shape[i] % size == 0:
                spec[i] = str(axis)
                break
    return NamedSharding(on, PartitionSpec(*spec))


def save_streamed(folder: Path, arrays: Mapping[str, np.ndarray]) -> None:
    orbax_io.save(
        folder,
        [Leaf(name, a.shape, a.dtype, lambda a=a: a) for name, a in arrays.items()],  # type: ignore[misc]
    )


def save_standard(folder: Path, tree: Any) -> None:
    with ocp.StandardCheckpointer() as writer:
        writer.save(folder, tree)


def bits(array: Any) -> bytes:
    return np.asarray(array).tobytes()


def restored(folder: Path, on: Mesh, **options: Any) -> dict[str, jax.Array]:
    checkpoint = open_orbax(folder, SHAPES)
    shardings = {name: placed(np.empty(shape), on) for name, shape in SHAPES.items()}
    result = dict(restore(checkpoint, shardings, **options))
    assert {name: a.sharding for name, a in result.items()} == shardings
    return result


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("orbax") / "model"
    save_streamed(folder, values())
    return folder


@pytest.fixture
def copy(written: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(written, tmp_path / "model"))


# -- round trips -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_every_bit_comes_back_on_every_mesh(tmp_path: Path, dtype: Any) -> None:
    arrays = values(dtype)
    save_streamed(tmp_path / "model", arrays)
    for shape in ((1,), (2,), (8,), (2, 4)):
        found = restored(tmp_path / "model", mesh(*shape))
        assert {name: bits(a) for name, a in found.items()} == {name: bits(a) for name, a in arrays.items()}
        assert {a.dtype for a in found.values()} == {np.dtype(dtype)}


@pytest.mark.parametrize("shape", [(8,), (2, 4), (4,)])
def test_the_mesh_that_wrote_it_is_not_asked(tmp_path: Path, shape: tuple[int, ...]) -> None:
    arrays, on = values(), mesh(*shape)
    save_standard(
        tmp_path / "model", tree_of({n: jax.device_put(a, placed(a, on)) for n, a in arrays.items()})
    )
    for other in ((1,), (2,), (4, 2)):
        found = restored(tmp_path / "model", mesh(*other))
        assert {name: bits(a) for name, a in found.items()} == {name: bits(a) for name, a in arrays.items()}


def test_a_bound_on_what_is_read_together(written: Path) -> None:
    arrays = values()
    for bound in (1, 3000, 10**9):
        found = restored(written, mesh(2), batch_bytes=bound)
        assert {name: bits(a) for name, a in found.items()} == {name: bits(a) for name, a in arrays.items()}


def test_orbax_reads_it_without_us(written: Path) -> None:
    with ocp.StandardCheckpointer() as reader:
        tree = reader.restore(written)
    assert bits(tree["layers"]["1"]["mlp"]["weight"]) == bits(values()["layers.1.mlp.weight"])


def test_arrays_are_made_one_after_the_other(tmp_path: Path) -> None:
    events: list[str] = []

    def leaf(name: str) -> Leaf:
        def read() -> np.ndarray:
            events.append(f"read {name}")
            return np.ones(8, np.float32)

        return Leaf(name, (8,), np.dtype(np.float32), read, lambda: events.append(f"release {name}"))

    orbax_io.save(tmp_path / "x", [leaf("a"), leaf("b")], wrote=lambda leaf: events.append(leaf.name))
    assert events == ["read a", "release a", "a", "read b", "release b", "b"]


def test_an_array_that_is_not_what_was_said(tmp_path: Path) -> None:
    wrong = Leaf("a.b", (8,), np.dtype(np.float32), lambda: np.ones(9, np.float32))
    with pytest.raises(ValueError, match=r"array\.shape=\(9,\).*a\.b"):
        orbax_io.save(tmp_path / "x", [wrong])
    assert not (tmp_path / "x").exists()


# -- training checkpoints ----------------------------------------------------------------------------------


class Part(nnx.Module):
    def __init__(self, array: np.ndarray) -> None:
        self.weight = nnx.Param(jnp.asarray(array))


class Layer(nnx.Module):
    def __init__(self, arrays: Mapping[str, np.ndarray], i: int, rngs: nnx.Rngs) -> None:
        self.mlp = Part(arrays[f"layers.{i}.mlp.weight"])
        self.experts = nnx.Param(jnp.asarray(arrays[f"layers.{i}.experts"]))
        self.dropout = nnx.Dropout(0.1, rngs=rngs)  # keeps a key and a counter in the state


class Model(nnx.Module):
    def __init__(self, arrays: Mapping[str, np.ndarray]) -> None:
        rngs = nnx.Rngs(0)
        self.ends = nnx.Dict(norm=Part(arrays["ends.norm.weight"]))
        self.layers = nnx.List([Layer(arrays, i, rngs) for i in range(2)])


def trained() -> tuple[Any, Any]:
    """State of the model and of its optimizer after a step, on a mesh of 2 x 4."""
    model = Model(values())
    optimizer = nnx.Optimizer(model, optax.adam(0.1), wrt=nnx.Param)
    gradient = jax.tree.map(jnp.ones_like, nnx.state(model, nnx.Param))
    with jax.numpy_dtype_promotion("standard"):  # optax multiplies ints with floats
        optimizer.update(model, gradient)
    on = mesh(2, 4)

    def put(x: Any) -> Any:
        return jax.device_put(x, placed(np.empty(x.shape), on)) if x.ndim else x

    params, rest = nnx.state(model, nnx.Param), nnx.state(model, nnx.RngCount)
    return nnx.merge_state(jax.tree.map(put, params), rest), jax.tree.map(put, nnx.state(optimizer))


def in_one_tree(folder: Path, model: Any, optimizer: Any) -> None:
    save_standard(folder / "ckpt", {"model": model, "optimizer": optimizer, "step": 7})


def as_pure_dicts(folder: Path, model: Any, optimizer: Any) -> None:
    pure = {"params": nnx.to_pure_dict(model), "opt_state": nnx.to_pure_dict(optimizer)}
    save_standard(folder / "ckpt", pure)


def bare_state(folder: Path, model: Any, optimizer: Any) -> None:
    save_standard(folder / "ckpt", model)


def manager_with_items(folder: Path, model: Any, optimizer: Any) -> None:
    older = jax.tree.map(jnp.zeros_like, model)
    with ocp.CheckpointManager(folder) as manager:
        for step, state in ((9, older), (10, model)):  # "10" sorts before "9" as text
            args = ocp.args.Composite(
                params=ocp.args.StandardSave(state), opt=ocp.args.StandardSave(optimizer)
            )
            manager.save(step, args=args)


def manager_with_one_item(folder: Path, model: Any, optimizer: Any) -> None:
    with ocp.CheckpointManager(folder) as manager:
        manager.save(3, args=ocp.args.StandardSave({"params": model, "opt": optimizer}))


@pytest.mark.parametrize(
    "save", [in_one_tree, as_pure_dicts, bare_state, manager_with_items, manager_with_one_item]
)
def test_a_training_checkpoint(tmp_path: Path, save: Callable[[Path, Any, Any], None]) -> None:
    model, optimizer = trained()
    save(tmp_path, model, optimizer)
    (tmp_path / "config.json").write_text("{}")
    flat = {".".join(map(str, path)): leaf[...] for path, leaf in nnx.to_flat_state(model)}
    assert orbax_io.is_orbax(tmp_path)
    for shape in ((1,), (4,)):
        found = restored(tmp_path, mesh(*shape))
        assert {name: bits(a) for name, a in found.items()} == {name: bits(flat[name]) for name in SHAPES}
    assert bits(found["layers.0.mlp.weight"]) != bits(values()["layers.0.mlp.weight"])  # it was trained


def test_two_models_in_one_tree_have_to_be_told_apart(tmp_path: Path) -> None:
    arrays, other = values(), values(seed=1)
    save_standard(tmp_path / "ckpt", {"ema": tree_of(arrays), "params": tree_of(other)})
    with pytest.raises(
        CheckpointError, match=r"2 places: 'ckpt: ema', 'ckpt: params'; say which in jaxserve"
    ):
        open_orbax(tmp_path, SHAPES)
    about = {"format_version": 1, "weights": "ckpt", "tree": "ema"}
    (tmp_path / "jaxserve.json").write_text(json.dumps(about))
    assert bits(restored(tmp_path, mesh(1))["layers.1.experts"]) == bits(arrays["layers.1.experts"])
    (tmp_path / "jaxserve.json").write_text(json.dumps(about | {"tree": "nowhere"}))
    with pytest.raises(CheckpointError, match=r"ckpt: the weights are not .* lacks 5 keys: 'ends\.norm"):
        open_orbax(tmp_path, SHAPES)


def test_momentum_is_no_model(tmp_path: Path) -> None:
    """Also where the model itself is not there, or not under its names."""
    (tmp_path / "5").mkdir()
    save_standard(tmp_path / "5" / "opt", tree_of(values()))
    save_standard(tmp_path / "5" / "state", {"opt_state": [{"trace": tree_of(values())}]})
    with pytest.raises(CheckpointError, match="holds none of the model's arrays"):
        open_orbax(tmp_path, SHAPES)


# -- what is refused ---------------------------------------------------------------------------------------


def without(name: str) -> dict[str, np.ndarray]:
    return {key: value for key, value in values().items() if key != name}


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        (without("layers.1.experts"), r"lacks 1 key: 'layers\.1\.experts'; config\.json and"),
        (
            without("layers.1.experts") | {"layers.1.expert": np.ones(3, np.float32)},
            r"lacks 1 key: 'layers\.1\.experts'; has unknown 1 key: 'layers\.1\.expert'",
        ),
        (
            values() | {"layers.2.mlp.weight": np.ones((24, 16), np.float32)},
            r"has unknown 1 key: 'layers\.2\.mlp\.weight'",
        ),
        (
            values() | {"ends.norm.weight": np.ones(17, np.float32)},
            r"1 of another shape .*: 'ends\.norm\.weight' is \(17,\), expected \(16,\)",
        ),
        (
            values() | {"ends.norm.weight": np.ones(16, np.int8)},
            r"key 'ends\.norm\.weight' is int8, and weights must be float16, bfloat16, float32",
        ),
        (
            {"other.thing": np.ones(16, np.float32)},
            r"holds none of the model's arrays: expected 5 keys: 'ends",
        ),
    ],
    ids=["missing", "renamed", "unknown", "misshaped", "integers", "another model"],
)
def test_another_model_is_refused_by_key(tmp_path: Path, arrays: dict[str, np.ndarray], message: str) -> None:
    save_streamed(tmp_path / "model", arrays)
    with pytest.raises(CheckpointError, match=message):
        open_orbax(tmp_path / "model", SHAPES)


def about_for(folder: Path) -> Path:
    """A folder as `convert` writes it, from a checkpoint."""
    out = folder.with_name("out")
    out.mkdir()
    folder.rename(out / "weights")
    orbax_io.write_about(out)
    return out


def data_file(folder: Path) -> Path:
    return max((file for file in folder.rglob("d/*") if file.is_file()), key=lambda file: file.stat().st_size)


def edit_about(folder: Path, **changes: object) -> None:
    file = folder / "jaxserve.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


CONVERTED: dict[str, tuple[Callable[[Path], object], str]] = {
    "a file is missing": (lambda out: data_file(out).unlink(), r"/d/\w+: cannot be read \(No such file"),
    "a file is cut off": (lambda out: cut(data_file(out)), r"/d/\w+: has \d+ bytes, jaxserve.json says \d+;"),
    "no metadata": (
        lambda out: (out / "weights/_METADATA").unlink(),
        r"weights/_METADATA: cannot be read",
    ),
    "no weights": (lambda out: shutil.rmtree(out / "weights"), r"out/weights/\S+: cannot be read"),
    "a later version": (
        lambda out: edit_about(out, format_version=2),
        r"format_version is '2', and .* reads 1",
    ),
    "no version": (lambda out: edit_about(out, format_version=None), r"format_version is 'None'"),
    "weights elsewhere": (
        lambda out: edit_about(out, weights="../x"),
        r"\"weights\" is '\.\./x', which is no",
    ),
    "weights nowhere": (lambda out: edit_about(out, weights=3), r"\"weights\" is '3'"),
    "no tree": (lambda out: edit_about(out, tree=None), r"\"tree\" is 'None', expected a dotted path"),
    "files elsewhere": (
        lambda out: edit_about(out, files={"/etc/passwd": 3}),
        r"names the file '/etc/passwd'",
    ),
    "no files": (lambda out: edit_about(out, files=[1]), r"\"files\" is no object"),
    "not JSON": (lambda out: (out / "jaxserve.json").write_text("{"), r"jaxserve.json: is not JSON"),
}


@pytest.mark.parametrize("case", CONVERTED)
def test_a_converted_folder_that_is_damaged(copy: Path, case: str) -> None:
    damage, message = CONVERTED[case]
    out = about_for(copy)
    assert open_orbax(out, SHAPES).arrays
    damage(out)
    assert orbax_io.is_orbax(out)
    with pytest.raises(CheckpointError, match=message):
        open_orbax(out, SHAPES)


def test_files_that_no_list_names(copy: Path) -> None:
    """A training checkpoint has no list of its files: what is gone shows when it is needed, by key.

    In a process of its own: Orbax drops the reads that are under way when one fails, and Python complains.
    """
    program = (
        "import sys, jax; from pathlib import Path; from checkpoints.orbax_io import open_orbax, restore\n"
        "from checkpoints.files import CheckpointError\n"
        f"folder, shapes = Path(sys.argv[1]), {SHAPES!r}\n"
        "checkpoint = open_orbax(folder, shapes)\n"
        "for file in folder.rglob('ocdbt.process_0/d/*'): file.unlink()\n"
        "place = jax.sharding.SingleDeviceSharding(jax.devices()[0])\n"
        "try: list(restore(checkpoint, {name: place for name in shapes}))\n"
        "except CheckpointError as error: print(error)\n"
    )
    printed = run(program, copy)  # the norm is too small to have a file
    assert re.search(
        r"model: key 'layers\.0\.mlp\.weight' cannot be restored: .*Error reading .*model/", printed
    )
    (copy / "manifest.ocdbt").unlink()
    with pytest.raises(CheckpointError, match=r"model: is no \(whole\) Orbax checkpoint: "):
        open_orbax(copy, SHAPES)


def test_saves_that_were_not_finished(tmp_path: Path, copy: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    unfinished = run / "3.orbax-checkpoint-tmp"
    shutil.copytree(copy, unfinished)
    assert orbax_io.is_orbax(run)
    with pytest.raises(
        CheckpointError, match=r"3\.orbax-checkpoint-tmp: is a save that Orbax did not finish"
    ):
        open_orbax(run, SHAPES)
    shutil.copytree(copy, run / "2")
    assert open_orbax(run, SHAPES).folder == run / "2"
    # the last step is there by name, and not whole: the one before it must not be served in its place
    (shutil.copytree(copy, run / "4") / "_METADATA").unlink()
    with pytest.raises(CheckpointError, match=r"run/4: is no \(whole\) Orbax checkpoint"):
        open_orbax(run, SHAPES)


def run(program: str, folder: Path) -> str:
    """What the program prints under `python -O`."""
    done = subprocess.run(
        [sys.executable, "-O", "-c", program, str(folder)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_metadata_that_is_damaged(copy: Path) -> None:
    (copy / "_METADATA").write_text('{"tree_metadata": 3')
    with pytest.raises(CheckpointError, match=r"model: is no \(whole\) Orbax checkpoint: "):
        open_orbax(copy, SHAPES)


def test_what_is_no_orbax_folder(tmp_path: Path, written: Path) -> None:
    assert not orbax_io.is_orbax(tmp_path)
    (tmp_path / "2024").mkdir()  # a folder may have a number for its name
    assert not orbax_io.is_orbax(tmp_path)
    with pytest.raises(CheckpointError, match=r"has no Orbax checkpoint \(a folder with _METADATA\)"):
        open_orbax(tmp_path, SHAPES)
    shutil.copytree(written, tmp_path / "ckpt")
    assert orbax_io.is_orbax(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"")
    assert not orbax_io.is_orbax(tmp_path)


def test_the_checks_hold_without_asserts(copy: Path) -> None:
    """Under `python -O` a checkpoint of another model is still refused, and one cut off too."""
    out = about_for(copy)
    program = (
        "import sys; from pathlib import Path; from checkpoints.orbax_io import open_orbax\n"
        "from checkpoints.files import CheckpointError\n"
        f"shapes = {SHAPES!r}\n"
        "for name in ('layers.1.mlp.weight', 'layers.1.mlp.bias'):\n"
        "    try: open_orbax(Path(sys.argv[1]), shapes | {name: (3,)})\n"
        "    except CheckpointError as error: print(error)\n"
        "file = max(Path(sys.argv[1]).rglob('d/*'), key=lambda file: file.stat().st_size)\n"
        "file.write_bytes(file.read_bytes()[:-1])\n"
        "try: open_orbax(Path(sys.argv[1]), shapes)\n"
        "except CheckpointError as error: print(error)\n"
    )
    misshaped, missing, short = run(program, out).splitlines()
    assert "'layers.1.mlp.weight' is (24, 16), expected (3,)" in misshaped
    assert "lacks 1 key: 'layers.1.mlp.bias'" in missing
    assert "jaxserve.json says" in short
