"""What the engine hands back while a request runs: increments, each with new tokens and their text."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from jaxserve.scheduler.types import Finish


@dataclasses.dataclass(frozen=True, slots=True)
class TokenLogprob:
    """A token, its log-probability under the model's raw distribution (natural logarithm, before
    temperature and filters), its rank (1 is the likeliest), and the likeliest alternatives, best first."""

    token_id: int
    logprob: float
    rank: int
    top: tuple[tuple[int, float], ...] = ()


@dataclasses.dataclass(slots=True)
class Output:
    """An increment for one sequence of a request.

    token_ids: new tokens, a final stop token included.
    text: what they complete; never a part of a stop string.
    logprobs: one per new token, if asked for.
    finish_reason: set once, in the last increment of this index; TIMEOUT when the request's deadline passed.
    stop_reason: the stop string or stop token that ended it, None for the model's own end token.
    prompt_logprobs: once, in the first increment of index 0: one per prompt token, None for the first.
    error: the engine failed and the sequence with it; `finish_reason` is then ABORT.
    param: with `error`, the request's field that is at fault, where the engine is not.
    cached_tokens: in the first increment of this index: prompt tokens that came from the prefix cache.
    admitted: in the first increment of this index: when it first got a slot, by `time.monotonic()`.
    cumulative_logprob: of all its tokens, in its last increment, when the best of several are chosen.
    from_cache: the whole answer comes from the response cache.
    embedding: f32[D], of a request with `pooling`, in its only increment; of any length.
    """

    request_id: str
    index: int
    token_ids: list[int] = dataclasses.field(default_factory=list)
    text: str = ""
    logprobs: list[TokenLogprob] | None = None
    finish_reason: Finish | None = None
    stop_reason: str | int | None = None
    prompt_logprobs: list[TokenLogprob | None] | None = None
    error: str | None = None
    param: str | None = None
    cached_tokens: int = 0
    admitted: float | None = None
    cumulative_logprob: float | None = None
    from_cache: bool = False
    embedding: NDArray[np.float32] | None = None


def mean_logprob(cumulative: float | None, tokens: int) -> float:
    """By which `best_of` ranks sequences: per token, so that longer ones are not the worse for it."""
    return (cumulative or 0.0) / max(tokens, 1)


def unit_length(vector: NDArray[np.float32]) -> NDArray[np.float32]:
    """f32[D] of length 1, in the direction of `vector`; zeros stay zeros."""
    return vector / max(float(np.linalg.norm(vector)), 1e-12)


class EngineBusy(RuntimeError):
    """The queue is full: come back in `retry_after` whole seconds, 1 to 120."""

    def __init__(self, retry_after: int) -> None:
        super().__init__(f"the queue is full; try again in {retry_after} s")
        self.retry_after = retry_after


Sink = Callable[[Output], None]  # called on the engine's thread: must not block
