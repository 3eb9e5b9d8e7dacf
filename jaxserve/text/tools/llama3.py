"""Calls as Llama 3.1 and later write them: the whole reply is one, or several with semicolons between them.

    {"name": "f", "parameters": {"x": 1}}

`<|python_tag|>` may come before it. Source: Meta's "Llama 3.1, prompt formats", "JSON based tool calling",
and the chat template of Llama-3.1-8B-Instruct.
"""

from __future__ import annotations

from collections.abc import Container

from jaxserve.text.tools.json_call import SPACE, JsonCall
from jaxserve.text.tools.parts import Part, Said

TAG = "<|python_tag|>"
_BETWEEN = SPACE + ";"


class Llama3:
    """names: the tools there are. An object that names none of them is text: nothing marks it as a call."""

    def __init__(self, names: Container[str]) -> None:
        self._names = names
        self._call: JsonCall | None = None
        self._plain = False  # the rest is text
        self._raw: list[str] = []  # what came before an object that may be a call
        self._held = ""  # perhaps a part of the tag
        self._called = False

    def push(self, text: str) -> list[Part]:
        parts: list[Part] = []
        text, self._held = self._held + text, ""
        while text:
            if self._plain:
                parts.append(Said(text))
                break
            if self._call is not None:
                text = self._inside(self._call, text, parts)
                continue
            rest = text.lstrip(_BETWEEN if self._called else SPACE)
            self._raw.append(text[: len(text) - len(rest)])
            if rest.startswith(TAG):
                self._raw.append(TAG)
                text = rest[len(TAG) :]
            elif rest.startswith("{"):
                self._call, text = JsonCall(self._names), rest
            elif TAG.startswith(rest):
                self._held, text = rest, ""
            else:
                text = self._give_back(rest)
        return parts

    def finish(self) -> list[Part]:
        if self._call is not None and self._call.begun:
            return []
        text = self._give_back(("" if self._call is None else self._call.raw) + self._held)
        return [Said(text)] if text and not (self._called and not text.strip(_BETWEEN)) else []

    def _inside(self, call: JsonCall, text: str, parts: list[Part]) -> str:
        more, text = call.push(text)
        parts += more
        if call.done:
            self._call, self._called, self._raw = None, True, []
        elif call.failed:
            self._call = None
            return self._give_back(call.raw + text)
        return text

    def _give_back(self, text: str) -> str:
        """`text` with all that came before it: from here on everything is text."""
        before = "".join(self._raw)
        self._raw, self._plain, self._held, self._call = [], True, "", None
        return (before.lstrip(SPACE) if self._called else before) + text
