"""Which `model_type` is served by which file."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxserve.models import llama, mistral, mixtral, qwen2, qwen3, qwen3_moe
from jaxserve.models.config import ConfigError, ModelConfig

FAMILIES = {module.MODEL_TYPE: module for module in (llama, mistral, mixtral, qwen2, qwen3, qwen3_moe)}


def config_from_hf(config: Mapping[str, Any]) -> ModelConfig:
    """Raises ConfigError for an unknown architecture or a value that cannot be honoured."""
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise ConfigError(
            f"config.json: model_type={model_type!r} is not supported; it must be one of"
            f" {', '.join(sorted(FAMILIES))}"
        )
    return FAMILIES[model_type].config_from_hf(config)
