"""The engine on a real (tiny, random) model: batching changes nothing, nothing leaks, nothing compiles."""

from __future__ import annotations

import dataclasses
import threading
import time

import jax
import numpy as np
import pytest

from jaxserve.build import build_engine
from jaxserve.engine.outputs import EngineBusy, Output
from jaxserve.engine.rate import Rate
from jaxserve.scheduler.types import Finish, SamplingParams, Tier, check_request
from tests.engine.conftest import OPTIONS
from tests.tiny import VOCAB


def prompts(count: int, seed: int, low: int = 1, high: int = 120) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.integers(0, VOCAB, rng.integers(low, high)) for _ in range(count)]


def test_64_streams_over_16_slots_get_what_each_gets_alone(engine, ask, run):
    rng = np.random.default_rng(1)
    asked = prompts(64, seed=2)
    lengths = rng.integers(1, 60, len(asked)).tolist()
    alone = [run(p, max_tokens=n).tokens() for p, n in zip(asked, lengths, strict=True)]
    replies = []
    for prompt, length in zip(asked, lengths, strict=True):
        replies.append(ask(prompt, max_tokens=length))
        for _ in range(rng.integers(0, 3)):
            engine.step()
            engine.scheduler.check_invariants()
    while engine.step():
        engine.scheduler.check_invariants()
    assert [reply.tokens() for reply in replies] == alone
    assert [len(tokens) for tokens in alone] == lengths
    assert all(reply.finishes == [Finish.LENGTH] for reply in replies)


def test_nothing_compiles_after_warm_up(engine, ask):
    compiled: list[str] = []

    def listener(event: str, seconds: float, **_: object) -> None:
        if "compile" in event or "trace" in event:
            compiled.append(event)

    jax.monitoring.register_event_duration_secs_listener(listener)
    try:
        # the listener hears a compilation when there is one: otherwise this test could not fail
        jax.jit(lambda x: x * 3 + len(compiled))(np.float32(1.0))
        assert compiled
        compiled.clear()
        rng = np.random.default_rng(3)
        options = [
            {},
            {"temperature": 1.0, "seed": 5},
            {"temperature": 0.7, "top_p": 0.9, "top_k": 10, "min_p": 0.01},
            {"presence_penalty": 1.0, "frequency_penalty": 0.5, "repetition_penalty": 1.2},
            {"logit_bias": {3: 5.0, 4: -100.0}, "min_tokens": 3, "stop_token_ids": (7, 8)},
            {"allowed_token_ids": (1, 2, 3), "logprobs": 5},
            {"prompt_logprobs": 3, "logprobs": 0, "n": 3},
            {"max_tokens": 0, "prompt_logprobs": 0},
        ]
        for i, prompt in enumerate(prompts(60, seed=4, high=200)):
            ask(prompt, **({"max_tokens": int(rng.integers(3, 50))} | options[i % len(options)]))
            for _ in range(rng.integers(0, 4)):
                engine.step()
        while engine.step():
            pass
        assert compiled == []
    finally:
        jax.monitoring.unregister_event_duration_listener(listener)


def test_the_same_seed_gives_the_same_tokens_in_any_company(engine, ask, run):
    params = {"temperature": 1.0, "seed": 123, "top_p": 0.95, "max_tokens": 20}
    prompt = prompts(1, seed=5)[0]
    alone = run(prompt, **params).tokens()
    others = [ask(p, temperature=0.9, max_tokens=30) for p in prompts(10, seed=6)]
    for _ in range(5):
        engine.step()
    reply = ask(prompt, **params)
    others += [ask(p, max_tokens=10) for p in prompts(9, seed=7)]
    while engine.step():
        pass
    assert reply.tokens() == alone
    assert run(prompt, **{**params, "seed": 124}).tokens() != alone
    assert all(other.finishes for other in others)


def test_n_continuations_differ_and_end(engine, run):
    reply = run([1, 2, 3], temperature=1.0, seed=9, n=4, max_tokens=12)
    sequences = [tuple(reply.tokens(i)) for i in range(4)]
    assert all(len(s) == 12 for s in sequences)
    assert len(set(sequences)) == 4
    assert len(reply.finishes) == 4


def test_logprobs_of_greedy_tokens_rank_first_and_match_the_prompt_head(run):
    prompt = prompts(1, seed=8, low=70, high=71)[0]  # longer than one chunk
    reply = run(prompt, max_tokens=8, logprobs=4)
    entries = reply.logprobs()
    assert [e.token_id for e in entries] == reply.tokens()
    assert all(e.rank == 1 and e.top[0][0] == e.token_id for e in entries)
    assert all(a >= b for e in entries for (_, a), (_, b) in zip(e.top, e.top[1:], strict=False))
    again = run([*prompt, *reply.tokens()], max_tokens=0, prompt_logprobs=4)
    assert again.finishes == [Finish.LENGTH]
    scored = again.outputs[0].prompt_logprobs
    assert scored[0] is None and len(scored) == len(prompt) + 8
    for given, drawn in zip(scored[len(prompt) :], entries, strict=True):
        assert given.token_id == drawn.token_id and given.rank == 1
        assert given.logprob == pytest.approx(drawn.logprob, abs=1e-4)


def test_stop_tokens_and_min_tokens(run):
    prompt = [5, 6, 7]
    tokens = run(prompt, max_tokens=30).tokens()
    stop = tokens[9]
    first = tokens.index(stop)
    reply = run(prompt, max_tokens=30, stop_token_ids=(stop,))
    assert reply.tokens() == tokens[: first + 1]
    assert reply.finishes == [Finish.STOP] and reply.outputs[-1].stop_reason == stop
    later = run(prompt, max_tokens=30, min_tokens=first + 5, stop_token_ids=(stop,)).tokens()
    assert len(later) >= first + 5 and stop not in later[: first + 5]


def test_abort_frees_slots_and_pages_at_the_next_step(engine, ask):
    replies = [ask(p, max_tokens=100) for p in prompts(20, seed=10, high=100)]  # 16 run, 4 wait
    for _ in range(12):
        engine.step()
    assert engine.scheduler.num_running == 16 and engine.scheduler.num_waiting == 4
    for reply in replies:
        engine.abort(reply.request.request_id)
    engine.step()
    assert engine.scheduler.num_running == engine.scheduler.num_waiting == engine.scheduler.pages_used == 0
    assert all(reply.finishes == [Finish.ABORT] for reply in replies)


def test_a_slot_forgets_who_was_there(engine, ask, run):
    """Penalties, masks and stop tokens of a slot's last sequence do not touch the next one."""
    prompt = [9, 8, 7]
    plain = run(prompt, max_tokens=20).tokens()
    for edits in (
        {"allowed_token_ids": (1,)},
        {"repetition_penalty": 50.0},
        {"logit_bias": {plain[0]: -100.0}, "frequency_penalty": 2.0},
        {"stop_token_ids": (plain[3],), "temperature": 2.0},
    ):
        changed = run(prompt, max_tokens=20, **edits).tokens()
        assert changed != plain
        assert run(prompt, max_tokens=20).tokens() == plain
    assert run(prompt, max_tokens=5, allowed_token_ids=(1,)).tokens() == [1] * 5


def test_a_queue_shorter_than_the_slots(tiny_folder):
    """Nobody waits, so all are taken; then the queue is full, and again so when they are done."""
    engine = build_engine(str(tiny_folder), dataclasses.replace(OPTIONS, max_queued=2))
    count = iter(range(100))

    def one(tokens: int):
        params = SamplingParams(temperature=0.0, max_tokens=tokens)
        return check_request(str(next(count)), [1, 2, 3], params, engine.limits, 0.0), replies.append

    for _ in range(2):
        replies: list[Output] = []
        engine.submit(*(one(3) for _ in range(20)))
        with pytest.raises(EngineBusy) as refused:
            engine.submit(one(3))
        assert 1 <= refused.value.retry_after <= 2
        while engine.step():
            pass
        assert sum(reply.finish_reason is not None for reply in replies) == 20
    assert engine.stats()["rejected_total"] == 2
    engine.close()


def test_retry_after_follows_the_work_and_not_the_clock():
    rate = Rate()
    for busy in (0.0, 0.5, 1.0):  # seconds of work, whatever time passed between
        rate.ended(busy)
    assert rate.seconds_for(10) == 5
    assert Rate().seconds_for(10) == 1
    assert rate.seconds_for(10**6) == 120


def test_the_whole_context_is_usable(engine, run):
    length = engine.limits.max_model_len
    reply = run(np.arange(length - 1) % VOCAB, max_tokens=1)
    assert len(reply.tokens()) == 1
    reply = run([1], max_tokens=length - 1)
    assert len(reply.tokens()) == length - 1


def test_a_thread_serves_others_and_a_failure_reaches_everyone(tiny_folder, monkeypatch):
    engine = build_engine(str(tiny_folder), OPTIONS)
    done = threading.Event()
    seen: list[Output] = []

    def sink(output: Output) -> None:
        seen.append(output)
        if output.finish_reason is not None:
            done.set()

    def request(name: str):
        params = SamplingParams(temperature=0.0, max_tokens=50)
        return check_request(name, [1, 2, 3], params, engine.limits, 0.0)

    engine.start()
    engine.submit((request("a"), sink))
    assert done.wait(60) and seen[-1].finish_reason is Finish.LENGTH
    done.clear()

    def broken(plan: object) -> None:
        raise RuntimeError("injected")

    monkeypatch.setattr(engine, "_dispatch", broken)
    engine.submit((request("b"), sink))
    assert done.wait(60)
    assert seen[-1].finish_reason is Finish.ABORT and "injected" in (seen[-1].error or "")
    assert not engine.healthy
    with pytest.raises(RuntimeError, match="injected"):
        engine.submit((request("c"), sink))
    engine.close()


def test_a_first_token_is_sent_before_the_steps_decode_is_read(engine, ask, monkeypatch):
    order: list[str] = []
    read = engine._read

    def watched(flight, *arrays):
        results = read(flight, *arrays)
        order.append("decode read" if arrays[0] is flight.decode else "prefill read")
        return results

    monkeypatch.setattr(engine, "_read", watched)
    reply = ask([1, 2, 3], max_tokens=2)
    monkeypatch.setattr(reply, "outputs", Watched(order))
    while engine.step():
        pass
    # both tokens are of one plan: its prefill draws the first, its decode the second
    assert order[:4] == ["prefill read", "token", "decode read", "token"]


class Watched(list[Output]):
    def __init__(self, order: list[str]) -> None:
        self._order = order

    def append(self, output: Output) -> None:
        self._order += ["token"] * len(output.token_ids)


def test_a_device_that_does_not_come_back_is_named(engine, ask, monkeypatch):
    """The decode program, then a computation on the device that takes a second."""
    programs = engine._runner.programs
    bucket = programs.buckets("decode")[0]
    shape = jax.eval_shape(lambda x: x, programs["decode", bucket].out_info[1])

    def late(x: np.ndarray) -> np.ndarray:
        time.sleep(1.0)
        return np.asarray(x)

    slow = jax.jit(lambda x: jax.pure_callback(late, shape, x)).lower(shape).compile()
    fast = programs["decode", bucket]

    def program(*arguments):
        state, results = fast(*arguments)
        return state, slow(results)

    monkeypatch.setitem(programs._compiled, ("decode", bucket), program)
    monkeypatch.setattr(engine, "_step_timeout", 0.2)
    seen: list[str] = []

    def watch() -> None:
        while not reply.finishes:
            if (stuck := engine.stuck) is not None:
                seen.append(stuck)
            time.sleep(0.01)

    reply = ask([1, 2, 3], max_tokens=2)
    watcher = threading.Thread(target=watch)
    watcher.start()
    while engine.step():
        pass
    watcher.join()
    assert seen and f"decode {bucket}" in seen[-1] and "prefill" in seen[-1]
    assert engine.stuck is None


def test_host_and_device_time_can_be_told_apart(engine, ask):
    for prompt in prompts(16, seed=11, high=30):
        ask(prompt, max_tokens=40)
    for _ in range(12):
        engine.step()
    host, device = engine.step_apart()
    assert host > 0 and device > 0
    assert engine.stats()["steps"] > 0 and engine.stats()["host_seconds"] > 0


def test_batch_work_that_waits_keeps_no_online_request_out(engine, monkeypatch):
    monkeypatch.setattr(engine, "_max_queued", 4)
    monkeypatch.setattr(engine, "_max_queued_tokens", 130)
    replies: list[Output] = []

    def submit(name: str, tier: Tier, count: int = 1) -> None:
        made = [
            check_request(
                f"{name}-{i}", [1] * 30, SamplingParams(max_tokens=2), engine.limits, 0.0, tier=tier
            )
            for i in range(count)
        ]
        engine.submit(*((request, replies.append) for request in made))

    submit("batch", Tier.BATCH, 40)  # as many as one likes where nobody waits
    with pytest.raises(EngineBusy):
        submit("more", Tier.BATCH)
    engine.step()
    with pytest.raises(EngineBusy):
        submit("more", Tier.BATCH)
    submit("online", Tier.ONLINE)
    submit("online too", Tier.ONLINE, 3)
    with pytest.raises(EngineBusy):  # by now there are online ones enough
        submit("online again", Tier.ONLINE)
    while engine.step():
        pass
    assert sum(output.finish_reason is Finish.LENGTH for output in replies) == 44


def test_a_turn_that_does_not_end_is_stuck(engine, ask, monkeypatch):
    """Wherever the engine's thread hangs, not only in a device step."""
    go, plan = threading.Event(), engine.scheduler.plan

    def hang(now: float):
        go.wait(20)
        return plan(now)

    monkeypatch.setattr(engine, "_step_timeout", 0.1)
    monkeypatch.setattr(engine.scheduler, "plan", hang)
    thread = threading.Thread(target=engine._run)
    thread.start()
    try:
        assert engine.stuck is None  # it sleeps
        reply = ask([1, 2, 3], max_tokens=2)
        end = time.monotonic() + 10
        while engine.stuck is None:
            assert time.monotonic() < end
            time.sleep(0.01)
        assert "one turn" in engine.stuck
        go.set()
        while not reply.finishes:
            assert time.monotonic() < end
            time.sleep(0.01)
        time.sleep(0.2)
        assert engine.stuck is None
    finally:
        go.set()
        with engine._wake:
            engine._closing = True
            engine._wake.notify()
        thread.join()
        engine._closing = False
        engine._turn_begun = None
