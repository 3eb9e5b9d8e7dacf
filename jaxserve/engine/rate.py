"""How fast sequences end while there is work, to tell a client that is refused when to come back."""

from __future__ import annotations

import collections
import math


class Rate:
    WINDOW = 32  # sequences
    MOST = 120  # seconds

    def __init__(self) -> None:
        self._ends: collections.deque[float] = collections.deque(maxlen=self.WINDOW)

    def ended(self, busy: float) -> None:
        """busy: seconds of work so far."""
        self._ends.append(busy)

    def seconds_for(self, sequences: int) -> int:
        """Whole seconds, 1 .. MOST, in which so many end at the present rate; 1 while nothing is known."""
        if len(self._ends) < 2:
            return 1
        each = (self._ends[-1] - self._ends[0]) / (len(self._ends) - 1)
        return max(1, min(self.MOST, math.ceil(sequences * each)))
