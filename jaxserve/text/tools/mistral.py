"""Calls as Mistral's models write them.

    [TOOL_CALLS] [{"name": "f", "arguments": {"x": 1}}, {"name": "g", "arguments": {}}]
    [TOOL_CALLS]f[ARGS]{"x": 1}[TOOL_CALLS]g[ARGS]{}

The first until v7 of its tokenizer, the second since v11, where `[CALL_ID]` and an id may precede `[ARGS]`.
Source: mistral-common's instruct tokenizers, and the chat templates of Mistral-7B-Instruct-v0.3 and
Mistral-Small-3.2.
"""

from __future__ import annotations

from collections.abc import Callable

from jaxserve.text.tools.json_call import SPACE, JsonCall
from jaxserve.text.tools.marked import Marked
from jaxserve.text.tools.parts import Part

OPEN, ARGS, CALL_ID = "[TOOL_CALLS]", "[ARGS]", "[CALL_ID]"
_NAME = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_-.")
_LONGEST_NAME = 128


class Mistral(Marked):
    def __init__(self) -> None:
        super().__init__(OPEN)
        self._enter()

    def _enter(self) -> None:
        self._state: Callable[[str, list[Part]], tuple[str, bool]] = self._first
        self._call = JsonCall()
        self._raw = OPEN  # what is given back, as long as nothing was a call
        self._found = False

    def _inside(self, text: str, parts: list[Part]) -> tuple[str, bool]:
        while text:
            before, state = text, self._state
            text, ended = state(text, parts)
            if ended:
                return text, True
            if text == before and self._state == state:  # it waits for more
                return text, False
        return "", False

    def _given_back(self) -> str:
        return self._call.raw if self._found else self._raw + self._call.raw

    # --- states: what is left of the text, and whether the calls have ended ---

    def _first(self, text: str, parts: list[Part]) -> tuple[str, bool]:
        character = text[0]
        if character in SPACE:
            self._raw += character
            return text[1:], False
        if character == "[":
            self._raw += character
            self._state = self._element
            return text[1:], False
        if character == "{":
            self._state = self._only
            return text, False
        if character in _NAME:
            self._state = self._name
            return text, False
        return text, True

    def _element(self, text: str, parts: list[Part]) -> tuple[str, bool]:
        """An object of the list."""
        more, text = self._call.push(text)
        parts += more
        self._note()
        if self._call.done:
            self._state = self._between
        return text, self._call.failed

    def _note(self) -> None:
        if self._call.begun:
            self._found, self._space = True, ""  # what goes wrong later gives back itself alone

    def _between(self, text: str, parts: list[Part]) -> tuple[str, bool]:
        """After an object of the list: a comma or the list's end."""
        if text[0] in SPACE:
            return text[1:], False
        if text[0] == ",":
            self._call, self._state = JsonCall(), self._element
            return text[1:], False
        return text[text[0] == "]" :], True

    def _only(self, text: str, parts: list[Part]) -> tuple[str, bool]:
        more, text = self._call.push(text)
        parts += more
        self._note()
        return text, self._call.done or self._call.failed

    def _name(self, text: str, parts: list[Part]) -> tuple[str, bool]:
        size = 0
        while size < len(text) and text[size] in _NAME:
            size += 1
        if size > _LONGEST_NAME:
            return text, True
        rest = text[size:]
        for marker in (ARGS, CALL_ID):
            if rest.startswith(marker):
                return self._named(text[:size], text[: size + len(marker)], rest[len(marker) :], marker)
        if rest.startswith("{"):
            return self._named(text[:size], text[:size], rest, ARGS)
        if any(marker.startswith(rest) for marker in (ARGS, CALL_ID)):
            return text, False
        return text, True

    def _named(self, name: str, raw: str, rest: str, marker: str) -> tuple[str, bool]:
        self._raw += raw
        self._call = JsonCall(bare=name)
        self._state = self._only if marker == ARGS else self._id
        return rest, False

    def _id(self, text: str, parts: list[Part]) -> tuple[str, bool]:
        """The model's own id of a call, which is not used: one that was made up here cannot come twice."""
        size = 0
        while size < len(text) and text[size].isalnum():
            size += 1
        rest = text[size:]
        if rest.startswith(ARGS) and size <= _LONGEST_NAME:
            self._raw += text[: size + len(ARGS)]
            self._state = self._only
            return rest[len(ARGS) :], False
        return text, size > _LONGEST_NAME or not ARGS.startswith(rest)
