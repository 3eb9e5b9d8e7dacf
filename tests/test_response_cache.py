"""The file: bounded, shared, damaged, missing. The engine before it: what is answered from it, and how."""

from __future__ import annotations

import dataclasses
import itertools
import math
import os
import random
import sqlite3
import stat
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jaxserve.engine.outputs import EngineBusy, Output, TokenLogprob
from jaxserve.response_cache import CachingEngine, ResponseCache, answer_key, cache_file, decode, encode
from jaxserve.scheduler.types import (
    Finish,
    Request,
    SamplingParams,
    StructuredOutputs,
    Tier,
    check_request,
)
from tests.cli.harness import ROOT
from tests.server.fakes import FakeEngine
from tests.server.harness import until

MB = 2**20
GREEDY = SamplingParams(temperature=0.0, max_tokens=5)
numbers = itertools.count()


def digest(number: int) -> bytes:
    return number.to_bytes(16)


@pytest.fixture
def said() -> list[str]:
    return []


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "jaxserve" / "responses.sqlite"


@pytest.fixture
def opened(path: Path, said: list[str]) -> Iterator[Callable[..., ResponseCache]]:
    """Opens the file, as often as wanted."""
    all_of_them = []

    def start(max_bytes: int = 4 * MB, at: Path = path) -> ResponseCache:
        all_of_them.append(ResponseCache(at, max_bytes, said.append))
        return all_of_them[-1]

    yield start
    for one in all_of_them:
        one.close()


Opened = Callable[..., ResponseCache]


# --- the file ---


def test_what_was_put_is_there_after_a_restart(opened: Opened, said: list[str]) -> None:
    cache = opened()
    cache.put(digest(1), b"one")
    cache.put(digest(1), b"two")
    assert digest(1) in cache
    assert digest(2) not in cache
    assert cache.get(digest(1)) == b"two"
    assert cache.get(digest(2)) is None
    cache.close()
    cache = opened()
    assert digest(1) in cache
    assert cache.get(digest(1)) == b"two"
    cache.discard(digest(1))
    assert digest(1) not in cache
    assert opened().get(digest(1)) is None
    assert said == []


def test_only_the_user_may_read_it(opened: Opened, path: Path) -> None:
    opened().put(digest(1), b"a secret")
    for file in path.parent.iterdir():
        assert stat.S_IMODE(file.stat().st_mode) == 0o600, file
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700


def test_it_lies_in_the_users_cache_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/elsewhere")
    assert cache_file() == Path("/elsewhere/jaxserve/responses-1.sqlite")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/home/ann")
    assert cache_file() == Path("/home/ann/.cache/jaxserve/responses-1.sqlite")


@pytest.mark.parametrize("longest", [1000, 20_000])
def test_the_size_is_bounded_and_the_least_recently_used_go_first(
    opened: Opened, path: Path, longest: int
) -> None:
    """Against the obvious list in order of use: what is kept is always its newest part."""
    random_ = random.Random(longest)
    cache = opened(max_bytes=MB)
    used: list[int] = []
    for number in range(3000 if longest == 1000 else 400):
        cache.put(digest(number), random_.randbytes(random_.randint(1, longest)))
        used.append(number)
        if random_.random() < 0.3:
            again = random_.choice(used[-50:])
            if cache.get(digest(again)) is not None:
                used.remove(again)
                used.append(again)
        assert cache.bytes <= MB
    kept = [number for number in used if digest(number) in cache]
    assert kept == used[-len(kept) :]
    assert 10 < len(kept) < len(used)
    assert cache.bytes > MB // 4
    assert all(cache.get(digest(number)) is not None for number in kept)
    cache.close()
    assert path.stat().st_size <= MB
    cache = opened(max_bytes=MB)
    assert [number for number in used if digest(number) in cache] == kept


def test_one_answer_does_not_drive_out_the_rest(opened: Opened) -> None:
    cache = opened(max_bytes=MB)
    cache.put(digest(1), b"small")
    cache.put(digest(2), b"x" * (MB // 8 + 1))
    assert digest(1) in cache
    assert digest(2) not in cache


def test_a_lower_bound_holds_for_what_was_there(opened: Opened) -> None:
    cache = opened()
    for number in range(30):
        cache.put(digest(number), os.urandom(100_000))
    cache.close()
    cache = opened(max_bytes=MB)
    cache.put(digest(99), b"new")
    assert cache.bytes <= MB
    assert digest(99) in cache
    assert digest(0) not in cache


def test_two_servers_share_the_file(opened: Opened) -> None:
    one, other = opened(), opened()
    one.put(digest(1), b"one")
    assert digest(1) not in other
    other.refresh()
    assert other.get(digest(1)) == b"one"
    other.put(digest(2), b"two")
    other.discard(digest(1))
    one.refresh()
    assert one.get(digest(2)) == b"two"
    assert digest(1) in one  # what the other gave up is found out when it is asked for
    assert one.get(digest(1)) is None
    assert digest(1) not in one


def test_keys_that_others_gave_up_do_not_pile_up(opened: Opened, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jaxserve.response_cache.STALE_KEYS", 100)
    one, other = opened(max_bytes=MB), opened(max_bytes=MB)
    for number in range(2500):
        other.put(digest(number), b"x" * 3000)
        one.refresh()
    assert len(other._keys) < 350
    assert len(one._keys) < 1000
    assert all(digest(number) in one for number in range(2400, 2500))


def test_processes_that_write_at_once(path: Path) -> None:
    """Four processes open a new file at the same moment, write and read; nothing is damaged."""
    program = (
        "import sys\n"
        "from pathlib import Path\n"
        "from jaxserve.response_cache import ResponseCache\n"
        "mine = int(sys.argv[2])\n"
        "cache = ResponseCache(Path(sys.argv[1]), 2**20, lambda line: sys.exit(line))\n"
        "for number in range(60):\n"
        "    cache.put((mine * 1000 + number).to_bytes(16), bytes([mine]) * 3000)\n"
        "    cache.refresh()\n"
        "    for other in range(4):\n"
        "        body = cache.get((other * 1000 + number).to_bytes(16))\n"
        "        assert body in (None, bytes([other]) * 3000)\n"
        "assert cache.get((mine * 1000 + 59).to_bytes(16))\n"
    )
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", program, str(path), str(mine)], cwd=ROOT, stderr=subprocess.PIPE, text=True
        )
        for mine in range(4)
    ]
    for process in processes:
        _, errors = process.communicate(timeout=60)
        assert (process.returncode, errors) == (0, "")
    database = sqlite3.connect(path)
    assert database.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
    database.close()


def test_while_another_writes_nothing_is_kept_and_nothing_breaks(
    opened: Opened, path: Path, said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("jaxserve.response_cache.LOCKED_SECONDS", 0.05)
    cache = opened()
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    cache.put(digest(1), b"one")
    assert digest(1) not in cache
    other.execute("ROLLBACK")
    other.close()
    cache.put(digest(1), b"one")
    assert cache.get(digest(1)) == b"one"
    assert said == []


@pytest.mark.parametrize("content", [b"this is no database" * 100, b"SQLite format 3\x00" + b"\xff" * 5000])
def test_a_damaged_file_begins_anew(opened: Opened, path: Path, said: list[str], content: bytes) -> None:
    path.parent.mkdir()
    path.write_bytes(content)
    cache = opened()
    [line] = said
    assert line.startswith(f"warning: the response cache {path} is damaged (")
    assert line.endswith("); it begins anew")
    cache.put(digest(1), b"one")
    assert cache.get(digest(1)) == b"one"


def test_a_file_that_is_damaged_under_it_begins_anew(opened: Opened, path: Path, said: list[str]) -> None:
    cache = opened()
    for number in range(200):
        cache.put(digest(number), os.urandom(2000))
    cache.close()
    data = bytearray(path.read_bytes())
    data[8192:] = os.urandom(len(data) - 8192)
    path.write_bytes(data)
    cache = opened()
    for number in range(200):
        assert cache.get(digest(number)) is None
    [line] = said
    assert "is damaged" in line
    cache.put(digest(1), b"one")
    assert cache.get(digest(1)) == b"one"


def test_where_no_file_can_be_nothing_is_kept(opened: Opened, tmp_path: Path, said: list[str]) -> None:
    (tmp_path / "file").write_text("")
    for place in (tmp_path / "file" / "responses.sqlite", tmp_path):
        cache = opened(at=place)
        assert said.pop().startswith(f"warning: no response cache, {place} cannot be used (")
        cache.put(digest(1), b"one")
        cache.refresh()
        assert digest(1) not in cache
        assert cache.get(digest(1)) is None
    assert said == []


# --- what is in it ---


def request(prompt: str = "xa", params: SamplingParams = GREEDY, **place: Any) -> Request:
    name, grammar = f"test-{next(numbers)}", params.structured_outputs
    return check_request(
        name, list(prompt.encode()), params, FakeEngine().limits, 0.0, grammar=grammar, **place
    )


def test_only_what_is_determined_has_a_key() -> None:
    assert answer_key(request(), "weights") is not None
    assert answer_key(request(params=SamplingParams(seed=1)), "weights") is not None
    assert answer_key(request(params=SamplingParams()), "weights") is None


OTHER: dict[str, Any] = {
    "temperature": 0.7,
    "top_p": 0.5,
    "top_k": 3,
    "min_p": 0.1,
    "n": 2,
    "best_of": 4,
    "seed": 8,
    "max_tokens": 6,
    "min_tokens": 1,
    "stop": ("a",),
    "stop_token_ids": (7,),
    "presence_penalty": 0.5,
    "frequency_penalty": 0.5,
    "repetition_penalty": 1.5,
    "logit_bias": {1: 2.0},
    "allowed_token_ids": (5, 6),
    "logprobs": 1,
    "prompt_logprobs": 1,
    "ignore_eos": True,
    "skip_special_tokens": False,
    "structured_outputs": StructuredOutputs(regex="a"),
}


def test_everything_that_decides_an_answer_is_in_the_key() -> None:
    """All of SamplingParams is listed above: a new field fails here until somebody has thought of it."""
    assert set(OTHER) == {field.name for field in dataclasses.fields(SamplingParams)}
    base = SamplingParams(seed=7, max_tokens=5)
    keys = [
        answer_key(request(params=base), "weights"),
        answer_key(request(params=base), "other weights"),
        answer_key(request("xb", base), "weights"),
        answer_key(request("xa ", base), "weights"),
        answer_key(request(params=base, salt=b"tenant"), "weights"),
        answer_key(dataclasses.replace(request(params=base), stop_token_ids=(1, 2)), "weights"),
        answer_key(dataclasses.replace(request(params=base), max_total_tokens=50), "weights"),
    ]
    keys += [
        answer_key(request(params=dataclasses.replace(base, **{name: value})), "weights")
        for name, value in OTHER.items()
    ]
    assert None not in keys
    assert len(set(keys)) == len(keys)


def test_when_and_for_whom_it_is_computed_is_not_in_the_key() -> None:
    first = answer_key(request(), "weights")
    assert answer_key(request(tier=Tier.BATCH, priority=5, deadline=9.0), "weights") == first
    biases = [{1: 2.0, 3: 4.0}, {3: 4.0, 1: 2.0}]
    one, other = (SamplingParams(seed=1, logit_bias=bias) for bias in biases)
    assert answer_key(request(params=one), "weights") == answer_key(request(params=other), "weights")


def test_increments_are_read_as_they_were_written() -> None:
    entry = TokenLogprob(5, -1.25, 3, ((9, -0.1), (5, -1.25), (7, -math.inf)))
    outputs = [
        Output("a", 1, [5], "caf\u00e9 \U0001f600", logprobs=[entry], prompt_logprobs=[None, entry]),
        Output("a", 0, [], "", logprobs=[]),
        Output("a", 0, [6, 7], "x", finish_reason=Finish.STOP, stop_reason="x"),
        Output("a", 1, [8], "", finish_reason=Finish.STOP, stop_reason=8, cumulative_logprob=-3.5),
        Output("a", 2, finish_reason=Finish.LENGTH, cached_tokens=64),
    ]
    read = decode(encode(outputs), "b")
    changes: dict[str, Any] = {"request_id": "b", "from_cache": True, "cached_tokens": 0}
    assert read == [dataclasses.replace(output, **changes) for output in outputs]
    assert all(isinstance(output.finish_reason, Finish | None) for output in read)


@pytest.mark.parametrize("body", [b"", b"nonsense", encode([])[:-3], encode([])[:4] + b"abcdef"])
def test_what_is_no_answer_is_an_error(body: bytes) -> None:
    with pytest.raises(ValueError, match="no answer"):
        decode(body, "a")


# --- before the engine ---


class Asked:
    """A request at an engine, and what came of it."""

    def __init__(self, engine: CachingEngine, one: Request) -> None:
        self.outputs: list[Output] = []
        self._left = one.params.sequences
        self._ended = threading.Event()
        self.request = one
        engine.submit((one, self._put))

    def _put(self, output: Output) -> None:
        self.outputs.append(output)
        self._left -= output.finish_reason is not None
        if not self._left:
            self._ended.set()

    def wait(self) -> list[Output]:
        assert self._ended.wait(10)
        return self.outputs

    @property
    def reasons(self) -> list[Finish]:
        return [output.finish_reason for output in self.wait() if output.finish_reason is not None]


@pytest.fixture
def engine(opened: Opened) -> Iterator[CachingEngine]:
    one = CachingEngine(FakeEngine(), opened())
    one.start()
    yield one
    one.close()


def inner(engine: CachingEngine) -> FakeEngine:
    assert isinstance(engine.engine, FakeEngine)
    return engine.engine


def ask(engine: CachingEngine, *args: Any, **place: Any) -> list[Output]:
    """The increments, once the answer is kept if it is to be."""
    outputs = Asked(engine, request(*args, **place)).wait()
    settled = threading.Event()
    engine._jobs.put(settled.set)
    assert settled.wait(10)
    return outputs


def following(letter: str) -> str:
    return "".join(chr(ord(letter) + step) for step in range(1, 6))


def text(outputs: list[Output], index: int = 0) -> str:
    return "".join(output.text for output in outputs if output.index == index)


def test_the_second_time_it_comes_from_the_file(engine: CachingEngine) -> None:
    params = SamplingParams(temperature=0.0, max_tokens=5, n=3, logprobs=2, prompt_logprobs=1)
    first = ask(engine, "xa", params)
    second = ask(engine, "xa", params)
    assert text(first, 2) == "bcdef"
    assert not any(output.from_cache for output in first)
    name = second[0].request_id
    again = {"request_id": name, "from_cache": True, "admitted": None}
    assert second == [dataclasses.replace(one, **again) for one in first]
    assert len(inner(engine).requests) == 1
    stats = engine.stats()
    assert (stats["response_cache_hits"], stats["response_cache_misses"]) == (1, 1)
    assert 0 < stats["response_cache_bytes"] <= 4 * MB
    assert stats["slots"] == 4


def test_chance_is_computed_each_time(engine: CachingEngine) -> None:
    for _ in range(2):
        assert not ask(engine, "xa", SamplingParams(max_tokens=5))[0].from_cache
    stats = engine.stats()
    assert (stats["response_cache_hits"], stats["response_cache_misses"]) == (0, 0)


def test_tenants_do_not_see_each_other(engine: CachingEngine) -> None:
    ask(engine, salt=b"ann")
    assert not ask(engine, salt=b"bob")[0].from_cache
    assert not ask(engine)[0].from_cache
    assert ask(engine, salt=b"bob")[0].from_cache


def test_it_outlives_the_engine_but_not_the_weights(opened: Opened) -> None:
    for fingerprint, hit in (("weights", False), ("weights", True), ("others", False)):
        fake = FakeEngine()
        fake.facts["fingerprint"] = fingerprint
        engine = CachingEngine(fake, opened())
        engine.start()
        assert ask(engine)[0].from_cache is hit
        engine.close()


@pytest.mark.parametrize("how", ["abort", "deadline", "failure"])
def test_what_did_not_end_by_itself_is_not_kept(opened: Opened, how: str) -> None:
    fake = FakeEngine(delay=0.02)
    engine = CachingEngine(fake, opened())
    engine.start()
    deadline = 0.0 if how == "deadline" else None
    params = SamplingParams(temperature=0.0, max_tokens=200)
    asked = Asked(engine, request("xa", params, deadline=deadline))
    if how == "abort":
        engine.abort(asked.request.request_id)
    if how == "failure":
        fake.fail_next = RuntimeError("out of memory")
    assert asked.reasons == [Finish.TIMEOUT if how == "deadline" else Finish.ABORT]
    assert engine.healthy is (how != "failure")
    engine.close()
    key = answer_key(asked.request, "fake")
    assert key is not None
    assert key not in opened()


def test_a_replay_can_be_aborted(opened: Opened) -> None:
    """Aborted while it waits for the worker, and in the middle: the rest is not sent, and it ends."""
    engine = CachingEngine(FakeEngine(), opened())
    engine.start()
    params = SamplingParams(temperature=0.0, max_tokens=5, n=2)
    ask(engine, "xa", params)
    gate, reached = threading.Event(), threading.Event()
    engine._jobs.put(lambda: bool(gate.wait(10)))
    waiting = Asked(engine, request("xa", params))
    engine.abort(waiting.request.request_id)
    gate.set()
    assert waiting.reasons == [Finish.ABORT] * 2
    assert len(waiting.outputs) == 2

    class Slow(Asked):
        def _put(self, output: Output) -> None:
            super()._put(output)
            if len(self.outputs) == 3:
                reached.set()
                gate.wait(10)

    gate.clear()
    middle = Slow(engine, request("xa", params))
    assert reached.wait(10)
    engine.abort(middle.request.request_id)
    gate.set()
    assert middle.reasons == [Finish.ABORT] * 2
    assert len(middle.outputs) == 5
    assert len(inner(engine).requests) == 1
    assert not engine._held
    engine.close()


def test_a_full_queue_still_answers_what_is_known(engine: CachingEngine) -> None:
    ask(engine)
    inner(engine).busy = 1
    with pytest.raises(EngineBusy):
        Asked(engine, request("new"))
    inner(engine).busy = 1
    assert ask(engine)[0].from_cache
    assert engine.stats()["response_cache_misses"] == 1


@pytest.mark.parametrize("how", ["gone", "unreadable"])
def test_an_answer_that_is_gone_is_computed(engine: CachingEngine, opened: Opened, how: str) -> None:
    """Another server gave it up, or it makes no sense; and the queue is full at first."""
    ask(engine)
    key = answer_key(request(), "fake")
    assert key is not None
    other = opened()
    if how == "gone":
        other.discard(key)
    else:
        other.put(key, b"nonsense")
    inner(engine).busy = 2
    assert not ask(engine)[0].from_cache
    assert inner(engine).rejected == 2
    assert ask(engine)[0].from_cache
    assert not engine._held


def test_closing_answers_everyone(opened: Opened) -> None:
    engine = CachingEngine(FakeEngine(delay=0.01), opened())
    engine.start()
    ask(engine)
    gate = threading.Event()
    engine._jobs.put(lambda: bool(gate.wait(10)))
    replayed = [Asked(engine, request()) for _ in range(3)]
    computed = Asked(engine, request("a", SamplingParams(temperature=0.0, max_tokens=200)))
    closing = threading.Thread(target=engine.close)
    closing.start()
    until(lambda: engine._closing)
    gate.set()
    closing.join(10)
    assert [asked.reasons for asked in (*replayed, computed)] == [[Finish.ABORT]] * 4
    with pytest.raises(RuntimeError, match="closed"):
        Asked(engine, request())


def test_a_file_that_breaks_under_load_costs_no_answer(opened: Opened, said: list[str], path: Path) -> None:
    engine = CachingEngine(FakeEngine(), opened())
    engine.start()
    for turn in range(3):
        for letter in "abcdef":
            assert text(ask(engine, letter)) == following(letter)
        if turn == 0:
            engine._cache._database.close()  # type: ignore[union-attr]
    engine.close()
    [line] = said
    assert line.startswith("warning: no response cache")


def test_many_threads_at_once(engine: CachingEngine) -> None:
    """Hits and misses mixed: every answer is what it is alone."""
    wrong: list[str] = []

    def run(seed: int) -> None:
        chosen = random.Random(seed)
        for _ in range(60):
            letter = chosen.choice("abcdefgh")
            said = text(Asked(engine, request(letter)).wait())
            if said != following(letter):
                wrong.append(said)

    threads = [threading.Thread(target=run, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert engine.stats()["response_cache_hits"] > 200
    assert not engine._held


def test_ten_thousand_tokens_are_a_prompt_like_any_other() -> None:
    limits = dataclasses.replace(FakeEngine().limits, max_model_len=20_000, pool_tokens=40_000)
    ids = np.arange(10_000, dtype=np.int32) % 200
    ones = [check_request("a", ids, GREEDY, limits, 0.0), check_request("b", ids[::-1], GREEDY, limits, 0.0)]
    assert len({answer_key(one, "weights") for one in ones}) == 2
