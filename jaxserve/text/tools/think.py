"""Reasoning before the answer: `<think>…</think>`, as DeepSeek R1, QwQ and Qwen 3 write it.

The opening marker is the first thing in a reply, or the last in the prompt, where the template writes it.
Source: the chat templates of deepseek-ai/DeepSeek-R1 and Qwen/Qwen3-8B.
"""

from __future__ import annotations

from jaxserve.text.tools.json_call import SPACE
from jaxserve.text.tools.parts import Part, Reader, Thought
from jaxserve.text.tools.search import Search

OPEN, CLOSE = "<think>", "</think>"


def is_open(text: str) -> bool:
    """Whether an assistant's text that goes on is within its reasoning."""
    return text.rfind(OPEN) > text.rfind(CLOSE)


def opens(prompt: str) -> bool:
    """Whether this prompt's end opens the reasoning. Not whether it holds a marker: a user may write one."""
    return prompt.rstrip(SPACE).endswith(OPEN)


def closes(prompt: str) -> bool:
    """Whether this prompt's end closes the reasoning, or leaves it empty: the reply begins after it."""
    return prompt.rstrip(SPACE).endswith(CLOSE)


class Think:
    """White space around the markers belongs to them. `answer` reads what comes after the reasoning."""

    def __init__(self, answer: Reader, *, opened: bool) -> None:
        self._answer = answer
        self._state = "thinking" if opened else "start"
        self._search = Search(CLOSE)
        self._lead: list[str] = []  # white space that the reply starts with
        self._held = ""  # what follows it, which may be the opening marker
        self._blank = True  # nothing but white space has come since the last marker

    def push(self, text: str) -> list[Part]:
        parts: list[Part] = []
        if self._state == "start":
            text, self._held = self._held + text, ""
            start = text.lstrip(SPACE)
            self._lead.append(text[: len(text) - len(start)])
            if start.startswith(OPEN):
                self._state, text = "thinking", start[len(OPEN) :]
            elif OPEN.startswith(start):
                self._held = start
                return parts
            else:
                self._state, self._blank, text = "answer", False, "".join((*self._lead, start))
        if self._state == "thinking":
            sure, rest = self._search.push(text)
            self._think(sure, parts)
            if rest is None:
                return parts
            self._state, self._blank, text = "answer", True, rest
        if self._blank:
            text = text.lstrip(SPACE)
        if text:
            self._blank = False
            parts += self._answer.push(text)
        return parts

    def finish(self) -> list[Part]:
        parts: list[Part] = []
        if self._state == "thinking":
            self._think(self._search.flush(), parts)
        elif self._state == "start":
            parts += self._answer.push("".join((*self._lead, self._held)))
        return parts + self._answer.finish()

    def _think(self, text: str, parts: list[Part]) -> None:
        if self._blank:
            text = text.lstrip(SPACE)
        if text:
            self._blank = False
            parts.append(Thought(text))
