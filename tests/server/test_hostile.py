"""What clients do to a server that mean it harm, or are broken: a real one, in a process of its own.

After each test the server is as new: it is well, nothing runs or waits, every page is back, and a greedy
request gets the bytes that it got at first. The deadlines of the process are short ones; what it refuses and
how fast it does is the same.
"""

from __future__ import annotations

import contextlib
import json
import select
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil
import pytest

from jaxserve.server.app import routes
from jaxserve.server.auth import OPEN_PATHS
from tests.serving import Server, started

pytestmark = pytest.mark.slow

MODEL = "jaxserve-embedded"
SLOTS, QUEUED = 4, 4
ARGUMENTS = [
    *("--max-slots", str(SLOTS), "--max-queued", str(QUEUED), "--prefill-chunk", "64"),
    *("--max-model-len", "1024", "--page-size", "16"),
]
KEYS = {"ann": "key-of-ann", "bob": "key-of-bob"}
DEADLINE = 1.0  # seconds, for headers and bodies
# the command with short deadlines, and an engine that fails when a file is there
PROGRAM = f"""
import os, sys
from jaxserve.cli.main import main
from jaxserve.engine.engine import Engine
from jaxserve.server import body, protocol
protocol.HEADER_SECONDS = body.BODY_SECONDS = {DEADLINE}
step = Engine.step
def failing(self):
    if os.path.exists(os.environ["FAIL"]):
        raise RuntimeError("injected")
    return step(self)
Engine.step = failing
sys.exit(main())
"""
STORY = {"model": MODEL, "prompt": "def main():\n", "max_tokens": 900, "ignore_eos": True}
HELLO = [{"role": "user", "content": "a"}]


class Target:
    """A server under attack, and what an honest client sees of it."""

    def __init__(self, server: Server, folder: Path) -> None:
        self.server, self.folder = server, folder
        self.process = psutil.Process(server.process.pid)
        self.http = self.client("ann")
        self.greedy = self.honest()

    def client(self, name: str) -> httpx.Client:
        headers = {"Authorization": f"Bearer {KEYS[name]}"}
        return httpx.Client(base_url=self.server.url, headers=headers, timeout=60)

    @property
    def openai(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.server.url}/v1", api_key=KEYS["ann"], max_retries=0, timeout=60)

    def honest(self) -> bytes:
        """What a fixed greedy request is answered."""
        reply = self.http.post("/v1/completions", json=STORY | {"max_tokens": 24, "temperature": 0})
        assert reply.status_code == 200, reply.text
        return json.dumps(reply.json()["choices"]).encode()

    def state(self) -> dict[str, Any]:
        return self.http.get("/state").json()

    def queue(self) -> tuple[int, int]:
        queue = self.state()["queue"]
        return queue["running"], queue["waiting"]

    def as_new(self) -> None:
        until(lambda: self.queue() == (0, 0), seconds=20)
        until(lambda: self.state()["pages"]["used"] == 0)
        assert self.state()["slots"]["held"] == []
        assert httpx.get(f"{self.server.url}/health").status_code == 200
        assert self.honest() == self.greedy
        assert self.server.process.poll() is None

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.server.port), timeout=30)

    def begin(self, body: dict[str, Any], path: str = "/v1/completions") -> socket.socket:
        """A request of which nothing is read: closing it is a client that leaves."""
        connection = self.connect()
        connection.sendall(post(path, json.dumps(body).encode()))
        return connection

    def raw(self, data: bytes) -> tuple[int, bytes]:
        """Status and whole reply to these bytes; status 0 if the connection was closed without a word."""
        with self.connect() as connection:
            reply = b""
            with contextlib.suppress(ConnectionError):
                connection.sendall(data)
            with contextlib.suppress(ConnectionError):
                while part := connection.recv(65536):
                    reply += part
                    if complete(reply):
                        break
        return (int(reply[9:12]) if reply.startswith(b"HTTP/1.1 ") else 0), reply


def post(path: str, body: bytes, *headers: str, key: str | None = "ann") -> bytes:
    lines = [f"POST {path} HTTP/1.1", "Host: x", f"Content-Length: {len(body)}", *headers]
    if key is not None:
        lines.append(f"Authorization: Bearer {KEYS[key]}")
    return "\r\n".join([*lines, "", ""]).encode("latin-1") + body


def complete(reply: bytes) -> bool:
    head, found, body = reply.partition(b"\r\n\r\n")
    length = [line for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:")]
    return bool(found and length) and len(body) >= int(length[0].split(b":")[1])


def until(condition: Callable[[], bool], seconds: float = 10.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come true in time"
        time.sleep(0.01)


@contextlib.contextmanager
def target_in(folder: Path, *arguments: str) -> Iterator[Target]:
    keys = folder / "keys"
    keys.write_text("".join(f"{name}: {key}\n" for name, key in KEYS.items()))
    options = [*ARGUMENTS, "--api-key-file", str(keys), "--data-dir", str(folder / "data"), *arguments]
    env = {"FAIL": str(folder / "fail")}
    with started(folder, options, env, ("-c", PROGRAM)) as server:
        target = Target(server, folder)
        yield target
        target.http.close()


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Target]:
    with target_in(tmp_path_factory.mktemp("hostile")) as target:
        yield target


@pytest.fixture
def target(shared: Target) -> Iterator[Target]:
    yield shared
    shared.as_new()


# --- clients that leave ---


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions", "/v1/responses", "/v1/messages"])
def test_leaving_frees_slot_pages_and_queue(target: Target, path: str, stream: bool) -> None:
    asked = {"model": MODEL, "stream": stream, "max_tokens": 800, "messages": HELLO}
    body = {
        "/v1/completions": STORY | {"stream": stream},
        "/v1/chat/completions": asked | {"ignore_eos": True},
        "/v1/responses": {"model": MODEL, "stream": stream, "max_output_tokens": 800, "input": "a"},
        "/v1/messages": asked,
    }[path]
    # the model may end its answer by itself, so there are always some that do not
    others = [target.begin(STORY) for _ in range(SLOTS - 1)]
    until(lambda: target.queue() == (SLOTS - 1, 0))
    mine = target.begin(body, path)
    until(lambda: target.queue() == (SLOTS, 0) or bool(select.select([mine], [], [], 0)[0]))
    mine.close()
    until(lambda: target.queue() == (SLOTS - 1, 0), seconds=2)
    more = target.begin(STORY)
    until(lambda: target.queue() == (SLOTS, 0))
    queued = target.begin(body, path)
    until(lambda: target.queue() == (SLOTS, 1))
    queued.close()
    until(lambda: target.queue() == (SLOTS, 0), seconds=2)
    for connection in (*others, more):
        connection.close()


def test_200_connect_and_abort_cycles(target: Target) -> None:
    def cycle(number: int) -> None:
        connection = target.begin(STORY | {"stream": number % 2 == 0})
        if number % 4 == 0:
            connection.recv(1)  # it has begun
        elif number % 4 == 1:
            time.sleep(0.01)
        connection.close()

    def holds() -> tuple[int, int]:
        target.as_new()
        return self_fds(target), target.process.num_threads()

    for number in range(40):  # pools and caches fill up
        cycle(number)
    before, memory = holds(), target.process.memory_info().rss
    for number in range(200):
        cycle(number)
    after = holds()
    assert after[0] <= before[0] and after[1] <= before[1] + 1, (before, after)
    assert target.process.memory_info().rss - memory < 24 * 2**20


def self_fds(target: Target) -> int:
    """Handles of the process, once the connections that were closed are gone."""
    target.http.close()
    target.http = target.client("ann")
    time.sleep(0.3)
    return target.process.num_fds()


# --- slow, and too much ---


@pytest.mark.parametrize("part", ["nothing", "a line", "headers", "a body", "drops"])
def test_slow_requests_are_given_up_and_others_are_not(target: Target, part: str) -> None:
    sent = {
        "nothing": b"",
        "a line": b"POST /v1/comp",
        "headers": b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nX-Slow: ",
        "a body": post("/v1/completions", b"x" * 1000)[:-900],
        "drops": b"",
    }[part]
    slow = [target.connect() for _ in range(20)]
    begin = time.monotonic()
    for connection in slow:
        connection.sendall(sent)
    if part == "drops":  # one byte at a time, each in time
        data = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\n" + b"X: x\r\n" * 1000
        with contextlib.suppress(ConnectionError):
            for at in range(200):
                for connection in slow:
                    connection.sendall(data[at : at + 1])
                time.sleep(0.02)
    assert target.honest() == target.greedy
    for connection in slow:
        with contextlib.suppress(ConnectionError):
            reply = connection.recv(65536)
            assert reply == b"" or reply.startswith(b"HTTP/1.1 408"), reply
            assert (part == "a body") == bool(reply)
        connection.close()
    assert time.monotonic() - begin < DEADLINE + 9


def test_a_megabyte_of_headers(target: Target) -> None:
    lines = b"".join(b"X-%d: %s\r\n" % (number, b"x" * 1000) for number in range(1000))
    for flood in (b"X: " + b"x" * 2**20, lines, b"X:" + b" " * 2**20):
        status, reply = target.raw(b"GET /health HTTP/1.1\r\nHost: x\r\n" + flood + b"\r\n\r\n")
        assert status == 431, reply[:300]
        assert b'"error"' in reply
    status, _ = target.raw(b"GET /" + b"x" * 2**20 + b" HTTP/1.1\r\nHost: x\r\n\r\n")
    assert status in (414, 431)


@pytest.mark.parametrize("declared", [True, False])
def test_100_megabytes_of_body(target: Target, declared: bool) -> None:
    before, most = target.process.memory_info().rss, 0
    reply: list[tuple[int, bytes]] = []
    piece = b"x" * 2**20
    if declared:
        data = post("/v1/completions", b"")
        data = data.replace(b"Content-Length: 0", b"Content-Length: %d" % (100 * 2**20)) + piece * 100
    else:
        head = post("/v1/completions", b"").replace(b"Content-Length: 0", b"Transfer-Encoding: chunked")
        data = head + (b"%x\r\n%s\r\n" % (len(piece), piece)) * 100 + b"0\r\n\r\n"
    sending = threading.Thread(target=lambda: reply.append(target.raw(data)))
    sending.start()
    while sending.is_alive():
        most = max(most, target.process.memory_info().rss)
        time.sleep(0.005)
    assert reply[0][0] == 413, reply[0][1][:300]
    assert most - before < 64 * 2**20


COUNTLESS: list[tuple[str, dict[str, Any], str]] = [
    ("/v1/completions", {"n": 10**9}, "n"),
    ("/v1/completions", {"best_of": 10**9}, "best_of"),
    ("/v1/completions", {"logprobs": 10**6}, "logprobs"),
    ("/v1/completions", {"prompt_logprobs": 10**6}, "prompt_logprobs"),
    ("/v1/completions", {"prompt": ["a"] * 10**5}, "prompt"),
    ("/v1/completions", {"prompt": [[1]] * 10**5}, "prompt"),
    ("/v1/completions", {"stop": ["s"] * 10**5}, "stop"),
    ("/v1/completions", {"stop_token_ids": [1] * 10**5}, "stop_token_ids"),
    ("/v1/completions", {"logit_bias": {str(n): 1 for n in range(10**5)}}, "logit_bias"),
    ("/v1/completions", {"max_tokens": 10**18}, "max_tokens"),
    ("/v1/completions", {"cache_salt": "x" * 10**6}, "cache_salt"),
    ("/v1/chat/completions", {"n": 10**9}, "n"),
    ("/v1/chat/completions", {"logprobs": True, "top_logprobs": 10**6}, "top_logprobs"),
    ("/v1/chat/completions", {"stop": ["s"] * 10**5}, "stop"),
    ("/v1/embeddings", {"input": ["a"] * 10**5}, "input"),
    ("/v1/messages", {"stop_sequences": ["s"] * 10**5}, "stop_sequences"),
]


@pytest.mark.parametrize(
    ("path", "fields", "param"), COUNTLESS, ids=[f"{path[4:]}-{param}" for path, _, param in COUNTLESS]
)
def test_what_can_be_counted_has_a_limit(
    target: Target, path: str, fields: dict[str, Any], param: str
) -> None:
    base: dict[str, Any] = {"model": MODEL}
    if path == "/v1/completions":
        base["prompt"] = "a"
    elif path != "/v1/embeddings":
        base |= {"messages": HELLO, "max_tokens": 5}
    content = json.dumps(base | fields)
    times = []
    for _ in range(5):
        begin = time.perf_counter()
        reply = target.http.post(path, content=content)
        times.append(time.perf_counter() - begin)
        assert reply.status_code == 400, reply.text[:500]
        error = reply.json()["error"]
        assert len(reply.content) < 1000
        # Anthropic's error object has no `param`
        assert error["param"] == param if path != "/v1/messages" else param in error["message"], error
    assert min(times) < 0.3  # 100 ms on a machine that does nothing else


DEEP = 100_000
NOT_JSON = {
    "nothing": b"",
    "half": b'{"model": "',
    "NaN": b'{"temperature": NaN, ',
    "Infinity": b'{"temperature": -Infinity, ',
    "1e400": b'{"temperature": 1e400, ',
    "digits": b'{"seed": ' + b"9" * 10**5 + b", ",
    "surrogate": b'{"user": "\\ud800", ',
    "bytes": b'{"user": "\xff\xfe", ',
    "lists": b'{"prompt": ' + b"[" * DEEP + b"]" * DEEP + b", ",
    "open lists": b"[" * DEEP,
    "objects": b'{"metadata": ' + b'{"a":' * DEEP + b"1" + b"}" * DEEP + b", ",
    "no object": b'["prompt", 1]',
}
JSON_PATHS = [
    *("/v1/completions", "/v1/chat/completions", "/v1/responses", "/v1/messages", "/v1/embeddings"),
    *("/v1/batches", "/tokenize", "/detokenize"),
]


@pytest.mark.parametrize("path", JSON_PATHS)
def test_what_is_not_json(target: Target, path: str) -> None:
    for name, begin in NOT_JSON.items():
        content = begin + b'"model": "jaxserve-embedded"}' if begin.endswith(b", ") else begin
        reply = target.http.post(path, content=content)
        # a batch's own body is small
        allowed = (400, 413) if path == "/v1/batches" else (400,)
        assert reply.status_code in allowed, (name, reply.text[:300])
        assert reply.json()["error"]["message"], name


# --- structured output ---


def nested(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "integer"}
    for _ in range(depth):
        schema = {"type": "object", "properties": {"a": schema, "b": schema}, "required": ["a", "b"]}
    return schema


GRAMMARS: dict[str, tuple[dict[str, Any], set[int]]] = {
    "regex that is none": ({"regex": "(((a"}, {400}),
    "regex that looks back": ({"regex": r"(a)\1"}, {400}),
    "regex of repeats": ({"regex": "((((a{1,99}){1,99}){1,99}){1,99}){1,99}"}, {200, 400}),
    "regex of choices": ({"regex": "(a|b|ab)*c" * 2000}, {200, 400}),
    "regex that backtracks": ({"regex": "(a+)+$|(.*)*x" + "(.?){500}.{500}"}, {200, 400}),
    "long regex": ({"regex": "a" * 2_000_000}, {400}),
    "schema that is none": ({"json": {"type": "nonsense"}}, {400}),
    "schema of nothing": ({"json": {"type": "string", "minLength": 9, "maxLength": 1}}, {200, 400}),
    "schema without an end": (
        {"json": {"$ref": "#/$defs/a", "$defs": {"a": {"type": "array", "items": {"$ref": "#/$defs/a"}}}}},
        {200, 400},
    ),
    "schema that is itself": ({"json": {"$ref": "#"}}, {200, 400}),
    "schema from elsewhere": ({"json": {"$ref": "http://127.0.0.1:9/schema.json"}}, {400}),
    "deep schema": ({"json": nested(15)}, {200, 400}),  # deeper ones have more parts than a body may have
    "large enum": ({"json": {"enum": [f"value {number}" for number in range(20_000)]}}, {200, 400}),
    "huge repeats": ({"json": {"type": "string", "pattern": "^.{100000000}$"}}, {200, 400}),
    "grammar that is none": ({"grammar": "start: %%%"}, {400}),
    "grammar of itself": ({"grammar": "start: start"}, {200, 400}),
    "many choices": ({"choice": [f"choice {number}" for number in range(50_000)]}, {200, 400}),
    "no choice": ({"choice": []}, {400}),
}


@pytest.mark.parametrize("name", GRAMMARS)
def test_hostile_grammars(target: Target, name: str) -> None:
    """Refused or obeyed, in bounded time, while another stream goes on."""
    wanted, allowed = GRAMMARS[name]
    body = {"model": MODEL, "prompt": "a", "max_tokens": 4, "temperature": 0, "structured_outputs": wanted}
    gaps: list[float] = []
    stop = threading.Event()

    def read_on() -> None:
        with target.client("bob") as http, http.stream("POST", "/v1/completions", json=LONG_STREAM) as reply:
            before = time.monotonic()
            for _ in reply.iter_raw():
                gaps.append(time.monotonic() - before)
                before = time.monotonic()
                if stop.is_set():
                    return

    reader = threading.Thread(target=read_on)
    reader.start()
    until(lambda: bool(gaps))
    begin, memory = time.monotonic(), target.process.memory_info().rss
    reply = target.http.post("/v1/completions", json=body)
    took = time.monotonic() - begin
    stop.set()
    reader.join(30)
    assert reply.status_code in allowed, reply.text[:500]
    if reply.status_code == 400:
        assert reply.json()["error"]["param"].startswith("structured_outputs"), reply.text[:300]
    assert took < 25
    assert max(gaps) < 2.0
    assert target.process.memory_info().rss - memory < 512 * 2**20


LONG_STREAM = STORY | {"stream": True}


def test_ten_thousand_schemas(target: Target) -> None:
    def ask(number: int) -> None:
        schema = {"type": "object", "properties": {f"field_{number}": {"const": number}}}
        body = {"model": MODEL, "prompt": "a", "max_tokens": 1, "temperature": 0}
        reply = target.http.post("/v1/completions", json=body | {"structured_outputs": {"json": schema}})
        assert reply.status_code == 200, reply.text

    with ThreadPoolExecutor(SLOTS) as pool:
        list(pool.map(ask, range(2000)))
        memory = target.process.memory_info().rss
        list(pool.map(ask, range(2000, 10_000)))
    assert target.process.memory_info().rss - memory < 32 * 2**20


# --- addresses, keys, paths ---


def test_addresses_in_messages_are_not_looked_at(target: Target) -> None:
    with socket.create_server(("127.0.0.1", 0)) as trap:
        trap.setblocking(False)
        port = trap.getsockname()[1]
        for url in (
            *("file:///etc/passwd", "http://169.254.169.254/latest/meta-data/", f"http://127.0.0.1:{port}/x"),
            *(f"http://localhost:{port}/x.png", f"http://[::ffff:127.0.0.1]:{port}/", "gopher://127.0.0.1/"),
        ):
            image = {"type": "image_url", "image_url": {"url": url}}
            source = {"type": "image", "source": {"type": "url", "url": url}}
            for path, body in (
                ("/v1/chat/completions", {"messages": [{"role": "user", "content": [image]}]}),
                (
                    "/v1/messages",
                    {"messages": [{"role": "user", "content": [source]}], "max_tokens": 5},
                ),
                (
                    "/v1/responses",
                    {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": url}]}]},
                ),
            ):
                reply = target.http.post(path, json={"model": MODEL, **body})
                assert reply.status_code == 400, (url, path, reply.text)
                assert "root:" not in reply.text
        with pytest.raises(BlockingIOError):
            trap.accept()


def test_every_route_wants_a_key(target: Target) -> None:
    seen = 0
    for route in routes():
        path = route.path.replace(":path", "").replace("{", "").replace("}", "")
        for method in sorted(route.methods or ()):
            for key in (None, "", "wrong", "Bearer", KEYS["ann"][:-1], KEYS["ann"] + "x", "\u00fc"):
                header = "" if key is None else f"Authorization: Bearer {key}\r\n"
                request = f"{method} {path} HTTP/1.1\r\nHost: x\r\n{header}Content-Length: 0\r\n\r\n"
                with target.connect() as connection:
                    connection.sendall(request.encode())
                    status = int(connection.recv(65536)[9:12])
                if route.path in OPEN_PATHS:
                    assert status in (200, 405), (method, path, key)
                else:
                    assert status == 401, (method, path, key)
                seen += 1
    assert seen > 100


PATHS = [
    *("//v1/models", "/v1//models", "/v1/models/", "/%2fv1/models", "/%76%31/models", "/v1/../v1/models"),
    *(
        "/health/../v1/models",
        "/page/../v1/models",
        "/V1/MODELS",
        "/v1/models%00",
        "/v1/models;x",
        "/./v1/models",
    ),
    *(
        "http://x/v1/models",
        "http://evil/v1/models",
        "/v1/models?/health",
        "/v1/models#/health",
        "*",
        "v1/models",
    ),
    *("/health%2f..%2fv1/models", "/page/%2e%2e/%2e%2e/v1/models", "/v1\\models", "/health?x=/v1/models"),
]


def test_odd_paths_and_hosts_open_nothing(target: Target) -> None:
    for path in PATHS:
        for host in (
            "x",
            "",
            "127.0.0.1",
            "a b",
            "evil.example/v1",
            "x\r\nHost: y",
            "x\r\nX-Forwarded-For: 127.0.0.1",
        ):
            request = f"GET {path} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n"
            status, reply = target.raw(request.encode())
            assert MODEL.encode() not in reply
            if status == 200:
                assert path.startswith("/health"), (path, host)
            else:
                assert status in (400, 401, 404), (path, host, status)
            assert b"location:" not in reply.lower()


def test_files_of_others_and_outside_are_not_there(target: Target) -> None:
    line = {"custom_id": "1", "method": "POST", "url": "/v1/completions", "body": STORY | {"max_tokens": 1}}
    content = json.dumps(line).encode()
    made = target.http.post(
        "/v1/files", files={"file": ("../../evil\x00.jsonl", content)}, data={"purpose": "batch"}
    )
    assert made.status_code == 200, made.text
    mine = made.json()["id"]
    secret = target.folder / "keys"
    with target.client("bob") as bob:
        for file_id in (
            *(
                mine,
                "..",
                "../keys",
                "..%2f..%2fkeys",
                "%2e%2e/keys",
                "%00",
                f"{mine}%00",
                f"{mine}/../{mine}",
            ),
            *(f"..%2f{secret.name}", f"%2f{str(secret).strip('/').replace('/', '%2f')}", "file-", "x" * 5000),
        ):
            for path in (f"/v1/files/{file_id}", f"/v1/files/{file_id}/content"):
                for method in ("GET", "DELETE"):
                    if method == "DELETE" and path.endswith("/content"):
                        continue
                    request = (
                        f"{method} {path} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEYS['bob']}\r\n\r\n"
                    )
                    status, reply = target.raw(request.encode())
                    assert status in (404, 405), (method, path, reply[:200])
                    assert KEYS["ann"].encode() not in reply
        reply = bob.post(
            "/v1/batches",
            json={"input_file_id": mine, "endpoint": "/v1/completions", "completion_window": "24h"},
        )
        assert reply.status_code in (400, 404), reply.text
        assert [one["id"] for one in bob.get("/v1/files").json()["data"]] == []
    assert target.http.get(f"/v1/files/{mine}/content").content == content
    assert target.http.delete(f"/v1/files/{mine}").status_code == 200


def test_logs_stay_lines(target: Target) -> None:
    evil = "\x1b[2J\r\n2026-01-01T00:00:00.000Z info all is well\x07\u2028"
    quoted = "%1b[2J%0d%0a2026%20info%20all%20is%20well"
    for path in (f"/{quoted}", f"/v1/models/{quoted}", f"/v1/files/{quoted}", f"/v1/batches/{quoted}"):
        assert target.http.get(path).status_code == 404
    for fields in ({"model": evil}, {"user": evil}, {evil: 1}, {"prompt": evil, "max_tokens": 2}):
        target.http.post("/v1/completions", json={"model": MODEL, "prompt": "a", "max_tokens": 1} | fields)
    raw = b"GET /health HTTP/1.1\r\nHost: x\r\nUser-Agent: a\x1b[31mb\r\nX-Request-Id: a\x1b[31m b\r\n\r\n"
    target.raw(raw)
    until(lambda: "well" in target.server.printed())
    printed = target.server.printed()
    for one in ("\x1b", "\r", "\x07", "\u2028"):
        assert one not in printed
    assert not [line for line in printed.split("\n") if line.startswith("2026-01-01")]
    for secret in (*KEYS.values(), STORY["prompt"]):
        assert secret not in printed


def test_special_tokens_in_what_a_user_writes_are_text(target: Target) -> None:
    vocabulary = target.http.get("/tokenizer_info").json()
    special = [text for text in flatten(vocabulary) if isinstance(text, str) and text.startswith("<|")]
    assert special, vocabulary

    def prompt_tokens(content: str) -> int:
        body = {"model": MODEL, "messages": [{"role": "user", "content": content}], "max_tokens": 1}
        return target.http.post("/v1/chat/completions", json=body).json()["usage"]["prompt_tokens"]

    plain = prompt_tokens("")
    for text in special:
        assert prompt_tokens(text) - plain > 1, text  # spelled out, not one token


def flatten(value: Any) -> Iterator[Any]:
    if isinstance(value, dict):
        for part in value.values():
            yield from flatten(part)
    elif isinstance(value, list):
        for part in value:
            yield from flatten(part)
    else:
        yield value


# --- a full disk ---


def test_a_full_disk_during_a_batch(target: Target) -> None:
    """Nobody else feels it, and every line of the batch is answered once when there is room again."""
    count = 120
    lines = [
        {
            "custom_id": str(number),
            "method": "POST",
            "url": "/v1/completions",
            "body": STORY | {"prompt": f"x = {number}", "max_tokens": 16, "temperature": 0},
        }
        for number in range(count)
    ]
    content = "\n".join(map(json.dumps, lines)).encode()
    with target.openai as client:
        given = client.files.create(file=("in.jsonl", content), purpose="batch")
        batch = client.batches.create(
            input_file_id=given.id, endpoint="/v1/completions", completion_window="24h"
        )
        until(lambda: client.batches.retrieve(batch.id).request_counts.completed > 4, seconds=60)
        limits = target.process.rlimit(psutil.RLIMIT_FSIZE)
        target.process.rlimit(psutil.RLIMIT_FSIZE, (1, limits[1]))  # no file of the process may grow
        try:
            time.sleep(1.0)
            assert httpx.get(f"{target.server.url}/health").status_code == 200
            assert target.honest() == target.greedy
            refused = target.http.post(
                "/v1/files", files={"file": ("b.jsonl", content)}, data={"purpose": "batch"}
            )
            assert refused.status_code in (500, 503, 507), refused.text
            assert refused.json()["error"]["message"]
        finally:
            target.process.rlimit(psutil.RLIMIT_FSIZE, limits)
        ended = ("completed", "failed", "expired", "cancelled")
        until(lambda: client.batches.retrieve(batch.id).status in ended, seconds=90)
        done = client.batches.retrieve(batch.id)
        assert done.status == "completed", done
        texts = [
            client.files.content(file).text for file in (done.output_file_id, done.error_file_id) if file
        ]
        answered = [json.loads(line)["custom_id"] for text in texts for line in text.splitlines()]
        assert sorted(answered, key=int) == [str(number) for number in range(count)]
        for file in (given.id, done.output_file_id, done.error_file_id):
            if file:
                client.files.delete(file)


# --- a full queue ---


def test_a_full_queue(target: Target) -> None:
    hogs = [target.begin(STORY) for _ in range(SLOTS)]
    until(lambda: target.queue() == (SLOTS, 0))
    hogs += [target.begin(STORY) for _ in range(QUEUED)]
    until(lambda: target.queue() == (SLOTS, QUEUED))
    for path, body in (
        ("/v1/completions", STORY),
        ("/v1/chat/completions", {"model": MODEL, "messages": HELLO, "stream": True}),
        ("/v1/responses", {"model": MODEL, "input": "a"}),
        ("/v1/messages", {"model": MODEL, "messages": HELLO, "max_tokens": 5}),
    ):
        reply = target.http.post(path, json=body)
        assert reply.status_code == 429, reply.text
        assert 1 <= int(reply.headers["retry-after"]) <= 120
    with target.openai as client, pytest.raises(openai.RateLimitError):
        client.completions.create(model=MODEL, prompt="a", max_tokens=1)
    timer = threading.Timer(0.5, lambda: [hog.close() for hog in hogs])
    timer.start()
    with target.openai.with_options(max_retries=3) as client:
        assert client.completions.create(model=MODEL, prompt="a", max_tokens=1).choices
    timer.join()


# --- the end ---


def read_stream(target: Target, body: dict[str, Any], got: list[str]) -> threading.Thread:
    """Reads a stream to its end, on a thread; what came is in `got` as it comes."""

    def read() -> None:
        with target.client("ann") as http, http.stream("POST", "/v1/completions", json=body) as reply:
            got.append(str(reply.status_code))
            got.extend(line for line in reply.iter_lines() if line)

    thread = threading.Thread(target=read)
    thread.start()
    until(lambda: len(got) > 2)
    return thread


@pytest.mark.parametrize("seconds", [60, 0.5])
def test_sigterm_with_streams_open(tmp_path: Path, seconds: float) -> None:
    """They finish; past the deadline they hear why they do not. The exit code is 0."""
    with target_in(tmp_path, "--drain-seconds", str(seconds)) as target:
        streams: list[list[str]] = [[] for _ in range(SLOTS)]
        threads = [read_stream(target, LONG_STREAM, got) for got in streams]
        target.server.process.send_signal(signal.SIGTERM)
        for thread in threads:
            thread.join(60)
            assert not thread.is_alive()
        assert target.server.process.wait(30) == 0
    for status, *events, last in streams:
        assert (status, last) == ("200", "data: [DONE]")
        end = json.loads(events[-1][6:])
        if seconds > 1:
            assert end["choices"][0]["finish_reason"] == "length"
        else:
            assert end["error"]["code"] == "stopping"
        assert "error" not in json.loads(events[0][6:])


def test_an_engine_that_fails(tmp_path: Path) -> None:
    """Those in flight hear of it, streaming or not, and so does `/health`; nobody hangs."""
    with target_in(tmp_path) as target:
        got: list[str] = []
        stream = read_stream(target, LONG_STREAM, got)
        replies: list[httpx.Response] = []
        bob = target.client("bob")
        whole = threading.Thread(target=lambda: replies.append(bob.post("/v1/completions", json=STORY)))
        whole.start()
        until(lambda: target.queue() == (2, 0))
        (tmp_path / "fail").touch()
        for thread in (stream, whole):
            thread.join(20)
            assert not thread.is_alive()
        assert "injected" in json.loads(got[-2][6:])["error"]["message"]
        assert got[-1] == "data: [DONE]"
        assert replies[0].status_code == 500 and "injected" in replies[0].json()["error"]["message"]
        bob.close()
        for path in ("/health", "/ready"):
            assert httpx.get(f"{target.server.url}{path}").status_code == 503
        assert target.http.post("/v1/completions", json=STORY).status_code == 503
        assert target.state()["status"] == "failed"
        target.server.process.send_signal(signal.SIGTERM)
        assert target.server.process.wait(30) in (0, 1)
