"""Which jobs are at work: a bounded number, their places given out key by key.

A key with few places comes before one with many, whoever was first; when all places are taken, a job of the
key that has the most gives up its own. Jobs of one key run in the order in which they were made. Knows
nothing of what a job does.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Collection, Sequence

SLICE_SECONDS = 60.0  # a place is kept at least so long from a key that has one less


@dataclasses.dataclass(frozen=True, slots=True)
class Place:
    """since: seconds, on the clock that `Turns` is given."""

    job: str
    tenant: bytes
    since: float
    leaving: bool = False


class Turns:
    def __init__(self, places: int) -> None:
        self.places = places
        self._last: dict[bytes, float] = {}  # when a key was last given a place

    def begin(self, waiting: Sequence[tuple[str, bytes]], taken: Collection[Place], now: float) -> list[str]:
        """The jobs to begin now. waiting: (job, tenant), the oldest first."""
        held = collections.Counter(place.tenant for place in taken)
        left, begun = list(waiting), list[str]()
        while left and len(taken) + len(begun) < self.places:
            job = self._next(left, held)
            left.remove(job)
            begun.append(job[0])
            held[job[1]] += 1
            self._last[job[1]] = now
        present = {tenant for _, tenant in waiting} | held.keys()
        self._last = {tenant: last for tenant, last in self._last.items() if tenant in present}
        return begun

    def leave(self, waiting: Sequence[tuple[str, bytes]], taken: Collection[Place], now: float) -> str | None:
        """The job that is to give its place to one of `waiting`, for which there is none. One at a time."""
        if not waiting or len(taken) < self.places or any(place.leaving for place in taken):
            return None
        held = collections.Counter(place.tenant for place in taken)
        _, tenant = self._next(waiting, held)
        last = max(taken, key=lambda place: (held[place.tenant], now - place.since))
        ahead = held[last.tenant] - held[tenant]
        return last.job if ahead > 1 or (ahead == 1 and now - last.since >= SLICE_SECONDS) else None

    def _next(
        self, waiting: Sequence[tuple[str, bytes]], held: collections.Counter[bytes]
    ) -> tuple[str, bytes]:
        return min(waiting, key=lambda job: (held[job[1]], self._last.get(job[1], 0.0)))
