"""`/v1/responses`, with OpenAI's own client and its models of every event."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

import openai
import pydantic
import pytest
from openai.types.responses import Response, ResponseStreamEvent

from tests.server.fakes import FakeEngine
from tests.server.harness import MODEL, Serve, Served, until

EVENT: pydantic.TypeAdapter[Any] = pydantic.TypeAdapter(ResponseStreamEvent)
TOOL = {
    "type": "function",
    "name": "weather",
    "description": "of a town",
    "parameters": {"type": "object", "properties": {"town": {"type": "string"}}, "required": ["town"]},
}


def post(served: Served, **fields: Any) -> Any:
    body = {"model": MODEL, "input": "a", "max_output_tokens": 4, **fields}
    return served.http.post("/v1/responses", json=body)


def stream(served: Served, **fields: Any) -> list[dict[str, Any]]:
    """The events, each checked against the client's model of it."""
    events = []
    reply = post(served, stream=True, **fields)
    assert reply.status_code == 200
    assert reply.headers["content-type"] == "text/event-stream; charset=utf-8"
    for block in reply.text.removesuffix("\n\n").split("\n\n"):
        name, data = block.split("\n")
        event = json.loads(data.removeprefix("data: "))
        assert name == f"event: {event['type']}"
        EVENT.validate_python(event)
        assert (
            json.loads(EVENT.dump_json(EVENT.validate_python(event), by_alias=True))["type"] == event["type"]
        )
        events.append(event)
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    return events


def kinds(events: Iterable[dict[str, Any]]) -> list[str]:
    """Their types without the prefix, repeated ones once."""
    found: list[str] = []
    for event in events:
        kind = event["type"].removeprefix("response.")
        if not found or found[-1] != kind:
            found.append(kind)
    return found


def test_a_text(served: Served) -> None:
    reply = served.openai.responses.create(model=MODEL, input="x", temperature=0, max_output_tokens=30)
    assert reply.output_text == "yzabcdefghijklmnopqrstuvwxyzab"
    assert (reply.status, reply.object, reply.model) == ("incomplete", "response", MODEL)
    assert reply.incomplete_details is not None
    assert reply.incomplete_details.reason == "max_output_tokens"
    assert reply.usage is not None
    assert (reply.usage.input_tokens, reply.usage.output_tokens, reply.usage.total_tokens) == (3, 30, 33)
    assert reply.temperature == 0
    Response.model_validate(reply.model_dump(by_alias=True), strict=False)


def test_it_completes(served: Served) -> None:
    reply = served.openai.responses.create(
        model=MODEL, input="X", instructions="be short", metadata={"a": "b"}, user="me"
    )
    assert (reply.status, reply.output_text) == ("completed", "YZ")
    assert (reply.instructions, reply.metadata, reply.user) == ("be short", {"a": "b"}, "me")
    assert reply.completed_at is not None
    assert reply.incomplete_details is None
    [item] = reply.output
    assert (item.type, item.status) == ("message", "completed")


def test_the_whole_sequence_of_events(served: Served) -> None:
    events = stream(served, input="X")
    assert kinds(events) == [
        "created",
        "in_progress",
        "output_item.added",
        "content_part.added",
        "output_text.delta",
        "output_text.done",
        "content_part.done",
        "output_item.done",
        "completed",
    ]
    assert "".join(e["delta"] for e in events if e["type"].endswith("text.delta")) == "YZ"
    assert events[0]["response"]["output"] == []
    assert events[2]["item"]["content"] == []
    assert events[-1]["response"]["output"][0]["content"][0]["text"] == "YZ"


def test_a_stream_says_what_the_reply_says(served: Served) -> None:
    fields = {"input": "X", "include": ["message.output_text.logprobs"], "top_logprobs": 2}
    whole = post(served, **fields).json()
    streamed = stream(served, **fields)[-1]["response"]
    for body in (whole, streamed):
        for item in body["output"]:
            del item["id"]
        for name in ("id", "created_at", "completed_at", "usage"):
            del body[name]
    assert streamed == whole


def test_logprobs(served: Served) -> None:
    reply = served.openai.responses.create(
        model=MODEL, input="X", include=["message.output_text.logprobs"], top_logprobs=2
    )
    [item] = reply.output
    assert item.type == "message"
    [part] = item.content
    assert part.type == "output_text"
    assert part.logprobs is not None
    assert [entry.token for entry in part.logprobs] == ["Y", "Z", "<end>"]
    assert part.logprobs[0].bytes == [ord("Y")]
    assert [entry.token for entry in part.logprobs[0].top_logprobs] == ["Y", "Z"]
    deltas = [e for e in stream(served, input="X", include=["message.output_text.logprobs"]) if "delta" in e]
    assert [entry["token"] for event in deltas for entry in event["logprobs"]] == ["Y", "Z", "<end>"]


def test_the_clients_own_stream(served: Served) -> None:
    with served.openai.responses.stream(model=MODEL, input="X") as events:
        seen = [event.type for event in events]
        final = events.get_final_response()
    assert final.output_text == "YZ"
    assert "response.output_text.delta" in seen


def test_parse(serve: Serve) -> None:
    class Town(pydantic.BaseModel):
        name: str

    served = serve(FakeEngine(script='{"name": "Ulm"}'))
    reply = served.openai.responses.parse(model=MODEL, input="a", text_format=Town)
    assert reply.output_parsed == Town(name="Ulm")
    wanted = served.engine.requests[-1].params.structured_outputs
    assert wanted is not None
    assert json.loads(str(wanted.json))["required"] == ["name"]
    with served.openai.responses.stream(model=MODEL, input="b", text_format=Town) as events:
        assert events.get_final_response().output_parsed == Town(name="Ulm")


def test_json_object(served: Served) -> None:
    reply = post(served, text={"format": {"type": "json_object"}})
    assert reply.json()["text"] == {"format": {"type": "json_object"}}
    wanted = served.engine.requests[-1].params.structured_outputs
    assert wanted is not None
    assert wanted.json_object


def test_a_conversation_in_items(served: Served) -> None:
    """What the fake's template makes of it: each message's role and text."""
    items = [
        {"role": "developer", "content": "be kind"},
        {"role": "user", "content": [{"type": "input_text", "text": "hello"}]},
        {
            "type": "message",
            "id": "msg_1",
            "status": "completed",
            "role": "assistant",
            "content": [{"type": "output_text", "text": "hi", "annotations": [], "logprobs": None}],
        },
        {"type": "message", "role": "user", "content": "X"},
    ]
    reply = post(served, input=items)
    assert reply.json()["output"][0]["content"][0]["text"] == "YZ"
    ids = served.engine.requests[-1].prompt_token_ids.tolist()
    assert served.engine.tokenizer is not None
    text = served.engine.tokenizer.decode(ids, skip_special_tokens=False)
    assert text == "<system>be kind<user>hello<assistant>hi<user><assistant>X"


def test_its_own_output_goes_back_in(served: Served) -> None:
    first = served.openai.responses.create(model=MODEL, input="X")
    again = served.openai.responses.create(
        model=MODEL,
        input=[{"role": "user", "content": "X"}, *first.output, {"role": "user", "content": "A"}],  # type: ignore[list-item]
        max_output_tokens=2,
    )
    assert again.output_text == "BC"


USER = {"role": "user", "content": "a"}
BAD: list[tuple[dict[str, Any], str | None, str]] = [
    ({"input": None}, "input", "required"),
    ({"input": 5}, "input", "a string or a list"),
    ({"input": []}, "input", "at least 1"),
    ({"input": ["a"]}, "input[0]", "must be an object"),
    ({"input": [{"role": "king", "content": "a"}]}, "input[0].role", "'user'"),
    ({"input": [{"role": "user"}]}, "input[0].content", "required"),
    ({"input": [{"role": "user", "content": 5}]}, "input[0].content", "valid list"),
    ({"input": [{**USER, "often": 1}]}, "input[0].often", "unknown field"),
    (
        {
            "input": [
                {"role": "user", "content": [{"type": "input_image", "image_url": "file:///etc/passwd"}]}
            ]
        },
        "input[0].content[0].type",
        "only text is served",
    ),
    (
        {"input": [{"role": "user", "content": [{"type": "input_text"}]}]},
        "input[0].content[0]",
        "has a text",
    ),
    ({"input": [{"type": "item_reference", "id": "msg_1"}]}, "input[0]", "not supported"),
    ({"input": [{"type": "web_search_call", "id": "x"}]}, "input[0]", "not supported"),
    ({"input": [{"type": "function_call_output", "output": "a"}]}, "input[0].call_id", "required"),
    (
        {"input": [{"type": "reasoning", "encrypted_content": "x"}]},
        "input[0].encrypted_content",
        "not supported",
    ),
    ({"input": [USER] * 5000}, "input", "at most 4096"),
    ({"input": "a" * 300}, "input", "302 tokens; the context is 256"),
    ({"max_output_tokens": 0}, "max_output_tokens", "greater than or equal to 1"),
    ({"max_output_tokens": 255}, "max_output_tokens", "255"),
    ({"max_output_tokens": -1}, "max_output_tokens", "greater than or equal to 1"),
    ({"temperature": 101}, "temperature", "must lie in"),
    ({"top_p": 0}, "top_p", "must lie in"),
    ({"top_logprobs": 2}, "top_logprobs", "include"),
    ({"include": ["message.output_text.logprobs"], "top_logprobs": 21}, "top_logprobs", "must lie in"),
    ({"include": ["reasoning.encrypted_content"]}, "include[0]", "logprobs"),
    ({"stream_options": {"include_obfuscation": False}}, "stream_options", "only allowed with stream"),
    (
        {"stream": True, "stream_options": {"include_obfuscation": True}},
        "stream_options.include_obfuscation",
        "False",
    ),
    ({"tools": [{"type": "web_search"}]}, "tools[0]", "only functions are"),
    ({"tools": [{"type": "function", "name": "a b"}]}, "tools[0].name", "pattern"),
    ({"tools": [TOOL] * 129}, "tools", "at most 128"),
    ({"tool_choice": "often"}, "tool_choice", "must be 'auto'"),
    ({"tool_choice": {"type": "web_search"}}, "tool_choice.type", "'function'"),
    (
        {
            "tools": [TOOL],
            "tool_choice": {
                "type": "allowed_tools",
                "mode": "auto",
                "tools": [{"type": "function", "name": "x"}],
            },
        },
        "tool_choice",
        "no tool 'x'",
    ),
    ({"text": {"format": {"type": "json_schema"}}}, "text.format", "a name and a schema"),
    ({"text": {"format": {"type": "text", "name": "x"}}}, "text.format", "no other members"),
    ({"text": {"format": {"type": "xml"}}}, "text.format.type", "'text'"),
    ({"text": {"verbosity": "high"}}, "text.verbosity", "'medium'"),
    ({"reasoning": {"summary": "auto"}}, "reasoning.summary", "not supported"),
    ({"reasoning": {"effort": "huge"}}, "reasoning.effort", "'none'"),
    ({"truncation": "auto"}, "truncation", "'disabled'"),
    ({"background": True}, "background", "False"),
    ({"previous_response_id": "resp_1"}, "previous_response_id", "no response is kept"),
    ({"conversation": "conv_1"}, "conversation", "no conversation is kept"),
    ({"prompt": {"id": "x"}}, "prompt", "not supported"),
    ({"prompt_cache_key": "x"}, "prompt_cache_key", "not supported"),
    ({"messages": []}, "messages", "unknown field"),
    ({"max_tokens": 5}, "max_tokens", "unknown field"),
    ({"metadata": {"a": 1}}, "metadata", "pairs of strings"),
    ({"store": "yes"}, "store", "true or false"),
    ({"model": "gpt-5"}, "model", "does not exist"),
]


@pytest.mark.parametrize(("fields", "param", "message"), BAD, ids=[str(one[0])[:60] for one in BAD])
def test_bad_input(served: Served, fields: dict[str, Any], param: str | None, message: str) -> None:
    reply = post(served, **fields)
    assert reply.status_code == (404 if param == "model" else 400), reply.text
    error = reply.json()["error"]
    assert error["param"] == param, error
    assert message in error["message"], error


def test_one_stop_string_is_a_list_of_one(served: Served) -> None:
    for stop in ("d", ["d"]):
        reply = served.http.post("/v1/responses", json={"model": MODEL, "input": "a", "stop": stop})
        assert reply.json()["output"][0]["content"][0]["text"] == "bc"


def test_store_is_accepted_and_not_done(served: Served) -> None:
    reply = served.openai.responses.create(model=MODEL, input="X", store=True)
    assert reply.model_extra is not None
    assert reply.model_extra["store"] is False


def test_a_failing_engine_ends_the_stream(serve: Serve) -> None:
    engine = FakeEngine(delay=0.02)
    served = serve(engine)
    seen: list[Any] = []
    for event in served.openai.responses.create(model=MODEL, input="a", stream=True):
        seen.append(event)
        if event.type == "response.output_text.delta":
            engine.fail_next = RuntimeError("the device is gone")
    assert [event.type for event in seen[-2:]] == ["error", "response.failed"]
    failed = seen[-1].response
    assert failed.status == "failed"
    assert "the device is gone" in failed.error.message


def test_a_full_queue_is_an_ordinary_429(serve: Serve) -> None:
    served = serve(FakeEngine())
    served.engine.busy = 1
    with pytest.raises(openai.RateLimitError):
        served.openai.responses.create(model=MODEL, input="a", stream=True)
    assert (
        served.openai.with_options(max_retries=1).responses.create(model=MODEL, input="X").output_text == "YZ"
    )


def test_a_client_that_leaves_aborts(serve: Serve) -> None:
    served = serve(FakeEngine(delay=0.02))
    for streaming in (True, False):
        body = json.dumps({"model": MODEL, "input": "a", "stream": streaming}).encode()
        connection = served.connect("/v1/responses", body)
        until(lambda: served.engine.stats()["running"] == 1)
        connection.close()
        until(lambda: served.engine.stats()["running"] == 0)
    assert sum(what == "abort" for _, what, _ in served.engine.events) == 2
    served.as_new()
