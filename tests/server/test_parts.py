"""What a body may hold, how many large ones are worked on at a time, and what is told before it is read."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Mapping
from random import Random
from typing import Any

import orjson
import pytest
from starlette.types import Message

from jaxserve.server import body, parts
from jaxserve.server.api import job
from jaxserve.server.api.fields import Caller
from jaxserve.server.body import parse_object, read_body
from jaxserve.server.errors import ApiError
from jaxserve.server.holder import EngineHolder
from tests.server.fakes import FakeEngine

# --- counted before they are read ---


def slow_counts(text: str) -> dict[str, int]:
    """By one character after the other."""
    counts = dict.fromkeys(parts.BOUNDS, 0)
    inside = escaped = False
    for character in text:
        if escaped:
            escaped = False
        elif character == "\\":
            escaped = True
        elif character == '"':
            inside = not inside
            counts["quotation marks"] += 1
        elif not inside:
            for what, (marks, _) in parts.BOUNDS.items():
                counts[what] += character.encode() in marks if character in "[{:," else 0
    return counts


def any_json(random: Random, depth: int = 0) -> Any:
    kind = random.randrange(6 if depth < 4 else 3)
    if kind < 3:
        text = "".join(random.choices('",:[{\\aé\n', k=random.randrange(12)))
        return random.choice((text, random.randrange(1000), None))
    if kind < 5:
        return [any_json(random, depth + 1) for _ in range(random.randrange(5))]
    return {
        "".join(random.choices('",:[{\\a', k=3)): any_json(random, depth + 1)
        for _ in range(random.randrange(5))
    }


@pytest.mark.parametrize("seed", range(20))
def test_counts_are_those_of_a_slow_reader(monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    random = Random(seed)
    monkeypatch.setattr(parts, "SLICE", random.choice((1, 3, 8, 1000)))
    text = orjson.dumps([any_json(random) for _ in range(50)]).decode()
    for what, count in slow_counts(text).items():
        marks = parts.BOUNDS[what][0]
        monkeypatch.setattr(parts, "BOUNDS", {what: (marks, count)})
        parts.check_parts(text.encode())
        monkeypatch.setattr(parts, "BOUNDS", {what: (marks, count - 1)})
        with pytest.raises(ApiError, match=f"more than {count - 1} {what}"):
            parts.check_parts(text.encode())
        monkeypatch.undo()
        monkeypatch.setattr(parts, "SLICE", random.choice((1, 3, 8, 1000)))


MANY = {
    "objects": b'{"prompt":[' + b"{}," * 2**18 + b"{}]}",
    "lists": b'{"prompt":[' + b"[]," * 2**18 + b"[]]}",
    "members": b'{"metadata":{' + b'"a":0,' * 2**19 + b'"b":0}}',
    "texts": b'{"prompt":[' + b'"a",' * 2**20 + b'"b"]}',
    "numbers": b'{"prompt":[' + b"1," * 2**22 + b"1]}",
    "no JSON": b'{"prompt":[' + b"[]," * 2**18 + b'[]],"temperature":NaN}',
}


@pytest.mark.parametrize("data", MANY.values(), ids=MANY.keys())
def test_too_many_parts_are_never_read(monkeypatch: pytest.MonkeyPatch, data: bytes) -> None:
    def read(data: bytes) -> Any:
        raise AssertionError("it was read")

    monkeypatch.setattr(body.orjson, "loads", read)
    with pytest.raises(ApiError) as caught:
        parse_object(data)
    assert (caught.value.status, caught.value.code) == (400, "too_many_parts")


LARGE: dict[str, dict[str, Any]] = {
    "a million token ids": {"tokens": [50_000] * 2**20},
    "prompts of token ids": {"prompt": [[12345] * 1000] * 2000},
    "a text of marks": {"prompt": '[{"a": [1, 2]}, "\\\\"]\n' * 300_000},
    "a long conversation": {"messages": [{"role": "user", "content": "a, b: [c]" * 100}] * 4096},
    "choices": {"guided_choice": [f"choice {number}" for number in range(2**15)]},
}


@pytest.mark.parametrize("fields", LARGE.values(), ids=LARGE.keys())
def test_what_is_merely_large_is_read(fields: dict[str, Any]) -> None:
    assert parse_object(orjson.dumps(fields)) == fields


# --- numbers that are none ---


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ('{"n": 1, "top_p" : \n NaN , "seed": 5}', "top_p=nan"),
        ('{"top_p": -Infinity}', "top_p=-inf"),
        ('{"prompt": "é", "top_p": -1e999, ', "top_p=-inf"),
        ('{"prompt": "\\"top_k\\": ", "stop": ["a"], "top_p": 1.5E+400}', "top_p=inf"),
    ],
)
def test_the_field_of_a_number_that_is_none(text: str, shown: str) -> None:
    with pytest.raises(ApiError, match=f"^{shown} must be a finite number$") as caught:
        parse_object(text.encode())
    assert caught.value.param == "top_p"


@pytest.mark.parametrize(
    "text",
    ['{"a": [NaN]}', '{"a": {"b": NaN}}', '{"a": NaN', "[NaN]", "NaN", '{"a b": NaN}', '{"a": Nan}', "{NaN}"],
)
def test_others_are_no_json(text: str) -> None:
    with pytest.raises(ApiError) as caught:
        parse_object(text.encode())
    if text != '{"a": NaN':  # that names the field as well
        assert (caught.value.code, caught.value.param) == ("invalid_json", None)


# --- a few at a time ---


def test_large_bodies_are_few_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many come; small ones do not wait for them, and those for whom there is no room are told."""
    large = orjson.dumps({"prompt": "a" * 2 * job.LARGE_BYTES})
    monkeypatch.setattr(job, "LARGE", job.Room(5 * len(large)))
    goes_on = threading.Event()
    lock = threading.Lock()
    running = most = 0

    def prepare(body: Mapping[str, Any], *_: object) -> int:
        nonlocal running, most
        if len(body["prompt"]) == 1:
            return 1
        with lock:
            running += 1
            most = max(most, running)
        goes_on.wait(20)
        with lock:
            running -= 1
        return 2

    async def one(data: bytes) -> int:
        return await job.prepared(
            data, prepare, FakeEngine(), lambda name: None, Caller(), always_on_thread=True
        )

    async def main() -> None:
        waiting = [asyncio.create_task(one(large)) for _ in range(5)]
        await asyncio.sleep(0)
        with pytest.raises(ApiError) as caught:
            await one(large)
        assert caught.value.status == 503 and caught.value.headers is not None
        assert "Retry-After" in caught.value.headers
        assert await one(b'{"prompt":"a"}') == 1
        goes_on.set()
        assert await asyncio.gather(*waiting) == [2] * 5
        assert await one(large) == 2

    asyncio.run(main())
    assert most <= 2


# --- what need not wait ---


def test_a_body_is_late_by_the_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where each piece of it is there when it is asked for, so that no timer comes in between."""
    monkeypatch.setattr(body, "BODY_SECONDS", 0.0)
    pieces = 0

    async def receive() -> Message:
        nonlocal pieces
        pieces += 1
        return {"type": "http.request", "body": b" ", "more_body": pieces < 10_000}

    with pytest.raises(ApiError) as caught:
        asyncio.run(read_body({"type": "http", "headers": []}, receive))
    assert caught.value.status == 408
    assert pieces < 100


def test_a_models_name_is_not_repeated_at_length() -> None:
    holder = EngineHolder()
    for length in (100, 128, 129, 10**6):
        with pytest.raises(ApiError) as caught:
            holder.check_model("x" * length)
        assert ("x" * length in caught.value.message) == (length <= 128)
        assert len(caught.value.message) < 256
