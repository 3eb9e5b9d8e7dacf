"""Calls as Hermes 2 Pro and later, Qwen 2.5 and Qwen 3 write them.

    <tool_call>
    {"name": "f", "arguments": {"x": 1}}
    </tool_call>

Source: NousResearch's "Hermes Function Calling", and the chat templates of Qwen/Qwen2.5-7B-Instruct and
Qwen/Qwen3-8B.
"""

from __future__ import annotations

from jaxserve.text.tools.json_call import SPACE, JsonCall
from jaxserve.text.tools.marked import Marked
from jaxserve.text.tools.parts import Part

OPEN, CLOSE = "<tool_call>", "</tool_call>"


class Hermes(Marked):
    def __init__(self) -> None:
        super().__init__(OPEN)
        self._call = JsonCall()

    def _enter(self) -> None:
        self._call = JsonCall()

    def _inside(self, text: str, parts: list[Part]) -> tuple[str, bool]:
        if not self._call.done:
            more, text = self._call.push(text)
            parts += more
            if self._call.failed:
                return text, True
            if not self._call.done:
                return "", False
        # the closing marker; where it is missing, what comes next is text
        text = text.lstrip(SPACE)
        if text.startswith(CLOSE):
            return text[len(CLOSE) :], True
        return text, not CLOSE.startswith(text)

    def _given_back(self) -> str:
        return "" if self._call.begun else OPEN + self._call.raw
