"""Stop strings over text that arrives in pieces: none of their characters is ever emitted.

Knows nothing of tokens; one `StopStrings` per sequence, fed by its detokeniser.
"""

from __future__ import annotations


class StopStrings:
    """Finds the stop string that completes first; of those that complete together, the longest.

    What is emitted and what stops does not depend on how the text was cut into pieces. Held back at any time
    is the longest end of the text that could still become a stop string.
    """

    def __init__(self, stop: tuple[str, ...]) -> None:
        if not all(stop):
            raise ValueError(f"{stop=} must hold non-empty strings")
        self._stop = stop
        self._held = ""
        self._stopped: str | None = None

    def push(self, text: str) -> tuple[str, str | None]:
        """What can be emitted now, and the stop string once one is complete; nothing is emitted after it."""
        if not self._stop:
            return text, None
        if self._stopped is not None:
            return "", self._stopped
        text = self._held + text
        start, self._stopped = self._first_match(text)
        if self._stopped is None:
            start = self._first_prefix(text)
            self._held = text[start:]
        else:
            self._held = ""
        return text[:start], self._stopped

    def flush(self) -> str:
        """What was held back, now that no more text comes."""
        held, self._held = self._held, ""
        return held

    def _first_match(self, text: str) -> tuple[int, str | None]:
        """Where the first complete stop string begins, and which it is."""
        found: tuple[int, int, str] | None = None
        for stop in self._stop:
            start = text.find(stop)
            if start >= 0 and (found is None or (start + len(stop), start) < found[:2]):
                found = start + len(stop), start, stop
        return (0, None) if found is None else found[1:]

    def _first_prefix(self, text: str) -> int:
        """Where the longest end of `text` that begins some stop string starts; len(text) if there is none."""
        first = len(text)
        for stop in self._stop:
            start = text.find(stop[0], max(0, len(text) - len(stop) + 1))
            while 0 <= start < first:
                if stop.startswith(text[start:]):
                    first = start
                else:
                    start = text.find(stop[0], start + 1)
        return first
