"""Where requests go: to the replica that holds their beginning, unless it is too busy."""

from __future__ import annotations

import numpy as np
import pytest

from jaxserve.scheduler.placement import Placement
from jaxserve.scheduler.types import Limits, Request, SamplingParams, check_request

LIMITS = Limits(vocab_size=1000, max_model_len=512, pool_tokens=4096, eos_token_ids=())
PAGE = 16


def request(name: str, prompt: list[int], *, salt: bytes = b"", n: int = 1) -> Request:
    return check_request(name, prompt, SamplingParams(max_tokens=1, n=n), LIMITS, 0.0, salt=salt)


def placement(replicas: int = 3, *, pages: int = 64, prefix_aware: bool = True) -> Placement:
    return Placement(replicas, pages=pages, page_size=PAGE, prefix_aware=prefix_aware, sequence_tokens=10)


def prompt(seed: int, length: int = 100) -> list[int]:
    return np.random.default_rng(seed).integers(1000, size=length).tolist()


def test_work_is_spread() -> None:
    placed = placement()
    assert [placed.place(request(f"r{i}", prompt(i))) for i in range(6)] == [0, 1, 2, 0, 1, 2]
    assert [placed.work(i) for i in range(3)] == [220, 220, 220]


def test_a_shared_beginning_goes_where_it_is() -> None:
    """96 of 100 tokens are six whole pages; with what the others hold, 4 tokens are less than 100."""
    placed = placement()
    shared = prompt(0, 96)
    first = placed.place(request("first", [*shared, 1, 2, 3, 4]))
    placed.ended("first")
    for i in range(1, 4):
        placed.place(request(f"other{i}", prompt(i)))
        placed.ended(f"other{i}")
    assert placed.place(request("again", [*shared, 5, 6, 7, 8])) == first
    assert placed.work(first) == 4 + 10


def test_until_it_is_too_busy() -> None:
    """Each takes 4 + 10 tokens' time there. Elsewhere nothing waits, and all 100 must be computed."""
    placed = placement(2)
    shared = prompt(0, 96)
    placed.place(request("first", [*shared, 1, 2, 3, 4]))
    placed.ended("first")
    where = [placed.place(request(f"r{i}", [*shared, 1, 2, 3, i])) for i in range(9)]
    assert where == [0] * 7 + [1, 0]  # 7 x 14 + 4 > 100; then both hold it, and 0 has less to do


def test_salts_do_not_share() -> None:
    placed = placement(2)
    placed.place(request("a", prompt(0), salt=b"a"))  # on 0, and there until the end
    placed.place(request("b", prompt(1), salt=b"b"))
    assert placed.place(request("c", prompt(0), salt=b"a")) == 0
    assert placed.place(request("d", prompt(0), salt=b"b")) == 1


def test_what_was_sent_first_is_forgotten_first() -> None:
    placed = placement(2, pages=6)
    for i in range(4):  # six pages each: of the two on a replica one is left
        placed.place(request(f"r{i}", prompt(i)))
    for i in range(4):
        placed.ended(f"r{i}")
    assert placed.place(request("late", prompt(3))) == 1
    placed.ended("late")
    assert placed.place(request("early", prompt(1))) == 0  # nobody holds it: the first


def test_the_work_of_several_sequences_leaves_as_they_end() -> None:
    placed = placement(1)
    placed.place(request("r", prompt(0), n=3))
    assert (placed.work(0), placed.sequences(0)) == (130, 3)
    for left in (2, 1, 0):
        assert placed.replica_of("r") == 0
        placed.ended("r")
        assert placed.sequences(0) == left
    assert placed.work(0) == 0
    assert placed.replica_of("r") is None
    placed.ended("r")
    assert placed.sequences(0) == 0


def test_among_some() -> None:
    placed = placement()
    assert placed.place(request("a", prompt(0)), [1, 2]) == 1
    assert placed.place(request("b", prompt(0)), [0, 2]) == 0


def test_by_work_alone() -> None:
    placed = placement(2, prefix_aware=False)
    shared = prompt(0)
    placed.place(request("a", shared))
    assert placed.place(request("b", shared)) == 1


def test_random_traffic_leaves_nothing() -> None:
    rng = np.random.default_rng(0)
    placed = placement(4, pages=20)
    live: list[str] = []
    for i in range(3000):
        if live and rng.random() < 0.5:
            placed.ended(live.pop(int(rng.integers(len(live)))))
        else:
            n = int(rng.integers(1, 4))
            placed.place(request(f"r{i}", prompt(int(rng.integers(30)), int(rng.integers(1, 200))), n=n))
            live += [f"r{i}"] * n
        assert sum(placed.sequences(k) for k in range(4)) == len(live)
        assert min(placed.work(k) for k in range(4)) >= 0
    for name in live:
        placed.ended(name)
    assert [placed.work(k) for k in range(4)] == [0] * 4


@pytest.mark.parametrize("sizes", [(0, 1, 1), (1, 0, 1), (1, 1, 0)])
def test_sizes(sizes: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        Placement(sizes[0], pages=sizes[1], page_size=sizes[2])
