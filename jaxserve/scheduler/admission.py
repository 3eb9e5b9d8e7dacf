"""Who waits, and whether the pages suffice for one sequence more.

The estimate runs the future in ticks of `page_size` decode steps. In each, every running sequence grows by a
page, and at its limit it gives all its pages back. The most that are in use at any tick, with the newcomer,
must fit the pool. Summing up what everybody may come to hold would ask for the peaks of all at the same time;
short sequences that end before long ones have grown make room in the simulation, not in the sum.

Each rounding is upwards, a sequence's pages count until its last token was surely read back, and a prompt's
pages count from the start though they are taken chunk by chunk. It remains an estimate: a prompt may be
computed later than thought. `preemption.py` says what happens then.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence as Seq

import numpy as np
from numpy.typing import NDArray

from jaxserve.scheduler.heap import RemovableHeap
from jaxserve.scheduler.pages import PageAllocator
from jaxserve.scheduler.preemption import promoted
from jaxserve.scheduler.slots import Slots
from jaxserve.scheduler.types import Sequence, Tier


class WaitingQueue:
    """Sequences that hold nothing, by rank; a heap for each tier.

    A batch sequence that is not done `batch_patience` seconds after it came moves to the online heap, for
    good: one at a time, so that it gets done and a long queue of them does not take online work's place.
    """

    def __init__(self, batch_patience: float) -> None:
        self._patience = batch_patience
        self._heaps: dict[Tier, RemovableHeap[Sequence]] = {tier: RemovableHeap() for tier in Tier}
        self._since: RemovableHeap[Sequence] = RemovableHeap()  # of batch: by arrival
        self._promoted: Sequence | None = None

    def __len__(self) -> int:
        return sum(map(len, self._heaps.values()))

    def __contains__(self, sequence: object) -> bool:
        return any(sequence in heap for heap in self._heaps.values())

    def all(self) -> list[Sequence]:
        """In no particular order."""
        return [sequence for heap in self._heaps.values() for sequence in heap]

    def push(self, sequence: Sequence) -> None:
        if sequence.rank[0]:
            self._heaps[Tier.BATCH].push(sequence.rank, sequence)
            self._since.push(sequence.request.arrival_time, sequence)
        else:
            self._heaps[Tier.ONLINE].push(sequence.rank, sequence)

    def remove(self, sequence: Sequence) -> None:
        for heap in (*self._heaps.values(), self._since):
            heap.remove(sequence)

    def first(self, tier: Tier) -> Sequence | None:
        entry = self._heaps[tier].first()
        return None if entry is None else entry[1]

    def promote(self, now: float) -> None:
        """Moves the first to come if its patience is over and the one moved before has ended."""
        if self._promoted is not None and self._promoted.finish is None:
            return
        self._promoted = None
        if (entry := self._since.first()) is not None and entry[0] + self._patience <= now:
            sequence = self._promoted = entry[1]
            self.remove(sequence)
            sequence.rank = promoted(sequence.rank)
            self.push(sequence)


@dataclasses.dataclass(frozen=True, slots=True)
class Futures:
    """What sequences may need, one entry each, all i64.

    base: pages that count for it now, and that its prompt is about to take.
    growth: pages that it may take after those, one a tick.
    end: the tick after which it surely holds none, at least `growth`.
    """

    base: NDArray[np.int64]
    growth: NDArray[np.int64]
    end: NDArray[np.int64]

    @property
    def total(self) -> int:
        """Pages, if all were at their limit at the same time."""
        return int(self.base.sum() + self.growth.sum())

    @property
    def soon(self) -> int:
        """Pages once the prompts are computed, at the next tick."""
        return int(self.base.sum() + np.count_nonzero(self.growth))

    def peak(self) -> int:
        """The most pages that are in use at one time: at tick t those with end >= t hold
        base + min(growth, t). Between two ends nobody leaves and all grow, so only ends are looked at."""
        ends = np.unique(self.end)
        by_end = np.argsort(self.end)
        gone = np.searchsorted(self.end[by_end], ends)  # i64[ends], how many end before
        slow_growth = np.sort(self.growth)
        grown = np.searchsorted(slow_growth, ends)  # i64[ends], how many have all their growth before
        pages = (
            self.base.sum()
            - _sums(self.base[by_end])[gone]
            - _sums(self.growth[by_end])[gone]  # they ended, so they had all their growth
            + _sums(slow_growth)[grown]
            + ends * (len(slow_growth) - grown)
        )
        return int(pages.max(initial=0))


class Room:
    """Whether the pool has room for one sequence more, beside those that run.

    Knows of each running sequence what slots and pages do not, as arrays by slot:
    promise: i32[max_slots], pages that it may come to hold; 0 for a free slot.
    prompt_pages: i32[max_slots], pages of what prefill computes.
    hoped: i32[max_slots], of these, pages that others hold and that it will probably share; 0 once it has.
    new_tokens: i32[max_slots], tokens to draw, at least 1; 0 once it decodes.

    simulate: False sums up the promises instead.
    overcommit: a factor on the pool for the peak; what is needed soon must fit the pool itself.
    lag: decode steps for which a sequence may hold its pages after its last one.
    """

    def __init__(
        self,
        slots: Slots,
        pages: PageAllocator,
        *,
        page_size: int,
        simulate: bool,
        overcommit: float,
        lag: int,
    ) -> None:
        self._slots, self._pages = slots, pages
        self._page_size, self._simulate, self._overcommit, self._lag = page_size, simulate, overcommit, lag
        size = len(slots.sequences)
        self.promise = np.zeros(size, np.int32)
        self.prompt_pages = np.zeros(size, np.int32)
        self.hoped = np.zeros(size, np.int32)
        self.new_tokens = np.zeros(size, np.int32)
        self.promised = 0  # the sum of `promise`

    def enter(self, sequence: Sequence, promise: int, hoped: int) -> None:
        """The sequence runs from now on."""
        slot = sequence.slot
        self.promise[slot] = promise
        self.prompt_pages[slot] = -(-sequence.prefill_len // self._page_size)
        self.hoped[slot] = hoped
        self.new_tokens[slot] = max(sequence.max_new_tokens - sequence.resumed, 1)
        self.promised += promise

    def matched(self, slot: int) -> None:
        """Its cached pages are its own now."""
        self.hoped[slot] = 0

    def decodes(self, slot: int) -> None:
        self.new_tokens[slot] = 0

    def leave(self, slot: int) -> None:
        self.promised -= int(self.promise[slot])
        self.promise[slot] = self.hoped[slot] = 0

    def is_sure(self, promise: int) -> bool:
        """Whether the pool holds everybody's promise and this one too."""
        return self.promised + promise <= self._pages.num_pages

    def fits(
        self, sequence: Sequence, promise: int, hoped: int, *, delay: int, without: Seq[Sequence] = ()
    ) -> bool:
        """Whether there is room for a waiting sequence, once those in `without` gave way.

        promise, hoped: as above. delay: steps until the prompts that are not computed yet will be, at most.
        """
        if self.is_sure(promise):
            return True
        running = np.flatnonzero(self.promise)
        used = self._pages.used
        if without:
            running = np.setdiff1d(running, [victim.slot for victim in without])
            used -= self._pages.freed_by(victim.pages for victim in without)
        # pages that are shared, or were and still have an owner, count as if they were never given back
        lasting = used - int(self._pages.private[running].sum())
        futures = self._futures(running, sequence, promise, hoped, delay)
        pool = self._pages.num_pages
        if lasting + futures.total <= pool:
            return True
        return (
            self._simulate
            and lasting + futures.soon <= pool
            and lasting + futures.peak() <= pool * self._overcommit
        )

    def _futures(
        self, running: NDArray[np.intp], sequence: Sequence, promise: int, hoped: int, delay: int
    ) -> Futures:
        held = self._slots.pages[running].astype(np.int64)
        of_prompt = self.prompt_pages[running]
        base = self._pages.private[running] + np.maximum(of_prompt - held - self.hoped[running], 0)
        growth = self.promise[running].astype(np.int64) - np.maximum(of_prompt, held)
        to_decode = self.new_tokens[running]
        steps = self._slots.to_sample[running] + to_decode + np.where(to_decode > 0, delay, 0)

        own = -(-sequence.prefill_len // self._page_size)
        base = np.append(base, own - hoped)
        growth = np.append(growth, promise - own)
        steps = np.append(steps, sequence.max_new_tokens - sequence.resumed + delay)
        ends = -(-(steps.astype(np.int64) + self._lag) // self._page_size)
        return Futures(base, growth, np.maximum(ends, growth))


def _sums(values: NDArray[np.int64]) -> NDArray[np.int64]:
    """i64[n + 1]: of the first 0 .. n values."""
    return np.concatenate([[0], np.cumsum(values)])
