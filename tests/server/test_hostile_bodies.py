"""Bodies that nobody's client would send, at the endpoints beside chat and completions: each is refused
quickly, with the field's name where there is one, and the server is as before."""

from __future__ import annotations

import gzip
import time
from collections.abc import Iterator
from typing import Any

import orjson
import pydantic
import pytest

from jaxserve.server.api import chat, completions, messages, responses
from jaxserve.server.api.fields import Caller
from jaxserve.server.api.job import Prepare
from jaxserve.server.body import parse_object
from jaxserve.server.errors import ApiError
from tests.server.fakes import FakeEngine
from tests.server.harness import MODEL, Served

USER = {"role": "user", "content": "a"}
BODIES: dict[str, dict[str, Any]] = {  # that are answered
    "/v1/responses": {"model": MODEL, "input": "a", "max_output_tokens": 3},
    "/v1/messages": {"model": MODEL, "messages": [USER], "max_tokens": 3},
    "/v1/messages/count_tokens": {"model": MODEL, "messages": [USER]},
    "/v1/embeddings": {"model": MODEL, "input": "a"},
    "/tokenize": {"model": MODEL, "prompt": "a"},
    "/detokenize": {"model": MODEL, "tokens": [97]},
}
MAIN = {  # the field that holds the text
    "/v1/responses": "input",
    "/v1/messages": "messages",
    "/v1/messages/count_tokens": "messages",
    "/v1/embeddings": "input",
    "/tokenize": "prompt",
    "/detokenize": "tokens",
}
PATHS = pytest.mark.parametrize("path", BODIES)
SECONDS = 1.0  # the work is of milliseconds


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    one = Served(FakeEngine())
    yield one
    one.close()


def refused(served: Served, path: str, body: bytes, status: int = 400) -> str:
    """The refusal's message. The machine may be busy with something else, but not three times."""
    for attempt in range(3):
        started = time.monotonic()
        reply = served.http.post(path, content=body, headers={"Content-Type": "application/json"})
        if time.monotonic() - started < SECONDS:
            break
        assert attempt < 2, f"refused after {time.monotonic() - started:.1f} s"
    assert reply.status_code == status, reply.text[:500]
    assert len(reply.content) < 2000
    return str(reply.json()["error"]["message"])


@PATHS
def test_these_are_answered(served: Served, path: str) -> None:
    assert served.http.post(path, json=BODIES[path]).status_code == 200


@PATHS
@pytest.mark.parametrize("number", [b"NaN", b"Infinity", b"-Infinity", b"1e400"])
def test_numbers_that_are_none(served: Served, path: str, number: bytes) -> None:
    body = orjson.dumps(BODIES[path])[:-1] + b',"timeout":' + number + b"}"
    message = refused(served, path, body)
    assert "timeout" in message or "JSON" in message


@PATHS
@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"null",
        b"[]",
        b'"a"',
        b"5",
        b"{",
        b"\xff\xfe",
        b'{"model":"\xc3"}',
        b"[" * 100_000,
        b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
        b'{"model":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    ],
    ids=lambda body: f"{len(body)}:{body[:8]!r}",
)
def test_what_is_no_object(served: Served, path: str, body: bytes) -> None:
    refused(served, path, body)


@PATHS
def test_lone_surrogates(served: Served, path: str) -> None:
    name = MAIN[path].encode()
    text = b'"\\ud800"'
    if name == b"messages":
        text = b'[{"role":"user","content":"\\udfff"}]'
    refused(served, path, b'{"model":"alphabet","max_tokens":3,"' + name + b'":' + text + b"}")


@PATHS
def test_a_hundred_thousand_items(served: Served, path: str) -> None:
    for items in ([USER] * 100_000, ["a"] * 100_000, [{}] * 100_000, [[]] * 100_000, [5.5] * 100_000):
        refused(served, path, orjson.dumps({**BODIES[path], MAIN[path]: items}))


@PATHS
def test_a_hundred_thousand_fields(served: Served, path: str) -> None:
    many = {f"field{number}": number for number in range(100_000)}
    assert "at most 256 are taken" in refused(served, path, orjson.dumps({**BODIES[path], **many}))
    few = {f"field{number}": number for number in range(200)}
    assert "unknown field: 'field0'" in refused(served, path, orjson.dumps({**BODIES[path], **few}))


@PATHS
@pytest.mark.parametrize("bracket", ["[]", "{}"])
def test_nesting(served: Served, path: str, bracket: str) -> None:
    """What is read here may have to be written again, and that goes less deep."""
    opening = "[" if bracket == "[]" else '{"a":'
    for levels in (199, 200, 255, 1000):  # beside the body's own
        value = opening * (levels - 1) + bracket + bracket[1] * (levels - 1)
        body = orjson.dumps(BODIES[path])[:-1] + b',"new":' + value.encode() + b"}"
        message = refused(served, path, body)
        assert ("nests more than 200 levels" in message) == (levels > 199)
    body = orjson.dumps({**BODIES[path], "new": "[" * 1000})  # a text
    assert "unknown field" in refused(served, path, body)


WRONG_MEMBERS = {f"{number}": "x" for number in range(100_000)}
MANY_PARTS = [{"role": "user", "content": [0] * 1024}] * 90
COSTLY: list[tuple[str, dict[str, Any]]] = [
    ("/v1/chat/completions", {"logit_bias": WRONG_MEMBERS}),
    ("/v1/chat/completions", {"stream_options": WRONG_MEMBERS}),
    ("/v1/chat/completions", {"messages": [WRONG_MEMBERS]}),
    ("/v1/chat/completions", {"messages": MANY_PARTS}),
    ("/v1/chat/completions", {"documents": [{"a": 5} | WRONG_MEMBERS]}),
    ("/v1/chat/completions", {"tools": [{"type": "function", "function": WRONG_MEMBERS}]}),
    ("/v1/chat/completions", {"tools": [{"type": 1}] * 100_000}),
    ("/v1/chat/completions", {"tool_choice": WRONG_MEMBERS}),
    ("/v1/chat/completions", {"response_format": WRONG_MEMBERS}),
    ("/v1/completions", {"allowed_token_ids": ["x"] * 100_000}),
    ("/v1/responses", {"input": MANY_PARTS}),
    ("/v1/responses", {"input": [WRONG_MEMBERS]}),
    ("/v1/responses", {"reasoning": WRONG_MEMBERS}),
    ("/v1/messages", {"messages": MANY_PARTS}),
    ("/v1/messages", {"thinking": WRONG_MEMBERS}),
    ("/v1/messages", {"tools": [{"name": 1}] * 100_000}),
]


@pytest.mark.parametrize(("path", "fields"), COSTLY, ids=lambda value: str(value)[:40])
def test_one_error_is_enough(path: str, fields: dict[str, Any]) -> None:
    """pydantic holds the interpreter, and with it every stream, while it collects a body's errors."""
    prepare: Prepare[Any] = {
        "/v1/chat/completions": chat.prepare,
        "/v1/completions": completions.prepare,
        "/v1/responses": responses.prepare,
        "/v1/messages": messages.prepare,
    }[path]
    text = {"prompt": "a"} if path == "/v1/completions" else {"messages": [USER]}
    sent = {**BODIES.get(path, {"model": MODEL, **text}), **fields}
    with pytest.raises(ApiError) as caught:
        prepare(parse_object(orjson.dumps(sent)), FakeEngine(), lambda name: None, Caller())
    assert caught.value.status == 400
    collected = caught.value.__context__
    assert isinstance(collected, pydantic.ValidationError)
    assert collected.error_count() < 10


@PATHS
def test_a_compressed_body(served: Served, path: str) -> None:
    body = orjson.dumps(BODIES[path])
    for coding in ("gzip", "identity, br", "x" * 10_000):
        packed = gzip.compress(body)
        reply = served.http.post(path, content=packed, headers={"Content-Encoding": coding})
        assert reply.status_code == 415
        assert "send the body as it is" in reply.json()["error"]["message"]
        assert len(reply.content) < 2000
        assert reply.headers["accept-encoding"] == "identity"
    assert served.http.post(path, content=body, headers={"Content-Encoding": "identity"}).status_code == 200
    document = served.http.get("/openapi.json").json()
    assert "415" in document["paths"][path]["post"]["responses"]


@PATHS
def test_a_long_name_is_not_repeated(served: Served, path: str) -> None:
    refused(served, path, orjson.dumps({**BODIES[path], "x" * 1_000_000: 1}))


WRONG: list[Any] = [True, 5, 5.5, -(2**63), 2**64 - 1, 1e300, "x", "", [], [[]], {}, {"a": {}}, [None]]


@PATHS
def test_wrong_types_of_every_field(served: Served, path: str) -> None:
    """Whatever a field is given, the answer is its reply or a refusal that names a field."""
    document = served.http.get("/openapi.json").json()
    schema = document["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]
    fields = document["components"]["schemas"][schema["$ref"].rpartition("/")[2]]["properties"]
    for name in fields:
        for value in WRONG:
            if name == "timeout" and value == 5:
                continue
            body = {**BODIES[path], name: value}
            reply = served.http.post(path, content=orjson.dumps(body))
            assert reply.status_code in (200, 400, 404), (body, reply.text)
            if reply.status_code != 200:
                error = reply.json()["error"]
                named = error.get("param") or error["message"]
                assert name.partition(".")[0] in named or "max_" in named, (body, error)


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/responses", {"input": [{**USER, "content": [{"type": "input_text", "text": "a"}] * 100_000}]}),
        ("/v1/responses", {"tools": [{"type": "function", "name": "f"}] * 100_000}),
        ("/v1/responses", {"metadata": {str(n): "a" for n in range(100_000)}}),
        ("/v1/responses", {"stop": ["a"] * 100_000}),
        ("/v1/responses", {"include": ["message.output_text.logprobs"] * 100_000}),
        ("/v1/messages", {"messages": [{**USER, "content": [{"type": "text", "text": "a"}] * 100_000}]}),
        ("/v1/messages", {"system": [{"type": "text", "text": "a"}] * 100_000}),
        ("/v1/messages", {"tools": [{"name": "f", "input_schema": {}}] * 100_000}),
        ("/v1/messages", {"stop_sequences": ["a"] * 100_000}),
        ("/v1/messages", {"max_tokens": 10**9}),
        ("/v1/embeddings", {"input": [[97]] * 100_000}),
        ("/v1/embeddings", {"input": [97] * 1_000_000}),
        ("/v1/embeddings", {"dimensions": 10**9}),
        ("/detokenize", {"tokens": [97] * 2_000_000}),
    ],
    ids=lambda one: one if isinstance(one, str) else next(iter(one)),
)
def test_everything_that_is_counted_has_a_bound(served: Served, path: str, body: dict[str, Any]) -> None:
    refused(served, path, orjson.dumps({**BODIES[path], **body}))


def test_the_server_is_as_before(served: Served) -> None:
    served.as_new()
