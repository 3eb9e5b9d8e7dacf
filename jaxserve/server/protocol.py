"""uvicorn's h11 protocol, with the limits that it lacks.

- A deadline for a request's line and headers: from a connection's start, and from the first byte of each
  later request. The same for what is still to come of a body whose request was answered without it.
- A bound on their bytes that holds however they arrive: 431 beyond it.
- OpenAI's error object for what is not HTTP at all, which no application sees; and the client can read it, as
  the connection is not reset while the client still sends.
- A bound on connections: one that idles makes room for a new one, then the one that is under such a deadline
  for longest; where there is none, 503.
- A deadline for clients that do not read: what is written waits in bounded buffers, and then not for ever.
"""

from __future__ import annotations

import asyncio
import sys
from typing import Any

import h11
from uvicorn.config import Config
from uvicorn.protocols.http.h11_impl import STATUS_PHRASES, H11Protocol
from uvicorn.server import ServerState

from jaxserve.server.errors import ApiError, bad_request, error_response, not_ready

HEADER_SECONDS = 20.0  # a request line and headers that take longer are given up; so is an unwanted body
MAX_HEADER_BYTES = 64 * 2**10
SLICE = 16 * 2**10  # bytes that h11 gets at once while headers come: it measures only what it has been given
SEND_SECONDS = 60.0  # a client that reads too little for so long is dropped
LINGER_SECONDS = 2.0  # after a refusal, for a client that still sends, so that it can read why
LINGER_BYTES = 16 * 2**20


class HttpProtocol(H11Protocol):
    max_connections = 4096

    def __init__(
        self,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        self._deadline: asyncio.TimerHandle | None = None  # for headers, and for the rest of an unwanted body
        self._unread: asyncio.TimerHandle | None = None  # for a client that does not read
        self._lingering = 0  # bytes that may still come after a refusal

    # --- connections ---

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        full = len(self.connections) >= self.max_connections and not self._make_room()
        super().connection_made(transport)
        if full:
            text = f"the server has {self.max_connections} connections open, and can take no more"
            self._refuse(not_ready(text, code="too_many_connections"))
            return
        self._arm()

    def _make_room(self) -> bool:
        """Closes a connection of which nobody waits for an answer. False where there is none.

        Those who have no key hold no other ones: silent connections cannot shut out who has something to say.
        """
        oldest: HttpProtocol | None = None
        for other in self.connections:
            assert isinstance(other, HttpProtocol)
            if other.idle:
                oldest = other
                break
            if other._deadline is not None and (
                oldest is None or oldest._deadline is None or other._deadline.when() < oldest._deadline.when()
            ):
                oldest = other
        if oldest is None:
            return False
        oldest.transport.abort()
        self.connections.discard(oldest)
        return True

    @property
    def idle(self) -> bool:
        """Answered at least once to the last byte, and nothing of another request has come."""
        if self.cycle is None or not self.cycle.response_complete or self._deadline is not None:
            return False
        return self.transport.get_write_buffer_size() == 0

    def connection_lost(self, exc: Exception | None) -> None:
        self._disarm()
        self._read_again()
        super().connection_lost(exc)

    # --- what comes in ---

    def data_received(self, data: bytes) -> None:
        if self._lingering:
            self._lingering -= len(data)
            if self._lingering <= 0:
                self.transport.abort()
            return
        view = memoryview(data)
        while view and not self._lingering and not self.transport.is_closing():
            size = SLICE if self.conn.their_state is h11.IDLE else len(view)
            super().data_received(bytes(view[:size]))
            view = view[size:]
        ours, theirs = self.conn.our_state, self.conn.their_state
        if (ours is h11.IDLE and theirs is h11.IDLE) or self._unwanted:  # headers are under way, or a body
            self._arm()
        else:
            self._disarm()

    @property
    def _unwanted(self) -> bool:
        """A body is still to come whose request is answered."""
        return self.conn.our_state is h11.DONE and self.conn.their_state is h11.SEND_BODY

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self._unwanted and not self.transport.is_closing():
            self._arm()

    def send_400_response(self, msg: str) -> None:
        """Called while h11's exception is handled, which says what is wrong where `msg` does not."""
        fault = sys.exception()
        if isinstance(fault, h11.RemoteProtocolError) and fault.error_status_hint == 431:
            text = f"the request's line and headers are larger than {MAX_HEADER_BYTES} bytes"
            self._refuse(ApiError(431, text, code="headers_too_large"))
        else:
            self._refuse(bad_request(f"this is not a valid HTTP/1.1 request: {fault or msg}"))

    def _refuse(self, error: ApiError) -> None:
        """Answers without the application, and closes the connection."""
        self._disarm()
        if self.conn.our_state not in (h11.IDLE, h11.SEND_RESPONSE):
            self.transport.close()  # an answer is under way: another cannot be put into it
            return
        response = error_response(error)
        for event in (
            h11.Response(
                status_code=response.status_code,
                headers=[*response.raw_headers, (b"connection", b"close")],
                reason=STATUS_PHRASES[response.status_code],
            ),
            h11.Data(data=bytes(response.body)),
            h11.EndOfMessage(),
        ):
            self.transport.write(self.conn.send(event))
        # closing with bytes unread would reset the connection, and the answer would be lost with it
        self._lingering = LINGER_BYTES
        if self.transport.can_write_eof():
            self.transport.write_eof()
        self.loop.call_later(LINGER_SECONDS, self.transport.abort)

    # --- deadlines ---

    def pause_writing(self) -> None:
        super().pause_writing()
        self._wait_for_reader()

    def resume_writing(self) -> None:
        self._read_again()
        super().resume_writing()

    def timeout_keep_alive_handler(self) -> None:
        super().timeout_keep_alive_handler()
        if self.transport.get_write_buffer_size():
            self._wait_for_reader()  # closing waits for it, and nothing else would end that

    def _wait_for_reader(self) -> None:
        if self._unread is None:
            self._unread = self.loop.call_later(SEND_SECONDS, self.transport.abort)

    def _read_again(self) -> None:
        if self._unread is not None:
            self._unread.cancel()
            self._unread = None

    def _arm(self) -> None:
        if self._deadline is None:
            self._deadline = self.loop.call_later(HEADER_SECONDS, self._expire)

    def _disarm(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _expire(self) -> None:
        self._deadline = None
        if not self.transport.is_closing():
            self.transport.close()
