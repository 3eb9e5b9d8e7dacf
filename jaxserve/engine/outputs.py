"""What the engine hands back while a request runs: increments, each with new tokens and their text."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

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
    finish_reason: set once, in the last increment of this index.
    stop_reason: the stop string or stop token that ended it, None for the model's own end token.
    prompt_logprobs: once, in the first increment of index 0: one per prompt token, None for the first.
    error: the engine failed and the sequence with it; `finish_reason` is then ABORT.
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


Sink = Callable[[Output], None]  # called on the engine's thread: must not block
