"""Mixtral 8x7B and 8x22B: Mistral's form with a mixture of experts for the MLP of every layer.

The probabilities of the experts that a token goes to are scaled to sum to 1. Reference: transformers
`modeling_mixtral`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxserve.models.config import Fields, ModelConfig, decoder_config, expert_fields, same_windows

MODEL_TYPE = "mixtral"

# Over those of the dense decoder: {} is the layer, a second one the expert.
WEIGHT_NAMES = {
    "layers.mlp.gate.weight": "model.layers.{}.block_sparse_moe.gate.weight",
    "layers.mlp.experts.gate_proj": "model.layers.{}.block_sparse_moe.experts.{}.w1.weight",
    "layers.mlp.experts.up_proj": "model.layers.{}.block_sparse_moe.experts.{}.w3.weight",
    "layers.mlp.experts.down_proj": "model.layers.{}.block_sparse_moe.experts.{}.w2.weight",
}


def config_from_hf(config: Mapping[str, Any]) -> ModelConfig:
    # transformers' own defaults where the keys are missing
    fields = Fields({"num_key_value_heads": 8, "rms_norm_eps": 1e-5, **_with_theta(config)})
    fields.take("router_jitter_noise")  # training only
    window = fields.optional_integer("sliding_window", absent=None)
    return decoder_config(
        MODEL_TYPE,
        fields,
        windows=same_windows(fields, window),
        normalise_top_k=True,
        **expert_fields(fields, count=8, per_token=2),
    )


def _with_theta(config: Mapping[str, Any]) -> dict[str, Any]:
    """`rope_theta` is 1e6 where no key says it."""
    ropes = (config.get("rope_parameters"), config.get("rope_scaling"))
    said = config.get("rope_theta") is not None or any(
        isinstance(rope, dict) and rope.get("rope_theta") is not None for rope in ropes
    )
    return dict(config) if said else {**config, "rope_theta": 1e6}
