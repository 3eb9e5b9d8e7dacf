"""What `generate` and `chat` share: loading with progress on stderr, sampling flags, streaming."""

from __future__ import annotations

import dataclasses
import itertools
import queue
import sys
import time
from collections.abc import Generator, Mapping, Sequence

from jaxserve.config import EngineOptions
from jaxserve.engine.outputs import Output
from jaxserve.llm import LLM
from jaxserve.scheduler.types import SamplingParams, check_request

WATCH_SECONDS = 1.0  # how often a silent engine is looked at
_numbers = itertools.count()


class LoadError(Exception):
    """The model cannot be loaded; the message is for the user."""


@dataclasses.dataclass(frozen=True, slots=True)
class SamplingArguments:
    """How tokens are drawn. `--seed`, an option of the engine, makes the draws repeatable.

    max_tokens: tokens to generate at most; by default what is left of the context.
    temperature: 0 takes the likeliest token each time.
    top_p: keep the smallest set of tokens whose probability reaches this.
    top_k: keep the k likeliest tokens; 0 keeps all.
    stop: text that ends the reply and is not part of it; may be given several times.
    """

    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        self.params()

    def params(self, defaults: Mapping[str, float | int] | None = None) -> SamplingParams:
        """`defaults` are the model's own, for what was not given. Raises ValueError naming the field."""
        given = {name: getattr(self, name) for name in ("temperature", "top_p", "top_k")}
        chosen = {name: value for name, value in given.items() if value is not None}
        return SamplingParams(max_tokens=self.max_tokens, stop=self.stop, **{**(defaults or {}), **chosen})


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def load(model: str | None, options: EngineOptions) -> LLM:
    """Raises LoadError."""
    try:
        return LLM(model, progress=say, **dataclasses.asdict(options))
    except (OSError, ValueError, RuntimeError, MemoryError) as error:
        raise LoadError(str(error) or type(error).__name__) from error


def stream(llm: LLM, prompt_token_ids: Sequence[int], params: SamplingParams) -> Generator[str]:
    """The reply's text, piece by piece. Left early, it aborts the request.

    Raises RequestError where the request cannot be served, RuntimeError where the engine fails.
    """
    request_id = f"terminal-{next(_numbers)}"
    request = check_request(request_id, prompt_token_ids, params, llm.engine.limits, time.monotonic())
    outputs: queue.SimpleQueue[Output] = queue.SimpleQueue()
    finished = False
    llm.engine.submit((request, outputs.put))
    try:
        while not finished:
            try:
                output = outputs.get(timeout=WATCH_SECONDS)
            except queue.Empty:
                if not llm.engine.healthy:
                    raise RuntimeError(f"the engine failed: {llm.engine.failure}") from None
                continue
            finished = output.finish_reason is not None
            if output.error is not None:
                raise RuntimeError(output.error)
            if output.text:
                yield output.text
    finally:
        if not finished:
            llm.engine.abort(request_id)


def write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()
