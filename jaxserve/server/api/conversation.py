"""OpenAI's chat messages and tools: their form, and what a chat template is given of them.

Source of the forms: OpenAI's API reference, "Chat"; that templates get a call's arguments as an object is
transformers' convention ("Tool use" in its documentation).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

import orjson
import pydantic
from pydantic_core import PydanticCustomError

from jaxserve.scheduler.types import RequestError
from jaxserve.server.api.structured import NAME
from jaxserve.server.body import AtMost, Strict, is_deep

MAX_MESSAGES = 4096
MAX_PARTS = 1024  # of one message
MAX_CALLS = 128  # likewise
MAX_TOOLS = 128  # OpenAI's own
MAX_NAME = 256  # characters of a participant's name


def _text_only(kind: Any) -> Any:
    if kind != "text":
        shown = repr(kind)[:32]
        raise PydanticCustomError(
            "unsupported", "only text is served: this must be 'text', not {kind}", {"kind": shown}
        )
    return kind


class TextPart(Strict):
    type: Annotated[str, pydantic.BeforeValidator(_text_only)]
    text: str


class CalledFunction(Strict):
    name: Annotated[str, pydantic.Field(min_length=1, max_length=MAX_NAME)]
    arguments: str = ""
    parsed_arguments: Any = None  # what openai's client makes of them, and sends back


class MessageToolCall(Strict):
    id: Annotated[str, pydantic.Field(max_length=MAX_NAME)] = ""
    type: Literal["function"] = "function"
    function: CalledFunction
    index: int | None = None  # clients that put a stream together leave it in


def _as_parts(value: Any) -> Any:
    return [{"type": "text", "text": value}] if isinstance(value, str) else value


class Message(Strict):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Annotated[
        list[TextPart] | None,
        pydantic.BeforeValidator(_as_parts, json_schema_input_type=str | list[TextPart] | None),
        AtMost(MAX_PARTS),
    ] = None
    name: Annotated[str, pydantic.Field(max_length=MAX_NAME)] | None = None
    tool_calls: Annotated[list[MessageToolCall], AtMost(MAX_CALLS)] | None = None
    tool_call_id: Annotated[str, pydantic.Field(max_length=MAX_NAME)] | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    refusal: str | None = None
    annotations: Annotated[list[Any], AtMost(0)] | None = None
    parsed: Any = None  # what openai's client makes of the content, and sends back


Messages = Annotated[list[Message], AtMost(MAX_MESSAGES)]


class FunctionDefinition(Strict):
    """strict: calls keep to the schema also where the model need not call anything."""

    name: Annotated[str, pydantic.Field(pattern=NAME)]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Strict):
    type: Literal["function"]
    function: FunctionDefinition

    def neutral(self) -> dict[str, Any]:
        function: dict[str, Any] = {"name": self.function.name}
        if self.function.description is not None:
            function["description"] = self.function.description
        # templates that spell the parameters out read them without asking whether there are any
        function["parameters"] = self.function.parameters or {"type": "object", "properties": {}}
        if self.function.strict is not None:
            function["strict"] = self.function.strict
        return {"type": "function", "function": function}


Tools = Annotated[list[Tool], AtMost(MAX_TOOLS)]

ONLY_FOR = {  # member -> the role that may have it
    "tool_calls": "assistant",
    "reasoning_content": "assistant",
    "reasoning": "assistant",
    "refusal": "assistant",
    "annotations": "assistant",
    "parsed": "assistant",
    "tool_call_id": "tool",
}


def neutral(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """The messages as `TurnRequest` has them. `developer` is OpenAI's later word for `system`; parts become
    lines. Raises RequestError naming the member at fault."""
    return [_neutral(f"messages[{number}]", message) for number, message in enumerate(messages)]


def _neutral(where: str, message: Message) -> dict[str, Any]:
    for member, role in ONLY_FOR.items():
        if member in message.model_fields_set and message.role != role:
            raise RequestError(
                f"unknown field: {where}.{member} (of a message of the role {message.role!r})",
                param=f"{where}.{member}",
                code="unknown_parameter",
            )
    content = message.refusal if message.content is None else "\n".join(part.text for part in message.content)
    if content is None and not message.tool_calls:
        raise RequestError(
            f"{where}.content is required", param=f"{where}.content", code="missing_required_parameter"
        )
    if message.role == "tool" and message.tool_call_id is None:
        raise RequestError(
            f"{where}.tool_call_id is required",
            param=f"{where}.tool_call_id",
            code="missing_required_parameter",
        )
    said: dict[str, Any] = {
        "role": "system" if message.role == "developer" else message.role,
        "content": content,
    }
    if message.name is not None:
        said["name"] = message.name
    if message.tool_call_id is not None:
        said["tool_call_id"] = message.tool_call_id
    reasoning = message.reasoning_content if message.reasoning is None else message.reasoning
    if reasoning is not None:
        said["reasoning_content"] = reasoning
    if message.tool_calls:
        said["tool_calls"] = [
            {
                "id": call.id,
                "type": "function",
                "function": {"name": call.function.name, "arguments": call.function.arguments},
            }
            for call in message.tool_calls
        ]
    return said


def for_template(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """`TurnRequest.messages` as templates read them: arguments are objects."""
    return [
        {**message, "tool_calls": [*map(_with_object, message["tool_calls"])]}
        if message.get("tool_calls")
        else dict(message)
        for message in messages
    ]


def _with_object(call: Mapping[str, Any]) -> dict[str, Any]:
    function = call["function"]
    return {**call, "function": {**function, "arguments": as_object(function["arguments"])}}


def as_object(arguments: str) -> dict[str, Any]:
    """The object that a call's arguments spell; where the model was cut short or erred, what Anthropic's
    clients send back for that ("Fine-grained tool streaming", handling invalid JSON)."""
    try:
        read = orjson.loads(arguments) if arguments.strip() else {}
    except orjson.JSONDecodeError:
        read = None
    return read if isinstance(read, dict) and not is_deep(read) else {"INVALID_JSON": arguments}


class NamedFunction(Strict):
    name: Annotated[str, pydantic.Field(pattern=NAME)]


class NamedTool(Strict):
    type: Literal["function"] = "function"
    function: NamedFunction


class AllowedTools(Strict):
    mode: Literal["auto", "required"]
    tools: Annotated[list[NamedTool], pydantic.Field(min_length=1), AtMost(MAX_TOOLS)]


class AllowedToolChoice(Strict):
    type: Literal["allowed_tools"]
    allowed_tools: AllowedTools


def _as_choice(value: Any) -> Any:
    """The model of its kind: pydantic's errors for a union would name every one of them."""
    if value in ("auto", "none", "required") and isinstance(value, str):
        return value
    if isinstance(value, dict):
        kind = AllowedToolChoice if value.get("type") == "allowed_tools" else NamedTool
        return kind.model_validate(value)
    raise PydanticCustomError(
        "choice", "must be 'auto', 'none', 'required' or an object that names a function"
    )


ToolChoice = Annotated[
    str | NamedTool | AllowedToolChoice,
    pydantic.BeforeValidator(
        _as_choice,
        json_schema_input_type=Literal["auto", "none", "required"] | NamedTool | AllowedToolChoice,
    ),
]
