"""What a turn is asked for, and what becomes of that before the engine sees it: the prompt, and how its reply
is to be read and constrained.

Knows nothing of increments, nor of how any API spells its fields.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import orjson

from jaxserve.prompts import encode_chat
from jaxserve.protocols import TokenizerLike
from jaxserve.scheduler.types import RequestError, StructuredOutputs
from jaxserve.server.api.conversation import for_template
from jaxserve.server.api.fields import Caller, SamplingFields
from jaxserve.server.body import MAX_DEPTH, is_deep
from jaxserve.text.chat_template import NOW, names_read
from jaxserve.text.json_schemas import SchemaError
from jaxserve.text.tools import think
from jaxserve.text.tools.call_grammars import (
    Function,
    Grammars,
    choice_body,
    in_words,
    json_body,
    regex_body,
)
from jaxserve.text.tools.formats import Format, detect
from jaxserve.text.tools.parts import Reader

MOST_COUNTED = 2**19  # tokens of a prompt that is only counted, whatever the context
TAIL = 16  # tokens of a prompt's end that may open the reasoning
MAX_VARIABLES, MAX_VARIABLE_BYTES = 64, 2**16  # of a chat template, by one request
OURS = frozenset({"messages", "tools", "add_generation_prompt", "continue_final_message", NOW})


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class TurnRequest:
    """A turn, in words that the three APIs share.

    messages: in OpenAI's chat form: role (system, user, assistant, tool), content (a text, or None beside
        tool_calls), and where they apply tool_calls (arguments as JSON text), tool_call_id, name,
        reasoning_content.
    sampling: `SamplingFields` with those fields set that the client gave.
    max_tokens: None takes what is left of the context.
    logprobs: alternatives per token; None, no log-probabilities.
    tools: in OpenAI's chat form, each {"type": "function", "function": {…}}.
    tool_choice: or {"name": …}, the one that must be called.
    structured: what the answer must look like, the reasoning before it aside.
    template: more variables of the chat template.
    names: what the client called a field that goes by another name here, such as max_tokens, for errors.
    """

    messages: Sequence[Mapping[str, Any]]
    sampling: SamplingFields
    max_tokens: int | None = None
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    tools: Sequence[Mapping[str, Any]] = ()
    tool_choice: Literal["auto", "none", "required"] | Mapping[str, str] = "auto"
    parallel_tool_calls: bool = True
    structured: StructuredOutputs | None = None
    template: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    names: Mapping[str, str] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, slots=True)
class Reading:
    """How a reply's text is taken apart.

    tools: the names of those that may be called. opened: it begins within its reasoning. closed: it begins
    after it, or is to have none. forced: it may be nothing but calls, its reasoning aside. hidden: names of
    special tokens to take out of text that must be decoded with them; None where it need not be. new_id: the
    caller's.
    """

    format: Format
    tools: tuple[str, ...]
    opened: bool
    closed: bool
    forced: bool
    hidden: frozenset[str] | None
    new_id: Callable[..., str]

    def reader(self) -> Reader:
        return self.format.reader(tools=self.tools, opened=self.opened)

    def call_id(self, choice: int, call: int) -> str:
        """Mistral's templates refuse any that is not nine letters or digits."""
        name = self.new_id("", choice, call)
        return name[:9] if self.format.tools in ("mistral", "mistral-list") else f"call_{name[:24]}"


@dataclasses.dataclass(frozen=True, slots=True)
class Constraint:
    """What a reply must look like. param: the field that asks for it. functions: of a grammar that was made
    here, those that it may call; None of the client's own."""

    outputs: StructuredOutputs
    param: str
    functions: Sequence[Function] | None = None

    def in_words(self, error: str) -> str:
        """What was found wrong with it, in words of what the client sent."""
        if self.functions is None:
            return error
        return in_words(error, self.outputs.grammar or "", self.functions)


class Prompt:
    """A turn's prompt. Raises RequestError; where it is far longer than `context` tokens, before rendering.

    ids: its tokens. reading: how the reply is read.
    """

    def __init__(
        self, asked: TurnRequest, tokenizer: TokenizerLike | None, caller: Caller, *, context: int
    ) -> None:
        self._asked = asked
        self._tokenizer = tokenizer
        self._caller = caller
        source = (None if tokenizer is None else tokenizer.chat_template_source) or ""
        self._read = names_read(source)
        self._format = detect(
            source, tool_parser=caller.tool_parser, reasoning_parser=caller.reasoning_parser
        )
        # tools that may not be called are not shown: the model would call them all the same
        self._tools = () if asked.tool_choice == "none" else asked.tools
        self._check_tools(source)
        variables = self._variables()
        self._unthinking = asked.template.get("reasoning_effort") == "none" or any(
            variables.get(name) is False for name in ("enable_thinking", "thinking")
        )
        if self._tools:
            variables["tools"] = list(self._tools)
        if asked.continue_final_message:
            variables["continue_final_message"] = True
        if caller.created is not None and NOW in self._read:
            variables[NOW] = caller.created
        ids = encode_messages(
            tokenizer,
            for_template(asked.messages),
            context=None if asked.sampling.truncate_prompt_tokens is not None else context,
            add_generation_prompt=asked.add_generation_prompt,
            **variables,
        )
        self.ids = asked.sampling.truncated(ids)
        self.reading = self._reading()

    # --- what the template is given ---

    def _check_tools(self, source: str) -> None:
        asked = self._asked
        names = [tool["function"]["name"] for tool in asked.tools]
        if not names:
            if asked.tool_choice not in ("auto", "none"):
                raise RequestError("tool_choice needs tools to choose from", param="tool_choice")
        elif len(set(names)) < len(names):
            twice = next(name for name in names if names.count(name) > 1)
            raise RequestError(f"tools: there are two functions {twice!r}", param="tools")
        if isinstance(asked.tool_choice, Mapping) and asked.tool_choice["name"] not in names:
            name = asked.tool_choice["name"]
            raise RequestError(f"tool_choice: there is no tool {name!r}", param="tool_choice")
        if self._tools and "tools" not in self._read:
            raise RequestError(
                "tools: the model's chat template does not read them",
                param="tools",
                code="unsupported_parameter",
            )
        if self._tools and self._format.tools is None:
            raise RequestError(
                "tools: the server does not know in what form this model writes calls;"
                " --tool-parser would say it",
                param="tools",
                code="unsupported_parameter",
            )
        if any(message.get("tool_calls") for message in asked.messages) and "tool_calls" not in source:
            raise RequestError(
                "messages: the model's chat template does not read tool_calls",
                param="messages",
                code="unsupported_parameter",
            )

    def _variables(self) -> dict[str, Any]:
        """The template's variables that the request sets. One that it does not read would change nothing."""
        variables = dict(self._asked.template)
        effort = variables.get("reasoning_effort")
        if effort is not None and "reasoning_effort" not in self._read:
            del variables["reasoning_effort"]
            if "enable_thinking" in self._read:
                variables.setdefault("enable_thinking", effort != "none")
            elif effort != "none" or self._format.reasoning is not None:
                raise RequestError(
                    "reasoning_effort: the model's chat template does not read it",
                    param="reasoning_effort",
                    code="unsupported_parameter",
                )
        if (
            len(variables) > MAX_VARIABLES
            or is_deep(variables)
            or len(orjson.dumps(variables)) > MAX_VARIABLE_BYTES
        ):
            raise RequestError(
                f"chat_template_kwargs and documents may have {MAX_VARIABLES} members, {MAX_DEPTH} levels and"
                f" {MAX_VARIABLE_BYTES} bytes together",
                param="chat_template_kwargs",
            )
        for name in variables:
            param = name if name in ("documents", "reasoning_effort") else f"chat_template_kwargs.{name[:64]}"
            if name in OURS:
                raise RequestError(f"{param} has a field of its own, or is the server's", param=param)
            if name not in self._read:
                raise RequestError(
                    f"{param}: the model's chat template does not read it",
                    param=param,
                    code="unsupported_parameter",
                )
        return variables

    # --- how the reply is read ---

    def _reading(self) -> Reading:
        special: frozenset[str] = frozenset()
        if self._tokenizer is not None:
            special = frozenset(map(self._tokenizer.token_text, self._tokenizer.special_ids))
        shown = special & set(self._format.markers(tools=bool(self._tools)))
        opened = self._format.reasoning is not None and self._opened()
        return Reading(
            self._format,
            tuple(tool["function"]["name"] for tool in self._tools),
            opened,
            not opened and (self._unthinking or self._closed()),
            bool(self._tools) and self._asked.tool_choice != "auto",
            special - shown if shown else None,
            self._caller.new_id,
        )

    def _opened(self) -> bool:
        assert self._tokenizer is not None
        if self._asked.continue_final_message:
            return think.is_open(str(self._asked.messages[-1].get("content") or ""))
        return think.opens(self._tokenizer.decode(self.ids[-TAIL:], skip_special_tokens=False))

    def _closed(self) -> bool:
        if self._tokenizer is None:
            return False
        if self._asked.continue_final_message:  # with what was thought before, if anything was
            return bool(str(self._asked.messages[-1].get("content") or "").strip())
        return think.closes(self._tokenizer.decode(self.ids[-TAIL:], skip_special_tokens=False))

    # --- what the reply must look like ---

    def constraint(self) -> Constraint | None:
        """What constrains the reply. Compiling it is left to the caller."""
        asked = self._asked
        functions = [_function(tool) for tool in self._tools]
        if functions and asked.tool_choice != "auto":
            if isinstance(asked.tool_choice, Mapping):
                functions = [one for one in functions if one.name == asked.tool_choice["name"]]
            # OpenAI: a function that is named is called once
            parallel = asked.parallel_tool_calls and asked.tool_choice == "required"
            return _made("tools", functions, lambda: self._grammars().calls(functions, parallel=parallel))
        if asked.structured is not None:
            if not functions and self._format.reasoning is None:
                return Constraint(asked.structured, "structured_outputs")
            if functions and self._format.tools == "llama3":
                # both would begin with a brace, and a grammar cannot tell which of them that is
                raise RequestError(
                    "this model's calls look like JSON answers: ask for tools or for a form, not for both",
                    param="structured_outputs",
                    code="unsupported_parameter",
                )
            body = self._body(asked.structured)
            return _made(
                "structured_outputs",
                functions,
                lambda: self._grammars().answer(body, functions, parallel=asked.parallel_tool_calls),
            )
        if functions and (not asked.parallel_tool_calls or any(one.strict for one in functions)):
            return _made(
                "tools",
                functions,
                lambda: self._grammars().free(functions, parallel=asked.parallel_tool_calls),
            )
        return None

    def _grammars(self) -> Grammars:
        tokens = {}
        for marker in self._format.markers(tools=True):
            token = None if self._tokenizer is None else self._tokenizer.token_id(marker)
            if token is not None:
                tokens[marker] = token
        return Grammars(self._format, tokens, opened=self.reading.opened, closed=self.reading.closed)

    def _body(self, structured: StructuredOutputs) -> str:
        if structured.json_object:
            return json_body({"type": "object"})
        if structured.choice is not None:
            return choice_body(structured.choice)
        if structured.regex is not None:
            return regex_body(structured.regex)
        if structured.json is None:
            raise RequestError(
                "a grammar does not go with tools, nor with a model that reasons first",
                param="structured_outputs",
                code="unsupported_parameter",
            )
        try:
            schema = orjson.loads(str(structured.json))
        except orjson.JSONDecodeError as error:
            raise RequestError(f"this is not a JSON schema: {error}", param="structured_outputs") from None
        if not isinstance(schema, dict | bool):
            raise RequestError("a JSON schema is an object", param="structured_outputs")
        try:
            return json_body(schema)
        except SchemaError as error:
            raise RequestError(f"structured_outputs: {error}", param="structured_outputs") from None


def _made(param: str, functions: Sequence[Function], make: Callable[[], str]) -> Constraint:
    """Of the grammar that `make` makes. Raises RequestError for a function whose schema cannot be kept to."""
    try:
        return Constraint(StructuredOutputs(grammar=make()), param, functions)
    except SchemaError as error:
        raise RequestError(f"tools: {error}", param="tools") from None


def _function(tool: Mapping[str, Any]) -> Function:
    function = tool["function"]
    parameters = function.get("parameters") or {"type": "object", "properties": {}}
    return Function(function["name"], parameters, strict=bool(function.get("strict")))


def encode_messages(
    tokenizer: TokenizerLike | None, messages: Sequence[Mapping[str, Any]], **variables: Any
) -> list[int]:
    """The prompt's token ids. Raises RequestError for a `name` that the template does not read.

    A template may read the names of some roles only, so each role is tried: under other names the prompt must
    be another one. Conversations without names, nearly all, are rendered once. A tool's result repeats its
    tool's name, so that nothing is lost where that is not read.
    """
    ids = encode_chat(tokenizer, messages, **variables)
    named = {message["role"] for message in messages if "name" in message} - {"tool"}
    for role in sorted(named):
        others = [
            {**message, "name": f"x{message['name']}"}
            if message["role"] == role and "name" in message
            else message
            for message in messages
        ]
        if encode_chat(tokenizer, others, **variables) == ids:
            raise RequestError(
                f"messages: the model's chat template does not read the name of a {role} message;"
                " leave it out, or write it into the content",
                param="messages",
                code="unsupported_parameter",
            )
    return ids
