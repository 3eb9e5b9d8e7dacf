"""The published document: valid, complete, and kept to by the server, whatever is sent."""

from __future__ import annotations

import collections
import json
import re
from collections.abc import Iterator
from typing import Any

import httpx
import hypothesis
import hypothesis.strategies as st
import pytest
import schemathesis
from schemathesis import Case
from schemathesis.checks import not_a_server_error
from schemathesis.core.failures import FailureGroup
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)
from starlette.routing import Route

from jaxserve.server.app import routes
from jaxserve.server.openapi import OPERATIONS, document
from tests.server.fakes import FakeEngine
from tests.server.harness import MODEL, Served

CHECKS = (
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
)
SCHEMA = schemathesis.openapi.from_dict(document())


def documented(path: str) -> str:
    """As OpenAPI spells a path: starlette's say of what kind a parameter is."""
    return re.sub(r"\{(\w+):\w+\}", r"{\1}", path)


def test_it_is_valid() -> None:
    """By OpenAPI's own schema of its documents."""
    SCHEMA.validate()


def test_every_route_is_in_it() -> None:
    served = {
        (method, documented(route.path))
        for route in routes()
        if isinstance(route, Route) and route.include_in_schema
        for method in (route.methods or ())
        if method != "HEAD"
    }
    assert set(OPERATIONS) == served


def test_names_are_unique_and_used() -> None:
    body = document()
    ids = [one["operationId"] for path in body["paths"].values() for one in path.values()]
    assert len(ids) == len(set(ids))
    assert not [name for name in body["components"]["schemas"] if "__" in name]


def test_it_needs_the_key(keyed: Served) -> None:
    assert httpx.get(f"{keyed.url}/openapi.json").status_code == 401
    assert keyed.http.get("/openapi.json").json() == document()


# --- what the document says, against what the server does ----------------------------------------------

USER = {"role": "user", "content": "a"}
GOOD: dict[str, dict[str, Any]] = {  # bodies that are answered
    "/v1/chat/completions": {"model": MODEL, "messages": [USER], "max_tokens": 3},
    "/v1/responses": {"model": MODEL, "input": "a", "max_output_tokens": 3},
    "/v1/messages": {"model": MODEL, "messages": [USER], "max_tokens": 3},
    "/v1/messages/count_tokens": {"model": MODEL, "messages": [USER]},
    "/v1/completions": {"model": MODEL, "prompt": ["a", "X"], "max_tokens": 3},
    "/v1/embeddings": {"model": MODEL, "input": ["a", "b"]},
    "/tokenize": {"prompt": "a"},
    "/detokenize": {"tokens": [97]},
    "/v1/files": {"purpose": "batch"},
    "/v1/batches": {"endpoint": "/v1/completions", "completion_window": "24h"},
}


@pytest.fixture(scope="module")
def keyed() -> Iterator[Served]:
    served = Served(FakeEngine(), ["secret"])
    served.http.headers["Authorization"] = "Bearer secret"
    yield served
    served.close()


def new_file(served: Served) -> str:
    body = {"model": MODEL, "prompt": "a"}
    line = json.dumps({"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": body})
    reply = served.http.post("/v1/files", data={"purpose": "batch"}, files={"file": ("a.jsonl", line)})
    return str(reply.json()["id"])


def new_batch(served: Served) -> str:
    body = {**GOOD["/v1/batches"], "input_file_id": new_file(served)}
    return str(served.http.post("/v1/batches", json=body).json()["id"])


NEW = {"model": lambda served: MODEL, "file_id": new_file, "batch_id": new_batch}


def mended(case: Case, kept: int, served: Served) -> None:
    """The case with what it needs to be answered, and `kept` of the members that it has beside that."""
    path = case.operation.path
    if isinstance(case.body, dict):
        needed = GOOD[path]
        if path == "/v1/batches":
            needed = {**needed, "input_file_id": new_file(served)}
        if path == "/v1/files":
            needed = {**needed, "file": case.body.get("file", b"x")}
        others = [(name, value) for name, value in case.body.items() if name not in needed]
        case.body = dict(others[:kept]) | needed
    for name in case.path_parameters:
        case.path_parameters[name] = NEW[name](served)
    case.query = {}


OPERATION = pytest.mark.parametrize(
    "operation", [one.ok() for one in SCHEMA.get_all_operations()], ids=lambda one: one.label
)


@OPERATION
def test_answers_are_documented(operation: Any, keyed: Served) -> None:
    run(operation, keyed, examples=8)


@pytest.mark.slow
@OPERATION
def test_many_answers_are_documented(operation: Any, keyed: Served) -> None:
    statuses = run(operation, keyed, examples=100)
    assert statuses[200], statuses


@pytest.mark.parametrize(
    ("path", "model", "member"),
    [("/tokenize", "Tokens", "count"), ("/v1/completions", "Completion", "choices")],
    ids=["a reply", "a stream's events"],
)
def test_an_undocumented_member_is_found(keyed: Served, path: str, model: str, member: str) -> None:
    wrong = document()
    schema = wrong["components"]["schemas"][model]
    del schema["properties"][member]
    schema["required"].remove(member)
    operation = schemathesis.openapi.from_dict(wrong)[path]["POST"]
    body = {**GOOD[path], "stream": True} if path == "/v1/completions" else GOOD[path]
    case = operation.Case(body=body, media_type="application/json")
    case.headers["Authorization"] = "Bearer secret"
    with pytest.raises(FailureGroup, match="violates"):
        case.call_and_validate(base_url=keyed.url, checks=CHECKS)


def run(operation: Any, served: Served, *, examples: int) -> collections.Counter[int]:
    """How often it answered with which status. The same cases each time."""
    statuses = collections.Counter[int]()

    @hypothesis.given(case=operation.as_strategy(), kept=st.one_of(st.none(), st.integers(0, 2)))
    @hypothesis.settings(
        max_examples=examples,
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    def check(case: Case, kept: int | None) -> None:
        case.headers["Authorization"] = "Bearer secret"
        if kept is not None:
            mended(case, kept, served)
        elif isinstance(case.body, dict) and "model" in case.body:
            case.body["model"] = MODEL
        response = case.call(base_url=served.url)
        statuses[response.status_code] += 1
        case.validate_response(response, checks=CHECKS)

    check()
    served.as_new()
    return statuses
