"""`jaxserve serve` from the bound port to the exit code.

The port is bound first, then uvicorn answers (`/health` 200, the rest 503) while a thread builds the
engine. Does not know how an engine is built: it is handed a function. Progress goes to `say`, line by line.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import ipaddress
import os
import signal
import socket
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from typing import NoReturn

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from jaxserve.config import ServerOptions
from jaxserve.protocols import EngineLike, GroupLike
from jaxserve.server.app import create_app
from jaxserve.server.auth import load_keys
from jaxserve.server.context import Context
from jaxserve.server.errors import bad_request, error_response, not_ready
from jaxserve.server.holder import EngineHolder, describe

HEADER_SECONDS = 20.0  # a request line and headers that take longer are given up
MAX_HEADER_BYTES = 64 * 2**10
KEEP_ALIVE_SECONDS = 75
ENDS = "this process ends, and whoever launched the group has to restart it whole"
WATCH_SECONDS = 0.2  # how often a group is looked at
DRAIN_SECONDS = 5.0  # open streams get this long to end once the server is told to stop

Say = Callable[[str], None]
Build = Callable[[Say], tuple[EngineLike, str]]  # -> the engine, warm, and the model's name


class StartError(Exception):
    """The server cannot start: the message says why, and which flag to change."""


def serve(options: ServerOptions, build: Build, say: Say, group: GroupLike | None = None) -> int:
    """Serves until a signal comes or the engine cannot be built. Returns the exit code.

    With a group of processes it does not return, but ends this one: with 1 as soon as the engine or another
    process fails and clients have heard of it.
    """
    keys = load_keys(options)
    try:
        listener = bind(options.host, options.port)
    except StartError as error:
        say(f"error: {error}")
        return 1
    address = url(options.host, listener.getsockname()[1])
    say(f"listening on {address}")
    if not keys and not is_loopback(options.host):
        say(f"warning: anyone who can reach {options.host} can use this server: set --api-key")
    holder = EngineHolder()
    server = Server(holder, keys, options.service_tier)
    loader = Loader(server, build, say, lambda: announce(say, address, holder, bool(keys)))
    if group is not None:
        server.watch = Watch(holder, loader, group, say)
    asyncio.run(server.serve_and_load(listener, loader))
    say("stopped")
    if group is not None:
        if not (loader.failed or loader.alive):
            if holder.engine is not None:
                holder.engine.close()
            group.close()
        else:  # a step that waits for a process that is gone does not come back
            group.abandon("it was stopped")
        exit_now(1 if loader.failed else 0)
    if holder.engine is not None:
        holder.engine.close()
    code = 1 if loader.failed else 0
    if loader.alive:
        # a compilation cannot be interrupted, and tearing the interpreter down under it can crash
        exit_now(code)
    return code


def exit_now(code: int) -> NoReturn:
    """Ends the process without waiting for its threads, nor for other processes."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def bind(host: str, port: int) -> socket.socket:
    """A bound socket. Raises StartError naming the flag."""
    try:
        family, kind, protocol, _, place = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except (socket.gaierror, UnicodeError) as error:
        raise StartError(f"--host={host} is no address of this machine: {error}") from error
    listener = socket.socket(family, kind, protocol)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(place)
        listener.listen(2048)
    except OSError as error:
        listener.close()
        if error.errno == errno.EADDRINUSE:
            raise StartError(f"port {port} on {host} is in use: choose another with --port") from error
        if error.errno == errno.EACCES:
            raise StartError(
                f"port {port} may not be used by this user: choose another with --port"
            ) from error
        raise StartError(f"--host={host} --port={port} cannot be bound: {error.strerror}") from error
    return listener


def url(host: str, port: int) -> str:
    if host in ("0.0.0.0", "::"):
        host = "127.0.0.1" if host == "0.0.0.0" else "::1"
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def announce(say: Say, address: str, holder: EngineHolder, has_key: bool) -> None:
    """What a person needs to begin: where, how, and how much."""
    engine = holder.engine
    assert engine is not None
    stats = engine.stats()
    pool = stats["pages_total"] * stats["page_size"]
    speed = stats.get("warmup_tokens_per_second")
    say(f"ready: {holder.model_name} at {address}/v1")
    say(
        f"  {stats['slots']} slots, page pool of {pool:,} tokens"
        f" ({stats['pages_total']:,} pages of {stats['page_size']}),"
        f" context {engine.limits.max_model_len:,} tokens"
        + (f", {speed:,.0f} tokens/s measured" if speed else "")
    )
    chat = engine.tokenizer is not None and engine.tokenizer.has_chat_template
    path = "chat/completions" if chat else "completions"
    prompt = '"messages": [{"role": "user", "content": "Hello"}]' if chat else '"prompt": "Hello"'
    key = '-H "Authorization: Bearer $JAXSERVE_API_KEY" ' if has_key else ""
    say(
        f"  curl -N {address}/v1/{path} {key}-H 'Content-Type: application/json'"
        f' -d \'{{"model": "{holder.model_name}", {prompt}, "stream": true}}\''
    )


class Loader:
    """The thread that builds the engine while the server already answers."""

    def __init__(self, server: Server, build: Build, say: Say, on_ready: Callable[[], None]) -> None:
        self.failed = False
        self._server = server
        self._build = build
        self._say = say
        self._on_ready = on_ready
        self._thread = threading.Thread(target=self._run, name="jaxserve-load", daemon=True)

    def start(self) -> None:
        self._thread.start()

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    def _run(self) -> None:
        try:
            engine, name = self._build(self._say)
            engine.start()
            self._server.holder.set_engine(engine, name)
            self._on_ready()
        except BaseException as error:  # whatever it is, the server must hear of it
            self.failed = True
            if not isinstance(error, OSError | ValueError | RuntimeError | MemoryError | ImportError):
                self._say(traceback.format_exc().rstrip())  # not one that is meant for users
            self._say(f"error: {error or type(error).__name__}")
            self._server.should_exit = True


class Watch:
    """Ends the server of a group's process 0 once the group or the engine has failed, or another process was
    asked to stop."""

    def __init__(self, holder: EngineHolder, loader: Loader, group: GroupLike, say: Say) -> None:
        self._holder = holder
        self._loader = loader
        self._group = group
        self._say = say

    async def wait(self) -> None:
        """Returns when the server is to end."""
        while not self._group.stop_requested:
            engine = self._holder.engine
            if (reason := self._group.failure) is None and engine is not None and not engine.healthy:
                reason = f"the engine failed: {describe(engine)}"
                self._group.abandon(reason)
            if reason is not None:
                self._loader.failed = True
                self._say(f"error: {reason}; {ENDS}")
                return
            await asyncio.sleep(WATCH_SECONDS)
        self._say("another process of the group was asked to stop")


class Server(uvicorn.Server):
    """uvicorn with a drain of its own, and signals that end in exit code 0."""

    watch: Watch | None = None

    def __init__(self, holder: EngineHolder, keys: list[str], service_tier: str = "default") -> None:
        self.holder = holder
        app = create_app(holder, keys=keys, service_tier=service_tier)
        self._context: Context = app.state.context
        super().__init__(
            uvicorn.Config(
                app,
                http=HttpProtocol,
                ws="none",
                lifespan="on",
                log_level="warning",
                access_log=False,
                server_header=False,
                timeout_keep_alive=KEEP_ALIVE_SECONDS,
                timeout_graceful_shutdown=int(DRAIN_SECONDS) + 2,
                h11_max_incomplete_event_size=MAX_HEADER_BYTES,
            )
        )

    async def serve_and_load(self, listener: socket.socket, loader: Loader) -> None:
        serving = asyncio.create_task(self.serve(sockets=[listener]))
        while not self.started and not serving.done():
            await asyncio.sleep(0.01)
        loader.start()
        watching = asyncio.create_task(self._watch())
        await serving
        watching.cancel()

    async def _watch(self) -> None:
        if self.watch is not None:
            await self.watch.wait()
            self.should_exit = True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """No new requests; open ones may end, and hear why when they may not."""
        self.holder.stopping = True
        error = not_ready("the server is stopping", code="stopping", retry_after=None)
        timer = asyncio.get_running_loop().call_later(DRAIN_SECONDS, self._context.bridge.fail_all, error)
        await super().shutdown(sockets)
        timer.cancel()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """As uvicorn's, without raising the signal again at the end: a stop that was asked for is no
        failure."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {name: signal.signal(name, self.handle_exit) for name in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for name, handler in before.items():
                signal.signal(name, handler)


class HttpProtocol(H11Protocol):
    """uvicorn's h11 protocol, with two things that it lacks.

    A deadline for a request's line and headers: it runs from a connection's start, and from the first byte of
    each later request. And OpenAI's error object for what is not HTTP at all, which no application sees.
    """

    _deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._arm()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.conn.their_state is h11.IDLE and self.conn.our_state is h11.IDLE:
            self._arm()  # headers are under way
        else:
            self._disarm()

    def connection_lost(self, exc: Exception | None) -> None:
        self._disarm()
        super().connection_lost(exc)

    def send_400_response(self, msg: str) -> None:
        """Called while h11's exception is handled, which says what is wrong where `msg` does not."""
        if self.conn.our_state not in (h11.IDLE, h11.SEND_RESPONSE):
            self.transport.close()  # an answer is under way: another cannot be put into it
            return
        error = bad_request(f"this is not a valid HTTP/1.1 request: {sys.exception() or msg}")
        response = error_response(error)
        headers = [*response.raw_headers, (b"connection", b"close")]
        for event in (
            h11.Response(status_code=response.status_code, headers=headers, reason=b"Bad Request"),
            h11.Data(data=bytes(response.body)),
            h11.EndOfMessage(),
        ):
            self.transport.write(self.conn.send(event))
        self.transport.close()

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


def stderr(line: str) -> None:
    """The usual `say`."""
    print(line, file=sys.stderr, flush=True)
