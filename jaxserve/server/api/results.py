"""What completions and chat share of an answer: its choices, the best of them, usage, log-probabilities."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from jaxserve.engine.outputs import Output, TokenLogprob, mean_logprob
from jaxserve.prompts import token_text
from jaxserve.protocols import TokenizerLike
from jaxserve.scheduler.types import Finish, Request
from jaxserve.server.bridge import Call

LOWEST_LOGPROB = -9999.0  # JSON has no -inf; OpenAI uses this


@dataclasses.dataclass(slots=True)
class Choice:
    """One sequence's answer, put together from its increments."""

    text: str = ""
    logprobs: list[TokenLogprob] = dataclasses.field(default_factory=list)
    token_ids: list[int] = dataclasses.field(default_factory=list)
    finish_reason: Finish | None = None
    stop_reason: str | int | None = None
    cumulative_logprob: float | None = None

    def add(self, output: Output) -> None:
        self.text += output.text
        self.logprobs += output.logprobs or ()
        self.token_ids += output.token_ids
        self.finish_reason = output.finish_reason or self.finish_reason
        self.stop_reason = output.stop_reason
        self.cumulative_logprob = output.cumulative_logprob


@dataclasses.dataclass(slots=True)
class Answer:
    """A prompt's answer: its `n` choices, the likeliest first where they are the best of more.

    embedding: f32[D], of a request with `pooling`, of any length.
    """

    choices: list[Choice]
    prompt_logprobs: Sequence[TokenLogprob | None] = ()
    embedding: NDArray[np.float32] | None = None

    def keep(self, n: int) -> None:
        if n < len(self.choices):
            self.choices.sort(key=lambda one: -mean_logprob(one.cumulative_logprob, len(one.token_ids)))
            del self.choices[n:]


async def collect(call: Call, requests: Sequence[Request], usage: Usage) -> list[Answer]:
    """The answer to each request. Aborts the call when cancelled."""
    answers = [Answer([Choice() for _ in range(request.params.sequences)]) for request in requests]
    with call:
        async for batch in call.batches():
            for prompt, output in batch:
                usage.add(prompt, output)
                answer = answers[prompt]
                answer.choices[output.index].add(output)
                answer.prompt_logprobs = output.prompt_logprobs or answer.prompt_logprobs
                if output.embedding is not None:
                    answer.embedding = output.embedding
    for answer, request in zip(answers, requests, strict=True):
        answer.keep(request.params.n)
    return answers


class Usage:
    """What a reply's tokens come to, counted from its increments."""

    def __init__(self, requests: Sequence[Request]) -> None:
        self._prompt_tokens = sum(len(request.prompt_token_ids) for request in requests)
        self._completion_tokens = 0
        self._cached_tokens = 0
        self._from_cache = [False] * len(requests)

    def add(self, prompt: int, output: Output) -> None:
        self._completion_tokens += len(output.token_ids)
        if output.index == 0:  # its siblings share the pages that it has just computed
            self._cached_tokens += output.cached_tokens
            self._from_cache[prompt] = output.from_cache

    def body(self) -> dict[str, Any]:
        """OpenAI's usage object; a prompt counts once, whatever its `n`, and every sequence of a `best_of`.

        `response_cached`, ours, says that nothing of the reply was computed.
        """
        body: dict[str, Any] = {
            "prompt_tokens": self._prompt_tokens,
            "completion_tokens": self._completion_tokens,
            "total_tokens": self._prompt_tokens + self._completion_tokens,
            "prompt_tokens_details": {"cached_tokens": self._cached_tokens},
        }
        if all(self._from_cache):
            body["response_cached"] = True
        return body


def token_name(tokenizer: TokenizerLike | None, token_id: int, *, as_id: bool) -> str:
    """What a token is called in a list of log-probabilities; vLLM's form where its id is asked for."""
    return f"token_id:{token_id}" if as_id else token_text(tokenizer, token_id)


def finite(logprob: float) -> float:
    return max(logprob, LOWEST_LOGPROB)


def prompt_logprobs_body(
    tokenizer: TokenizerLike | None, entries: Sequence[TokenLogprob | None], count: int
) -> list[dict[str, Any] | None]:
    """vLLM's form: null for the first token, then token id -> logprob, rank and text, for
    the `count` likeliest tokens and the prompt's own."""
    body: list[dict[str, Any] | None] = []
    for entry in entries:
        if entry is None:
            body.append(None)
            continue
        ranked = [(token, logprob, rank) for rank, (token, logprob) in enumerate(entry.top[:count], start=1)]
        ranked.append((entry.token_id, entry.logprob, entry.rank))
        body.append(
            {
                str(token): {
                    "logprob": finite(logprob),
                    "rank": rank,
                    "decoded_token": token_text(tokenizer, token),
                }
                for token, logprob, rank in ranked
            }
        )
    return body
