"""Which meshes models of published sizes fit on, and which they are given."""

from __future__ import annotations

from typing import Any

import pytest

from jaxserve.models import config_from_hf
from jaxserve.models.meshes import check_mesh, choose_mesh
from sharding import MeshShape, parse_mesh

LLAMA: dict[str, Any] = {
    "model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 2,
    "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256,
    "max_position_embeddings": 8192,
}  # fmt: skip
QWEN2_7B = {
    **LLAMA, "model_type": "qwen2", "hidden_size": 3584, "intermediate_size": 18944,
    "num_attention_heads": 28, "num_key_value_heads": 4, "vocab_size": 152064,
}  # fmt: skip
MIXTRAL = {
    **LLAMA,
    "model_type": "mixtral",
    "vocab_size": 32000,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
}
UNEVEN = {
    **LLAMA, "num_attention_heads": 12, "num_key_value_heads": 3, "head_dim": 128, "intermediate_size": 12288,
}  # fmt: skip
QWEN3_30B = {
    **LLAMA, "model_type": "qwen3_moe", "hidden_size": 2048, "moe_intermediate_size": 768, "head_dim": 128,
    "num_key_value_heads": 4, "vocab_size": 151936, "num_experts": 128, "num_experts_per_tok": 8,
}  # fmt: skip


@pytest.mark.parametrize(
    ("config", "devices", "expected"),
    [
        (LLAMA, 1, ""),
        (LLAMA, 8, "tensor=8"),
        (LLAMA, 7, "tensor=4"),
        (LLAMA, 16, "tensor=16"),  # each key/value head on two devices
        (QWEN2_7B, 8, "tensor=4"),  # 28 query heads
        (MIXTRAL, 8, "tensor=8"),
        (QWEN3_30B, 8, "tensor=2,expert=4"),  # 384 columns of an expert each, not 96
        (QWEN3_30B, 4, "tensor=2,expert=2"),
        (QWEN3_30B, 32, "tensor=2,expert=16"),
    ],
)
def test_chosen(config: dict[str, Any], devices: int, expected: str) -> None:
    model = config_from_hf(config)
    shape = choose_mesh(model, devices)
    assert shape == parse_mesh(expected)
    check_mesh(model, shape)


@pytest.mark.parametrize(
    ("config", "shape", "message"),
    [
        (UNEVEN, MeshShape(tensor=2),
         r"^--mesh tensor=2 does not divide .*num_key_value_heads=3: .*; tensor may be 1, 3, 6, 12$"),
        (QWEN2_7B, MeshShape(tensor=8), "tensor=8 does not divide the model's num_attention_heads=28;"
         " tensor may be 1, 2, 4$"),
        (LLAMA, MeshShape(tensor=3), "tensor=3 does not divide the model's intermediate_size=14336"),
        ({**LLAMA, "vocab_size": 32003}, MeshShape(tensor=2), "tensor=2 does not divide .* vocab_size=32003"),
        (MIXTRAL, MeshShape(tensor=2, expert=3), "expert=3 does not divide the model's num_experts=8$"),
        (QWEN3_30B, MeshShape(tensor=4, expert=16),
         "tensor=4,expert=16 does not divide the model's num_attention_heads=32; tensor may be 1, 2"
         " beside expert=16"),
        (LLAMA, MeshShape(expert=4, tensor=2), "dense model .* use tensor=8"),
    ],
)  # fmt: skip
def test_what_divides_what(config: dict[str, Any], shape: MeshShape, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_mesh(config_from_hf(config), shape)
