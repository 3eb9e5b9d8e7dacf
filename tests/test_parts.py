"""Several engines in one process, each on its own devices: replicas, and those that only compute prompts."""

from __future__ import annotations

import dataclasses
import logging
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from jaxserve import build
from jaxserve.config import EngineOptions
from jaxserve.disaggregated import Disaggregated
from jaxserve.engine.engine import Engine
from jaxserve.engine.outputs import Output, TokenLogprob
from jaxserve.replicas import Replicas
from jaxserve.scheduler.types import Finish, SamplingParams, check_request
from tests import tiny

SMALL = EngineOptions(max_slots=4, page_size=16, prefill_chunk=64, memory_fraction=0.5)
RNG = np.random.default_rng(0)
LONG = RNG.integers(0, tiny.VOCAB, 200)
PROMPTS = [RNG.integers(0, tiny.VOCAB, length) for length in (5, 40, 150, 64, 100, 208, 90)]
PROMPTS += [np.concatenate([PROMPTS[2][:120], [1, 2, 3]]), PROMPTS[5], PROMPTS[2][:96]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_model(tmp_path_factory.mktemp("models") / "tiny")


def options(**changes: Any) -> EngineOptions:
    return dataclasses.replace(SMALL, **changes)


class Client:
    """Asks and waits: a reply's tokens of each of its sequences, and how they ended."""

    def __init__(self, engine: Any) -> None:
        self.engine, self.asked = engine, 0

    def send(self, prompt: Any, **params: Any) -> Reply:
        self.asked += 1
        deadline = params.pop("deadline", None)
        chosen = SamplingParams(**{"temperature": 0.0, "max_tokens": 12, "ignore_eos": True} | params)
        request = check_request(
            f"r{self.asked}", prompt, chosen, self.engine.limits, time.monotonic(), deadline=deadline
        )
        reply = Reply(request.request_id, chosen.sequences)
        self.engine.submit((request, reply))
        return reply

    def all(self, prompts: list[Any], **params: Any) -> list[list[int]]:
        return [reply.tokens() for reply in [self.send(prompt, **params) for prompt in prompts]]


class Reply:
    def __init__(self, name: str, sequences: int) -> None:
        self.name = name
        self.outputs: list[Output] = []
        self._left = threading.Semaphore(0)
        self._sequences = sequences

    def __call__(self, output: Output) -> None:
        self.outputs.append(output)
        if output.finish_reason is not None:
            self._left.release()

    def finishes(self) -> set[Finish | None]:
        for _ in range(self._sequences):
            assert self._left.acquire(timeout=60)
        self._sequences = 0
        return {output.finish_reason for output in self.outputs} - {None}

    def tokens(self, index: int = 0) -> list[int]:
        assert self.finishes() <= {Finish.LENGTH, Finish.STOP}, self.outputs
        return [token for output in self.outputs if output.index == index for token in output.token_ids]

    def logprobs(self) -> list[TokenLogprob]:
        self.finishes()
        return [entry for output in self.outputs for entry in output.logprobs or ()]


def same_answers(
    ours: Client, theirs: Client, prompts: list[Any], tolerance: float = 1e-5
) -> list[list[int]]:
    """The greedy tokens. The five likeliest at each step are the same ones, their logprobs and the drawn
    token's within the tolerance."""
    replies = [[one.send(prompt, logprobs=5) for prompt in prompts] for one in (ours, theirs)]
    tokens = [[reply.tokens() for reply in asked] for asked in replies]
    assert tokens[0] == tokens[1]
    for first, second in zip(*replies, strict=True):
        assert len(first.logprobs()) == len(first.tokens())
        for a, b in zip(first.logprobs(), second.logprobs(), strict=True):
            assert [token for token, _ in a.top] == [token for token, _ in b.top] and len(a.top) == 5
            values = [[one.logprob, *(value for _, value in one.top)] for one in (a, b)]
            np.testing.assert_allclose(*values, rtol=0, atol=tolerance)
    return tokens[0]


def engines(replicas: Replicas) -> list[Engine]:
    """All of them, those that compute prompts last."""
    found: list[Any] = []
    prompts: list[Any] = []
    for one in replicas.engines:
        if isinstance(one, Disaggregated):
            prompts = one._prompts.engines
            one = one.engine
        found.append(one)
    return found + prompts


def idle(replicas: Replicas) -> None:
    """Waits until nothing runs, and checks that every page is back."""
    until = time.monotonic() + 30
    while any(engine.scheduler.has_work or engine._inbox for engine in engines(replicas)):
        assert time.monotonic() < until
        time.sleep(0.01)
    for engine in engines(replicas):
        engine.scheduler.check_invariants()
        assert engine.scheduler.pages_used == 0
    for one in replicas.engines:
        if isinstance(one, Disaggregated):
            assert not one._computing and not one._cancelled and not one._prompts._jobs


@pytest.fixture(scope="module")
def expected(folder: Path) -> Iterator[Client]:
    """One engine on one device."""
    engine = build.build_engine(str(folder), SMALL)
    engine.start()
    yield Client(engine)
    engine.close()


@pytest.fixture(scope="module")
def apart(folder: Path) -> Iterator[Client]:
    """Two replicas that draw and one that computes their prompts."""
    replicas = build.build_serving(str(folder), options(mesh="data=2", prefill_replicas=1))
    replicas.start()
    yield Client(replicas)
    idle(replicas)
    replicas.close()


@pytest.mark.parametrize("mesh", ["data=2", "data=2,tensor=2"])
def test_replicas_answer_as_one_engine(folder: Path, expected: Client, mesh: str) -> None:
    replicas = build.build_serving(str(folder), options(mesh=mesh))
    assert isinstance(replicas, Replicas)
    try:
        places = [{d.id for d in engine._runner._state.pool.devices()} for engine in engines(replicas)]
        size = 2 if "tensor" in mesh else 1
        assert [len(place) for place in places] == [size, size] and not places[0] & places[1]
        replicas.start()
        same_answers(Client(replicas), expected, PROMPTS, tolerance=5e-5)  # of logits of up to 10
        stats = replicas.stats()
        assert min(stats["replica_requests"]) > 0 and sum(stats["replica_requests"]) == len(PROMPTS)
        assert stats["slots"] == 8 and stats["replicas"] == 2
        idle(replicas)
    finally:
        replicas.close()


def test_replicas_share_no_weights_but_their_values(folder: Path) -> None:
    """Also random ones, which must not differ from replica to replica."""
    replicas = build.build_serving(str(folder), options(mesh="data=2", load_format="dummy", seed=5))
    first, second = (engine.params for engine in engines(replicas))
    for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True):
        assert a.devices() != b.devices()
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))
    replicas.close()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mesh": "data=9"}, r"9 replicas .* need 9; there are 8"),
        ({"mesh": "data=4,tensor=2", "prefill_replicas": 1}, r"prefill-replicas=1 on 2 devices each need 10"),
        ({"prefill_replicas": 1, "prefix_cache": False}, r"--prefill-replicas needs the prefix cache"),
        ({"mesh": "data=2,tensor=3"}, r"does not divide"),
    ],
)
def test_what_does_not_fit_is_refused(folder: Path, changes: dict[str, Any], message: str) -> None:
    for start in (build.build_serving, build.dry_run):
        with pytest.raises(ValueError, match=message):
            start(str(folder), options(**changes))


def test_a_dry_run_says_how_many(folder: Path) -> None:
    text = build.dry_run(str(folder), options(mesh="data=2,tensor=2", prefill_replicas=1))
    assert "2 replicas on 2 device(s) each, and 1 more that only compute prompts" in text
    assert "place_pages" in text


# -- prompts computed elsewhere ----------------------------------------------------------------------------


def test_prompts_computed_elsewhere_change_no_answer(apart: Client, expected: Client) -> None:
    """Short ones, long ones, shared beginnings, a prompt that comes twice, drawn tokens with penalties."""
    before = apart.engine.stats()
    assert apart.all(PROMPTS) == expected.all(PROMPTS)
    sampled: dict[str, Any] = {"temperature": 1.0, "seed": 7, "presence_penalty": 0.5}
    assert apart.all(PROMPTS, **sampled) == expected.all(PROMPTS, **sampled)
    several = [one.send(PROMPTS[5], temperature=1.0, seed=3, n=3) for one in (apart, expected)]
    assert [several[0].tokens(i) for i in range(3)] == [several[1].tokens(i) for i in range(3)]
    stats = apart.engine.stats()
    assert stats["moved_pages_total"] > before["moved_pages_total"]
    assert stats["prefill_replicas"] == 1


def test_who_draws_computes_the_last_page_only(apart: Client) -> None:
    """And says that nothing came from a cache, unless it did."""
    drawing = engines(apart.engine)[:2]
    before = [engine.scheduler.stats() for engine in drawing]
    first = apart.send(LONG)
    first.finishes()
    after = [engine.scheduler.stats() for engine in drawing]
    asked, found = (
        sum(new[name] - old[name] for new, old in zip(after, before, strict=True))
        for name in ("prefix_queries_tokens", "prefix_hit_tokens")
    )
    assert (asked, found) == (len(LONG), (len(LONG) - 1) // 16 * 16)
    assert sum(output.cached_tokens for output in first.outputs) == 0
    again = apart.send(LONG)
    again.finishes()
    assert sum(output.cached_tokens for output in again.outputs) == found


def test_hits_are_counted_once_and_never_taken_back(apart: Client) -> None:
    before = apart.engine.stats()
    rng = np.random.default_rng(1)
    replies = [apart.send(rng.integers(0, tiny.VOCAB, 200)) for _ in range(8)]
    seen = [before["prefix_hit_tokens"]]
    while not all(any(o.finish_reason for o in reply.outputs) for reply in replies):
        seen.append(apart.engine.stats()["prefix_hit_tokens"])
    assert seen == sorted(seen)
    after = apart.engine.stats()
    assert after["prefix_hit_tokens"] == before["prefix_hit_tokens"]
    assert after["prefix_queries_tokens"] == before["prefix_queries_tokens"] + 8 * 200


def test_who_waits_for_a_replica_ends_at_its_deadline(apart: Client) -> None:
    """Though nothing else comes or ends."""
    rng = np.random.default_rng(5)
    busy = [apart.send(rng.integers(0, tiny.VOCAB, 8), max_tokens=240) for _ in range(12)]  # all room
    begin = time.monotonic()
    late = apart.send([1, 2, 3], deadline=begin + 0.02)
    assert late.finishes() == {Finish.TIMEOUT}
    assert not any(o.finish_reason for reply in busy for o in reply.outputs)
    for reply in busy:
        apart.engine.abort(reply.name)
        reply.finishes()


def test_prompt_logprobs_come_from_where_it_draws(apart: Client, expected: Client) -> None:
    replies = [one.send(LONG, prompt_logprobs=1) for one in (apart, expected)]
    assert replies[0].tokens() == replies[1].tokens()
    first, second = ([o.prompt_logprobs for o in r.outputs if o.prompt_logprobs] for r in replies)
    assert len(first[0]) == len(second[0]) == len(LONG)
    for a, b in zip(first[0][1:], second[0][1:], strict=True):
        assert a.token_id == b.token_id and abs(a.logprob - b.logprob) < 1e-4


def test_those_who_leave_or_are_late_end_wherever_they_are(apart: Client) -> None:
    rng = np.random.default_rng(2)
    left = [apart.send(rng.integers(0, tiny.VOCAB, 200), max_tokens=40) for _ in range(6)]
    for reply in left:
        apart.engine.abort(reply.name)
    assert all(reply.finishes() <= {Finish.ABORT, Finish.LENGTH} for reply in left)
    late = apart.send(rng.integers(0, tiny.VOCAB, 200), deadline=time.monotonic() - 1)
    assert late.finishes() == {Finish.TIMEOUT}
    idle(apart.engine)


def test_nothing_compiles_once_it_is_warm(apart: Client, caplog: pytest.LogCaptureFixture) -> None:
    rng = np.random.default_rng(3)

    def compilations() -> list[str]:
        return [r.getMessage() for r in caplog.records if r.getMessage().startswith("Compiling")]

    jax.config.update("jax_log_compiles", True)  # in every thread
    try:
        with caplog.at_level(logging.DEBUG, logger="jax"):
            apart.all([rng.integers(0, tiny.VOCAB, length) for length in (200, 130, 90, 10)])
            assert not compilations()
            thread = threading.Thread(target=lambda: jax.jit(lambda x: x * 3)(np.float32(1)))
            thread.start()
            thread.join()
            assert len(compilations()) == 1  # one would have been seen
    finally:
        jax.config.update("jax_log_compiles", False)


def test_pages_that_find_no_room_are_computed_where_it_draws(folder: Path, expected: Client) -> None:
    """A pool for little more than one sequence: what arrives pushes out what arrived."""
    replicas = build.build_serving(str(folder), options(prefill_replicas=1, kv_pages=17))
    replicas.start()
    try:
        assert Client(replicas).all(PROMPTS) == expected.all(PROMPTS)
        idle(replicas)
    finally:
        replicas.close()


def test_reproducible_bits_do_not_depend_on_where_a_prompt_is_computed(folder: Path) -> None:
    answers = []
    for changes in ({}, {"prefill_replicas": 1}):
        one = build.build_serving(str(folder), options(reproducible=True, dtype="bfloat16", **changes))
        one.start()
        client = Client(one)
        replies = [client.send(prompt, logprobs=0) for prompt in PROMPTS[:6]]
        assert all(len(reply.tokens()) == 12 for reply in replies)
        answers.append([[e for o in reply.outputs for e in o.logprobs or ()] for reply in replies])
        one.close()
    assert answers[0] == answers[1]


def test_a_failure_where_prompts_are_computed_reaches_the_client(folder: Path) -> None:
    replicas = build.build_serving(str(folder), options(prefill_replicas=1))
    prompts = engines(replicas)[-1]
    replicas.start()
    try:
        client = Client(replicas)
        client.send(LONG).tokens()

        def broken(*args: Any) -> Any:
            raise RuntimeError("lost its device")

        prompts._runner.run = broken  # type: ignore[method-assign]
        reply = client.send(np.random.default_rng(4).integers(0, tiny.VOCAB, 200))
        assert reply.finishes() == {Finish.ABORT}
        assert "lost its device" in str(reply.outputs[-1].error)
        assert not replicas.healthy and "lost its device" in str(replicas.failure)
        with pytest.raises(RuntimeError, match="lost its device"):
            client.send([1, 2, 3])
    finally:
        replicas.close()


def test_a_failure_where_it_draws_reaches_the_client(folder: Path) -> None:
    replicas = build.build_serving(str(folder), options(prefill_replicas=1))
    drawing = engines(replicas)[0]
    replicas.start()
    try:
        drawing.fail(RuntimeError("lost its device"))
        with pytest.raises(RuntimeError, match="lost its device"):
            Client(replicas).send(LONG)
    finally:
        replicas.close()
