"""What a client asks of `/v1/messages`, and the turn that it comes to.

Source of the form: Anthropic's API reference, "Messages" and "Count Message tokens". Content is text, calls
of the client's own tools, their results, and thinking; `cache_control` asks for what happens anyway.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

import orjson
import pydantic
from pydantic_core import PydanticCustomError

from jaxserve.scheduler.types import MAX_STOP_STRINGS, StructuredOutputs
from jaxserve.server.api.conversation import MAX_MESSAGES, MAX_NAME, MAX_PARTS, MAX_TOOLS
from jaxserve.server.api.fields import MAX_USER, SamplingFields
from jaxserve.server.api.structured import NAME
from jaxserve.server.api.turn_prompt import TurnRequest
from jaxserve.server.body import AtMost, Strict

# --- content -------------------------------------------------------------------------------------------


class CacheControl(Strict):
    type: Literal["ephemeral"]
    ttl: Literal["5m", "1h"] | None = None


class TextBlock(Strict):
    type: Literal["text"]
    text: str
    cache_control: CacheControl | None = None
    citations: Annotated[list[Any], AtMost(0)] | None = None


class ThinkingBlock(Strict):
    """`signature` is not looked at: what the model thought goes back to it as it comes."""

    type: Literal["thinking"]
    thinking: str
    signature: str = ""


class ToolUseBlock(Strict):
    type: Literal["tool_use"]
    id: Annotated[str, pydantic.Field(min_length=1, max_length=MAX_NAME)]
    name: Annotated[str, pydantic.Field(min_length=1, max_length=MAX_NAME)]
    input: dict[str, Any]
    cache_control: CacheControl | None = None


def _as_blocks(value: Any) -> Any:
    return [{"type": "text", "text": value}] if isinstance(value, str) else value


def _block_of(value: Any, kinds: dict[str, type[pydantic.BaseModel]]) -> Any:
    """The model of its kind: pydantic's errors for a union would name every one of them."""
    kind = value.get("type") if isinstance(value, dict) else None
    if not isinstance(kind, str):
        raise PydanticCustomError("block", "must be an object with a type")
    if kind not in kinds:
        raise PydanticCustomError(
            "unsupported",
            "blocks of the type {kind} are not supported here; these are: {known}",
            {"kind": repr(kind)[:40], "known": ", ".join(kinds)},
        )
    return kinds[kind].model_validate(value)


def _as_text(value: Any) -> Any:
    return _block_of(value, {"text": TextBlock})


Texts = Annotated[
    list[Annotated[TextBlock, pydantic.BeforeValidator(_as_text)]],
    pydantic.BeforeValidator(_as_blocks, json_schema_input_type=str | list[TextBlock]),
    AtMost(MAX_PARTS),
]


class ToolResultBlock(Strict):
    type: Literal["tool_result"]
    tool_use_id: Annotated[str, pydantic.Field(min_length=1, max_length=MAX_NAME)]
    content: Texts = pydantic.Field([])
    is_error: bool = False
    cache_control: CacheControl | None = None


AnyBlock = TextBlock | ThinkingBlock | ToolUseBlock | ToolResultBlock
BLOCKS: dict[str, dict[str, type[pydantic.BaseModel]]] = {  # by role
    "user": {"text": TextBlock, "tool_result": ToolResultBlock},
    "assistant": {"text": TextBlock, "thinking": ThinkingBlock, "tool_use": ToolUseBlock},
    "system": {"text": TextBlock},
}
ANY_BLOCK = {name: model for kinds in BLOCKS.values() for name, model in kinds.items()}


def _as_block(value: Any) -> Any:
    return _block_of(value, ANY_BLOCK)


class InputMessage(Strict):
    role: Literal["user", "assistant", "system"]
    content: Annotated[
        list[Annotated[AnyBlock, pydantic.BeforeValidator(_as_block)]],
        pydantic.BeforeValidator(_as_blocks, json_schema_input_type=str | list[AnyBlock]),
        AtMost(MAX_PARTS),
    ]

    @pydantic.model_validator(mode="after")
    def _of_its_role(self) -> InputMessage:
        for block in self.content:
            if block.type not in BLOCKS[self.role]:
                raise PydanticCustomError(
                    "block",
                    "a message of the role {role} has no blocks of the type {kind}",
                    {"role": repr(self.role), "kind": repr(block.type)},
                )
        return self


# --- tools, options ------------------------------------------------------------------------------------


class ClientTool(Strict):
    """strict: the arguments are held to the schema also where the model chooses whether to call."""

    type: Literal["custom"] = "custom"
    name: Annotated[str, pydantic.Field(pattern=NAME)]
    description: str | None = None
    input_schema: dict[str, Any]
    strict: bool | None = None
    eager_input_streaming: bool | None = None  # arguments are streamed as they come
    cache_control: CacheControl | None = None

    def neutral(self) -> dict[str, Any]:
        function: dict[str, Any] = {"name": self.name}
        if self.description is not None:
            function["description"] = self.description
        if self.strict:
            function["strict"] = True
        return {"type": "function", "function": {**function, "parameters": self.input_schema}}


def _as_tool(value: Any) -> Any:
    kind = value.get("type") if isinstance(value, dict) else None
    if isinstance(kind, str) and kind != "custom":
        raise PydanticCustomError(
            "unsupported",
            "tools of the type {kind} are not supported: only the client's own are",
            {"kind": repr(kind)[:40]},
        )
    return value


class ToolUseChoice(Strict):
    type: Literal["auto", "any", "tool", "none"]
    name: Annotated[str, pydantic.Field(pattern=NAME)] | None = None
    disable_parallel_tool_use: bool = False

    @pydantic.model_validator(mode="after")
    def _named(self) -> ToolUseChoice:
        if (self.type == "tool") != (self.name is not None):
            raise PydanticCustomError("choice", "a name goes with the type 'tool', and only with it")
        return self


def _as_thinking(value: Any) -> Any:
    if isinstance(value, dict) and (value.get("type") == "enabled" or value.get("budget_tokens") is not None):
        raise PydanticCustomError(
            "unsupported",
            "budgets of thinking (type: enabled, budget_tokens) are not supported: the types adaptive and"
            " disabled are, and output_config.effort where the model's chat template reads it",
        )
    return value


class Thinking(Strict):
    """No budget: a model of this server cannot be told how long to think."""

    type: Literal["adaptive", "disabled"]
    display: Literal["summarized"] | None = None


class JsonFormat(Strict):
    type: Literal["json_schema"]
    schema_: Annotated[dict[str, Any], pydantic.Field(alias="schema")]


class OutputConfig(Strict):
    effort: Literal["low", "medium", "high", "xhigh", "max"] | None = None
    format: JsonFormat | None = None


class Metadata(Strict):
    user_id: Annotated[str, pydantic.Field(max_length=MAX_USER)] | None = None


# --- the request ---------------------------------------------------------------------------------------


class CountRequest(Strict):
    """What a prompt is made of."""

    model: str
    messages: Annotated[list[InputMessage], pydantic.Field(min_length=1), AtMost(MAX_MESSAGES)]
    system: Texts = pydantic.Field([])
    tools: Annotated[list[Annotated[ClientTool, pydantic.BeforeValidator(_as_tool)]], AtMost(MAX_TOOLS)] = (
        pydantic.Field([])
    )
    tool_choice: ToolUseChoice | None = None
    thinking: Annotated[Thinking, pydantic.BeforeValidator(_as_thinking)] | None = None
    output_config: OutputConfig | None = None
    cache_control: CacheControl | None = None
    speed: Literal["standard"] | None = None

    def asked(self) -> TurnRequest:
        return self._turn(SamplingFields(model=self.model), None)

    def _turn(self, sampling: SamplingFields, max_tokens: int | None) -> TurnRequest:
        choice: Any = "auto"
        if self.tool_choice is not None:
            words: dict[str, Any] = {"any": "required", "tool": {"name": self.tool_choice.name}}
            choice = words.get(self.tool_choice.type, self.tool_choice.type)
        template: dict[str, Any] = {}
        config = self.output_config
        if self.thinking is not None and self.thinking.type == "disabled":
            template["reasoning_effort"] = "none"
        elif config is not None and config.effort is not None:
            template["reasoning_effort"] = config.effort
        structured = None
        if config is not None and config.format is not None:
            structured = StructuredOutputs(json=config.format.schema_)
        prefill = self.messages[-1].role == "assistant"
        return TurnRequest(
            messages=messages_of(self.system, self.messages),
            sampling=sampling,
            max_tokens=max_tokens,
            tools=[tool.neutral() for tool in self.tools],
            tool_choice=choice,
            parallel_tool_calls=self.tool_choice is None or not self.tool_choice.disable_parallel_tool_use,
            structured=structured,
            template=template,
            add_generation_prompt=not prefill,
            continue_final_message=prefill,
            names={**NAMES, "reasoning_effort": "thinking"} if "none" in template.values() else NAMES,
        )


class MessagesRequest(CountRequest):
    """Anthropic's fields, and this server's own for a request's place in the queue and in the caches."""

    max_tokens: Annotated[int, pydantic.Field(ge=1)]
    stop_sequences: Annotated[list[str], AtMost(MAX_STOP_STRINGS)] = pydantic.Field([])
    stream: bool = False
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    metadata: Metadata | None = None
    service_tier: Literal["auto", "standard_only", "default", "flex"] | None = None

    priority: int = 0
    cache_salt: str = ""
    timeout: Annotated[float, pydantic.Field(gt=0, allow_inf_nan=False)] | None = None

    def asked(self) -> TurnRequest:
        """Raises RequestError naming the field."""
        given: dict[str, Any] = {
            "model": self.model,
            "priority": self.priority,
            "cache_salt": self.cache_salt,
            "timeout": self.timeout,
            "service_tier": "default" if self.service_tier == "standard_only" else self.service_tier,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "top_k": self.top_k,
            "stop": self.stop_sequences,
            "stream": self.stream,
        }
        # None is as if absent, so that the model's own defaults hold for what was not given
        return self._turn(SamplingFields.model_validate(given), self.max_tokens)


# what the engine and the turn call the fields -> what they are called here
NAMES = {
    "prompt": "messages",
    "stop": "stop_sequences",
    "structured_outputs": "output_config.format",
    "reasoning_effort": "output_config.effort",
}


def messages_of(system: Sequence[TextBlock], messages: Sequence[InputMessage]) -> list[dict[str, Any]]:
    """The conversation in chat's form: the results of tools are messages of their own."""
    found: list[dict[str, Any]] = []
    if system:
        found.append({"role": "system", "content": _joined(system)})
    for message in messages:
        if message.role == "assistant":
            found.append(_assistant(message))
        else:
            found += _others(message)
    return found


def _assistant(message: InputMessage) -> dict[str, Any]:
    texts = [block for block in message.content if isinstance(block, TextBlock)]
    thoughts = [block.thinking for block in message.content if isinstance(block, ThinkingBlock)]
    calls = [block for block in message.content if isinstance(block, ToolUseBlock)]
    said: dict[str, Any] = {"role": "assistant", "content": _joined(texts) if texts or not calls else None}
    if thoughts:
        said["reasoning_content"] = "\n".join(thoughts)
    if calls:
        said["tool_calls"] = [
            {
                "id": call.id,
                "type": "function",
                "function": {"name": call.name, "arguments": orjson.dumps(call.input).decode()},
            }
            for call in calls
        ]
    return said


def _others(message: InputMessage) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    texts: list[TextBlock] = []
    for block in message.content:
        if isinstance(block, ToolResultBlock):
            if texts:
                found.append({"role": message.role, "content": _joined(texts)})
                texts = []
            # chat templates have no place for the flag, so that the text says it
            words = ("Error: " if block.is_error else "") + _joined(block.content)
            found.append({"role": "tool", "tool_call_id": block.tool_use_id, "content": words})
        elif isinstance(block, TextBlock):
            texts.append(block)
    if texts or not found:
        found.append({"role": message.role, "content": _joined(texts)})
    return found


def _joined(blocks: Sequence[TextBlock]) -> str:
    return "\n".join(block.text for block in blocks)
