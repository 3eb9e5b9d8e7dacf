"""What completions and chat share of an answer: gathered choices, usage, log-probabilities."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from jaxserve.engine.outputs import Output, TokenLogprob
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
    tokens: int = 0
    finish_reason: Finish | None = None
    prompt_logprobs: list[TokenLogprob | None] | None = None

    def add(self, output: Output) -> None:
        self.text += output.text
        self.logprobs += output.logprobs or ()
        self.tokens += len(output.token_ids)
        self.finish_reason = output.finish_reason or self.finish_reason
        self.prompt_logprobs = output.prompt_logprobs or self.prompt_logprobs


async def collect(call: Call, requests: Sequence[Request]) -> list[list[Choice]]:
    """Every sequence of the call, as [prompt][index]. Aborts the call when cancelled."""
    choices = [[Choice() for _ in range(request.params.n)] for request in requests]
    with call:
        async for batch in call.batches():
            for prompt, output in batch:
                choices[prompt][output.index].add(output)
    return choices


def usage(requests: Sequence[Request], completion_tokens: int) -> dict[str, int]:
    """OpenAI's usage object; a prompt counts once, whatever its `n`."""
    prompt_tokens = sum(len(request.prompt_token_ids) for request in requests)
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }


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
