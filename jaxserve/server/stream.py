"""Server-sent events, framed by hand, and the watch for clients that leave.

Source of the format: the WHATWG HTML standard, "Server-sent events"; the closing `[DONE]` is OpenAI's.
Starlette cancels only streaming responses when a client leaves, and not those that wait for their first
byte, so plain and streaming handlers both go through `unless_client_leaves`.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable
from typing import Any

import orjson
from starlette.types import Receive, Scope, Send

from jaxserve.engine.outputs import Output
from jaxserve.server.bridge import Call
from jaxserve.server.errors import ApiError, engine_failed, error_body

log = logging.getLogger(__name__)

DONE = b"data: [DONE]\n\n"
Translate = Callable[[int, Output], Iterable[dict[str, Any]]]  # (prompt, increment) -> chunks


class ClientLeft(Exception):
    """The connection is gone; there is nobody to answer."""


def event(data: dict[str, Any]) -> bytes:
    """One event. JSON holds no raw newline, so one `data:` line is enough."""
    return b"data: " + orjson.dumps(data) + b"\n\n"


def named_event(data: dict[str, Any]) -> bytes:
    """One that bears its type as its name, too: responses' and messages' form."""
    return b"event: " + data["type"].encode() + b"\n" + event(data)


def failed(error: ApiError) -> list[dict[str, Any]]:
    return [error_body(error)]


async def unless_client_leaves[T](receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`; cancels it and raises ClientLeft if the client disconnects first.

    The request's body must have been read: what `receive` then yields is the disconnect.
    """
    working = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(_disconnected(receive))
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise ClientLeft
    finally:
        working.cancel()
        leaving.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class EventStream:
    """A response that streams a call's increments, and aborts the call if the client leaves.

    translate: from an increment to the chunks that the client reads.
    closing: the chunks after the last increment, such as the usage.
    opening: those before the first. failed: those that say what went wrong. frame: a chunk's bytes. end: what
        comes after everything.
    """

    def __init__(
        self,
        call: Call,
        translate: Translate,
        closing: Callable[[], Iterable[dict[str, Any]]],
        *,
        opening: Callable[[], Iterable[dict[str, Any]]] = tuple,
        failed: Callable[[ApiError], Iterable[dict[str, Any]]] = failed,
        frame: Callable[[dict[str, Any]], bytes] = event,
        end: bytes = DONE,
    ) -> None:
        self._call = call
        self._translate = translate
        self._closing = closing
        self._opening = opening
        self._failed = failed
        self._frame = frame
        self._end = end

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with contextlib.suppress(ClientLeft):  # the call was aborted on the way out
            await unless_client_leaves(receive, self._send_all(send))

    async def _send_all(self, send: Send) -> None:
        with self._call as call:  # submits; a refusal here is still an ordinary error response
            await send(
                {
                    "type": "http.response.start",
                    "status": 200,
                    "headers": [
                        (b"content-type", b"text/event-stream; charset=utf-8"),
                        (b"cache-control", b"no-cache"),
                        (b"x-accel-buffering", b"no"),  # nginx would hold events back
                    ],
                }
            )
            try:
                async for events in self._events(call):
                    call.sending = True
                    await send(_body(events))
                    call.sending = False
            except ApiError as error:
                await send(_body(self._failure(error)))
            except Exception:
                log.exception("a stream's translation failed")
                await send(_body(self._failure(engine_failed("an internal error"))))
        await send({"type": "http.response.body", "body": self._end, "more_body": False})

    async def _events(self, call: Call) -> AsyncIterator[bytes]:
        opening = self._framed(self._opening())
        if opening:
            yield opening
        async for batch in call.batches():
            chunks = self._framed(
                chunk for prompt, output in batch for chunk in self._translate(prompt, output)
            )
            if chunks:
                yield chunks
        closing = self._framed(self._closing())
        if closing:
            yield closing

    def _failure(self, error: ApiError) -> bytes:
        """What went wrong, in the API's words, or without them where those fail too."""
        try:
            return self._framed(self._failed(error))
        except Exception:
            log.exception("a stream's error could not be told")
            return b"".join(map(event, failed(error)))

    def _framed(self, chunks: Iterable[dict[str, Any]]) -> bytes:
        return b"".join(map(self._frame, chunks))


def _body(data: bytes) -> dict[str, Any]:
    return {"type": "http.response.body", "body": data, "more_body": True}
