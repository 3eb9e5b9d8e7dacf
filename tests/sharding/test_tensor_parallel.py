"""A model over two and four fake devices: the same logits as on one, and really cut into parts."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from numpy.typing import NDArray

from jaxserve import build
from jaxserve.config import EngineOptions
from jaxserve.models.decoder import Decoder, Layout, Params
from jaxserve.weights import load_params, open_weights
from sharding import RULES, make_mesh, parse_mesh
from tests.models.driving import Driver, chunked, relative_error

CONFIG = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 16,
    "vocab_size": 512,
    "max_position_embeddings": 256,
    "attention_bias": True,  # a bias after a product that is summed over devices must be added once
    "mlp_bias": True,
}
PROMPTS = [1, 40, 150, 64]
STEPS = 8


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    (folder / "config.json").write_text(json.dumps(CONFIG))
    loaded = build.read_model(str(folder), EngineOptions())
    rng = np.random.default_rng(0)
    tensors: dict[str, NDArray[np.float32]] = {}
    for weight in Decoder(loaded.config, jnp.float32).weights:
        for layer in range(loaded.config.num_layers if weight.per_layer else 1):
            centre, spread = (1.0, 0.2) if "norm" in weight.name else (0.0, 1.3 / weight.shape[-1] ** 0.5)
            values = rng.normal(centre, spread, weight.shape).astype(np.float32)
            tensors[weight.checkpoint_key.format(layer)] = values
    safetensors.numpy.save_file(tensors, folder / "model.safetensors")
    return folder


@dataclasses.dataclass
class Run:
    """params: as loaded; prefill: logits of every prompt; tokens, decode: greedy ones and their logits."""

    params: Params
    pool: jax.Array
    prefill: list[NDArray[np.float32]]
    tokens: NDArray[np.int32]
    decode: NDArray[np.float32]


def run(folder: Path, tensor: int, layout: Layout, forced: NDArray[np.int32] | None = None) -> Run:
    """Chunked, packed prompts, then decode of `forced` tokens (greedy ones without)."""
    loaded = build.read_model(str(folder), EngineOptions())
    mesh = make_mesh(parse_mesh(f"tensor={tensor}"))
    model = Decoder(loaded.config, jnp.dtype(loaded.dtype))
    params = load_params(model, open_weights(model, loaded.folder), mesh, layout)
    driver = Driver(model, params, mesh, page=16, max_len=160, tokens=128, rows=3, slots=4)
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, 512, length).astype(np.int32) for length in PROMPTS]
    cache = driver.cache([length + STEPS for length in PROMPTS], rng)
    prefill = driver.prefill(cache, prompts, chunked(PROMPTS, 128, 3, rng))
    if forced is None:
        tokens, decode = driver.greedy(cache, [logits[-1] for logits in prefill], PROMPTS, STEPS)
    else:
        seen = [np.stack([logits[-1] for logits in prefill])]
        for step in range(STEPS - 1):
            places = [length + step for length in PROMPTS]
            seen.append(driver.decode(cache, forced[:, step].tolist(), places))
        tokens, decode = forced, np.stack(seen, axis=1)
    return Run(params, cache.pool, prefill, tokens, decode)


@pytest.fixture(scope="module")
def alone(folder: Path) -> Run:
    return run(folder, 1, "scan")


@pytest.fixture(scope="module", params=[(2, "scan"), (4, "unrolled")], ids=["2-scan", "4-unrolled"])
def split(request: pytest.FixtureRequest, folder: Path, alone: Run) -> Iterator[tuple[int, Run]]:
    tensor, layout = request.param
    yield tensor, run(folder, tensor, layout, alone.tokens)


def test_logits_equal_those_of_one_device(alone: Run, split: tuple[int, Run]) -> None:
    _, got = split
    for one, many in zip(alone.prefill, got.prefill, strict=True):
        assert relative_error(many, one) < 1e-5
    assert relative_error(got.decode, alone.decode) < 1e-5
    np.testing.assert_array_equal(np.argmax(got.decode, axis=-1), alone.tokens)


def test_weights_and_pool_lie_in_parts(split: tuple[int, Run]) -> None:
    tensor, got = split
    assert got.pool.addressable_shards[0].data.shape == (*got.pool.shape[:-1], got.pool.shape[-1] // tensor)
    # its own dimension last but for layers, which are stacked in front or apart
    divided = {
        "q_proj.weight": (128 // tensor, 64),
        "k_proj.weight": (64 // tensor, 64),
        "v_proj.weight": (64 // tensor, 64),
        "o_proj.weight": (64, 128 // tensor),
        "q_proj.bias": (128 // tensor,),
        "k_proj.bias": (64 // tensor,),
        "o_proj.bias": (64,),
        "gate_proj.weight": (96 // tensor, 64),
        "down_proj.weight": (64, 96 // tensor),
        "up_proj.bias": (96 // tensor,),
        "down_proj.bias": (64,),
        "embed_tokens.weight": (512 // tensor, 64),
        "lm_head.weight": (512 // tensor, 64),
        "layernorm.weight": (64,),
    }
    seen = set()
    for path, leaf in jax.tree.leaves_with_path(got.params):
        name = ".".join(str(getattr(key, "key", key)) for key in path)
        assert len({shard.device for shard in leaf.addressable_shards}) == tensor
        for ending, shape in divided.items():
            if name.endswith(ending):
                seen.add(ending)
                expected = (3, *shape) if leaf.ndim > len(shape) else shape
                assert {shard.data.shape for shard in leaf.addressable_shards} == {expected}, name
    assert seen == set(divided)


def test_each_device_holds_its_share_of_the_bytes(split: tuple[int, Run]) -> None:
    tensor, got = split
    leaves = jax.tree.leaves(got.params)
    whole = sum(leaf.nbytes for leaf in leaves)
    first = sum(leaf.addressable_shards[0].data.nbytes for leaf in leaves)
    assert first < whole / tensor * 1.05  # norms and biases of the residual stream are everywhere


# -- compiled programs -------------------------------------------------------------------------------------

KINDS = "all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter"
COLLECTIVE = re.compile(rf"= (?P<shape>.*?) (?P<kind>{KINDS})(-start)?\(")


def collectives(text: str) -> list[tuple[str, int, str]]:
    """(kind, elements of its largest array, the operation's name) of a compiled program's collectives."""
    found = []
    for line in text.splitlines():
        if match := COLLECTIVE.search(line):
            sizes = [
                math.prod(map(int, dims.split(","))) for dims in re.findall(r"\[([\d,]+)\]", match["shape"])
            ]
            name = re.search(r'op_name="([^"]*)"', line)
            found.append((match["kind"], max(sizes, default=1), name[1] if name else ""))
    return found


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> build.Plan:
    folder = tmp_path_factory.mktemp("model")
    (folder / "config.json").write_text(json.dumps(CONFIG))
    options = EngineOptions(
        load_format="dummy", dtype="float32", mesh="tensor=2", max_slots=4, kv_pages=24, page_size=16,
        prefill_chunk=64,
    )  # fmt: skip
    return build.plan_engine(str(folder), options, lambda line: None)


@pytest.mark.parametrize("kind", ["decode", "prefill"])
def test_what_the_devices_exchange(plan: build.Plan, kind: str) -> None:
    """Sums of the residual stream, two a layer and one for the embedding, and small things about the draw:
    never pages, weights, or a row of the vocabulary."""
    bucket = plan.programs.buckets(kind)[-1]
    found = collectives(plan.programs[kind, bucket].as_text())
    tokens = bucket
    stream = [entry for entry in found if entry[1] == tokens * CONFIG["hidden_size"]]
    assert sorted(name.rsplit("/", 2)[-2] for _, _, name in stream) == ["attention", "jit(_take)", "mlp"]
    assert {entry[0] for entry in stream} == {"all-reduce"}
    rows = bucket if kind == "decode" else plan.prefill_rows[bucket]
    for entry in found:
        assert entry in stream or entry[1] <= rows * 128 < rows * CONFIG["vocab_size"], entry


def test_the_pool_stays_where_it_is(plan: build.Plan) -> None:
    """The donated pool is the pool that comes out, half on each device; nothing of its shape is copied."""
    shape = plan.shape
    half = f"f32[3,{shape.num_pages},{shape.page_size},64]"
    for kind in ("decode", "prefill"):
        text = plan.programs[kind, plan.programs.buckets(kind)[-1]].as_text()
        assert half in text
        assert not re.search(rf"= {re.escape(half)}\S* copy", text)
        memory = plan.programs.memory((kind, plan.programs.buckets(kind)[-1]))
        assert memory.aliased > plan.page_bytes * shape.num_pages


def test_every_declared_weight_has_a_rule(plan: build.Plan) -> None:
    for weight in plan.model.weights:
        assert set(weight.axes) <= set(RULES), weight.name


@pytest.mark.parametrize(
    ("changed", "mesh", "message"),
    [
        (
            {"num_key_value_heads": 2},
            "tensor=4",
            "tensor=4 does not divide the model's num_key_value_heads=2",
        ),
        ({"intermediate_size": 90}, "tensor=4", "intermediate_size=90"),
        ({"vocab_size": 510}, "tensor=4", "vocab_size=510"),
        ({}, "data=2", "only the tensor axis"),
        ({"num_attention_heads": 16, "num_key_value_heads": 16}, "tensor=16", "asks for 16 devices"),
    ],
)
def test_meshes_that_do_not_fit(tmp_path: Path, changed: dict[str, Any], mesh: str, message: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps({**CONFIG, **changed}))
    with pytest.raises(ValueError, match=message):
        build.plan_engine(str(tmp_path), EngineOptions(load_format="dummy", mesh=mesh), lambda line: None)
