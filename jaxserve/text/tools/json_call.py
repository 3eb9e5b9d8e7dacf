"""A call written as JSON, read while it comes: {"name": "f", "arguments": {…}}.

Not a JSON parser: strings and brackets are followed, what lies between them goes on as the model wrote it.
"""

from __future__ import annotations

import json
from collections.abc import Container

from jaxserve.text.tools.parts import Argued, Called, Part

SPACE = " \t\r\n"
_SCALAR = "-0123456789tfn"


class JsonValue:
    """Finds a JSON value's end."""

    def __init__(self) -> None:
        self._depth = 0
        self._in_string = False
        self._escaped = False
        self._scalar = False
        self._begun = False

    def push(self, text: str, start: int) -> tuple[int, bool]:
        """Where the value ends in `text`, which it goes on or begins in at `start`, and whether it does end:
        otherwise that is the text's end. Raises ValueError for what begins no value."""
        for place in range(start, len(text)):
            character = text[place]
            if self._in_string:
                if self._escaped:
                    self._escaped = False
                elif character == "\\":
                    self._escaped = True
                elif character == '"':
                    self._in_string = False
                    if not self._depth:
                        return place + 1, True
            elif self._scalar:
                if character in ",}]" or character in SPACE:
                    return place, True
            elif character == '"':
                self._in_string = self._begun = True
            elif character in "{[":
                self._depth += 1
                self._begun = True
            elif character in "}]" and self._depth:
                self._depth -= 1
                if not self._depth:
                    return place + 1, True
            elif not self._begun:
                if character not in _SCALAR:
                    raise ValueError(f"{character!r} begins no JSON value")
                self._scalar = self._begun = True
        return len(text), False


class JsonCall:
    """One call's object.

    names: what may be called; None, anything. bare: the text is the arguments alone, of a call of this name.
    done: the object's end has come. failed: this is no call. begun: it was announced.
    """

    def __init__(self, names: Container[str] | None = None, *, bare: str | None = None) -> None:
        self.done = False
        self.failed = False
        self.begun = False
        self._raw: list[str] = []
        self._names = names
        self._state = "start" if bare is None else "value"
        self._key = "" if bare is None else "arguments"
        self._bare = bare is not None
        self._name = bare
        self._value = JsonValue()
        self._text: list[str] = []  # of the value or key that is being read, where it is needed whole
        self._arguments: str | None = None  # that came before the name
        self._streams = False  # the value goes out as it comes

    @property
    def raw(self) -> str:
        """What was taken for a call; "" once it was announced as one."""
        return "" if self.begun else "".join(self._raw)

    def push(self, text: str) -> tuple[list[Part], str]:
        """The parts that `text` adds, and what of it comes after the object, or is no part of a call."""
        parts: list[Part] = []
        place = 0
        while place < len(text) and not (self.done or self.failed):
            place = self._step(text, place, parts)
        if not self.begun:
            self._raw.append(text[:place])
        return parts, text[place:]

    def _step(self, text: str, place: int, parts: list[Part]) -> int:
        """Takes in some of the text from `place` on; returns where it stopped."""
        if self._state in ("key", "value"):
            return self._read(text, place, parts)
        character = text[place]
        if character in SPACE:
            return place + 1
        match self._state, character:
            case ("start", "{") | ("after", ","):
                self._state = "before key"
            case "before key", '"':
                self._state, self._value, self._text = "key", JsonValue(), []
                return place
            case "colon", ":":
                self._state, self._value, self._text = "value", JsonValue(), []
            case ("after", "}") | ("before key", "}"):
                self._end(parts)
            case _:
                self._fail()
                return place
        return place if self.failed else place + 1

    def _read(self, text: str, place: int, parts: list[Part]) -> int:
        if not self._text and not self._streams and text[place] in SPACE:
            return place + 1
        try:
            end, ended = self._value.push(text, place)
        except ValueError:
            self._fail()
            return place
        piece = text[place:end]
        if not self._text and not self._streams and self._state == "value":
            # an object goes out as it comes, once the name is known
            named = self._name is not None and self._key in ("arguments", "parameters")
            if named and not self.begun and piece[0] == "{":
                self._announce(parts)
                self._streams = True
        if self._streams:
            parts.append(Argued(piece))
        else:
            self._text.append(piece)
        if ended:
            self._take(parts)
        return place if self.failed else end

    def _take(self, parts: list[Part]) -> None:
        """A key or a value is complete."""
        text, self._text = "".join(self._text), []
        if self._state == "key":
            key = _string(text)
            if key is None:
                self._fail()
                return
            self._key, self._state = key, "colon"
        else:
            self._state = "after"
            if self._streams:
                self._streams = False
            elif self._key == "name" and not self.begun:
                self._name = _string(text)
                if self._name is None or (self._names is not None and self._name not in self._names):
                    self._fail()
            elif self._key in ("arguments", "parameters") and not self.begun:
                self._arguments = _arguments(text)
            if self._bare:
                self._end(parts)

    def _announce(self, parts: list[Part]) -> None:
        assert self._name is not None
        parts.append(Called(self._name))
        self.begun = True
        self._raw = []

    def _end(self, parts: list[Part]) -> None:
        if not self.begun:
            # without markers around it, an object with a name alone is somebody's data
            if self._name is None or (self._arguments is None and self._names is not None):
                self._fail()
                return
            self._announce(parts)
            parts.append(Argued(self._arguments or "{}"))
        self.done = True

    def _fail(self) -> None:
        """A call that was announced ends where it goes wrong: models forget the last brace."""
        if self.begun:
            self.done = True
        else:
            self.failed = True


def _string(text: str) -> str | None:
    """The JSON string's value, None if it is none."""
    try:
        value = json.loads(text, strict=False)
    except ValueError:
        return None
    return value if isinstance(value, str) else None


def _arguments(text: str) -> str:
    """A value that is no object on its way: some models write the object's text, or null for none."""
    inner = _string(text)
    if inner is not None:
        return inner
    return "{}" if text == "null" else text
