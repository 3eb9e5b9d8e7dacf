"""Qwen 3 with experts (30B-A3B, 235B-A22B): Qwen 3's attention, a mixture of experts for every MLP.

Every layer must be sparse, as in all that Qwen published. Reference: transformers `modeling_qwen3_moe`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxserve.models.config import (
    ConfigError,
    Fields,
    ModelConfig,
    decoder_config,
    expert_fields,
    same_windows,
)

MODEL_TYPE = "qwen3_moe"

# Over those of the dense decoder: {} is the layer, a second one the expert.
WEIGHT_NAMES = {
    "layers.mlp.gate.weight": "model.layers.{}.mlp.gate.weight",
    **{
        f"layers.mlp.experts.{name}": f"model.layers.{{}}.mlp.experts.{{}}.{name}.weight"
        for name in ("gate_proj", "up_proj", "down_proj")
    },
}


def config_from_hf(config: Mapping[str, Any]) -> ModelConfig:
    fields = Fields({"num_key_value_heads": 4, **config})  # transformers' default where the key is missing
    fields.require("decoder_sparse_step", 1)
    fields.require("mlp_only_layers", [])
    fields.take("intermediate_size")  # of dense layers, and there are none
    bias = fields.flag("attention_bias")
    return decoder_config(
        MODEL_TYPE,
        fields,
        windows=_windows(fields),
        qkv_bias=bias,
        o_bias=bias,
        qk_norm=True,
        mlp_size=fields.integer("moe_intermediate_size", 768),
        normalise_top_k=fields.flag("norm_topk_prob"),
        **expert_fields(fields, count=128, per_token=8),
    )


def _windows(fields: Fields) -> tuple[int | None, ...]:
    """With `use_sliding_window` all layers slide, as in transformers, which does not read
    `max_window_layers` in this family."""
    window = fields.optional_integer("sliding_window", absent=4096)
    first = fields.integer("max_window_layers", 0, low=0)
    if not fields.flag("use_sliding_window"):
        window = None
    if window is not None and first:
        raise ConfigError(
            f"config.json: max_window_layers={first} is not supported with use_sliding_window in"
            f" {MODEL_TYPE}, where all layers slide; it must be 0"
        )
    return same_windows(fields, window)
