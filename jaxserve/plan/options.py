"""What a user can say of the serving that is planned. Knows nothing of jax."""

from __future__ import annotations

import dataclasses
from typing import Literal

from jaxserve.config import EngineOptions

MOST_SLOTS = 256  # of a replica, where nobody said: beyond it a token takes long, and gains little


@dataclasses.dataclass(frozen=True, slots=True)
class PlanOptions:
    """How the model would be served, and with what load.

    dtype: of weights and KV pages; auto takes what config.json says.
    mesh: devices per axis, e.g. data=2,tensor=4,expert=1; the best by arithmetic if not given.
    objective: throughput picks the mesh that draws most tokens a second, in chunks of 512 prompt tokens;
        latency the one that draws a lone sequence's token soonest, in chunks of 128.
    input_tokens: of a request's prompt.
    output_tokens: that a request draws.
    max_model_len: longest context in tokens; by default the model's own, or the pool's if that is less.
    max_slots: sequences that decode together in one replica; by default what the pool holds of these
        requests, at most 256.
    page_size: tokens per KV page.
    prefill_chunk: prompt tokens computed between two decode steps; by default the objective's.
    memory_fraction: share of the device's memory that weights, pool and programs may take.
    price: of one chip for one hour, in any currency; gives the cost of a million tokens.
    """

    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    mesh: str | None = None
    objective: Literal["throughput", "latency"] = "throughput"
    input_tokens: int = 1024
    output_tokens: int = 1024
    max_model_len: int | None = None
    max_slots: int | None = None
    page_size: int = 64
    prefill_chunk: int | None = None
    memory_fraction: float = 0.9
    price: float | None = None

    def __post_init__(self) -> None:
        self.engine()
        for name in ("input_tokens", "output_tokens"):
            value, flag = getattr(self, name), f"--{name.replace('_', '-')}"
            if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= 2**24:
                raise ValueError(f"{flag}={value!r} must be an integer in [1, {2**24}]")
        if self.price is not None and not 0 < self.price < 1e9:
            raise ValueError(f"--price={self.price} must be more than 0")

    def engine(self) -> EngineOptions:
        """As the engine would be started. Raises ValueError naming the flag at fault."""
        names = ("dtype", "max_model_len", "page_size", "prefill_chunk", "memory_fraction", "objective")
        given: dict[str, object] = {name: getattr(self, name) for name in names}
        given |= {"mesh": self.mesh, "load_format": "dummy"}
        if self.max_slots is not None:
            given["max_slots"] = self.max_slots
        return EngineOptions(**given)  # type: ignore[arg-type]

    @property
    def request_tokens(self) -> int:
        """What one request's context grows to."""
        return self.input_tokens + self.output_tokens

    @property
    def mean_context(self) -> float:
        """Positions that a drawn token sees on average."""
        return self.input_tokens + self.output_tokens / 2
