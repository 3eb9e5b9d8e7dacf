"""Runs batch jobs: validates the input, sends its lines to the engine as batch work, writes what comes.

Every line's reply is a function of the job and the line: ids, times and seeds are made from them, whatever
was going on when it ran. So a job that is interrupted anywhere goes on with the lines that have no result
yet, and its files are byte for byte those of a job that was not (where the engine's tokens do not depend on
what runs beside: `--reproducible`).

A line holds a place among a bounded number from when it is read until its result is on the disk. When the
disk is full results wait, so no more lines are read; the job goes on once there is room.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxserve.protocols import EngineLike
from jaxserve.server.bridge import Bridge
from jaxserve.server.errors import ApiError
from jaxserve.server.jobs import pace
from jaxserve.server.jobs.answer import Answers, answer_line
from jaxserve.server.jobs.lines import Line, check_lines, lines
from jaxserve.server.jobs.output import finish
from jaxserve.server.jobs.pace import Room, Writer
from jaxserve.server.jobs.store import Batch, FolderTaken, StorageError, Store

if TYPE_CHECKING:
    from jaxserve.server.jobs.desk import Desk

log = logging.getLogger(__name__)

MAX_JOBS = 8  # that run side by side, the oldest first
MAX_BYTES = 64 * 2**20  # of lines that are held at once; one line alone may be larger
POLL_SECONDS = 0.5  # how often the folder is looked at for jobs, unless it is told of one
BUSY_SECONDS = 0.02
FAULT_SECONDS = 60.0  # after a fault of ours, which would most likely come again at once
MAX_FAILURES = 3  # of one line, with an engine that is well; then that is its result


class Runner:
    """Lives on the event loop."""

    def __init__(self, desk: Desk, bridge: Bridge) -> None:
        self._desk = desk
        self._bridge = bridge
        self._jobs: dict[str, asyncio.Task[None]] = {}
        self._stops: dict[str, asyncio.Event] = {}  # of jobs that run: set when they are cancelled
        self._woken = asyncio.Event()
        self._paused = False
        self._loop: asyncio.Task[None] | None = None
        self._room = Room(MAX_BYTES)
        self._turn = asyncio.Lock()
        self._writer = Writer(desk)

    @property
    def unwritten(self) -> int:
        return self._writer.waiting if self._writer.blocked else 0

    def start(self) -> None:
        self._loop = asyncio.create_task(self._run())
        self._writer.start()

    def wake(self) -> None:
        """There is a new job, or one that was cancelled."""
        self._woken.set()

    def cancel(self, batch_id: str) -> None:
        if batch_id in self._stops:
            self._stops[batch_id].set()
        self.wake()

    def pause(self) -> None:
        self._paused = True

    async def stop(self) -> None:
        self._paused = True
        tasks = [task for task in (self._loop, *self._jobs.values()) if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._writer.stop()

    async def _run(self) -> None:
        while True:
            try:
                await self._begin_jobs()
            except (FolderTaken, StorageError) as error:
                log.debug("jobs cannot be looked up: %s", error)
            self._woken.clear()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._woken.wait(), POLL_SECONDS)

    async def _begin_jobs(self) -> None:
        engine = self._bridge.holder.engine
        if self._paused or engine is None or not self._desk.exists:
            return
        model = self._bridge.holder.model_name  # jobs of another model wait for a server that has it
        self._room.places = 2 * engine.stats()["slots"] + 8
        for batch in await self._desk.try_run(lambda store: store.open_batches(model)):
            if batch.id not in self._jobs and len(self._jobs) < MAX_JOBS:
                self._stops[batch.id] = asyncio.Event()
                self._jobs[batch.id] = asyncio.create_task(self._job(batch))

    async def _job(self, batch: Batch) -> None:
        try:
            await self._carry_out(batch)
        except Exception:
            log.exception("batch %s failed; it is taken up again in %g s", batch.id, FAULT_SECONDS)
            await asyncio.sleep(FAULT_SECONDS)
        finally:
            self._jobs.pop(batch.id, None)
            self._stops.pop(batch.id, None)
            self._woken.set()

    async def _carry_out(self, batch: Batch) -> None:
        """From whatever state the job was left in to its end."""
        path = await self._on_disk(lambda store: store.path(batch.input_file_id))
        if batch.status == "validating":
            await self._validate(batch, path)
        current = await self._current(batch.id)
        if current.status == "in_progress":
            await self._work_until_stopped(current, path)
            current = await self._current(batch.id)
        if current.ended:
            return
        await self._until_written(lambda: finish(self._desk, current, path))
        log.info("batch %s is done", batch.id)

    async def _work_until_stopped(self, batch: Batch, path: Path) -> None:
        """Returns when every line is done, the job is cancelled, or its time is over."""
        working = asyncio.create_task(self._work(batch, path))
        stopping = asyncio.create_task(self._stops[batch.id].wait())
        try:
            left = max(0.0, batch.body["expires_at"] - time.time())
            await asyncio.wait({working, stopping}, timeout=left, return_when=asyncio.FIRST_COMPLETED)
            if working.done():
                working.result()
        finally:
            for task in (working, stopping):
                task.cancel()
            await asyncio.gather(working, stopping, return_exceptions=True)

    async def _current(self, batch_id: str) -> Batch:
        batch = await self._on_disk(lambda store: store.batch(batch_id))
        assert batch is not None
        return batch

    async def _validate(self, batch: Batch, path: Path) -> None:
        endpoint = batch.body["endpoint"]
        count, errors = await self._until_written(lambda: asyncio.to_thread(check_lines, path, endpoint))
        now = int(time.time())
        if errors:
            listed = [error.body() for error in errors]
            await self._on_disk(
                lambda store: store.change(
                    batch.id, "failed", only_from=["validating"], failed_at=now, errors=listed
                )
            )
        else:
            await self._on_disk(
                lambda store: store.change(
                    batch.id, "in_progress", only_from=["validating"], in_progress_at=now, total=count
                )
            )

    async def _work(self, batch: Batch, path: Path) -> None:
        """Until every line has a result on the disk. Leaves no line running when cancelled."""
        done = await self._on_disk(lambda store: store.finished_lines(batch.id))
        running: set[asyncio.Task[None]] = set()
        try:
            async for line in _ahead(lines(path, batch.body["endpoint"])):
                if line.number in done:
                    continue
                await self._room.enter(line.size)
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

    def _left(self, size: int, task: asyncio.Task[None]) -> None:
        self._room.leave(size)

    async def _line(self, batch: Batch, line: Line) -> None:
        failures = 0
        while True:
            engine = await self._ready()
            try:
                result = await answer_line(self._bridge, self._desk.options, engine, batch, line, self._begin)
                break
            except ApiError as error:
                # the engine died, or takes no more just now: none of that is the line's
                failures += error.status >= 500 and engine.healthy and not self._paused
                if failures == MAX_FAILURES:
                    result = await answer_line(
                        self._bridge, self._desk.options, engine, batch, line, self._begin, failure=error
                    )
                    break
                wait = int((error.headers or {}).get("Retry-After", 1))
                log.debug("batch %s line %d waits: %s", batch.id, line.number, error)
                await asyncio.sleep(wait)
        await self._writer.put(result)

    async def _ready(self) -> EngineLike:
        """The engine, once it is well."""
        while True:
            engine = self._bridge.holder.engine
            if engine is not None and engine.healthy and not self._paused:
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

    async def _on_disk[T](self, work: Callable[[Store], T]) -> T:
        return await self._until_written(lambda: self._desk.try_run(work))

    async def _until_written[T](self, work: Callable[[], Awaitable[T]]) -> T:
        """Tries until the disk takes it."""
        while True:
            try:
                return await work()
            except (StorageError, OSError) as error:
                log.error("batch jobs wait: %s; tried again in %g s", error, pace.RETRY_SECONDS)
                await asyncio.sleep(pace.RETRY_SECONDS)


async def _ahead(source: Iterator[Line]) -> AsyncIterator[Line]:
    """The lines, each read on a thread: a long one takes a while to parse."""
    while (line := await asyncio.to_thread(next, source, None)) is not None:
        yield line
