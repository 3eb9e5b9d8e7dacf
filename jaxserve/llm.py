"""The Python API: `LLM` loads a model and generates, in one process, without HTTP.

Building the engine is `build.py`'s work and running it the engine thread's; this module turns prompts into
requests and increments into results. The caller's thread sleeps until its last result is there, so it takes
no interpreter time from the engine's.
"""

from __future__ import annotations

import dataclasses
import itertools
import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Self

from jaxserve._leaves import check_leaves
from jaxserve.config import EngineOptions
from jaxserve.engine.outputs import Output, TokenLogprob
from jaxserve.prompts import encode_chat, encode_text
from jaxserve.protocols import EngineLike, TokenizerLike
from jaxserve.scheduler.types import Finish, Request, RequestError, SamplingParams, check_request

log = logging.getLogger("jaxserve")

Prompt = str | Sequence[int]
Message = Mapping[str, Any]
Logprobs = dict[int, float]  # token id -> log-probability

WATCH_SECONDS = 1.0  # how often a waiting caller looks whether the engine still lives


@dataclasses.dataclass(slots=True)
class CompletionOutput:
    """One continuation of a prompt.

    token_ids: with the stop token that ended it, if one did.
    logprobs: one per token if asked for: the token itself and the likeliest alternatives.
    finish_reason: stop, length or abort.
    stop_reason: the stop string or stop token that ended it, None for the model's own end token.
    """

    index: int
    text: str = ""
    token_ids: list[int] = dataclasses.field(default_factory=list)
    logprobs: list[Logprobs] | None = None
    finish_reason: Finish | None = None
    stop_reason: str | int | None = None


@dataclasses.dataclass(slots=True)
class RequestOutput:
    """A prompt and its continuations, `n` of them.

    prompt: the text, if it was given as one.
    prompt_logprobs: if asked for; None for the first token, then the token itself and the likeliest ones.
    """

    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    prompt_logprobs: list[Logprobs | None] | None = None


class LLM:
    """A model in this process.

    model: a local folder or a hub id; None takes the embedded model.
    options: those of `jaxserve serve` that concern the engine, such as `max_slots=32` (see
        `jaxserve.config.EngineOptions`). Raises TypeError naming one that does not exist.
    progress: takes a line at a time while the model loads; None logs them to the logger "jaxserve".

    Its methods may be called from several threads at once; their requests then share the slots.
    """

    def __init__(
        self, model: str | None = None, *, progress: Callable[[str], None] | None = None, **options: Any
    ) -> None:
        known = [field.name for field in dataclasses.fields(EngineOptions)]
        unknown = sorted(set(options) - set(known))
        if unknown:
            raise TypeError(f"LLM() has no option {', '.join(unknown)}; there are: {', '.join(known)}")
        engine_options = EngineOptions(**options)
        check_leaves()
        from jaxserve.build import build_engine  # imports jax, which takes a second

        self._numbers = itertools.count()
        self.engine: EngineLike = build_engine(model, engine_options, progress=progress or log.info)
        self.engine.start()

    @property
    def tokenizer(self) -> TokenizerLike | None:
        return self.engine.tokenizer

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> list[RequestOutput]:
        """Continues each prompt; results in the prompts' order.

        prompts: a text, token ids, or a list of either. params: for all prompts, or one for each; None takes
        the model's own defaults.
        Raises RequestError, before anything runs, for a prompt or parameter that cannot be served, and
        RuntimeError where the engine fails.
        """
        texts = _as_prompts(prompts)
        pending = []
        for prompt, chosen in zip(
            texts,
            _each(params, SamplingParams(**self.engine.limits.sampling_defaults), len(texts)),
            strict=True,
        ):
            text = prompt if isinstance(prompt, str) else None
            ids = encode_text(self.tokenizer, prompt) if isinstance(prompt, str) else prompt
            pending.append(self._request(text, ids, chosen))
        return self._run(pending)

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> list[RequestOutput]:
        """The assistant's next message in a conversation, or in each of a list of conversations.

        messages: dicts with `role` and `content`. params: as in `generate`; the default is what is left of
        the context. Raises as `generate` does, also where the model has no chat template.
        """
        conversations: Sequence[Any] = messages
        if messages and isinstance(messages[0], Mapping):
            conversations = [messages]
        default = SamplingParams(max_tokens=None, **self.engine.limits.sampling_defaults)
        pending = []
        for turns, chosen in zip(conversations, _each(params, default, len(conversations)), strict=True):
            pending.append(self._request(None, encode_chat(self.tokenizer, turns), chosen))
        return self._run(pending)

    def stats(self) -> dict[str, Any]:
        """The engine's figures: slots, pages, running, waiting, tokens so far."""
        return self.engine.stats()

    def close(self) -> None:
        """Stops the engine; what still runs is aborted. Safe to call twice."""
        self.engine.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def _request(self, text: str | None, ids: Sequence[int], params: SamplingParams) -> _Pending:
        request_id = f"llm-{next(self._numbers)}"
        return _Pending(text, check_request(request_id, ids, params, self.engine.limits, time.monotonic()))

    def _run(self, pending: Sequence[_Pending]) -> list[RequestOutput]:
        """Submits all, sleeps until all have ended, and aborts what is left if interrupted."""
        waiting = _Countdown(sum(len(one.result.outputs) for one in pending))
        try:
            for one in pending:
                self.engine.submit(one.request, one.sink(waiting))
            while not waiting.done.wait(WATCH_SECONDS):
                if not self.engine.healthy:
                    raise RuntimeError(f"the engine failed: {self.engine.failure}")
            if waiting.error is not None:
                raise RuntimeError(waiting.error)
        finally:
            for one in pending:
                if any(output.finish_reason is None for output in one.result.outputs):
                    self.engine.abort(one.request.request_id)
        return [one.result for one in pending]


class _Countdown:
    """How many sequences are still to end. Counted on the engine's thread, waited for on the caller's."""

    def __init__(self, sequences: int) -> None:
        self.left = sequences
        self.error: str | None = None
        self.done = threading.Event()
        if not sequences:
            self.done.set()

    def ended(self, error: str | None) -> None:
        self.left -= 1
        self.error = self.error or error
        if self.left == 0:
            self.done.set()


class _Pending:
    """A request and its result so far."""

    def __init__(self, text: str | None, request: Request) -> None:
        self.request = request
        self.result = RequestOutput(
            prompt=text,
            prompt_token_ids=request.prompt_token_ids.tolist(),
            outputs=[CompletionOutput(index) for index in range(request.params.n)],
        )
        self._texts: list[list[str]] = [[] for _ in self.result.outputs]

    def sink(self, waiting: _Countdown) -> Callable[[Output], None]:
        def put(output: Output) -> None:
            self._add(output)
            if output.finish_reason is not None:
                waiting.ended(output.error)

        return put

    def _add(self, output: Output) -> None:
        target = self.result.outputs[output.index]
        target.token_ids += output.token_ids
        self._texts[output.index].append(output.text)
        if output.logprobs is not None:
            target.logprobs = target.logprobs or []
            target.logprobs += map(_as_dict, output.logprobs)
        if output.prompt_logprobs is not None:
            self.result.prompt_logprobs = [
                None if entry is None else _as_dict(entry) for entry in output.prompt_logprobs
            ]
        if output.finish_reason is not None:
            target.text = "".join(self._texts[output.index])
            target.stop_reason = output.stop_reason
            target.finish_reason = output.finish_reason


def _as_dict(entry: TokenLogprob) -> Logprobs:
    """The alternatives, best first, and the token itself whether or not it is among them."""
    return {**dict(entry.top), entry.token_id: entry.logprob}


def _as_prompts(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    if isinstance(prompts, str):
        return [prompts]
    listed: list[Any] = list(prompts)
    if listed and not isinstance(listed[0], str | Sequence) and not hasattr(listed[0], "__len__"):
        return [listed]  # one prompt, as token ids
    return listed


def _each(
    params: SamplingParams | Sequence[SamplingParams] | None, default: SamplingParams, count: int
) -> Sequence[SamplingParams]:
    if params is None:
        params = default
    if isinstance(params, SamplingParams):
        return [params] * count
    if len(params) != count:
        raise RequestError(f"{len(params)} SamplingParams for {count} prompts", param="params")
    return params
