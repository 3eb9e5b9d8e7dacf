"""What a client asks of `/v1/responses`, and the turn that it comes to.

Source of the form: OpenAI's API reference, "Responses". Input is text: as a string, or as items (messages,
calls of functions, their results, reasoning). Tools are the client's own functions; nothing runs here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

import pydantic
from pydantic_core import PydanticCustomError

from jaxserve.scheduler.types import RequestError, StructuredOutputs
from jaxserve.server.api.conversation import MAX_MESSAGES, MAX_NAME, MAX_PARTS, MAX_TOOLS
from jaxserve.server.api.fields import PlaceFields, SamplingFields, Stop
from jaxserve.server.api.structured import NAME
from jaxserve.server.api.turn_prompt import TurnRequest
from jaxserve.server.body import AtMost, Strict

LOGPROBS = "message.output_text.logprobs"  # of `include`


# --- items ---------------------------------------------------------------------------------------------


def _parts(value: Any) -> Any:
    return [{"type": "input_text", "text": value}] if isinstance(value, str) else value


def _refused(value: Any) -> Any:
    raise PydanticCustomError("unsupported", "is not supported")


Refused = Annotated[None, pydantic.BeforeValidator(_refused)]  # known, and nothing that is done here


class Part(Strict):
    """A piece of text. `annotations` and `logprobs` are what a reply's part came with."""

    type: str
    text: str | None = None
    refusal: str | None = None
    annotations: Annotated[list[Any], AtMost(MAX_PARTS)] | None = None
    logprobs: list[Any] | None = None

    @pydantic.field_validator("type")
    @classmethod
    def _text_only(cls, kind: str) -> str:
        if kind not in ("input_text", "output_text", "refusal", "reasoning_text", "summary_text"):
            shown = repr(kind[:32])
            raise PydanticCustomError(
                "unsupported", "only text is served: this must be 'input_text', not {kind}", {"kind": shown}
            )
        return kind

    @pydantic.model_validator(mode="after")
    def _one(self) -> Part:
        name = "refusal" if self.type == "refusal" else "text"
        if getattr(self, name) is None or (self.text is not None and self.refusal is not None):
            raise PydanticCustomError(
                "part", "a part of this type has a {name}, and no other", {"name": name}
            )
        return self

    @property
    def words(self) -> str:
        return self.text or self.refusal or ""


Parts = Annotated[
    list[Part],
    pydantic.BeforeValidator(_parts, json_schema_input_type=str | list[Part]),
    AtMost(MAX_PARTS),
]
ItemId = Annotated[str, pydantic.Field(max_length=MAX_NAME)] | None
Status = Literal["in_progress", "completed", "incomplete"] | None


class MessageItem(Strict):
    type: Literal["message"] = "message"
    role: Literal["user", "assistant", "system", "developer"]
    content: Parts
    id: ItemId = None
    status: Status = None
    phase: Literal["commentary", "final_answer"] | None = None


class FunctionCallItem(Strict):
    type: Literal["function_call"]
    call_id: Annotated[str, pydantic.Field(min_length=1, max_length=MAX_NAME)]
    name: Annotated[str, pydantic.Field(min_length=1, max_length=MAX_NAME)]
    arguments: str
    id: ItemId = None
    status: Status = None


class FunctionCallOutputItem(Strict):
    type: Literal["function_call_output"]
    call_id: Annotated[str, pydantic.Field(min_length=1, max_length=MAX_NAME)]
    output: Parts
    name: Annotated[str, pydantic.Field(max_length=MAX_NAME)] | None = None
    id: ItemId = None
    status: Status = None


class ReasoningItem(Strict):
    type: Literal["reasoning"]
    summary: Parts = pydantic.Field([])
    content: Parts | None = None
    encrypted_content: Refused = None
    id: ItemId = None
    status: Status = None


ITEMS: dict[str, type[pydantic.BaseModel]] = {
    "message": MessageItem,
    "function_call": FunctionCallItem,
    "function_call_output": FunctionCallOutputItem,
    "reasoning": ReasoningItem,
}


def _as_item(value: Any) -> Any:
    """The model of its kind: pydantic's errors for a union would name every one of them."""
    if not isinstance(value, dict):
        raise PydanticCustomError("item", "must be an object with a type")
    kind = value.get("type") or "message"
    if kind not in ITEMS:
        raise PydanticCustomError(
            "unsupported",
            "items of the type {kind} are not supported; these are: {known}",
            {"kind": repr(kind)[:40], "known": ", ".join(ITEMS)},
        )
    return ITEMS[kind].model_validate(value)


AnyItem = MessageItem | FunctionCallItem | FunctionCallOutputItem | ReasoningItem
Item = Annotated[AnyItem, pydantic.BeforeValidator(_as_item, json_schema_input_type=AnyItem)]


def _as_items(value: Any) -> Any:
    if not isinstance(value, str | list):
        raise PydanticCustomError("input", "must be a string or a list of items")
    return [{"role": "user", "content": value}] if isinstance(value, str) else value


# --- tools, formats, options ---------------------------------------------------------------------------


class FunctionTool(Strict):
    """strict: the arguments are held to the schema also where the model chooses whether to call."""

    type: Literal["function"]
    name: Annotated[str, pydantic.Field(pattern=NAME)]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None

    def neutral(self) -> dict[str, Any]:
        function: dict[str, Any] = {"name": self.name}
        if self.description is not None:
            function["description"] = self.description
        if self.strict:
            function["strict"] = True
        function["parameters"] = self.parameters or {"type": "object", "properties": {}}
        return {"type": "function", "function": function}


def _as_tool(value: Any) -> Any:
    kind = value.get("type") if isinstance(value, dict) else None
    if isinstance(kind, str) and kind != "function":
        raise PydanticCustomError(
            "unsupported",
            "tools of the type {kind} are not supported: only functions are",
            {"kind": repr(kind)[:40]},
        )
    return value


class NamedFunctionTool(Strict):
    type: Literal["function"]
    name: Annotated[str, pydantic.Field(pattern=NAME)]


class AllowedFunctionTools(Strict):
    type: Literal["allowed_tools"]
    mode: Literal["auto", "required"]
    tools: Annotated[list[NamedFunctionTool], pydantic.Field(min_length=1), AtMost(MAX_TOOLS)]


AnyChoice = Literal["auto", "none", "required"] | NamedFunctionTool | AllowedFunctionTools


def _as_choice(value: Any) -> Any:
    if isinstance(value, str) and value in ("auto", "none", "required"):
        return value
    if isinstance(value, dict):
        kind = AllowedFunctionTools if value.get("type") == "allowed_tools" else NamedFunctionTool
        return kind.model_validate(value)
    raise PydanticCustomError("choice", "must be 'auto', 'none', 'required' or an object that names tools")


class TextFormat(Strict):
    """`strict` changes nothing: a schema is always kept to."""

    type: Literal["text", "json_object", "json_schema"]
    name: Annotated[str, pydantic.Field(pattern=NAME)] | None = None
    schema_: Annotated[dict[str, Any] | None, pydantic.Field(alias="schema")] = None
    description: str | None = None
    strict: bool | None = None

    @pydantic.model_validator(mode="after")
    def _complete(self) -> TextFormat:
        if self.type == "json_schema" and (self.name is None or self.schema_ is None):
            raise PydanticCustomError("format", "the type 'json_schema' needs a name and a schema")
        if self.type != "json_schema" and len(self.model_fields_set) > 1:
            raise PydanticCustomError("format", "this type has no other members")
        return self


class TextOptions(Strict):
    format: TextFormat | None = None
    verbosity: Literal["medium"] | None = None


class ReasoningOptions(Strict):
    effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = None
    summary: Refused = None
    generate_summary: Refused = None


class ResponseStreamOptions(Strict):
    include_obfuscation: Literal[False] | None = None


# --- the request ---------------------------------------------------------------------------------------


class ResponseRequest(PlaceFields):
    """OpenAI's fields, and vLLM's names for the rest of how tokens are drawn."""

    input: Annotated[
        list[Item],
        pydantic.BeforeValidator(_as_items, json_schema_input_type=str | list[AnyItem]),
        pydantic.Field(min_length=1),
        AtMost(MAX_MESSAGES),
    ]
    instructions: str | None = None
    max_output_tokens: Annotated[int, pydantic.Field(ge=1)] | None = None
    temperature: float = 1.0
    top_p: float = 1.0
    include: Annotated[list[Literal["message.output_text.logprobs"]], AtMost(8)] = pydantic.Field([])
    top_logprobs: int | None = None
    stream: bool = False
    stream_options: ResponseStreamOptions | None = None
    tools: Annotated[list[Annotated[FunctionTool, pydantic.BeforeValidator(_as_tool)]], AtMost(MAX_TOOLS)] = (
        pydantic.Field([])
    )
    tool_choice: Annotated[
        str | NamedFunctionTool | AllowedFunctionTools,
        pydantic.BeforeValidator(_as_choice, json_schema_input_type=AnyChoice),
    ] = "auto"
    parallel_tool_calls: bool = True
    max_tool_calls: Annotated[int, pydantic.Field(ge=1)] | None = None  # of tools that run here: none do
    text: TextOptions | None = None
    reasoning: ReasoningOptions | None = None
    truncation: Literal["disabled"] = "disabled"
    background: Literal[False] = False

    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    stop: Stop = pydantic.Field([])
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    chat_template_kwargs: dict[str, Any] = pydantic.Field({})

    def asked(self) -> TurnRequest:
        """Raises RequestError naming the field."""
        structured = self._structured()
        tools = {tool.name: tool.neutral() for tool in self.tools}
        choice: Any = self.tool_choice
        if isinstance(choice, NamedFunctionTool):
            choice = {"name": choice.name}
        elif isinstance(choice, AllowedFunctionTools):
            allowed = {one.name for one in choice.tools}
            if missing := allowed - tools.keys():
                raise RequestError(f"tool_choice: there is no tool {min(missing)!r}", param="tool_choice")
            tools = {name: tool for name, tool in tools.items() if name in allowed}
            choice = choice.mode
        template = dict(self.chat_template_kwargs)
        if self.reasoning is not None and self.reasoning.effort is not None:
            template["reasoning_effort"] = self.reasoning.effort
        return TurnRequest(
            messages=messages_of(self.instructions, self.input),
            sampling=self._sampling(),
            max_tokens=self.max_output_tokens,
            logprobs=(self.top_logprobs or 0) if LOGPROBS in self.include else None,
            tools=list(tools.values()),
            tool_choice=choice,
            parallel_tool_calls=self.parallel_tool_calls,
            structured=structured,
            template=template,
            names=NAMES,
        )

    def _sampling(self) -> SamplingFields:
        """Those fields that the client gave, so that the model's own defaults hold for the others."""
        shared = self.model_fields_set & SamplingFields.model_fields.keys() - {"stream_options"}
        return SamplingFields.model_validate({name: getattr(self, name) for name in shared})

    def _structured(self) -> StructuredOutputs | None:
        format = None if self.text is None else self.text.format
        if format is None or format.type == "text":
            return None
        if format.type == "json_object":
            return StructuredOutputs(json_object=True)
        return StructuredOutputs(json=format.schema_)


# what the engine and the turn call the fields -> what they are called here
NAMES = {
    "prompt": "input",
    "messages": "input",
    "max_tokens": "max_output_tokens",
    "logprobs": "top_logprobs",
    "structured_outputs": "text.format",
    "reasoning_effort": "reasoning.effort",
}


def messages_of(instructions: str | None, items: Sequence[Item]) -> list[dict[str, Any]]:
    """The conversation in chat's form: an assistant's reasoning, text and calls in a row are one message."""
    messages: list[dict[str, Any]] = []
    if instructions is not None:
        messages.append({"role": "system", "content": instructions})
    turn: dict[str, Any] | None = None  # the assistant's message that may go on
    for item in items:
        match item:
            case MessageItem(role="assistant") | FunctionCallItem() | ReasoningItem():
                if turn is None or not _continues(turn, item):
                    turn = {"role": "assistant", "content": None}
                    messages.append(turn)
                _add(turn, item)
            case MessageItem():
                turn = None
                role = "system" if item.role == "developer" else item.role
                messages.append({"role": role, "content": _joined(item.content)})
            case FunctionCallOutputItem():
                turn = None
                messages.append(
                    {"role": "tool", "tool_call_id": item.call_id, "content": _joined(item.output)}
                )
    for message in messages:
        if message["content"] is None and "tool_calls" not in message:
            message["content"] = ""
    return messages


def _continues(turn: dict[str, Any], item: MessageItem | FunctionCallItem | ReasoningItem) -> bool:
    if isinstance(item, FunctionCallItem):
        return True
    if isinstance(item, MessageItem):
        return turn["content"] is None and "tool_calls" not in turn
    return len(turn) == 2 and turn["content"] is None  # reasoning comes first


def _add(turn: dict[str, Any], item: MessageItem | FunctionCallItem | ReasoningItem) -> None:
    if isinstance(item, MessageItem):
        turn["content"] = _joined(item.content)
    elif isinstance(item, FunctionCallItem):
        call = {
            "id": item.call_id,
            "type": "function",
            "function": {"name": item.name, "arguments": item.arguments},
        }
        turn.setdefault("tool_calls", []).append(call)
    elif words := _joined(item.content or item.summary):
        turn["reasoning_content"] = words


def _joined(parts: Sequence[Part]) -> str:
    return "\n".join(part.words for part in parts)
