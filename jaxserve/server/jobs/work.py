"""A job's lines: each is read, sent to the engine as batch work, and its result written.

A line holds a place among a bounded number from when it is read until its result is on the disk. When the
disk is full results wait, so no more lines are read; the job goes on once there is room. Nor are they while
the job's key has as much stored as it may.
"""

from __future__ import annotations

import asyncio
import functools
import logging
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxserve.protocols import EngineLike
from jaxserve.server.bridge import Bridge
from jaxserve.server.errors import ApiError
from jaxserve.server.jobs.answer import Answers, answer_line
from jaxserve.server.jobs.lines import Line, lines
from jaxserve.server.jobs.pace import Room, Writer
from jaxserve.server.jobs.store import Batch

if TYPE_CHECKING:
    from jaxserve.server.jobs.desk import Desk

log = logging.getLogger(__name__)

MAX_BYTES = 64 * 2**20  # of lines that are held at once; one line alone may be larger
POLL_SECONDS = 0.5  # how often it is looked whether what a line waits for is there
BUSY_SECONDS = 0.02
MAX_FAILURES = 3  # of one line, with an engine that is well; then that is its result


class Work:
    """The lines of all jobs. paused: none is begun any more; those that run may end."""

    def __init__(self, desk: Desk, bridge: Bridge) -> None:
        self.paused = False
        self.room = Room(MAX_BYTES)
        self.writer = Writer(desk)
        self._desk = desk
        self._bridge = bridge
        self._turn = asyncio.Lock()

    async def run(self, batch: Batch, path: Path, done: set[int], leaving: asyncio.Event) -> None:
        """Until every line has a result on the disk; or, once `leaving` is set, those that were begun.

        done: the lines that have one. Leaves no line running when cancelled. Raises InputLost or OSError.
        """
        running: set[asyncio.Task[None]] = set()
        try:
            async for line in _ahead(lines(path, batch.body["endpoint"])):
                if line.number in done:
                    continue
                await self._until_stored(batch, leaving)
                if leaving.is_set():
                    break
                await self.room.enter(line.size)
                task = asyncio.create_task(self._line(batch, line))
                running.add(task)
                task.add_done_callback(running.discard)
                # not in the task itself: one that is cancelled at once never begins
                task.add_done_callback(functools.partial(self._left, line.size))
            await asyncio.gather(*running)
        finally:
            for task in running:
                task.cancel()
            await asyncio.gather(*running, return_exceptions=True)

    async def _until_stored(self, batch: Batch, leaving: asyncio.Event) -> None:
        """Until another result may be stored."""
        told = False
        while not leaving.is_set() and not self._desk.has_room(batch.tenant):
            if not told:
                log.warning("batch %s waits: there is no room for its results (--max-storage)", batch.id)
            told = True
            await asyncio.sleep(POLL_SECONDS)

    def _left(self, size: int, task: asyncio.Task[None]) -> None:
        self.room.leave(size)

    async def _line(self, batch: Batch, line: Line) -> None:
        failures = 0
        while True:
            engine = await self._ready()
            try:
                result = await answer_line(self._bridge, self._desk.options, engine, batch, line, self._begin)
                break
            except ApiError as error:
                # the engine died, or takes no more just now: none of that is the line's
                failures += error.status >= 500 and engine.healthy and not self.paused
                if failures == MAX_FAILURES:
                    result = await answer_line(
                        self._bridge, self._desk.options, engine, batch, line, self._begin, failure=error
                    )
                    break
                wait = int((error.headers or {}).get("Retry-After", 1))
                log.debug("batch %s line %d waits: %s", batch.id, line.number, error)
                await asyncio.sleep(wait)
        await self.writer.put(result)

    async def _ready(self) -> EngineLike:
        """The engine, once it is well."""
        while True:
            engine = self._bridge.holder.engine
            if engine is not None and engine.healthy and not self.paused:
                return engine
            await asyncio.sleep(POLL_SECONDS)

    async def _begin(self, submit: Callable[[], Coroutine[Any, Any, Answers]]) -> asyncio.Task[Answers]:
        """Submits once few wait for the engine: its queue is for those who wait for an answer."""
        async with self._turn:
            while True:
                stats = (await self._ready()).stats()
                if stats["waiting"] < max(2, stats["slots"] // 2):
                    break
                await asyncio.sleep(BUSY_SECONDS)
            task = asyncio.create_task(submit())
            await asyncio.sleep(0)  # it has begun, and so counts for the next one
            return task


async def _ahead(source: Iterator[Line]) -> AsyncIterator[Line]:
    """The lines, each read on a thread: a long one takes a while to parse."""
    while (line := await asyncio.to_thread(next, source, None)) is not None:
        yield line
