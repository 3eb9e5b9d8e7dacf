"""Text with calls that a marker opens: what the families' readers share."""

from __future__ import annotations

from jaxserve.text.tools.json_call import SPACE
from jaxserve.text.tools.parts import Part, Said
from jaxserve.text.tools.search import Search


class Marked:
    """Text up to the next `opening`; what follows it is a call's, until that says that it has ended.

    White space around a call belongs to it. No part of a marker goes out, unless what follows it is no call:
    then all of it is text. `_enter`, `_inside` and `_given_back` are the family's.
    """

    def __init__(self, opening: str) -> None:
        self._search = Search(opening)
        self._in_call = False
        self._after_call = False  # nothing but white space has come since a call
        self._space = ""  # before the call
        self._held = ""  # text within a call that decides nothing yet

    def push(self, text: str) -> list[Part]:
        parts: list[Part] = []
        while text:
            if not self._in_call:
                sure, rest = self._search.push(text)
                self._say(sure, parts)
                if rest is None:
                    break
                self._space = self._search.space()
                self._in_call = True
                self._enter()
                text = rest
                continue
            text, ended = self._inside(self._held + text, parts)
            self._held = ""
            if ended:
                self._leave(parts)
            else:
                self._held = text
                break
        return parts

    def finish(self) -> list[Part]:
        parts: list[Part] = []
        if self._in_call:
            held, self._held = self._held, ""
            self._leave(parts, held)
        self._say(self._search.flush(), parts)
        return parts

    # --- the family's ---

    def _enter(self) -> None:
        """The opening marker has come."""
        raise NotImplementedError

    def _inside(self, text: str, parts: list[Part]) -> tuple[str, bool]:
        """Takes in text after the marker: what is left of it, and whether the call has ended.

        What is left of a call that has not ended is given again, with more.
        """
        raise NotImplementedError

    def _given_back(self) -> str:
        """What was taken for a call and is none, with its marker; "" if there was a call."""
        raise NotImplementedError

    # --- inside ---

    def _say(self, text: str, parts: list[Part]) -> None:
        if self._after_call:
            text = text.lstrip(SPACE)
        if text:
            self._after_call = False
            parts.append(Said(text))

    def _leave(self, parts: list[Part], held: str = "") -> None:
        self._in_call = False
        back = self._given_back()
        if back:
            self._say(self._space + back + held, parts)
        else:
            self._after_call = True
