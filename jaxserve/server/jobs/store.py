"""The data folder: files, batch jobs and their results, so that none is lost or doubled by a crash.

    lock              held by the one server that uses the folder
    jobs.sqlite       what there is (WAL; a commit is on the disk when it returns)
    files/ID          whole files, each written under incoming/ first
    incoming/NAME     what is being written; removed when the folder is opened

A file exists when the database says so. So it is written, brought to the disk and renamed before its row is
committed; what has no row is removed when the folder is opened. A result is a row too, and a job's output is
made from them in one piece: whenever the process ends, what was begun is done again with the same outcome.

One thread at a time calls a `Store`. Knows nothing of HTTP, engines or what a line asks for.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import json
import os
import re
import secrets
import sqlite3
import time
from collections.abc import Generator, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from jaxserve.server.jobs.folder import connect, storage_errors, sync_folder, take_lock

OPEN = ("validating", "in_progress", "finalizing", "cancelling")
ENDED = ("completed", "failed", "expired", "cancelled")
KEEP_SECONDS = 30 * 86400  # how long a job that ended is listed, and its files stay unless it says otherwise
MAX_ENDED = 1000  # jobs of one key that are listed after their end, the newest


@dataclasses.dataclass(frozen=True, slots=True)
class File:
    id: str
    filename: str
    purpose: str
    bytes: int
    created_at: int
    expires_at: int | None


@dataclasses.dataclass(frozen=True, slots=True)
class Batch:
    """A job. body: OpenAI's object but for `id`, `status` and the counts of what is done.

    lost: its body cannot be read; the one here has an error in it that says so.
    """

    id: str
    tenant: bytes
    model: str
    status: str
    input_file_id: str
    created_at: int
    completed: int
    failed: int
    body: dict[str, Any]
    lost: bool = False

    @property
    def ended(self) -> bool:
        return self.status in ENDED

    @property
    def answered(self) -> bool:
        """Whether every line has a result."""
        return 0 < self.total <= self.completed + self.failed

    @property
    def total(self) -> int:
        total: int = self.body.get("total", 0)
        return total


@dataclasses.dataclass(frozen=True, slots=True)
class Result:
    """A line's outcome: what goes into the output file, or, `failed`, into the error file."""

    batch: str
    line: int
    failed: bool
    data: bytes


@dataclasses.dataclass(frozen=True, slots=True)
class Bounds:
    """Of what may be stored. files: of one key. of_key, of_all: bytes, of files and results."""

    files: int
    of_key: int
    of_all: int


class OverBound(Exception):
    """What was to be added is more than may be stored. bound: the name of it in `Bounds`."""

    def __init__(self, bound: Literal["files", "of_key", "of_all"]) -> None:
        super().__init__(bound)
        self.bound = bound


FILE_COLUMNS = "id, filename, purpose, bytes, created_at, expires_at"
BATCH_COLUMNS = "id, tenant, model, status, input_file_id, created_at, completed, failed, body"


class Store:
    """Raises FolderTaken or StorageError when the folder cannot be used, and StorageError from every method
    when the disk does not do as it is told; nothing of what the method was to do has then been done.

    stored: bytes of files and results; of: likewise, by tenant. Both may be read by any thread.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._by_status: Mapping[str, int] | None = None
        with storage_errors():
            for part in (folder, folder / "files", folder / "incoming"):
                part.mkdir(parents=True, exist_ok=True, mode=0o700)
            for part in (folder / "files", folder / "incoming"):
                part.chmod(0o700)
            self._lock = take_lock(folder / "lock")
            try:
                self._connection = connect(folder / "jobs.sqlite")
                self._clean()
                self._count()
            except BaseException:
                self._lock.close()
                raise

    def close(self) -> None:
        with contextlib.suppress(sqlite3.Error):
            self._connection.close()
        self._lock.close()

    def path(self, file_id: str) -> Path:
        """Of a file that a row names: an id from a client goes through `file` first."""
        assert re.fullmatch(r"file-[0-9a-f]{32}", file_id), file_id
        return self.folder / "files" / file_id

    def incoming(self) -> Path:
        return self.folder / "incoming" / secrets.token_hex(16)

    # -- files

    def add_file(self, tenant: bytes, file: File, written: Path, bounds: Bounds) -> None:
        """`written`: the content, brought to the disk; it is there no longer when this returns.

        Raises OverBound: what was seen before the upload may have changed while it came.
        """
        if self.count_files(tenant) >= bounds.files:
            raise OverBound("files")
        self.check_room(tenant, file.bytes, bounds)
        with storage_errors():
            os.replace(written, self.path(file.id))
            sync_folder(self.folder / "files")
            try:
                with self._connection as database:
                    _insert_file(database, tenant, file)
            except BaseException:
                self.path(file.id).unlink(missing_ok=True)
                raise
        self._add(tenant, file.bytes)

    def check_room(self, tenant: bytes, size: int, bounds: Bounds, *, uploading: int = 0) -> None:
        """Raises OverBound where `size` more bytes of the tenant's are too many. uploading: what everybody
        else is about to add. On any thread."""
        if self.of.get(tenant, 0) + size > bounds.of_key:
            raise OverBound("of_key")
        if self.stored + uploading + size > bounds.of_all:
            raise OverBound("of_all")

    def file(self, tenant: bytes, file_id: str, now: int) -> File | None:
        query = f"SELECT {FILE_COLUMNS} FROM files WHERE tenant = ? AND id = ? AND ifnull(expires_at > ?, 1)"
        with storage_errors():
            row = self._connection.execute(query, (tenant, file_id, now)).fetchone()
        return None if row is None else File(*row)

    def files(
        self,
        tenant: bytes,
        now: int,
        *,
        limit: int,
        after: str | None,
        newest_first: bool,
        purpose: str | None,
    ) -> list[File] | None:
        """None where `after` is no file of this tenant's."""
        where, values = "tenant = ? AND ifnull(expires_at > ?, 1)", [tenant, now]
        if purpose is not None:
            where, values = f"{where} AND purpose = ?", [*values, purpose]
        rows = self._page("files", FILE_COLUMNS, tenant, where, values, limit, after, newest_first)
        return None if rows is None else [File(*row) for row in rows]

    def count_files(self, tenant: bytes) -> int:
        with storage_errors():
            [[count]] = self._connection.execute("SELECT count(*) FROM files WHERE tenant = ?", (tenant,))
        return int(count)

    def job_that_reads(self, file_id: str) -> str | None:
        """The id of a job that has not ended and reads this file."""
        query = f"SELECT id FROM batches WHERE input_file_id = ? AND status IN {OPEN}"
        with storage_errors():
            row = self._connection.execute(query, (file_id,)).fetchone()
        return None if row is None else row[0]

    def delete_file(self, file_id: str) -> None:
        with storage_errors():
            with self._connection as database:
                query = "DELETE FROM files WHERE id = ? RETURNING tenant, bytes"
                gone = database.execute(query, (file_id,)).fetchall()
            for tenant, size in gone:
                self._add(tenant, -size)
            self.path(file_id).unlink(missing_ok=True)

    def sweep(self, now: int) -> None:
        """Removes files that expired, but for those that a job still reads, and jobs that ended long ago."""
        query = f"""SELECT id FROM files WHERE expires_at <= ?
            AND id NOT IN (SELECT input_file_id FROM batches WHERE status IN {OPEN})"""
        with storage_errors():
            for [file_id] in self._connection.execute(query, (now,)).fetchall():
                self.delete_file(file_id)
            with self._connection as database:
                database.execute(
                    f"DELETE FROM batches WHERE created_at < ? AND status IN {ENDED}", (now - KEEP_SECONDS,)
                )
            self._by_status = None

    # -- jobs

    def add_batch(self, batch: Batch) -> None:
        """Of the tenant's jobs that ended, the oldest are forgotten once there are more than MAX_ENDED; their
        files stay."""
        values = [getattr(batch, name) for name in BATCH_COLUMNS.split(", ")[:-1]]
        row = (*values, json.dumps(batch.body))
        self._by_status = None
        with storage_errors(), self._connection as database:
            marks = ", ".join("?" * len(row))
            database.execute(f"INSERT INTO batches ({BATCH_COLUMNS}) VALUES ({marks})", row)
            query = f"""DELETE FROM batches WHERE number IN (SELECT number FROM batches
                WHERE tenant = ? AND status IN {ENDED} ORDER BY number DESC LIMIT -1 OFFSET ?)"""
            database.execute(query, (batch.tenant, MAX_ENDED))

    def batch(self, batch_id: str, tenant: bytes | None = None) -> Batch | None:
        """tenant: only this one's."""
        query = f"SELECT {BATCH_COLUMNS} FROM batches WHERE id = ? AND (? IS NULL OR tenant = ?)"
        with storage_errors():
            row = self._connection.execute(query, (batch_id, tenant, tenant)).fetchone()
        return None if row is None else _batch(row)

    def batches(self, tenant: bytes, *, limit: int, after: str | None) -> list[Batch] | None:
        """The newest first. None where `after` is no job of this tenant's."""
        rows = self._page("batches", BATCH_COLUMNS, tenant, "tenant = ?", [tenant], limit, after, True)
        return None if rows is None else [_batch(row) for row in rows]

    def open_batches(self) -> list[Batch]:
        """Those that have not ended, the oldest first."""
        query = f"SELECT {BATCH_COLUMNS} FROM batches WHERE status IN {OPEN} ORDER BY number"
        with storage_errors():
            return [_batch(row) for row in self._connection.execute(query)]

    def count_open(self, tenant: bytes) -> int:
        query = f"SELECT count(*) FROM batches WHERE tenant = ? AND status IN {OPEN}"
        with storage_errors():
            [[count]] = self._connection.execute(query, (tenant,))
        return int(count)

    def count_batches(self) -> Mapping[str, int]:
        """By state. Looked up once after each change."""
        if self._by_status is None:
            with storage_errors():
                query = "SELECT status, count(*) FROM batches GROUP BY status"
                self._by_status = dict(self._connection.execute(query))
        return self._by_status

    def change(self, batch_id: str, status: str, *, only_from: Sequence[str], **changes: Any) -> bool:
        """False where the job is in none of the states `only_from`: then nothing is changed. changes: to its
        body."""
        self._by_status = None
        with storage_errors(), self._connection as database:
            batch = self.batch(batch_id)
            if batch is None or batch.status not in only_from:
                return False
            body = json.dumps(batch.body | changes)
            database.execute("UPDATE batches SET status = ?, body = ? WHERE id = ?", (status, body, batch_id))
            return True

    def fail(self, batch_id: str, errors: Sequence[Mapping[str, Any]]) -> None:
        """The end of a job that cannot go on, whatever it was doing; what it had of results goes."""
        self._by_status = None
        with storage_errors(), self._connection as database:
            batch = self.batch(batch_id)
            if batch is None or batch.ended:
                return
            body = json.dumps(batch.body | {"failed_at": int(time.time()), "errors": list(errors)})
            query = "UPDATE batches SET status = 'failed', body = ? WHERE id = ?"
            database.execute(query, (body, batch_id))
            database.execute("DELETE FROM results WHERE batch = ?", (batch_id,))
        self._add(batch.tenant, -self._results.pop(batch_id, 0))

    def add_results(self, results: Iterable[Result]) -> None:
        """A line's first result counts; of a job that has ended, none does."""
        sizes: collections.Counter[str] = collections.Counter()
        with storage_errors(), self._connection as database:
            for result in results:
                added = database.execute(
                    f"""INSERT OR IGNORE INTO results SELECT ?, ?, ?, ? WHERE EXISTS
                        (SELECT 1 FROM batches WHERE id = ? AND status IN {OPEN})""",
                    (result.batch, result.line, result.failed, result.data, result.batch),
                )
                column = "failed" if result.failed else "completed"
                if added.rowcount:
                    sizes[result.batch] += len(result.data)
                    database.execute(
                        f"UPDATE batches SET {column} = {column} + 1 WHERE id = ?", (result.batch,)
                    )
            tenants = {name: self._tenant(name) for name in sizes}
        for name, size in sizes.items():
            self._results[name] = self._results.get(name, 0) + size
            self._add(tenants[name], size)

    def finished_lines(self, batch_id: str) -> set[int]:
        with storage_errors():
            query = "SELECT line FROM results WHERE batch = ?"
            return {line for [line] in self._connection.execute(query, (batch_id,))}

    def finish(
        self,
        batch: Batch,
        status: Literal["completed", "expired", "cancelled"],
        files: Sequence[tuple[File, Path]],
        changes: Mapping[str, Any],
    ) -> None:
        """The job's last step, which happens as a whole or not at all: its files appear, its results go.

        Bounds do not hold it up: its files are what its results were, and a line for each that has none.
        """
        self._by_status = None
        with storage_errors():
            for file, written in files:
                os.replace(written, self.path(file.id))
            sync_folder(self.folder / "files")
            with self._connection as database:
                for file, _ in files:
                    _insert_file(database, batch.tenant, file)
                database.execute("DELETE FROM results WHERE batch = ?", (batch.id,))
                body = json.dumps(batch.body | dict(changes))
                database.execute(
                    "UPDATE batches SET status = ?, body = ?, completed = ?, failed = ? WHERE id = ?",
                    (status, body, batch.completed, batch.failed, batch.id),
                )
        size = sum(file.bytes for file, _ in files)
        self._add(batch.tenant, size - self._results.pop(batch.id, 0))

    def results(self, batch_id: str) -> Generator[Result]:
        """In the order of the lines. On a connection of its own: any thread may read while others write."""
        with storage_errors():
            connection = sqlite3.connect(self.folder / "jobs.sqlite", isolation_level=None)
            try:
                query = "SELECT batch, line, failed, data FROM results WHERE batch = ? ORDER BY line"
                for batch, line, failed, data in connection.execute(query, (batch_id,)):
                    yield Result(batch, line, bool(failed), data)
            finally:
                connection.close()

    # -- inside

    def _page(
        self,
        table: str,
        columns: str,
        tenant: bytes,
        where: str,
        values: list[Any],
        limit: int,
        after: str | None,
        newest_first: bool,
    ) -> list[Any] | None:
        with storage_errors():
            if after is not None:
                query = f"SELECT number FROM {table} WHERE tenant = ? AND id = ?"
                start = self._connection.execute(query, (tenant, after)).fetchone()
                if start is None:
                    return None
                where, values = f"{where} AND number {'<' if newest_first else '>'} ?", [*values, start[0]]
            order = "DESC" if newest_first else "ASC"
            query = f"SELECT {columns} FROM {table} WHERE {where} ORDER BY number {order} LIMIT ?"
            return self._connection.execute(query, (*values, limit)).fetchall()

    def _clean(self) -> None:
        """Removes what a process that ended left half done."""
        for path in (self.folder / "incoming").iterdir():
            path.unlink()
        known = {file_id for [file_id] in self._connection.execute("SELECT id FROM files")}
        for path in (self.folder / "files").iterdir():
            if path.name not in known:
                path.unlink()

        with self._connection as database:  # as only a hand that was in the database leaves them
            database.execute("DELETE FROM results WHERE batch NOT IN (SELECT id FROM batches)")

    def _count(self) -> None:
        """What is stored; from here on each change is added."""
        sizes = self._connection.execute("SELECT batch, sum(length(data)) FROM results GROUP BY batch")
        self._results: dict[str, int] = dict(sizes.fetchall())
        self.of: dict[bytes, int] = {}
        self.stored = 0
        for tenant, size in self._connection.execute("SELECT tenant, sum(bytes) FROM files GROUP BY tenant"):
            self._add(tenant, size)
        for name, size in self._results.items():
            self._add(self._tenant(name), size)

    def _add(self, tenant: bytes, size: int) -> None:
        self.of[tenant] = self.of.get(tenant, 0) + size
        self.stored += size
        if not self.of[tenant]:
            del self.of[tenant]

    def _tenant(self, batch_id: str) -> bytes:
        query = "SELECT tenant FROM batches WHERE id = ?"
        [tenant] = self._connection.execute(query, (batch_id,)).fetchone()
        return bytes(tenant)


def _insert_file(database: sqlite3.Connection, tenant: bytes, file: File) -> None:
    database.execute(
        f"INSERT INTO files (tenant, {FILE_COLUMNS}) VALUES (?, ?, ?, ?, ?, ?, ?)",
        (tenant, *dataclasses.astuple(file)),
    )


def _batch(row: Sequence[Any]) -> Batch:
    fields = dict(zip(BATCH_COLUMNS.split(", "), row, strict=True))
    body = _readable(fields["body"])
    return Batch(**{**fields, "body": LOST_BODY if body is None else body}, lost=body is None)


LOST_BODY: dict[str, Any] = {
    "endpoint": "",
    "completion_window": "",
    "expires_at": 0,
    "errors": [
        {
            "code": "batch_lost",
            "message": "the server's record of the batch is broken",
            "param": None,
            "line": None,
        }
    ],
}


def _readable(text: Any) -> dict[str, Any] | None:
    try:
        body = json.loads(text)
    except (TypeError, ValueError):
        return None
    kinds = {"endpoint": str, "completion_window": str, "expires_at": int}
    if not isinstance(body, dict) or not all(isinstance(body.get(name), kinds[name]) for name in kinds):
        return None
    return body
