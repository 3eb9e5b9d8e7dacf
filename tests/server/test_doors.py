"""Who may come in: keys, whatever the path looks like; and pages of other origins where they are allowed."""

from __future__ import annotations

from pathlib import Path

import anthropic
import pytest

from jaxserve.config import ServerOptions
from jaxserve.server.app import routes
from jaxserve.server.auth import Keys, fixed_keys, load_keys
from tests.server.fakes import FakeEngine
from tests.server.harness import Serve

OPEN = {"/", "/health", "/ready"}
KEY = {"Authorization": "Bearer secret"}


def test_every_route_but_the_open_ones_needs_a_key(serve: Serve) -> None:
    served = serve(FakeEngine(), keys=["secret"])
    checked = 0
    for route in routes():
        path = route.path.replace("{model:path}", "x").replace("{file_id}", "x").replace("{batch_id}", "x")
        for method in ("GET", "HEAD", "POST", "PUT", "DELETE", "PATCH", "OPTIONS"):
            reply = served.http.request(method, path, json=None if method in ("GET", "HEAD") else {})
            if method in ("GET", "HEAD") and (path in OPEN or path.startswith("/page/")):
                assert reply.status_code == 200, path
            else:
                assert reply.status_code == 401, (method, path)
                checked += 1
    assert checked > 100
    assert served.engine.requests == []


PATHS = [
    "//v1/models",
    "/v1//models",
    "/v1/models/",
    "/V1/models",
    "/%76%31/models",
    "/v1%2fmodels",
    "/health%2f..%2fv1%2fmodels",
    "/health/../v1/models",
    "/health/%2e%2e/v1/models",
    "/page/../v1/models",
    "/page/%2e%2e/v1/models",
    "/page//v1/models",
    "/page/",
    "/page/.git/config",
    "/health;/v1/models",
    "/health%00",
    "/health%0a",
    "/.",
    "//",
    "/state",
    "/openapi.json",
]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("host", ["x", "localhost/health", "a b", "", "127.0.0.1:1", "health"])
def test_no_form_of_a_path_opens_a_door(serve_one: tuple[str, int], path: str, host: str) -> None:
    """Sent as it is: clients would tidy it up."""
    import socket

    with socket.create_connection(("127.0.0.1", serve_one[1]), timeout=10) as connection:
        connection.sendall(f"GET {path} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n".encode())
        status = connection.recv(12)
    assert status in (b"HTTP/1.1 401", b"HTTP/1.1 400")


@pytest.fixture(scope="module")
def serve_one() -> object:
    from tests.server.harness import Served

    served = Served(FakeEngine(), keys=["secret"])
    yield served.url, served.port
    served.close()


def test_targets_that_are_no_paths(serve_one: tuple[str, int]) -> None:
    import socket

    for target in ("http://x/health", "http://x/v1/models", "*", "x", "/health?/v1", "?"):
        with socket.create_connection(("127.0.0.1", serve_one[1]), timeout=10) as connection:
            connection.sendall(f"GET {target} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode())
            status = connection.recv(12)
        assert status == (b"HTTP/1.1 200" if target == "/health?/v1" else b"HTTP/1.1 401"), target


def test_anthropics_header(serve: Serve) -> None:
    served = serve(FakeEngine(), keys=["secret"])
    assert served.http.get("/v1/models", headers={"x-api-key": "secret"}).status_code == 200
    assert served.http.get("/v1/models", headers={"x-api-key": "wrong"}).status_code == 401
    both = {"Authorization": "Bearer wrong", "x-api-key": "secret"}
    assert served.http.get("/v1/models", headers=both).status_code == 401
    client = anthropic.Anthropic(base_url=served.url, api_key="wrong", max_retries=0)
    with client, pytest.raises(anthropic.AuthenticationError) as raised:
        client.messages.create(model="x", max_tokens=1, messages=[{"role": "user", "content": "x"}])
    assert isinstance(raised.value.body, dict)
    assert raised.value.body["type"] == "error"
    assert raised.value.body["error"]["type"] == "authentication_error"


def test_request_ids(serve: Serve) -> None:
    served = serve(FakeEngine(), keys=["secret"])
    for path, headers in (("/health", {}), ("/v1/models", {}), ("/nowhere", KEY), ("/v1/models", KEY)):
        own = served.http.get(path, headers=headers).headers["x-request-id"]
        assert own.startswith("req_") and len(own) == 36
        given = {**headers, "X-Request-Id": "mine-1/2"}
        assert served.http.get(path, headers=given).headers["x-request-id"] == "mine-1/2"
    for strange in ("a b", "x" * 129, "a\tb", "é".encode()):
        reply = served.http.get("/health", headers=[("X-Request-Id", strange)])
        assert reply.headers["x-request-id"].startswith("req_")


def test_an_internal_error_has_an_id_too(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    served = serve(FakeEngine())
    monkeypatch.setattr(served.engine, "stats", lambda: 1 / 0)
    reply = served.http.get("/metrics", headers={"X-Request-Id": "mine"})
    assert (reply.status_code, reply.headers["x-request-id"]) == (500, "mine")
    assert reply.json()["error"]["code"] == "internal_error"


# --- keys ---


def test_names_of_keys(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_text("plain\nalice: one\nbob@x.org:  two \nwith:colon\n")
    keys = load_keys(ServerOptions(api_key_file=str(path)))
    assert keys == [("line-1", "plain"), ("alice", "one"), ("bob@x.org", "two"), ("line-4", "with:colon")]
    for content in ("a b: key", "two words", "alice: two words", "alice:", ": x y"):
        path.write_text(content)
        if content == "alice:":
            assert load_keys(ServerOptions(api_key_file=str(path))) == [("line-1", "alice:")]
            continue
        with pytest.raises(ValueError, match="key"):
            load_keys(ServerOptions(api_key_file=str(path)))


def test_a_server_with_keys_never_becomes_open() -> None:
    given = [list(fixed_keys(["a"])._read())]
    keys = Keys(lambda: given[0])
    given[0] = []
    with pytest.raises(ValueError, match="no key any more"):
        keys.reload()
    assert keys.find("a") is not None and keys.find("b") is None


# --- other origins ---


def preflight(origin: str) -> dict[str, str]:
    return {
        "Origin": origin,
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "authorization, content-type, x-stainless-lang",
    }


def test_no_origin_is_allowed_by_default(serve: Serve) -> None:
    served = serve(FakeEngine(), keys=["secret"])
    assert served.http.options("/v1/completions", headers=preflight("https://a.org")).status_code == 401
    reply = served.http.get("/v1/models", headers={**KEY, "Origin": "https://a.org"})
    assert reply.status_code == 200
    assert not [name for name in reply.headers if name.startswith("access-control")]


def test_allowed_origins(serve: Serve) -> None:
    served = serve(FakeEngine(), keys=["secret"], cors_origin="https://a.org, http://localhost:3000")
    for origin in ("https://a.org", "http://localhost:3000"):
        reply = served.http.options("/v1/completions", headers=preflight(origin))
        assert reply.status_code == 200
        assert reply.headers["access-control-allow-origin"] == origin
        assert "x-stainless-lang" in reply.headers["access-control-allow-headers"]
        assert "access-control-allow-credentials" not in reply.headers
        assert (
            served.http.get("/v1/models", headers={"Origin": origin}).status_code == 401
        )  # the key is needed
        reply = served.http.get("/v1/models", headers={**KEY, "Origin": origin})
        assert reply.headers["access-control-allow-origin"] == origin
        assert "x-request-id" in reply.headers["access-control-expose-headers"]
    for origin in ("https://b.org", "https://a.org.evil.org", "null", "http://a.org", ""):
        assert served.http.options("/v1/completions", headers=preflight(origin)).status_code == 401
        reply = served.http.get("/v1/models", headers={**KEY, "Origin": origin})
        assert reply.status_code == 200 and "access-control-allow-origin" not in reply.headers


def test_every_origin(serve: Serve) -> None:
    served = serve(FakeEngine(), keys=["secret"], cors_origin="*")
    reply = served.http.options("/v1/completions", headers=preflight("https://b.org"))
    assert (reply.status_code, reply.headers["access-control-allow-origin"]) == (200, "*")


# --- without a key, on a loopback address ---

PROMPT = b'{"model": "alphabet", "prompt": "a", "max_tokens": 2}'


def ask(port: int, host: str | None, origin: str | None, target: str = "POST /v1/completions") -> bytes:
    """Status and body of what a page's `text/plain` POST is answered, or a program's that says as little."""
    import socket

    version = "1.1" if host is not None else "1.0"
    lines = [f"{target} HTTP/{version}", "Content-Type: text/plain", "Connection: close"]
    lines += [] if host is None else [f"Host: {host}"]
    lines += [] if origin is None else [f"Origin: {origin}"]
    content = PROMPT if target.startswith("POST") else b""
    lines += [f"Content-Length: {len(content)}", "", ""]
    with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
        connection.sendall("\r\n".join(lines).encode() + content)
        reply = b""
        while piece := connection.recv(2**16):
            reply += piece
    return reply[9:12] + reply.partition(b"\r\n\r\n")[2]


OWN = ["localhost", "LOCALHOST:1", "localhost:", "127.0.0.1:{port}", "127.8.7.6", "[::1]:80", "[0:0::0:1]"]
FOREIGN = [
    *("rebind.example", "rebind.example:{port}", "localhost.evil.org", "127.0.0.1.evil.org"),
    *("", "10.0.0.1", "[::2]", "[::1", "0.0.0.0", "127.0.0.1:80:80", "127.1", "2130706433"),
    *("evil.org:127.0.0.1", "localhost@evil.org", "evil.org#localhost", "[127.0.0.1]x"),
    *("localhost, evil.org", "a b", "x" * 300),
]


def test_names_under_which_a_keyless_server_is_reached(serve: Serve) -> None:
    served = serve(FakeEngine())
    for host in (*OWN, None):
        assert ask(served.port, host and host.format(port=served.port), None)[:3] == b"200", host
    for host in FOREIGN:
        for target in ("POST /v1/completions", "GET /health", "GET /", "GET /state", "OPTIONS /v1/files"):
            reply = ask(served.port, host.format(port=served.port), None, target)
            assert reply[:3] == b"403", (host, target, reply)
            assert b'"code":"host_not_allowed"' in reply
    assert len(served.engine.requests) == len(OWN) + 1


def test_pages_that_a_keyless_server_serves(serve: Serve) -> None:
    served = serve(FakeEngine(), cors_origin="https://a.org")
    here = f"127.0.0.1:{served.port}"
    for host, origin in (
        *((here, None), (here, f"http://{here}"), ("LocalHost:80", "https://localhost:80")),
        *((here, "https://a.org"), ("[::1]:9", "http://[::1]:9")),
    ):
        assert ask(served.port, host, origin)[:3] == b"200", (host, origin)
    asked = len(served.engine.requests)
    for origin in (
        *(
            "https://b.org",
            "null",
            "",
            "https://a.org.b.org",
            "http://127.0.0.1",
            f"http://localhost:{served.port}",
        ),
        *(here, f"ftp://{here}", f"http://{here}/", f"http://{here}.b.org", "http://[::1]:9", "x" * 300),
    ):
        for target in ("POST /v1/completions", "POST /v1/files", "OPTIONS /v1/files", "GET /state"):
            reply = ask(served.port, here, origin, target)
            assert reply[:3] == b"403", (origin, target, reply)
            assert b'"code":"origin_not_allowed"' in reply
    assert ask(served.port, "rebind.example", "http://rebind.example")[:3] == b"403"
    assert b'"permission_error"' in ask(served.port, here, "null", "POST /v1/messages")
    assert len(served.engine.requests) == asked
    assert ask(serve(FakeEngine(), cors_origin="*").port, here, "https://b.org")[:3] == b"200"


def test_other_servers_are_as_ever(serve: Serve) -> None:
    """A key stops other pages, and an address that others reach has names that nobody here knows."""
    assert ask(serve(FakeEngine(), host="0.0.0.0").port, "rebind.example", "https://b.org")[:3] == b"200"
    served = serve(FakeEngine(), keys=["secret"])
    assert ask(served.port, "rebind.example", "https://b.org")[:3] == b"401"
    headers = {**KEY, "Host": "llm.example", "Origin": "https://b.org"}
    assert served.http.get("/v1/models", headers=headers).status_code == 200


@pytest.mark.parametrize("origin", ["a.org", "https://a.org/", "https://a.org/x", "https://a b", "HTTPS://A"])
def test_what_is_no_origin(origin: str) -> None:
    with pytest.raises(ValueError, match="--cors-origin"):
        ServerOptions(cors_origin=origin)
