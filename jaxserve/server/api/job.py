"""What each endpoint that asks the engine for something makes of a request's body, over HTTP or in a batch.

Each endpoint has a `prepare(body, engine, check_model, caller)` that finds everything that can be wrong
(ApiError) before any of it is submitted. It may take long (tokenizing, templates, grammars): `prepared` runs
it beside the event loop.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import contextvars
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol

from jaxserve.engine.outputs import Output
from jaxserve.protocols import EngineLike
from jaxserve.scheduler.types import Request
from jaxserve.server.api.fields import Caller
from jaxserve.server.api.results import Answer, Usage
from jaxserve.server.body import OFF_LOOP_BYTES, parse_object
from jaxserve.server.errors import not_ready

# what a body that asks for a grammar holds somewhere; a prompt that holds it goes by the thread for nothing
COMPILED = (
    *(b'"response_format"', b'"structured_outputs"', b'"guided_', b"\\u"),
    *(b'"tools"', b'"format"', b'"output_format"', b'"output_config"'),  # of turns
)
# Of their own, so that many who wait for grammars leave the others a thread. A grammar's queue is shorter.
THREADS = concurrent.futures.ThreadPoolExecutor(16, "jaxserve-prepare")
GRAMMAR_THREADS = concurrent.futures.ThreadPoolExecutor(48, "jaxserve-prepare-grammar")
# The memory of a large body's parts is a multiple of its own, so there are few of them at a time.
LARGE_THREADS = concurrent.futures.ThreadPoolExecutor(2, "jaxserve-prepare-large")
LARGE_BYTES = 256 * 2**10
RETRY_SECONDS = 5
MAX_LARGE = 256 * 2**20  # bytes of large bodies that wait for those threads, or have them


class Room:
    """Bytes that may be held at the same time."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._held = 0
        self._lock = threading.Lock()

    @contextlib.contextmanager
    def held(self, size: int) -> Iterator[None]:
        """Raises ApiError 503 where others have left too little. Who is alone always has room."""
        with self._lock:
            if self._held and self._held + size > self._most:
                raise not_ready(
                    "too many large requests wait to be read; try again later",
                    code="too_many_bodies",
                    retry_after=RETRY_SECONDS,
                )
            self._held += size
        try:
            yield
        finally:
            with self._lock:
                self._held -= size


LARGE = Room(MAX_LARGE)


class Job(Protocol):
    """A valid request: what to ask of the engine, and how to say what it answers.

    requests: for the engine, all or none of them. usage: filled by `results.collect` and by `chunks`.
    stream: the client wants chunks.
    """

    @property
    def requests(self) -> Sequence[Request]: ...

    @property
    def usage(self) -> Usage: ...

    @property
    def stream(self) -> bool: ...

    def answer(self, answers: Sequence[Answer]) -> dict[str, Any]:
        """The whole reply at once, from what `results.collect` made of each request."""

    def chunks(self, prompt: int, output: Output) -> Iterable[dict[str, Any]]:
        """What an increment of request `prompt` adds to a stream."""

    def closing(self) -> Iterable[dict[str, Any]]:
        """The chunks after the last increment."""


type Prepare[J] = Callable[[Mapping[str, Any], EngineLike, Callable[[str], None], Caller], J]


async def prepared[J](
    data: bytes,
    prepare: Prepare[J],
    engine: EngineLike,
    check_model: Callable[[str], None],
    caller: Caller,
    *,
    always_on_thread: bool = False,
) -> J:
    """`prepare` of the body `data`, on a thread where it may hold up other streams.

    Raises what `prepare` raises, and ApiError 503 where too many large bodies wait.
    """

    def work() -> J:
        return prepare(parse_object(data), engine, check_model, caller)

    if len(data) > LARGE_BYTES:
        with LARGE.held(len(data)):
            return await _on(LARGE_THREADS, work)
    compiles = any(word in data for word in COMPILED)
    if not (always_on_thread or compiles or len(data) > OFF_LOOP_BYTES):
        return work()
    return await _on(GRAMMAR_THREADS if compiles else THREADS, work)


async def _on[J](threads: concurrent.futures.Executor, work: Callable[[], J]) -> J:
    context = contextvars.copy_context()
    return await asyncio.get_running_loop().run_in_executor(threads, context.run, work)
