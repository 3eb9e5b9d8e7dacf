"""Runs batch jobs: validates the input, has its lines answered, writes what comes of it.

Every line's reply is a function of the job and the line: ids, times and seeds are made from them, whatever
was going on when it ran. So a job that is interrupted anywhere goes on with the lines that have no result
yet, and its files are byte for byte those of a job that was not (where the engine's tokens do not depend on
what runs beside: `--reproducible`).

What is to be done next for a job follows from what the disk says of it. Only work needs the job's model and
one of the places for jobs at work: a job is validated, and ended when it was cancelled or its time is over,
whatever else there is to do.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import enum
import logging
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TYPE_CHECKING

from jaxserve.server.bridge import Bridge
from jaxserve.server.jobs import pace
from jaxserve.server.jobs.folder import FolderTaken, StorageError
from jaxserve.server.jobs.lines import InputLost, LineError, check_lines
from jaxserve.server.jobs.output import finish
from jaxserve.server.jobs.store import LOST_BODY, Batch, Store
from jaxserve.server.jobs.turns import Place, Turns
from jaxserve.server.jobs.work import Work

if TYPE_CHECKING:
    from jaxserve.server.jobs.desk import Desk

log = logging.getLogger(__name__)

MAX_JOBS = 8  # that are at work side by side
MAX_ASIDE = 4  # that are validated, and that are ended, side by side
POLL_SECONDS = 0.5  # how often the folder is looked at for jobs, unless it is told of one
FAULT_SECONDS = 60.0  # after a fault of ours, which would most likely come again at once


class Phase(enum.Enum):
    """What a job needs next."""

    VALIDATE = enum.auto()
    WORK = enum.auto()
    END = enum.auto()


def next_phase(batch: Batch, now: float) -> Phase:
    """Of one that has not ended. now: seconds since the epoch."""
    if batch.lost or batch.status in ("cancelling", "finalizing") or batch.answered:
        return Phase.END
    if batch.body["expires_at"] <= now:
        return Phase.END
    return Phase.VALIDATE if batch.status == "validating" else Phase.WORK


@dataclasses.dataclass(slots=True)
class _Running:
    """leaving: set when no more lines are to be begun. stopped: when those that run are given up, too."""

    batch: Batch
    phase: Phase
    since: float
    leaving: asyncio.Event = dataclasses.field(default_factory=asyncio.Event)
    stopped: asyncio.Event = dataclasses.field(default_factory=asyncio.Event)
    task: asyncio.Task[None] | None = None

    @property
    def place(self) -> Place:
        return Place(self.batch.id, self.batch.tenant, self.since, self.leaving.is_set())


class Runner:
    """Lives on the event loop."""

    def __init__(self, desk: Desk, bridge: Bridge) -> None:
        self._desk = desk
        self._bridge = bridge
        self._work = Work(desk, bridge)
        self._running: dict[str, _Running] = {}
        self._faulty: dict[str, float] = {}  # jobs that failed for a fault of ours: when they are tried again
        self._turns = {
            Phase.VALIDATE: Turns(MAX_ASIDE),
            Phase.WORK: Turns(MAX_JOBS),
            Phase.END: Turns(MAX_ASIDE),
        }
        self._woken = asyncio.Event()
        self._loop: asyncio.Task[None] | None = None

    @property
    def unwritten(self) -> int:
        return self._work.writer.waiting if self._work.writer.blocked else 0

    def start(self) -> None:
        self._loop = asyncio.create_task(self._run())
        self._work.writer.start()

    def wake(self) -> None:
        """There is a new job, or one that was cancelled."""
        self._woken.set()

    def cancel(self, batch_id: str) -> None:
        if batch_id in self._running:
            self._running[batch_id].stopped.set()
        self.wake()

    def pause(self) -> None:
        self._work.paused = True

    def resume(self) -> None:
        self._work.paused = False
        self.wake()

    async def stop(self) -> None:
        self.pause()
        tasks = [task for task in (self._loop, *(one.task for one in self._running.values())) if task]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._work.writer.stop()

    async def _run(self) -> None:
        while True:
            wait = POLL_SECONDS
            try:
                await self._look()
            except FolderTaken as error:  # told when it was found
                log.debug("jobs cannot be looked up: %s", error)
            except Exception as error:
                wait = pace.RETRY_SECONDS
                trace = None if isinstance(error, StorageError) else error
                log.error("batch jobs cannot be looked up: %s; in %g s again", error, wait, exc_info=trace)
            self._woken.clear()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._woken.wait(), wait)

    async def _look(self) -> None:
        """Begins what can be begun."""
        if self._work.paused or not self._desk.exists:
            return
        batches = await self._desk.try_run(lambda store: store.open_batches())
        engine, model = self._bridge.holder.engine, self._bridge.holder.model_name
        if engine is not None:
            self._work.room.places = 2 * engine.stats()["slots"] + 8
        now = time.monotonic()
        self._faulty = {name: until for name, until in self._faulty.items() if until > now}
        waiting: dict[Phase, dict[str, Batch]] = {phase: {} for phase in Phase}
        for batch in batches:
            phase = next_phase(batch, time.time())
            # one of another model waits for a server that has it
            runs = phase is not Phase.WORK or (engine is not None and batch.model == model)
            if runs and batch.id not in self._running and batch.id not in self._faulty:
                waiting[phase][batch.id] = batch
        for phase, turns in self._turns.items():
            taken = [one.place for one in self._running.values() if one.phase is phase]
            queue = [(batch.id, batch.tenant) for batch in waiting[phase].values()]
            begun = turns.begin(queue, taken, now)
            for name in begun:
                running = _Running(waiting[phase][name], phase, now)
                self._running[name] = running
                running.task = asyncio.create_task(self._job(running))
            if phase is Phase.WORK:
                left = [job for job in queue if job[0] not in begun]
                leaving = turns.leave(left, taken, now) if not begun else None
                if leaving is not None:
                    self._running[leaving].leaving.set()

    async def _job(self, running: _Running) -> None:
        """One phase; what is next is looked up again."""
        batch = running.batch
        try:
            path = await self._on_disk(lambda store: store.path(batch.input_file_id))
            match running.phase:
                case _ if batch.lost:
                    await self._on_disk(lambda store: store.fail(batch.id, LOST_BODY["errors"]))
                case Phase.VALIDATE:
                    await self._validate(batch, path)
                case Phase.WORK:
                    await self._work_until_stopped(running, path)
                case Phase.END:
                    await self._until_written(lambda: finish(self._desk, batch, path))
                    log.info("batch %s is done", batch.id)
        except InputLost:
            error = LineError("input_file_lost", f"{batch.input_file_id} is no longer there")
            log.error("batch %s failed: %s", batch.id, error)
            await self._on_disk(lambda store: store.fail(batch.id, [error.body()]))
        except Exception:
            log.exception("batch %s failed; it is taken up again in %g s", batch.id, FAULT_SECONDS)
            self._faulty[batch.id] = time.monotonic() + FAULT_SECONDS
        finally:
            self._running.pop(batch.id, None)
            self._woken.set()

    async def _validate(self, batch: Batch, path: Path) -> None:
        endpoint = batch.body["endpoint"]
        count, errors = await self._until_written(lambda: asyncio.to_thread(check_lines, path, endpoint))
        now = int(time.time())
        if errors:
            await self._on_disk(
                lambda store: store.change(
                    batch.id,
                    "failed",
                    only_from=["validating"],
                    failed_at=now,
                    errors=[error.body() for error in errors],
                )
            )
        else:
            await self._on_disk(
                lambda store: store.change(
                    batch.id, "in_progress", only_from=["validating"], in_progress_at=now, total=count
                )
            )

    async def _work_until_stopped(self, running: _Running, path: Path) -> None:
        """Until every line is done, the job has given up its place or is cancelled, or its time is over."""
        batch = running.batch
        done = await self._on_disk(lambda store: store.finished_lines(batch.id))
        working = asyncio.create_task(self._work.run(batch, path, done, running.leaving))
        stopping = asyncio.create_task(running.stopped.wait())
        try:
            left = max(0.0, batch.body["expires_at"] - time.time())
            await asyncio.wait({working, stopping}, timeout=left, return_when=asyncio.FIRST_COMPLETED)
            if working.done():
                working.result()
        finally:
            for task in (working, stopping):
                task.cancel()
            await asyncio.gather(working, stopping, return_exceptions=True)

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
