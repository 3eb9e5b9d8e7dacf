"""The scheduler's rules one by one, on cases small enough to follow by hand."""

from __future__ import annotations

import numpy as np
import pytest

from jaxserve.scheduler.scheduler import NO_TOKEN
from jaxserve.scheduler.types import Finish, Status
from tests.scheduler.by_hand import STOP, commit, decoded, prefilled, request, scheduler


def test_a_request_from_end_to_end() -> None:
    it = scheduler()
    (sequence,) = it.add(request("a", 10), [7])
    plans = []
    for prefill, decode, pages in [
        ([(0, 0, 8, False)], [], 2),
        ([(0, 8, 2, True)], [(0, 10)], 3),  # the prompt's end and the first decode step share a plan
        ([], [(0, 11)], 3),
        ([], [(0, 12)], 4),  # position 12 opens the fourth page
        ([], [], 4),
    ]:
        plan = it.plan()
        assert (prefilled(plan), decoded(plan), it.pages_used) == (prefill, decode, pages)
        it.check_invariants()
        plans.append(plan)
    assert plans[-1].empty and it.plan().empty
    assert plans[0].prefill[0].tokens.tolist() == list(range(10, 18))
    assert plans[0].prefill[0].table.tolist() == [*sequence.pages[:2], *[-1] * 6]
    rows = plans[3].decode
    assert rows is not None and rows.tables.tolist() == [[*sequence.pages, *[-1] * 4]]
    assert commit(it, plans[0]) == [(sequence, NO_TOKEN, 0, None)]
    assert commit(it, plans[1], 51) == [(sequence, 51, 0, None), (sequence, 51, 1, None)]
    assert commit(it, plans[2], 52) == [(sequence, 52, 0, None)]
    assert it.has_work
    assert commit(it, plans[3], 53) == [(sequence, 53, 0, Finish.LENGTH)]
    assert sequence.output == [51, 51, 52, 53]
    assert (it.has_work, it.pages_used, it.num_running) == (False, 0, 0)


def test_prompts_are_packed_in_order_and_only_the_last_is_cut() -> None:
    it = scheduler()
    for name in "abc":
        it.add(request(name, 3), [0])
    assert prefilled(it.plan()) == [(0, 0, 3, True), (1, 0, 3, True), (2, 0, 2, False)]
    it.add(request("d", 9), [0])
    assert prefilled(it.plan()) == [(2, 2, 1, True), (3, 0, 7, False)]
    assert prefilled(it.plan()) == [(3, 7, 2, True)]


def test_rows_of_prefill_are_bounded() -> None:
    it = scheduler(max_prefill_rows=2)
    for name in "abc":
        it.add(request(name, 1), [0])
    assert prefilled(it.plan()) == [(0, 0, 1, True), (1, 0, 1, True)]
    assert prefilled(it.plan()) == [(2, 0, 1, True)]


def test_promises_are_exact_and_first_come_first_served() -> None:
    it = scheduler(num_pages=4)
    # 4 + 5 tokens: the ninth is drawn and never enters the model, so two pages of four do
    it.add(request("a", 4, 5), [0])
    it.add(request("b", 4, 6), [0])  # three pages
    it.add(request("c", 1, 1), [0])  # one page: it would fit, but b was first
    first = it.plan()
    assert (it.num_running, it.num_waiting) == (1, 2)
    commit(it, first, STOP)
    second = it.plan()
    assert (it.num_running, it.num_waiting) == (2, 0)
    assert [len(row.tokens) for row in second.prefill] == [4, 1]


def test_a_stop_token_voids_what_was_planned_meanwhile() -> None:
    it = scheduler(max_slots=1)
    (first,) = it.add(request("a", 4), [0])
    (second,) = it.add(request("b", 4), [0])
    plan0, plan1 = it.plan(), it.plan()
    assert commit(it, plan0, STOP) == [(first, STOP, 0, Finish.STOP)]  # its decode row of plan 0 is void too
    plan2 = it.plan()  # the slot is the second one's by now
    assert [row.slot for row in plan2.prefill] == [0] and plan2.prefill[0].first
    assert decoded(plan1)[0][0] == 0
    assert it.commit(plan1, np.zeros(0, np.int32), np.asarray([NO_TOKEN], np.int32)) == []
    assert commit(it, plan2, 60) == [(second, 60, 0, None), (second, 60, 1, None)]
    assert (first.output, second.output) == ([STOP], [60, 60])


@pytest.mark.parametrize("steps", [0, 1, 2, 3])
def test_abort_in_every_state(steps: int) -> None:
    it = scheduler()
    sequences = it.add(request("a", 10, n=2), [0, 1])
    assert sequences[0].status is Status.WAITING
    plans = [it.plan() for _ in range(steps)]
    assert it.abort("a") == sequences
    it.check_invariants()
    assert all((s.finish, s.status, s.slot) == (Finish.ABORT, Status.FINISHED, -1) for s in sequences)
    assert (it.pages_used, it.num_running, it.num_waiting) == (0, 0, 0)
    assert it.has_work == (steps > 0)  # the device still runs what was planned
    assert all(commit(it, plan) == [] for plan in plans)
    assert not it.has_work
    assert it.abort("a") == [] and it.abort("unknown") == []
    it.add(request("a", 1), [0])  # the name is free again


def test_abort_all_forgets_plans_in_flight() -> None:
    it = scheduler()
    added = [*it.add(request("a", 10), [0]), *it.add(request("b", 1), [0])]
    it.plan()
    assert it.abort_all() == added
    assert not it.has_work and it.pages_used == 0
    it.check_invariants()


def test_the_engine_ends_a_sequence_at_a_stop_string() -> None:
    it = scheduler()
    (sequence,) = it.add(request("a", 3), [0])
    plan0, plan1 = it.plan(), it.plan()
    commit(it, plan0)
    it.finish(sequence, Finish.STOP)
    it.check_invariants()
    assert (sequence.finish, it.pages_used, it.num_running) == (Finish.STOP, 0, 0)
    assert commit(it, plan1) == [] and not it.has_work
    it.finish(sequence, Finish.ABORT)
    assert sequence.finish is Finish.STOP  # the first reason stays


def test_nothing_to_generate_ends_with_the_prompt() -> None:
    it = scheduler()
    (sequence,) = it.add(request("a", 8, 0, prompt_logprobs=0), [0])
    plan = it.plan()
    assert prefilled(plan) == [(0, 0, 8, True)] and plan.decode is None
    assert it.pages_used == 2
    assert it.plan().empty
    assert commit(it, plan) == [(sequence, NO_TOKEN, 0, Finish.LENGTH)]
    assert sequence.output == [] and it.pages_used == 0


def test_prompt_logprobs_ask_for_what_follows_and_only_once_per_request() -> None:
    it = scheduler(prefill_chunk=3)
    it.add(request("a", 5, n=2, prompt_logprobs=1), [0, 1])
    rows = [row for _ in range(4) for row in it.plan().prefill]
    targets = [None if row.targets is None else row.targets.tolist() for row in rows]
    assert targets == [[11, 12, 13], [14, -1], None]  # the sibling shares four tokens and computes the fifth


def test_the_prompt_comes_along_where_a_penalty_looks_at_it() -> None:
    it = scheduler()
    it.add(request("a", 10, repetition_penalty=1.2), [0])
    it.add(request("b", 2, presence_penalty=1.0), [0])
    rows = [row for _ in range(2) for row in it.plan().prefill]
    prompts = [None if row.prompt is None else row.prompt.tolist() for row in rows]
    assert prompts == [list(range(10, 20)), None, None]


def test_what_the_device_and_the_engine_may_not_do() -> None:
    it = scheduler()
    it.add(request("a", 2), [0])
    plan0, plan1 = it.plan(), it.plan()
    with pytest.raises(ValueError, match="plan 1 was committed out of turn; the oldest in flight is 0"):
        commit(it, plan1)
    with pytest.raises(ValueError, match="0 tokens for a plan with 1 prefill rows"):
        it.commit(plan0, np.zeros(0, np.int32), np.zeros(1, np.int32))
    commit(it, plan0)
    with pytest.raises(RuntimeError, match="the device ended a sequence that still lives"):
        commit(it, plan1, NO_TOKEN)
    with pytest.raises(ValueError, match="out of turn; the oldest in flight is None"):
        commit(it, plan0)


def test_what_cannot_be_added() -> None:
    it = scheduler(num_pages=2)
    it.add(request("a", 1), [0])
    with pytest.raises(ValueError, match="request_id='a' is in use"):
        it.add(request("a", 1), [0])
    with pytest.raises(ValueError, match="1 seeds for n=2"):
        it.add(request("b", 1, n=2), [0])
    with pytest.raises(ValueError, match="the request needs 3 pages; a sequence can have 2"):
        it.add(request("b", 8, 2), [0])
    with pytest.raises(ValueError, match=r"page_size=0 .* must all be at least 1"):
        scheduler(page_size=0)
    it.check_invariants()
