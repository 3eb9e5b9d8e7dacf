"""`/v1/completions`: text in, text out.

Source of the form: OpenAI's API reference, "Completions (legacy)". A prompt is text, token ids, or a list
of either; choices are numbered prompt by prompt, `n` for each.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Annotated, Any

import pydantic
from starlette.requests import Request as HttpRequest
from starlette.types import ASGIApp

from jaxserve.engine.outputs import Output, TokenLogprob
from jaxserve.prompts import encode_text, token_text
from jaxserve.protocols import EngineLike
from jaxserve.scheduler.types import Request, RequestError, check_request
from jaxserve.server.api import results
from jaxserve.server.api.fields import (
    MAX_SEQUENCES,
    TEXTS_OR_TOKENS,
    Caller,
    SamplingFields,
    service_tier,
    take_known,
)
from jaxserve.server.api.job import prepared
from jaxserve.server.api.structured import StructuredFields, compiled
from jaxserve.server.body import read_body, validate
from jaxserve.server.context import context_of
from jaxserve.server.errors import bad_request, from_request_error, json_response
from jaxserve.server.stream import EventStream, unless_client_leaves

DEFAULT_MAX_TOKENS = 16


# --- model ---------------------------------------------------------------------------------------------


class CompletionRequest(SamplingFields, StructuredFields):
    # checked by `split_prompts`: pydantic's errors for a union of four forms name none of them
    prompt: Annotated[Any, pydantic.WithJsonSchema(TEXTS_OR_TOKENS)]
    echo: bool = False
    logprobs: int | None = None
    best_of: int | None = None
    add_special_tokens: bool = True
    return_token_ids: bool = False
    return_tokens_as_token_ids: bool = False

    def check_streaming(self) -> None:
        super().check_streaming()
        if self.stream and self.best_of not in (None, self.n):
            raise bad_request("best_of other than n is not available with stream: true", param="best_of")


def split_prompts(prompt: Any) -> list[str | list[int]]:
    """The prompts, each a text or token ids. Raises RequestError."""
    if isinstance(prompt, str):
        return [prompt]
    if not isinstance(prompt, list):
        raise RequestError("prompt must be a string, token ids, or a list of either", param="prompt")
    if not prompt:
        raise RequestError("the prompt is empty: it must hold at least one token", param="prompt")
    if not isinstance(prompt[0], str | list):
        return [_token_ids(prompt)]
    if len(prompt) > MAX_SEQUENCES:
        raise RequestError(f"prompt has {len(prompt)} prompts; at most {MAX_SEQUENCES}", param="prompt")
    if all(isinstance(part, str) for part in prompt):
        return list(prompt)
    if all(isinstance(part, list) for part in prompt):
        return [_token_ids(part) for part in prompt]
    raise RequestError("prompt mixes strings and token ids", param="prompt")


def _token_ids(ids: list[Any]) -> list[int]:
    if not all(type(token) is int for token in ids):  # not isinstance: True is no token id
        raise RequestError("prompt: token ids must be integers of at most 64 bits", param="prompt")
    return ids


# --- route ---------------------------------------------------------------------------------------------


async def create_completion(http: HttpRequest) -> ASGIApp:
    context = context_of(http)
    engine = context.holder.ready()
    data = await read_body(http.scope, http.receive, context.max_body_bytes)
    caller = context.caller(http)
    job = await prepared(data, prepare, engine, context.holder.check_model, caller)
    call = context.bridge.open(engine, job.requests)
    if job.stream:
        return EventStream(call, job.chunks, job.closing)
    answers = await unless_client_leaves(http.receive, results.collect(call, job.requests, job.usage))
    return json_response(job.answer(answers))


def prepare(
    body: Mapping[str, Any], engine: EngineLike, check_model: Callable[[str], None], caller: Caller
) -> CompletionJob:
    """Everything that can be wrong with a request is found here, before any of it is submitted."""
    fields = validate(CompletionRequest, take_known(body, CompletionRequest))
    check_model(fields.model)
    fields.check_streaming()
    try:
        return CompletionJob(fields, engine, caller)
    except RequestError as error:
        raise from_request_error(error) from None


# --- translation ---------------------------------------------------------------------------------------


class CompletionJob:
    """A valid request: what to ask of the engine, and how to say what it answers."""

    def __init__(self, fields: CompletionRequest, engine: EngineLike, caller: Caller) -> None:
        self.fields = fields
        self.stream = fields.stream
        self.tokenizer = engine.tokenizer
        now = time.monotonic()
        place = fields.place(caller, now)
        self.head = {
            "id": caller.new_id("cmpl-"),
            "object": "text_completion",
            "created": caller.now(),
            "model": fields.model,
            "service_tier": service_tier(place["tier"]),
        }
        prompts = split_prompts(fields.prompt)
        wanted = fields.wanted()
        params = fields.sampling(
            engine.limits.sampling_defaults,
            max_tokens=DEFAULT_MAX_TOKENS if fields.max_tokens is None else fields.max_tokens,
            logprobs=fields.logprobs,
            prompt_logprobs=self._prompt_logprobs(),
            best_of=fields.best_of,
            structured=None if wanted is None else wanted.outputs,
        )
        if len(prompts) * params.sequences > MAX_SEQUENCES:
            name = "n" if params.sequences == params.n else "best_of"
            raise RequestError(
                f"{len(prompts)} prompts times {name}={params.sequences}"
                f" are more than {MAX_SEQUENCES} sequences",
                param=name,
            )
        grammar = None if wanted is None else compiled(engine, *wanted)
        self.requests: list[Request] = []
        for number, prompt in enumerate(prompts):
            ids = prompt
            if isinstance(ids, str):
                context = engine.limits.max_model_len if fields.truncate_prompt_tokens is None else None
                special = fields.add_special_tokens
                ids = encode_text(self.tokenizer, ids, add_special_tokens=special, context=context)
            ids = fields.truncated(ids)
            request_id = f"{self.head['id']}-{number}"
            self.requests.append(
                check_request(request_id, ids, params, engine.limits, now, grammar=grammar, **place)
            )
        self.usage = results.Usage(self.requests)
        self._echo = [self._echoed(*one) for one in enumerate(prompts)] if fields.echo else None
        self._begun: set[int] = set()  # choices that have had a chunk
        self._offsets: dict[int, int] = {}  # choice -> where its next token's text begins
        self._prompt_entries: dict[int, Sequence[TokenLogprob | None]] = {}
        self._held: dict[int, list[Output]] = {}  # prompt -> increments that came before its echo's logprobs

    def _prompt_logprobs(self) -> int | None:
        """What `echo` needs of the prompt, over what was asked for."""
        fields = self.fields
        if not fields.echo:
            return fields.prompt_logprobs
        needed = fields.logprobs
        if needed is None and fields.max_tokens == 0:
            needed = 0  # nothing is generated: the engine still needs something to do
        asked = [count for count in (needed, fields.prompt_logprobs) if count is not None]
        return max(asked, default=None)

    def _echoed(self, number: int, prompt: str | list[int]) -> str:
        if isinstance(prompt, str) and self.fields.truncate_prompt_tokens is None:
            return prompt
        if self.tokenizer is None:
            return ""
        ids = self.requests[number].prompt_token_ids.tolist()
        return self.tokenizer.decode(ids, skip_special_tokens=self.fields.skip_special_tokens)

    def answer(self, answers: Sequence[results.Answer]) -> dict[str, Any]:
        """The whole reply at once."""
        body = []
        for prompt, answer in enumerate(answers):
            entries = answer.prompt_logprobs
            for index, choice in enumerate(answer.choices):
                number = prompt * self.fields.n + index
                echo = self._echo[prompt] if self._echo is not None else ""
                item = {
                    "index": number,
                    "text": echo + choice.text + self._stop_text(choice.stop_reason),
                    "logprobs": self._logprobs(number, entries if self._echo else (), choice.logprobs),
                    "finish_reason": choice.finish_reason,
                    "stop_reason": choice.stop_reason,
                }
                if self.fields.return_token_ids:
                    item["prompt_token_ids"] = self.requests[prompt].prompt_token_ids.tolist()
                    item["token_ids"] = choice.token_ids
                if self.fields.prompt_logprobs is not None:
                    item["prompt_logprobs"] = results.prompt_logprobs_body(
                        self.tokenizer, entries, self.fields.prompt_logprobs
                    )
                body.append(item)
        return {**self.head, "choices": body, "usage": self.usage.body()}

    def chunks(self, prompt: int, output: Output) -> Iterable[dict[str, Any]]:
        """The chunks that an increment makes. With echo and logprobs, a prompt's sequences wait for the
        prompt's own, which come with index 0."""
        if self._echo is not None and self.fields.logprobs is not None and prompt not in self._prompt_entries:
            if output.prompt_logprobs is None:
                self._held.setdefault(prompt, []).append(output)
                return
            self._prompt_entries[prompt] = output.prompt_logprobs
        yield self._chunk(prompt, output)
        for held in self._held.pop(prompt, ()):
            yield self._chunk(prompt, held)

    def _chunk(self, prompt: int, output: Output) -> dict[str, Any]:
        number = prompt * self.fields.n + output.index
        self.usage.add(prompt, output)
        text = output.text + self._stop_text(output.stop_reason)
        entries: Sequence[TokenLogprob | None] = ()
        if self._echo is not None and number not in self._begun:
            text = self._echo[prompt] + text
            entries = self._prompt_entries.get(prompt, ())
        choice = {
            "index": number,
            "text": text,
            "logprobs": self._logprobs(number, entries, output.logprobs or ()),
            "finish_reason": output.finish_reason,
            "stop_reason": output.stop_reason,
        }
        if self.fields.return_token_ids:
            if number not in self._begun:
                choice["prompt_token_ids"] = self.requests[prompt].prompt_token_ids.tolist()
            choice["token_ids"] = output.token_ids
        self._begun.add(number)
        chunk = {**self.head, "choices": [choice]}
        if self.fields.continuous_usage:
            chunk["usage"] = self.usage.body()
        elif self.fields.include_usage:
            chunk["usage"] = None
        return chunk

    def closing(self) -> Iterable[dict[str, Any]]:
        if self.fields.include_usage:
            yield {**self.head, "choices": [], "usage": self.usage.body()}

    def _stop_text(self, stop_reason: str | int | None) -> str:
        """What `include_stop_str_in_output` adds to the text."""
        wanted = self.fields.include_stop_str_in_output and isinstance(stop_reason, str)
        return str(stop_reason) if wanted else ""

    def _logprobs(
        self, number: int, prompt: Sequence[TokenLogprob | None], generated: Sequence[TokenLogprob]
    ) -> dict[str, Any] | None:
        """The completions form, for the prompt's entries (with echo) and the generated ones after them."""
        if self.fields.logprobs is None:
            return None
        body: dict[str, list[Any]] = {
            "tokens": [],
            "token_logprobs": [],
            "top_logprobs": [],
            "text_offset": [],
        }
        if prompt:
            first = int(self.requests[number // self.fields.n].prompt_token_ids[0])
            prompt_ids = [first if entry is None else entry.token_id for entry in prompt]
        else:
            prompt_ids = []
        offset = self._offsets.get(number, 0)
        ids = [*prompt_ids, *(entry.token_id for entry in generated)]
        for token, entry in zip(ids, [*prompt, *generated], strict=True):
            text = token_text(self.tokenizer, token)
            body["tokens"].append(self._name(token))
            body["text_offset"].append(offset)
            offset += self._width(token, text)
            body["token_logprobs"].append(None if entry is None else results.finite(entry.logprob))
            body["top_logprobs"].append(None if entry is None else self._top(entry))
        self._offsets[number] = offset
        return body

    def _width(self, token: int, text: str) -> int:
        """Characters that a token adds to the reply's text; a special token that is skipped adds none."""
        if self.tokenizer is None:
            return 0
        hidden = self.fields.skip_special_tokens and not self.tokenizer.decode([token])
        return 0 if hidden else len(text)

    def _name(self, token: int) -> str:
        return results.token_name(self.tokenizer, token, as_id=self.fields.return_tokens_as_token_ids)

    def _top(self, entry: TokenLogprob) -> dict[str, float]:
        """Text -> logprob of the likeliest tokens and of the token itself; of two with one text, the
        likelier."""
        top: dict[str, float] = {}
        for token, logprob in (*entry.top[: self.fields.logprobs], (entry.token_id, entry.logprob)):
            top.setdefault(self._name(token), results.finite(logprob))
        return top
