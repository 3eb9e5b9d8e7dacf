"""Answers on disk, for requests that can have only one: greedy ones, and those that bring a seed.

`ResponseCache` is a SQLite file of bounded size; `CachingEngine` stands before an engine, answers from the
file what was asked before, and keeps what is answered anew. An entry's key is a digest of all that decides an
answer: the engine's fingerprint (weights, dtype, mesh, versions), the tenant's salt, the prompt and every
sampling parameter; not of when it is answered: tier, priority, deadline.

`submit` touches no file. It looks in a set of the known keys, some 100 bytes each beside the kilobyte or more
of an answer; a thread of its own reads, writes and replays. What SQLite raises ends here: without the file,
requests are computed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import json
import logging
import os
import queue
import sqlite3
import threading
import time
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from jaxserve.engine.outputs import EngineBusy, Output, Sink, TokenLogprob
from jaxserve.protocols import EngineLike, TokenizerLike
from jaxserve.scheduler.types import Finish, Limits, Request, SlotView, StructuredOutputs

LOCKED_SECONDS = 2.0  # how long to wait for another server that writes
REFRESH_SECONDS = 1.0  # how soon another server's answers are seen
BUSY_SECONDS = 0.05
STALE_KEYS = 10_000
MAX_UNWRITTEN = 256  # jobs that wait; while there are more, answers are not kept
OVERHEAD_BYTES = 16 * 2**10  # of an entry at most: pages that it fills in part, its places in the indexes

log = logging.getLogger(__name__)
Warn = Callable[[str], None]


def cache_file() -> Path:
    """Where the answers of this user's servers lie. Its name changes when the table does."""
    folder = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(folder) / "jaxserve" / "responses-1.sqlite"


# --- the file ------------------------------------------------------------------------------------------


class ResponseCache:
    """Digest -> bytes in at most `max_bytes` of a SQLite file; the least recently used are given up first.
    Its journal takes some 4 MB beside it.

    Several processes may share the file. One that is no database is begun anew, one that cannot be written is
    not used; `warn` is told. `in` may be asked on any thread, the rest on one at a time.
    """

    def __init__(self, path: Path, max_bytes: int, warn: Warn) -> None:
        self.path = path
        self.bytes = 0
        self._max_bytes = max_bytes
        self._warn = warn
        self._database: sqlite3.Connection | None = None
        self._forget()
        try:
            self._open()
        except (OSError, sqlite3.Error) as error:
            self._recover(error)

    def __contains__(self, key: bytes) -> bool:
        return key in self._keys

    def get(self, key: bytes) -> bytes | None:
        def read(database: sqlite3.Connection) -> bytes | None:
            row = database.execute("SELECT body FROM answers WHERE key = ?", (key,)).fetchone()
            if row is None:
                return None
            database.execute("UPDATE answers SET used = ? WHERE key = ?", (time.time_ns(), key))
            return bytes(row[0])

        body = self._do(read)
        if body is None:
            self._keys.discard(key)
        return body

    def put(self, key: bytes, body: bytes) -> None:
        """Keeps `body`, unless it alone would drive out an eighth of what is kept."""

        def write(database: sqlite3.Connection) -> None:
            with database:  # a transaction, undone if this raises
                database.execute("BEGIN IMMEDIATE")
                self._make_room(database, len(body))
                values = (key, time.time_ns(), body)
                database.execute("INSERT OR REPLACE INTO answers VALUES (?, ?, ?)", values)
            self._keys.add(key)
            self.bytes = _size(database)

        if len(body) <= self._max_bytes // 8:
            self._do(write)

    def discard(self, key: bytes) -> None:
        self._keys.discard(key)
        self._do(lambda database: database.execute("DELETE FROM answers WHERE key = ?", (key,)))

    def refresh(self) -> None:
        """Takes notice of what other processes have written since."""
        self._do(self._refresh)

    def close(self) -> None:
        self._forget()
        database, self._database = self._database, None
        if database is not None:
            with contextlib.suppress(sqlite3.Error):
                database.close()

    def _open(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        os.close(os.open(self.path, os.O_RDWR | os.O_CREAT, 0o600))  # what people asked is nobody else's
        self._database = database = sqlite3.connect(
            self.path, timeout=LOCKED_SECONDS, isolation_level=None, check_same_thread=False
        )
        database.execute("PRAGMA journal_mode = WAL")
        database.execute("PRAGMA synchronous = NORMAL")  # no flush for each: losing the last ones is no harm
        database.execute("CREATE TABLE IF NOT EXISTS answers (key BLOB PRIMARY KEY, used INTEGER, body BLOB)")
        database.execute("CREATE INDEX IF NOT EXISTS answers_used ON answers (used)")
        self._refresh(database)

    def _do[T](self, work: Callable[[sqlite3.Connection], T]) -> T | None:
        """`work`, or None where the file does not let it."""
        if self._database is None:
            return None
        try:
            return work(self._database)
        except sqlite3.Error as error:
            if getattr(error, "sqlite_errorcode", None) != sqlite3.SQLITE_BUSY:
                self._recover(error)
            return None

    def _recover(self, error: Exception) -> None:
        """A fresh start where the file is no database, none where there can be no file."""
        self.close()
        code = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_OK) & 0xFF  # without the extension
        if code not in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB):
            self._warn(f"warning: no response cache, {self.path} cannot be used ({error})")
            return
        self._warn(f"warning: the response cache {self.path} is damaged ({error}); it begins anew")
        try:
            for suffix in ("", "-wal", "-shm"):
                Path(f"{self.path}{suffix}").unlink(missing_ok=True)
            self._open()
        except (OSError, sqlite3.Error) as again:
            self.close()
            self._warn(f"warning: no response cache, {self.path} cannot be used ({again})")

    def _forget(self) -> None:
        self._keys: set[bytes] = set()
        self._whole = 0  # keys when all were last read
        self._last_row = 0
        self._version: int | None = None  # SQLite's count of what other connections wrote

    def _refresh(self, database: sqlite3.Connection) -> None:
        [version] = database.execute("PRAGMA data_version").fetchone()
        if version == self._version:
            return
        if len(self._keys) > 2 * self._whole + STALE_KEYS:  # what others gave up shows when all are read
            self._forget()
        whole = self._last_row == 0
        rows = database.execute("SELECT rowid, key FROM answers WHERE rowid > ?", (self._last_row,))
        for row, key in rows:
            self._keys.add(key)
            self._last_row = max(row, self._last_row)
        if whole:
            self._whole = len(self._keys)
        self._version = version
        self.bytes = _size(database)

    def _make_room(self, database: sqlite3.Connection, needed: int) -> None:
        while _size(database) + needed + OVERHEAD_BYTES > self._max_bytes:
            evicted = database.execute(
                "DELETE FROM answers WHERE key = (SELECT key FROM answers ORDER BY used LIMIT 1)"
                " RETURNING key"
            ).fetchall()
            if not evicted:
                return
            self._keys.difference_update(key for (key,) in evicted)


def _size(database: sqlite3.Connection) -> int:
    """Bytes of the file that hold something. The rest is used again, so the file itself grows no further."""
    pages, free, size = (
        database.execute(f"PRAGMA {name}").fetchone()[0]
        for name in ("page_count", "freelist_count", "page_size")
    )
    return int((pages - free) * size)


# --- what is in it -------------------------------------------------------------------------------------


def answer_key(request: Request, fingerprint: str) -> bytes | None:
    """The digest of all that decides the answer; None where chance does too, and for vectors."""
    params = request.params
    if request.pooling is not None or (not params.greedy and params.seed is None):
        return None
    fields = [(field.name, getattr(params, field.name)) for field in dataclasses.fields(params)]
    plain = [(name, sorted(value.items()) if isinstance(value, dict) else value) for name, value in fields]
    rest = repr((fingerprint, request.salt, request.max_total_tokens, request.stop_token_ids, plain))
    key = hashlib.blake2b(rest.encode()).digest()
    return hashlib.blake2b(request.prompt_token_ids.tobytes(), key=key, digest_size=16).digest()


def encode(outputs: Sequence[Output]) -> bytes:
    """Increments as they were sent, without what concerned that one time: the request's id, prefix hits."""
    rows = [
        (
            output.index,
            output.token_ids,
            output.text,
            None if output.logprobs is None else [_row(entry) for entry in output.logprobs],
            output.finish_reason,
            output.stop_reason,
            None if output.prompt_logprobs is None else [_row(entry) for entry in output.prompt_logprobs],
            output.cumulative_logprob,
        )
        for output in outputs
    ]
    # not orjson, which makes null of a log-probability of minus infinity
    return zlib.compress(json.dumps(rows, separators=(",", ":")).encode(), level=1)


def decode(body: bytes, request_id: str) -> list[Output]:
    """Raises ValueError for what `encode` did not write."""
    try:
        return [
            Output(
                request_id,
                index,
                token_ids,
                text,
                logprobs=None if logprobs is None else [_entry(row) for row in logprobs],
                finish_reason=None if finish is None else Finish(finish),
                stop_reason=stop,
                prompt_logprobs=None if prompt is None else [row and _entry(row) for row in prompt],
                cumulative_logprob=cumulative,
                from_cache=True,
            )
            for index, token_ids, text, logprobs, finish, stop, prompt, cumulative in json.loads(
                zlib.decompress(body)
            )
        ]
    except (TypeError, zlib.error) as error:
        raise ValueError(f"no answer: {error}") from error


def _row(entry: TokenLogprob | None) -> tuple[Any, ...] | None:
    return None if entry is None else (entry.token_id, entry.logprob, entry.rank, entry.top)


def _entry(row: Sequence[Any]) -> TokenLogprob:
    token_id, logprob, rank, top = row
    return TokenLogprob(token_id, logprob, rank, tuple((token, value) for token, value in top))


# --- before the engine ---------------------------------------------------------------------------------


class CachingEngine:
    """An engine that answers from `cache` what it can. Takes both over: `close` closes them.

    Two equal requests at once are both computed.
    """

    def __init__(self, engine: EngineLike, cache: ResponseCache) -> None:
        self.engine = engine
        self._cache = cache
        self._fingerprint = str(engine.facts["fingerprint"])
        self._counts = {"response_cache_hits": 0, "response_cache_misses": 0}
        self._held: dict[str, bool] = {}  # request that is with the worker -> was it aborted
        self._lock = threading.Lock()  # of the two above
        self._jobs: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._closing = False
        self._worker: threading.Thread | None = None

    @property
    def limits(self) -> Limits:
        return self.engine.limits

    @property
    def tokenizer(self) -> TokenizerLike | None:
        return self.engine.tokenizer

    @property
    def healthy(self) -> bool:
        return self.engine.healthy

    @property
    def failure(self) -> BaseException | None:
        return self.engine.failure

    @property
    def stuck(self) -> str | None:
        return self.engine.stuck

    @property
    def facts(self) -> dict[str, Any]:
        return self.engine.facts

    def compile_grammar(self, wanted: StructuredOutputs) -> Any:
        return self.engine.compile_grammar(wanted)

    def slots(self) -> list[SlotView]:
        return self.engine.slots()

    def submit(self, *requests: tuple[Request, Sink]) -> None:
        """As the engine's. Where all answers are known they are given whether or not the queue is full."""
        known: list[tuple[Request, Sink, bytes]] = []
        rest: list[tuple[Request, Sink]] = []
        with self._lock:
            missed = 0
            for request, sink in requests:
                key = answer_key(request, self._fingerprint)
                if key is None:
                    rest.append((request, sink))
                elif key in self._cache and self.healthy and not self._closing:
                    known.append((request, sink, key))
                else:
                    rest.append((request, self._recorder(request, sink, key)))
                    missed += 1
            if rest:
                self.engine.submit(*rest)
            self._counts["response_cache_misses"] += missed
            for request, sink, key in known:
                self._held[request.request_id] = False
                self._jobs.put(functools.partial(self._replay, request, sink, key))

    def abort(self, request_id: str) -> None:
        with self._lock:
            if request_id in self._held:
                self._held[request_id] = True
                return
        self.engine.abort(request_id)

    def stats(self) -> dict[str, Any]:
        return {**self.engine.stats(), **self._counts, "response_cache_bytes": self._cache.bytes}

    def start(self) -> None:
        self.engine.start()
        if self._worker is None:
            self._worker = threading.Thread(target=self._work, name="jaxserve-response-cache", daemon=True)
            self._worker.start()

    def close(self) -> None:
        """What is being replayed is aborted, as what is being computed is."""
        self._closing = True
        self._jobs.put(None)
        if self._worker is not None:
            self._worker.join()
        self.engine.close()
        self._cache.close()

    def _compute(self, request: Request, sink: Sink, key: bytes) -> None:
        """Under the lock. Raises what the engine's `submit` raises."""
        self.engine.submit((request, self._recorder(request, sink, key)))
        self._counts["response_cache_misses"] += 1

    def _recorder(self, request: Request, sink: Sink, key: bytes) -> Sink:
        """A sink that hands on, and keeps the whole once every sequence came to an end of its own."""
        outputs: list[Output] = []
        unfinished = request.params.sequences

        def put(output: Output) -> None:
            nonlocal unfinished
            outputs.append(output)
            if output.finish_reason in (Finish.STOP, Finish.LENGTH):
                unfinished -= 1
                if not unfinished and self._jobs.qsize() < MAX_UNWRITTEN:
                    self._jobs.put(lambda: self._cache.put(key, encode(outputs)))
            sink(output)

        return put

    # -- on the worker ---------------------------------------------------------------------------------

    def _work(self) -> None:
        refreshed = 0.0
        last = False
        while not last or not self._jobs.empty():
            with contextlib.suppress(queue.Empty):
                job = self._jobs.get(timeout=REFRESH_SECONDS)
                last = last or job is None
                if job is not None:
                    try:
                        job()
                    except Exception:
                        log.exception("the response cache failed at a request")
            if time.monotonic() - refreshed > REFRESH_SECONDS:
                self._cache.refresh()
                refreshed = time.monotonic()

    def _replay(self, request: Request, sink: Sink, key: bytes) -> None:
        outputs = self._read(request, key)
        if outputs is None:
            self._compute_after_all(request, sink, key)
            return
        unfinished = set(range(request.params.sequences))
        for output in outputs:
            if self._held[request.request_id] or self._closing:
                break
            sink(output)
            if output.finish_reason is not None:
                unfinished.discard(output.index)
        with self._lock:
            self._counts["response_cache_hits"] += 1
        self._end(request, sink, unfinished)

    def _read(self, request: Request, key: bytes) -> list[Output] | None:
        body = self._cache.get(key)
        try:
            return None if body is None else decode(body, request.request_id)
        except ValueError:
            self._cache.discard(key)
            return None

    def _compute_after_all(self, request: Request, sink: Sink, key: bytes) -> None:
        """Another server has given the answer up since. If the queue is full too, it waits here."""
        error = None
        try:
            with self._lock:  # an abort comes before or after, and then finds it in the engine
                if not self._held[request.request_id] and not self._closing:
                    self._compute(request, sink, key)
                    del self._held[request.request_id]
                    return
        except EngineBusy:
            time.sleep(BUSY_SECONDS)
            self._jobs.put(functools.partial(self._replay, request, sink, key))
            return
        except RuntimeError as refusal:
            error = str(refusal)
        self._end(request, sink, set(range(request.params.sequences)), error)

    def _end(self, request: Request, sink: Sink, unfinished: set[int], error: str | None = None) -> None:
        with self._lock:
            del self._held[request.request_id]
        for index in sorted(unfinished):
            sink(Output(request.request_id, index, finish_reason=Finish.ABORT, error=error))
