"""`/v1/embeddings`: vectors of length 1, however they are asked for and spelled."""

from __future__ import annotations

import base64
from typing import Any

import numpy as np
import pytest

from jaxserve.server.api.embeddings import MAX_INPUTS, MAX_TOKENS
from tests.fakes import EMBEDDING_SIZE, VOCABULARY
from tests.server.fakes import FakeEngine
from tests.server.harness import MODEL, Serve, Served, until


def by_hand(ids: list[int], pooling: str = "last") -> list[float]:
    """The fake's counts of remainders, divided by their length."""
    counts = [0.0] * EMBEDDING_SIZE
    for token in ids[-1:] if pooling == "last" else ids:
        counts[token % EMBEDDING_SIZE] += 1.0
    length = sum(count * count for count in counts) ** 0.5
    return [count / length for count in counts]


def post(served: Served, **fields: Any) -> Any:
    return served.http.post("/v1/embeddings", json={"model": MODEL, "input": "abc", **fields})


@pytest.mark.parametrize(
    ("given", "ids"),
    [
        ("abc", [[97, 98, 99]]),
        ([97, 98, 99], [[97, 98, 99]]),
        (["abc", "d"], [[97, 98, 99], [100]]),
        ([[97], [98, 99]], [[97], [98, 99]]),
    ],
)
@pytest.mark.parametrize("pooling", ["last", "mean"])
def test_every_form_of_input_and_pooling(
    served: Served, given: Any, ids: list[list[int]], pooling: str
) -> None:
    body = post(served, input=given, pooling=pooling).json()
    assert body["pooling"] == pooling
    assert [item["index"] for item in body["data"]] == list(range(len(ids)))
    for item, one in zip(body["data"], ids, strict=True):
        assert item["object"] == "embedding"
        np.testing.assert_allclose(item["embedding"], by_hand(one, pooling), atol=1e-6)
    count = sum(map(len, ids))
    assert body["usage"] == {"prompt_tokens": count, "total_tokens": count}


def test_the_openai_client(served: Served) -> None:
    """It asks for base64 unless told otherwise, and decodes it."""
    for extra in ({}, {"encoding_format": "float"}, {"dimensions": EMBEDDING_SIZE}):
        reply = served.openai.embeddings.create(model=MODEL, input=["a", "bc"], **extra)  # type: ignore[arg-type]
        assert reply.model == MODEL
        np.testing.assert_allclose(reply.data[0].embedding, by_hand([97]), atol=1e-6)
        np.testing.assert_allclose(reply.data[1].embedding, by_hand([99]), atol=1e-6)
        assert reply.usage.total_tokens == 3


def test_the_models_entry_states_size_and_pooling(served: Served) -> None:
    [model] = served.http.get("/v1/models").json()["data"]
    assert (model["embedding_size"], model["embedding_pooling"]) == (EMBEDDING_SIZE, "last")


def test_base64_is_little_endian_f32(served: Served) -> None:
    item = post(served, encoding_format="base64", pooling="mean").json()["data"][0]
    vector = np.frombuffer(base64.b64decode(item["embedding"]), "<f4")
    np.testing.assert_allclose(vector, by_hand([97, 98, 99], "mean"), atol=1e-6)
    assert abs(float(np.linalg.norm(vector)) - 1.0) < 1e-6


def test_a_long_reply_is_sent_in_pieces(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jaxserve.server.api.embeddings.PIECE_FLOATS", 8)
    served = serve(FakeEngine())
    reply = post(served, input=["a", "b", "c"])
    assert reply.headers["transfer-encoding"] == "chunked"
    assert [max(range(8), key=item["embedding"].__getitem__) for item in reply.json()["data"]] == [1, 2, 3]


def test_place_and_pooling_reach_the_engine(serve: Serve) -> None:
    served = serve(FakeEngine(), keys=["k"])
    served.openai.embeddings.create(
        model=MODEL,
        input="a",
        extra_body={
            "service_tier": "flex",
            "priority": 3,
            "timeout": 9,
            "cache_salt": "s",
            "pooling": "mean",
        },
    )
    served.openai.embeddings.create(model=MODEL, input="a")
    one, other = served.engine.requests
    assert (one.tier, one.priority, one.pooling) == ("batch", 3, "mean")
    assert one.deadline is not None
    assert other.pooling == "last"
    assert one.salt != other.salt


BAD: list[tuple[dict[str, Any], str | None, str]] = [
    ({"input": ""}, "input", "empty"),
    ({"input": []}, "input", "empty"),
    ({"input": ["a", ""]}, "input", "empty"),
    ({"input": [[]]}, "input", "empty"),
    ({"input": 5}, "input", "must be a string"),
    ({"input": {"a": 1}}, "input", "must be a string"),
    ({"input": ["a", [1]]}, "input[1]", "mixes"),
    ({"input": [[1], "a"]}, "input[1]", "mixes"),
    ({"input": [1, "a"]}, "input", "must be integers"),
    ({"input": [True]}, "input", "must be integers"),
    ({"input": [[1.5]]}, "input[0]", "must be integers"),
    ({"input": [VOCABULARY]}, "input", f"token id {VOCABULARY}"),
    ({"input": ["a"] * (MAX_INPUTS + 1)}, "input", f"at most {MAX_INPUTS}"),
    ({"input": [1] * (MAX_TOKENS + 1)}, "input", f"at most {MAX_TOKENS}"),
    ({"input": ["a" * 200] * 1501}, "input", f"more than {MAX_TOKENS} tokens together"),
    ({"input": "a" * 257}, "input", "the context is 256"),
    ({"dimensions": 4}, "dimensions", "the embeddings have 8"),
    ({"dimensions": 0}, "dimensions", "the embeddings have 8"),
    ({"dimensions": "8"}, "dimensions", "integer"),
    ({"encoding_format": "int8"}, "encoding_format", "'float' or 'base64'"),
    ({"pooling": "max"}, "pooling", "'last' or 'mean'"),
    ({"stream": True}, "stream", "unknown field"),
    ({"model": "gpt-5"}, "model", "does not exist"),
    ({"timeout": 0}, "timeout", "greater than 0"),
    ({"service_tier": "scale"}, "service_tier", "must be one of"),
]


@pytest.mark.parametrize(("fields", "param", "message"), BAD, ids=[str(one[0])[:40] for one in BAD])
def test_bad_input(served: Served, fields: dict[str, Any], param: str | None, message: str) -> None:
    reply = post(served, **fields)
    assert reply.status_code == (404 if param == "model" else 400)
    error = reply.json()["error"]
    assert error["param"] == param
    assert message in error["message"]


def test_an_engine_without_embeddings(serve: Serve) -> None:
    engine = FakeEngine()
    del engine.facts["embedding_size"]
    reply = post(serve(engine))
    assert reply.status_code == 400
    assert reply.json()["error"]["code"] == "unsupported_endpoint"


def test_a_client_that_leaves_aborts_all_inputs(serve: Serve) -> None:
    engine = FakeEngine(slots=1, delay=0.05)
    served = serve(engine)
    connection = served.connect("/v1/embeddings", b'{"model":"alphabet","input":["a","b","c","d","e","f"]}')
    until(lambda: len(engine.requests) == 6)
    connection.close()
    until(lambda: sum(what == "abort" for _, what, _ in engine.events) == 6)
    served.as_new()
