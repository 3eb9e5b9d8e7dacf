"""`jaxserve serve` from the bound port to the exit code.

The port is bound first, then uvicorn answers (`/health` 200, the rest 503) while a thread builds the
engine. Does not know how an engine is built: it is handed a function. Progress goes to `say`, line by line.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import errno
import gc
import logging
import os
import resource
import signal
import socket
import sys
import threading
import traceback
from collections.abc import Callable, Iterable, Iterator
from types import FrameType
from typing import Literal, NoReturn

import uvicorn
from starlette.types import ASGIApp

from jaxserve.config import ServerOptions
from jaxserve.prompts import encode_chat
from jaxserve.protocols import EngineLike, GroupLike
from jaxserve.scheduler.types import RequestError, StructuredOutputs
from jaxserve.server.app import Report, create_app, create_metrics_app
from jaxserve.server.auth import Keys, load_keys
from jaxserve.server.body import Arrivals
from jaxserve.server.context import Context
from jaxserve.server.errors import stopping
from jaxserve.server.holder import EngineHolder, describe
from jaxserve.server.local import is_loopback
from jaxserve.server.logs import logging_to
from jaxserve.server.protocol import MAX_HEADER_BYTES, HttpProtocol
from jaxserve.server.traces import Traces, TracesError, otlp_exporter

log = logging.getLogger(__name__)

KEEP_ALIVE_SECONDS = 75
ENDS = "this process ends, and whoever launched the group has to restart it whole"
WATCH_SECONDS = 0.2  # how often a group is looked at
LAST_SECONDS = 2.0  # after the drain, for the errors that say so to reach their clients
SPARE_FILES = 256  # open files beside the connections

Say = Callable[[str], None]
Build = Callable[[Say], tuple[EngineLike, str]]  # -> the engine, warm, and the model's name


class StartError(Exception):
    """The server cannot start: the message says why, and which flag to change."""


def serve(options: ServerOptions, build: Build, say: Say, group: GroupLike | None = None) -> int:
    """Serves until a signal comes or the engine cannot be built. Returns the exit code.

    With a group of processes it does not return, but ends this one: with 1 as soon as the engine or another
    process fails and clients have heard of it. So it does while the engine still loads.
    """
    with logging_to(say, options.log_format, options.log_level) as say:
        code, at_once = _serve(options, build, say, group)
    if at_once:
        exit_now(code)
    return code


def _serve(options: ServerOptions, build: Build, say: Say, group: GroupLike | None) -> tuple[int, bool]:
    """(exit code, whether the process must end without waiting for its threads)."""
    keys = Keys(lambda: load_keys(options))
    reports: list[Report] = []
    traces = None
    allow_files(options.max_connections + SPARE_FILES)
    try:
        if options.otel_endpoint is not None:
            traces = Traces(otlp_exporter(options.otel_endpoint))
            reports.append(traces.report)
        listener = bind(options.host, options.port)
        metrics_listener = None
        if options.metrics_port is not None:
            metrics_listener = bind(options.host, options.metrics_port, "--metrics-port")
    except (StartError, TracesError) as error:
        say(f"error: {error}")
        return 1, False
    address = url(options.host, listener.getsockname()[1])
    say(f"listening on {address}")
    if metrics_listener is not None:
        say(f"metrics at {url(options.host, metrics_listener.getsockname()[1])}/metrics")
    if not keys and not is_loopback(options.host):
        say(f"warning: anyone who can reach {options.host} can use this server: set --api-key")
    holder = EngineHolder()
    server = Server(holder, keys, options, reports, say)
    loader = Loader(server, build, say, lambda: announce(say, address, holder, bool(keys)))
    if group is not None:
        server.watch = Watch(holder, loader, group, say)
    asyncio.run(server.serve_and_load(listener, loader, metrics_listener))
    if traces is not None:
        traces.close()
    say("stopped")
    code = 1 if loader.failed else 0
    if group is not None:
        if not (loader.failed or loader.alive):
            if holder.engine is not None:
                holder.engine.close()
            group.close()
        else:  # a step that waits for a process that is gone does not come back
            group.abandon("it was stopped")
        return code, True
    if holder.engine is not None:
        holder.engine.close()
    # a compilation cannot be interrupted, and tearing the interpreter down under it can crash
    return code, loader.alive


def exit_now(code: int) -> NoReturn:
    """Ends the process without waiting for its threads, nor for other processes."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def allow_files(count: int) -> None:
    """Lets this process have so many files and connections open, as far as the system does."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < count:
        wanted = count if hard == resource.RLIM_INFINITY else min(count, hard)
        with contextlib.suppress(OSError, ValueError):  # then it stays as it was
            resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, wanted), hard))


def bind(host: str, port: int, flag: str = "--port") -> socket.socket:
    """A bound socket. flag: what to call the port. Raises StartError naming the flag."""
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
            raise StartError(f"port {port} on {host} is in use: choose another with {flag}") from error
        if error.errno == errno.EACCES:
            raise StartError(
                f"port {port} may not be used by this user: choose another with {flag}"
            ) from error
        raise StartError(f"--host={host} {flag}={port} cannot be bound: {error.strerror}") from error
    return listener


def url(host: str, port: int) -> str:
    if host in ("0.0.0.0", "::"):
        host = "127.0.0.1" if host == "0.0.0.0" else "::1"
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


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


def _start_helpers(engine: EngineLike, say: Say) -> None:
    """Has the processes started that render chat templates and judge grammars, before somebody waits for
    them. A model that can have neither says so to those who ask."""
    for start in (
        lambda: encode_chat(engine.tokenizer, [{"role": "user", "content": "Hello"}]),
        lambda: engine.compile_grammar(StructuredOutputs(json_object=True)),
    ):
        try:
            start()
        except RequestError:
            pass
        except Exception as error:  # the server runs all the same
            if not engine.healthy:
                return
            say(f"warning: {type(error).__name__}: {error}")


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
            # a full collection took 240 ms over 330,000 objects, and nobody's tokens leave meanwhile
            gc.collect()
            gc.freeze()
            self._server.holder.set_engine(engine, name)
            self._on_ready()
            helpers = threading.Thread(target=_start_helpers, args=(engine, self._say), daemon=True)
            helpers.start()  # a stop does not wait for them
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

    def __init__(
        self,
        holder: EngineHolder,
        keys: Keys | Iterable[str] = (),
        options: ServerOptions | None = None,
        reports: Iterable[Report] = (),
        say: Say | None = None,
    ) -> None:
        self.holder = holder
        self.options = ServerOptions() if options is None else options
        self._keys = keys
        self._signals = 0
        self._say = say or log.info
        app = create_app(holder, self.options, keys=keys, reports=reports)
        self._context: Context = app.state.context
        self._arrivals: Arrivals = app.state.arrivals
        super().__init__(configured(app, self.options.max_connections))

    async def serve_and_load(
        self, listener: socket.socket, loader: Loader, metrics_listener: socket.socket | None = None
    ) -> None:
        serving = asyncio.create_task(self.serve(sockets=[listener]))
        while not self.started and not serving.done():
            await asyncio.sleep(0.01)
        loader.start()
        watching = asyncio.create_task(self._watch())
        if metrics_listener is None:
            await serving
        else:
            config = configured(create_metrics_app(self._context), SPARE_FILES // 2, lifespan="off")
            beside = _Beside(config)
            measuring = asyncio.create_task(beside.serve(sockets=[metrics_listener]))
            await serving
            beside.should_exit = beside.force_exit = True
            await measuring
        watching.cancel()

    async def _watch(self) -> None:
        if self.watch is not None:
            await self.watch.wait()
            self.should_exit = True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """No new requests; open ones may end, and hear why when they may not.

        The port stays open as long as they run: probes get an answer, and others a 503 that says why.
        """
        self.holder.stopping = True
        self._context.desk.pause()
        open_now = set(self.server_state.tasks)
        if open_now:
            await asyncio.wait(open_now, timeout=self.options.drain_seconds)
        self._context.bridge.close(stopping())
        self._arrivals.close(stopping())
        await super().shutdown(sockets)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """As uvicorn's, without raising the signal again at the end: a stop that was asked for is no
        failure."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        loop = asyncio.get_running_loop()
        handlers = {
            signal.SIGINT: self.handle_exit,
            signal.SIGTERM: self.handle_exit,
            # on the loop: what it interrupts may hold the log's lock, which it would wait for without end
            signal.SIGHUP: lambda sig, frame: loop.call_soon_threadsafe(self._reload),
        }
        before = {name: signal.signal(name, handler) for name, handler in handlers.items()}
        try:
            yield
        finally:
            for name, handler in before.items():
                signal.signal(name, handler)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """The first one lets open requests end; the second one ends the process."""
        self._signals += 1
        if self._signals > 1:  # not `should_exit`: another process of a group may have asked for that
            print("stopped at once", file=sys.stderr)
            exit_now(128 + sig)
        self.should_exit = True

    def _reload(self) -> None:
        if not isinstance(self._keys, Keys):
            return
        try:
            self._keys.reload()
        except ValueError as error:
            self._say(f"error: {error}; the keys stay as they were")
        else:
            self._say("the API keys were read again")


class _Beside(uvicorn.Server):
    """A second port of this process, which leaves signals to the first."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def configured(
    app: ASGIApp, max_connections: int, lifespan: Literal["auto", "off"] = "auto"
) -> uvicorn.Config:
    shared = {"max_connections": max_connections, "turns": collections.deque()}
    protocol = type("Protocol", (HttpProtocol,), shared)
    return uvicorn.Config(
        app,
        http=protocol,
        ws="none",
        lifespan=lifespan,
        log_config=None,
        log_level="error",  # what clients do wrong is answered, and not worth a line of uvicorn's
        access_log=False,
        server_header=False,
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=int(LAST_SECONDS),
        h11_max_incomplete_event_size=MAX_HEADER_BYTES,
    )


def stderr(line: str) -> None:
    """The usual `say`."""
    print(line, file=sys.stderr, flush=True)
