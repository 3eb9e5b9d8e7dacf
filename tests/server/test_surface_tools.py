"""Tools and reasoning over `/v1/responses` and `/v1/messages`, with the clients of either."""

from __future__ import annotations

import json
from typing import Any

import anthropic
import pytest

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
