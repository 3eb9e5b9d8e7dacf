"""How many lines of batch jobs are under way, and how their results come to the disk."""

from __future__ import annotations

import asyncio
import collections
import contextlib
import dataclasses
import logging
from typing import TYPE_CHECKING

from jaxserve.server.jobs.folder import FolderTaken, StorageError
from jaxserve.server.jobs.store import Result

if TYPE_CHECKING:
    from jaxserve.server.jobs.desk import Desk

log = logging.getLogger(__name__)

RETRY_SECONDS = 5.0  # after which the disk is tried again


class Room:
    """Who may be under way: `places` lines, of `max_bytes` together; first come, first served, so that jobs
    take turns. A line that is larger than that comes alone."""

    def __init__(self, max_bytes: int) -> None:
        self.places = 8
        self._max_bytes = max_bytes
        self._lines = 0
        self._bytes = 0
        self._waiting: collections.deque[tuple[int, asyncio.Future[None]]] = collections.deque()

    async def enter(self, size: int) -> None:
        entry = (size, asyncio.get_running_loop().create_future())
        self._waiting.append(entry)
        self._admit()
        try:
            await entry[1]
        except asyncio.CancelledError:
            if entry in self._waiting:
                self._waiting.remove(entry)
            else:
                self.leave(size)
            raise

    def leave(self, size: int) -> None:
        self._lines -= 1
        self._bytes -= size
        self._admit()

    def _admit(self) -> None:
        while self._waiting and self._fits(self._waiting[0][0]):
            size, admitted = self._waiting.popleft()
            self._lines += 1
            self._bytes += size
            if admitted.cancelled():
                self._lines -= 1
                self._bytes -= size
            else:
                admitted.set_result(None)

    def _fits(self, size: int) -> bool:
        return not self._lines or (self._lines < self.places and self._bytes + size <= self._max_bytes)


@dataclasses.dataclass(slots=True)
class _Unwritten:
    result: Result
    written: asyncio.Future[None]


class Writer:
    """Writes results, all that have come in one transaction, and tries again while the disk is full.

    blocked: the disk did not take the last ones.
    """

    def __init__(self, desk: Desk) -> None:
        self._desk = desk
        self._queue: list[_Unwritten] = []
        self._come = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self.blocked = False

    @property
    def waiting(self) -> int:
        return len(self._queue)

    def start(self) -> None:
        self._task = asyncio.create_task(self._run())

    async def put(self, result: Result) -> None:
        """Returns when it is on the disk."""
        entry = _Unwritten(result, asyncio.get_running_loop().create_future())
        self._queue.append(entry)
        self._come.set()
        await entry.written

    async def stop(self) -> None:
        """Tries once more to write what is there."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        if self._queue:
            with contextlib.suppress(StorageError, FolderTaken):
                await self._write()

    async def _run(self) -> None:
        while True:
            await self._come.wait()
            self._come.clear()
            while self._queue:
                try:
                    await self._write()
                    self.blocked = False
                except (StorageError, FolderTaken) as error:
                    self.blocked = True
                    text = "%d results of batch jobs wait: %s; tried again in %g s"
                    log.error(text, len(self._queue), error, RETRY_SECONDS)
                    await asyncio.sleep(RETRY_SECONDS)
                except Exception:  # a fault of ours: results are kept, as long as the process lives
                    self.blocked = True
                    log.exception("results of batch jobs wait; tried again in %g s", RETRY_SECONDS)
                    await asyncio.sleep(RETRY_SECONDS)

    async def _write(self) -> None:
        taken = self._queue[:]
        await self._desk.try_run(lambda store: store.add_results([entry.result for entry in taken]))
        del self._queue[: len(taken)]
        for entry in taken:
            if not entry.written.done():
                entry.written.set_result(None)
