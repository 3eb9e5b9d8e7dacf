"""Llama 2 and 3 and what shares their form (SmolLM, Yi, TinyLlama).

Reference: transformers `modeling_llama`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxserve.models.config import Fields, ModelConfig, decoder_config

MODEL_TYPE = "llama"


def config_from_hf(config: Mapping[str, Any]) -> ModelConfig:
    fields = Fields(config)
    bias = fields.flag("attention_bias")
    return decoder_config(MODEL_TYPE, fields, qkv_bias=bias, o_bias=bias, mlp_bias=fields.flag("mlp_bias"))
