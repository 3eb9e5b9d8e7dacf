"""`/v1/chat/completions`: a conversation in, the assistant's next message out.

Source of the form: OpenAI's API reference, "Chat". Text content only; the model's own chat template turns
the messages into a prompt.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Annotated, Any, Literal

import pydantic
from starlette.requests import Request as HttpRequest
from starlette.types import ASGIApp

from jaxserve.engine.outputs import Output, TokenLogprob
from jaxserve.prompts import encode_chat, token_text
from jaxserve.protocols import EngineLike, TokenizerLike
from jaxserve.scheduler.types import RequestError, check_request
from jaxserve.server.api import results
from jaxserve.server.api.fields import Caller, SamplingFields, service_tier, take_known
from jaxserve.server.body import off_loop, parse_object, read_body, validate
from jaxserve.server.context import context_of
from jaxserve.server.errors import bad_request, from_request_error, json_response
from jaxserve.server.stream import EventStream, unless_client_leaves

# --- model ---------------------------------------------------------------------------------------------


class TextPart(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(strict=True, extra="forbid")

    type: Literal["text"]
    text: str


def _without_nulls(value: Any) -> Any:
    """A client that sends an answer back sends its empty members (`refusal`, `tool_calls`) too."""
    return (
        {name: part for name, part in value.items() if part is not None} if isinstance(value, dict) else value
    )


def _as_parts(value: Any) -> Any:
    return [{"type": "text", "text": value}] if isinstance(value, str) else value


class Message(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(strict=True, extra="forbid")

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[list[TextPart], pydantic.BeforeValidator(_as_parts)]
    name: str | None = None

    def for_template(self) -> dict[str, str]:
        """What templates know: `developer` is OpenAI's later word for `system`; parts become lines."""
        role = "system" if self.role == "developer" else self.role
        message = {"role": role, "content": "\n".join(part.text for part in self.content)}
        if self.name is not None:
            message["name"] = self.name
        return message


class ChatRequest(SamplingFields):
    messages: list[Annotated[Message, pydantic.BeforeValidator(_without_nulls)]]
    max_completion_tokens: int | None = None
    logprobs: bool = False
    top_logprobs: int | None = None

    @property
    def token_limit(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def names(self) -> dict[str, str]:
        """What the client called the fields that the engine knows by another name."""
        names = {"prompt": "messages", "logprobs": "top_logprobs"}
        if self.max_completion_tokens is not None:
            names["max_tokens"] = "max_completion_tokens"
        return names


# --- route ---------------------------------------------------------------------------------------------


async def create_chat_completion(http: HttpRequest) -> ASGIApp:
    context = context_of(http)
    engine = context.holder.ready()
    data = await read_body(http.scope, http.receive, context.max_body_bytes)
    caller = context.caller(http)
    job = await off_loop(len(data), lambda: prepare(data, engine, context.holder.check_model, caller))
    call = context.bridge.open(engine, [job.request])
    if job.fields.stream:
        return EventStream(call, job.chunks, job.closing)
    [answer] = await unless_client_leaves(http.receive, results.collect(call, [job.request], job.usage))
    return json_response(job.answer(answer))


def prepare(data: bytes, engine: EngineLike, check_model: Callable[[str], None], caller: Caller) -> ChatJob:
    """Everything that can be wrong with a request is found here, before it is submitted."""
    fields = validate(ChatRequest, take_known(parse_object(data)))
    check_model(fields.model)
    fields.check_streaming()
    if fields.top_logprobs is not None and not fields.logprobs:
        raise bad_request("top_logprobs is only allowed with logprobs: true", param="top_logprobs")
    longest = fields.max_completion_tokens
    if longest is not None and fields.max_tokens not in (None, longest):
        raise bad_request(
            f"max_completion_tokens={longest} contradicts max_tokens={fields.max_tokens}",
            param="max_completion_tokens",
        )
    try:
        return ChatJob(fields, engine, caller)
    except RequestError as error:
        raise from_request_error(error, fields.names) from None


# --- translation ---------------------------------------------------------------------------------------


def encode_messages(tokenizer: TokenizerLike | None, messages: Sequence[Mapping[str, str]]) -> list[int]:
    """The prompt's token ids. Raises RequestError for a `name` that the template does not read.

    A template may read the names of some roles only, so each role is tried: under other names the prompt must
    be another one. Conversations without names, nearly all, are rendered once.
    """
    ids = encode_chat(tokenizer, messages)
    for role in sorted({message["role"] for message in messages if "name" in message}):
        others = [
            {**message, "name": f"x{message['name']}"}
            if message["role"] == role and "name" in message
            else message
            for message in messages
        ]
        if encode_chat(tokenizer, others) == ids:
            raise RequestError(
                f"messages: the model's chat template does not read the name of a {role} message;"
                " leave it out, or write it into the content",
                param="messages",
                code="unsupported_parameter",
            )
    return ids


class ChatJob:
    """A valid request: what to ask of the engine, and how to say what it answers."""

    def __init__(self, fields: ChatRequest, engine: EngineLike, caller: Caller) -> None:
        self.fields = fields
        self.tokenizer = engine.tokenizer
        now = time.monotonic()
        place = fields.place(caller, now)
        self.service_tier = service_tier(place["tier"])
        self.id = f"chatcmpl-{uuid.uuid4().hex}"
        self.created = int(time.time())
        params = fields.sampling(
            engine.limits.sampling_defaults,
            max_tokens=fields.token_limit,
            logprobs=(fields.top_logprobs or 0) if fields.logprobs else None,
            prompt_logprobs=fields.prompt_logprobs,
        )
        ids = encode_messages(self.tokenizer, [message.for_template() for message in fields.messages])
        self.request = check_request(self.id, ids, params, engine.limits, now, **place)
        self.usage = results.Usage([self.request])
        self._begun: set[int] = set()  # choices whose role was streamed

    def answer(self, answer: results.Answer) -> dict[str, Any]:
        """The whole reply at once."""
        body = {
            **self._head("chat.completion"),
            "choices": [
                {
                    "index": index,
                    "message": {"role": "assistant", "content": choice.text, "refusal": None},
                    "logprobs": self._logprobs(choice.logprobs),
                    "finish_reason": choice.finish_reason,
                }
                for index, choice in enumerate(answer.choices)
            ],
            "usage": self.usage.body(),
        }
        if self.fields.prompt_logprobs is not None:
            body["prompt_logprobs"] = results.prompt_logprobs_body(
                self.tokenizer, answer.prompt_logprobs, self.fields.prompt_logprobs
            )
        return body

    def chunks(self, prompt: int, output: Output) -> Iterable[dict[str, Any]]:
        """The chunks that an increment makes: a choice's first is preceded by its role."""
        self.usage.add(prompt, output)
        if output.index not in self._begun:
            self._begun.add(output.index)
            yield self._chunk(output.index, {"role": "assistant", "content": ""})
        # an increment may have no text: inside a character, or while a stop string may be coming
        delta = {"content": output.text} if output.text or output.finish_reason is None else {}
        yield self._chunk(output.index, delta, self._logprobs(output.logprobs or ()), output.finish_reason)

    def closing(self) -> Iterable[dict[str, Any]]:
        if self.fields.include_usage:
            yield {**self._head("chat.completion.chunk"), "choices": [], "usage": self.usage.body()}

    def _head(self, kind: str) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.fields.model,
            "service_tier": self.service_tier,
        }

    def _chunk(
        self,
        index: int,
        delta: dict[str, str],
        logprobs: dict[str, Any] | None = None,
        finish_reason: str | None = None,
    ) -> dict[str, Any]:
        chunk = {
            **self._head("chat.completion.chunk"),
            "choices": [
                {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish_reason}
            ],
        }
        if self.fields.include_usage:
            chunk["usage"] = None
        return chunk

    def _logprobs(self, entries: Sequence[TokenLogprob]) -> dict[str, Any] | None:
        if not self.fields.logprobs:
            return None
        return {
            "content": [
                {
                    **self._token(entry.token_id, entry.logprob),
                    "top_logprobs": [
                        self._token(token, logprob)
                        for token, logprob in entry.top[: self.fields.top_logprobs or 0]
                    ],
                }
                for entry in entries
            ],
            "refusal": None,
        }

    def _token(self, token: int, logprob: float) -> dict[str, Any]:
        spelled = None if self.tokenizer is None else list(self.tokenizer.token_bytes(token))
        return {
            "token": token_text(self.tokenizer, token),
            "logprob": results.finite(logprob),
            "bytes": spelled,
        }
