"""A model over two, four and eight fake devices: the same logits as on one, really cut into parts, and what
its compiled steps exchange."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from jaxserve import build
from jaxserve.config import EngineOptions
from sharding import RULES
from tests.models.driving import relative_error
from tests.sharding.running import Run, check_exchanges, run, write_model

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


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(CONFIG, tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def alone(folder: Path) -> Run:
    return run(folder, "tensor=1", "scan")


@pytest.fixture(scope="module", params=[(2, "scan"), (4, "unrolled")], ids=["2-scan", "4-unrolled"])
def split(request: pytest.FixtureRequest, folder: Path) -> tuple[int, Run]:
    tensor, layout = request.param
    return tensor, run(folder, f"tensor={tensor}", layout)


def test_logits_equal_those_of_one_device(alone: Run, split: tuple[int, Run]) -> None:
    _, got = split
    for one, many in zip(alone.prefill, got.prefill, strict=True):
        assert relative_error(many, one) < 1e-5
    assert relative_error(got.decode, alone.decode) < 1e-5
    np.testing.assert_array_equal(got.tokens, alone.tokens)


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

# 1,616 tokens: no device's part is a multiple of the 128 that a draw looks at together
PLANS = {"tensor=2": {}, "tensor=8": {"num_key_value_heads": 2, "vocab_size": 1616}}


@pytest.fixture(scope="module", params=PLANS)
def plan(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> build.Plan:
    folder = tmp_path_factory.mktemp("model")
    (folder / "config.json").write_text(json.dumps({**CONFIG, **PLANS[request.param]}))
    options = EngineOptions(
        load_format="dummy", dtype="float32", mesh=request.param, max_slots=4, kv_pages=24, page_size=16,
        prefill_chunk=64,
    )  # fmt: skip
    return build.plan_engine(str(folder), options, lambda line: None)


@pytest.mark.parametrize("kind", ["decode", "prefill"])
def test_what_the_devices_exchange(plan: build.Plan, kind: str) -> None:
    check_exchanges(plan, kind)


def test_the_pool_stays_where_it_is(plan: build.Plan) -> None:
    """The donated pool is the pool that comes out, a part on each device; nothing of its shape is copied."""
    shape = plan.shape
    width = 2 * plan.model.config.kv_size // 2  # halves, of four heads or of two
    half = f"f32[3,{shape.num_pages},{shape.page_size},{width}]"
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
            {"num_attention_heads": 12, "num_key_value_heads": 3},
            "tensor=2",
            "tensor=2 does not divide the model's num_key_value_heads=3: .* parts of several heads",
        ),
        (
            {"num_attention_heads": 12, "num_key_value_heads": 3, "vocab_size": 510},
            "tensor=2",
            "may be 1, 3, 6$",
        ),
        ({"num_attention_heads": 14, "num_key_value_heads": 2}, "tensor=4", "num_attention_heads=14"),
        ({"intermediate_size": 90}, "tensor=4", "intermediate_size=90"),
        ({"vocab_size": 510}, "tensor=4", "vocab_size=510"),
        ({}, "data=2", "one engine is one replica"),
        ({"num_attention_heads": 16, "num_key_value_heads": 16}, "tensor=16", "asks for 16 devices"),
    ],
)
def test_meshes_that_do_not_fit(tmp_path: Path, changed: dict[str, Any], mesh: str, message: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps({**CONFIG, **changed}))
    with pytest.raises(ValueError, match=message):
        build.plan_engine(str(tmp_path), EngineOptions(load_format="dummy", mesh=mesh), lambda line: None)
