"""The data folder on the disk: who may use it, its tables, and what is raised when it does not do as told."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

VERSION = 1  # of the tables
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


def take_lock(path: Path) -> BinaryIO:
    lock = open(path, "a+b", opener=_private)  # noqa: SIM115  # held until the store is closed
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


def connect(path: Path) -> sqlite3.Connection:
    """Readable by its user alone, and so are the files beside it, which SQLite makes in its likeness."""
    os.close(_private(path, os.O_RDWR | os.O_CREAT))
    for name in (path.name, f"{path.name}-wal", f"{path.name}-shm"):
        with contextlib.suppress(FileNotFoundError):
            path.with_name(name).chmod(0o600)
    connection = sqlite3.connect(path, check_same_thread=False)
    connection.text_factory = lambda data: data.decode("utf-8", "replace")  # one bad row is not all of them
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


def _private(path: str | Path, flags: int) -> int:
    return os.open(path, flags | os.O_CLOEXEC, 0o600)


def sync_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
