"""`/v1/chat/completions`: a conversation in, the assistant's next message out.

Source of the form: OpenAI's API reference, "Chat", and vLLM's documentation, "Chat API", for what goes beyond
it. Text content only; the model's own chat template turns the messages into a prompt.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Annotated, Any, Literal

import pydantic
from starlette.requests import Request as HttpRequest
from starlette.types import ASGIApp

from jaxserve.engine.outputs import Output, TokenLogprob
from jaxserve.protocols import EngineLike
from jaxserve.scheduler.types import RequestError
from jaxserve.server.api import results
from jaxserve.server.api.conversation import (
    AllowedToolChoice,
    Messages,
    NamedTool,
    ToolChoice,
    Tools,
    neutral,
)
from jaxserve.server.api.fields import Caller, SamplingFields, take_known
from jaxserve.server.api.job import prepared
from jaxserve.server.api.structured import StructuredFields
from jaxserve.server.api.turn import (
    CallArguments,
    CallBegin,
    End,
    Reasoning,
    Text,
    Turn,
    TurnChoice,
    TurnRequest,
)
from jaxserve.server.body import AtMost, read_body, validate
from jaxserve.server.context import context_of
from jaxserve.server.errors import bad_request, from_request_error, json_response
from jaxserve.server.stream import EventStream, unless_client_leaves

MAX_DOCUMENTS, MAX_DOCUMENT_MEMBERS = 256, 64

# --- model ---------------------------------------------------------------------------------------------


class ChatRequest(SamplingFields, StructuredFields):
    messages: Messages
    max_completion_tokens: int | None = None
    logprobs: bool = False
    top_logprobs: int | None = None

    tools: Tools = pydantic.Field(default_factory=list)
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool = True

    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = None
    include_reasoning: bool = True
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    chat_template_kwargs: dict[str, Any] = pydantic.Field(default_factory=dict)
    documents: (
        Annotated[list[Annotated[dict[str, str], AtMost(MAX_DOCUMENT_MEMBERS)]], AtMost(MAX_DOCUMENTS)] | None
    ) = None

    return_token_ids: bool = False
    return_tokens_as_token_ids: bool = False

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

    def asked(self) -> TurnRequest:
        """Raises RequestError naming the field."""
        asked_for_both = self.add_generation_prompt and "add_generation_prompt" in self.model_fields_set
        if self.continue_final_message and asked_for_both:
            raise RequestError(
                "continue_final_message goes on with a message, add_generation_prompt begins one",
                param="continue_final_message",
            )
        wanted = self.wanted()
        tools = [tool.neutral() for tool in self.tools]
        choice: str | dict[str, str] = "auto"
        if isinstance(self.tool_choice, NamedTool):
            choice = {"name": self.tool_choice.function.name}
        elif isinstance(self.tool_choice, AllowedToolChoice):
            choice = self.tool_choice.allowed_tools.mode
            allowed = {one.function.name for one in self.tool_choice.allowed_tools.tools}
            if missing := allowed - {tool.function.name for tool in self.tools}:
                raise RequestError(f"tool_choice: there is no tool {min(missing)!r}", param="tool_choice")
            tools = [tool for tool in tools if tool["function"]["name"] in allowed]
        elif self.tool_choice is not None:
            choice = self.tool_choice
        template: dict[str, Any] = dict(self.chat_template_kwargs)
        for name in ("reasoning_effort", "documents"):
            if getattr(self, name) is None:
                continue
            if name in template:
                raise RequestError(f"{name} is in chat_template_kwargs too", param=name)
            template[name] = getattr(self, name)
        return TurnRequest(
            messages=neutral(self.messages),
            sampling=self,
            max_tokens=self.token_limit,
            logprobs=(self.top_logprobs or 0) if self.logprobs else None,
            prompt_logprobs=self.prompt_logprobs,
            tools=tools,
            tool_choice=choice,  # type: ignore[arg-type]  # checked by `_as_choice`
            parallel_tool_calls=self.parallel_tool_calls,
            structured=None if wanted is None else wanted.outputs,
            template=template,
            add_generation_prompt=self.add_generation_prompt and not self.continue_final_message,
            continue_final_message=self.continue_final_message,
            names={**self.names, **({} if wanted is None else {"structured_outputs": wanted.param})},
        )


# --- route ---------------------------------------------------------------------------------------------


async def create_chat_completion(http: HttpRequest) -> ASGIApp:
    context = context_of(http)
    engine = context.holder.ready()
    data = await read_body(http.scope, http.receive, context.max_body_bytes)
    caller = context.caller(http)
    # templates and grammars take what they take, however short the body
    job = await prepared(data, prepare, engine, context.holder.check_model, caller, always_on_thread=True)
    call = context.bridge.open(engine, job.requests)
    if job.stream:
        return EventStream(call, job.chunks, job.closing)
    answers = await unless_client_leaves(http.receive, results.collect(call, job.requests, job.usage))
    return json_response(job.answer(answers))


def prepare(
    body: Mapping[str, Any], engine: EngineLike, check_model: Callable[[str], None], caller: Caller
) -> ChatJob:
    """Everything that can be wrong with a request is found here, before it is submitted."""
    fields = validate(ChatRequest, take_known(body, ChatRequest))
    check_model(fields.model)
    fields.check_streaming()
    if fields.top_logprobs and not fields.logprobs:  # 0 asks for nothing
        raise bad_request("top_logprobs is only allowed with logprobs: true", param="top_logprobs")
    longest = fields.max_completion_tokens
    if longest is not None and fields.max_tokens not in (None, longest):
        raise bad_request(
            f"max_completion_tokens={longest} contradicts max_tokens={fields.max_tokens}",
            param="max_completion_tokens",
        )
    try:
        asked = fields.asked()
    except RequestError as error:
        raise from_request_error(error, fields.names) from None
    return ChatJob(fields, Turn(asked, engine, caller, prefix="chatcmpl-"))


# --- translation ---------------------------------------------------------------------------------------


class ChatJob:
    """A valid request: what to ask of the engine, and how to say what it answers."""

    def __init__(self, fields: ChatRequest, turn: Turn) -> None:
        self.fields = fields
        self.turn = turn
        self.requests = [turn.request]
        self.usage = turn.usage
        self.stream = fields.stream
        self._begun: set[int] = set()  # choices whose role was streamed

    def answer(self, answers: Sequence[results.Answer]) -> dict[str, Any]:
        """The whole reply at once."""
        [answer] = answers
        choices = [self.turn.read(index, choice) for index, choice in enumerate(answer.choices)]
        body = {
            **self._head("chat.completion"),
            "choices": [self._choice(index, choice) for index, choice in enumerate(choices)],
            "usage": self.usage.body(),
        }
        if self.fields.prompt_logprobs is not None:
            body["prompt_logprobs"] = results.prompt_logprobs_body(
                self.turn.tokenizer, answer.prompt_logprobs, self.fields.prompt_logprobs
            )
        if self.fields.return_token_ids:
            body["prompt_token_ids"] = self.turn.request.prompt_token_ids.tolist()
        return body

    def _choice(self, index: int, choice: TurnChoice) -> dict[str, Any]:
        message: dict[str, Any] = {"role": "assistant", "content": choice.text, "refusal": None}
        if choice.calls:
            message["tool_calls"] = [
                {
                    "id": call.id,
                    "type": "function",
                    "function": {"name": call.name, "arguments": call.arguments},
                }
                for call in choice.calls
            ]
        if choice.reasoning is not None and self.fields.include_reasoning:
            message |= _reasoning(choice.reasoning)
        body = {
            "index": index,
            "message": message,
            "logprobs": self._logprobs(choice.logprobs),
            "finish_reason": choice.finish_reason,
            "stop_reason": choice.stop_reason,
        }
        if self.fields.return_token_ids:
            body["token_ids"] = choice.token_ids
        return body

    def chunks(self, prompt: int, output: Output) -> Iterable[dict[str, Any]]:
        """The chunks that an increment makes: a choice's first is preceded by its role. None, where it has
        no text yet: inside a character, or while a stop string or a tool's call may be coming."""
        events = self.turn.events(output)
        if output.index not in self._begun:
            self._begun.add(output.index)
            first = self._chunk(output.index, {"role": "assistant", "content": ""})
            if self.fields.return_token_ids:
                first["prompt_token_ids"] = self.turn.request.prompt_token_ids.tolist()
            yield first
        delta, logprobs, end = self._delta(events)
        if delta or logprobs or end is not None or self.fields.return_token_ids:
            chunk = self._chunk(output.index, delta, self._logprobs(logprobs))
            [choice] = chunk["choices"]
            if end is not None:
                choice["finish_reason"], choice["stop_reason"] = end.finish_reason, end.stop_reason
            if self.fields.return_token_ids:
                choice["token_ids"] = output.token_ids
            yield chunk

    def _delta(self, events: Sequence[Any]) -> tuple[dict[str, Any], Sequence[TokenLogprob], End | None]:
        """What an increment's events come to in OpenAI's form."""
        content, reasoning = "", ""
        calls: dict[int, dict[str, Any]] = {}
        logprobs: Sequence[TokenLogprob] = ()
        end = None
        for event in events:
            match event:
                case Text():
                    content += event.text
                    logprobs = event.logprobs or logprobs
                case Reasoning():
                    reasoning += event.text
                case CallBegin():
                    calls[event.call] = {
                        "index": event.call,
                        "id": event.id,
                        "type": "function",
                        "function": {"name": event.name, "arguments": ""},
                    }
                case CallArguments():
                    call = calls.setdefault(event.call, {"index": event.call, "function": {"arguments": ""}})
                    call["function"]["arguments"] += event.delta
                case End():
                    end = event
        delta: dict[str, Any] = {}
        if reasoning and self.fields.include_reasoning:
            delta |= _reasoning(reasoning)
        if content:
            delta["content"] = content
        if calls:
            delta["tool_calls"] = list(calls.values())
        return delta, logprobs, end

    def closing(self) -> Iterable[dict[str, Any]]:
        if self.fields.include_usage:
            yield {**self._head("chat.completion.chunk"), "choices": [], "usage": self.usage.body()}

    def _head(self, kind: str) -> dict[str, Any]:
        return {
            "id": self.turn.id,
            "object": kind,
            "created": self.turn.created,
            "model": self.fields.model,
            "service_tier": self.turn.service_tier,
        }

    def _chunk(
        self, index: int, delta: dict[str, Any], logprobs: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        chunk = {
            **self._head("chat.completion.chunk"),
            "choices": [{"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": None}],
        }
        if self.fields.continuous_usage:
            chunk["usage"] = self.usage.body()
        elif self.fields.include_usage:
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
        tokenizer = self.turn.tokenizer
        spelled = None if tokenizer is None else list(tokenizer.token_bytes(token))
        return {
            "token": results.token_name(tokenizer, token, as_id=self.fields.return_tokens_as_token_ids),
            "logprob": results.finite(logprob),
            "bytes": spelled,
        }


def _reasoning(text: str) -> dict[str, str]:
    """Under both names that clients read: DeepSeek's (LangChain, litellm) and vLLM's of today."""
    return {"reasoning_content": text, "reasoning": text}
