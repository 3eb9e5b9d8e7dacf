"""Several engines behind one queue: who gets what, and that nobody is forgotten."""

from __future__ import annotations

import random
import threading
from typing import Any

import pytest

from jaxserve.engine.outputs import EngineBusy, Output, Sink
from jaxserve.protocols import EngineLike
from jaxserve.replicas import AHEAD, BATCH_PATIENCE, Replicas
from jaxserve.scheduler.types import Finish, Limits, Request, SamplingParams, Tier, check_request

LIMITS = Limits(vocab_size=1000, max_model_len=512, pool_tokens=4096, eos_token_ids=())
SLOTS = 2
ROOM = SLOTS + AHEAD


class Scripted:
    """An engine whose requests end when the test says so."""

    limits, tokenizer, stuck = LIMITS, None, None

    def __init__(self) -> None:
        self.failure: BaseException | None = None
        self.facts: dict[str, Any] = {"slots": SLOTS, "pages_total": 64, "page_size": 16, "model": "m"}
        self.given: dict[str, tuple[Request, Sink, list[int]]] = {}
        self.aborted: list[str] = []
        self.requests = 0
        self.closed = False
        self.lock = threading.RLock()

    @property
    def healthy(self) -> bool:
        return self.failure is None and not self.closed

    def submit(self, *requests: tuple[Request, Sink]) -> None:
        if not self.healthy:
            raise RuntimeError("it does not run")
        with self.lock:
            for request, sink in requests:
                self.requests += 1
                self.given[request.request_id] = request, sink, list(range(request.params.sequences))

    def abort(self, request_id: str) -> None:
        self.aborted.append(request_id)

    def end(self, name: str, finish: Finish = Finish.STOP, error: str | None = None) -> None:
        """One sequence of it."""
        with self.lock:
            request, sink, left = self.given[name]
            index = left.pop()
            if not left:
                del self.given[name]
        sink(Output(request.request_id, index, [5], finish_reason=finish, error=error))

    def fail(self) -> None:
        self.failure = RuntimeError("lost its device")
        for name in list(self.given):
            while name in self.given:
                self.end(name, Finish.ABORT, "lost its device")

    def stats(self) -> dict[str, Any]:
        with self.lock:
            waiting = max(0, sum(len(left) for _, _, left in self.given.values()) - SLOTS)
        counts = dict.fromkeys(("waiting_tokens", "waiting_tokens_online", "waiting_batch"), 0)
        counts |= {"waiting": waiting, "waiting_online": waiting}
        return {**self.facts, **counts, "rejected_total": 0, "requests_total": self.requests}

    def start(self) -> None:
        pass

    def close(self) -> None:
        self.closed = True
        while self.given:
            self.end(next(iter(self.given)), Finish.ABORT)


class Setup:
    def __init__(self, count: int = 2, **options: Any) -> None:
        self.now = 0.0
        self.engines = [Scripted() for _ in range(count)]
        likes: list[EngineLike] = list(self.engines)
        self.replicas = Replicas(likes, clock=lambda: self.now, **options)
        self.ends: dict[str, list[tuple[Finish, str | None]]] = {}

    def request(self, name: str, prompt: list[int] | None = None, *, n: int = 1, **place: Any) -> tuple:
        ids = prompt or [random.Random(name).randrange(1000) for _ in range(40)]
        request = check_request(name, ids, SamplingParams(max_tokens=4, n=n), LIMITS, self.now, **place)
        self.ends[name] = []

        def sink(output: Output) -> None:
            if output.finish_reason is not None:
                self.ends[name].append((output.finish_reason, output.error))

        return request, sink

    def submit(self, *names: str, **options: Any) -> None:
        self.replicas.submit(*(self.request(name, **options) for name in names))

    def where(self, name: str) -> int | None:
        return next((i for i, engine in enumerate(self.engines) if name in engine.given), None)


def names(count: int, prefix: str = "r") -> list[str]:
    return [f"{prefix}{i}" for i in range(count)]


def test_each_gets_what_it_can_run_soon_and_the_rest_waits() -> None:
    setup = Setup()
    setup.submit(*names(11))
    assert [len(engine.given) for engine in setup.engines] == [ROOM, ROOM]
    assert setup.replicas.stats()["waiting"] == 11 - 2 * SLOTS
    place = setup.where("r3")
    assert place is not None
    setup.engines[place].end("r3")
    assert setup.where("r8") == place
    assert setup.where("r9") is None
    assert setup.ends["r3"] == [(Finish.STOP, None)]


def test_a_common_beginning_goes_to_one_replica() -> None:
    setup = Setup()
    shared = list(range(400))
    setup.submit("first", prompt=[*shared, 1])
    place = setup.where("first")
    setup.submit("other")
    setup.submit("second", prompt=[*shared, 2])
    assert setup.where("second") == place
    assert setup.where("other") != place


def test_online_first_then_by_priority_then_by_arrival() -> None:
    setup = Setup(1)
    setup.submit(*names(ROOM))
    setup.submit("batch", tier=Tier.BATCH)
    setup.submit("late")
    setup.submit("urgent", priority=-1)
    setup.now = 5.0
    setup.submit("latest", priority=-1)
    for done, comes in zip(names(ROOM), ["urgent", "latest", "late"], strict=False):
        setup.engines[0].end(done)
        assert setup.where(comes) == 0
    assert setup.where("batch") is None


def test_batch_work_does_not_take_online_works_room() -> None:
    setup = Setup(1)
    setup.submit(*names(10, "b"), tier=Tier.BATCH)
    assert len(setup.engines[0].given) == ROOM
    setup.submit("online")
    assert setup.where("online") == 0


def test_a_batch_request_that_waited_long_counts_as_online() -> None:
    setup = Setup(1)
    setup.submit(*names(ROOM))
    setup.submit("batch", tier=Tier.BATCH)
    setup.submit("batch2", tier=Tier.BATCH)
    setup.now = BATCH_PATIENCE + 1
    setup.submit("o0", "o1")
    setup.engines[0].end("r0")
    assert setup.where("batch") == 0  # it came before them
    setup.engines[0].end("r1")
    assert setup.where("batch2") is None and setup.where("o0") == 0
    setup.engines[0].end("batch")
    assert setup.where("batch2") == 0


def test_several_sequences_of_a_request() -> None:
    setup = Setup(1)
    setup.submit("wide", n=2 * ROOM)  # more than there is room for, and nobody else is there
    setup.submit("next")
    assert setup.where("wide") == 0 and setup.where("next") is None
    for _ in range(ROOM + 1):
        setup.engines[0].end("wide")
    assert setup.where("next") == 0
    assert setup.replicas.stats()["waiting_tokens"] == 0


def test_aborts_here_and_there() -> None:
    setup = Setup(1)
    setup.submit(*names(ROOM + 1))
    setup.replicas.abort("r0")
    assert setup.engines[0].aborted == ["r0"]
    waits = f"r{ROOM}"
    setup.replicas.abort(waits)
    assert setup.ends[waits] == [(Finish.ABORT, None)]
    setup.replicas.abort("nobody")
    setup.engines[0].end("r0")
    assert setup.where(waits) is None and setup.engines[0].requests == ROOM


def test_a_deadline_of_one_that_waits_here() -> None:
    setup = Setup(1)
    setup.submit(*names(ROOM))
    setup.submit("hurry", deadline=3.0, n=2)
    setup.now = 3.5
    setup.engines[0].end("r0")
    assert setup.ends["hurry"] == [(Finish.TIMEOUT, None)] * 2
    assert setup.where("hurry") is None


def test_the_queue_is_bounded_all_or_none() -> None:
    setup = Setup(2, max_queued=3)
    setup.submit(*names(2 * SLOTS + 2))
    setup.submit("one", "two")  # two wait: it is not full
    with pytest.raises(EngineBusy) as refused:
        setup.submit("three", "four")
    assert refused.value.retry_after >= 1
    assert setup.replicas.stats()["rejected_total"] == 2
    assert setup.where("three") is None and setup.where("four") is None


def test_the_queue_is_bounded_by_tokens() -> None:
    setup = Setup(1, max_queued_tokens=60)
    setup.submit(*names(ROOM))
    setup.submit("held")
    with pytest.raises(EngineBusy):
        setup.submit("more")


def test_when_one_fails_everybody_hears_of_it() -> None:
    setup = Setup(2)
    setup.submit(*names(2 * ROOM + 2))
    setup.engines[1].fail()
    assert not setup.replicas.healthy and setup.replicas.failure is setup.engines[1].failure
    ended = {name for name, ends in setup.ends.items() if ends}
    assert ended == {f"r{i}" for i in range(2 * ROOM + 2)} - set(setup.engines[0].given)
    assert all("lost its device" in str(error) for name in ended for _, error in setup.ends[name])
    with pytest.raises(RuntimeError, match="lost its device"):
        setup.submit("late")
    for name in list(setup.engines[0].given):  # the other's go on
        setup.engines[0].end(name)
    assert all(len(ends) == 1 for name, ends in setup.ends.items() if name != "late")


def test_one_that_fails_as_it_is_given_a_request() -> None:
    setup = Setup(1)
    setup.engines[0].submit = lambda *requests: (_ for _ in ()).throw(RuntimeError("gone"))  # type: ignore[method-assign]
    setup.submit("r", n=2)
    assert setup.ends["r"] == [(Finish.ABORT, "gone")] * 2
    assert setup.replicas.stats()["waiting"] == 0


def test_close_ends_what_waits() -> None:
    setup = Setup(2)
    setup.submit(*names(2 * ROOM + 3))
    setup.replicas.close()
    assert all(ends == [(Finish.ABORT, None)] for ends in setup.ends.values())
    assert all(engine.closed for engine in setup.engines)
    with pytest.raises(RuntimeError, match="closed"):
        setup.submit("late")


def test_facts_and_stats_are_of_all() -> None:
    setup = Setup(3)
    setup.submit(*names(4))
    stats = setup.replicas.stats()
    assert (stats["slots"], stats["pages_total"], stats["page_size"], stats["replicas"]) == (6, 192, 16, 3)
    assert stats["requests_total"] == 4 and sorted(stats["replica_requests"]) == [1, 1, 2]
    assert setup.replicas.facts["model"] == "m"


def test_from_many_threads_each_request_ends_once() -> None:
    setup = Setup(3)
    count = 40

    def client(k: int) -> None:
        for i in range(count):
            setup.submit(f"{k}-{i}", tier=Tier.BATCH if i % 3 == 0 else Tier.ONLINE)
            if i % 5 == 0:
                setup.replicas.abort(f"{k}-{i}")

    stop = threading.Event()

    def engine(which: Scripted) -> None:
        while not stop.is_set() or which.given:
            for name in list(which.given):
                finish = Finish.ABORT if name in which.aborted else Finish.STOP
                which.end(name, finish)

    engines = [threading.Thread(target=engine, args=(which,)) for which in setup.engines]
    clients = [threading.Thread(target=client, args=(k,)) for k in range(4)]
    for thread in engines + clients:
        thread.start()
    for thread in clients:
        thread.join()
    stop.set()
    for thread in engines:
        thread.join()
    assert len(setup.ends) == 4 * count
    assert all(len(ends) == 1 for ends in setup.ends.values())
    assert setup.replicas.stats()["waiting"] == 0
