"""Takes the names of special tokens out of text that was decoded with them.

Where a marker of calls or reasoning is a special token, a reply must be decoded with all of them.
"""

from __future__ import annotations

from collections.abc import Iterable


class Hidden:
    """Text without any of `names`, as it comes in pieces."""

    def __init__(self, names: Iterable[str]) -> None:
        self._names = tuple(sorted(filter(None, names), key=len, reverse=True))  # the longest that fits
        self._first = {name[0] for name in self._names}
        self._longest = max(map(len, self._names), default=0)
        self._held = ""

    def push(self, text: str) -> str:
        return self._take(text, more=True)

    def flush(self) -> str:
        """What was held back, now that no more text comes."""
        return self._take("", more=False)

    def _take(self, text: str, *, more: bool) -> str:
        text, self._held = self._held + text, ""
        if not any(character in text for character in self._first):
            return text
        kept: list[str] = []
        done = place = 0
        while place < len(text):
            if text[place] in self._first:
                rest = text[place : place + self._longest]
                if more and any(name.startswith(rest) and name != rest for name in self._names):
                    kept.append(text[done:place])
                    self._held = text[place:]
                    return "".join(kept)
                if text.startswith(self._names, place):
                    name = next(name for name in self._names if text.startswith(name, place))
                    kept.append(text[done:place])
                    done = place = place + len(name)
                    continue
            place += 1
        kept.append(text[done:])
        return "".join(kept)
