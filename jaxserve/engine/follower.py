"""One engine in several processes: process 0 plans, and all run the same programs in the same order.

What travels is what a program takes: its kind, its bucket and the one packed array, sent before process 0
dispatches the program itself. No plan depends on a token that was not read back, so that the others need no
scheduler and are never asked anything; results are replicated, and process 0 reads its own copy.

    u8 length of the kind, the kind, i32 bucket, u8 axes, i32 size of each, then the array (little-endian)
"""

from __future__ import annotations

import struct

import jax
import numpy as np
from numpy.typing import NDArray

from jaxserve.engine.programs import Key, Programs
from jaxserve.engine.runner import Runner
from jaxserve.engine.state import EngineState
from jaxserve.models.decoder import Params
from sharding.channel import Channel

_INT = np.dtype("<i4")


class LeadingRunner(Runner):
    """Process 0's: what it runs, the others run too. Where one of them is gone, that is what it raises."""

    def __init__(self, programs: Programs, params: Params, state: EngineState, channel: Channel) -> None:
        super().__init__(programs, params, state)
        self._channel = channel

    def run(self, key: Key, packed: NDArray[np.int32]) -> jax.Array | None:
        self._channel.send(encode(key, packed))
        try:
            return super().run(key, packed)
        except Exception as error:
            raise self._channel.explain(error) from error

    def read(self, results: jax.Array) -> NDArray[np.int32]:
        try:
            return super().read(results)
        except Exception as error:
            raise self._channel.explain(error) from error


def follow(runner: Runner, channel: Channel) -> None:
    """Runs what process 0 runs until it closes the group; it is one program ahead, as process 0 is.

    Raises ChannelError if a process is gone, what the device raises otherwise.
    """
    before: jax.Array | None = None
    try:
        with jax.no_tracing():
            while (frame := channel.receive()) is not None:
                channel.watch_closely()
                now = runner.run(*decode(frame))
                if before is not None:
                    before.block_until_ready()
                before = now if now is not None else before
            runner.settle()
    except Exception as error:  # a collective fails as soon as one of its processes is gone
        raise channel.explain(error) from error


def encode(key: Key, packed: NDArray[np.int32]) -> bytes:
    kind, bucket = key[0].encode(), key[1]
    head = struct.pack(f"<B{len(kind)}siB{packed.ndim}i", len(kind), kind, bucket, packed.ndim, *packed.shape)
    return head + packed.astype(_INT, copy=False).tobytes()


def decode(frame: bytes) -> tuple[Key, NDArray[np.int32]]:
    """The inverse of `encode`. Raises ValueError or struct.error for what is none."""
    length = frame[0]
    kind, bucket, axes = struct.unpack_from(f"<{length}siB", frame, 1)
    at = 1 + length + 5
    shape = struct.unpack_from(f"<{axes}i", frame, at)
    return (kind.decode(), bucket), np.frombuffer(frame, _INT, offset=at + 4 * axes).reshape(shape)
