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

import contextlib
import dataclasses
import errno
import fcntl
import json
import os
import re
import secrets
import sqlite3
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, Literal

VERSION = 1  # of the tables
ENDED = ("completed", "failed", "expired", "cancelled")
KEEP_SECONDS = 30 * 86400  # how long a job that ended is listed
LOST_SPACE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
TABLES = """
CREATE TABLE files (
    number INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT UNIQUE NOT NULL, tenant BLOB NOT NULL,
    filename TEXT NOT NULL, purpose TEXT NOT NULL, bytes INTEGER NOT NULL,
    created_at INTEGER NOT NULL, expires_at INTEGER
);
CREATE INDEX files_of ON files (tenant, number);
CREATE TABLE batches (
    number INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT UNIQUE NOT NULL, tenant BLOB NOT NULL,
    model TEXT NOT NULL, status TEXT NOT NULL, input_file_id TEXT NOT NULL, created_at INTEGER NOT NULL,
    completed INTEGER NOT NULL DEFAULT 0, failed INTEGER NOT NULL DEFAULT 0, body TEXT NOT NULL
);
CREATE INDEX batches_of ON batches (tenant, number);
CREATE INDEX batches_in ON batches (status, model);
CREATE TABLE results (
    batch TEXT NOT NULL, line INTEGER NOT NULL, failed INTEGER NOT NULL, data BLOB NOT NULL,
    PRIMARY KEY (batch, line)
) WITHOUT ROWID;
"""


class StorageError(Exception):
    """The disk does not take what is to be written, or does not give what was. full: for want of room."""

    def __init__(self, error: OSError | sqlite3.Error) -> None:
        super().__init__(f"{error}")
        text = str(error)
        self.full = (isinstance(error, OSError) and error.errno in LOST_SPACE) or (
            isinstance(error, sqlite3.OperationalError) and ("full" in text or "disk I/O" in text)
        )


class FolderTaken(Exception):
    """Another server uses the folder."""


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
    """A job. body: OpenAI's object but for `id`, `status` and the counts of what is done."""

    id: str
    tenant: bytes
    model: str
    status: str
    input_file_id: str
    created_at: int
    completed: int
    failed: int
    body: dict[str, Any]

    @property
    def ended(self) -> bool:
        return self.status in ENDED

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


FILE_COLUMNS = "id, filename, purpose, bytes, created_at, expires_at"
BATCH_COLUMNS = "id, tenant, model, status, input_file_id, created_at, completed, failed, body"


class Store:
    """Raises FolderTaken or StorageError when the folder cannot be used, and StorageError from every method
    when the disk does not do as it is told; nothing of what the method was to do has then been done."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        with storage_errors():
            for part in (folder, folder / "files", folder / "incoming"):
                part.mkdir(parents=True, exist_ok=True, mode=0o700)
            self._lock = _take_lock(folder / "lock")
            try:
                self._connection = _connect(folder / "jobs.sqlite")
                self._clean()
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

    def add_file(self, tenant: bytes, file: File, written: Path) -> None:
        """`written`: the content, brought to the disk; it is there no longer when this returns."""
        with storage_errors():
            os.replace(written, self.path(file.id))
            _sync_folder(self.folder / "files")
            try:
                with self._connection as database:
                    _insert_file(database, tenant, file)
            except BaseException:
                self.path(file.id).unlink(missing_ok=True)
                raise

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

    def usage(self, tenant: bytes) -> tuple[int, int]:
        """(how many files the tenant has, bytes of everybody's)."""
        with storage_errors():
            [[mine]] = self._connection.execute("SELECT count(*) FROM files WHERE tenant = ?", (tenant,))
            [[everybody]] = self._connection.execute("SELECT ifnull(sum(bytes), 0) FROM files")
        return mine, everybody

    def job_that_reads(self, file_id: str) -> str | None:
        """The id of a job that has not ended and reads this file."""
        query = f"SELECT id FROM batches WHERE input_file_id = ? AND status NOT IN {ENDED}"
        with storage_errors():
            row = self._connection.execute(query, (file_id,)).fetchone()
        return None if row is None else row[0]

    def delete_file(self, file_id: str) -> None:
        with storage_errors():
            with self._connection as database:
                database.execute("DELETE FROM files WHERE id = ?", (file_id,))
            self.path(file_id).unlink(missing_ok=True)

    def sweep(self, now: int) -> None:
        """Removes files that expired, but for those that a job still reads, and jobs that ended long ago."""
        query = f"""SELECT id FROM files WHERE expires_at <= ?
            AND id NOT IN (SELECT input_file_id FROM batches WHERE status NOT IN {ENDED})"""
        with storage_errors():
            for [file_id] in self._connection.execute(query, (now,)).fetchall():
                self.delete_file(file_id)
            with self._connection as database:
                database.execute(
                    f"DELETE FROM batches WHERE created_at < ? AND status IN {ENDED}", (now - KEEP_SECONDS,)
                )

    # -- jobs

    def add_batch(self, batch: Batch) -> None:
        row = (*dataclasses.astuple(batch)[:-1], json.dumps(batch.body))
        with storage_errors(), self._connection as database:
            marks = ", ".join("?" * len(row))
            database.execute(f"INSERT INTO batches ({BATCH_COLUMNS}) VALUES ({marks})", row)

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

    def open_batches(self, model: str | None = None, tenant: bytes | None = None) -> list[Batch]:
        """Those that have not ended, the oldest first."""
        query = f"""SELECT {BATCH_COLUMNS} FROM batches WHERE status NOT IN {ENDED}
            AND (? IS NULL OR model = ?) AND (? IS NULL OR tenant = ?) ORDER BY number"""
        with storage_errors():
            return [_batch(row) for row in self._connection.execute(query, (model, model, tenant, tenant))]

    def count_batches(self) -> dict[str, int]:
        with storage_errors():
            return dict(self._connection.execute("SELECT status, count(*) FROM batches GROUP BY status"))

    def change(self, batch_id: str, status: str, *, only_from: Sequence[str], **changes: Any) -> bool:
        """False where the job is in none of the states `only_from`: then nothing is changed. changes: to its
        body."""
        with storage_errors(), self._connection as database:
            batch = self.batch(batch_id)
            if batch is None or batch.status not in only_from:
                return False
            body = json.dumps(batch.body | changes)
            database.execute("UPDATE batches SET status = ?, body = ? WHERE id = ?", (status, body, batch_id))
            return True

    def add_results(self, results: Iterable[Result]) -> None:
        """A line's first result counts; of a job that has ended, none does."""
        with storage_errors(), self._connection as database:
            for result in results:
                added = database.execute(
                    f"""INSERT OR IGNORE INTO results SELECT ?, ?, ?, ? WHERE EXISTS
                        (SELECT 1 FROM batches WHERE id = ? AND status NOT IN {ENDED})""",
                    (result.batch, result.line, result.failed, result.data, result.batch),
                )
                column = "failed" if result.failed else "completed"
                if added.rowcount:
                    database.execute(
                        f"UPDATE batches SET {column} = {column} + 1 WHERE id = ?", (result.batch,)
                    )

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
        """The job's last step, which happens as a whole or not at all: its files appear, its results go."""
        with storage_errors():
            for file, written in files:
                os.replace(written, self.path(file.id))
            _sync_folder(self.folder / "files")
            with self._connection as database:
                for file, _ in files:
                    _insert_file(database, batch.tenant, file)
                database.execute("DELETE FROM results WHERE batch = ?", (batch.id,))
                body = json.dumps(batch.body | dict(changes))
                database.execute(
                    "UPDATE batches SET status = ?, body = ?, completed = ?, failed = ? WHERE id = ?",
                    (status, body, batch.completed, batch.failed, batch.id),
                )

    def results(self, batch_id: str) -> Iterator[Result]:
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


@contextlib.contextmanager
def storage_errors() -> Iterator[None]:
    try:
        yield
    except (OSError, sqlite3.Error) as error:
        raise StorageError(error) from error


def flush(file: BinaryIO) -> None:
    """Brings what was written to the disk."""
    file.flush()
    os.fsync(file.fileno())


def _take_lock(path: Path) -> BinaryIO:
    lock = open(path, "a+b")  # noqa: SIM115  # held until the store is closed
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.seek(0)
        holder = lock.read(32).decode("ascii", "replace").strip()
        lock.close()
        raise FolderTaken(f"another server uses {path.parent} (process {holder or 'unknown'})") from None
    except BaseException:
        lock.close()
        raise
    with contextlib.suppress(OSError):  # for people alone
        lock.truncate(0)
        lock.write(str(os.getpid()).encode())
        lock.flush()
    return lock


def _connect(path: Path) -> sqlite3.Connection:
    connection = sqlite3.connect(path, check_same_thread=False)
    try:
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = FULL")
        [[version]] = connection.execute("PRAGMA user_version")
        if version == 0:
            with connection:
                connection.executescript(f"BEGIN; {TABLES} PRAGMA user_version = {VERSION}; COMMIT;")
        elif version != VERSION:
            raise sqlite3.DatabaseError(
                f"{path} is of version {version}, which this server does not know: give it another --data-dir"
            )
    except BaseException:
        connection.close()
        raise
    return connection


def _insert_file(database: sqlite3.Connection, tenant: bytes, file: File) -> None:
    database.execute(
        f"INSERT INTO files (tenant, {FILE_COLUMNS}) VALUES (?, ?, ?, ?, ?, ?, ?)",
        (tenant, *dataclasses.astuple(file)),
    )


def _batch(row: Sequence[Any]) -> Batch:
    fields = dict(zip(BATCH_COLUMNS.split(", "), row, strict=True))
    return Batch(**{**fields, "body": json.loads(fields["body"])})


def _sync_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
