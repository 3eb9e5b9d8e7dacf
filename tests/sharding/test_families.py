"""Every family on 1, 2, 4 and 8 fake devices: the logits and the greedy tokens of one device.

Of 8 query heads; key/value heads are fewer than the devices of most meshes here, so that several hold the
same one, and as many as one in a model with a single one.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.models.driving import relative_error
from tests.sharding.running import Run, run, write_model

SIZES = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 512,
    "max_position_embeddings": 256,
}
DENSE = {**SIZES, "intermediate_size": 96}
SLIDING = {"use_sliding_window": True, "sliding_window": 50, "max_window_layers": 1}
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {**DENSE, "model_type": "llama"},
    "llama, one key/value head": {**DENSE, "model_type": "llama", "num_key_value_heads": 1},
    "mistral": {**DENSE, "model_type": "mistral", "sliding_window": 50},
    "qwen2": {**DENSE, **SLIDING, "model_type": "qwen2", "tie_word_embeddings": True},
    "qwen3": {**DENSE, "model_type": "qwen3", "attention_bias": True},
    "mixtral": {
        **DENSE, "model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2,
    },
    "qwen3_moe": {
        **SIZES, "model_type": "qwen3_moe", "moe_intermediate_size": 48, "num_experts": 8,
        "num_experts_per_tok": 3, "norm_topk_prob": True,
    },
}  # fmt: skip
EXPERTS = {"mixtral": ["expert=2,tensor=4"], "qwen3_moe": ["expert=8", "expert=2,tensor=4"]}
MESHES = [
    (name, shape)
    for name in CONFIGS
    for shape in ["tensor=2", "tensor=4", "tensor=8", *EXPERTS.get(name, [])]
]
QUICK = {("llama", "tensor=8"), ("mixtral", "expert=2,tensor=4")}


@functools.cache
def folder(root: Path, name: str) -> Path:
    path = root / name.replace("/", " ")
    path.mkdir()
    return write_model(CONFIGS[name], path)


@functools.cache
def alone(folder: Path) -> Run:
    return run(folder, "tensor=1", "scan")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        pytest.param(*each, id="-".join(each), marks=() if each in QUICK else pytest.mark.slow)
        for each in MESHES
    ],
)
def test_as_on_one_device(root: Path, name: str, shape: str) -> None:
    """In both layouts of the layers, one or the other to a mesh."""
    one = alone(folder(root, name))
    many = run(folder(root, name), shape, "unrolled" if shape == "tensor=4" else "scan")
    for ours, theirs in zip(many.prefill, one.prefill, strict=True):
        assert relative_error(ours, theirs) < 1e-5
    assert relative_error(many.decode, one.decode) < 1e-5
    np.testing.assert_array_equal(many.tokens, one.tokens)
    assert len(np.unique(one.tokens)) > 8


@pytest.mark.parametrize(
    ("name", "shape", "parts"),
    [
        ("llama", "tensor=8", 2),
        pytest.param("llama, one key/value head", "tensor=4", 1, marks=pytest.mark.slow),
        ("mixtral", "expert=2,tensor=4", 2),
    ],
)
def test_each_device_holds_the_heads_of_its_queries(root: Path, name: str, shape: str, parts: int) -> None:
    """Of the pool and of k's and v's weights; devices that hold the same head hold the same bits."""
    many = run(folder(root, name), shape, "scan")
    devices = len(many.pool.addressable_shards)
    attention = many.params["layers"]["self_attn"]
    width = {"pool": many.pool.shape[-1], "q": 128, "k": CONFIGS[name]["num_key_value_heads"] * 16}
    q_shards = attention["q_proj"]["weight"].addressable_shards
    queries = {shard.device: shard.index[1].start or 0 for shard in q_shards}
    group = 8 // CONFIGS[name]["num_key_value_heads"]
    copies: dict[int, list[np.ndarray]] = {}
    for shard in many.pool.addressable_shards:
        assert shard.data.shape[-1] == width["pool"] // parts
        copies.setdefault(shard.index[-1].start or 0, []).append(np.asarray(shard.data))
        head = (shard.index[-1].start or 0) // 32
        assert head == queries[shard.device] // 16 // group
    for shard in attention["k_proj"]["weight"].addressable_shards:
        assert shard.data.shape[1] == width["k"] // parts
    for shard in q_shards:
        assert shard.data.shape[1] == width["q"] // devices
    assert len(copies) == parts
    for same in copies.values():
        assert len(same) == devices // parts
        for one in same[1:]:
            np.testing.assert_array_equal(one, same[0])
