"""Tools and reasoning over `/v1/responses` and `/v1/messages`, with the clients of either."""

from __future__ import annotations

import json
from typing import Any

import anthropic
import pytest

from jaxserve.server.api.responses.reply import ResponseJob
from tests.server import templates
from tests.server.harness import MODEL, Serve, Served
from tests.server.templates import engine, prompt
from tests.server.test_messages import client
from tests.server.test_messages import stream as message_events
from tests.server.test_responses import kinds
from tests.server.test_responses import stream as response_events

SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
FUNCTION: Any = {"type": "function", "name": "get_weather", "description": "now", "parameters": SCHEMA}
CLAUDE_TOOL: Any = {"name": "get_weather", "description": "now", "input_schema": SCHEMA}
BERN = '{"city": "Bern"}'
CALL = f'<tool_call>\n{{"name": "get_weather", "arguments": {BERN}}}\n</tool_call>'
SCRIPT = f"<think>\nBern it is.\n</think>\n\nI look.\n{CALL}\n{CALL}"
HELLO: Any = [{"role": "user", "content": "Weather?"}]


@pytest.fixture
def served(serve: Serve) -> Served:
    return serve(engine(templates.THINKING, SCRIPT))


# --- responses -----------------------------------------------------------------------------------------


def test_a_response_with_reasoning_text_and_calls(served: Served) -> None:
    reply = served.openai.responses.create(model=MODEL, input="Weather?", tools=[FUNCTION])
    assert [item.type for item in reply.output] == ["reasoning", "message", "function_call", "function_call"]
    thought, said, call, again = reply.output
    assert thought.type == "reasoning"
    assert thought.content is not None
    assert thought.content[0].text.strip() == "Bern it is."
    assert said.type == "message"
    assert reply.output_text.strip() == "I look."
    assert call.type == again.type == "function_call"
    assert (call.name, call.arguments, call.status) == ("get_weather", BERN, "completed")
    assert call.call_id != again.call_id
    assert len({item.id for item in reply.output}) == 4
    assert reply.usage is not None
    assert 10 < reply.usage.output_tokens_details.reasoning_tokens < reply.usage.output_tokens
    assert '"description": "now"' in prompt(served)
    # and back: the whole output is one message of the assistant
    items: Any = [{"role": "user", "content": "Weather?"}, *reply.output]
    for one in (call, again):
        items.append({"type": "function_call_output", "call_id": one.call_id, "output": "sunny"})
    served.openai.responses.create(model=MODEL, input=items, tools=[FUNCTION])
    assert prompt(served).count("<|assistant|>") == 2  # that one, and the next
    assert prompt(served).count("<|tool|>sunny") == 2
    assert prompt(served).count(BERN) == 2


def test_the_events_of_reasoning_and_calls(served: Served) -> None:
    events = response_events(served, tools=[FUNCTION], max_output_tokens=None)
    assert kinds(events) == [
        *("created", "in_progress"),
        *("output_item.added", "content_part.added", "reasoning_text.delta", "reasoning_text.done"),
        *("content_part.done", "output_item.done"),
        *("output_item.added", "content_part.added", "output_text.delta", "output_text.done"),
        *("content_part.done", "output_item.done"),
        *("output_item.added", "function_call_arguments.delta", "function_call_arguments.done"),
        "output_item.done",
        *("output_item.added", "function_call_arguments.delta", "function_call_arguments.done"),
        *("output_item.done", "completed"),
    ]
    done = [event["item"] for event in events if event["type"] == "response.output_item.done"]
    assert events[-1]["response"]["output"] == done
    arguments = [e["delta"] for e in events if e["type"] == "response.function_call_arguments.delta"]
    assert "".join(arguments) == BERN * 2
    assert len(arguments) > 10  # as they were written


def test_the_openai_stream_helper_with_tools(served: Served) -> None:
    with served.openai.responses.stream(model=MODEL, input="Weather?", tools=[FUNCTION]) as events:
        for _ in events:
            pass
        final = events.get_final_response()
    assert [item.type for item in final.output][-1] == "function_call"


BETWEEN = f"A\n{CALL}\nB {CALL}"


def test_text_around_calls_stays_where_it_was(serve: Serve) -> None:
    """In a reply that comes whole as in a stream."""
    served = serve(engine(templates.HERMES, BETWEEN))
    events = response_events(served, tools=[FUNCTION], max_output_tokens=None)
    streamed = events[-1]["response"]["output"]
    whole = served.openai.responses.create(model=MODEL, input="Weather?", tools=[FUNCTION]).output
    for output in (streamed, [item.model_dump() for item in whole]):
        assert [item["type"] for item in output] == ["message", "function_call"] * 2
        assert [item["content"][0]["text"].strip() for item in output[::2]] == ["A", "B"]
        assert [item["arguments"] for item in output[1::2]] == [BERN] * 2
    blocks = [
        event["content_block"]["type"]
        for event in message_events(served, tools=[CLAUDE_TOOL], max_tokens=500)
        if event["type"] == "content_block_start"
    ]
    with client(served) as claude:
        content: Any = claude.messages.create(
            model=MODEL, max_tokens=500, messages=HELLO, tools=[CLAUDE_TOOL]
        ).content
    assert [block.type for block in content] == blocks == ["text", "tool_use"] * 2
    assert [block.text.strip() for block in content[::2]] == ["A", "B"]
    assert [block.input for block in content[1::2]] == [{"city": "Bern"}] * 2
    # chat has one text and a list of calls
    tool: Any = {"type": "function", "function": {"name": "get_weather", "parameters": SCHEMA}}
    chat = served.openai.chat.completions.create(model=MODEL, messages=HELLO, tools=[tool]).choices[0].message
    assert "".join((chat.content or "").split()) == "AB"
    assert len(chat.tool_calls or ()) == 2


def test_logprobs_of_text_that_was_held_back(serve: Serve) -> None:
    """Those of tokens that might have begun a call come with the text that they turned out to be."""
    served = serve(engine(templates.HERMES, "<tool_c"))
    more: Any = {"tools": [FUNCTION], "max_output_tokens": None, "include": ["message.output_text.logprobs"]}
    events = response_events(served, **more)
    [message] = events[-1]["response"]["output"]
    told = [one["token"] for one in message["content"][0]["logprobs"]]
    assert told[:7] == [*"<tool_c"]
    deltas = [event["logprobs"] for event in events if event["type"] == "response.output_text.delta"]
    assert [one["token"] for part in deltas for one in part] == told


def test_a_call_that_is_no_object_is_taken_back(serve: Serve) -> None:
    script = CALL.replace(BERN, "[1]")
    served = serve(engine(templates.HERMES, script))
    reply = served.openai.responses.create(model=MODEL, input="Weather?", tools=[FUNCTION])
    [call] = reply.output
    assert call.type == "function_call"
    assert call.arguments == "[1]"
    items: Any = [*HELLO, call, {"type": "function_call_output", "call_id": call.call_id, "output": "no"}]
    served.openai.responses.create(model=MODEL, input=items, tools=[FUNCTION])
    assert '{"INVALID_JSON": "[1]"}' in prompt(served)


@pytest.mark.parametrize(
    ("choice", "wanted"),
    [
        ("required", "get_weather"),
        ({"type": "function", "name": "get_weather"}, "get_weather"),
        (
            {
                "type": "allowed_tools",
                "mode": "required",
                "tools": [{"type": "function", "name": "get_weather"}],
            },
            "get_weather",
        ),
        ("none", None),
        ("auto", None),
    ],
)
def test_tool_choice_of_responses(served: Served, choice: Any, wanted: str | None) -> None:
    reply = served.openai.responses.create(
        model=MODEL, input="Weather?", tools=[FUNCTION, {**FUNCTION, "name": "time"}], tool_choice=choice
    )
    assert reply.status == "completed"
    structured = served.engine.requests[-1].params.structured_outputs
    if wanted is None:
        assert structured is None
    else:
        assert structured is not None
        assert wanted in str(structured.grammar)
        assert ("time" in str(structured.grammar)) == (choice == "required")


def test_an_error_that_cannot_be_told(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> Any:
        raise TypeError("not to be told")

    monkeypatch.setattr(ResponseJob, "chunks", fails)
    monkeypatch.setattr(ResponseJob, "failed", fails)
    reply = served.http.post("/v1/responses", json={"model": MODEL, "input": "a", "stream": True})
    assert reply.status_code == 200
    assert json.loads(reply.text.splitlines()[-2].removeprefix("data: "))["error"]["code"] == "engine_failed"
    assert "not to be told" not in reply.text


def test_deep_tools_are_repeated(served: Served) -> None:
    schema: Any = {}
    for _ in range(180):
        schema = {"not": schema}
    tool = {**FUNCTION, "parameters": schema}
    for stream in (False, True):
        reply = served.http.post(
            "/v1/responses", json={"model": MODEL, "input": "a", "tools": [tool], "stream": stream}
        )
        assert reply.status_code == 200
        assert "response.failed" not in reply.text
        assert reply.text.count('"not"') >= 180


def test_effort_turns_thinking_off(served: Served) -> None:
    served.openai.responses.create(model=MODEL, input="Weather?", reasoning={"effort": "none"})
    assert prompt(served).endswith("<think>\n\n</think>\n\n")


def test_a_reply_that_is_cut_in_its_reasoning(served: Served) -> None:
    reply = served.openai.responses.create(model=MODEL, input="Weather?", max_output_tokens=12)
    assert reply.status == "incomplete"
    [thought] = reply.output
    assert (thought.type, thought.status) == ("reasoning", "incomplete")


# --- messages ------------------------------------------------------------------------------------------


def test_a_message_with_thinking_text_and_calls(served: Served) -> None:
    with client(served) as claude:
        reply = claude.messages.create(
            model=MODEL, max_tokens=500, messages=HELLO, tools=[CLAUDE_TOOL], thinking={"type": "adaptive"}
        )
        assert [block.type for block in reply.content] == ["thinking", "text", "tool_use", "tool_use"]
        assert reply.stop_reason == "tool_use"
        thought, said, call, again = reply.content
        assert thought.type == "thinking"
        assert thought.thinking.strip() == "Bern it is."
        assert said.type == "text"
        assert said.text.strip() == "I look."
        assert call.type == again.type == "tool_use"
        assert (call.name, call.input) == ("get_weather", {"city": "Bern"})
        results: Any = [
            {"type": "tool_result", "tool_use_id": call.id, "content": [{"type": "text", "text": "sunny"}]},
            {"type": "tool_result", "tool_use_id": again.id, "content": "no such city", "is_error": True},
            {"type": "text", "text": "And now?"},
        ]
        claude.messages.create(
            model=MODEL,
            max_tokens=500,
            messages=[*HELLO, reply.to_param(), {"role": "user", "content": results}],
            tools=[CLAUDE_TOOL],
        )
    assert "<|tool|>sunny<|tool|>Error: no such city<|user|>And now?<|assistant|>" in prompt(served)
    assert '{"city": "Bern"}' in prompt(served)


def test_the_events_of_thinking_and_calls(served: Served) -> None:
    events = message_events(served, tools=[CLAUDE_TOOL], max_tokens=500)
    starts = [event["content_block"]["type"] for event in events if event["type"] == "content_block_start"]
    assert starts == ["thinking", "text", "tool_use", "tool_use"]
    stops = [event["index"] for event in events if event["type"] == "content_block_stop"]
    assert stops == [0, 1, 2, 3]
    deltas = [event["delta"] for event in events if event["type"] == "content_block_delta"]
    arguments = "".join(delta["partial_json"] for delta in deltas if delta["type"] == "input_json_delta")
    assert arguments == BERN * 2
    assert events[-2]["delta"]["stop_reason"] == "tool_use"


def test_the_anthropic_stream_helper_with_tools(served: Served) -> None:
    with (
        client(served) as claude,
        claude.messages.stream(model=MODEL, max_tokens=500, messages=HELLO, tools=[CLAUDE_TOOL]) as events,
    ):
        seen = {event.type for event in events}
        final = events.get_final_message()
    assert {"thinking", "text", "input_json"} <= seen
    call = final.content[-1]
    assert call.type == "tool_use"
    assert call.input == {"city": "Bern"}


@pytest.mark.parametrize(
    ("choice", "constrained"),
    [
        ({"type": "auto"}, False),
        ({"type": "none"}, False),
        ({"type": "any"}, True),
        ({"type": "tool", "name": "get_weather"}, True),
        ({"type": "auto", "disable_parallel_tool_use": True}, True),
    ],
)
def test_tool_choice_of_messages(served: Served, choice: Any, constrained: bool) -> None:
    with client(served) as claude:
        claude.messages.create(
            model=MODEL, max_tokens=500, messages=HELLO, tools=[CLAUDE_TOOL], tool_choice=choice
        )
    structured = served.engine.requests[-1].params.structured_outputs
    assert (structured is not None) == constrained
    assert ("get_weather" in prompt(served)) == (choice["type"] != "none")


def test_thinking_is_turned_off(served: Served) -> None:
    with client(served) as claude:
        claude.messages.create(model=MODEL, max_tokens=500, messages=HELLO, thinking={"type": "disabled"})
    assert prompt(served).endswith("<think>\n\n</think>\n\n")


def test_thinking_cannot_be_turned_off(serve: Serve) -> None:
    served = serve(engine(templates.OPENED, "x"))
    with client(served) as claude, pytest.raises(anthropic.BadRequestError, match="does not read it"):
        claude.messages.create(model=MODEL, max_tokens=500, messages=HELLO, thinking={"type": "disabled"})


def test_arguments_that_are_too_deep(serve: Serve) -> None:
    deep = '{"a":' * 300 + "1" + "}" * 300
    served = serve(engine(templates.HERMES, CALL.replace(BERN, deep)))
    with client(served) as claude:
        reply = claude.messages.create(model=MODEL, max_tokens=5000, messages=HELLO, tools=[CLAUDE_TOOL])
    call = reply.content[-1]
    assert call.type == "tool_use"
    assert call.input == {"INVALID_JSON": deep}


def test_refusals_speak_of_what_was_sent(serve: Serve) -> None:
    served = serve(engine(templates.HERMES, "x"))
    for fields, words in (
        ({"output_config": {"effort": "low"}}, "output_config.effort: the model's chat template"),
        ({"max_tokens": 0}, "max_tokens: Input should be greater than or equal to 1"),
        ({"thinking": {"type": "enabled", "budget_tokens": 1024}}, "the types adaptive and disabled are"),
        ({"thinking": {"type": "adaptive", "budget_tokens": 1024}}, "budgets of thinking"),
    ):
        body = {"model": MODEL, "max_tokens": 3, "messages": HELLO, **fields}
        reply = served.http.post("/v1/messages", json=body)
        assert reply.status_code == 400
        assert words in reply.json()["error"]["message"]
        assert "reasoning_effort" not in reply.text
        if "max_tokens" not in fields:
            del body["max_tokens"]
            counted = served.http.post("/v1/messages/count_tokens", json=body)
            assert words in counted.json()["error"]["message"]


def test_arguments_that_are_cut(served: Served) -> None:
    """A message's input must be an object all the same."""
    whole = len(SCRIPT.partition('{"city": "B')[0]) + len('{"city": "B')
    with client(served) as claude:
        reply = claude.messages.create(model=MODEL, max_tokens=whole, messages=HELLO, tools=[CLAUDE_TOOL])
    assert reply.stop_reason == "max_tokens"
    call = reply.content[-1]
    assert call.type == "tool_use"
    assert call.input == {"INVALID_JSON": '{"city": "B'}


def test_a_message_that_is_begun_for_the_model(serve: Serve) -> None:
    source = templates.HERMES + "{% if continue_final_message %}{% endif %}"
    served = serve(engine(source, "z"))
    with client(served) as claude:
        claude.messages.create(
            model=MODEL, max_tokens=5, messages=[*HELLO, {"role": "assistant", "content": "It is"}]
        )
    assert prompt(served).endswith("<|assistant|>It is")


def test_counting_includes_tools(served: Served) -> None:
    with client(served) as claude:
        count = claude.messages.count_tokens(model=MODEL, messages=HELLO, tools=[CLAUDE_TOOL]).input_tokens
        bare = claude.messages.count_tokens(model=MODEL, messages=HELLO).input_tokens
        usage = claude.messages.create(model=MODEL, max_tokens=1, messages=HELLO, tools=[CLAUDE_TOOL]).usage
    assert count == usage.input_tokens + (usage.cache_read_input_tokens or 0)
    assert count > bare + len(json.dumps(SCHEMA))
