"""What a user can say of the search. Knows nothing of jax."""

from __future__ import annotations

import dataclasses
from typing import Literal

from jaxserve.config import EngineOptions
from sharding.mesh import parse_mesh


@dataclasses.dataclass(frozen=True, slots=True)
class TuneOptions:
    """What to look for, with what load, and how the model is run beside that.

    objective: throughput looks for the most generated tokens a second; latency for the most among the
        settings with which tokens lie at most `max_gap_ms` apart while prompts come in; both saves either.
    input_tokens: of each request's prompt; cut to the context.
    output_tokens: that each request draws; cut to half the context.
    max_gap_ms: longest time of a step in which all slots decode and a whole chunk of prompts is computed, in
        milliseconds; None takes 3 times that of the fewest slots and the smallest chunk.
    seconds: after which nothing new is tried; what is under way ends.
    dtype: of weights and KV pages; auto takes what the checkpoint says.
    max_model_len: longest context in tokens; None takes the model's own.
    memory_fraction: share of the device's (on CPU: the free) memory that weights, pool and programs may take.
    mesh: devices per axis, of one replica, e.g. tensor=4; None chooses as `jaxserve serve` does.
    load_format: auto reads the checkpoint; dummy draws random weights from config.json alone.
    """

    objective: Literal["both", "throughput", "latency"] = "both"
    input_tokens: int = 512
    output_tokens: int = 128
    max_gap_ms: float | None = None
    seconds: float = 120.0
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    max_model_len: int | None = None
    memory_fraction: float = 0.9
    mesh: str | None = None
    load_format: Literal["auto", "dummy"] = "auto"

    def __post_init__(self) -> None:
        self.engine()
        for name in ("input_tokens", "output_tokens"):
            value = getattr(self, name)
            if not 1 <= value <= 2**20:
                raise ValueError(f"--{name.replace('_', '-')}={value} must lie in [1, {2**20}]")
        if not 1.0 <= self.seconds <= 86400.0:
            raise ValueError(f"--seconds={self.seconds} must lie in [1, 86400]")
        if self.max_gap_ms is not None and not 0.0 < self.max_gap_ms < 1e9:
            raise ValueError(f"--max-gap-ms={self.max_gap_ms} must be more than 0")
        if parse_mesh(self.mesh or "").data > 1:
            raise ValueError(f"--mesh {self.mesh}: one replica is measured; data must be 1")

    def engine(self) -> EngineOptions:
        """As the engine is started, but for the sizes. Raises ValueError naming the flag at fault."""
        names = ("dtype", "max_model_len", "memory_fraction", "mesh", "load_format")
        return EngineOptions(**{name: getattr(self, name) for name in names})

    @property
    def objectives(self) -> tuple[Literal["throughput", "latency"], ...]:
        if self.objective == "both":
            return ("throughput", "latency")
        return (self.objective,)
