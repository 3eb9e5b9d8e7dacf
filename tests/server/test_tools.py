"""Tools and reasoning through the `openai` client: what a model writes becomes calls, whatever its family."""

from __future__ import annotations

import json
from typing import Any

import pydantic
import pytest

from jaxserve.engine.outputs import Output
from jaxserve.scheduler.types import Finish
from jaxserve.server.api.fields import Caller, SamplingFields
from jaxserve.server.api.turn import CallArguments, CallBegin, End, Text, Turn
from jaxserve.server.api.turn_prompt import TurnRequest
from tests.fakes import SPECIAL
from tests.server import templates
from tests.server.harness import MODEL, Serve, Served
from tests.server.templates import engine, prompt

HELLO: Any = [{"role": "user", "content": "Weather?"}]
WEATHER: Any = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather now",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}
TIME: Any = {"type": "function", "function": {"name": "time"}}
TOOLS: Any = [WEATHER, TIME]
BERN = '{"city": "Bern"}'
WRITTEN = {
    templates.HERMES: f'<tool_call>\n{{"name": "get_weather", "arguments": {BERN}}}\n</tool_call>\n'
    '<tool_call>\n{"name": "time", "arguments": {}}\n</tool_call>',
    templates.MISTRAL: f"[TOOL_CALLS]get_weather[ARGS]{BERN}[TOOL_CALLS]time[ARGS]{{}}",
    templates.LLAMA3: f'{{"name": "get_weather", "parameters": {BERN}}}; '
    '{"name": "time", "parameters": {}}',
}
FAMILIES = pytest.mark.parametrize("source", WRITTEN, ids=["hermes", "mistral", "llama3"])
CALLS = [("get_weather", BERN), ("time", "{}")]


def create(served: Served, **fields: Any) -> Any:
    return served.openai.chat.completions.create(**{"model": MODEL, "messages": HELLO, **fields})


@FAMILIES
def test_calls(serve: Serve, source: str) -> None:
    served = serve(engine(source, WRITTEN[source]))
    choice = create(served, tools=TOOLS, n=2).choices[1]
    assert choice.finish_reason == "tool_calls"
    assert choice.message.content is None
    assert [(call.function.name, call.function.arguments) for call in choice.message.tool_calls] == CALLS
    ids = {call.id for call in choice.message.tool_calls}
    assert len(ids) == 2
    assert '"description": "The weather now"' in prompt(served)
    # and back: a template sees arguments as objects
    messages = [*HELLO, choice.message.model_dump(exclude_none=True)]
    messages += [{"role": "tool", "tool_call_id": one, "content": "sunny"} for one in sorted(ids)]
    if source != templates.LLAMA3:  # whose template here knows nothing of calls made
        create(served, tools=TOOLS, messages=messages)
        assert BERN in prompt(served)
        assert "sunny" in prompt(served)


@FAMILIES
def test_calls_in_a_stream(serve: Serve, source: str) -> None:
    served = serve(engine(source, WRITTEN[source]))
    calls: dict[int, list[str]] = {}
    deltas = 0
    *chunks, last = list(create(served, tools=TOOLS, stream=True))
    for chunk in chunks:
        assert not chunk.choices[0].delta.content
        for call in chunk.choices[0].delta.tool_calls or ():
            deltas += 1
            if call.id is not None:
                assert (call.type, call.index) == ("function", len(calls))
                calls[call.index] = [call.function.name, ""]
            calls[call.index][1] += call.function.arguments or ""
    assert [tuple(call) for call in calls.values()] == CALLS
    assert last.choices[0].finish_reason == "tool_calls"
    assert deltas > 10  # the arguments came as they were written


def test_the_stream_helper(serve: Serve) -> None:
    served = serve(engine(templates.HERMES, "I look. " + WRITTEN[templates.HERMES]))
    with served.openai.chat.completions.stream(model=MODEL, messages=HELLO, tools=TOOLS) as stream:
        kinds = {event.type for event in stream}
        message = stream.get_final_completion().choices[0].message
    assert {
        "content.delta",
        "tool_calls.function.arguments.delta",
        "tool_calls.function.arguments.done",
    } <= kinds
    assert message.content == "I look."
    assert [call.function.name for call in message.tool_calls or ()] == ["get_weather", "time"]


class GetWeather(pydantic.BaseModel):
    city: str


def test_parse_with_a_pydantic_tool(serve: Serve) -> None:
    import openai

    tool = openai.pydantic_function_tool(GetWeather)
    served = serve(engine(templates.MISTRAL, f"[TOOL_CALLS]GetWeather[ARGS]{BERN}"))
    reply = served.openai.chat.completions.parse(model=MODEL, messages=HELLO, tools=[tool])
    [call] = reply.choices[0].message.tool_calls or ()
    assert call.function.parsed_arguments == GetWeather(city="Bern")
    wanted = served.engine.requests[-1].params.structured_outputs
    assert wanted is not None and wanted.grammar is not None  # it is strict
    assert '"GetWeather"' in wanted.grammar


@pytest.mark.parametrize(
    ("choice", "held"),
    [
        ("auto", None),
        ("none", None),
        ("required", ["get_weather", "time"]),
        ({"type": "function", "function": {"name": "time"}}, ["time"]),
        (
            {
                "type": "allowed_tools",
                "allowed_tools": {
                    "mode": "required",
                    "tools": [{"type": "function", "function": {"name": "get_weather"}}],
                },
            },
            ["get_weather"],
        ),
    ],
    ids=str,
)
def test_the_choice(serve: Serve, choice: Any, held: list[str] | None) -> None:
    """What must be called is held to by a grammar; what may not be is not even shown."""
    served = serve(engine(templates.HERMES, WRITTEN[templates.HERMES]))
    reply = create(served, tools=TOOLS, tool_choice=choice).choices[0]
    wanted = served.engine.requests[-1].params.structured_outputs
    if held is None:
        assert wanted is None
    else:
        assert wanted is not None and wanted.grammar is not None
        assert served.engine.requests[-1].grammar is wanted
        assert [name for name in ("get_weather", "time") if f'\\"{name}\\"' in wanted.grammar] == held
    if choice == "none":
        assert reply.message.content == WRITTEN[templates.HERMES]
        assert reply.finish_reason == "stop"
        assert "get_weather" not in prompt(served)
    else:
        assert reply.finish_reason == "tool_calls"


def test_one_call_at_most(serve: Serve) -> None:
    served = serve(engine(templates.HERMES, "Hello"))
    create(served, tools=TOOLS, parallel_tool_calls=False)
    wanted = served.engine.requests[-1].params.structured_outputs
    assert wanted is not None and "lead call | plain" in (wanted.grammar or "")


def test_text_that_is_no_call(serve: Serve) -> None:
    text = 'It is <b>"{x}"</b>, <tool_call> or <tool_c'
    served = serve(engine(templates.HERMES, text))
    reply = create(served, tools=TOOLS)
    assert (reply.choices[0].message.content, reply.choices[0].finish_reason) == (text, "stop")
    chunks = create(served, tools=TOOLS, stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == text


def test_a_call_that_is_cut_off(serve: Serve) -> None:
    served = serve(engine(templates.HERMES, WRITTEN[templates.HERMES]))
    choice = create(served, tools=TOOLS, max_tokens=60).choices[0]
    assert choice.finish_reason == "length"
    assert choice.message.tool_calls[0].function.name == "get_weather"


@pytest.mark.parametrize(
    ("stop", "finish", "arguments"),
    [
        ("Be", "stop", ['{"city": "']),  # within a call
        ("time", "tool_calls", [BERN]),  # between two
        ("</tool_call>", "tool_calls", [BERN]),  # the call is whole
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_a_stop_string_within_a_call(
    serve: Serve, stop: str, finish: str, arguments: list[str], stream: bool
) -> None:
    served = serve(engine(templates.HERMES, WRITTEN[templates.HERMES]))
    if stream:
        chunks = [*create(served, tools=TOOLS, stop=stop, stream=True)]
        assert chunks[-1].choices[0].finish_reason == finish
    else:
        [choice] = create(served, tools=TOOLS, stop=stop).choices
        assert [call.function.arguments for call in choice.message.tool_calls] == arguments
        assert (choice.finish_reason, choice.stop_reason) == (finish, stop)
    tool = {"type": "function", **WEATHER["function"]}
    fields = {"model": MODEL, "input": "hi", "tools": [tool], "stop": stop}
    items = served.http.post("/v1/responses", json=fields).json()["output"]
    [call] = [item for item in items if item["type"] == "function_call"]
    status = "incomplete" if finish == "stop" else "completed"
    assert (call["arguments"], call["status"]) == (arguments[-1], status)


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("helper", ["stream", "parse", "plain"])
def test_what_the_client_made_of_a_call_goes_back_in(serve: Serve, strict: bool, helper: str) -> None:
    """Its helpers put `parsed` and `parsed_arguments` into the message, null where there is nothing."""
    served = serve(engine(templates.HERMES, WRITTEN[templates.HERMES]))
    completions = served.openai.chat.completions
    tools = [{**one, "function": {**one["function"], "strict": strict}} for one in TOOLS]
    if strict:
        tools[1]["function"]["parameters"] = {"type": "object", "properties": {}}
    fields: Any = {"model": MODEL, "messages": HELLO, "tools": tools}
    if helper == "stream":
        with completions.stream(**fields) as stream:
            stream.until_done()
            message = stream.get_final_completion().choices[0].message
    elif helper == "parse" and strict:  # which takes no other tools
        message = completions.parse(**fields).choices[0].message
    else:
        message = completions.create(**fields).choices[0].message  # type: ignore[assignment]
    assert message.tool_calls is not None
    results = [{"role": "tool", "tool_call_id": call.id, "content": "ok"} for call in message.tool_calls]
    create(served, messages=[*HELLO, message, *results])
    assert BERN in prompt(served)


def test_logprobs_of_a_call_are_all_there(serve: Serve) -> None:
    served = serve(engine(templates.HERMES, WRITTEN[templates.HERMES]))
    entries = create(served, tools=TOOLS, logprobs=True).choices[0].logprobs.content
    assert "".join(entry.token for entry in entries) == WRITTEN[templates.HERMES] + "<end>"
    chunks = create(served, tools=TOOLS, logprobs=True, stream=True)
    streamed = [
        entry.token
        for chunk in chunks
        if chunk.choices[0].logprobs
        for entry in chunk.choices[0].logprobs.content
    ]
    assert streamed == [entry.token for entry in entries]


ASSISTANT = {"role": "assistant", "content": None}


def called(arguments: str) -> list[Any]:
    call = {"id": "call_1", "type": "function", "function": {"name": "time", "arguments": arguments}}
    return [*HELLO, {**ASSISTANT, "tool_calls": [call]}]


REFUSED: list[tuple[dict[str, Any], str, str]] = [
    ({"tools": [WEATHER, WEATHER]}, "tools", "two functions 'get_weather'"),
    ({"tools": [WEATHER] * 129}, "tools", "at most 128 items"),
    ({"tools": [{"type": "custom", "custom": {}}]}, "tools[0].type", "Input should be 'function'"),
    ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools[0].function.name", "pattern"),
    ({"tools": [{"type": "function", "function": {"name": "a" * 65}}]}, "tools[0].function.name", "pattern"),
    ({"tool_choice": "required"}, "tool_choice", "needs tools"),
    ({"tools": TOOLS, "tool_choice": "some"}, "tool_choice", "must be 'auto', 'none', 'required'"),
    ({"tools": TOOLS, "tool_choice": 5}, "tool_choice", "must be 'auto', 'none', 'required'"),
    (
        {"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "x"}}},
        "tool_choice",
        "no tool 'x'",
    ),
    ({"tools": TOOLS, "tool_choice": {"type": "function"}}, "tool_choice.function", "is required"),
    ({"functions": [{"name": "f"}]}, "functions", "functions is not supported: use tools"),
    ({"function_call": "auto"}, "function_call", "use tool_choice"),
    ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].tool_call_id", "is required"),
    ({"messages": [ASSISTANT]}, "messages[0].content", "is required"),
    ({"tools": TOOLS, "tool_choice": "required", "min_tokens": 1}, "min_tokens", "does not go with"),
]


@pytest.mark.parametrize(("fields", "param", "words"), REFUSED, ids=lambda value: str(value)[:50])
def test_what_is_refused(serve: Serve, fields: dict[str, Any], param: str, words: str) -> None:
    reply = serve(engine(templates.HERMES)).chat(**fields)
    assert reply.status_code == 400, reply.text
    assert reply.json()["error"]["param"] == param
    assert words in reply.json()["error"]["message"]


@pytest.mark.parametrize("arguments", ["[1]", '{"a": ', "[" * 1000, '{"a":' * 300 + "1" + "}" * 300])
def test_what_a_model_got_wrong_can_be_sent_back(serve: Serve, arguments: str) -> None:
    """A template is given an object all the same."""
    script = f'<tool_call>\n{{"name": "time", "arguments": {arguments}}}\n</tool_call>'
    served = serve(engine(templates.HERMES, script))
    message = create(served, tools=TOOLS).choices[0].message
    messages = [*HELLO, message.model_dump(exclude_none=True)]
    if message.tool_calls:
        assert message.tool_calls[0].function.arguments.startswith(arguments)
        messages.append({"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "sunny"})
    create(served, tools=TOOLS, messages=messages)
    if message.tool_calls:
        assert '"arguments": {"INVALID_JSON": ' in prompt(served)
        assert "sunny" in prompt(served)


@pytest.mark.parametrize(
    "source", [templates.HERMES, templates.THINKING, templates.MISTRAL, templates.LLAMA3]
)
@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "get_weather"}}])
@pytest.mark.parametrize("stream", [False, True])
def test_a_call_that_must_be_and_is_cut_is_no_text(
    serve: Serve, source: str, choice: Any, stream: bool
) -> None:
    """Wherever the end of the tokens falls before it can be told."""
    written = WRITTEN[templates.HERMES if source == templates.THINKING else source]
    served = serve(engine(source, written))
    for tokens in (1, 5, 14, written.index("weather")):
        asked = {"tools": TOOLS, "tool_choice": choice, "max_tokens": tokens, "stream": stream}
        reply = create(served, **asked)
        if not stream:
            assert (reply.choices[0].message.content, reply.choices[0].message.tool_calls) == ("", None)
            assert reply.choices[0].finish_reason == "length"
            continue
        *chunks, last = list(reply)
        assert not any(chunk.choices[0].delta.content for chunk in (*chunks, last))
        assert last.choices[0].finish_reason == "length"
    # what may be text stays text
    content = create(served, tools=TOOLS, max_tokens=5).choices[0].message.content
    assert content == written[:5]


def test_a_named_tool_is_called_once(serve: Serve) -> None:
    served = serve(engine(templates.HERMES, WRITTEN[templates.HERMES]))
    named = {"type": "function", "function": {"name": "time"}}
    for choice, repeated in ((named, False), ("required", True)):
        create(served, tools=TOOLS, tool_choice=choice)
        wanted = served.engine.requests[-1].params.structured_outputs
        assert wanted is not None and ("call)*" in (wanted.grammar or "")) == repeated


def test_a_refusal_is_sent_back(serve: Serve) -> None:
    served = serve(engine(templates.HERMES, "x"))
    said = {"role": "assistant", "content": None, "refusal": "I cannot."}
    create(served, messages=[*HELLO, said, *HELLO])
    assert "<|assistant|>I cannot.<|user|>" in prompt(served)
    reply = served.chat(messages=[{"role": "user", "content": "a", "refusal": "no"}])
    assert reply.json()["error"]["param"] == "messages[0].refusal"


def test_templates_that_cannot(serve: Serve) -> None:
    plain = serve(engine(templates.PLAIN))
    error = plain.chat(tools=TOOLS).json()["error"]
    assert (error["param"], error["code"]) == ("tools", "unsupported_parameter")
    assert "does not read them" in error["message"]
    assert "does not read tool_calls" in plain.chat(messages=called("{}")).json()["error"]["message"]
    assert plain.chat(tools=TOOLS, tool_choice="none", max_tokens=1).status_code == 200
    other = serve(engine("{{ tools }}{{ messages }}"))
    assert "--tool-parser" in other.chat(tools=TOOLS).json()["error"]["message"]


def test_the_flag_says_which_form(serve: Serve) -> None:
    script = WRITTEN[templates.HERMES]
    served = serve(engine("{{ tools }}{{ messages }}", script), tool_parser="hermes")
    assert create(served, tools=TOOLS).choices[0].finish_reason == "tool_calls"
    served = serve(engine(templates.THINKING, "<think>a</think>b"), reasoning_parser="none")
    assert create(served).choices[0].message.content == "<think>a</think>b"


# --- reasoning -----------------------------------------------------------------------------------------

THOUGHT = "<think>\nHm, a < b.\n</think>\n\n"


@pytest.mark.parametrize("opened", [False, True])
@pytest.mark.parametrize("stream", [False, True])
def test_reasoning(serve: Serve, opened: bool, stream: bool) -> None:
    source = templates.OPENED if opened else templates.THINKING
    script = (THOUGHT.removeprefix("<think>") if opened else THOUGHT) + "Yes. " + WRITTEN[templates.HERMES]
    served = serve(engine(source, script))
    if stream:
        deltas = [chunk.choices[0].delta for chunk in create(served, tools=TOOLS, stream=True)]
        assert "".join(delta.content or "" for delta in deltas) == "Yes."
        for name in ("reasoning_content", "reasoning"):
            assert "".join(getattr(delta, name, None) or "" for delta in deltas) == "Hm, a < b."
        return
    message = create(served, tools=TOOLS).choices[0].message
    assert (message.content, message.reasoning_content, message.reasoning) == ("Yes.", *["Hm, a < b."] * 2)
    assert len(message.tool_calls) == 2
    # what was thought can be sent back; templates do with it what they want
    again = served.chat(messages=[*HELLO, message.model_dump(exclude_none=True), *HELLO])
    assert again.status_code == 200, again.text
    assert "reasoning" not in served.chat(include_reasoning=False).json()["choices"][0]["message"]


def test_a_users_marker_does_not_open_the_reasoning(serve: Serve) -> None:
    served = serve(engine(templates.THINKING, "Yes"))
    reply = create(served, messages=[{"role": "user", "content": "What is <think>"}])
    assert reply.choices[0].message.content == "Yes"


def test_reasoning_comes_before_a_form(serve: Serve) -> None:
    served = serve(engine(templates.OPENED, 'Hm</think>{"a": 1}'))
    form = {"type": "json_object"}
    message = create(served, response_format=form).choices[0].message
    assert (message.content, message.reasoning_content) == ('{"a": 1}', "Hm")
    wanted = served.engine.requests[-1].params.structured_outputs
    assert wanted is not None and (wanted.grammar or "").startswith("start: thought start_answer")
    reply = served.chat(structured_outputs={"grammar": 'start: "x"'})
    assert reply.json()["error"]["param"] == "structured_outputs"


@pytest.mark.parametrize(
    "form",
    [{"tools": TOOLS, "tool_choice": "required"}, {"response_format": {"type": "json_object"}}],
    ids=["calls", "form"],
)
def test_reasoning_that_is_over_is_not_begun_again(serve: Serve, form: Any) -> None:
    served = serve(engine(templates.THINKING, "Yes"))
    off: list[dict[str, Any]] = [
        {"reasoning_effort": "none"},
        {"chat_template_kwargs": {"enable_thinking": False}},
    ]
    for more, thinks in ((off[0], False), (off[1], False), ({}, True), ({"reasoning_effort": "high"}, True)):
        assert served.chat(**form, **more).status_code == 200
        wanted = served.engine.requests[-1].params.structured_outputs
        assert wanted is not None
        assert ("thought" in (wanted.grammar or "")) == thinks
    # a template that says it elsewhere, and one that ends every prompt so
    elsewhere = templates.HERMES + "{% if not enable_thinking %}/no_think{% endif %}{# </think> #}"
    closed = templates.HERMES.replace("<|assistant|>{%", "<|assistant|></think>{%")
    for source, more in ((elsewhere, off[1]), (closed, {})):
        served = serve(engine(source, "Yes"))
        assert served.chat(**form, **more).status_code == 200
        wanted = served.engine.requests[-1].params.structured_outputs
        assert wanted is not None and "thought" not in (wanted.grammar or "thought")


def test_whether_to_reason(serve: Serve) -> None:
    served = serve(engine(templates.THINKING, "Yes"))
    create(served, reasoning_effort="none")
    assert prompt(served).endswith("</think>\n\n")
    create(served, reasoning_effort="high")
    assert prompt(served).endswith("<|assistant|>")
    create(served, extra_body={"chat_template_kwargs": {"enable_thinking": False}})
    assert prompt(served).endswith("</think>\n\n")
    plain = serve(engine(templates.PLAIN))
    assert plain.chat(reasoning_effort="none", max_tokens=1).status_code == 200  # it never does
    assert plain.chat(reasoning_effort="low").json()["error"]["param"] == "reasoning_effort"


# --- special tokens ------------------------------------------------------------------------------------


def test_markers_that_are_special_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """Text that must be decoded with special tokens loses all of them but the markers."""
    monkeypatch.setitem(SPECIAL, 260, "[TOOL_CALLS]")
    made = engine(templates.MISTRAL)
    sampling = SamplingFields(model=MODEL, stop=["!"], include_stop_str_in_output=True)
    asked = TurnRequest(messages=HELLO, sampling=sampling, tools=TOOLS, max_tokens=5)
    turn = Turn(asked, made, Caller(), prefix="x-")
    assert turn.request.params.skip_special_tokens is False
    pieces = ["Well<us", "er> ", "[TOOL_CALLS]", f"get_weather[ARGS]{BERN}", "<bos>", "<e"]
    events = [event for piece in pieces for event in turn.events(Output("x", 0, text=piece))]
    events += turn.events(Output("x", 0, finish_reason=Finish.STOP, stop_reason="!"))
    assert [event.text for event in events if isinstance(event, Text)] == ["Well", "<e!"]
    [begin] = [event for event in events if isinstance(event, CallBegin)]
    assert begin.name == "get_weather"
    assert len(begin.id) == 9
    arguments = "".join(event.delta for event in events if isinstance(event, CallArguments))
    assert json.loads(arguments) == {"city": "Bern"}
    assert events[-1] == End(0, "tool_calls", "!")
