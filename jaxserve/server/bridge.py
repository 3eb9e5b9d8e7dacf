"""From the engine's thread to the event loop and back.

The engine calls a sink per increment, many in one step. They are gathered in a queue and the loop is woken
once for all that have come, not once per token. A `Call` is one HTTP request's share of the engine: one
engine request per prompt, aborted together when the client leaves.

Knows nothing of HTTP, JSON or of what an increment means.
"""

from __future__ import annotations

import asyncio
import collections
import dataclasses
import logging
import time
from collections.abc import AsyncIterator, Sequence
from typing import Self

from jaxserve.engine.outputs import EngineBusy, Output, Sink
from jaxserve.protocols import EngineLike
from jaxserve.scheduler.types import Finish, Request
from jaxserve.server import record
from jaxserve.server.errors import ApiError, bad_request, engine_failed, queue_full, too_late
from jaxserve.server.holder import EngineHolder
from jaxserve.server.metrics import Metrics

log = logging.getLogger(__name__)

WATCH_SECONDS = 0.5  # how often the engine's health is looked at while requests wait for it
# increments that a client may leave unread: at 100 tokens a second, over a minute of them
MAX_UNREAD = 8192


class Bridge:
    """One per application; lives on one event loop."""

    def __init__(self, holder: EngineHolder, metrics: Metrics) -> None:
        self.holder = holder
        self.metrics = metrics
        self.calls: set[Call] = set()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._arrived: collections.deque[tuple[Call, int, Output]] = collections.deque()
        self._woken = False
        self._closed: ApiError | None = None

    def open(self, engine: EngineLike, requests: Sequence[Request]) -> Call:
        """A call that submits when entered (`with bridge.open(...) as call`) and aborts when left early.

        Raises ApiError once the bridge is closed.
        """
        if self._closed is not None:
            raise self._closed
        self._loop = asyncio.get_running_loop()
        return Call(self, engine, requests)

    def close(self, error: ApiError) -> None:
        """Ends every open call, and every later one, with `error`."""
        self._closed = error
        self.fail_all(error)

    def fail_all(self, error: ApiError) -> None:
        """Ends every open call with `error`."""
        for call in list(self.calls):
            call.fail(error)

    async def watch(self) -> None:
        """Until cancelled: nobody waits for an engine whose thread died without a word."""
        while True:
            await asyncio.sleep(WATCH_SECONDS)
            self.metrics.sample()
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
            try:
                call.push(prompt, output, now)
            except Exception:  # a fault of ours: one client hears of it, the others' increments go on
                log.exception("an increment could not be taken in")
                call.fail(engine_failed("an internal error"))


class Call:
    """The sequences of one HTTP request, from submission to the last increment.

    sending: what was taken last is on its way to the client, who reads more slowly than it is written.
    """

    def __init__(self, bridge: Bridge, engine: EngineLike, requests: Sequence[Request]) -> None:
        self._bridge = bridge
        self._engine = engine
        self._requests = requests
        self._buffer: list[tuple[int, Output]] = []
        self._error: ApiError | None = None
        self._event = asyncio.Event()
        self.sending = False
        self._unfinished = sum(request.params.sequences for request in requests)
        self._started = time.monotonic()
        self._progress: dict[tuple[int, int], _Progress] = {}  # of each (prompt, index)
        self._work = record.work()

    def __enter__(self) -> Self:
        self._bridge.calls.add(self)
        self._submitted()
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
        self._measure(prompt, output, now)
        if output.finish_reason is not None:
            self._unfinished -= 1
        if output.error is not None:
            at_fault = output.param is not None
            self.fail(
                bad_request(output.error, param=output.param) if at_fault else engine_failed(output.error)
            )
            return
        if output.finish_reason is Finish.TIMEOUT:
            self.fail(too_late())
            return
        self._buffer.append((prompt, output))
        self._event.set()
        if self.sending and len(self._buffer) > MAX_UNREAD:
            self._buffer.clear()
            self.fail(
                ApiError(408, "the client does not read its reply", type="timeout_error", code="timeout")
            )

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

    def _submitted(self) -> None:
        work, first = self._work, self._requests[0]
        self._started = time.monotonic()
        work.model = self._bridge.holder.model_name
        work.submitted = self._started if work.submitted is None else work.submitted
        work.prompts += len(self._requests)
        work.prompt_tokens += sum(len(request.prompt_token_ids) for request in self._requests)
        work.params = {
            "gen_ai.request.max_tokens": first.max_total_tokens - len(first.prompt_token_ids),
            "gen_ai.request.temperature": first.params.temperature,
            "gen_ai.request.top_p": first.params.top_p,
            "gen_ai.request.choice.count": first.params.n,
        }

    def _measure(self, prompt: int, output: Output, now: float) -> None:
        """What an increment says of waiting and of speed; to the metrics, and to the request's record."""
        work, metrics = self._work, self._bridge.metrics
        progress = self._progress.get((prompt, output.index))
        if progress is None:
            progress = self._progress[prompt, output.index] = _Progress()
            progress.cached = output.cached_tokens
            if output.admitted is not None:
                metrics.queue_time.observe(max(0.0, output.admitted - self._started))
                work.admitted = (
                    output.admitted if work.admitted is None else min(work.admitted, output.admitted)
                )
            if output.index == 0:
                work.cached_tokens += output.cached_tokens
        tokens = len(output.token_ids)
        if tokens:
            if progress.last is None:
                metrics.time_to_first_token.observe(now - self._started)
                progress.first = now
            else:
                metrics.inter_token_latency.observe((now - progress.last) / tokens)
            progress.last = now
            progress.tokens += tokens
            work.first = now if work.first is None else work.first
            work.last = now
            work.generated_tokens += tokens
        if output.finish_reason is not None:
            reason = "error" if output.error is not None else str(output.finish_reason)
            work.finished(reason)
            length = len(self._requests[prompt].prompt_token_ids)
            metrics.finished(reason, now - self._started, length, progress.tokens, progress.cached)


@dataclasses.dataclass(slots=True)
class _Progress:
    """How far a sequence has come: its tokens, when first and last came, the cached ones of its prompt."""

    tokens: int = 0
    first: float | None = None
    last: float | None = None
    cached: int = 0
