"""Machines that are a formula: what a setting reaches on them is known beforehand, and time is counted."""

from __future__ import annotations

import dataclasses
import itertools
import math
import random
from collections.abc import Callable

from jaxserve.tune.search import GRID, Measured, Settings, Unfit

ALL = [Settings(*sizes) for sizes in itertools.product(*GRID.values())]


def hill(top: Settings) -> Callable[[Settings], float]:
    """Tokens a second, most at `top`, a fifth less for each doubling away from it in any size."""

    def rate(settings: Settings) -> float:
        here, there = dataclasses.astuple(settings), dataclasses.astuple(top)
        away = sum(abs(math.log2(a / b)) for a, b in zip(here, there, strict=True))
        return 1000.0 * 0.8**away

    return rate


def step_seconds(settings: Settings) -> float:
    """A decode step with a chunk: the machine takes 1 ms a slot and 0.5 ms a token of prompt."""
    return 1e-3 * settings.max_slots + 0.5e-3 * settings.prefill_chunk


@dataclasses.dataclass
class Machine:
    """noise: standard deviation of a repeat, as a share. drift: factor on all rates, by the time.
    most_slots: that fit. seconds: of one measurement."""

    rate: Callable[[Settings], float]
    noise: float = 0.0
    seed: int = 0
    drift: Callable[[float], float] = lambda now: 1.0
    most_slots: int = 10**9
    seconds: float = 1.0
    now: float = 0.0
    measured: list[Settings] = dataclasses.field(default_factory=list)

    def __post_init__(self) -> None:
        self._random = random.Random(self.seed)

    def __call__(self, settings: Settings) -> Measured:
        if settings.max_slots > self.most_slots:
            raise Unfit(f"{settings.max_slots} slots need more memory than there is")
        self.measured.append(settings)
        self.now += self.seconds
        truth = self.rate(settings) * self.drift(self.now)
        rates = tuple(truth * self._random.gauss(1.0, self.noise) for _ in range(5))
        return Measured(rates, (step_seconds(settings),) * 5, 0.0, self.seconds)

    def clock(self) -> float:
        return self.now
