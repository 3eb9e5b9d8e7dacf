"""uvicorn's h11 protocol, with the limits that it lacks.

- A deadline for a request's line and headers: from a connection's start, and from the first byte of each
  later request. The same for what is still to come of a body whose request was answered without it.
- A bound on their bytes that holds however they arrive: 431 beyond it.
- Turns: a connection whose body comes in many small chunks lets the others have theirs in between; and a
  bound on how small they may be: 400.
- OpenAI's error object for what is not HTTP at all, which no application sees; and the client can read it, as
  the connection is not reset while the client still sends.
- A bound on connections: one that idles makes room for a new one, then the one that is under such a deadline
  for longest; where there is none, 503.
- A deadline for clients that do not read: what is written waits in bounded buffers, and then not for ever.
"""

from __future__ import annotations

import asyncio
import collections
import sys
from typing import Any

import h11
from uvicorn.config import Config
from uvicorn.protocols.http.flow_control import FlowControl
from uvicorn.protocols.http.h11_impl import STATUS_PHRASES, H11Protocol
from uvicorn.server import ServerState

from jaxserve.server.errors import ApiError, bad_request, error_response, not_ready

HEADER_SECONDS = 20.0  # a request line and headers that take longer are given up; so is an unwanted body
MAX_HEADER_BYTES = 64 * 2**10
SLICE = 16 * 2**10  # bytes that h11 gets at once while headers come: it measures only what it has been given
TURN_PIECES = 64  # of a body, that a connection may have read at once: h11 takes some 10 µs for each
FREE_CHUNKS = 4096  # of a body, that may be as small as they like, or come after the answer
LEAST_CHUNK = 64  # bytes, on average, where there are more
SEND_SECONDS = 60.0  # a client that reads too little for so long is dropped
LINGER_SECONDS = 2.0  # after a refusal, for a client that still sends, so that it can read why
LINGER_BYTES = 16 * 2**20


class TinyChunks(h11.RemoteProtocolError):
    """A body whose chunks are more framing than content."""


class _Paced(h11.Connection):
    """h11's connection, which says after a turn's pieces of a body that it needs data, whatever it has.

    256 KB of 1-byte chunks are 43,690 events: all at once, they were 0.4 s in which nobody else was answered.
    """

    def __init__(self, max_incomplete_event_size: int) -> None:
        super().__init__(h11.SERVER, max_incomplete_event_size)
        self.pieces = 0  # since the turn began
        self._chunks = self._bytes = 0  # of this body

    @property
    def spent(self) -> bool:
        return self.pieces >= TURN_PIECES

    def next_event(self) -> h11.Event | type[h11.NEED_DATA] | type[h11.PAUSED]:
        if self.spent:
            return h11.NEED_DATA
        event = super().next_event()
        if isinstance(event, h11.Request):
            self._chunks = self._bytes = 0
        elif isinstance(event, h11.Data):
            self.pieces += 1
            self._chunks += event.chunk_start  # none where the length was declared
            if self.our_state is not h11.DONE:  # what nobody wants is worth nothing, however it is cut
                self._bytes += len(event.data)
            if self._bytes < LEAST_CHUNK * (self._chunks - FREE_CHUNKS):
                raise TinyChunks(
                    f"the body's chunks hold fewer than {LEAST_CHUNK} bytes on average: send larger ones"
                )
        return event


class _Flow(FlowControl):
    """uvicorn's, which leaves the transport paused as long as a connection waits for its turn."""

    def __init__(self, transport: asyncio.Transport) -> None:
        super().__init__(transport)
        self._held = False

    def hold(self) -> None:
        self._held = True
        self._transport.pause_reading()

    def release(self) -> None:
        if self._held:
            self._held = False
            if not self.read_paused:
                self._transport.resume_reading()

    def resume_reading(self) -> None:
        if self._held:
            self.read_paused = False
        else:
            super().resume_reading()


class HttpProtocol(H11Protocol):
    """turns: the connections that wait for theirs, of all that share a loop."""

    max_connections = 4096
    turns: collections.deque[HttpProtocol]
    conn: _Paced
    flow: _Flow

    def __init__(
        self,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        self.conn = _Paced(MAX_HEADER_BYTES)
        self._unfed = memoryview(b"")  # came, and was not given to h11 yet
        self._waiting = False  # for a turn
        self._deadline: asyncio.TimerHandle | None = None  # for headers, and for the rest of an unwanted body
        self._unread: asyncio.TimerHandle | None = None  # for a client that does not read
        self._lingering = 0  # bytes that may still come after a refusal

    # --- connections ---

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        full = len(self.connections) >= self.max_connections and not self._make_room()
        super().connection_made(transport)
        self.flow = _Flow(transport)
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
        if self._deadline is not None and self.loop.time() > self._deadline.when():
            self._expire()  # where the loop is busy, what came is read before its timers are looked at
            return
        self._unfed = memoryview(bytes(self._unfed) + data) if self._unfed else memoryview(data)
        if not self._waiting:
            self.conn.pieces = 0
            self._read_on()

    def _read_on(self) -> None:
        """Reads what came, up to TURN_PIECES of a body. The rest waits for what else the loop has to do."""
        while self._unfed and self._stays and not self.conn.spent:
            size = SLICE if self.conn.their_state is h11.IDLE else MAX_HEADER_BYTES
            piece, self._unfed = self._unfed[:size], self._unfed[size:]
            super().data_received(bytes(piece))
        if not self._stays:
            self._unfed = memoryview(b"")
            return
        if self.conn.spent:
            self._wait_for_turn()
        else:
            self.flow.release()
        ours, theirs = self.conn.our_state, self.conn.their_state
        if (ours is h11.IDLE and theirs is h11.IDLE) or self._unwanted:  # headers are under way, or a body
            self._arm()
        else:
            self._disarm()

    @property
    def _stays(self) -> bool:
        return not self._lingering and not self.transport.is_closing()

    def _wait_for_turn(self) -> None:
        if self._waiting:
            return
        self._waiting = True
        self.flow.hold()
        self.turns.append(self)
        if len(self.turns) == 1:
            self.loop.call_soon(self._have_turn)

    def _have_turn(self) -> None:
        """One of them all in a turn of the loop: many connections take no more of it than one."""
        self.turns.popleft()
        self._waiting = False
        if self.turns:
            self.loop.call_soon(self.turns[0]._have_turn)
        self.conn.pieces = 0
        if self._stays:
            self.handle_events()  # of what h11 was left with
        self._read_on()

    @property
    def _unwanted(self) -> bool:
        """A body is still to come whose request is answered."""
        return self.conn.our_state is h11.DONE and self.conn.their_state is h11.SEND_BODY

    def on_response_complete(self) -> None:
        super().on_response_complete()  # which reads on where the next request is there already
        if self.conn.spent and self._stays:
            self._wait_for_turn()
        if self._unwanted and not self.transport.is_closing():
            self._arm()

    def send_400_response(self, msg: str) -> None:
        """Called while h11's exception is handled, which says what is wrong where `msg` does not."""
        fault = sys.exception()
        if isinstance(fault, h11.RemoteProtocolError) and fault.error_status_hint == 431:
            text = f"the request's line and headers are larger than {MAX_HEADER_BYTES} bytes"
            self._refuse(ApiError(431, text, code="headers_too_large"))
        elif isinstance(fault, TinyChunks):
            self._refuse(bad_request(str(fault), code="tiny_chunks"))
        else:
            self._refuse(bad_request(f"this is not a valid HTTP/1.1 request: {fault or msg}"))

    def _refuse(self, error: ApiError) -> None:
        """Answers without the application, and closes the connection."""
        self._disarm()
        if self.conn.our_state is h11.DONE:  # the answer is out, and its client may still have to read it
            self._linger()
            return
        if self.conn.our_state not in (h11.IDLE, h11.SEND_RESPONSE):
            self.transport.close()  # an answer is under way: another cannot be put into it
            return
        if self.cycle is not None and not self.cycle.response_complete:
            self.cycle.disconnected = True  # the application has nobody to answer any more
            self.cycle.message_event.set()
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
        self._linger()

    def _linger(self) -> None:
        # closing with bytes unread would reset the connection, and the answer would be lost with it
        self._lingering = LINGER_BYTES
        self.flow.release()
        self.flow.resume_reading()
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
