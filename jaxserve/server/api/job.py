"""What each endpoint that asks the engine for something makes of a request's body, over HTTP or in a batch.

Each endpoint has a `prepare(body, engine, check_model, caller)` that finds everything that can be wrong
(ApiError) before any of it is submitted. It may take long (tokenizing, templates, grammars): `prepared` runs
it beside the event loop.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextvars
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol

from jaxserve.engine.outputs import Output
from jaxserve.protocols import EngineLike
from jaxserve.scheduler.types import Request
from jaxserve.server.api.fields import Caller
from jaxserve.server.api.results import Answer, Usage
from jaxserve.server.body import OFF_LOOP_BYTES, parse_object

# what a body that asks for a grammar holds somewhere; a prompt that holds it goes by the thread for nothing
COMPILED = (
    *(b'"response_format"', b'"structured_outputs"', b'"guided_', b"\\u"),
    *(b'"tools"', b'"format"', b'"output_format"', b'"output_config"'),  # of turns
)
# Of their own, so that many who wait for grammars leave the others a thread. A grammar's queue is shorter.
THREADS = concurrent.futures.ThreadPoolExecutor(16, "jaxserve-prepare")
GRAMMAR_THREADS = concurrent.futures.ThreadPoolExecutor(48, "jaxserve-prepare-grammar")


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
    """`prepare` of the body `data`, on a thread where it may hold up other streams."""

    def work() -> J:
        return prepare(parse_object(data), engine, check_model, caller)

    compiles = any(word in data for word in COMPILED)
    if not (always_on_thread or compiles or len(data) > OFF_LOOP_BYTES):
        return work()
    threads = GRAMMAR_THREADS if compiles else THREADS
    context = contextvars.copy_context()
    return await asyncio.get_running_loop().run_in_executor(threads, context.run, work)
