"""`/v1/chat/completions` through the `openai` client, against answers computed by hand."""

from __future__ import annotations

import math
from typing import Any

import pytest

from tests.fakes import FakeTokenizer
from tests.server.fakes import FakeEngine
from tests.server.harness import MODEL, Serve, Served
from tests.server.templates import TemplateTokenizer

LN2 = math.log(2)
HELLO: Any = [{"role": "user", "content": "a"}]


def test_message(served: Served) -> None:
    reply = served.openai.chat.completions.create(model=MODEL, messages=HELLO, max_tokens=3)
    assert reply.object == "chat.completion"
    [choice] = reply.choices
    assert (choice.message.role, choice.message.content, choice.finish_reason) == (
        "assistant",
        "bcd",
        "length",
    )
    assert reply.usage is not None
    assert (reply.usage.prompt_tokens, reply.usage.completion_tokens) == (3, 3)


def test_rest_of_the_context_by_default(serve: Serve) -> None:
    served = serve(FakeEngine(max_model_len=32))
    reply = served.chat().json()
    assert reply["choices"][0]["finish_reason"] == "length"
    assert reply["usage"]["total_tokens"] == 32


@pytest.mark.parametrize("fields", [{"max_tokens": 2}, {"max_completion_tokens": 2}])
def test_both_names_of_the_limit(served: Served, fields: dict[str, int]) -> None:
    assert served.chat(**fields).json()["choices"][0]["message"]["content"] == "bc"


def test_roles_parts_and_a_returned_answer(served: Served) -> None:
    """`developer` is `system`, parts are lines, and an answer can be sent back as the client got it."""
    first = served.openai.chat.completions.create(model=MODEL, messages=HELLO, max_tokens=1)
    messages = [
        {"role": "developer", "content": "be brief"},
        {"role": "user", "content": [{"type": "text", "text": "x"}, {"type": "text", "text": "a"}]},
        first.choices[0].message.model_dump(),
        {"role": "user", "content": "5"},
    ]
    reply = served.chat(messages=messages, max_tokens=2).json()
    assert reply["choices"][0]["message"]["content"] == "67"
    assert reply["usage"]["prompt_tokens"] == 1 + 8 + 1 + 3 + 1 + 1 + 1 + 1 + 1


def test_n_and_stop(served: Served) -> None:
    reply = served.chat(n=3, stop=["d"], max_tokens=9).json()
    assert [choice["message"]["content"] for choice in reply["choices"]] == ["bc"] * 3
    assert [choice["finish_reason"] for choice in reply["choices"]] == ["stop"] * 3


def test_logprobs(served: Served) -> None:
    reply = served.openai.chat.completions.create(
        model=MODEL,
        messages=HELLO,
        max_tokens=1,
        logprobs=True,
        top_logprobs=2,
    )
    assert reply.choices[0].logprobs is not None
    assert reply.choices[0].logprobs.content is not None
    [token] = reply.choices[0].logprobs.content
    assert (token.token, token.bytes) == ("b", [98])
    assert token.logprob == pytest.approx(-LN2)
    assert [(top.token, top.bytes) for top in token.top_logprobs] == [("b", [98]), ("c", [99])]
    assert [top.logprob for top in token.top_logprobs] == pytest.approx([-LN2, -2 * LN2])


def test_logprobs_without_alternatives(served: Served) -> None:
    reply = served.chat(max_tokens=1, logprobs=True).json()
    assert reply["choices"][0]["logprobs"]["content"][0]["top_logprobs"] == []
    assert served.chat(max_tokens=1).json()["choices"][0]["logprobs"] is None


def test_prompt_logprobs(served: Served) -> None:
    reply = served.chat(max_tokens=1, prompt_logprobs=0).json()
    assert reply["prompt_logprobs"][0] is None
    assert len(reply["prompt_logprobs"]) == 3


def test_stream(served: Served) -> None:
    chunks = list(
        served.openai.chat.completions.create(model=MODEL, messages=HELLO, max_tokens=3, stream=True)
    )
    deltas = [chunk.choices[0].delta for chunk in chunks]
    assert (deltas[0].role, deltas[0].content) == ("assistant", "")
    assert [delta.content for delta in deltas[1:]] == ["b", "c", "d"]
    assert [delta.role for delta in deltas[1:]] == [None] * 3
    assert [chunk.choices[0].finish_reason for chunk in chunks] == [None, None, None, "length"]
    assert {chunk.object for chunk in chunks} == {"chat.completion.chunk"}


def test_stream_of_several_with_usage_and_logprobs(served: Served) -> None:
    stream = served.openai.chat.completions.create(
        model=MODEL,
        messages=[{"role": "user", "content": "X"}],
        n=2,
        logprobs=True,
        stream=True,
        stream_options={"include_usage": True},
    )
    texts, tokens, finished = ["", ""], [0, 0], ["", ""]
    *chunks, last = list(stream)
    for chunk in chunks:
        assert chunk.usage is None
        [choice] = chunk.choices
        texts[choice.index] += choice.delta.content or ""
        if choice.logprobs is not None:
            tokens[choice.index] += len(choice.logprobs.content or [])
        finished[choice.index] += choice.finish_reason or ""
    assert texts == ["YZ", "YZ"]
    assert tokens == [3, 3]
    assert finished == ["stop", "stop"]
    assert last.choices == []
    assert last.usage is not None
    assert last.usage.completion_tokens == 6


def test_no_chat_template(serve: Serve) -> None:
    served = serve(FakeEngine(tokenizer=FakeTokenizer(has_chat_template=False)))
    reply = served.chat()
    assert reply.status_code == 400
    assert "no chat template" in reply.json()["error"]["message"]
    served.as_new()


def test_the_template_refuses(served: Served) -> None:
    reply = served.chat(messages=HELLO * 2)
    assert reply.status_code == 400
    assert reply.json()["error"] == {
        "message": "the chat template refuses these messages: conversation roles must alternate",
        "type": "invalid_request_error",
        "param": "messages",
        "code": None,
    }


def test_special_token_text_in_a_message_stays_text(served: Served) -> None:
    reply = served.chat(messages=[{"role": "user", "content": "<end>a"}], max_tokens=1).json()
    assert reply["usage"]["prompt_tokens"] == 1 + 1 + len("<end>a")


def named_template(condition: str) -> str:
    return (
        "{% for m in messages %}[{{ m.role }}{% if " + condition + " %} {{ m.name }}{% endif %}]"
        "{{ m.content }}{% endfor %}"
    )


NAMED: Any = [
    {"role": "system", "content": "two guests", "name": "host"},
    {"role": "user", "content": "a", "name": "ann"},
]


def test_a_name_goes_to_the_template(serve: Serve) -> None:
    served = serve(FakeEngine(tokenizer=TemplateTokenizer(named_template("m.name"))))
    reply = served.chat(messages=NAMED, max_tokens=1)
    assert reply.status_code == 200, reply.text
    [request] = served.engine.requests
    assert bytes(request.prompt_token_ids.tolist()) == b"[system host]two guests[user ann]a"
    # a name that is what the template would write anyway is read too
    served = serve(FakeEngine(tokenizer=TemplateTokenizer("{{ messages[0].name or 'ann' }}")))
    assert served.chat(messages=NAMED[1:], max_tokens=1).status_code == 200


@pytest.mark.parametrize(
    ("condition", "role"),
    [("false", "system"), ("m.role == 'system'", "user"), ("m.role == 'user'", "system")],
)
def test_a_name_that_the_template_does_not_read_is_refused(serve: Serve, condition: str, role: str) -> None:
    served = serve(FakeEngine(tokenizer=TemplateTokenizer(named_template(condition))))
    reply = served.chat(messages=NAMED)
    assert reply.status_code == 400
    assert reply.json()["error"] == {
        "message": f"messages: the model's chat template does not read the name of a {role} message;"
        " leave it out, or write it into the content",
        "type": "invalid_request_error",
        "param": "messages",
        "code": "unsupported_parameter",
    }
    unnamed = [{**message, "name": None} for message in NAMED]
    assert served.chat(messages=unnamed, max_tokens=1).status_code == 200


def test_no_logprobs_and_no_alternatives(served: Served) -> None:
    """Clients that send every field send these."""
    reply = served.chat(logprobs=False, top_logprobs=0, max_tokens=2)
    assert reply.json()["choices"][0]["logprobs"] is None
    body = {"model": MODEL, "input": "a", "max_output_tokens": 2, "top_logprobs": 0}
    assert served.http.post("/v1/responses", json=body).status_code == 200
