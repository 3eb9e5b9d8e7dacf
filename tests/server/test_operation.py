"""What is around the answers: keys, readiness, metrics, clients that leave, engines that die."""

from __future__ import annotations

import socket
import threading
import time
from pathlib import Path

import httpx
import openai
import orjson
import pytest
from prometheus_client.parser import text_string_to_metric_families

from jaxserve.config import ServerOptions
from jaxserve.server import body, bridge, protocol, run
from jaxserve.server.auth import load_keys
from tests.server.fakes import FakeEngine
from tests.server.harness import MODEL, Serve, Served, until

LONG = {"model": MODEL, "prompt": "a", "max_tokens": 250}
MESSAGES = [{"role": "user", "content": "a"}]

# --- keys ---


@pytest.mark.parametrize(
    "header", [None, "", "Bearer", "Bearer wrong", "Bearer secret2x", "Basic secret", "secret", "Bearer \xff"]
)
def test_no_key_no_service(serve: Serve, header: str | None) -> None:
    served = serve(FakeEngine(), keys=["secret", "secret2"])
    headers = [] if header is None else [(b"Authorization", header.encode("latin-1"))]
    for path in (
        "/v1/models",
        "/metrics",
        "/v1/completions",
        "/nowhere",
        "//health",
        "/health/",
        "//",
        "/state",
    ):
        reply = served.http.get(f"{served.url}{path}", headers=headers)
        assert reply.status_code == 401
        assert reply.json()["error"]["code"] == "invalid_api_key"
        assert reply.json()["error"]["type"] == "invalid_request_error"


def test_keys_open_and_liveness_needs_none(serve: Serve) -> None:
    served = serve(FakeEngine(), keys=["secret", "secret2"])
    for key in ("secret", "secret2"):
        assert served.http.get("/v1/models", headers={"Authorization": f"Bearer {key}"}).status_code == 200
    assert served.http.get("/health").status_code == 200
    assert served.http.get("/ready").status_code == 200
    assert served.openai.completions.create(model=MODEL, prompt="a", max_tokens=1).choices[0].text == "b"
    with pytest.raises(openai.AuthenticationError):
        served.openai.with_options(api_key="no").models.list()


@pytest.mark.parametrize("content", [b"", b"\n \n", b"\xff", b"two words\n", "schl\u00fcssel".encode()])
def test_key_files_that_cannot_be_meant(content: bytes, tmp_path: Path) -> None:
    """None of them may leave the server open."""
    (tmp_path / "keys").write_bytes(content)
    with pytest.raises(ValueError, match="key"):
        load_keys(ServerOptions(api_key_file=str(tmp_path / "keys")))


def test_keys_come_from_the_flag_and_the_file(tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("one\n\n two \n")
    assert load_keys(ServerOptions(api_key="zero", api_key_file=str(tmp_path / "keys"))) == [
        ("api-key", "zero"),
        ("line-1", "one"),
        ("line-3", "two"),
    ]
    assert load_keys(ServerOptions()) == []
    with pytest.raises(ValueError, match="cannot be read"):
        load_keys(ServerOptions(api_key_file=str(tmp_path / "missing")))
    with pytest.raises(ValueError, match="not empty"):
        load_keys(ServerOptions(api_key=""))


@pytest.mark.parametrize(
    ("host", "loopback"),
    [("127.0.0.1", True), ("::1", True), ("localhost", True), ("0.0.0.0", False), ("x", False)],
)
def test_loopback(host: str, loopback: bool) -> None:
    assert run.is_loopback(host) is loopback


def test_places_that_cannot_be_bound() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(run.StartError, match=rf"port {port} on 127.0.0.1 is in use: .* --port"):
            run.bind("127.0.0.1", port)
    with pytest.raises(run.StartError, match=r"--host=203\.0\.113\.7"):
        run.bind("203.0.113.7", 0)
    with pytest.raises(run.StartError, match=r"--host=\.\. is no address"):
        run.bind("..", 0)


# --- readiness ---


def test_loading_then_ready(serve: Serve) -> None:
    served = serve(None)
    assert served.http.get("/health").status_code == 200
    for reply in (
        served.http.get("/ready"),
        served.http.get("/v1/models"),
        served.completion(),
        served.chat(),
    ):
        assert reply.status_code == 503
        assert reply.json()["error"]["code"] == "loading"
        assert int(reply.headers["retry-after"]) > 0
    assert "jaxserve_ready 0.0" in served.http.get("/metrics").text
    served.load(FakeEngine())
    assert served.http.get("/ready").status_code == 200
    served.as_new()


def test_models(served: Served) -> None:
    [model] = served.openai.models.list().data
    assert (model.id, model.object) == (MODEL, "model")
    assert served.openai.models.retrieve(MODEL).id == MODEL
    with pytest.raises(openai.NotFoundError):
        served.openai.models.retrieve("other/model")


def test_metrics(serve: Serve) -> None:
    served = serve(FakeEngine(pages=256, page_size=16))
    served.completion(max_tokens=5)
    reply = served.http.get("/metrics")
    assert reply.headers["content-type"].startswith("text/plain; version=0.0.4")
    samples = {
        (sample.name, *sorted(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(reply.text)
        for sample in family.samples
    }
    assert samples["vllm:num_requests_waiting",] == 0
    assert samples["vllm:num_requests_running",] == 0
    assert samples["vllm:kv_cache_usage_perc",] == 0
    assert samples["vllm:cache_config_info", ("block_size", "16"), ("num_gpu_blocks", "256")] == 1
    for prefix in ("jaxserve_", "vllm:"):
        assert samples[f"{prefix}time_to_first_token_seconds_count",] == 1
        assert samples[f"{prefix}inter_token_latency_seconds_count",] == 4
        assert samples[f"{prefix}inter_token_latency_seconds_bucket", ("le", "+Inf")] == 4
    assert samples["jaxserve_generation_tokens_total",] == 5
    assert samples["jaxserve_requests_total",] == 1


# --- clients that leave ---


def freed_within_a_step(engine: FakeEngine, request_id: str) -> None:
    step = {what: at for at, what, name in engine.events if name == request_id}
    assert step["free"] - step["abort"] <= 1


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
@pytest.mark.parametrize("stream", [True, False])
def test_leaving_frees_the_slot_at_the_next_step(serve: Serve, path: str, stream: bool) -> None:
    engine = FakeEngine(slots=1, delay=0.01)
    served = serve(engine)
    prompt = {"messages": MESSAGES} if "chat" in path else {"prompt": "a"}
    content = orjson.dumps({"model": MODEL, **prompt, "max_tokens": 250, "stream": stream})
    connection = served.connect(path, content)
    if stream:
        assert connection.recv(12) == b"HTTP/1.1 200"
    until(lambda: engine.stats()["running"] == 1)
    connection.close()
    until(lambda: engine.stats()["running"] == 0, seconds=1.0)  # it would have run for 2.5 s
    freed_within_a_step(engine, engine.events[0][2])
    served.as_new()


@pytest.mark.parametrize("stream", [True, False])
def test_leaving_while_queued(serve: Serve, stream: bool) -> None:
    engine = FakeEngine(slots=1, delay=0.01)
    served = serve(engine)
    first = served.connect("/v1/completions", orjson.dumps(LONG))
    until(lambda: engine.stats()["running"] == 1)
    second = served.connect("/v1/completions", orjson.dumps({**LONG, "stream": stream, "n": 2}))
    until(lambda: engine.stats()["waiting"] == 2)
    second.close()
    until(lambda: engine.stats()["waiting"] == 0, seconds=1.0)
    assert engine.stats()["running"] == 1  # the first is not disturbed
    freed_within_a_step(engine, [name for _, what, name in engine.events if what == "submit"][1])
    first.close()
    served.as_new()


def test_connect_and_abort_many_times(serve: Serve) -> None:
    engine = FakeEngine(slots=2, delay=0.001)
    served = serve(engine)
    for number in range(40):
        content = orjson.dumps({**LONG, "stream": number % 2 == 0})
        served.connect("/v1/completions", content).close()
    served.as_new()
    assert not served.server._context.bridge.calls


def test_leaving_before_the_body_is_whole(served: Served) -> None:
    connection = socket.create_connection(("127.0.0.1", served.port))
    connection.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\n{")
    connection.close()
    served.as_new()


# --- slow clients ---


def read_answer(connection: socket.socket) -> None:
    """Reads one answer to its end: head and body may come apart."""
    data = b""
    while not data.endswith(b"}"):
        data += connection.recv(1000)
    assert data.startswith(b"HTTP/1.1 200")


def test_slow_headers_are_given_up(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(protocol, "HEADER_SECONDS", 0.3)
    served = serve(FakeEngine())
    silent = socket.create_connection(("127.0.0.1", served.port), timeout=10)
    slow = socket.create_connection(("127.0.0.1", served.port), timeout=10)
    slow.sendall(b"POST /v1/comp")
    again = socket.create_connection(("127.0.0.1", served.port), timeout=10)  # slow in its second request
    again.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
    read_answer(again)
    again.sendall(b"GET /hea")
    for connection in (silent, slow, again):
        assert connection.recv(1000) == b""
        connection.close()
    idle = socket.create_connection(("127.0.0.1", served.port), timeout=10)  # between requests is no fault
    for _ in range(2):
        idle.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
        read_answer(idle)
        time.sleep(0.5)
    idle.close()
    served.as_new()


def test_a_slow_answer_outlives_the_header_deadline(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(protocol, "HEADER_SECONDS", 0.2)
    served = serve(FakeEngine(delay=0.05))
    assert served.completion(max_tokens=12).json()["choices"][0]["text"] == "bcdefghijklm"


def test_slow_bodies_are_given_up(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(body, "BODY_SECONDS", 0.2)
    served = serve(FakeEngine())
    connection = socket.create_connection(("127.0.0.1", served.port), timeout=10)
    connection.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\n{")
    assert connection.recv(100).startswith(b"HTTP/1.1 408")
    connection.close()
    served.as_new()


# --- engines that die ---


@pytest.mark.parametrize("silent", [False, True])
def test_a_dead_engine_answers_everyone(serve: Serve, silent: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bridge, "WATCH_SECONDS", 0.05)
    engine = FakeEngine(slots=2, delay=0.02)
    engine.silent_failure = silent
    served = serve(engine)
    replies: dict[str, object] = {}

    def plain() -> None:
        replies["plain"] = httpx.post(f"{served.url}/v1/completions", json=LONG, timeout=20)

    def stream() -> None:
        try:
            list(served.openai.completions.create(**LONG, stream=True))  # type: ignore[call-overload]
        except openai.APIError as error:
            replies["stream"] = error

    def queued() -> None:
        replies["queued"] = httpx.post(
            f"{served.url}/v1/chat/completions",
            json={"model": MODEL, "messages": MESSAGES, "stream": True},
            timeout=20,
        )

    threads = [threading.Thread(target=target) for target in (plain, stream)]
    for thread in threads:
        thread.start()
    until(lambda: engine.stats()["running"] == 2)
    threads.append(threading.Thread(target=queued))
    threads[-1].start()
    until(lambda: engine.stats()["waiting"] == 1)
    engine.fail_next = RuntimeError("out of device memory")
    for thread in threads:
        thread.join(10)
        assert not thread.is_alive()
    answer = replies["plain"]
    assert isinstance(answer, httpx.Response)
    assert answer.status_code == 500
    assert answer.json()["error"]["code"] == "engine_failed"
    assert "out of device memory" in answer.json()["error"]["message"]
    assert "out of device memory" in str(replies["stream"])
    answer = replies["queued"]
    assert isinstance(answer, httpx.Response)
    assert '"code":"engine_failed"' in answer.text
    assert answer.text.endswith("data: [DONE]\n\n")
    for path in ("/health", "/ready", "/v1/models"):
        reply = served.http.get(path)
        assert reply.status_code == 503
        assert "out of device memory" in reply.json()["error"]["message"]
    assert served.completion().status_code == 503


def test_an_engine_that_closes_under_a_request(serve: Serve) -> None:
    served = serve(FakeEngine())
    served.engine.close()
    for fields in ({}, {"stream": True}):
        reply = served.completion(**fields)
        assert reply.status_code == 500
        assert "the engine is closed" in reply.json()["error"]["message"]


def test_many_streams_at_once(serve: Serve) -> None:
    """40 streams over 4 slots: each is what it would be alone."""
    served = serve(FakeEngine(slots=4))
    texts: dict[int, str] = {}

    def one(number: int) -> None:
        first = chr(ord("a") + number % 26)
        chunks = served.openai.completions.create(model=MODEL, prompt=first, max_tokens=9, stream=True)
        texts[number] = "".join(chunk.choices[0].text for chunk in chunks)

    threads = [threading.Thread(target=one, args=(number,)) for number in range(40)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    alphabet = "abcdefghijklmnopqrstuvwxyz" * 2
    assert texts == {number: alphabet[number % 26 + 1 : number % 26 + 10] for number in range(40)}
    served.as_new()


# --- stopping ---


def test_stopping_lets_streams_end_and_tells_the_rest(serve: Serve) -> None:
    served = serve(FakeEngine(slots=4, delay=0.02), drain_seconds=0.8)
    results: list[str] = []

    def stream(tokens: int) -> None:
        try:
            chunks = served.openai.completions.create(**{**LONG, "max_tokens": tokens}, stream=True)  # type: ignore[call-overload]
            results.append("".join(chunk.choices[0].text for chunk in chunks))
        except openai.APIError as error:
            results.append(str(error))

    threads = [threading.Thread(target=stream, args=(tokens,)) for tokens in (10, 250)]
    for thread in threads:
        thread.start()
    until(lambda: served.engine.stats()["running"] == 2)
    served.server.should_exit = True
    for thread in threads:
        thread.join(10)
    assert results == ["bcdefghijk", "the server is stopping"]
    until(lambda: served.engine.stats()["running"] == 0)
