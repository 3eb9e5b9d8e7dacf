"""Who waits for whom, and the simulated peak of pages against counting tick by tick."""

from __future__ import annotations

import random

import numpy as np

from jaxserve.scheduler.admission import Futures, WaitingQueue
from jaxserve.scheduler.heap import RemovableHeap
from jaxserve.scheduler.preemption import lowest, rank_of, victims
from jaxserve.scheduler.types import Finish, Limits, Request, SamplingParams, Sequence, Tier, check_request

LIMITS = Limits(vocab_size=10, max_model_len=32, pool_tokens=64)


def request(name: str, arrival: float, tier: Tier = Tier.ONLINE, priority: int = 0) -> Request:
    return check_request(name, [1], SamplingParams(), LIMITS, arrival, tier=tier, priority=priority)


def sequence(order: int, arrival: float, tier: Tier = Tier.ONLINE, priority: int = 0) -> Sequence:
    made = Sequence(request(str(order), arrival, tier, priority), 0, 0)
    made.rank = rank_of(made.request, order, 10.0)
    return made


def test_the_peak_against_counting() -> None:
    for seed in range(300):
        rng = random.Random(seed)
        count = rng.randint(1, 8)
        base = [rng.randint(0, 5) for _ in range(count)]
        growth = [rng.randint(0, 6) for _ in range(count)]
        end = [more + rng.randint(0, 3) for more in growth]
        futures = Futures(*(np.asarray(values, np.int64) for values in (base, growth, end)))
        usage = [
            sum(b + min(g, tick) for b, g, e in zip(base, growth, end, strict=True) if e >= tick)
            for tick in range(max(end) + 1)
        ]
        assert futures.peak() == max(usage)
        assert futures.total == sum(base) + sum(growth)
        assert futures.soon >= max(usage[:1]) and futures.peak() <= futures.total


def test_order_is_tier_then_aged_priority_then_arrival() -> None:
    early, late = sequence(0, 0.0), sequence(1, 5.0)
    urgent, batch = sequence(2, 9.0, priority=-1), sequence(3, 0.0, Tier.BATCH, priority=-9)
    assert sorted([batch, late, urgent, early], key=lambda s: s.rank) == [urgent, early, late, batch]
    # ten seconds of waiting are worth one priority: what came 11 s later is behind, though more urgent
    assert early.rank < sequence(4, 11.0, priority=-1).rank
    assert lowest([batch, late, urgent]) is batch and lowest([late, urgent]) is late


def test_batch_gives_way_by_priority_then_the_latest_first() -> None:
    first, second, low = (sequence(i, 0.0, Tier.BATCH, priority=i // 2) for i in range(3))
    first.admitted, second.admitted, low.admitted = 1, 2, 0
    assert victims([first, sequence(9, 0.0), low, second]) == [low, second, first]


def test_patience_makes_batch_work_count_as_online() -> None:
    queue = WaitingQueue(batch_patience=60.0)
    batch, online = sequence(0, 0.0, Tier.BATCH), sequence(1, 30.0)
    queue.push(batch)
    queue.push(online)
    queue.promote(59.0)
    assert (queue.first(Tier.ONLINE), queue.first(Tier.BATCH)) == (online, batch)
    queue.promote(60.0)
    assert (queue.first(Tier.ONLINE), queue.first(Tier.BATCH)) == (batch, None)  # it came first
    queue.remove(batch)
    assert queue.first(Tier.ONLINE) is online and len(queue) == 1
    again = sequence(2, 0.0, Tier.BATCH)
    queue.push(again)
    queue.promote(1e9)  # one at a time
    assert queue.first(Tier.BATCH) is again
    batch.finish = Finish.LENGTH
    queue.promote(1e9)
    assert queue.first(Tier.ONLINE) is again and queue.first(Tier.BATCH) is None
    queue.remove(again)
    queue.promote(1e9)
    assert queue.all() == [online] and again not in queue


def test_the_heap_against_sorting() -> None:
    for seed in range(50):
        rng = random.Random(seed)
        heap: RemovableHeap[int] = RemovableHeap()
        there: dict[int, float] = {}
        for item in range(300):
            if rng.random() < 0.6:
                there[item] = rng.choice([1.0, 2.0, rng.random()])
                heap.push(there[item], item)
            elif there:
                gone = rng.choice(list(there))
                heap.remove(gone)
                heap.remove(gone)
                del there[gone]
            # equal keys: in the order they came, which is the order of the numbers
            least = min(((key, item) for item, key in there.items()), default=None)
            assert heap.first() == least
            assert set(heap) == set(there) and len(heap) == len(there)
            assert len(heap._heap) <= 2 * len(there) + 66
