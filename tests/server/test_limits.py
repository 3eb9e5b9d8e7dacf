"""What one connection may cost: bytes of headers, time, connections, and replies that nobody reads."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import time
from collections.abc import AsyncIterator, Iterator
from random import Random
from typing import Any

import h11
import orjson
import pytest
from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.server import ServerState

from jaxserve.server import bridge, protocol, run
from tests.server.fakes import FakeEngine
from tests.server.harness import MODEL, Serve, Served, until


@contextlib.contextmanager
def connected(served: Served) -> Iterator[socket.socket]:
    with socket.create_connection(("127.0.0.1", served.port), timeout=10) as connection:
        yield connection


def answer(connection: socket.socket) -> bytes:
    """All that comes until the server closes."""
    data = b""
    while piece := connection.recv(2**16):
        data += piece
    return data


HEADERS = {
    "one line": b"X: " + b"x" * 2**20,
    "many lines": b"\r\n".join(b"X%d: y" % number for number in range(90_000)),
    "just too large": b"X: " + b"x" * (protocol.MAX_HEADER_BYTES + protocol.SLICE),
    "many lines of one name": b"\r\n".join([b"X: y"] * 200_000),
}


@pytest.mark.parametrize("headers", HEADERS.values(), ids=HEADERS.keys())
def test_large_headers_get_a_431(served: Served, headers: bytes) -> None:
    with connected(served) as connection:
        connection.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n" + headers + b"\r\n\r\n")
        reply = answer(connection)
    assert reply.startswith(b"HTTP/1.1 431 ")
    error = orjson.loads(reply.partition(b"\r\n\r\n")[2])["error"]
    assert (error["code"], error["type"]) == ("headers_too_large", "invalid_request_error")
    served.as_new()


def test_a_large_request_line_gets_a_431(served: Served) -> None:
    with connected(served) as connection:
        connection.sendall(b"GET /" + b"x" * 2**20)
        assert answer(connection).startswith(b"HTTP/1.1 431 ")


def test_headers_of_allowed_size_pass(served: Served) -> None:
    value = b"x" * (protocol.MAX_HEADER_BYTES - 1000)
    for whole in (True, False):
        with connected(served) as connection:
            head = (
                b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nX: " + value + b"\r\n\r\n"
            )
            for start in range(0, len(head), len(head) if whole else 5000):
                connection.sendall(head[start : start + (len(head) if whole else 5000)])
            assert answer(connection).startswith(b"HTTP/1.1 200 ")


@pytest.mark.parametrize(
    "request_line",
    [b"\x16\x03\x01\x02\x00", b"GET", b"GET /\x00 HTTP/1.1", b"\r\n\r\n\r\n!"],
)
def test_what_is_not_http(served: Served, request_line: bytes) -> None:
    with connected(served) as connection:
        connection.sendall(request_line + b"\r\nHost: localhost\r\n\r\n")
        reply = answer(connection)
    assert reply.startswith(b"HTTP/1.1 400 ")
    assert orjson.loads(reply.partition(b"\r\n\r\n")[2])["error"]["type"] == "invalid_request_error"


def test_requests_one_after_another_in_one_packet(served: Served) -> None:
    with connected(served) as connection:
        request = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"
        connection.sendall(request * 50 + request.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n"))
        assert answer(connection).count(b"HTTP/1.1 200 ") == 51


# --- connections ---


def test_connections_have_a_bound(serve: Serve) -> None:
    served = serve(FakeEngine(slots=4, delay=0.01), max_connections=3)
    content = orjson.dumps({"model": MODEL, "prompt": "a", "max_tokens": 250, "stream": True})
    streams = [served.connect("/v1/completions", content) for _ in range(3)]
    for stream in streams:
        assert stream.recv(12) == b"HTTP/1.1 200"
    with connected(served) as one_more:
        assert answer(one_more).startswith(b"HTTP/1.1 503 ")
    streams.pop().close()
    until(lambda: len(served.server.server_state.connections) == 2)
    assert served.http.get("/health").status_code == 200
    with connected(served) as newer:  # the connection of `served.http` idles: it makes room
        newer.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert newer.recv(12) == b"HTTP/1.1 200"
    for stream in streams:
        stream.close()
    served.as_new()


OPENINGS = {
    "nothing": b"",
    "a line": b"POST /v1/comp",
    "a body that nobody wants": b"POST /v1/models HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\n{",
}


@pytest.mark.parametrize("sent", OPENINGS.values(), ids=OPENINGS.keys())
def test_connections_without_a_request_make_room(serve: Serve, sent: bytes) -> None:
    """The oldest first: who has a key is not shut out by those who have none and say nothing."""
    served = serve(FakeEngine(delay=0.01), keys=["secret"], max_connections=4)
    silent = []
    for number in range(4):
        silent.append(socket.create_connection(("127.0.0.1", served.port), timeout=10))
        silent[-1].sendall(sent)
        if sent.endswith(b"{"):
            assert silent[-1].recv(12) == b"HTTP/1.1 401"
        until(lambda count=number + 1: len(served.server.server_state.connections) == count)
    content = orjson.dumps({"model": MODEL, "prompt": "a", "max_tokens": 250, "stream": True})
    head = f"Host: x\r\nx-api-key: secret\r\nContent-Length: {len(content)}\r\n\r\n".encode()
    for closed in silent[:2]:
        mine = socket.create_connection(("127.0.0.1", served.port), timeout=10)
        mine.sendall(b"POST /v1/completions HTTP/1.1\r\n" + head + content)
        assert mine.recv(12) == b"HTTP/1.1 200"
        with contextlib.suppress(ConnectionError):
            answer(closed)  # it ends
        silent.append(mine)
    for left in silent[2:4]:
        left.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            assert left.recv(2**16)  # what they had been told, and no end
            left.recv(1)
            raise AssertionError("a connection more than needed was closed")
    for connection in silent:
        connection.close()


# --- bodies that nobody wants ---


def test_a_body_that_nobody_wants_has_a_deadline(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(protocol, "HEADER_SECONDS", 0.5)
    served = serve(FakeEngine(), keys=["secret"])
    head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n"
    for drops in (0, 1, 1000):  # silence, one byte, and a byte now and then
        with connected(served) as connection:
            connection.sendall(head)
            begin = time.monotonic()
            assert connection.recv(2**16).startswith(b"HTTP/1.1 401 ")
            connection.settimeout(0.05)
            while time.monotonic() - begin < 5:
                try:
                    if drops:
                        drops -= 1
                        connection.sendall(b"x")
                    if connection.recv(2**16) == b"":
                        break
                except TimeoutError:
                    continue
                except ConnectionError:
                    break
            assert 0.4 < time.monotonic() - begin < 3
    with connected(served) as connection:  # one that comes in time does not end the connection
        for _ in range(2):
            connection.sendall(head)
            reply = b""
            while not reply.endswith(b"}"):
                reply += connection.recv(2**16)
            assert reply.startswith(b"HTTP/1.1 401 ")
            connection.sendall(b"x" * 100)


# --- chunks ---

CHUNKED = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n"


def chunks(data: bytes, size: int = 1) -> bytes:
    pieces = [data[at : at + size] for at in range(0, len(data), size)]
    return b"".join(b"%x\r\n%s\r\n" % (len(one), one) for one in pieces)


def test_tiny_chunks_are_refused(served: Served) -> None:
    with connected(served) as connection:
        connection.sendall(CHUNKED + chunks(b" " * 3 * protocol.FREE_CHUNKS))
        reply = answer(connection)  # it ends
    assert reply.startswith(b"HTTP/1.1 400 ")
    error = orjson.loads(reply.partition(b"\r\n\r\n")[2])["error"]
    assert error["code"] == "tiny_chunks" and "64 bytes on average" in error["message"]
    until(lambda: not served.server.server_state.tasks)


@pytest.mark.parametrize("size", [1, 100])
def test_chunks_that_nobody_wants_are_not_read_on(serve: Serve, size: int) -> None:
    """Those who have no key would keep the server busy with them."""
    served = serve(FakeEngine(), keys=["secret"])
    with connected(served) as connection:
        connection.sendall(CHUNKED)
        assert connection.recv(2**16).startswith(b"HTTP/1.1 401 ")
        with contextlib.suppress(ConnectionError):
            connection.sendall(chunks(b" " * size * 3 * protocol.FREE_CHUNKS, size))
            answer(connection)  # it ends


def test_some_tiny_chunks_are_taken(served: Served) -> None:
    body = orjson.dumps({"model": MODEL, "prompt": "a", "max_tokens": 3})
    few = b" " * (protocol.FREE_CHUNKS - len(body)) + body
    many = b" " * protocol.LEAST_CHUNK * 2 * protocol.FREE_CHUNKS + body
    for data, size in ((few, 1), (many, protocol.LEAST_CHUNK), (many, 2**16)):
        with connected(served) as connection:
            head = CHUNKED.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n")
            connection.sendall(head + chunks(data, size) + b"0\r\n\r\n")
            reply = answer(connection)
        assert reply.startswith(b"HTTP/1.1 200 ") and b'"text":"bcd"' in reply


async def echo(scope: Scope, receive: Receive, send: Send) -> None:
    body, more = b"", True
    while more:
        message = await receive()
        body += message.get("body", b"")
        more = message.get("more_body", False)
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": body})


@contextlib.asynccontextmanager
async def listening(app: ASGIApp) -> AsyncIterator[int]:
    """The port of a server on this loop."""
    config = run.configured(app, 100, "off")
    config.load()
    state = ServerState()
    server = await asyncio.get_running_loop().create_server(
        lambda: config.http_protocol_class(config=config, server_state=state, app_state={}), "127.0.0.1", 0
    )
    yield server.sockets[0].getsockname()[1]
    for one in list(state.connections):
        one.transport.abort()
    server.close()
    await server.wait_closed()


def test_chunks_leave_others_their_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """In one turn of the loop there are never many more pieces read than one connection may."""
    clients, count, read, most, total = 4, 4000, 0, 0, 0
    next_event = protocol._Paced.next_event

    def counted(self: protocol._Paced) -> Any:
        nonlocal read
        event = next_event(self)
        read += isinstance(event, h11.Data)
        return event

    monkeypatch.setattr(protocol._Paced, "next_event", counted)

    async def watch() -> None:
        nonlocal read, most, total
        while True:
            most, total, read = max(most, read), total + read, 0
            await asyncio.sleep(0)

    async def send(port: int) -> bytes:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(CHUNKED + chunks(b"x" * count) + b"0\r\n\r\n")
        reply = await reader.readuntil(b"0\r\n\r\n")
        writer.close()
        return reply

    async def main() -> None:
        async with listening(echo) as port:
            watching = asyncio.create_task(watch())
            for reply in await asyncio.gather(*(send(port) for _ in range(clients))):
                assert reply.count(b"x") == count
            watching.cancel()

    asyncio.run(main())
    assert total == clients * count
    # what has just come on each, and the turn of one that waits
    assert most <= (clients + 1) * protocol.TURN_PIECES


@pytest.mark.parametrize("seed", range(5))
def test_bodies_arrive_as_they_were_sent(seed: int) -> None:
    """However they are cut, and one behind the other."""
    random = Random(seed)
    bodies = [random.randbytes(random.choice((0, 1, 700, 20_000, 300_000))).hex().encode() for _ in range(20)]
    data = b""
    for body in bodies:
        if random.random() < 0.3:
            data += b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body)
        else:
            data += CHUNKED + chunks(body, random.choice((70, 300, 2**14, 2**20))) + b"0\r\n\r\n"

    async def main() -> None:
        async with listening(echo) as port:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)

            async def send() -> None:
                begin = 0
                while begin < len(data):
                    end = begin + random.choice((1, 100, 5000, 2**18))
                    writer.write(data[begin:end])
                    await writer.drain()
                    begin = end

            sending = asyncio.create_task(send())
            client = h11.Connection(h11.CLIENT)
            for body in bodies:
                client.send(h11.Request(method="POST", target="/", headers=[("host", "x")]))
                client.send(h11.EndOfMessage())
                got = b""
                while not isinstance(event := client.next_event(), h11.EndOfMessage):
                    if event is h11.NEED_DATA:
                        client.receive_data(await reader.read(2**16))
                    elif isinstance(event, h11.Data):
                        got += event.data
                assert got == body
                client.start_next_cycle()
            await sending
            writer.close()

    asyncio.run(main())


def test_files_are_allowed_for_connections() -> None:
    import resource

    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (500, before[1]))
        run.allow_files(600)
        assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] == 600
        run.allow_files(100)  # never fewer
        assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] == 600
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


# --- replies that nobody reads ---


def unread(served: Served, body: dict[str, object]) -> socket.socket:
    """A stream of many bytes to a client with a small window, who reads nothing of it."""
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    connection.connect(("127.0.0.1", served.port))
    content = orjson.dumps({"model": MODEL, "prompt": "a", "stream": True, "logprobs": 20, **body})
    head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(content)}\r\n\r\n"
    connection.sendall(head.encode() + content)
    return connection


def test_a_client_that_does_not_read_is_dropped(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(protocol, "SEND_SECONDS", 0.3)
    served = serve(FakeEngine(slots=64, max_model_len=5000, pages=100_000))
    with unread(served, {"max_tokens": 4000, "n": 32}):
        until(lambda: served.engine.stats()["running"] > 0)
        other = served.completion(max_tokens=5)  # others are not held up
        assert other.json()["choices"][0]["text"] == "bcdef"
        until(lambda: not served.server._context.bridge.calls)
        until(lambda: len(served.server.server_state.connections) == 1)
    served.as_new()


def test_what_waits_for_a_slow_reader_is_bounded(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bridge, "MAX_UNREAD", 500)
    served = serve(FakeEngine(slots=64, max_model_len=5000, pages=100_000, delay=0.001))
    with unread(served, {"max_tokens": 4900, "n": 32}) as connection:
        until(lambda: bool(served.server._context.bridge.calls))
        [call] = served.server._context.bridge.calls
        longest = 0
        while call in served.server._context.bridge.calls and call._error is None:
            longest = max(longest, len(call._buffer))
            time.sleep(0.001)
        assert longest <= 500 + 64
        until(lambda: served.engine.stats()["generation_tokens_total"] < 32 * 4900)
        connection.settimeout(10)
        data = b""
        with contextlib.suppress(ConnectionError):
            while piece := connection.recv(2**16):
                data += piece
                if b"[DONE]" in data:
                    break
        assert b"the client does not read its reply" in data
    served.as_new()


def test_a_slow_but_steady_reader_gets_everything(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(protocol, "SEND_SECONDS", 1.0)
    served = serve(FakeEngine(slots=4, max_model_len=2000, pages=100_000, delay=0.0005))
    with unread(served, {"max_tokens": 1000, "n": 2}) as connection:
        data = b""
        while b"[DONE]" not in data:
            data += connection.recv(2**15)
            time.sleep(0.001)
    assert data.count(b'"finish_reason":"length"') == 2
    served.as_new()
