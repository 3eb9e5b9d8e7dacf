"""A job's end: its output and error files, in the order of its lines.

They are made from the results on the disk, and appear together with the job's last state. Interrupted, they
are made again, the same to the byte: ids are made from the job's.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import hashlib
import time
from collections.abc import Generator
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Literal

from jaxserve.server.jobs.answer import unanswered
from jaxserve.server.jobs.folder import flush, storage_errors
from jaxserve.server.jobs.lines import lines
from jaxserve.server.jobs.store import KEEP_SECONDS, Batch, File, Result, Store

if TYPE_CHECKING:
    from jaxserve.server.jobs.desk import Desk

CANCELLED = "the batch was cancelled before this request was answered"
EXPIRED = "the batch's completion window ended before this request was answered"


async def finish(desk: Desk, batch: Batch, path: Path) -> None:
    """Takes the job to its last state. path: of its input.

    Raises InputLost or StorageError, and has then done nothing.
    """
    status: Literal["completed", "expired", "cancelled"]
    if batch.status == "cancelling":
        status = "cancelled"
    elif not batch.answered:
        status = "expired"
    else:
        status = "completed"
        batch = await desk.try_run(lambda store: _finalizing(store, batch.id))
    store, names = await desk.try_run(lambda store: (store, [store.incoming(), store.incoming()]))
    try:
        written = await asyncio.to_thread(_write, store, batch, path, names[0], names[1])
        batch = dataclasses.replace(batch, completed=written.completed, failed=written.failed)
        now = int(time.time())
        until = now + batch.body.get("output_expires_after", KEEP_SECONDS)
        files: list[tuple[File, Path]] = []
        changes: dict[str, Any] = {f"{status}_at": now}
        for kind, name, size in (("output", names[0], written.output), ("error", names[1], written.errors)):
            if size:
                file_id = f"file-{hashlib.blake2b(f'{batch.id} {kind}'.encode(), digest_size=16).hexdigest()}"
                filename = f"{batch.id}_{kind}.jsonl"
                files.append((File(file_id, filename, "batch_output", size, now, until), name))
                changes[f"{kind}_file_id"] = file_id
        await desk.try_run(lambda store: store.finish(batch, status, files, changes))
    finally:
        await asyncio.to_thread(_remove, names)


def _finalizing(store: Store, batch_id: str) -> Batch:
    store.change(batch_id, "finalizing", only_from=["in_progress"], finalizing_at=int(time.time()))
    batch = store.batch(batch_id)
    assert batch is not None
    return batch


@dataclasses.dataclass(slots=True)
class _Written:
    """completed, failed: lines. output, errors: bytes."""

    completed: int = 0
    failed: int = 0
    output: int = 0
    errors: int = 0


def _write(store: Store, batch: Batch, path: Path, output: Path, errors: Path) -> _Written:
    written = _Written()
    with (
        storage_errors(),
        open(output, "xb") as good,
        open(errors, "xb") as bad,
        contextlib.closing(_all(store, batch, path)) as every,  # on this thread, as the database wants it
    ):
        for result in every:
            if result.failed:
                written.failed += 1
                written.errors += _put(bad, result)
            else:
                written.completed += 1
                written.output += _put(good, result)
        flush(good)
        flush(bad)
    return written


def _put(file: BinaryIO, result: Result) -> int:
    return file.write(result.data) + file.write(b"\n")


def _all(store: Store, batch: Batch, path: Path) -> Generator[Result]:
    """A result for each line, for those without one that it was not answered."""
    cancelled = batch.status == "cancelling"
    code, message = ("batch_cancelled", CANCELLED) if cancelled else ("batch_expired", EXPIRED)
    with contextlib.closing(store.results(batch.id)) as stored:
        result = next(stored, None)
        for line in lines(path, batch.body["endpoint"]) if batch.total else ():
            if result is not None and result.line == line.number:
                yield result
                result = next(stored, None)
            else:
                yield Result(batch.id, line.number, True, unanswered(batch, line, code, message))


def _remove(paths: list[Path]) -> None:
    for path in paths:
        path.unlink(missing_ok=True)
