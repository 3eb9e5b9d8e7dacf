"""Qwen 2 and 2.5: biases on q, k and v only; sliding layers where the config says so.

Reference: transformers `modeling_qwen2`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxserve.models.config import Fields, ModelConfig, decoder_config, layer_windows

MODEL_TYPE = "qwen2"


def qwen_windows(fields: Fields) -> tuple[int | None, ...]:
    """`sliding_window` counts only with `use_sliding_window`, from layer `max_window_layers` on."""
    window = fields.optional_integer("sliding_window", absent=4096)
    if not fields.flag("use_sliding_window"):
        window = None
    return layer_windows(fields, window, fields.integer("max_window_layers", 28, low=0))


def config_from_hf(config: Mapping[str, Any]) -> ModelConfig:
    fields = Fields(config)
    fields.require("use_mrope", False)
    return decoder_config(MODEL_TYPE, fields, windows=qwen_windows(fields), qkv_bias=True)
