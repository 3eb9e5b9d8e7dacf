"""The search on machines that are a formula: it finds the best, stays within its time, and buys no noise."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from jaxserve.tune.search import GAP_FACTOR, Measured, Objective, Result, Search, Settings, Unfit, wins
from tests.tune.surfaces import ALL, Machine, hill, step_seconds

START = Settings(16, 512, 64)
SMALLEST = Settings(4, 32, 64)


def search(machine: Machine, objective: Objective = "throughput", **how: Any) -> Result:
    how = {"start": START, "seconds": 1e6} | how
    return Search(machine, objective, how.pop("start"), clock=machine.clock, **how).run()


@pytest.mark.parametrize(
    "top",
    [START, Settings(64, 512, 64), Settings(4, 32, 16), Settings(512, 8192, 256), Settings(32, 128, 128)],
    ids=str,
)
def test_the_most_tokens_a_second(top: Settings) -> None:
    machine = Machine(hill(top))
    result = search(machine)
    assert result.best == top == max(ALL, key=machine.rate)
    assert result.confirmed is (None if top == START else True)
    assert not result.untried
    assert len(machine.measured) <= len(set(machine.measured)) + 2 < len(ALL) / 5


def test_the_best_and_the_start_are_measured_again_one_after_the_other() -> None:
    machine = Machine(hill(Settings(64, 256, 32)))
    result = search(machine)
    assert machine.measured[-2:] == [START, result.best]
    assert result.best is not None
    assert result.last(START) is result.trials[-2].measured
    assert result.last(result.best) is result.trials[-1].measured
    assert [trial.settings for trial in result.trials] == machine.measured


@pytest.mark.parametrize("seed", range(20))
def test_noise_does_not_hide_the_best(seed: int) -> None:
    """Repeats 3 % apart, neighbours 20 %."""
    top = Settings(128, 128, 32)
    assert search(Machine(hill(top), noise=0.03, seed=seed)).best == top


def test_noise_is_not_bought() -> None:
    """All settings alike, repeats 5 % apart: the start stays, but for the odd case in which another one comes
    out before it twice."""
    kept = [search(Machine(lambda s: 1000.0, noise=0.05, seed=seed)).best == START for seed in range(200)]
    assert sum(kept) >= 190


def test_a_load_that_ends_meanwhile_is_not_mistaken_for_a_better_setting() -> None:
    """From 3 s on the machine is twice as fast: what is measured then looks better, until the start is
    measured again beside it."""
    machine = Machine(lambda s: 1000.0, drift=lambda now: 1.0 if now < 3 else 2.0)
    result = search(machine)
    assert result.confirmed is False and result.best == START
    machine = Machine(hill(Settings(64, 512, 64)), drift=lambda now: 1.0 if now < 3 else 2.0)
    assert search(machine).best == Settings(64, 512, 64)


def test_in_doubt_both_are_measured_again() -> None:
    """32 slots seem better, but their repeats lie among the start's; at the second look they do not."""
    more = dataclasses.replace(START, max_slots=32)
    rates = {START: 1000.0, more: 1200.0}
    sure = Machine(lambda s: rates.get(s, 700.0))

    def unsure(settings: Settings) -> Measured:
        measured = sure(settings)
        if len(sure.measured) > 2 or settings not in rates:
            return measured
        spread = tuple(rates[settings] + 100.0 * i for i in (-2, -1, 0, 1, 2))
        return dataclasses.replace(measured, rates=spread)

    said: list[str] = []
    result = Search(unsure, "throughput", START, seconds=1e6, clock=sure.clock, say=said.append).run()
    assert sure.measured[:4] == [START, more, START, more]
    assert "throughput: perhaps better; both once more" in said
    assert result.best == more and result.confirmed


@pytest.mark.parametrize("really", [True, False])
def test_in_doubt_at_the_end_too(really: bool) -> None:
    """The first confirmation is blurred; the second says that 32 slots are better, or no better."""
    sure = Machine(hill(dataclasses.replace(START, max_slots=32)))
    once = len(search(Machine(sure.rate)).trials) - 2

    def unsure(settings: Settings) -> Measured:
        measured = sure(settings)
        if len(sure.measured) <= once:
            return measured
        if len(sure.measured) <= once + 2:
            spread = tuple(measured.rate + 150.0 * i for i in (-2, -1, 0, 1, 2))
            return dataclasses.replace(measured, rates=spread)
        return measured if really else dataclasses.replace(measured, rates=(1000.0,) * 5)

    result = Search(unsure, "throughput", START, seconds=1e6, clock=sure.clock).run()
    assert len(sure.measured) == once + 4
    assert result.confirmed is really and (result.best == START) is not really


def test_less_than_two_percent_is_not_worth_it() -> None:
    rates = {START: 1000.0, dataclasses.replace(START, max_slots=32): 1015.0}
    assert search(Machine(lambda s: rates.get(s, 900.0))).best == START
    rates[dataclasses.replace(START, max_slots=32)] = 1025.0
    assert search(Machine(lambda s: rates.get(s, 900.0))).best == Settings(32, 512, 64)


@pytest.mark.parametrize(
    ("new", "old", "better"),
    [
        ((110, 111, 112, 113, 114), (100, 101, 102, 103, 104), True),
        ((50, 111, 112, 113, 114), (100, 101, 102, 103, 104), False),  # 20 of 25 pairs
        ((101, 111, 112, 113, 114), (100, 101, 102, 103, 104), True),  # 21
        ((110, 111, 112, 113, 114), (100, 101, 102, 103, 140), False),  # 20
        ((103.5, 103.6, 103.7, 103.8, 104), (100, 101, 102, 103, 103), False),  # apart, but less than 2 %
        ((90, 91, 92, 93, 94), (100, 101, 102, 103, 104), False),
    ],
)
def test_what_wins(new: tuple[float, ...], old: tuple[float, ...], better: bool) -> None:
    assert wins(Measured(new, (1.0,), 0.0, 1.0), Measured(old, (1.0,), 0.0, 1.0)) is better


def test_latency_takes_the_most_within_the_bound() -> None:
    """Given: 80 ms, so 16 slots with 128 tokens (80 ms), or 32 with 64 (64 ms)."""
    machine = Machine(hill(Settings(512, 8192, 64)))
    start = Settings(16, 128, 64)
    result = search(machine, "latency", start=start, max_gap=0.0801)
    within = [settings for settings in ALL if step_seconds(settings) <= 0.0801]
    assert result.best in within and result.best == start
    assert result.max_gap == 0.0801
    wide = search(Machine(hill(Settings(512, 8192, 64))), "latency", start=start, max_gap=0.130)
    assert wide.best == Settings(64, 128, 64)  # 128 ms: a slot's millisecond comes before a chunk's


def test_latency_by_itself_takes_a_multiple_of_the_smallest_settings_gap() -> None:
    machine = Machine(hill(Settings(512, 32, 64)))
    result = search(machine, "latency", start=Settings(16, 128, 64))
    assert machine.measured[0] == SMALLEST
    assert result.max_gap == pytest.approx(GAP_FACTOR * step_seconds(SMALLEST))  # 60 ms
    # the start's 80 ms are too many: it begins with the smallest
    assert result.base == SMALLEST
    assert result.best == Settings(32, 32, 64)  # 48 ms, and 64 slots would be 80


def test_no_setting_within_the_bound_is_an_answer_too() -> None:
    machine = Machine(hill(START))
    result = search(machine, "latency", max_gap=1e-6)
    assert result.best is None
    assert machine.measured == [START, SMALLEST]


def test_what_does_not_fit_is_skipped_with_its_reason() -> None:
    machine = Machine(hill(Settings(128, 512, 64)), most_slots=32)
    result = search(machine)
    assert result.best == Settings(32, 512, 64)
    [skipped] = [trial for trial in result.trials if trial.measured is None]
    assert skipped.settings == Settings(64, 512, 64)
    assert skipped.skipped == "64 slots need more memory than there is"


def test_a_start_that_does_not_fit_gives_way_to_the_smallest() -> None:
    result = search(Machine(hill(Settings(8, 64, 64)), most_slots=8))
    assert (result.base, result.best) == (SMALLEST, Settings(8, 64, 64))


def test_nothing_fits() -> None:
    with pytest.raises(Unfit, match="16 slots need more memory"):
        search(Machine(hill(START), most_slots=3))
    with pytest.raises(Unfit, match="4 slots need more memory"):
        search(Machine(hill(START), most_slots=3), "latency")


@pytest.mark.parametrize("seconds", [1, 5, 9, 14])
def test_it_ends_in_time_and_says_what_it_did_not_try(seconds: float) -> None:
    machine = Machine(hill(Settings(512, 8192, 256)))
    said: list[str] = []
    result = search(machine, seconds=seconds, say=said.append)
    assert machine.now <= seconds + 2 * machine.seconds
    assert result.untried and not set(result.untried) & set(machine.measured)
    assert result.best in machine.measured
    assert result.best is not None
    best = dataclasses.astuple(result.best)
    for one in result.untried:  # what comes next: one size changed
        assert sum(a != b for a, b in zip(dataclasses.astuple(one), best, strict=True)) == 1
    assert len(said) >= len(machine.measured)


def test_with_time_for_one_only_the_start_is_measured() -> None:
    machine = Machine(hill(Settings(512, 8192, 256)), seconds=100.0)
    result = search(machine, seconds=60.0)
    assert machine.measured == [START] and result.best == START and len(result.untried) == 6
