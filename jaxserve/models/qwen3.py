"""Qwen 3 dense: RMS norms on each head of q and k, a head size of its own, no biases by default.

Reference: transformers `modeling_qwen3`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxserve.models.config import Fields, ModelConfig, decoder_config
from jaxserve.models.qwen2 import qwen_windows

MODEL_TYPE = "qwen3"


def config_from_hf(config: Mapping[str, Any]) -> ModelConfig:
    fields = Fields({"head_dim": 128, **config})
    bias = fields.flag("attention_bias")
    return decoder_config(
        MODEL_TYPE, fields, windows=qwen_windows(fields), qkv_bias=bias, o_bias=bias, qk_norm=True
    )
