"""The search: coordinate descent over powers of two, in which a change must win by more than the noise.

It knows nothing of engines: `measure(settings)` says what a setting reaches, or raises Unfit with the
reason. Repeats within a measurement say how far apart the same setting's figures lie; a load that comes or
goes between two measurements they do not see, which is why the winner and where the search began are both
measured once more, one after the other, before the winner is believed.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Literal

Objective = Literal["throughput", "latency"]

GRID: Mapping[str, Sequence[int]] = {
    "max_slots": [2**n for n in range(2, 10)],
    "prefill_chunk": [2**n for n in range(5, 14)],
    "page_size": [2**n for n in range(4, 9)],
}
MIN_GAIN = 1.02  # less is not worth another setting
QUANTILE = 1.645  # of the normal distribution: one in twenty lies beyond
GAP_FACTOR = 3.0  # times the gap of the fewest slots and the smallest chunk


@dataclasses.dataclass(frozen=True, slots=True)
class Settings:
    """max_slots: sequences that decode together; prefill_chunk: prompt tokens between two decode steps;
    page_size: tokens per KV page."""

    max_slots: int
    prefill_chunk: int
    page_size: int

    def __str__(self) -> str:
        """As flags."""
        return " ".join(
            f"--{name.replace('_', '-')} {value}" for name, value in dataclasses.asdict(self).items()
        )


class Unfit(Exception):
    """A setting that this model cannot run with here; the message says why."""


@dataclasses.dataclass(frozen=True, slots=True)
class Measured:
    """rates: generated tokens a second, each repeat's. gaps: seconds of a decode step with a whole chunk of
    prompt, likewise. start, seconds: what starting the engine took, and what measuring took then."""

    rates: tuple[float, ...]
    gaps: tuple[float, ...]
    start: float
    seconds: float

    @property
    def rate(self) -> float:
        return statistics.median(self.rates)

    @property
    def gap(self) -> float:
        return statistics.median(self.gaps)


@dataclasses.dataclass(frozen=True, slots=True)
class Trial:
    """A setting and what it reached, or why it was skipped."""

    settings: Settings
    measured: Measured | None
    skipped: str | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class Result:
    """best: None where no setting that was tried keeps within `max_gap`.
    base: where the search began: the defaults, or the fewest slots and smallest chunk where those do not fit.
    trials: in the order in which they ran, those that were measured again included.
    untried: what would have come next, had there been time. max_gap: seconds, for latency.
    confirmed: whether `best` won over `base` the second time, too; None where it is `base`."""

    best: Settings | None
    base: Settings
    trials: list[Trial]
    untried: list[Settings]
    max_gap: float | None
    confirmed: bool | None

    def last(self, settings: Settings) -> Measured | None:
        """As it was measured last: where `confirmed` is not None, `base` and `best` one after the other."""
        runs = [trial.measured for trial in self.trials if trial.settings == settings]
        return runs[-1] if runs else None


def _together(trials: Sequence[Trial], settings: Settings) -> Measured:
    """All repeats of a setting; none where it was skipped."""
    runs = [t.measured for t in trials if t.settings == settings and t.measured is not None]
    return Measured(
        rates=tuple(rate for run in runs for rate in run.rates),
        gaps=tuple(gap for run in runs for gap in run.gaps),
        start=sum(run.start for run in runs),
        seconds=sum(run.seconds for run in runs),
    )


def wins(new: Measured, old: Measured) -> bool:
    """By MIN_GAIN in the median, and in so many of all pairs of repeats as only one in twenty would be where
    both are alike (Mann and Whitney's test): 21 of 25 for five repeats each. What something else slowed down
    once decides nothing."""
    faster = sum(a > b for a in new.rates for b in old.rates)
    m, n = len(new.rates), len(old.rates)
    needed = m * n / 2 + QUANTILE * math.sqrt(m * n * (m + n + 1) / 12)
    return faster >= needed and _seems_better(new, old)


def _seems_better(new: Measured, old: Measured) -> bool:
    return new.rate >= MIN_GAIN * old.rate


class Search:
    """For `throughput` the most tokens a second; for `latency` the most among settings whose gap is at most
    `max_gap`.

    start: where to begin. seconds: after which nothing new is begun; the last setting may take longer.
    max_gap: seconds; None takes GAP_FACTOR times the gap of the fewest slots and the smallest chunk.
    """

    def __init__(
        self,
        measure: Callable[[Settings], Measured],
        objective: Objective,
        start: Settings,
        *,
        seconds: float,
        max_gap: float | None = None,
        grid: Mapping[str, Sequence[int]] = GRID,
        clock: Callable[[], float] = time.monotonic,
        say: Callable[[str], None] = lambda line: None,
    ) -> None:
        self._measure = measure
        self._objective = objective
        self._start = start
        self._seconds = seconds
        self._max_gap = max_gap if objective == "latency" else None
        self._grid = grid
        self._clock = clock
        self._say = say
        self._trials: list[Trial] = []
        self._first: dict[Settings, Measured | None] = {}  # by setting, as it was measured first

    def run(self) -> Result:
        """Raises Unfit, with the reason of `start`, where not even the smallest setting can run."""
        begin = self._clock()
        smallest = dataclasses.replace(
            self._start, **{name: self._grid[name][0] for name in ("max_slots", "prefill_chunk")}
        )
        if self._objective == "latency" and self._max_gap is None:
            least = self._try(smallest)
            if least is None:
                raise Unfit(self._trials[-1].skipped)
            self._max_gap = GAP_FACTOR * least.gap
            self._say(
                f"latency: gaps of at most {1e3 * self._max_gap:.1f} ms,"
                f" {GAP_FACTOR:g} times those of {smallest}"
            )
        base = next((one for one in (self._start, smallest) if self._fits(one)), None)
        if base is None:
            if not any(self._first.values()):
                raise Unfit(self._trials[0].skipped)
            return Result(None, self._start, self._trials, [], self._max_gap, None)
        best, out_of_time = self._descend(base, lambda: self._clock() - begin)
        confirmed = None if best == base else self._confirm(best, base)
        return Result(
            best=base if confirmed is False else best,
            base=base,
            trials=self._trials,
            untried=self._neighbours(best) if out_of_time else [],
            max_gap=self._max_gap,
            confirmed=confirmed,
        )

    def _descend(self, best: Settings, elapsed: Callable[[], float]) -> tuple[Settings, bool]:
        """(the best setting, whether there was no time to look further)"""
        base = best

        def time_left() -> bool:
            """For what has to be measured once more at the end, too: then nothing has to be compiled."""
            again = sum(measured.seconds for one in (base, best) if (measured := self._first[one]))
            return elapsed() + again < self._seconds

        moved = True
        while moved:
            moved = False
            for name in self._grid:
                for step in (1, -1):
                    went = False
                    while (one := self._neighbour(best, name, step)) is not None and one not in self._first:
                        if not time_left():
                            return best, True
                        if not (self._fits(one) and self._beats(one, best, time_left)):
                            break
                        best, went, moved = one, True, True
                    if went:
                        break  # downhill on the other side
        return best, False

    def _confirm(self, best: Settings, base: Settings) -> bool:
        """Both once more, so that a load that came or went meanwhile decides nothing; in doubt, twice."""
        before, won = len(self._trials), False
        for _ in range(2):
            self._say(f"{self._objective}: once more, where it began and the best")
            if self._run(base) is None or self._run(best) is None:
                return False
            now = self._trials[before:]
            new, old = _together(now, best), _together(now, base)
            won = wins(new, old)
            if won or not _seems_better(new, old):
                break
        return won and self._within(best)

    def _beats(self, new: Settings, old: Settings, time_left: Callable[[], bool]) -> bool:
        """In doubt both are measured once more, and all of their repeats count."""
        first = _together(self._trials, new), _together(self._trials, old)
        if wins(*first) or not _seems_better(*first) or not time_left():
            return wins(*first)
        self._say(f"{self._objective}: perhaps better; both once more")
        if self._run(old) is None or self._run(new) is None:
            return False
        return wins(_together(self._trials, new), _together(self._trials, old)) and self._within(new)

    def _fits(self, settings: Settings) -> bool:
        """It runs, and keeps within the longest gap."""
        return self._try(settings) is not None and self._within(settings)

    def _within(self, settings: Settings) -> bool:
        return self._max_gap is None or _together(self._trials, settings).gap <= self._max_gap

    def _try(self, settings: Settings) -> Measured | None:
        """As measured first; None for one that was skipped."""
        if settings not in self._first:
            self._first[settings] = self._run(settings)
        return self._first[settings]

    def _run(self, settings: Settings) -> Measured | None:
        try:
            measured = self._measure(settings)
        except Unfit as reason:
            self._trials.append(Trial(settings, None, str(reason)))
            self._say(f"{self._objective}: {settings}: skipped, {reason}")
            return None
        self._trials.append(Trial(settings, measured))
        self._say(
            f"{self._objective}: {settings}: {measured.rate:,.0f} tokens/s ({min(measured.rates):,.0f} to"
            f" {max(measured.rates):,.0f}), gap {1e3 * measured.gap:.1f} ms;"
            f" started in {measured.start:.1f} s, measured in {measured.seconds:.1f} s"
        )
        return measured

    def _neighbour(self, settings: Settings, name: str, step: int) -> Settings | None:
        """The next value of one setting; None beyond the grid's end."""
        value = getattr(settings, name)
        further = [one for one in self._grid[name] if (one > value) == (step > 0) and one != value]
        if not further:
            return None
        return dataclasses.replace(settings, **{name: min(further) if step > 0 else max(further)})

    def _neighbours(self, settings: Settings) -> list[Settings]:
        """Those that were not tried."""
        around = [self._neighbour(settings, name, step) for name in self._grid for step in (1, -1)]
        return [one for one in around if one is not None and one not in self._first]
