"""Known pages: the longest beginning is found, a salt keeps apart, and what is taken is forgotten."""

from __future__ import annotations

import random

import numpy as np
import pytest

from jaxserve.scheduler.pages import PageAllocator
from jaxserve.scheduler.prefix_cache import PrefixCache, extend_digests, root_digest

ROOT = root_digest(b"")


def digests_of(tokens: list[int], page_size: int = 2, root: bytes = ROOT) -> list[bytes]:
    digests: list[bytes] = []
    extend_digests(digests, root, np.asarray(tokens, np.int32), page_size)
    return digests


def test_a_digest_says_all_tokens_up_to_its_pages_end() -> None:
    whole = digests_of([1, 2, 3, 4, 5])
    assert len(whole) == len(set(whole)) == 2 and {len(digest) for digest in whole} == {16}
    assert digests_of([1, 2, 3, 4]) == whole  # the fifth token fills no page
    assert digests_of([9, 2, 3, 4])[1] != whole[1]  # the second page alone is the same
    assert digests_of([3, 4])[0] != whole[1]
    assert digests_of([1, 2], root=root_digest(b"tenant"))[0] != whole[0]
    assert digests_of([1, 2, 3, 4], page_size=4)[0] not in whole


def test_digests_may_come_piece_by_piece() -> None:
    digests = digests_of([1, 2])
    extend_digests(digests, ROOT, np.asarray([3, 4, 5], np.int32), 2)
    assert digests == digests_of([1, 2, 3, 4])


def test_the_longest_known_beginning_matches() -> None:
    pages = PageAllocator(4)
    cache = PrefixCache(pages)
    held = pages.allocate(3)
    digests = digests_of([1, 2, 3, 4, 5, 6])
    for digest, page in zip(digests, held, strict=True):
        cache.add(digest, page)
    assert cache.match(digests, 9) == held and cache.match(digests, 2) == held[:2]
    assert cache.match(digests_of([1, 2, 3, 4, 7, 7]), 9) == held[:2]
    assert cache.match(digests_of([7, 2, 3, 4]), 9) == []
    cache.forget(digests[1])
    assert cache.match(digests, 9) == held[:1] and digests[2] in cache
    cache.check_invariants()


def test_the_first_page_of_two_with_the_same_content_stays() -> None:
    pages = PageAllocator(2)
    cache = PrefixCache(pages)
    first, second = pages.allocate(2)
    (digest,) = digests_of([1, 2])
    cache.add(digest, first)
    cache.add(digest, second)
    assert cache.match([digest], 1) == [first] and len(cache) == 1
    pages.release([second])
    assert pages.idle == 0
    cache.check_invariants()
    pages.check_invariants()


def test_least_recently_used_pages_are_taken_children_first() -> None:
    pages = PageAllocator(4)
    cache = PrefixCache(pages)
    held = pages.allocate(4)
    digests = digests_of(list(range(8)))
    for digest, page in zip(digests, held, strict=True):
        cache.add(digest, page)
    pages.release(held[::-1])
    assert (pages.free, pages.idle, pages.used) == (4, 4, 0)
    assert pages.allocate(1) == held[3:]  # the end of the prompt goes first
    assert cache.match(digests, 9) == held[:3] and pages.evictions == 1
    pages.share(held[:1])  # and what is used again stays longest
    pages.release(held[:1])
    assert pages.allocate(2) == [held[1], held[2]]
    assert cache.match(digests, 9) == held[:1]
    cache.check_invariants()
    pages.check_invariants()


def test_a_forgotten_page_is_blank() -> None:
    pages = PageAllocator(1)
    cache = PrefixCache(pages)
    (page,) = pages.allocate(1)
    (digest,) = digests_of([1, 2])
    cache.add(digest, page)
    pages.release([page])
    cache.forget(digest)
    cache.forget(digest)
    assert (pages.free, pages.idle) == (1, 0)
    with pytest.raises(ValueError, match="no owner and is not kept"):
        pages.share([page])
    with pytest.raises(ValueError, match="it may hold anything"):
        pages.keep(page)
    assert pages.allocate(1) == [page] and pages.evictions == 0
    pages.check_invariants()


def test_pages_from_elsewhere_become_idle_and_known() -> None:
    pages = PageAllocator(4, owners=1)
    cache = PrefixCache(pages)
    digests = digests_of([1, 2, 3, 4, 5, 6])
    assert cache.adopt(digests, 1) == []  # nobody could come upon the second page without the first
    ((index, first),) = cache.adopt(digests[:1], 0)
    assert index == 0 and cache.match(digests, 9) == [first]
    assert cache.adopt(digests[:1], 0) == []  # it is there
    held = pages.allocate(2, 0)
    ((index, second),) = cache.adopt(digests, 1)  # one page is free for two; the first does not make room
    assert index == 1 and cache.match(digests, 9) == [first, second]
    assert (pages.free, pages.idle, pages.private.tolist()) == (2, 2, [2])
    pages.check_invariants()
    cache.check_invariants()
    third = pages.allocate(1, 0)
    assert third == [second] and cache.match(digests, 9) == [first]  # the last of a beginning goes first
    pages.release(held + third, 0)
    assert pages.free == 4 and pages.private.tolist() == [0]
    pages.check_invariants()


def test_random_use_against_a_list_of_prompts() -> None:
    """The oracle: what each page was filled with, whoever holds it."""
    for seed in range(60):
        rng = random.Random(seed)
        pages = PageAllocator(12, owners=4)
        cache = PrefixCache(pages)
        content: dict[int, tuple[int, ...]] = {}  # page -> all tokens up to its end
        holdings: dict[int, list[int]] = {}
        for _ in range(60):
            free = [owner for owner in range(4) if owner not in holdings]
            if free and rng.random() < 0.6:
                tokens = [rng.randrange(2) for _ in range(2 * rng.randint(1, 5))]
                digests = digests_of(tokens)
                matched = cache.match(digests, len(digests))
                for i, page in enumerate(matched):
                    assert content[page] == tuple(tokens[: 2 * i + 2])
                pages.share(matched, free[0])
                more = len(digests) - len(matched)
                if more > pages.free:
                    pages.release(matched[::-1], free[0])
                    continue
                fresh = pages.allocate(more, free[0])
                for i, page in enumerate(fresh, start=len(matched)):
                    content[page] = tuple(tokens[: 2 * i + 2])
                    cache.add(digests[i], page)
                holdings[free[0]] = matched + fresh
            elif holdings:
                owner = rng.choice(list(holdings))
                pages.release(holdings.pop(owner)[::-1], owner)
            pages.check_invariants()
            cache.check_invariants()
            held = [set(holding) for holding in holdings.values()]
            assert pages.used == len(set().union(*held))
            some = [owner for owner in holdings if rng.random() < 0.5]
            left = set().union(*(set(h) for owner, h in holdings.items() if owner not in some))
            assert pages.freed_by(holdings[owner] for owner in some) == pages.used - len(left)
            for owner, holding in holdings.items():
                others = set().union(*(set(h) for other, h in holdings.items() if other != owner))
                assert pages.private[owner] <= len(set(holding) - others)
