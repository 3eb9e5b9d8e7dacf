"""Which family of formats a model writes its tool calls and its reasoning in, told from its chat template."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Collection
from typing import Literal

from jaxserve.text.tools import hermes, llama3, mistral, think
from jaxserve.text.tools.parts import Plain, Reader

ToolFormat = Literal["hermes", "llama3", "mistral", "mistral-list"]


@dataclasses.dataclass(frozen=True, slots=True)
class Format:
    """How one model writes what is not plain text; None where it does not.

    `mistral` is the form with [ARGS], `mistral-list` the older one: both are read alike, one is asked for.
    """

    tools: ToolFormat | None = None
    reasoning: Literal["think"] | None = None

    def reader(self, *, tools: Collection[str], opened: bool) -> Reader:
        """tools: the names of those that may be called. opened: the reply begins within its reasoning."""
        answer: Reader = Plain()
        if tools and self.tools is not None:
            answer = self._tool_reader(tools)
        if self.reasoning is not None:
            answer = think.Think(answer, opened=opened)
        return answer

    def _tool_reader(self, tools: Collection[str]) -> Reader:
        match self.tools:
            case "hermes":
                return hermes.Hermes()
            case "llama3":
                return llama3.Llama3(frozenset(tools))
            case _:
                return mistral.Mistral()

    def markers(self, *, tools: bool) -> tuple[str, ...]:
        """What the reader looks for: some of it may be special tokens, which text usually leaves out."""
        found: tuple[str, ...] = ()
        if tools and self.tools is not None:
            found += {
                "hermes": (hermes.OPEN, hermes.CLOSE),
                "llama3": (llama3.TAG,),
            }.get(self.tools, (mistral.OPEN, mistral.ARGS, mistral.CALL_ID))
        if self.reasoning is not None:
            found += (think.OPEN, think.CLOSE)
        return found


@functools.lru_cache(maxsize=64)
def detect(template: str, *, tool_parser: str = "auto", reasoning_parser: str = "auto") -> Format:
    """The format of a model with this chat template, unless the server's flags say which it is."""
    tools = _tools_of(template) if tool_parser == "auto" else tool_parser
    if tools == "mistral" and mistral.ARGS not in template:
        tools = "mistral-list"
    reasoning = reasoning_parser
    if reasoning == "auto":
        reasoning = "think" if think.CLOSE in template or think.OPEN in template else "none"
    return Format(
        tools=None if tools == "none" else tools,  # type: ignore[arg-type]  # config.py checks the flags
        reasoning="think" if reasoning == "think" else None,
    )


def _tools_of(template: str) -> str:
    if hermes.OPEN in template:
        # Qwen 3 Coder marks calls alike and writes XML between the marks
        return "none" if "<function=" in template else "hermes"
    if mistral.OPEN in template:
        return "mistral"
    if llama3.TAG in template or ("<|start_header_id|>" in template and '"parameters"' in template):
        return "llama3"
    return "none"
