"""`/v1/messages`, with Anthropic's own client and its models of every event."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import anthropic
import httpx
import pydantic
import pytest
from anthropic.types import RawMessageStreamEvent

from tests.server.fakes import FakeEngine
from tests.server.harness import MODEL, Serve, Served, until

EVENT: pydantic.TypeAdapter[Any] = pydantic.TypeAdapter(RawMessageStreamEvent)
USER = {"role": "user", "content": "X"}
TOOL = {
    "name": "weather",
    "description": "of a town",
    "input_schema": {"type": "object", "properties": {"town": {"type": "string"}}, "required": ["town"]},
}


@pytest.fixture
def claude(served: Served) -> Iterator[anthropic.Anthropic]:
    with client(served) as one:
        yield one


def client(served: Served, *, key: str = "none", max_retries: int = 0) -> anthropic.Anthropic:
    return anthropic.Anthropic(base_url=served.url, api_key=key, max_retries=max_retries, timeout=20)


def post(served: Served, path: str = "/v1/messages", **fields: Any) -> httpx.Response:
    body = {"model": MODEL, "max_tokens": 4, "messages": [USER], **fields}
    return served.http.post(path, json=body)


def stream(served: Served, **fields: Any) -> list[dict[str, Any]]:
    """The events, each checked against the client's model of it."""
    events = []
    reply = post(served, stream=True, **fields)
    assert reply.status_code == 200
    for block in reply.text.removesuffix("\n\n").split("\n\n"):
        name, data = block.split("\n")
        event = json.loads(data.removeprefix("data: "))
        assert name == f"event: {event['type']}"
        if event["type"] != "ping":
            EVENT.validate_python(event)
        events.append(event)
    return events


def test_a_text(claude: anthropic.Anthropic) -> None:
    message = claude.messages.create(
        model=MODEL,
        max_tokens=10,
        system="be short",
        messages=[{"role": "user", "content": "X"}],
        metadata={"user_id": "me"},
    )
    [block] = message.content
    assert block.type == "text"
    assert block.text == "YZ"
    assert (message.stop_reason, message.stop_sequence, message.role) == ("end_turn", None, "assistant")
    usage = message.usage
    assert usage.input_tokens + (usage.cache_read_input_tokens or 0) == 1 + 8 + 1 + 1 + 1
    assert usage.output_tokens == 3
    assert usage.service_tier == "standard"


def test_the_model_of_either_client(served: Served, claude: anthropic.Anthropic) -> None:
    [model] = claude.models.list()
    assert model == claude.models.retrieve(MODEL)
    assert (model.id, model.type, model.display_name) == (MODEL, "model", MODEL)
    [same] = served.openai.models.list()
    assert int(model.created_at.timestamp()) == same.created


def test_max_tokens_and_stop_sequences(claude: anthropic.Anthropic) -> None:
    cut = claude.messages.create(model=MODEL, max_tokens=3, messages=[{"role": "user", "content": "a"}])
    assert cut.stop_reason == "max_tokens"
    stopped = claude.messages.create(
        model=MODEL, max_tokens=9, messages=[{"role": "user", "content": "a"}], stop_sequences=["de", "zz"]
    )
    assert (stopped.stop_reason, stopped.stop_sequence) == ("stop_sequence", "de")
    [block] = stopped.content
    assert block.type == "text"
    assert block.text == "bc"


def test_the_events(served: Served) -> None:
    events = stream(served)
    assert [event["type"] for event in events] == [
        "message_start",
        "ping",
        "content_block_start",
        "content_block_delta",
        "content_block_delta",
        "content_block_stop",
        "message_delta",
        "message_stop",
    ]
    assert events[0]["message"]["content"] == []
    assert events[-2]["delta"] == {"stop_reason": "end_turn", "stop_sequence": None}
    assert events[-2]["usage"]["output_tokens"] == 3


def test_the_clients_own_stream(claude: anthropic.Anthropic) -> None:
    with claude.messages.stream(
        model=MODEL, max_tokens=9, messages=[{"role": "user", "content": "X"}]
    ) as events:
        assert "".join(events.text_stream) == "YZ"
        final = events.get_final_message()
    assert (final.stop_reason, final.usage.output_tokens) == ("end_turn", 3)


def test_parse(serve: Serve) -> None:
    class Town(pydantic.BaseModel):
        name: str

    served = serve(FakeEngine(script='{"name": "Ulm"}'))
    with client(served) as claude:
        reply = claude.messages.parse(
            model=MODEL, max_tokens=50, messages=[{"role": "user", "content": "a"}], output_format=Town
        )
    assert reply.parsed_output == Town(name="Ulm")
    wanted = served.engine.requests[-1].params.structured_outputs
    assert wanted is not None
    assert json.loads(str(wanted.json))["required"] == ["name"]


def test_a_conversation_in_blocks(served: Served) -> None:
    """What the fake's template makes of it: each message's role and text."""
    reply = post(
        served,
        system=[{"type": "text", "text": "be kind", "cache_control": {"type": "ephemeral"}}],
        messages=[
            {"role": "user", "content": [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]},
            {"role": "assistant", "content": [{"type": "text", "text": "hi", "citations": None}]},
            USER,
        ],
    )
    assert reply.status_code == 200, reply.text
    ids = served.engine.requests[-1].prompt_token_ids.tolist()
    assert served.engine.tokenizer is not None
    text = served.engine.tokenizer.decode(ids, skip_special_tokens=False)
    assert text == "<system>be kind<user>one\ntwo<assistant>hi<user><assistant>X"


def test_count_tokens(served: Served, claude: anthropic.Anthropic) -> None:
    messages: list[Any] = [{"role": "user", "content": "X"}]
    count = claude.messages.count_tokens(model=MODEL, system="be short", messages=messages).input_tokens
    usage = claude.messages.create(model=MODEL, max_tokens=1, system="be short", messages=messages).usage
    assert count == usage.input_tokens + (usage.cache_read_input_tokens or 0) == 12
    long = claude.messages.count_tokens(model=MODEL, messages=[{"role": "user", "content": "a" * 1000}])
    assert long.input_tokens == 1002  # more than the context holds
    reply = post(served, "/v1/messages/count_tokens", max_tokens=None, messages=[])
    assert reply.json()["error"]["message"].startswith("messages: ")


def test_its_place(serve: Serve) -> None:
    served = serve(FakeEngine())
    post(
        served, service_tier="standard_only", priority=2, cache_salt="s", timeout=9, top_k=3, temperature=0.5
    )
    reply = post(served, service_tier="flex")
    assert reply.json()["usage"]["service_tier"] == "batch"
    one, other = served.engine.requests
    assert (one.tier, one.priority, one.params.top_k, one.params.temperature) == ("online", 2, 3, 0.5)
    assert other.tier == "batch"
    assert other.salt != one.salt


BAD: list[tuple[dict[str, Any], str]] = [
    ({"messages": None}, "messages is required"),
    ({"messages": []}, "at least 1 item"),
    ({"messages": "X"}, "messages: Input should be a valid list"),
    ({"messages": ["X"]}, "messages[0]"),
    ({"messages": [{"role": "tool", "content": "X"}]}, "messages[0].role"),
    ({"messages": [{"role": "user"}]}, "messages[0].content is required"),
    ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content"),
    ({"messages": [{"role": "user", "content": [5]}]}, "messages[0].content[0]: must be an object"),
    (
        {
            "messages": [
                {
                    "role": "user",
                    "content": [
                        {"type": "image", "source": {"type": "url", "url": "http://169.254.169.254/"}}
                    ],
                }
            ]
        },
        "messages[0].content[0]: blocks of the type 'image' are not supported",
    ),
    (
        {
            "messages": [
                {"role": "user", "content": [{"type": "tool_use", "id": "a", "name": "f", "input": {}}]}
            ]
        },
        "has no blocks of the type 'tool_use'",
    ),
    (
        {
            "messages": [
                USER,
                {"role": "assistant", "content": [{"type": "tool_use", "id": "a", "name": "f"}]},
            ]
        },
        "messages[1].content[0].input is required",
    ),
    ({"messages": [USER] * 5000}, "at most 4096"),
    ({"max_tokens": None}, "max_tokens is required"),
    ({"max_tokens": 0}, "max_tokens: Input should be greater than or equal to 1"),
    ({"max_tokens": -1}, "max_tokens: Input should be greater than or equal to 1"),
    ({"max_tokens": 1000}, "max_tokens=1000"),
    ({"max_tokens": 1.5}, "max_tokens: Input should be a valid integer"),
    ({"system": 5}, "system: Input should be a valid list"),
    ({"system": [{"type": "image"}]}, "system[0]: blocks of the type 'image'"),
    ({"temperature": -1}, "temperature=-1"),
    ({"top_p": 2}, "top_p=2"),
    ({"top_k": -5}, "top_k=-5"),
    ({"stop_sequences": ["x"] * 17}, "stop_sequences"),
    ({"stop_sequences": [""]}, "non-empty"),
    ({"stop_sequences": "x"}, "stop_sequences: Input should be a valid list"),
    ({"metadata": {"name": "me"}}, "unknown field: metadata.name"),
    ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "only the client's own are"),
    ({"tools": [{"name": "f"}]}, "tools[0].input_schema is required"),
    ({"tools": [TOOL] * 129}, "at most 128"),
    ({"tool_choice": {"type": "tool"}}, "a name goes with"),
    ({"tool_choice": {"type": "often"}}, "tool_choice.type"),
    ({"tool_choice": "auto"}, "tool_choice"),
    ({"thinking": {"type": "enabled", "budget_tokens": 1024}}, "thinking"),
    ({"output_config": {"format": {"type": "xml"}}}, "output_config.format.type"),
    ({"output_config": {"effort": "huge"}}, "output_config.effort"),
    ({"mcp_servers": []}, "mcp_servers is not supported"),
    ({"container": "x"}, "container is not supported"),
    ({"speed": "fast"}, "speed"),
    ({"service_tier": "scale"}, "service_tier"),
    ({"often": 1}, "unknown field: 'often'"),
]


@pytest.mark.parametrize(("fields", "message"), BAD, ids=[str(one[0])[:60] for one in BAD])
def test_bad_input(served: Served, fields: dict[str, Any], message: str) -> None:
    reply = post(served, **fields)
    assert reply.status_code == 400, reply.text
    body = reply.json()
    assert body["type"] == "error"
    assert body["error"]["type"] == "invalid_request_error"
    assert message in body["error"]["message"], body


def test_errors_as_the_client_knows_them(serve: Serve, claude: anthropic.Anthropic) -> None:
    with pytest.raises(anthropic.NotFoundError) as unknown:
        claude.messages.create(model="gpt-5", max_tokens=1, messages=[{"role": "user", "content": "a"}])
    assert unknown.value.type == "not_found_error"
    keyed = serve(FakeEngine(), keys=["secret"])
    with client(keyed, key="wrong") as stranger, pytest.raises(anthropic.AuthenticationError) as denied:
        stranger.messages.create(model=MODEL, max_tokens=1, messages=[{"role": "user", "content": "a"}])
    assert denied.value.type == "authentication_error"
    with client(keyed, key="secret") as friend:
        friend.messages.create(model=MODEL, max_tokens=1, messages=[{"role": "user", "content": "a"}])
    loading = serve(None)
    with client(loading) as early, pytest.raises(anthropic.InternalServerError) as not_yet:
        early.messages.create(model=MODEL, max_tokens=1, messages=[{"role": "user", "content": "a"}])
    assert not_yet.value.status_code == 503


def test_an_error_names_its_request(served: Served) -> None:
    reply = post(served, max_tokens=0)
    assert reply.json()["request_id"] == reply.headers["request-id"] == reply.headers["x-request-id"]
    assert post(served).headers["request-id"]


def test_a_full_queue_is_tried_again(serve: Serve) -> None:
    served = serve(FakeEngine(retry_after=1))
    served.engine.busy = 1
    with client(served) as claude, pytest.raises(anthropic.RateLimitError) as busy:
        claude.messages.create(model=MODEL, max_tokens=1, messages=[{"role": "user", "content": "a"}])
    assert busy.value.type == "rate_limit_error"
    assert busy.value.response.headers["retry-after"] == "1"
    served.engine.busy = 1
    with client(served, max_retries=1) as claude:
        claude.messages.create(model=MODEL, max_tokens=1, messages=[{"role": "user", "content": "a"}])


def test_a_large_body(serve: Serve) -> None:
    served = serve(FakeEngine(), max_body_bytes=1000)
    reply = post(served, system="x" * 2000)
    assert reply.status_code == 413
    assert reply.json()["error"]["type"] == "request_too_large"


def test_a_failing_engine_ends_the_stream(serve: Serve) -> None:
    engine = FakeEngine(delay=0.02)
    served = serve(engine)
    with client(served) as claude, pytest.raises(anthropic.APIStatusError, match="the device is gone"):  # noqa: SIM117
        with claude.messages.stream(
            model=MODEL, max_tokens=100, messages=[{"role": "user", "content": "a"}]
        ) as events:
            for _ in events.text_stream:
                engine.fail_next = RuntimeError("the device is gone")


def test_a_client_that_leaves_aborts(serve: Serve) -> None:
    served = serve(FakeEngine(delay=0.02))
    for streaming in (True, False):
        body = {"model": MODEL, "max_tokens": 200, "messages": [{"role": "user", "content": "a"}]}
        connection = served.connect("/v1/messages", json.dumps({**body, "stream": streaming}).encode())
        until(lambda: served.engine.stats()["running"] == 1)
        connection.close()
        until(lambda: served.engine.stats()["running"] == 0)
    assert sum(what == "abort" for _, what, _ in served.engine.events) == 2
    served.as_new()
