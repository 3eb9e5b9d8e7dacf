"""The page allocator: each page has the owners it was given, and the pool loses none."""

from __future__ import annotations

import random

import pytest

from jaxserve.scheduler.pages import OutOfPages, PageAllocator


def test_pages_come_back() -> None:
    pages = PageAllocator(4)
    first = pages.allocate(3)
    assert sorted(first) == [0, 1, 2]
    assert (pages.free, pages.used) == (1, 3)
    pages.release(first)
    assert (pages.free, pages.used) == (4, 0)
    assert sorted(pages.allocate(4)) == [0, 1, 2, 3]
    pages.check_invariants()


def test_out_of_pages_takes_none() -> None:
    pages = PageAllocator(3)
    pages.allocate(2)
    with pytest.raises(OutOfPages, match="2 pages asked for, 1 of 3 are free"):
        pages.allocate(2)
    assert pages.free == 1
    assert pages.allocate(0) == []
    pages.check_invariants()


def test_a_shared_page_returns_with_its_last_owner() -> None:
    pages = PageAllocator(2)
    (page,) = pages.allocate(1)
    pages.share([page])
    pages.release([page])
    assert (pages.references(page), pages.used) == (1, 1)
    pages.release([page])
    assert (pages.references(page), pages.used) == (0, 0)
    pages.check_invariants()


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ([2], "no owner"),
        ([0, 0], "named twice"),
        ([-1], r"pages lie in \[0, 2\]"),
        ([3], r"pages lie in \[0, 2\]"),
    ],
)
def test_wrong_pages_are_refused_and_change_nothing(wrong: list[int], message: str) -> None:
    pages = PageAllocator(3)
    pages.allocate(2)
    for call in (pages.release, pages.share):
        with pytest.raises(ValueError, match=message):
            call(wrong)
    assert (pages.references(0), pages.references(1), pages.free) == (1, 1, 1)
    pages.check_invariants()


def test_sizes() -> None:
    with pytest.raises(ValueError, match="num_pages=0 must be at least 1"):
        PageAllocator(0)
    with pytest.raises(ValueError, match="count=-1"):
        PageAllocator(1).allocate(-1)


def test_random_use_against_sets_of_owners() -> None:
    for seed in range(100):
        rng = random.Random(seed)
        total = rng.choice([1, 2, 7, 40])
        pages = PageAllocator(total)
        holdings: list[list[int]] = []  # the oracle: who holds what
        for _ in range(100):
            held = {page for holding in holdings for page in holding}
            action = rng.random()
            if action < 0.45:
                count = rng.randint(0, total - len(held))
                fresh = pages.allocate(count)
                assert len(set(fresh)) == count and not held & set(fresh)
                holdings.append(fresh)
            elif action < 0.6 and holdings:
                again = list(rng.choice(holdings))
                pages.share(again)
                holdings.append(again)
            elif holdings:
                pages.release(holdings.pop(rng.randrange(len(holdings))))
            held = {page for holding in holdings for page in holding}
            assert pages.used == len(held) and pages.free == total - len(held)
            for page in range(total):
                assert pages.references(page) == sum(page in holding for holding in holdings)
            pages.check_invariants()
