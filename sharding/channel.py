"""A channel between process 0 of a group and each of the others: frames over TCP, heartbeats both ways.

    frame = kind: u8, length: u32 (big-endian), then that many bytes

Process 0 listens, the others connect and show a token that only the group knows. What comes is handed out in
order by `receive`. A peer whose connection ends, or that is silent for too long, is gone, and with it the
group: `failure` says so, once, everybody else is told, and `on_failure` is called. Knows nothing of jax, nor
of what the frames mean.
"""

from __future__ import annotations

import contextlib
import enum
import hmac
import json
import math
import queue
import select
import socket
import struct
import threading
import time
from collections.abc import Callable
from typing import Self

BEAT_SECONDS = 1.0
SILENCE_SECONDS = 8.0  # of a peer that serves
START_SILENCE_SECONDS = 120.0  # of one that still loads: reading a checkpoint can hold its threads up
HELLO_SECONDS = 5.0  # a connection that has not shown the token by then is closed
FAREWELL_SECONDS = 2.0  # to tell the others why this process ends
CLOSE_SECONDS = 20.0  # for the others to end once they are told to
MAX_HELLO = 4096  # bytes
MAX_FRAME = 2**28  # bytes

_HEADER = struct.Struct("!BI")


class Kind(enum.IntEnum):
    BEAT = 0
    HELLO = 1
    DATA = 2
    STOP = 3  # to process 0: somebody asked this process to stop
    CLOSE = 4  # from process 0: the work is done
    FAIL = 5  # the sender ends, and why


class ChannelError(RuntimeError):
    """The group cannot go on: one of its processes is gone, or none came."""


class _Link:
    """One connection. `send` from any thread, `receive` from one."""

    def __init__(self, connection: socket.socket, peer: str) -> None:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.peer = peer
        self._socket = connection
        self._lock = threading.Lock()

    def send(self, kind: Kind, payload: bytes = b"", *, patience: float = -1) -> None:
        """Raises OSError where the peer is gone, or does not read. patience: seconds to wait for other
        senders, -1 for as long as they take."""
        if not self._lock.acquire(timeout=patience):
            raise TimeoutError(f"{self.peer} does not read")
        try:
            self._socket.sendall(_HEADER.pack(kind, len(payload)) + payload)
        finally:
            self._lock.release()

    def receive(
        self, silence: Callable[[], float], limit: int = MAX_FRAME, deadline: float = math.inf
    ) -> tuple[Kind, bytes]:
        """silence: the seconds without a byte after which the peer is gone, asked again while waiting.
        deadline: when the whole frame must be there, by `time.monotonic`.

        Raises OSError where the peer is gone, ValueError for no frame.
        """
        self._socket.settimeout(silence())
        kind, length = _HEADER.unpack(self._read(_HEADER.size, silence, deadline))
        if length > limit:
            raise ValueError(f"a frame of {length} bytes")
        return Kind(kind), self._read(length, silence, deadline)

    def _read(self, length: int, silence: Callable[[], float], deadline: float) -> bytes:
        data = bytearray(length)
        view = memoryview(data)
        while view:
            self._wait(silence, deadline)
            count = self._socket.recv_into(view)
            if not count:
                raise ConnectionResetError("its connection ended")
            view = view[count:]
        return bytes(data)

    def _wait(self, silence: Callable[[], float], deadline: float) -> None:
        """Until something came, or the end. A timeout of the socket's would stay what it was at the start."""
        begin = time.monotonic()
        poll = select.poll()
        poll.register(self._socket, select.POLLIN)
        while (left := min(begin + silence(), deadline) - time.monotonic()) > 0:
            if poll.poll(1e3 * min(left, BEAT_SECONDS)):
                return
        raise TimeoutError(f"nothing heard from it for {silence():.0f} s")

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()


class Channel:
    """This process's end, made by `listen` (process 0) or `connect` (the others).

    failure: why the group cannot go on. stop_requested: another process was asked to stop.
    on_failure: called once with `failure`, on the thread that notices.
    """

    def __init__(
        self, links: list[_Link], name: str, on_failure: Callable[[str], None], *, leads: bool
    ) -> None:
        self.failure: str | None = None
        self.stop_requested = False
        self._silence = START_SILENCE_SECONDS
        self._links = links
        self._name = name
        self._leads = leads
        self._on_failure = on_failure
        self._frames: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._failing = threading.Lock()
        self._failed = threading.Event()
        self._closing = threading.Event()
        self._readers = [
            threading.Thread(target=self._listen_to, args=(link,), daemon=True) for link in links
        ]
        for thread in (*self._readers, threading.Thread(target=self._beat, daemon=True)):
            thread.start()

    @classmethod
    def listen(
        cls,
        listener: socket.socket,
        processes: int,
        *,
        token: str,
        name: str,
        seconds: float,
        on_failure: Callable[[str], None],
    ) -> Self:
        """Process 0's, once all the others are there. name: of this process, for messages.

        Raises ChannelError naming those that did not come in so many seconds.
        """
        links: dict[int, _Link] = {}
        deadline = time.monotonic() + seconds
        while len(links) < processes - 1:
            try:
                connection = _accept(listener, deadline)
            except TimeoutError:
                for link in links.values():
                    link.close()
                missing = sorted(set(range(1, processes)) - links.keys())
                raise ChannelError(f"no connection from process {missing} within {seconds:.0f} s") from None
            link = _Link(connection, "a stranger")
            try:
                process, peer = _greeting(link, token, deadline)
                if process in links or not 0 < process < processes:
                    raise ValueError(f"{process=}")
            except (OSError, ValueError):  # a port scanner, or a process of another group
                link.close()
                continue
            link.peer = peer
            links[process] = link
        return cls([links[process] for process in sorted(links)], name, on_failure, leads=True)

    @classmethod
    def connect(
        cls,
        host: str,
        port: int,
        process: int,
        *,
        token: str,
        name: str,
        leader: str,
        seconds: float,
        on_failure: Callable[[str], None],
    ) -> Self:
        """Any other process's. name: of this process, leader: of process 0, for messages.

        Raises ChannelError where process 0 cannot be reached.
        """
        try:
            connection = socket.create_connection((host, port), timeout=seconds)
        except OSError as error:
            raise ChannelError(f"{leader} cannot be reached at {host}, port {port}: {error}") from error
        link = _Link(connection, leader)
        link.send(Kind.HELLO, json.dumps({"token": token, "process": process, "name": name}).encode())
        return cls([link], name, on_failure, leads=False)

    def watch_closely(self) -> None:
        """From now on SILENCE_SECONDS of silence mean that a peer is gone."""
        self._silence = SILENCE_SECONDS

    def send(self, payload: bytes) -> None:
        """To every peer. Where one is gone the group fails, and this raises ChannelError."""
        for link in self._links:
            try:
                link.send(Kind.DATA, payload)
            except OSError as error:
                self._lost(link, error)
        if self.failure is not None:
            raise ChannelError(self.failure)

    def receive(self) -> bytes | None:
        """What came next; None once process 0 has closed the group. Raises ChannelError if that failed."""
        frame = self._frames.get()
        if frame is None and self.failure is not None:
            raise ChannelError(self.failure)
        return frame

    def request_stop(self) -> None:
        """Asks process 0 to end the work in good order."""
        for link in self._links:
            with contextlib.suppress(OSError):
                link.send(Kind.STOP, patience=FAREWELL_SECONDS)

    def explain(self, error: Exception) -> Exception:
        """The failure of the group where that is why `error` was raised: a collective notices first."""
        self._failed.wait(FAREWELL_SECONDS)
        return error if self.failure is None else ChannelError(self.failure)

    def abandon(self, reason: str) -> None:
        """Tells the others that this process ends, and why."""
        self._closing.set()
        self._tell(f"{self._name} ended: {reason}", self._links)

    def close(self) -> None:
        """Process 0: tells the others that the work is done and waits until they have ended. Elsewhere: ends
        the connection."""
        self._closing.set()
        if self._leads:
            for link in self._links:
                with contextlib.suppress(OSError):
                    link.send(Kind.CLOSE, patience=FAREWELL_SECONDS)
            deadline = time.monotonic() + CLOSE_SECONDS
            for thread in self._readers:
                thread.join(max(0.0, deadline - time.monotonic()))
        for link in self._links:
            link.close()

    # -- the channel's own threads ---------------------------------------------------------------------

    def _listen_to(self, link: _Link) -> None:
        while True:
            try:
                kind, payload = link.receive(lambda: self._silence)
            except (OSError, ValueError) as error:
                self._lost(link, error)
                return
            if kind is Kind.DATA:
                self._frames.put(payload)
            elif kind is Kind.STOP:
                self.stop_requested = True
            elif kind is Kind.CLOSE:
                self._closing.set()
                self._frames.put(None)
            elif kind is Kind.FAIL:
                self._fail(payload.decode(errors="replace"), link)
                return

    def _beat(self) -> None:
        while not self._closing.wait(BEAT_SECONDS):
            for link in self._links:
                try:
                    link.send(Kind.BEAT)
                except OSError as error:
                    self._lost(link, error)

    def _lost(self, link: _Link, error: Exception) -> None:
        if not self._closing.is_set():
            self._fail(f"{link.peer} is gone: {error}", link)

    def _fail(self, reason: str, link: _Link) -> None:
        with self._failing:
            if self.failure is not None:
                return
            self.failure = reason
        self._closing.set()
        self._failed.set()
        self._tell(reason, [other for other in self._links if other is not link])
        self._frames.put(None)
        self._on_failure(reason)

    def _tell(self, reason: str, links: list[_Link]) -> None:
        for link in links:
            with contextlib.suppress(OSError):
                link.send(Kind.FAIL, reason.encode()[:MAX_HELLO], patience=FAREWELL_SECONDS)


def _accept(listener: socket.socket, deadline: float) -> socket.socket:
    """The next connection. Raises TimeoutError from the deadline on, even while more of them wait."""
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError
    listener.settimeout(left)
    return listener.accept()[0]


def _greeting(link: _Link, token: str, deadline: float) -> tuple[int, str]:
    """(process, its name) of one that knows the token; OSError or ValueError for anybody else, or for one
    that has not said all of it after HELLO_SECONDS or at the deadline."""
    deadline = min(deadline, time.monotonic() + HELLO_SECONDS)
    kind, payload = link.receive(lambda: HELLO_SECONDS, MAX_HELLO, deadline)
    try:
        hello = json.loads(payload)
        known = hmac.compare_digest(str(hello["token"]).encode(), token.encode())
        process, name = int(hello["process"]), str(hello["name"])
    except (KeyError, TypeError, RecursionError) as error:
        raise ValueError("not a greeting") from error
    if kind is not Kind.HELLO or not known:
        raise ValueError("not of this group")
    return process, name
