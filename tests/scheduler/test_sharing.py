"""Prefixes and siblings, on cases small enough to follow by hand. Pages hold four tokens."""

from __future__ import annotations

import numpy as np
import pytest

from jaxserve.scheduler.scheduler import NO_TOKEN
from tests.scheduler.by_hand import commit, decoded, prefilled, request, run, scheduler


def test_a_prompt_starts_behind_the_pages_that_are_known() -> None:
    it = scheduler()
    (first,) = it.add(request("a", 10), [0])
    run(it)
    pages = first.pages
    assert (it.pages_used, it.stats()["pages_cached"]) == (0, 3)  # 10 prompt and 3 of 4 new tokens entered
    (second,) = it.add(request("b", 10, 1), [0])
    plan = it.plan()
    assert prefilled(plan) == [(0, 8, 2, True)] and plan.prefill[0].first
    assert second.cached == 8 and it.pages_used == 3
    assert plan.prefill[0].tokens.tolist() == [18, 19]
    assert (plan.prefill[0].table[:3] >= 0).all() and pages == []
    stats = it.stats()
    assert (stats["prefix_queries_tokens"], stats["prefix_hit_tokens"]) == (20, 8)


def test_one_token_at_least_is_computed() -> None:
    it = scheduler()
    it.add(request("a", 8, 1), [0])
    run(it)
    (second,) = it.add(request("b", 8, 1), [0])
    assert prefilled(it.plan()) == [(0, 4, 4, True)]  # not behind position 8: nothing would be left
    assert second.cached == 4


def test_a_burst_of_equal_prefixes_is_computed_once_and_others_go_on() -> None:
    it = scheduler(prefill_chunk=16)
    for name in "ab":
        it.add(request(name, 10), [0])
    it.add(request("c", 3, first_token=60), [0])
    assert prefilled(it.plan()) == [(0, 0, 10, True), (2, 0, 3, True)]  # b waits for a's pages, c does not
    assert prefilled(it.plan()) == [(1, 8, 2, True)]


def test_who_waits_goes_on_where_prompts_differ() -> None:
    it = scheduler(prefill_chunk=4)
    it.add(request("a", 20), [0])
    prompt = [*range(10, 18), *range(70, 76)]
    it.add(request("b", prompt), [0])
    assert [prefilled(it.plan()) for _ in range(3)] == [
        [(0, 0, 4, False)],
        [(0, 4, 4, False)],
        [(0, 8, 4, False)],
    ]
    # two pages are shared and known; a comes first, and leaves nothing of the chunk until it is done
    assert [prefilled(it.plan()) for _ in range(3)] == [
        [(0, 12, 4, False)],
        [(0, 16, 4, True)],
        [(1, 8, 4, False)],
    ]


def test_a_salt_separates() -> None:
    it = scheduler()
    it.add(request("a", 10, salt=b"one"), [0])
    run(it)
    it.add(request("b", 10, salt=b"two"), [0])
    plan = it.plan()
    assert prefilled(plan)[0][1] == 0
    commit(it, plan)
    run(it)
    it.add(request("c", 10, salt=b"one"), [0])
    assert prefilled(it.plan())[0][1] == 8


def test_without_a_prefix_cache_only_siblings_share() -> None:
    it = scheduler(prefix_cache=False, prefill_chunk=16)
    leader, sibling = it.add(request("a", 10, n=2), [0, 1])
    assert prefilled(it.plan()) == [(0, 0, 10, True)]
    assert prefilled(it.plan()) == [(1, 8, 2, True)]
    assert leader.pages[:2] == sibling.pages[:2] and leader.pages[2] != sibling.pages[2]
    it.check_invariants()
    it.abort_all()
    assert it.stats()["pages_cached"] == 0
    it.add(request("b", 10), [0])
    assert prefilled(it.plan()) == [(0, 0, 10, True)]


def test_best_of_runs_that_many_sequences() -> None:
    it = scheduler()
    with pytest.raises(ValueError, match="2 seeds for n=2, best_of=3"):
        it.add(request("a", 4, n=2, best_of=3), [0, 1])
    assert len(it.add(request("a", 4, n=2, best_of=3), [0, 1, 2])) == 3


@pytest.mark.parametrize(("generated", "start"), [(True, 12), (False, 8)])
def test_generated_tokens_are_matched_once_read_back(generated: bool, start: int) -> None:
    it = scheduler(cache_generated=generated)
    (first,) = it.add(request("a", 10, 6), [0])
    run(it, token=50)
    assert first.output == [50] * 6
    turn = [*range(10, 20), *first.output, 7, 7]
    it.add(request("b", turn), [0])
    # 10 + 6 tokens, of which the last never entered: three whole pages
    assert prefilled(it.plan())[0][1] == start


def test_prompt_logprobs_are_computed_anew_and_leave_their_pages() -> None:
    it = scheduler(prefill_chunk=16)
    it.add(request("a", 10, 1), [0])
    run(it)
    it.add(request("b", 10, 1, prompt_logprobs=0), [0])
    plan = it.plan()
    assert prefilled(plan) == [(0, 0, 10, True)]
    commit(it, plan)
    it.add(request("c", 10, 1), [0])
    assert prefilled(it.plan()) == [(0, 8, 2, True)]


def test_shared_pages_count_once_and_stay_with_their_last_owner() -> None:
    it = scheduler(num_pages=8, prefill_chunk=32)
    it.add(request("a", 17, 3), [0])  # five pages
    plans = [it.plan()]
    it.add(request("b", 17, 3), [0])  # five more, four of them a's
    plans.append(it.plan())
    assert prefilled(plans[1]) == [(1, 16, 1, True)] and it.pages_used == 6
    it.abort("a")
    it.check_invariants()
    assert it.pages_used == 5 and decoded(it.plan()) == [(1, 18)]
    it.abort("b")
    assert it.pages_used == 0
    it.check_invariants()


def test_a_page_read_by_others_is_never_written() -> None:
    """The rows in flight of an aborted sequence write behind what is known of it."""
    it = scheduler(prefill_chunk=32)
    (first,) = it.add(request("a", 7, 9), [0])
    plans = [it.plan(), it.plan()]  # positions 7 and 8 are in flight: the second page is full, not read back
    held = list(first.pages)
    it.abort("a")
    it.add(request("b", [*range(10, 17), 50, 50, 50], 1), [0])
    plan = it.plan()
    assert prefilled(plan) == [(0, 4, 6, True)]  # only the prompt's own page is known
    assert plan.prefill[0].table[0] == held[0]
    empty = np.zeros(0, np.int32)
    assert it.commit(plans[0], np.asarray([50]), np.asarray([50])) == []
    assert it.commit(plans[1], empty, np.asarray([NO_TOKEN])) == []
