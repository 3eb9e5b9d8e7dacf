"""Experts over fake devices, along `expert`, along `tensor` and along both: the same logits and tokens as on
one device, no expert's weights moved, and an engine that serves them."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from jaxserve import build
from jaxserve.config import EngineOptions
from jaxserve.engine.programs import device_bytes
from jaxserve.llm import LLM
from jaxserve.models.decoder import Layout
from jaxserve.scheduler.types import SamplingParams
from jaxserve.weights import abstract_params
from sharding import RULES, parse_mesh
from tests.models.driving import relative_error
from tests.sharding.running import Run, check_exchanges, run, write_model

SIZES = {
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 16,
    "vocab_size": 512,
    "max_position_embeddings": 256,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "mixtral": {
        **SIZES, "model_type": "mixtral", "intermediate_size": 96, "num_local_experts": 4,
        "num_experts_per_tok": 2, "sliding_window": 50,
    },
    "qwen3_moe": {
        **SIZES, "model_type": "qwen3_moe", "moe_intermediate_size": 48, "num_experts": 8,
        "num_experts_per_tok": 3, "norm_topk_prob": True, "attention_bias": True,
    },
}  # fmt: skip
MESHES = ["expert=2", "expert=4", "tensor=2", "expert=2,tensor=2", "expert=4,tensor=2"]


@pytest.fixture(scope="module", params=CONFIGS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(CONFIGS[request.param], tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def alone(folder: Path) -> Run:
    return run(folder, "", "scan")


@pytest.mark.parametrize("shape", MESHES)
def test_equal_to_one_device(folder: Path, alone: Run, shape: str) -> None:
    """Logits of every prompt and every decoded token, the tokens themselves, and each device's part of the
    experts. Both layouts are met."""
    layout: Layout = "unrolled" if shape in ("expert=4", "expert=2,tensor=2") else "scan"
    got = run(folder, shape, layout)
    np.testing.assert_array_equal(got.tokens, alone.tokens)
    assert len(np.unique(alone.tokens)) > 8
    for one, many in zip(alone.prefill, got.prefill, strict=True):
        assert relative_error(many, one) < 1e-5
    assert relative_error(got.decode, alone.decode) < 1e-5

    mesh = parse_mesh(shape)
    stacks = (got.params["layers"] if layout == "scan" else got.params["layers"][2])["mlp"]["experts"]
    experts, width, inner = alone.params["layers"]["mlp"]["experts"]["down_proj"].shape[1:]
    for name, stack in stacks.items():
        matrix = (width, inner // mesh.tensor) if name == "down_proj" else (inner // mesh.tensor, width)
        assert len(stack.addressable_shards) == mesh.devices
        for shard in stack.addressable_shards:
            assert shard.data.shape[-3:] == (experts // mesh.expert, *matrix)
        assert len({str(shard.index) for shard in stack.addressable_shards}) == mesh.devices


# -- compiled programs -------------------------------------------------------------------------------------


def options(mesh: str, **changed: Any) -> EngineOptions:
    return EngineOptions(
        dtype="float32", mesh=mesh, max_slots=4, kv_pages=64, page_size=16, prefill_chunk=64, **changed
    )


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("shape", ["expert=2", "expert=4,tensor=2"])
def test_what_the_devices_exchange(tmp_path: Path, name: str, shape: str) -> None:
    """No more than a dense model's devices: one sum for each layer's attention, one for its experts. The
    experts' bytes are shared out, and the pool's."""
    (tmp_path / "config.json").write_text(json.dumps(CONFIGS[name]))
    plan = build.plan_engine(str(tmp_path), options(shape, load_format="dummy"), lambda line: None)
    mesh = parse_mesh(shape)
    for kind in ("decode", "prefill"):
        check_exchanges(plan, kind)
    assert plan.page_bytes == 3 * 16 * 2 * 4 * 16 * 4 // min(mesh.devices, 4)
    experts = abstract_params(plan.model, plan.mesh, plan.layout)["layers"]["mlp"]["experts"]
    whole = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(experts))
    assert device_bytes(experts) == whole // mesh.devices
    for weight in plan.model.weights:
        assert set(weight.axes) <= set(RULES), weight.name


# -- the engine --------------------------------------------------------------------------------------------


def test_the_engine_serves_experts_over_devices(folder: Path) -> None:
    """Prompts of several lengths together: the same tokens as on one device."""
    rng = np.random.default_rng(1)
    prompts = [rng.integers(0, 512, length).tolist() for length in (3, 70, 20, 41)]
    params = SamplingParams(temperature=0.0, max_tokens=6, ignore_eos=True)
    texts = []
    for shape in ("expert=1", "expert=2,tensor=2"):
        given = dataclasses.asdict(options(shape)) | {"max_model_len": 128}
        with LLM(str(folder), **given) as llm:
            texts.append([reply.outputs[0].token_ids for reply in llm.generate(prompts, params)])
    assert texts[0] == texts[1]
    assert all(len(tokens) == 6 for tokens in texts[0])


@pytest.mark.parametrize(
    ("config", "shape", "message"),
    [
        ({"model_type": "llama", "intermediate_size": 96}, "expert=2", "llama is a dense model"),
        ({"model_type": "qwen3", "intermediate_size": 96}, "expert=2,tensor=2", "use tensor=4"),
        (
            {"model_type": "mixtral", "intermediate_size": 96, "num_local_experts": 6},
            "expert=4",
            "num_experts=6",
        ),
        ({"model_type": "mixtral", "intermediate_size": 90}, "tensor=4", "inner size of an expert, 90"),
    ],
)
def test_meshes_that_do_not_fit(tmp_path: Path, config: dict[str, Any], shape: str, message: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps({**SIZES, **config}))
    with pytest.raises(ValueError, match=message):
        build.plan_engine(str(tmp_path), options(shape, load_format="dummy"), lambda line: None)
