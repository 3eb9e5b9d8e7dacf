"""Masks that follow from what was drawn before: rules computed by hand, on a real (tiny, random) model."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from jaxserve.build import build_engine
from jaxserve.config import EngineOptions
from jaxserve.engine.engine import Engine
from jaxserve.scheduler.types import Finish, SamplingParams, StructuredOutputs, Tier, check_request
from tests.engine.conftest import Reply
from tests.tiny import VOCAB

WANTED = StructuredOutputs(regex="whatever: the grammar comes with the request")


def allowed(token: int) -> list[int]:
    """After `token`; -1: at the beginning."""
    return sorted({(3 * token + step) % VOCAB for step in (1, 2, 5, 70)})


def bits(tokens: list[int]) -> NDArray[np.int32]:
    chosen = np.zeros(-(-VOCAB // 32) * 32, np.bool_)
    chosen[tokens] = True
    return np.packbits(chosen, bitorder="little").view(np.int32)


class Rule:
    """A grammar: `allowed` tells what may follow, `length` tokens make a reply, `fails_at` breaks it."""

    def __init__(
        self, length: int = 10**6, fails_at: int = -1, wait: Callable[[], object] = lambda: None
    ) -> None:
        self.length, self.fails_at, self.wait = length, fails_at, wait

    def start(self) -> Walk:
        return Walk(self)


class Walk:
    def __init__(self, rule: Rule) -> None:
        self._rule = rule
        self._taken = 0
        self.mask = bits(allowed(-1))
        self.complete = False
        self.error: str | None = None

    def advance(self, token: int) -> None:
        self._rule.wait()
        self._taken += 1
        self.mask = bits(allowed(token))
        self.complete = self._taken == self._rule.length
        if self._taken == self._rule.fails_at:
            self.error = "too hard"


def submit(
    engine: Engine, name: str, prompt: Any, rule: Rule | None, tier: Tier = Tier.ONLINE, **params: Any
):
    wanted = None if rule is None else WANTED
    made = SamplingParams(**({"temperature": 0.0, "max_tokens": 16, "structured_outputs": wanted} | params))
    reply, now = Reply(), time.monotonic()
    engine.submit(
        (check_request(name, np.asarray(prompt), made, engine.limits, now, tier=tier, grammar=rule), reply)
    )
    return reply


def finish(engine: Engine, replies: list[Reply], count: int = 1) -> None:
    end = time.monotonic() + 60
    while any(len(reply.finishes) < count for reply in replies):
        assert time.monotonic() < end
        if not engine.step():
            time.sleep(0.0005)
        engine.scheduler.check_invariants()


def obeys(tokens: list[int]) -> bool:
    before = [-1, *tokens]
    return all(token in allowed(last) for last, token in zip(before, tokens, strict=False))


def prompts(count: int, seed: int) -> list[NDArray[np.int64]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(0, VOCAB, rng.integers(1, 100)) for _ in range(count)]


def test_every_token_obeys_and_nobody_else_notices(engine: Engine) -> None:
    """48 streams over 16 slots, half of them with a rule; threads that take their time."""
    rng = np.random.default_rng(5)
    waits = [float(x) for x in rng.uniform(0, 0.003, 4)]
    asked = prompts(48, seed=6)
    ways: list[dict[str, Any]] = [
        {},
        {"temperature": 1.0, "seed": 7},
        {"temperature": 1.0, "seed": 8, "logit_bias": {4: 5.0}, "frequency_penalty": 0.5},
        {"logprobs": 2, "stop_token_ids": (33,)},
    ]
    free = [submit(engine, f"alone-{i}", prompt, None) for i, prompt in enumerate(asked[::2])]
    finish(engine, free)
    alone = [reply.tokens() for reply in free]
    ruled, again = [], []
    for i, prompt in enumerate(asked):
        if i % 2:
            rule = Rule(wait=lambda i=i: time.sleep(waits[i % 4]))  # type: ignore[misc]
            ruled.append(submit(engine, f"ruled-{i}", prompt, rule, **ways[i // 2 % 4]))
        else:
            again.append(submit(engine, f"free-{i}", prompt, None))
    finish(engine, ruled + again)
    assert [reply.tokens() for reply in again] == alone
    assert all(obeys(reply.tokens()) for reply in ruled)
    assert not all(obeys(tokens) for tokens in alone)  # the rule says something
    assert {reply.finishes[0] for reply in ruled} <= {Finish.LENGTH, Finish.STOP}
    assert sum(len(reply.tokens()) == 16 for reply in ruled) > 12
    assert all(len(reply.logprobs()) == len(reply.tokens()) for reply in ruled[3::4])


def test_a_complete_reply_ends_without_an_end_token(engine: Engine) -> None:
    reply = submit(engine, "a", [5], Rule(length=6), n=3, temperature=1.0, seed=3)
    finish(engine, [reply], 3)
    assert reply.finishes == [Finish.STOP] * 3
    sequences = [reply.tokens(i) for i in range(3)]
    assert all(len(tokens) == 6 and obeys(tokens) for tokens in sequences)
    assert len({tuple(tokens) for tokens in sequences}) > 1


def test_both_masks_hold(engine: Engine) -> None:
    for choice in allowed(-1):
        reply = submit(engine, f"one-{choice}", [9], Rule(length=1), allowed_token_ids=(choice, 0, 300))
        finish(engine, [reply])
        assert reply.tokens() == [choice]


def test_masks_without_a_token_in_common_draw_none(engine: Engine) -> None:
    """At once, where the first has none; else as soon as it is known of the next."""
    first = allowed(-1)[0]
    none = next(token for token in range(VOCAB) if token not in allowed(-1))
    last = next(token for token in range(VOCAB) if token not in allowed(first))
    replies = [
        submit(engine, "none", [9], Rule(), allowed_token_ids=(none,), n=2, temperature=1.0),
        submit(engine, "one", [9], Rule(), allowed_token_ids=(first,) if last == first else (first, last)),
    ]
    finish(engine, replies[:1], 2)
    finish(engine, replies[1:])
    assert (replies[0].tokens(), replies[0].tokens(1), replies[1].tokens()) == ([], [], [first])
    for reply in replies:
        assert {one.param for one in reply.outputs if one.finish_reason} == {"allowed_token_ids"}
        assert set(reply.finishes) == {Finish.ABORT}
    assert engine.scheduler.pages_used == 0


def test_a_grammar_that_cannot_go_on_is_the_requests_fault(engine: Engine) -> None:
    reply = submit(engine, "a", [5], Rule(fails_at=4))
    finish(engine, [reply])
    last = reply.outputs[-1]
    assert (last.finish_reason, last.error, last.param) == (Finish.ABORT, "too hard", "structured_outputs")
    assert len(reply.tokens()) == 4
    assert engine.scheduler.pages_used == 0


@pytest.mark.parametrize("how", ["abort", "deadline"])
def test_who_waits_for_a_mask_can_end(engine: Engine, how: str) -> None:
    go = threading.Event()
    made = SamplingParams(max_tokens=16, structured_outputs=WANTED)
    deadline = time.monotonic() + (0.2 if how == "deadline" else 60)
    request = check_request(
        "a", [5], made, engine.limits, time.monotonic(), deadline=deadline, grammar=Rule(wait=go.wait)
    )
    reply = Reply()
    engine.submit((request, reply))
    while not reply.tokens():
        engine.step()
    for _ in range(5):
        assert not engine.step()  # nothing to do, and it holds its slot
    assert engine.scheduler.num_running == 1
    if how == "abort":
        engine.abort("a")
    else:
        time.sleep(0.25)
    engine.step()
    assert engine.scheduler.num_running == 0
    assert reply.finishes == [Finish.ABORT if how == "abort" else Finish.TIMEOUT]
    go.set()
    other = submit(engine, "b", [6], Rule(length=3))
    finish(engine, [other])
    assert len(reply.finishes) == 1


def test_others_go_on_while_a_mask_is_found(engine: Engine) -> None:
    go = threading.Event()
    slow = submit(engine, "slow", [5], Rule(wait=go.wait, length=5))
    quick = submit(engine, "quick", [6], None, max_tokens=60)
    finish(engine, [quick])
    assert len(slow.tokens()) == 1
    go.set()
    finish(engine, [slow])
    assert obeys(slow.tokens()) and len(slow.tokens()) == 5


@pytest.fixture(scope="module")
def small(tiny_folder: Any) -> Iterator[Engine]:
    """Few slots and pages, so that online work takes them from batch work; every bit reproducible."""
    options = EngineOptions(
        max_slots=4, page_size=16, kv_pages=24, memory_fraction=0.5, prefill_chunk=64, reproducible=True
    )
    one = build_engine(str(tiny_folder), options)
    yield one
    one.close()


def test_preempted_sequences_follow_their_rule_to_the_bit(small: Engine) -> None:
    asked = prompts(6, seed=9)
    ways: list[dict[str, Any]] = [{}, {"temperature": 1.0, "seed": 4}]

    def wait() -> None:
        time.sleep(0.002)

    def ask(i: int, name: str, rule: Rule) -> Reply:
        params = {"max_tokens": 40, **ways[i % 2]}
        return submit(small, f"{name}-{i}", asked[i], rule, Tier.BATCH, **params)

    alone = []
    for i in range(6):
        reply = ask(i, "alone", Rule())
        finish(small, [reply])
        alone.append(reply.tokens())
    small.reset_counters()
    replies = [ask(i, "mixed", Rule(wait=wait)) for i in range(6)]
    for i in range(12):
        for _ in range(8):
            small.step()
            small.scheduler.check_invariants()
        replies += [submit(small, f"online-{i}-{j}", asked[j], None, max_tokens=12) for j in range(3)]
    finish(small, replies)
    assert small.stats()["preemptions"] > 3
    assert [reply.tokens() for reply in replies[:6]] == alone
    assert all(obeys(tokens) for tokens in alone)
