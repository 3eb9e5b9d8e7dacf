"""`/tokenize`, `/detokenize` and `/tokenizer_info`."""

from __future__ import annotations

from typing import Any

import pytest

from jaxserve.server.api.tokenize import MAX_CHARACTERS, MAX_TOKENS
from tests.fakes import ASSISTANT, BOS, CHAT_TEMPLATE, EOS, SYSTEM, USER, VOCABULARY, FakeTokenizer
from tests.server.fakes import FakeEngine
from tests.server.harness import MODEL, Serve, Served

HI = {"role": "user", "content": "hi"}


def test_a_text(served: Served) -> None:
    reply = served.http.post("/tokenize", json={"prompt": "abä"})
    tokens = list("abä".encode())
    assert reply.json() == {"count": 4, "max_model_len": 256, "tokens": tokens, "token_strs": None}
    assert served.http.post("/detokenize", json={"tokens": tokens}).json() == {"prompt": "abä"}


def test_the_text_of_each_token(served: Served) -> None:
    reply = served.http.post("/tokenize", json={"model": MODEL, "prompt": "aä", "return_token_strs": True})
    assert reply.json()["token_strs"] == ["a", "\ufffd", "\ufffd"]


def test_special_tokens(serve: Serve) -> None:
    served = serve(FakeEngine(tokenizer=FakeTokenizer(bos=True)))
    assert served.http.post("/tokenize", json={"prompt": "a"}).json()["tokens"] == [BOS, 97]
    bare = served.http.post("/tokenize", json={"prompt": "a", "add_special_tokens": False})
    assert bare.json()["tokens"] == [97]
    assert served.http.post("/tokenize", json={"prompt": ""}).json()["tokens"] == [BOS]
    assert served.http.post("/detokenize", json={"tokens": [BOS, 97]}).json()["prompt"] == "<bos>a"
    skipped = {"tokens": [BOS, 97], "skip_special_tokens": True}
    assert served.http.post("/detokenize", json=skipped).json()["prompt"] == "a"


def test_a_conversation(served: Served) -> None:
    """As chat completions lay it out: the fake puts the assistant's mark before the last byte."""
    messages = [{"role": "system", "content": "s"}, HI]
    reply = served.http.post("/tokenize", json={"messages": messages})
    assert reply.json()["tokens"] == [SYSTEM, ord("s"), USER, ord("h"), ASSISTANT, ord("i")]
    chat = served.openai.chat.completions.create(model=MODEL, messages=messages, max_tokens=1)  # type: ignore[arg-type]
    assert chat.usage is not None
    assert chat.usage.prompt_tokens == reply.json()["count"]
    bare = served.http.post("/tokenize", json={"messages": messages, "add_generation_prompt": False})
    assert bare.json()["tokens"] == [SYSTEM, ord("s"), USER, ord("h"), ord("i")]


def test_an_empty_text_has_no_tokens(served: Served) -> None:
    assert served.http.post("/tokenize", json={"prompt": ""}).json()["count"] == 0
    assert served.http.post("/detokenize", json={"tokens": []}).json()["prompt"] == ""


def test_what_the_harness_reads(serve: Serve) -> None:
    served = serve(FakeEngine(tokenizer=FakeTokenizer(bos=True)))
    assert served.http.get("/tokenizer_info").json() == {
        "tokenizer_class": "FakeTokenizer",
        "vocab_size": VOCABULARY,
        "max_model_len": 256,
        "bos_token": "<bos>",
        "bos_token_id": BOS,
        "eos_token": "<end>",
        "eos_token_id": EOS,
        "eos_token_ids": [EOS],
        "chat_template": CHAT_TEMPLATE,
    }


@pytest.mark.parametrize(
    ("path", "fields", "param", "message"),
    [
        ("/tokenize", {}, "prompt", "prompt or messages is required"),
        ("/tokenize", {"prompt": 5}, "prompt", "valid string"),
        ("/tokenize", {"prompt": ["a"]}, "prompt", "valid string"),
        ("/tokenize", {"prompt": "a" * (MAX_CHARACTERS + 1)}, "prompt", f"at most {MAX_CHARACTERS}"),
        ("/tokenize", {"prompt": "a", "add_special_tokens": 1}, "add_special_tokens", "valid boolean"),
        ("/tokenize", {"prompt": "a", "model": "gpt-5"}, "model", "does not exist"),
        ("/tokenize", {"prompt": "a", "promt": "a"}, "promt", "unknown field"),
        ("/tokenize", {"prompt": "a", "messages": [HI]}, "messages", "contradict each other"),
        ("/tokenize", {"prompt": "a", "tools": []}, "tools", "goes with messages"),
        ("/tokenize", {"messages": []}, "messages", "messages is empty"),
        ("/tokenize", {"messages": [{"role": "user"}]}, "messages[0].content", "is required"),
        ("/tokenize", {"messages": [HI], "add_special_tokens": True}, "add_special_tokens", "itself"),
        ("/detokenize", {}, "tokens", "tokens is required"),
        ("/detokenize", {"tokens": "ab"}, "tokens", "must be a list"),
        ("/detokenize", {"tokens": [97, VOCABULARY]}, "tokens[1]", "ids lie in [0, 260]"),
        ("/detokenize", {"tokens": [-1]}, "tokens[0]", "ids lie in [0, 260]"),
        ("/detokenize", {"tokens": [True]}, "tokens[0]", "no token id"),
        ("/detokenize", {"tokens": [[1]]}, "tokens[0]", "no token id"),
        ("/detokenize", {"tokens": [2**64]}, "tokens[0]", "no token id"),
        ("/detokenize", {"tokens": [1] * (MAX_TOKENS + 1)}, "tokens", f"at most {MAX_TOKENS}"),
        ("/detokenize", {"tokens": [97], "model": "gpt-5"}, "model", "does not exist"),
    ],
)
def test_bad_input(served: Served, path: str, fields: dict[str, Any], param: str, message: str) -> None:
    reply = served.http.post(path, json=fields)
    assert reply.status_code == (404 if param == "model" else 400)
    error = reply.json()["error"]
    assert error["param"] == param
    assert message in error["message"]


def test_a_model_without_a_tokenizer(serve: Serve) -> None:
    served = serve(FakeEngine(with_tokenizer=False))
    replies = [
        served.http.post("/tokenize", json={"prompt": "a"}),
        served.http.post("/detokenize", json={"tokens": [97]}),
        served.http.get("/tokenizer_info"),
    ]
    assert [reply.status_code for reply in replies] == [400] * 3
    assert all("no tokenizer" in reply.json()["error"]["message"] for reply in replies)
