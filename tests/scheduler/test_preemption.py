"""Tiers, preemption, replay, deadlines and multi-step, on cases small enough to follow by hand."""

from __future__ import annotations

import numpy as np
import pytest

from jaxserve.scheduler.scheduler import NO_TOKEN, Scheduler
from jaxserve.scheduler.types import Finish, Sequence, Status, Tier
from tests.scheduler.by_hand import STOP, commit, decoded, prefilled, request, run, scheduler

EMPTY = np.zeros(0, np.int32)


def test_online_work_takes_a_batch_slot_in_the_same_plan() -> None:
    it = scheduler(max_slots=2)
    (first,) = it.add(request("a", 3, 9, tier=Tier.BATCH), [0])
    (second,) = it.add(request("b", 3, 9, tier=Tier.BATCH, first_token=20), [0])
    commit(it, it.plan())
    in_flight = it.plan()
    (online,) = it.add(request("c", 3, 2, first_token=30), [0])
    plan = it.plan()
    assert prefilled(plan) == [(1, 0, 3, True)] and plan.prefill[0].first  # the latest admitted gave way
    assert decoded(plan) == [(0, 5), (1, 3)]
    assert (first.status, second.status, online.status) == (Status.DECODE, Status.PREEMPTED, Status.DECODE)
    assert second.output == [50, 50] and it.stats()["preempted_batch"] == 1
    events = commit(it, in_flight, 51)
    assert [event[0] for event in events] == [first]  # the row in flight is void: drawn again later
    assert second.output == [50, 50]


@pytest.mark.parametrize("penalty", [0.0, 1.0])
def test_a_preempted_sequence_goes_on_through_prefill(penalty: float) -> None:
    it = scheduler(max_slots=1, prefix_cache=False)
    (batch,) = it.add(request("a", 3, 9, tier=Tier.BATCH, presence_penalty=penalty), [7])
    commit(it, it.plan())
    it.add(request("b", 3, 2), [0])
    commit(it, it.plan())  # two tokens: the prompt's end and a decode step
    plan = it.plan()
    (row,) = plan.prefill
    assert (row.first, row.last, row.start, row.prompt_len, row.seed) == (True, True, 0, 3, 7)
    assert row.tokens.tolist() == [10, 11, 12, 50, 50] and row.forced == NO_TOKEN
    assert (None if row.generated is None else row.generated.tolist()) == ([50, 50] if penalty else None)
    assert decoded(plan) == [(0, 5)]
    assert commit(it, plan, 60) == [(batch, 60, 0, None), (batch, 60, 1, None)]
    assert batch.output == [50, 50, 60, 60]


def test_the_prefix_cache_makes_going_on_cheap() -> None:
    it = scheduler(max_slots=1)
    (batch,) = it.add(request("a", 6, 9, tier=Tier.BATCH), [7])
    commit(it, it.plan())
    commit(it, it.plan())  # tokens 6, 7 and 8 are read back, of which two entered: two whole pages
    it.add(request("b", 3, 2, first_token=30), [0])
    commit(it, it.plan())
    assert prefilled(it.plan()) == [(0, 8, 1, True)]
    assert batch.cached == 0  # when it was first admitted


def test_replay_makes_the_output_as_it_was_made() -> None:
    it = scheduler(max_slots=1, replay=True, prefix_cache=False)
    (batch,) = it.add(request("a", 3, 9, tier=Tier.BATCH, presence_penalty=1.0), [7])
    commit(it, it.plan(), 41)
    commit(it, it.plan(), 42)
    assert batch.output == [41, 41, 42]
    it.add(request("b", 3, 2), [0])
    commit(it, it.plan())
    plan = it.plan()
    (row,) = plan.prefill
    assert (row.tokens.tolist(), row.last, row.forced, row.generated) == ([10, 11, 12], True, 41, None)
    forced = []
    for _ in range(3):
        assert plan.decode is not None
        forced.append(None if plan.decode.forced is None else plan.decode.forced.tolist())
        events = commit(it, plan, 60)
        plan = it.plan()
    assert forced == [[41], [42], None]
    assert [event[1] for event in events] == [60] and batch.output == [41, 41, 42, 60]


def test_a_device_that_does_not_replay_is_found_out() -> None:
    it = scheduler(max_slots=1, replay=True)
    it.add(request("a", 3, 9, tier=Tier.BATCH), [7])
    commit(it, it.plan(), 41)
    it.add(request("b", 3, 1), [0])
    commit(it, it.plan())
    plan = it.plan()
    with pytest.raises(RuntimeError, match="yielded token 60 where it was made to yield 41"):
        it.commit(plan, np.asarray([60]), np.asarray([41]))


@pytest.mark.parametrize("replay", [False, True])
def test_cancelling_while_preempted_and_while_it_goes_on(replay: bool) -> None:
    for steps in range(4):
        it = scheduler(max_slots=1, replay=replay)
        (batch,) = it.add(request("a", 3, 9, tier=Tier.BATCH), [7])
        for _ in range(3):
            commit(it, it.plan())
        it.add(request("b", 3, 1), [0])
        commit(it, it.plan())
        assert batch.status is Status.PREEMPTED
        plans = [it.plan() for _ in range(steps)]
        assert it.abort("a") == [batch] and batch.finish is Finish.ABORT and len(batch.output) == 4
        it.check_invariants()
        assert all(commit(it, plan) == [] for plan in plans)
        assert not it.has_work and it.pages_free == 16


def test_online_work_takes_as_few_batch_sequences_as_it_needs() -> None:
    it = scheduler(num_pages=12, prefill_chunk=32)
    for i, name in enumerate("abc"):
        it.add(request(name, 4, 13, tier=Tier.BATCH, first_token=20 * i), [0])  # four pages each
    commit(it, it.plan())
    (online,) = it.add(request("d", 15, 8, first_token=70), [0])  # six pages: two must go
    it.plan()
    stats = it.stats()
    assert online.status is Status.DECODE
    assert (stats["running_online"], stats["running_batch"], stats["preempted_batch"]) == (1, 1, 2)


def test_batch_work_is_not_taken_before_it_is_of_use() -> None:
    it = scheduler(max_slots=2, prefill_chunk=4)
    for i, name in enumerate("ab"):
        it.add(request(name, 2, 9, tier=Tier.BATCH, first_token=20 * i), [0])
    commit(it, it.plan())
    it.add(request("c", 8, 2, first_token=50), [0])
    it.add(request("d", 8, 2, first_token=70), [0])
    commit(it, it.plan())
    assert it.stats()["running_batch"] == 1  # c's prompt fills this plan's chunk
    commit(it, it.plan())
    assert it.stats()["running_batch"] == 1
    commit(it, it.plan())  # c is done, so its slot is d's: nobody else had to go
    assert it.stats()["preemptions"] == 1


def test_patient_batch_work_is_not_taken() -> None:
    it = scheduler(max_slots=1, batch_patience=60.0)
    it.add(request("a", 3, 4), [0])
    commit(it, it.plan(0.0))
    (batch,) = it.add(request("b", 3, 9, tier=Tier.BATCH), [0])
    it.add(request("c", 3, 2, arrival=30.0), [0])
    commit(it, it.plan(61.0))
    commit(it, it.plan(62.0))
    plan = it.plan(63.0)
    assert batch.status is Status.DECODE and batch.rank[0] is False  # it came before c, and c may not take it
    commit(it, plan)
    assert it.stats()["preemptions"] == 0 and batch.slot == 0


@pytest.mark.parametrize("replay", [False, True])
def test_batch_work_that_is_preempted_again_and_again_gets_done(replay: bool) -> None:
    """Online work leaves a slot for too short a time to get anywhere, and nothing is kept of it."""
    it = scheduler(max_slots=2, replay=replay, prefix_cache=False, batch_patience=60.0)
    batch = [it.add(request(f"batch-{i}", 3, 9, tier=Tier.BATCH), [0])[0] for i in range(2)]
    online: list[Sequence] = []
    now, came = 0.0, 0
    while any(sequence.finish is None for sequence in batch) and now < 600.0:
        if now % 8 < 5:  # then three plans without new online work
            while sum(sequence.finish is None for sequence in online) < 2:
                online.append(it.add(request(f"online-{came}", 3, 2, arrival=now), [0])[0])
                came += 1
        commit(it, it.plan(now))
        it.check_invariants()
        now += 1.0
    assert [sequence.finish for sequence in batch] == [Finish.LENGTH] * 2
    assert it.stats()["preemptions"] > 2
    assert len(online) > 20


def test_pages_that_run_out_are_taken_from_the_lowest() -> None:
    it = scheduler(num_pages=4, overcommit=3.0, prefix_cache=False)
    (first,) = it.add(request("a", 4, 10), [0])  # may come to hold four pages
    (second,) = it.add(request("b", 4, 10, first_token=20), [0])
    commit(it, it.plan())  # two pages each: a prompt's, and one for the first token
    statuses = []
    for _ in range(5):
        commit(it, it.plan())
        statuses.append(second.status)
    assert statuses[:3] == [Status.DECODE] * 3 and statuses[3:] == [Status.PREEMPTED] * 2
    assert first.status is Status.DECODE and len(second.output) == 5
    events = run(it)
    assert {event[0] for event in events if event[3] is Finish.LENGTH} == {first, second}
    assert (len(first.output), len(second.output)) == (10, 10)


def test_the_simulated_peak_admits_more_than_the_sum() -> None:
    counts = []
    for simulate in (False, True):
        it = scheduler(num_pages=8, simulate=simulate)
        it.add(request("a", 4, 25), [0])  # seven pages in the end
        it.add(request("b", 4, 5, first_token=40), [0])  # two, long before
        commit(it, it.plan())
        counts.append(it.num_running)
        run(it)
        assert it.stats()["preemptions"] == 0
    assert counts == [1, 2]


def test_lower_numbers_first_within_a_tier() -> None:
    it = scheduler(max_slots=1)
    it.add(request("a", 3, 1, priority=5), [0])
    it.add(request("b", 3, 1, tier=Tier.BATCH, priority=-100), [0])
    it.add(request("c", 3, 1, arrival=1.0), [0])
    order = [event[0].request.request_id for event in run(it, now=2.0)]
    assert order == ["c", "a", "b"]


def test_a_more_urgent_prompt_overtakes_a_long_one() -> None:
    it = scheduler()
    it.add(request("a", 20), [0])
    assert prefilled(it.plan()) == [(0, 0, 8, False)]
    it.add(request("b", 5, priority=-1, first_token=60), [0])
    assert prefilled(it.plan()) == [(1, 0, 5, True), (0, 8, 3, False)]


def test_the_chunk_may_change_between_plans() -> None:
    it = scheduler()
    it.add(request("a", 20), [0])
    assert prefilled(it.plan()) == [(0, 0, 8, False)]
    it.prefill_chunk = 3
    assert prefilled(it.plan()) == [(0, 8, 3, False)]
    it.prefill_chunk = 16
    assert prefilled(it.plan()) == [(0, 11, 9, True)]


@pytest.mark.parametrize("steps", [0, 1, 2, 3])
def test_deadlines_in_every_state(steps: int) -> None:
    it = scheduler()
    sequences = it.add(request("a", 10, n=2, deadline=5.0), [0, 1])
    it.add(request("b", 1, deadline=9.0), [0])
    it.add(request("c", 1), [0])
    plans = [it.plan() for _ in range(steps)]
    assert it.expire(4.9) == []
    assert it.expire(5.0) == sequences and it.expire(6.0) == []
    assert all(s.finish is Finish.TIMEOUT for s in sequences)
    it.check_invariants()
    for plan in plans:
        commit(it, plan)
    run(it)
    assert it.expire(100.0) == []  # b had ended


def test_prompt_logprobs_that_are_not_complete_begin_anew() -> None:
    it = scheduler(max_slots=1, prefill_chunk=8)
    it.add(request("a", 10, 3, tier=Tier.BATCH, prompt_logprobs=0), [0])
    commit(it, it.plan())  # eight tokens are read back
    it.add(request("b", 3, 1, first_token=50), [0])
    commit(it, it.plan())
    plan = it.plan()
    assert prefilled(plan) == [(0, 0, 8, False)] and plan.prefill[0].targets is not None
    commit(it, plan)
    commit(it, it.plan())  # now they are complete, and there is output
    it.add(request("c", 3, 1, first_token=50), [0])
    commit(it, it.plan())
    plan = it.plan()
    assert prefilled(plan) == [(0, 8, 4, True)] and plan.prefill[0].targets is None


# -- several steps in one plan


def test_several_steps_in_one_plan() -> None:
    it = scheduler(multi_step=4)
    (a,) = it.add(request("a", 3, 9), [0])
    (b,) = it.add(request("b", 3, 4, first_token=30), [0])
    plans = [it.plan(), it.plan()]
    rows = plans[1].decode
    assert rows is not None and rows.steps == 4 and not plans[1].prefill
    assert decoded(plans[1]) == [(0, 4), (1, 4)]
    assert [(table >= 0).sum() for table in rows.tables] == [2, 2]  # positions 4 to 7, and 4 to 5
    commit(it, plans[0])
    tokens = np.asarray([[51, 61], [52, 62], [53, NO_TOKEN], [54, NO_TOKEN]], np.int32)
    events = it.commit(plans[1], EMPTY, tokens)
    it.check_invariants()
    assert events == [
        (a, 51, 0, None),
        (b, 61, 1, None),
        (a, 52, 2, None),
        (b, 62, 3, Finish.LENGTH),
        (a, 53, 4, None),
        (a, 54, 6, None),
    ]
    assert (a.output, b.output) == ([50, 50, 51, 52, 53, 54], [50, 50, 61, 62])


def test_a_stop_token_ends_a_row_inside_a_plan() -> None:
    it = scheduler(multi_step=4)
    (a,) = it.add(request("a", 3, 9), [0])
    commit(it, it.plan())
    plan = it.plan()
    behind = it.plan()  # dispatched before the stop is known
    tokens = np.asarray([[51], [STOP], [NO_TOKEN], [NO_TOKEN]], np.int32)
    assert it.commit(plan, EMPTY, tokens) == [(a, 51, 0, None), (a, STOP, 1, Finish.STOP)]
    assert behind.decode is not None
    nothing = np.full((behind.decode.steps, 1), NO_TOKEN, np.int32)
    assert it.commit(behind, EMPTY, nothing) == [] and not it.has_work
    it.check_invariants()


def test_a_row_that_stops_too_early_is_found_out() -> None:
    it = scheduler(multi_step=2)
    it.add(request("a", 3, 9), [0])
    commit(it, it.plan())
    with pytest.raises(RuntimeError, match="ended a sequence that still lives"):
        it.commit(it.plan(), EMPTY, np.asarray([[51], [NO_TOKEN]], np.int32))
    with pytest.raises(ValueError, match=r"tokens.shape=\(1,\) for a plan with 2 steps of 1 "):
        it = scheduler(multi_step=2)
        it.add(request("a", 3, 9), [0])
        commit(it, it.plan())
        it.commit(it.plan(), EMPTY, np.asarray([51], np.int32))


def steps_of(it: Scheduler) -> int:
    rows = it.plan().decode
    return 0 if rows is None else rows.steps


def test_one_step_where_something_would_wait_for_more() -> None:
    it = scheduler(multi_step=4)
    it.add(request("a", 3, 12, stop=("end",)), [0])
    assert [steps_of(it) for _ in range(2)] == [1, 1]  # a stop string is found on the host

    it = scheduler(multi_step=4)
    it.add(request("a", 3, 12), [0])
    it.add(request("b", 12, first_token=30), [0])
    assert [steps_of(it) for _ in range(3)] == [1, 1, 4]  # a prompt is computed chunk by chunk

    it = scheduler(multi_step=4)
    it.add(request("a", 3, 7), [0])
    assert [steps_of(it) for _ in range(4)] == [1, 4, 1, 0]  # the last token alone

    it = scheduler(multi_step=4, max_slots=1)
    it.add(request("a", 3, 12), [0])
    it.add(request("b", 3, 12), [0])
    assert [steps_of(it) for _ in range(2)] == [1, 4]  # b waits, but could not be admitted

    it = scheduler(multi_step=4, num_pages=2, pages_per_slot=2, simulate=False)
    it.add(request("a", 3, 2), [0])
    (b,) = it.add(request("b", 3, 2, first_token=30), [0])
    assert steps_of(it) == 1 and b.status is Status.DECODE


def test_what_no_scheduler_can_be() -> None:
    with pytest.raises(ValueError, match=r"overcommit=0\.5 must be at least 1"):
        scheduler(overcommit=0.5)
    with pytest.raises(ValueError, match="aging_seconds=0 must be more than 0"):
        scheduler(aging_seconds=0)
    with pytest.raises(ValueError, match=r"multi_step=0 must all be at least 1"):
        scheduler(multi_step=0)


def test_stats_tell_who_is_where() -> None:
    it = scheduler(max_slots=2)
    it.add(request("a", 5, 9, tier=Tier.BATCH), [0])
    it.add(request("b", 6, 9, n=2), [0, 1])
    commit(it, it.plan())
    it.add(request("c", 7, 9), [0])
    stats = it.stats()
    expected = {
        "running": 2,
        "running_online": 2,
        "running_batch": 0,
        "waiting": 2,
        "waiting_online": 1,
        "waiting_batch": 1,
        "preempted": 0,
        "waiting_tokens": 12,
        "pages_used": 2,  # the sibling begins in the next plan
        "preemptions": 0,
        "evictions": 0,
    }
    assert {name: stats[name] for name in expected} == expected
    assert stats["pages_free"] + stats["pages_cached"] + stats["pages_used"] == 16
