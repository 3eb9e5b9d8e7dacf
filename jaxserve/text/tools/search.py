"""A marker in text that comes in pieces."""

from __future__ import annotations

from jaxserve.text.tools.json_call import SPACE


class Search:
    """Text up to a marker. Held back is what may be the marker's start, and white space before that."""

    def __init__(self, marker: str) -> None:
        self._marker = marker
        self._blank: list[str] = []
        self._tail = ""

    def push(self, text: str) -> tuple[str, str | None]:
        """What certainly lies before the marker and the white space before that; and what follows the marker,
        None if it has not come. `space` then gives the white space."""
        text = self._tail + text
        start = text.find(self._marker)
        found = start >= 0
        body = text[: start if found else _open(text, self._marker)]
        self._tail = "" if found else text[len(body) :]
        kept = body.rstrip(SPACE)
        sure = "".join((*self._blank, kept)) if kept else ""
        if kept:
            self._blank = []
        self._blank.append(body[len(kept) :])
        return sure, text[start + len(self._marker) :] if found else None

    def space(self) -> str:
        """The white space that was held back, once."""
        blank, self._blank = "".join(self._blank), []
        return blank

    def flush(self) -> str:
        """All that was held back: the marker does not come."""
        tail, self._tail = self._tail, ""
        return self.space() + tail


def _open(text: str, marker: str) -> int:
    """Where the longest end of `text` that begins `marker` starts; len(text) if there is none."""
    for size in range(min(len(marker) - 1, len(text)), 0, -1):
        if marker.startswith(text[-size:]):
            return len(text) - size
    return len(text)
