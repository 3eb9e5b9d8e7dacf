"""From the engine's thread to the event loop and back.

The engine calls a sink per increment, many in one step. They are gathered in a queue and the loop is woken
once for all that have come, not once per token. A `Call` is one HTTP request's share of the engine: one
engine request per prompt, aborted together when the client leaves.

Knows nothing of HTTP, JSON or of what an increment means.
"""

from __future__ import annotations

import asyncio
import collections
import time
from collections.abc import AsyncIterator, Sequence
from typing import Self

from jaxserve.engine.outputs import EngineBusy, Output, Sink
from jaxserve.protocols import EngineLike
from jaxserve.scheduler.types import Finish, Request
from jaxserve.server.errors import ApiError, engine_failed, queue_full, too_late
from jaxserve.server.holder import EngineHolder
from jaxserve.server.metrics import Metrics

WATCH_SECONDS = 0.5  # how often the engine's health is looked at while requests wait for it


class Bridge:
    """One per application; lives on one event loop."""

    def __init__(self, holder: EngineHolder, metrics: Metrics) -> None:
        self.holder = holder
        self.metrics = metrics
        self.calls: set[Call] = set()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._arrived: collections.deque[tuple[Call, int, Output]] = collections.deque()
        self._woken = False

    def open(self, engine: EngineLike, requests: Sequence[Request]) -> Call:
        """A call that submits when entered (`with bridge.open(...) as call`) and aborts when left early."""
        self._loop = asyncio.get_running_loop()
        return Call(self, engine, requests)

    def fail_all(self, error: ApiError) -> None:
        """Ends every open call with `error`."""
        for call in list(self.calls):
            call.fail(error)

    async def watch(self) -> None:
        """Until cancelled: nobody waits for an engine whose thread died without a word."""
        while True:
            await asyncio.sleep(WATCH_SECONDS)
            if self.calls and not self.holder.alive:
                self._deliver()  # what it said before it died comes first
                self.fail_all(self.holder.failure())

    def sink(self, call: Call, prompt: int) -> Sink:
        """The engine's side of one request; runs on the engine's thread."""

        def put(output: Output) -> None:
            self._arrived.append((call, prompt, output))
            # `_deliver` clears the flag before it empties the queue, so nothing appended is left behind
            if not self._woken:
                self._woken = True
                try:
                    assert self._loop is not None
                    self._loop.call_soon_threadsafe(self._deliver)
                except RuntimeError:  # the loop is closed: the server is gone, and so are its clients
                    pass

        return put

    def _deliver(self) -> None:
        self._woken = False
        now = time.monotonic()
        while self._arrived:
            call, prompt, output = self._arrived.popleft()
            call.push(prompt, output, now)


class Call:
    """The sequences of one HTTP request, from submission to the last increment."""

    def __init__(self, bridge: Bridge, engine: EngineLike, requests: Sequence[Request]) -> None:
        self._bridge = bridge
        self._engine = engine
        self._requests = requests
        self._buffer: list[tuple[int, Output]] = []
        self._error: ApiError | None = None
        self._event = asyncio.Event()
        self._unfinished = sum(request.params.sequences for request in requests)
        self._started = time.monotonic()
        self._last_token: dict[tuple[int, int], float] = {}  # (prompt, index) -> when its last token came

    def __enter__(self) -> Self:
        self._bridge.calls.add(self)
        try:
            self._engine.submit(
                *((request, self._bridge.sink(self, prompt)) for prompt, request in enumerate(self._requests))
            )
        except EngineBusy as error:
            self.__exit__()
            raise queue_full(error) from error
        except RuntimeError as error:  # the engine closed or died between the check and here
            self.__exit__()
            raise engine_failed(f"the engine takes no request: {error}") from error
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._bridge.calls.discard(self)
        if self._unfinished:
            for request in self._requests:
                self._engine.abort(request.request_id)

    def fail(self, error: ApiError) -> None:
        self._error = self._error or error
        self._event.set()

    def push(self, prompt: int, output: Output, now: float) -> None:
        """Takes an increment in; on the loop. After the call was left, increments go nowhere."""
        if self not in self._bridge.calls:
            return
        if output.token_ids:
            self._measure((prompt, output.index), len(output.token_ids), now)
        if output.finish_reason is not None:
            self._unfinished -= 1
        if output.error is not None:
            self.fail(engine_failed(output.error))
            return
        if output.finish_reason is Finish.TIMEOUT:
            self.fail(too_late())
            return
        self._buffer.append((prompt, output))
        self._event.set()

    async def batches(self) -> AsyncIterator[list[tuple[int, Output]]]:
        """All that has come since the last time, as (prompt, increment), until every sequence has ended.

        Raises ApiError where the engine fails or the deadline passes.
        """
        while True:
            await self._event.wait()
            self._event.clear()
            batch, self._buffer = self._buffer, []
            if batch:
                yield batch
            if self._error is not None:
                raise self._error
            if not self._unfinished and not self._buffer:
                return

    def _measure(self, sequence: tuple[int, int], tokens: int, now: float) -> None:
        last = self._last_token.get(sequence)
        if last is None:
            self._bridge.metrics.time_to_first_token.observe(now - self._started)
        else:
            self._bridge.metrics.inter_token_latency.observe((now - last) / tokens)
        self._last_token[sequence] = now
