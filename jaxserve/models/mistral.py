"""Mistral 7B and its kin: Llama's form with one sliding window for all layers.

Reference: transformers `modeling_mistral`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxserve.models.config import Fields, ModelConfig, decoder_config, layer_windows

MODEL_TYPE = "mistral"


def config_from_hf(config: Mapping[str, Any]) -> ModelConfig:
    fields = Fields({"num_key_value_heads": 8, **config})  # transformers' default where the key is missing
    # A null window means none; transformers' default of 4096 is for configs that leave the key out.
    window = fields.optional_integer("sliding_window", absent=4096)
    return decoder_config(MODEL_TYPE, fields, windows=layer_windows(fields, window))
