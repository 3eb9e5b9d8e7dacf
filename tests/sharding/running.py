"""A random model of any family on any mesh: its logits of packed prompts, greedy tokens, and what the devices
exchange in its compiled steps."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from numpy.typing import NDArray

from jaxserve import build
from jaxserve.config import EngineOptions
from jaxserve.models.decoder import Decoder, Layout, Params
from jaxserve.weights import checkpoint_targets, load_params, open_weights
from pallas_kernels import hlo
from sharding import make_mesh, parse_mesh
from tests.models.driving import Driver, chunked

PROMPTS = [1, 40, 150, 64]
STEPS = 8


def write_model(config: dict[str, Any], folder: Path) -> Path:
    """Random f32 weights, wide enough that tokens go to all experts and replies differ."""
    (folder / "config.json").write_text(json.dumps(config))
    loaded = build.read_model(str(folder), EngineOptions())
    rng = np.random.default_rng(0)
    tensors: dict[str, NDArray[np.float32]] = {}
    for target in checkpoint_targets(Decoder(loaded.config, jnp.dtype(jnp.float32))):
        centre, spread = (1.0, 0.2) if "norm" in target.key else (0.0, 1.3 / target.shape[-1] ** 0.5)
        tensors[target.key] = rng.normal(centre, spread, target.shape).astype(np.float32)
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


def run(folder: Path, shape: str, layout: Layout) -> Run:
    """Chunked, packed prompts, then greedy decode."""
    loaded = build.read_model(str(folder), EngineOptions())
    mesh = make_mesh(parse_mesh(shape), kv_heads=loaded.config.num_kv_heads)
    model = Decoder(loaded.config, jnp.dtype(loaded.dtype))
    params = load_params(model, open_weights(model, loaded.folder), mesh, layout)
    driver = Driver(model, params, mesh, page=16, max_len=160, tokens=128, rows=3, slots=4)
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, 512, length).astype(np.int32) for length in PROMPTS]
    cache = driver.cache([length + STEPS for length in PROMPTS], rng)
    prefill = driver.prefill(cache, prompts, chunked(PROMPTS, 128, 3, rng))
    tokens, decode = driver.greedy(cache, [logits[-1] for logits in prefill], PROMPTS, STEPS)
    return Run(params, cache.pool, prefill, tokens, decode)


def check_exchanges(plan: build.Plan, kind: str) -> None:
    """Sums of the residual stream, two a layer and one for the embedding, and small things about the draw:
    never pages, weights, or a row of the vocabulary."""
    config, bucket = plan.model.config, plan.programs.buckets(kind)[-1]
    rows = bucket if kind == "decode" else plan.prefill_rows[bucket]
    sums = 0
    for one, times in hlo.Module(plan.programs[kind, bucket].as_text()).collectives():
        size = sum(shape.elements for shape in one.results)
        if size == bucket * config.hidden_size:
            assert one.opcode == "all-reduce", one
            sums += times
        else:
            assert size <= rows * 160 < rows * config.vocab_size, one
            # of tokens that may be drawn, a bit each, what lies across the devices' borders
            assert one.opcode in ("all-reduce", "all-gather") or size * 32 <= rows * config.vocab_size, one
    assert sums == 2 * config.num_layers + 1
