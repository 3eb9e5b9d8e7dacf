"""The Python API: `LLM` loads a model and generates, in one process, without HTTP.

Building the engine is `build.py`'s work and running it the engine thread's; this module turns prompts into
requests and increments into results. The caller's thread sleeps until its last result is there, so it takes
no interpreter time from the engine's.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import itertools
import logging
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from jaxserve._leaves import check_leaves
from jaxserve.config import EngineOptions
from jaxserve.engine.outputs import EngineBusy, Output, TokenLogprob, mean_logprob, unit_length
from jaxserve.prompts import encode_chat, encode_text, tier_of
from jaxserve.protocols import EngineLike, TokenizerLike
from jaxserve.scheduler.types import Finish, Pooling, Request, RequestError, SamplingParams, check_request

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
    cumulative_logprob: of all its tokens, where it is the best of more than were asked for.
    """

    index: int
    text: str = ""
    token_ids: list[int] = dataclasses.field(default_factory=list)
    logprobs: list[Logprobs] | None = None
    finish_reason: Finish | None = None
    stop_reason: str | int | None = None
    cumulative_logprob: float | None = None


@dataclasses.dataclass(slots=True)
class RequestOutput:
    """A prompt and its continuations, `n` of them; with `best_of` the likeliest per token, best first.

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
        check_leaves()
        engine_options = EngineOptions(**options)
        from jaxserve.build import build_serving  # imports jax, which takes a second

        self._numbers = itertools.count()
        self.engine: EngineLike = build_serving(model, engine_options, progress=progress or log.info)
        self.engine.start()

    @property
    def tokenizer(self) -> TokenizerLike | None:
        return self.engine.tokenizer

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        service_tier: str = "default",
        priority: int = 0,
    ) -> list[RequestOutput]:
        """Continues each prompt; results in the prompts' order.

        prompts: a text, token ids, or a list of either. params: for all prompts, or one for each; None takes
        the model's own defaults. service_tier: `flex` lets what other threads ask for go before, and take
        back slots and pages. priority: within a tier, lower runs first.
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
            pending.append(self._request(text, ids, chosen, service_tier, priority))
        return self._run(pending)

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        service_tier: str = "default",
        priority: int = 0,
    ) -> list[RequestOutput]:
        """The assistant's next message in a conversation, or in each of a list of conversations.

        messages: dicts with `role` and `content`. params: as in `generate`; the default is what is left of
        the context. The rest is as in `generate`. Raises as it does, also where there is no chat template.
        """
        conversations: Sequence[Any] = messages
        if messages and isinstance(messages[0], Mapping):
            conversations = [messages]
        default = SamplingParams(max_tokens=None, **self.engine.limits.sampling_defaults)
        pending = []
        for turns, chosen in zip(conversations, _each(params, default, len(conversations)), strict=True):
            ids = encode_chat(self.tokenizer, turns)
            pending.append(self._request(None, ids, chosen, service_tier, priority))
        return self._run(pending)

    def embed(
        self,
        texts: Prompt | Sequence[Prompt],
        *,
        pooling: str | None = None,
        service_tier: str = "default",
        priority: int = 0,
    ) -> NDArray[np.float32]:
        """f32[texts, D]: a vector of length 1 for each text, in their order.

        texts: a text, token ids, or a list of either. pooling: `last` takes the last token's hidden state,
        `mean` that of all tokens; None takes what the model's folder says, else `last`. The rest, and what
        it raises, is as in `generate`.
        """
        chosen = pooling or self.engine.facts["embedding_pooling"]
        if chosen not in list(Pooling):
            raise RequestError(f"{pooling=} must be one of {', '.join(Pooling)}", param="pooling")
        params = SamplingParams(max_tokens=0)
        pending = []
        for prompt in _as_prompts(texts):
            text = prompt if isinstance(prompt, str) else None
            ids = encode_text(self.tokenizer, prompt) if isinstance(prompt, str) else prompt
            pending.append(self._request(text, ids, params, service_tier, priority, Pooling(chosen)))
        self._run(pending)
        vectors = [unit_length(one.embedding) for one in pending if one.embedding is not None]
        none = np.zeros((0, self.engine.facts["embedding_size"]), np.float32)
        return np.stack(vectors) if vectors else none

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

    def _request(
        self,
        text: str | None,
        ids: Sequence[int],
        params: SamplingParams,
        service_tier: str,
        priority: int,
        pooling: Pooling | None = None,
    ) -> _Pending:
        wanted = params.structured_outputs
        request = check_request(
            f"llm-{next(self._numbers)}",
            ids,
            params,
            self.engine.limits,
            time.monotonic(),
            tier=tier_of(service_tier),
            priority=priority,
            grammar=None if wanted is None else self.engine.compile_grammar(wanted),
            pooling=pooling,
        )
        return _Pending(text, request)

    def _run(self, pending: Sequence[_Pending]) -> list[RequestOutput]:
        """Submits all, sleeps until all have ended, and aborts what is left if interrupted.

        What the engine's queue does not hold is submitted when something ended and there is room again.
        """
        waiting = _Countdown(sum(len(one.result.outputs) for one in pending))
        unsent = collections.deque(pending)
        try:
            while waiting.left:
                before = waiting.left
                with contextlib.suppress(EngineBusy):
                    while unsent:
                        self.engine.submit((unsent[0].request, unsent[0].sink(waiting)))
                        unsent.popleft()
                waiting.wait_below(before if unsent else 1)
                if waiting.error is not None:
                    raise RuntimeError(waiting.error)
                if waiting.left and not self.engine.healthy:
                    raise RuntimeError(f"the engine failed: {self.engine.failure}")
        finally:
            for one in pending:
                if any(output.finish_reason is None for output in one.result.outputs):
                    self.engine.abort(one.request.request_id)
        return [one.best() for one in pending]


class _Countdown:
    """How many sequences are still to end. Counted on the engine's threads, waited for on the caller's."""

    def __init__(self, sequences: int) -> None:
        self.left = sequences
        self.error: str | None = None
        self._bound = 0
        self._changed = threading.Condition()

    def ended(self, error: str | None) -> None:
        with self._changed:
            self.left -= 1
            self.error = self.error or error
            if self.left < self._bound or error is not None:
                self._changed.notify()

    def wait_below(self, bound: int) -> None:
        """Sleeps until less than `bound` are left, or one has failed; WATCH_SECONDS at most."""
        with self._changed:
            self._bound = bound
            self._changed.wait_for(lambda: self.left < bound or self.error is not None, WATCH_SECONDS)


class _Pending:
    """A request and its result so far."""

    def __init__(self, text: str | None, request: Request) -> None:
        self.request = request
        self.result = RequestOutput(
            prompt=text,
            prompt_token_ids=request.prompt_token_ids.tolist(),
            outputs=[CompletionOutput(index) for index in range(request.params.sequences)],
        )
        self.embedding: NDArray[np.float32] | None = None
        self._texts: list[list[str]] = [[] for _ in self.result.outputs]

    def sink(self, waiting: _Countdown) -> Callable[[Output], None]:
        def put(output: Output) -> None:
            self._add(output)
            if output.finish_reason is not None:
                waiting.ended(output.error)

        return put

    def best(self) -> RequestOutput:
        """The result, once every sequence has ended: of more than `n` the likeliest, numbered anew."""
        outputs, n = self.result.outputs, self.request.params.n
        if n < len(outputs):
            outputs.sort(key=lambda one: -mean_logprob(one.cumulative_logprob, len(one.token_ids)))
            del outputs[n:]
            for index, output in enumerate(outputs):
                output.index = index
        return self.result

    def _add(self, output: Output) -> None:
        target = self.result.outputs[output.index]
        target.token_ids += output.token_ids
        self._texts[output.index].append(output.text)
        if output.logprobs is not None:
            target.logprobs = target.logprobs or []
            target.logprobs += map(_as_dict, output.logprobs)
        self.embedding = output.embedding
        if output.prompt_logprobs is not None:
            self.result.prompt_logprobs = [
                None if entry is None else _as_dict(entry) for entry in output.prompt_logprobs
            ]
        if output.finish_reason is not None:
            target.text = "".join(self._texts[output.index])
            target.stop_reason = output.stop_reason
            target.cumulative_logprob = output.cumulative_logprob
            target.finish_reason = output.finish_reason


def _as_dict(entry: TokenLogprob) -> Logprobs:
    """The alternatives, best first, and the token itself whether or not it is among them."""
    return {**dict(entry.top), entry.token_id: entry.logprob}


def _as_prompts(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    if isinstance(prompts, str):
        return [prompts]
    if isinstance(prompts, bytes | Mapping) or not isinstance(prompts, Iterable):
        raise RequestError(
            f"prompts must be a text, token ids, or a list of either, not {type(prompts).__name__}",
            param="prompts",
        )
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
