"""SIGTERM: what was begun may end, and everybody hears what happens."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx
import openai
import pytest

from jaxserve.config import ServerOptions
from jaxserve.server.holder import EngineHolder
from jaxserve.server.run import Loader, Say, Server, bind, url
from tests.server.fakes import FakeEngine
from tests.server.harness import MODEL, Serve, Served, until

LONG = {"model": MODEL, "prompt": "a", "max_tokens": 250}


def streamed(served: Served, results: list[str], **fields: object) -> threading.Thread:
    def stream() -> None:
        try:
            chunks = served.openai.completions.create(**{**LONG, **fields}, stream=True)  # type: ignore[call-overload]
            results.append("".join(chunk.choices[0].text for chunk in chunks))
        except openai.APIError as error:
            results.append(str(error))

    thread = threading.Thread(target=stream)
    thread.start()
    return thread


def test_while_it_drains(serve: Serve) -> None:
    served = serve(FakeEngine(delay=0.01), keys=["secret"], drain_seconds=10.0)
    results: list[str] = []
    thread = streamed(served, results, max_tokens=100)
    until(lambda: served.engine.stats()["running"] == 1)
    served.server.should_exit = True
    until(lambda: served.holder.stopping)
    headers = {"Authorization": "Bearer secret"}
    for path in ("/v1/completions", "/v1/files", "/v1/batches", "/tokenize"):
        reply = served.http.post(path, json=LONG, headers=headers)
        assert reply.status_code == 503
        assert reply.json()["error"]["code"] == "stopping"
        assert served.http.post(path).status_code == 401
    for path, status in (("/health", 200), ("/ready", 503), ("/metrics", 200), ("/v1/models", 503)):
        assert served.http.get(path, headers=headers).status_code == status
    thread.join(10)
    assert len(results[0]) == 100
    served._thread.join(5)
    assert not served._thread.is_alive()


def test_past_the_deadline(serve: Serve) -> None:
    """An error in the stream, then its end; a whole reply is a 503."""
    served = serve(FakeEngine(slots=1, delay=0.02), drain_seconds=0.3)
    raw: list[str] = []

    def stream() -> None:
        with httpx.stream("POST", f"{served.url}/v1/completions", json={**LONG, "stream": True}) as reply:
            raw.append(reply.read().decode())

    threads = [threading.Thread(target=stream)]
    threads[0].start()
    until(lambda: served.engine.stats()["running"] == 1)
    queued: list[httpx.Response] = []
    threads.append(
        threading.Thread(target=lambda: queued.append(httpx.post(f"{served.url}/v1/completions", json=LONG)))
    )
    threads[1].start()
    until(lambda: served.engine.stats()["waiting"] == 1)
    begin = time.monotonic()
    served.server.should_exit = True
    for thread in threads:
        thread.join(10)
    assert time.monotonic() - begin < 5
    events = raw[0].strip().split("\n\n")
    assert '"code":"stopping"' in events[-2]
    assert events[-1] == "data: [DONE]"
    assert queued[0].status_code == 503
    until(lambda: served.engine.stats()["running"] == served.engine.stats()["waiting"] == 0)


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/messages", "/v1/files"])
def test_past_the_deadline_nobody_waits_for_a_body(
    serve: Serve, path: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Its sender hears why, in a 503, and the server ends in time and without a traceback."""
    served = serve(FakeEngine(), drain_seconds=0.3)
    kind = "multipart/form-data; boundary=B" if path == "/v1/files" else "application/json"
    part = '--B\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nba' if path == "/v1/files" else "{"
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: {kind}\r\nContent-Length: 5000\r\n\r\n"
    with socket.create_connection(("127.0.0.1", served.port), timeout=10) as connection:
        connection.sendall((head + part).encode())
        until(lambda: len(served.server.server_state.tasks) == 1)
        begin = time.monotonic()
        served.server.should_exit = True
        reply = b""
        while piece := connection.recv(2**16):
            reply += piece
    served._thread.join(10)
    assert time.monotonic() - begin < 0.3 + 1.5  # uvicorn looks each 0.1 s
    assert reply.startswith(b"HTTP/1.1 503 ")
    assert b"the server is stopping" in reply.partition(b"\r\n\r\n")[2]
    assert not [record for record in caplog.records if record.exc_info or record.levelname == "ERROR"]


def test_both_ports_end_without_a_traceback(caplog: pytest.LogCaptureFixture) -> None:
    server = Server(EngineHolder(), options=ServerOptions())
    listeners = [bind("127.0.0.1", 0) for _ in range(2)]

    def build(say: Say) -> tuple[FakeEngine, str]:
        return FakeEngine(), MODEL

    loader = Loader(server, build, str, lambda: None)
    running = server.serve_and_load(listeners[0], loader, listeners[1])
    thread = threading.Thread(target=asyncio.run, args=(running,))
    thread.start()
    metrics = url("127.0.0.1", listeners[1].getsockname()[1])
    until(lambda: server.holder.engine is not None)
    until(lambda: httpx.get(f"{metrics}/health").status_code == 200)
    server.should_exit = True
    thread.join(10)
    assert not thread.is_alive()
    assert not [record for record in caplog.records if record.exc_info or record.levelname == "ERROR"]
    assert server.holder.engine is not None
    server.holder.engine.close()


def test_an_idle_server_stops_at_once(serve: Serve) -> None:
    served = serve(FakeEngine(), drain_seconds=30.0)
    served.as_new()
    begin = time.monotonic()
    served.server.should_exit = True
    served._thread.join(10)
    assert time.monotonic() - begin < 3


SERVER = """
import sys
from jaxserve.config import ServerOptions
from jaxserve.server.run import serve, stderr
from tests.server.fakes import FakeEngine

options = ServerOptions(port=0, data_dir=sys.argv[1], api_key_file=sys.argv[2], **eval(sys.argv[3]))
sys.exit(serve(options, lambda say: (FakeEngine(delay=0.02), "alphabet"), stderr))
"""


class Process:
    """`serve` in a process of its own, over the fake engine."""

    def __init__(self, folder: Path, **options: object) -> None:
        self.keys = folder / "keys"
        self.keys.write_text("alice: secret\n")
        command = [sys.executable, "-c", SERVER, str(folder / "data"), str(self.keys), repr(options)]
        self.log = open(folder / "log", "w+")  # noqa: SIM115
        self.process = subprocess.Popen(
            command,
            stderr=self.log,
            stdin=subprocess.DEVNULL,
            cwd=Path(__file__).parents[2],
            env={**os.environ},
        )
        until(lambda: "ready: " in self.printed(), 120)
        address = self.printed().partition("listening on ")[2].split()[0].rstrip('",}')
        self.client = httpx.Client(base_url=address, headers={"Authorization": "Bearer secret"}, timeout=20)

    def printed(self) -> str:
        return Path(self.log.name).read_text()

    def end(self, number: int) -> int:
        self.process.send_signal(number)
        return self.process.wait(20)

    def close(self) -> None:
        self.client.close()
        self.process.kill()
        self.process.wait()
        self.log.close()


@pytest.fixture
def process(tmp_path: Path, request: pytest.FixtureRequest) -> object:
    with contextlib.closing(Process(tmp_path, **getattr(request, "param", {}))) as one:
        yield one


@pytest.mark.slow
def test_sigterm_with_an_open_stream(process: Process) -> None:
    with process.client.stream(
        "POST", "/v1/completions", json={**LONG, "max_tokens": 50, "stream": True}
    ) as reply:
        lines = reply.iter_lines()
        next(lines)
        process.process.send_signal(signal.SIGTERM)
        text = "\n".join(lines)
    assert '"finish_reason":"length"' in text and text.rstrip().endswith("data: [DONE]")
    assert process.process.wait(20) == 0
    assert "key=alice" in process.printed()
    assert "generated_tokens=50" in process.printed()
    assert process.printed().rstrip().endswith("stopped")


@pytest.mark.slow
@pytest.mark.parametrize("process", [{"drain_seconds": 60.0}], indirect=True)
def test_a_second_signal_ends_it_at_once(process: Process) -> None:
    with process.client.stream("POST", "/v1/completions", json={**LONG, "stream": True}) as reply:
        lines = reply.iter_lines()
        next(lines)
        process.process.send_signal(signal.SIGTERM)
        time.sleep(0.5)
        assert process.process.poll() is None
        assert process.end(signal.SIGTERM) == 128 + signal.SIGTERM


@pytest.mark.slow
@pytest.mark.parametrize("process", [{"log_format": "json", "metrics_port": 0}], indirect=True)
def test_keys_are_read_again(process: Process) -> None:
    """SIGHUP: a new key opens, an old one no longer does; a file that cannot be meant changes nothing."""
    import json

    assert process.client.get("/v1/models").status_code == 200
    process.keys.write_text("other\n")
    process.process.send_signal(signal.SIGHUP)
    until(lambda: "were read again" in process.printed(), 60)
    assert process.client.get("/v1/models").status_code == 401
    assert process.client.get("/v1/models", headers={"Authorization": "Bearer other"}).status_code == 200
    process.keys.write_text("\n")
    process.process.send_signal(signal.SIGHUP)
    until(lambda: "stay as they were" in process.printed(), 60)
    assert process.client.get("/v1/models", headers={"Authorization": "Bearer other"}).status_code == 200
    entries = [json.loads(line) for line in process.printed().splitlines()]
    beside = next(e["message"] for e in entries if e["message"].startswith("metrics at ")).split()[-1]
    assert "jaxserve_ready 1.0" in httpx.get(beside).text  # without a key, on a port of its own
    assert process.client.get("/metrics").status_code == 401
    metrics = process.client.base_url.join("/metrics")
    assert httpx.get(metrics, headers={"x-api-key": "other"}).status_code == 200
    assert httpx.get(beside.replace("/metrics", "/v1/models")).status_code == 404
    assert httpx.get(beside.replace("/metrics", "/health")).status_code == 200
    assert process.end(signal.SIGINT) == 0
    assert "Traceback" not in process.printed()
