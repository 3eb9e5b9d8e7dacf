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


@pytest.mark.parametrize("origin", ["a.org", "https://a.org/", "https://a.org/x", "https://a b", "HTTPS://A"])
def test_what_is_no_origin(origin: str) -> None:
    with pytest.raises(ValueError, match="--cors-origin"):
        ServerOptions(cors_origin=origin)
