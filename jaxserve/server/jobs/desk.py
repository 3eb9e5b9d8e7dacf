"""Files and batch jobs as the routes see them: one thread that owns the data folder, and who runs the jobs.

The folder is opened when it exists, else made by the first upload. While another server has it, the routes
answer 503 and say so.
"""

from __future__ import annotations

import asyncio
import collections
import concurrent.futures
import contextlib
import logging
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from jaxserve.config import ServerOptions
from jaxserve.server.bridge import Bridge
from jaxserve.server.errors import ApiError, not_ready
from jaxserve.server.jobs.folder import FolderTaken, StorageError
from jaxserve.server.jobs.runner import Runner
from jaxserve.server.jobs.store import Bounds, OverBound, Store

log = logging.getLogger(__name__)

SWEEP_SECONDS = 60.0
MAX_FILES = 10_000  # of one key


def data_folder(options: ServerOptions) -> Path:
    if options.data_dir is not None:
        return Path(options.data_dir)
    state = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    return Path(state) / "jaxserve"


class Desk:
    """uploading: bytes of files that are being written, by tenant."""

    def __init__(self, options: ServerOptions, bridge: Bridge) -> None:
        self.options = options
        self.folder = data_folder(options)
        self.max_file_bytes = options.max_file_size * 10**6
        of_all = options.max_storage * 10**6
        # with several keys, none can fill it for all others
        of_key = of_all if options.api_key_file is None else of_all // 2
        self.bounds = Bounds(MAX_FILES, of_key, of_all)
        self.runner = Runner(self, bridge)
        self.uploading: collections.Counter[bytes] = collections.Counter()
        self._store: Store | None = None
        self._counts: Mapping[str, int] = {}
        self._thread = concurrent.futures.ThreadPoolExecutor(1, "jaxserve-jobs")
        self._sweeping: asyncio.Task[None] | None = None
        self._warned = False

    async def start(self) -> None:
        """Goes on with the jobs that an earlier server left."""
        self.runner.start()
        self._sweeping = asyncio.create_task(self._sweep())

    def pause(self) -> None:
        """No line is begun any more; those that run may end."""
        self.runner.pause()

    async def stop(self) -> None:
        """Results that came are written; what runs is given up, for the next server to do again."""
        if self._sweeping is not None:
            self._sweeping.cancel()
        await self.runner.stop()
        await asyncio.get_running_loop().run_in_executor(self._thread, self._close)
        self._thread.shutdown(wait=False)

    async def run[T](self, work: Callable[[Store], T]) -> T:
        """`work(store)` on the folder's thread. Raises ApiError where the folder cannot be used."""
        try:
            return await self.try_run(work)
        except FolderTaken as error:
            text = f"files and batches are not available: {error}; give this one another --data-dir"
            raise not_ready(text, code="data_dir_in_use", retry_after=30) from None
        except StorageError as error:
            raise storage_failed(error) from None

    async def try_run[T](self, work: Callable[[Store], T]) -> T:
        """Likewise; raises FolderTaken or StorageError."""

        def on_thread() -> T:
            store = self._open()
            result = work(store)
            with contextlib.suppress(StorageError):  # the work was done
                self._counts = store.count_batches()
            return result

        return await asyncio.get_running_loop().run_in_executor(self._thread, on_thread)

    def check_room(self, tenant: bytes) -> None:
        """Raises OverBound where what the tenant uploads is more than may be stored."""
        if self._store is not None:
            mine = self.uploading[tenant]
            others = self.uploading.total() - mine
            self._store.check_room(tenant, mine, self.bounds, uploading=others)

    def has_room(self, tenant: bytes) -> bool:
        """Whether another result of the tenant's may be stored."""
        try:
            if self._store is not None:
                self._store.check_room(tenant, 1, self.bounds)
        except OverBound:
            return False
        return True

    @property
    def exists(self) -> bool:
        """Whether there may be anything in the folder."""
        return self._store is not None or (self.folder / "jobs.sqlite").exists()

    def count_jobs(self) -> Mapping[str, int]:
        return self._counts

    def count_unwritten(self) -> int:
        return self.runner.unwritten

    def _open(self) -> Store:
        if self._store is None:
            try:
                self._store = Store(self.folder)
            except FolderTaken as error:
                if not self._warned:
                    self._warned = True
                    log.warning("no files and batches here: %s; give this server another --data-dir", error)
                raise
        return self._store

    def _close(self) -> None:
        if self._store is not None:
            self._store.close()
            self._store = None

    async def _sweep(self) -> None:
        while True:
            if self.exists:
                try:
                    await self.try_run(lambda store: store.sweep(int(time.time())))
                except FolderTaken:
                    pass  # told when it was found
                except Exception:
                    log.exception("the data folder could not be swept; tried again in %g s", SWEEP_SECONDS)
            await asyncio.sleep(SWEEP_SECONDS)


def storage_failed(error: StorageError) -> ApiError:
    """507, which clients would repeat at once if they were not told otherwise."""
    log.error("the data folder cannot be written: %s", error)
    why = "it is full" if error.full else "it cannot be written"
    return ApiError(
        507,
        f"the server's disk does not take this: {why}",
        type="server_error",
        code="insufficient_storage",
        headers={"x-should-retry": "false"},
    )
