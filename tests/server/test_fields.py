"""Fields beyond the plain ones: what each changes, and how what cannot be honoured is refused."""

from __future__ import annotations

import socket
import threading
import time
from typing import Any, Literal

import openai
import orjson
import pydantic
import pytest

from jaxserve.engine.outputs import EngineBusy
from jaxserve.scheduler.types import RequestError, StructuredOutputs
from tests.server import templates
from tests.server.fakes import FakeEngine
from tests.server.harness import MODEL, Serve, Served
from tests.server.templates import engine, prompt

USER: Any = {"role": "user", "content": "a"}


def error(reply: Any, param: str | None, words: str = "") -> None:
    assert reply.status_code == 400, reply.text
    assert reply.json()["error"]["param"] == param
    assert words in reply.json()["error"]["message"]


def read(connection: socket.socket) -> bytes:
    reply = b""
    while not reply.endswith(b"}}"):  # an error object's end
        reply += connection.recv(2**16)
    return reply


def wanted(served: Served) -> StructuredOutputs | None:
    return served.engine.requests[-1].params.structured_outputs


# --- what a reply must look like -----------------------------------------------------------------------


class Step(pydantic.BaseModel):
    kind: Literal["a", "b"]
    n: int


def test_parse(serve: Serve) -> None:
    served = serve(FakeEngine(script='{"kind": "a", "n": 3}'))
    reply = served.openai.chat.completions.parse(model=MODEL, messages=[USER], response_format=Step)
    assert reply.choices[0].message.parsed == Step(kind="a", n=3)
    asked = wanted(served)
    assert asked is not None and asked.json is not None
    assert orjson.loads(str(asked.json))["properties"]["n"] == {"title": "N", "type": "integer"}
    assert served.engine.requests[-1].grammar is asked


def test_stream_with_parsing(serve: Serve) -> None:
    served = serve(FakeEngine(script='{"kind": "b", "n": 4}'))
    with served.openai.chat.completions.stream(model=MODEL, messages=[USER], response_format=Step) as stream:
        kinds = [event.type for event in stream]
        final = stream.get_final_completion()
    assert final.choices[0].message.parsed == Step(kind="b", n=4)
    assert kinds.count("content.delta") > 5


SCHEMA = {"type": "object", "properties": {"x": {"type": "integer"}}}
NAMED = {"name": "s", "schema": SCHEMA, "strict": True, "description": "d"}
FORMS: list[tuple[dict[str, Any], StructuredOutputs]] = [
    ({"response_format": {"type": "json_object"}}, StructuredOutputs(json_object=True)),
    ({"response_format": {"type": "json_schema", "json_schema": NAMED}}, StructuredOutputs(json=SCHEMA)),
    ({"structured_outputs": {"json": SCHEMA}}, StructuredOutputs(json=SCHEMA)),
    ({"structured_outputs": {"json": '{"type": "null"}'}}, StructuredOutputs(json='{"type": "null"}')),
    ({"structured_outputs": {"json_object": True}}, StructuredOutputs(json_object=True)),
    ({"structured_outputs": {"regex": "[a-z]+"}}, StructuredOutputs(regex="[a-z]+")),
    ({"structured_outputs": {"choice": ["yes", "no"]}}, StructuredOutputs(choice=("yes", "no"))),
    ({"structured_outputs": {"grammar": "start: /x/"}}, StructuredOutputs(grammar="start: /x/")),
    ({"guided_json": SCHEMA}, StructuredOutputs(json=SCHEMA)),
    ({"guided_regex": "[a-z]+"}, StructuredOutputs(regex="[a-z]+")),
    ({"guided_choice": ["yes", "no"]}, StructuredOutputs(choice=("yes", "no"))),
    ({"guided_grammar": "start: /x/"}, StructuredOutputs(grammar="start: /x/")),
]


@pytest.mark.parametrize(("fields", "expected"), FORMS, ids=lambda value: str(value)[:60])
def test_forms(served: Served, fields: dict[str, Any], expected: StructuredOutputs) -> None:
    for ask in (served.chat, served.completion):
        assert ask(max_tokens=2, **fields).status_code == 200
        assert wanted(served) == expected
        assert served.engine.requests[-1].grammar == expected


def test_a_choice_is_the_answer(served: Served) -> None:
    fields = {"structured_outputs": {"choice": ["yes", "no"]}}
    assert served.completion(max_tokens=9, **fields).json()["choices"][0]["text"] == "yes"
    assert served.chat(**fields).json()["choices"][0]["message"]["content"] == "yes"


WRONG: list[tuple[dict[str, Any], str, str]] = [
    ({"response_format": {"type": "xml"}}, "response_format.type", "Input should be"),
    ({"response_format": {"type": "json_schema"}}, "response_format.json_schema", "is required"),
    (
        {"response_format": {"type": "text", "json_schema": NAMED}},
        "response_format.json_schema",
        "needs the type",
    ),
    (
        {"response_format": {"type": "json_schema", "json_schema": {"name": "s"}}},
        "response_format.json_schema.schema",
        "is required",
    ),
    (
        {"response_format": {"type": "json_schema", "json_schema": {**NAMED, "name": "a b"}}},
        "response_format.json_schema.name",
        "pattern",
    ),
    ({"response_format": "json"}, "response_format", ""),
    ({"structured_outputs": {}}, "structured_outputs", "one of json"),
    ({"structured_outputs": {"regex": "a", "choice": ["b"]}}, "structured_outputs", "not regex, choice"),
    ({"structured_outputs": {"choice": []}}, "structured_outputs.choice", "list of texts"),
    ({"structured_outputs": {"structural_tag": "x"}}, "structured_outputs.structural_tag", "unknown field"),
    ({"guided_choice": []}, "guided_choice", "list of texts"),
    ({"guided_choice": [1]}, "guided_choice[0]", "valid string"),
    ({"guided_regex": "a", "response_format": {"type": "json_object"}}, "guided_regex", "contradict"),
    ({"guided_regex": "a", "ignore_eos": True}, "ignore_eos", "does not go with"),
]


@pytest.mark.parametrize(("fields", "param", "words"), WRONG, ids=lambda value: str(value)[:60])
def test_wrong_forms(served: Served, fields: dict[str, Any], param: str, words: str) -> None:
    for ask in (served.chat, served.completion):
        error(ask(**fields), param, words)


class Choosy(FakeEngine):
    seconds = 0.0

    def compile_grammar(self, wanted: StructuredOutputs) -> Any:
        time.sleep(self.seconds)
        raise RequestError("this cannot be compiled", param="structured_outputs.json")


def test_what_does_not_compile_is_refused_by_the_name_that_it_was_given(serve: Serve) -> None:
    """And the event loop is free meanwhile: another request's answer comes first."""
    choosy = Choosy(tokenizer=templates.TemplateTokenizer(templates.HERMES), max_model_len=4096)
    served = serve(choosy)
    for fields, param in (
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"guided_json": {}}, "guided_json"),
        ({"structured_outputs": {"regex": "x"}}, "structured_outputs"),
    ):
        error(served.chat(**fields), param, "this cannot be compiled")
        error(served.completion(**fields), param, "this cannot be compiled")
    tool = {"type": "function", "function": {"name": "f"}}
    error(served.chat(tools=[tool], tool_choice="required"), "tools", "this cannot be compiled")

    body = orjson.dumps({"model": MODEL, "prompt": "a", "guided_regex": "x"})
    choosy.seconds = 2.0
    with served.connect("/v1/completions", body):
        start = time.monotonic()
        assert served.completion(max_tokens=1).status_code == 200
        assert time.monotonic() - start < 1.5


# --- templates -----------------------------------------------------------------------------------------


def test_a_message_is_continued(serve: Serve) -> None:
    served = serve(
        engine(
            "{% for m in messages %}[{{ m.content }}]{% endfor %}{% if add_generation_prompt %}!{% endif %}"
        )
    )
    messages = [USER, {"role": "assistant", "content": "Once upon"}]
    assert served.chat(messages=messages, max_tokens=1, continue_final_message=True).status_code == 200
    assert prompt(served) == "[a][Once upon"
    served.chat(messages=messages, max_tokens=1, add_generation_prompt=False)
    assert prompt(served) == "[a][Once upon]"
    served.chat(messages=messages, max_tokens=1)
    assert prompt(served) == "[a][Once upon]!"
    both = {"continue_final_message": True, "add_generation_prompt": True}
    error(served.chat(messages=messages, **both), "continue_final_message", "begins one")


def test_variables_of_the_template(serve: Serve) -> None:
    served = serve(
        engine("{{ messages[0].content }}{{ mood }}{% for d in documents or [] %}{{ d.text }}{% endfor %}")
    )
    fields: dict[str, Any] = {"chat_template_kwargs": {"mood": "good"}, "documents": [{"text": "D"}]}
    assert served.chat(max_tokens=1, **fields).status_code == 200
    assert prompt(served) == "agoodD"
    for kwargs, param in (
        ({"mode": 1}, "chat_template_kwargs.mode"),
        ({"messages": []}, "chat_template_kwargs.messages"),
        ({"tools": []}, "chat_template_kwargs.tools"),
        ({"mood": "x" * 70000}, "chat_template_kwargs"),
        ({f"m{n}": 1 for n in range(65)}, "chat_template_kwargs"),
        ([1], "chat_template_kwargs"),
    ):
        error(served.chat(chat_template_kwargs=kwargs), param)
    error(served.chat(chat_template_kwargs={"documents": []}, documents=[]), "documents", "too")
    error(served.chat(documents=[{"text": 1}]), "documents[0].text")
    error(served.chat(documents=[{}] * 257), "documents")
    error(serve(engine(templates.PLAIN)).chat(documents=[{"text": "x"}]), "documents", "does not read it")


def test_a_slow_template_is_refused_and_holds_nobody_up(serve: Serve) -> None:
    source = (
        "{% if messages[0].content == 'slow' %}{{ 10**(10**(messages|length + 8)) }}{% endif %}"
        "{{ messages[0].content }}"
    )
    served = serve(engine(source))
    body = orjson.dumps({"model": MODEL, "messages": [{"role": "user", "content": "slow"}]})
    assert served.chat(max_tokens=1).status_code == 200  # the process that renders is there
    with served.connect("/v1/chat/completions", body) as connection:
        for _ in range(3):
            start = time.monotonic()
            assert served.chat(max_tokens=1).status_code == 200
            assert time.monotonic() - start < 1
        reply = read(connection)
    assert reply.startswith(b"HTTP/1.1 400")
    assert b"the chat template takes longer than 2 s" in reply


# --- the rest ------------------------------------------------------------------------------------------


def test_token_ids(served: Served) -> None:
    fields = {"max_tokens": 2, "return_token_ids": True}
    choice = served.completion(**fields).json()["choices"][0]
    assert (choice["prompt_token_ids"], choice["token_ids"]) == ([97], [98, 99])
    body = served.chat(**fields).json()
    assert body["choices"][0]["token_ids"] == [98, 99]
    assert len(body["prompt_token_ids"]) == 3
    for ask in (served.completion, served.chat):
        events = [line[6:] for line in ask(stream=True, **fields).text.split("\n\n") if line][:-1]
        chunks = [orjson.loads(event) for event in events]
        ids = [token for chunk in chunks for token in chunk["choices"][0].get("token_ids", ())]
        assert ids == [98, 99]
        assert (
            sum("prompt_token_ids" in chunk or "prompt_token_ids" in chunk["choices"][0] for chunk in chunks)
            == 1
        )


def test_tokens_named_by_their_ids(served: Served) -> None:
    fields: dict[str, Any] = {"max_tokens": 1, "return_tokens_as_token_ids": True}
    logprobs = served.completion(logprobs=1, **fields).json()["choices"][0]["logprobs"]
    assert logprobs["tokens"] == ["token_id:98"]
    assert list(logprobs["top_logprobs"][0]) == ["token_id:98"]
    logprobs = served.chat(logprobs=True, top_logprobs=2, **fields).json()["choices"][0]["logprobs"]
    assert [top["token"] for top in logprobs["content"][0]["top_logprobs"]] == ["token_id:98", "token_id:99"]


@pytest.mark.parametrize("stream", [False, True])
def test_stop_strings_are_shown_when_asked_for(served: Served, stream: bool) -> None:
    fields: dict[str, Any] = {"stop": ["de", "zz"], "max_tokens": 9, "stream": stream}
    for include, text in ((False, "bc"), (True, "bcde")):
        fields["include_stop_str_in_output"] = include
        done = served.openai.completions.create(model=MODEL, prompt="a", extra_body=fields)
        said = served.openai.chat.completions.create(model=MODEL, messages=[USER], extra_body=fields)
        if stream:
            assert (
                "".join(chunk.choices[0].text for chunk in _chunks(served, "/v1/completions", fields)) == text
            )
            parts = [chunk.choices[0].delta for chunk in _chunks(served, "/v1/chat/completions", fields)]
            assert "".join(getattr(delta, "content", None) or "" for delta in parts) == text
        else:
            assert (done.choices[0].text, said.choices[0].message.content) == (text, text)


def _chunks(served: Served, path: str, fields: dict[str, Any]) -> list[Any]:
    if path == "/v1/completions":
        return list(served.openai.completions.create(model=MODEL, prompt="a", stream=True, extra_body=fields))
    made = served.openai.chat.completions.create(model=MODEL, messages=[USER], stream=True, extra_body=fields)
    return list(made)


def test_truncated_prompts(served: Served) -> None:
    reply = served.completion(prompt="xyzab", truncate_prompt_tokens=2, echo=True, max_tokens=1).json()
    assert reply["choices"][0]["text"] == "abc"
    assert reply["usage"]["prompt_tokens"] == 2
    assert served.chat(truncate_prompt_tokens=2, max_tokens=1).json()["usage"]["prompt_tokens"] == 2
    error(served.completion(truncate_prompt_tokens=0), "truncate_prompt_tokens")


def test_usage_all_along(served: Served) -> None:
    fields: Any = {"max_tokens": 3, "stream_options": {"include_usage": True, "continuous_usage_stats": True}}
    chunks = list(served.openai.completions.create(model=MODEL, prompt="a", stream=True, **fields))
    assert [chunk.usage.completion_tokens for chunk in chunks if chunk.usage] == [1, 2, 3, 3]
    said = list(served.openai.chat.completions.create(model=MODEL, messages=[USER], stream=True, **fields))
    assert [chunk.usage.completion_tokens for chunk in said if chunk.usage] == [1, 1, 2, 3, 3]
    error(
        served.completion(stream=True, stream_options={"include_obfuscation": True}),
        "stream_options.include_obfuscation",
    )


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"metadata": {"k": 1}}, "metadata"),
        ({"metadata": {str(n): "" for n in range(17)}}, "metadata"),
        ({"metadata": {"k" * 65: ""}}, "metadata"),
        ({"metadata": {"k": "v" * 513}}, "metadata"),
        ({"metadata": []}, "metadata"),
        ({"store": "yes"}, "store"),
        ({"user": 5}, "user"),
        ({"user": "u" * 513}, "user"),
        ({"safety_identifier": []}, "safety_identifier"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_inert_fields_have_their_form(served: Served, fields: dict[str, Any], param: str) -> None:
    error(served.chat(**fields), param)
    error(served.completion(**fields), param)


URLS = [
    "http://127.0.0.1:9/x.png",
    "file:///etc/passwd",
    "http://169.254.169.254/latest",
    "data:image/png;base64,AA==",
]


@pytest.mark.parametrize("url", URLS)
@pytest.mark.parametrize("kind", ["image_url", "input_audio", "file", "video_url"])
def test_only_text_and_no_connection(
    serve: Serve, monkeypatch: pytest.MonkeyPatch, url: str, kind: str
) -> None:
    served = serve(FakeEngine())
    connections: list[Any] = []
    own = ("127.0.0.1", served.port)
    connect = socket.socket.connect

    def watched(self: socket.socket, address: Any) -> None:
        if address != own:
            connections.append(address)
        connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", watched)
    find = socket.getaddrinfo

    def looked_up(*address: Any, **options: Any) -> Any:
        if address[:2] != own:
            connections.append(address)
        return find(*address, **options)

    monkeypatch.setattr(socket, "getaddrinfo", looked_up)
    part = {"type": kind, kind: {"url": url}}
    body = orjson.dumps({"model": MODEL, "messages": [{"role": "user", "content": [part]}]})
    with served.connect("/v1/chat/completions", body) as connection:
        reply = read(connection)
    assert b"400 Bad Request" in reply
    assert b"only text is served" in reply
    assert b"messages[0].content[0].type" in reply
    assert connections == []


COUNTLESS: list[tuple[str, dict[str, Any], str | None]] = [
    ("completion", {"n": 10**9}, "n"),
    ("completion", {"best_of": 10**9}, "best_of"),
    ("completion", {"logprobs": 10**6}, "logprobs"),
    ("completion", {"prompt_logprobs": 10**6}, "prompt_logprobs"),
    ("completion", {"prompt": ["a"] * 10**5}, "prompt"),
    ("completion", {"prompt": [[97]] * 10**5}, "prompt"),
    ("completion", {"stop": ["x"] * 10**5}, "stop"),
    ("completion", {"stop_token_ids": [1] * 10**5}, "stop_token_ids"),
    ("completion", {"logit_bias": {str(n): 1 for n in range(10**5)}}, "logit_bias"),
    ("chat", {"n": 10**9}, "n"),
    ("chat", {"logprobs": True, "top_logprobs": 10**6}, "top_logprobs"),
    ("chat", {"stop": ["x"] * 10**5}, "stop"),
    ("chat", {"messages": [USER] * 10**5}, "messages"),
    (
        "chat",
        {"messages": [{"role": "user", "content": [{"type": "text", "text": ""}] * 10**5}]},
        "messages[0].content",
    ),
    ("chat", {"tools": [{"type": "function", "function": {"name": "f"}}] * 50_000}, "tools"),
    # more objects than any request has: refused before it is parsed, so that no field is known
    ("chat", {"tools": [{"type": "function", "function": {"name": "f"}}] * 10**5}, None),
    ("chat", {"messages": [{**USER, "name": "n" * 10**5}]}, "messages[0].name"),
    ("chat", {"logit_bias": {"1" * 10**5: 1}}, "logit_bias"),
    ("chat", {"metadata": {str(n): "" for n in range(10**5)}}, "metadata"),
    ("chat", {"x" * 10**5: 1}, "x" * 64),
]


@pytest.mark.parametrize(("route", "fields", "param"), COUNTLESS, ids=lambda value: str(value)[:40])
def test_everything_that_can_be_counted_has_a_bound(
    served: Served, route: str, fields: dict[str, Any], param: str | None
) -> None:
    reply = (served.chat if route == "chat" else served.completion)(**fields)
    error(reply, param)
    assert len(reply.content) < 1000


def test_stop_strings_never_leak(serve: Serve) -> None:
    served = serve(FakeEngine(script="one two </s> three </stop> four"))
    for stop, text in (("</stop>", "one two </s> three "), ("two </s> t", "one "), ("!", None)):
        reply = served.openai.chat.completions.create(model=MODEL, messages=[USER], stop=stop, stream=True)
        seen = ""
        for chunk in reply:
            seen += chunk.choices[0].delta.content or ""
            assert text is None or text.startswith(seen)
        assert seen == (text or "one two </s> three </stop> four")


def test_the_error_is_the_clients_own(served: Served) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        served.openai.chat.completions.create(model=MODEL, messages=[USER], functions=[])
    assert (caught.value.param, caught.value.code) == ("functions", "unsupported_parameter")


def test_who_waits_for_a_grammar_keeps_nobody_from_chatting(serve: Serve) -> None:
    go = threading.Event()
    slow = FakeEngine()
    slow.compile_grammar = lambda wanted: go.wait(20) and wanted  # type: ignore[method-assign]
    served = serve(slow)
    fields = {"model": MODEL, "prompt": "a", "max_tokens": 1, "structured_outputs": {"regex": "b"}}
    connections = [served.connect("/v1/completions", orjson.dumps(fields)) for _ in range(40)]
    try:
        assert served.chat(max_tokens=1).status_code == 200
        assert served.completion(max_tokens=1, prompt="x" * 20_000).status_code == 400  # beyond the context
        assert not any(request.params.structured_outputs for request in slow.requests)
    finally:
        go.set()
        for connection in connections:
            assert connection.recv(20).startswith(b"HTTP/1.1 200")
            connection.close()


def test_too_many_grammars_at_once(serve: Serve) -> None:
    busy = FakeEngine()

    def refuse(wanted: object) -> None:
        raise EngineBusy(3)

    busy.compile_grammar = refuse  # type: ignore[method-assign]
    reply = serve(busy).completion(structured_outputs={"regex": "b"})
    assert reply.status_code == 429
    assert reply.headers["retry-after"] == "3"
