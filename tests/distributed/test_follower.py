"""What travels from process 0, and what the others make of it; without a second process."""

from __future__ import annotations

import queue
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxserve.engine import batch
from jaxserve.engine.buckets import prefill_buckets
from jaxserve.engine.follower import LeadingRunner, decode, encode, follow
from jaxserve.engine.runner import Runner
from sharding.channel import _HEADER, ChannelError


@pytest.mark.parametrize("shape", [(5,), (4, 7), (1, 1), (0,)])
def test_a_program_travels_unchanged(shape: tuple[int, ...]) -> None:
    packed = np.arange(np.prod(shape), dtype=np.int32).reshape(shape) - 3
    key, got = decode(encode(("prompt_logprobs", 512), packed))
    assert key == ("prompt_logprobs", 512)
    assert got.dtype == np.int32
    np.testing.assert_array_equal(got, packed)


def test_how_much_travels() -> None:
    """64 slots of 32,768 tokens in pages of 64, as docs/scaling.md has it; the channel adds its head."""
    slots, pages, vocabulary = 64, 512, 128_256
    shapes = {
        ("decode", slots): batch.decode_shape(slots, pages),
        ("prefill", 512): (batch.prefill_size(512, prefill_buckets(512, slots)[512], pages),),
        ("edit_slot", 1): (batch.edits_size(vocabulary),),
    }
    sent = [len(encode(key, np.zeros(shape, np.int32))) + _HEADER.size for key, shape in shapes.items()]
    assert sent == [132_121, 39_062, 547_516]


class State(NamedTuple):
    """pool: a number, one more after each program that changes the state."""

    pool: jax.Array

    def after(self) -> State:
        return State(self.pool + 1)


def runner_of(programs: Programs) -> Runner:
    return Runner(programs, "params", State(jnp.int32(0)))


def leader_of(programs: Programs, channel: Channel) -> LeadingRunner:
    return LeadingRunner(programs, "params", State(jnp.int32(0)), channel)


class Programs(dict):
    """Of a model whose state is a State: each program writes down what it was given."""

    def __init__(self) -> None:
        self.ran: list[tuple[object, ...]] = []
        for key in (("prefill", 8), ("prompt_logprobs", 8), ("decode", 2), ("edit_slot", 1)):
            self[key] = lambda *arguments, kind=key[0]: self._run(kind, *arguments)

    def _run(self, kind, *arguments):
        *held, packed = arguments
        plain = [int(each.pool) if isinstance(each, State) else each for each in held]
        self.ran.append((kind, *plain, packed.tolist()))
        result = jnp.asarray(packed)
        return {
            "prefill": lambda: (held[1].after(), result, "hidden"),
            "prompt_logprobs": lambda: result,
            "decode": lambda: (held[1].after(), result),
            "edit_slot": lambda: held[0].after(),
        }[kind]()


class Channel:
    """A channel that keeps what is sent; `failure` is what it explains errors with."""

    def __init__(self) -> None:
        self.frames: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self.failure: str | None = None
        self.send = self.frames.put
        self.receive = self.frames.get

    def watch_closely(self) -> None:
        pass

    def explain(self, error: Exception) -> Exception:
        return error if self.failure is None else ChannelError(self.failure)


STEPS = [
    (("edit_slot", 1), [7]),
    (("prefill", 8), [1, 2]),
    (("prompt_logprobs", 8), [3]),
    (("decode", 2), [4]),
    (("decode", 2), [5]),
]


def test_a_follower_runs_what_the_leader_runs() -> None:
    channel, leading, following = Channel(), Programs(), Programs()
    leader = leader_of(leading, channel)
    for key, packed in STEPS:
        results = leader.run(key, np.array(packed, np.int32))
        if key[0] != "edit_slot":
            assert leader.read(results).tolist() == packed
    channel.send(None)
    follow(runner_of(following), channel)
    assert following.ran == leading.ran
    assert leading.ran == [
        ("edit_slot", 0, [7]),
        ("prefill", "params", 1, [1, 2]),
        ("prompt_logprobs", "params", "hidden", [3]),
        ("decode", "params", 2, [4]),
        ("decode", "params", 3, [5]),
    ]


def test_hidden_states_are_those_of_the_prefill_just_before() -> None:
    programs = Programs()
    runner = runner_of(programs)
    runner.run(("prefill", 8), np.array([1], np.int32))
    runner.run(("decode", 2), np.array([1], np.int32))
    runner.run(("prompt_logprobs", 8), np.array([1], np.int32))
    assert programs.ran[-1] == ("prompt_logprobs", "params", None, [1])


def test_a_collective_that_fails_is_explained_by_who_is_gone() -> None:
    channel, programs = Channel(), Programs()
    leader = leader_of(programs, channel)

    def broken(*arguments: object) -> object:
        raise ValueError("connection reset by peer")

    programs["decode", 2] = broken
    with pytest.raises(ValueError, match="reset by peer"):
        leader.run(("decode", 2), np.array([1], np.int32))
    channel.failure = "process 1 of 2 is gone"
    with pytest.raises(ChannelError, match="process 1 of 2 is gone"):
        leader.run(("decode", 2), np.array([1], np.int32))


def test_a_follower_hears_of_an_error_of_its_own() -> None:
    """The device raises when results are waited for, and a follower waits for those of the step before. Where
    somebody is gone, that is why."""

    class Late:
        def block_until_ready(self) -> None:
            raise RuntimeError("out of memory")

    channel, programs = Channel(), Programs()
    programs["decode", 2] = lambda params, state, packed: (state, Late())
    for _ in range(2):
        channel.send(encode(("decode", 2), np.array([1], np.int32)))
    with pytest.raises(RuntimeError, match="out of memory"):
        follow(runner_of(programs), channel)
    for _ in range(2):
        channel.send(encode(("decode", 2), np.array([1], np.int32)))
    channel.failure = "process 0 of 2 is gone"
    with pytest.raises(ChannelError, match="process 0 of 2 is gone"):
        follow(runner_of(programs), channel)
