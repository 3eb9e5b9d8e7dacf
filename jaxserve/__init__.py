"""jaxserve: a JAX/XLA-compiled inference engine for large language models.

Importing the package imports no jax: `LLM` and `SamplingParams` load on first use.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jaxserve.llm import LLM as LLM
    from jaxserve.scheduler.types import SamplingParams as SamplingParams

__version__ = "0.1.0"
__all__ = ["LLM", "SamplingParams"]


def __getattr__(name: str) -> Any:
    if name == "LLM":
        from jaxserve.llm import LLM

        return LLM
    if name == "SamplingParams":
        from jaxserve.scheduler.types import SamplingParams

        return SamplingParams
    raise AttributeError(f"module 'jaxserve' has no attribute {name!r}")
