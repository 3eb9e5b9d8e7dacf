"""Bad input is a 4xx that names the field, and the next request is answered as if nothing had happened."""

from __future__ import annotations

import socket
from typing import Any

import openai
import orjson
import pytest

from tests.fakes import VOCABULARY, FakeTokenizer
from tests.server.fakes import FakeEngine
from tests.server.harness import MODEL, Serve, Served

# fields -> (status, param, code, text in the message)
COMPLETIONS: list[tuple[dict[str, Any], int, str | None, str | None, str]] = [
    ({"prompt": ""}, 400, "prompt", None, "the prompt is empty"),
    ({"prompt": []}, 400, "prompt", None, "the prompt is empty"),
    ({"prompt": [""]}, 400, "prompt", None, "the prompt is empty"),
    ({"prompt": [[]]}, 400, "prompt", None, "the prompt is empty"),
    ({"prompt": None}, 400, "prompt", "missing_required_parameter", "prompt is required"),
    ({"prompt": 5}, 400, "prompt", None, "must be a string, token ids, or a list"),
    ({"prompt": {"a": 1}}, 400, "prompt", None, "must be a string, token ids, or a list"),
    ({"prompt": ["a", [97]]}, 400, "prompt", None, "mixes strings and token ids"),
    ({"prompt": [97, "a"]}, 400, "prompt", None, "must be integers"),
    ({"prompt": [97, 1.5]}, 400, "prompt", None, "must be integers"),
    ({"prompt": [True]}, 400, "prompt", None, "must be integers"),
    ({"prompt": [[97, None]]}, 400, "prompt", None, "must be integers"),
    ({"prompt": [1e30]}, 400, "prompt", None, "must be integers"),
    ({"prompt": [2**64 - 1]}, 400, "prompt", None, f"token id {2**64 - 1}"),
    ({"prompt": [97, -1]}, 400, "prompt", None, f"token id -1; ids lie in [0, {VOCABULARY - 1}]"),
    ({"prompt": [VOCABULARY]}, 400, "prompt", None, f"token id {VOCABULARY}"),
    ({"prompt": "a" * 257}, 400, "prompt", "context_length_exceeded", "has 257 tokens; the context is 256"),
    (
        {"prompt": "a" * 250},
        400,
        "max_tokens",
        "context_length_exceeded",
        "max_tokens=16 and a prompt of 250",
    ),
    ({"prompt": ["a"] * 3000}, 400, "prompt", None, "3000 prompts; at most 2048"),
    ({"prompt": ["a"] * 100, "n": 100}, 400, "n", None, "100 prompts times n=100"),
    ({"max_tokens": -1}, 400, "max_tokens", None, "max_tokens=-1 must lie in"),
    ({"max_tokens": 1e18}, 400, "max_tokens", "invalid_value", "max_tokens: Input should be a valid integer"),
    ({"max_tokens": 10**18}, 400, "max_tokens", None, "max_tokens=1000000000000000000 must lie in"),
    ({"max_tokens": 0}, 400, "max_tokens", None, "max_tokens=0 needs echo or prompt_logprobs"),
    ({"max_tokens": True}, 400, "max_tokens", "invalid_value", "max_tokens: Input should be a valid integer"),
    ({"max_tokens": "5"}, 400, "max_tokens", "invalid_value", "max_tokens: Input should be a valid integer"),
    ({"max_tokens": 5.0}, 400, "max_tokens", "invalid_value", "max_tokens: Input should be a valid integer"),
    ({"temperature": -0.1}, 400, "temperature", None, "temperature=-0.1 must lie in"),
    (
        {"temperature": "hot"},
        400,
        "temperature",
        "invalid_value",
        "temperature: Input should be a valid number",
    ),
    (
        {"temperature": True},
        400,
        "temperature",
        "invalid_value",
        "temperature: Input should be a valid number",
    ),
    ({"top_p": 0}, 400, "top_p", None, "top_p=0"),
    ({"top_p": 1.1}, 400, "top_p", None, "top_p=1.1 must lie in"),
    ({"top_k": -2}, 400, "top_k", None, "top_k=-2 must lie in"),
    ({"n": 0}, 400, "n", None, "n=0 must lie in"),
    ({"n": 10**9}, 400, "n", None, "n=1000000000 must lie in"),
    ({"seed": -1}, 400, "seed", None, "seed=-1 must lie in"),
    ({"seed": 2**63}, 400, "seed", None, f"seed={2**63} must lie in"),
    ({"logprobs": 21}, 400, "logprobs", None, "logprobs=21 must lie in [0, 20]"),
    ({"logprobs": 10**6}, 400, "logprobs", None, "logprobs=1000000 must lie in"),
    ({"logprobs": True}, 400, "logprobs", "invalid_value", "logprobs: Input should be a valid integer"),
    ({"prompt_logprobs": -1}, 400, "prompt_logprobs", None, "prompt_logprobs=-1 must lie in"),
    ({"prompt_logprobs": 1, "stream": True}, 400, "prompt_logprobs", None, "not available with stream"),
    ({"stop": [""]}, 400, "stop", None, "non-empty strings"),
    ({"stop": ["x"] * 17}, 400, "stop", "invalid_value", "stop: there are 17 items; at most 16"),
    ({"stop": [1]}, 400, "stop[0]", "invalid_value", "stop[0]: Input should be a valid string"),
    ({"stop": 5}, 400, "stop", "invalid_value", "stop: Input should be a valid list"),
    ({"stop_token_ids": [-1]}, 400, "stop_token_ids", None, "-1 is not a token id"),
    ({"stop_token_ids": [VOCABULARY]}, 400, "stop_token_ids", None, "not in the vocabulary"),
    ({"allowed_token_ids": []}, 400, "allowed_token_ids", None, "allowed_token_ids is empty"),
    ({"logit_bias": {"x": 1}}, 400, "logit_bias", None, "'x' is not a token id"),
    ({"logit_bias": {"-1": 1}}, 400, "logit_bias", None, "'-1' is not a token id"),
    ({"logit_bias": {"1": 101}}, 400, "logit_bias", None, "must lie in [-100, 100]"),
    ({"logit_bias": {str(VOCABULARY): 1}}, 400, "logit_bias", None, "not in the vocabulary"),
    ({"logit_bias": {"1": "x"}}, 400, "logit_bias.1", "invalid_value", "Input should be a valid number"),
    ({"min_tokens": 5, "max_tokens": 4}, 400, "min_tokens", None, "min_tokens=5 is more than max_tokens=4"),
    ({"presence_penalty": 3}, 400, "presence_penalty", None, "presence_penalty=3"),
    ({"repetition_penalty": 0}, 400, "repetition_penalty", None, "repetition_penalty=0"),
    ({"echo": 1}, 400, "echo", "invalid_value", "echo: Input should be a valid boolean"),
    ({"stream": "yes"}, 400, "stream", "invalid_value", "stream: Input should be a valid boolean"),
    ({"stream_options": {"include_usage": True}}, 400, "stream_options", None, "only allowed with stream"),
    (
        {"stream": True, "stream_options": {"often": True}},
        400,
        "stream_options.often",
        "unknown_parameter",
        "unknown field: stream_options.often",
    ),
    ({"best_of": 0}, 400, "best_of", None, "best_of=0 must lie in [1, 128]"),
    ({"best_of": 129}, 400, "best_of", None, "best_of=129 must lie in [1, 128]"),
    ({"best_of": "3"}, 400, "best_of", "invalid_value", "best_of: Input should be a valid integer"),
    ({"best_of": 2, "n": 3}, 400, "best_of", None, "best_of=2 is less than n=3"),
    ({"best_of": 2, "temperature": 0}, 400, "best_of", None, "best_of=2 needs a temperature above 0"),
    ({"best_of": 2, "stream": True}, 400, "best_of", None, "best_of other than n is not available with"),
    ({"suffix": "x"}, 400, "suffix", "unsupported_parameter", "suffix is not supported"),
    ({"temprature": 1}, 400, "temprature", "unknown_parameter", "unknown field: 'temprature'"),
    ({"messages": []}, 400, "messages", "unknown_parameter", "unknown field: 'messages'"),
    ({"model": "gpt-5"}, 404, "model", "model_not_found", "the model 'gpt-5' does not exist"),
    ({"model": None}, 400, "model", "missing_required_parameter", "model is required"),
    ({"model": 5}, 400, "model", "invalid_value", "model: Input should be a valid string"),
]

# both endpoints take these
PLACE: list[tuple[dict[str, Any], int, str | None, str | None, str]] = [
    ({"service_tier": "scale"}, 400, "service_tier", None, "'scale' must be one of auto, default, flex"),
    ({"service_tier": "FLEX"}, 400, "service_tier", None, "'FLEX' must be one of auto, default, flex"),
    (
        {"service_tier": 1},
        400,
        "service_tier",
        "invalid_value",
        "service_tier: Input should be a valid string",
    ),
    ({"priority": 2**31}, 400, "priority", None, "priority=2147483648 must lie in"),
    ({"priority": -(2**31)}, 400, "priority", None, "priority=-2147483648 must lie in"),
    ({"priority": 1.5}, 400, "priority", "invalid_value", "priority: Input should be a valid integer"),
    ({"priority": True}, 400, "priority", "invalid_value", "priority: Input should be a valid integer"),
    ({"cache_salt": "x" * 257}, 400, "cache_salt", None, "cache_salt has 257 bytes; at most 256"),
    ({"cache_salt": "\u00e4" * 129}, 400, "cache_salt", None, "cache_salt has 258 bytes; at most 256"),
    ({"cache_salt": 5}, 400, "cache_salt", "invalid_value", "cache_salt: Input should be a valid string"),
    ({"timeout": 0}, 400, "timeout", "invalid_value", "timeout: Input should be greater than 0"),
    ({"timeout": -1.5}, 400, "timeout", "invalid_value", "timeout: Input should be greater than 0"),
    ({"timeout": "5"}, 400, "timeout", "invalid_value", "timeout: Input should be a valid number"),
    ({"timeout": True}, 400, "timeout", "invalid_value", "timeout: Input should be a valid number"),
]

USER = {"role": "user", "content": "a"}
CHAT: list[tuple[dict[str, Any], int, str | None, str | None, str]] = [
    ({"messages": []}, 400, "messages", None, "messages is empty"),
    ({"messages": None}, 400, "messages", "missing_required_parameter", "messages is required"),
    ({"messages": "a"}, 400, "messages", "invalid_value", "messages: Input should be a valid list"),
    ({"messages": ["a"]}, 400, "messages[0]", "invalid_value", "messages[0]: "),
    (
        {"messages": [{"role": "user"}]},
        400,
        "messages[0].content",
        "missing_required_parameter",
        "is required",
    ),
    ({"messages": [{"content": "a"}]}, 400, "messages[0].role", "missing_required_parameter", "is required"),
    ({"messages": [{**USER, "role": "king"}]}, 400, "messages[0].role", "invalid_value", "Input should be"),
    ({"messages": [{**USER, "role": "function"}]}, 400, "messages[0].role", "invalid_value", "Input should"),
    (
        {"messages": [{**USER, "tool_calls": []}]},
        400,
        "messages[0].tool_calls",
        "unknown_parameter",
        "unknown field",
    ),
    (
        {
            "messages": [
                {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "file:///x"}}]}
            ]
        },
        400,
        "messages[0].content[0].type",
        "invalid_value",
        "only text is served: this must be 'text', not 'image_url'",
    ),
    (
        {"messages": [{"role": "user", "content": 5}]},
        400,
        "messages[0].content",
        "invalid_value",
        "valid list",
    ),
    (
        {"messages": [{"role": "user", "content": "a" * 300}]},
        400,
        "messages",
        "context_length_exceeded",
        "the prompt has 302 tokens; the context is 256",
    ),
    ({"max_tokens": 255}, 400, "max_tokens", "context_length_exceeded", "max_tokens=255 and a prompt of 3"),
    ({"max_completion_tokens": 255}, 400, "max_completion_tokens", "context_length_exceeded", "255"),
    ({"max_completion_tokens": -1}, 400, "max_completion_tokens", None, "must lie in"),
    ({"max_completion_tokens": 0}, 400, "max_completion_tokens", None, "needs echo or prompt_logprobs"),
    ({"max_completion_tokens": 2, "max_tokens": 3}, 400, "max_completion_tokens", None, "contradicts"),
    ({"logprobs": 1}, 400, "logprobs", "invalid_value", "logprobs: Input should be a valid boolean"),
    ({"top_logprobs": 1}, 400, "top_logprobs", None, "only allowed with logprobs"),
    ({"logprobs": True, "top_logprobs": 21}, 400, "top_logprobs", None, "=21 must lie in [0, 20]"),
    ({"echo": True}, 400, "echo", "unknown_parameter", "unknown field: 'echo'"),
    ({"prompt": "a"}, 400, "prompt", "unknown_parameter", "unknown field: 'prompt'"),
    *(
        ({name: value}, 400, name, "unsupported_parameter", f"{name} is not supported")
        for name, value in {
            "functions": [],
            "function_call": "none",
            "modalities": ["text", "audio"],
            "audio": {"voice": "x"},
            "prediction": {},
            "web_search_options": {},
            "verbosity": "low",
            "prompt_cache_key": "x",
            "suffix": "x",
            "bad_words": ["x"],
            "use_beam_search": True,
            "logits_processors": ["x"],
            "chat_template": "{{ 1 }}",
            "request_id": "x",
            "mm_processor_kwargs": {},
        }.items()
    ),
]

# bytes -> (status, code, text in the message)
BODIES: list[tuple[bytes, str, str]] = [
    (b"", "invalid_json", "not valid JSON"),
    (b"{", "invalid_json", "not valid JSON"),
    (b"model=alphabet", "invalid_json", "not valid JSON"),
    (b"[]", "invalid_json", "must be a JSON object"),
    (b'"a"', "invalid_json", "must be a JSON object"),
    (b"\xff\xfe", "invalid_json", "not valid JSON"),
    (b'{"logit_bias": {"1": NaN}}', "invalid_json", "not valid JSON"),
    (b'{"messages": [Infinity]}', "invalid_json", "not valid JSON"),
    (b"[NaN]", "invalid_json", "not valid JSON"),
    (b"NaN", "invalid_json", "not valid JSON"),
    (b'{"\\ud800": NaN}', "invalid_json", "not valid JSON"),
    (b'{"n": ' + b"1" * 5000 + b', "temperature": NaN}', "invalid_json", "not valid JSON"),
    (b'{"prompt": "\\ud800"}', "invalid_json", "not valid JSON"),
    (b"[" * 100_000 + b"]" * 100_000, "invalid_json", "not valid JSON"),
    (b'{"a":' * 100_000 + b"1" + b"}" * 100_000, "invalid_json", "not valid JSON"),
    (b'{"model": "alphabet", "prompt": ' + b"[" * 900 + b"]" * 900 + b"}", "", "must be integers"),
]


def case_name(value: object) -> str:
    return repr(value)[:40] if isinstance(value, dict | bytes) else ""


def check_error(reply: Any, status: int, param: str | None, code: str | None, text: str) -> None:
    assert reply.status_code == status, reply.text
    error = reply.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error"
    assert text in error["message"]
    assert (error["param"], error["code"]) == (param, code)


@pytest.mark.parametrize(("fields", "status", "param", "code", "text"), COMPLETIONS + PLACE, ids=case_name)
def test_completions(
    served: Served, fields: dict[str, Any], status: int, param: str, code: str, text: str
) -> None:
    check_error(served.completion(**fields), status, param, code, text)
    served.as_new()


@pytest.mark.parametrize(("fields", "status", "param", "code", "text"), CHAT + PLACE, ids=case_name)
def test_chat(served: Served, fields: dict[str, Any], status: int, param: str, code: str, text: str) -> None:
    check_error(served.chat(**fields), status, param, code, text)
    served.as_new()


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
@pytest.mark.parametrize(("body", "code", "text"), BODIES, ids=case_name)
def test_bodies(served: Served, path: str, body: bytes, code: str, text: str) -> None:
    reply = served.http.post(path, content=body)
    assert reply.status_code == 400
    if code:
        assert reply.json()["error"]["code"] == code
        assert text in reply.json()["error"]["message"]
    served.as_new()


NUMBERS = (
    *(
        "temperature",
        "top_p",
        "top_k",
        "min_p",
        "presence_penalty",
        "frequency_penalty",
        "repetition_penalty",
    ),
    *("n", "max_tokens", "min_tokens", "seed", "prompt_logprobs", "priority", "timeout"),
)


@pytest.mark.parametrize(
    ("word", "shown"), [("NaN", "nan"), ("Infinity", "inf"), ("-Infinity", "-inf"), ("1e400", "inf")]
)
def test_numbers_that_are_none_are_named(served: Served, word: str, shown: str) -> None:
    """NaN is not JSON, though Python's `json` writes it: the answer says which field holds it."""
    for name in (*NUMBERS, "best_of", "logprobs"):
        body = f'{{"model": "{MODEL}", "prompt": "a", "{name}": {word}}}'
        reply = served.http.post("/v1/completions", content=body)
        check_error(reply, 400, name, "invalid_value", f"{name}={shown} must be a finite number")
    for name in (*NUMBERS, "max_completion_tokens", "top_logprobs"):
        body = f'{{"model": "{MODEL}", "messages": [{{"role": "user", "content": "a"}}], "{name}": {word}}}'
        reply = served.http.post("/v1/chat/completions", content=body)
        check_error(reply, 400, name, "invalid_value", f"{name}={shown} must be a finite number")
    # not even where the field asks for nothing
    body = f'{{"model": "{MODEL}", "prompt": "a", "user": {word}}}'
    assert served.http.post("/v1/completions", content=body).status_code == 400
    served.as_new()


def test_the_client_sees_its_own_exceptions(served: Served) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        served.openai.completions.create(model="other", prompt="a")
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as wrong:
        served.openai.completions.create(model=MODEL, prompt="a", temperature=-1, stream=True)
    assert wrong.value.param == "temperature"


@pytest.mark.parametrize(
    "fields",
    [
        {"user": "u", "metadata": {"a": "b"}, "store": True, "safety_identifier": "x"},
        {"suffix": None, "best_of": None, "logprobs": None, "never_heard_of": None, "stop": None},
        {"service_tier": None, "priority": None, "cache_salt": None, "timeout": None},
        {"cache_salt": "", "response_format": {"type": "text"}},
        {"best_of": 1},
        {"stream": False, "n": 1, "stop": []},
        {"stream": True, "stream_options": {"include_usage": False, "include_obfuscation": False}},
    ],
)
def test_what_asks_for_nothing_passes(served: Served, fields: dict[str, Any]) -> None:
    assert served.completion(**fields).status_code == 200


@pytest.mark.parametrize(
    "path", ["/index.html", "/v1", "/v1/images", "//v1/models", "/health/", "/v1/completions/"]
)
def test_unknown_paths(served: Served, path: str) -> None:
    reply = served.http.get(f"{served.url}{path}")
    assert reply.status_code == 404
    assert reply.json()["error"]["code"] == "not_found"


def test_nulls_are_as_if_absent_wherever_fields_are_known(served: Served) -> None:
    none = {"foo": None}
    message = {"role": "assistant", "content": [{"type": "text", "text": "a", **none}], **none}
    fields = {
        "messages": [{"role": "user", "content": "a"}, message, {"role": "user", "content": "b"}],
        "response_format": {"type": "json_object", **none},
        "stream_options": {"include_usage": None},
        "stream": True,
        "tool_choice": None,
        **none,
    }
    reply = served.chat(**fields, max_tokens=1)
    assert reply.status_code == 200, reply.text
    assert '"usage"' not in reply.text
    items = [{"role": "user", "content": [{"type": "input_text", "text": "a", **none}], **none}]
    fields = {"input": items, "text": {"format": {"type": "text", **none}, **none}, **none}
    reply = served.http.post("/v1/responses", json={"model": "alphabet", "max_output_tokens": 1, **fields})
    assert reply.status_code == 200, reply.text
    for path, wrong in (
        ("logit_bias.5", {"logit_bias": {"5": None}}),  # the client's own names
        ("response_format.foo", {"response_format": {"type": "json_object", "foo": 0}}),
    ):
        reply = served.chat(**wrong)
        assert (reply.status_code, reply.json()["error"]["param"]) == (400, path)


def test_wrong_method(served: Served) -> None:
    reply = served.http.get("/v1/completions")
    assert reply.status_code == 405
    assert reply.json()["error"]["type"] == "invalid_request_error"


POST = b"POST /v1/completions HTTP/1.1\r\n"


@pytest.mark.parametrize(
    ("sent", "text"),
    [
        (POST + b"Host: localhost\r\nContent-Length: many\r\n\r\n", "bad Content-Length"),
        (POST + b"Host: localhost\r\nContent-Length: -1\r\n\r\n", "bad Content-Length"),
        (POST + b"Host: localhost\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n", "Content-Length"),
        (POST + b"Content-Length: 0\r\n\r\n", "Host"),
        (POST + b"Host: localhost\r\nTransfer-Encoding: chunked\r\n\r\nnone\r\n", "chunk header"),
        (POST + b"Host: localhost\r\n\xff\x00: y\r\n\r\n", "header"),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\x07" * 500, "request"),  # TLS's first words
        (
            POST + b"Host: localhost\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
            "Content-Length or Transfer-Encoding, not both",
        ),
        (
            b"GET /health HTTP/1.1\r\nHost: localhost\r\n"
            b"transfer-encoding: Chunked\r\ncontent-length: 5\r\n\r\n"
            b"0\r\n\r\nGET /health HTTP/1.1\r\nHost: localhost\r\n\r\n",
            "Content-Length or Transfer-Encoding, not both",
        ),
    ],
    ids=case_name,
)
def test_what_is_no_http(served: Served, sent: bytes, text: str) -> None:
    """Is told so in OpenAI's form, once, and the connection closed."""
    with socket.create_connection(("127.0.0.1", served.port), timeout=10) as connection:
        connection.sendall(sent)
        head, _, body = b"".join(iter(lambda: connection.recv(2**16), b"")).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 400 Bad Request\r\n")
    headers = dict(line.lower().split(b": ", 1) for line in head.split(b"\r\n")[1:])
    assert headers[b"content-type"] == b"application/json"
    assert headers[b"content-length"] == str(len(body)).encode()
    assert headers[b"connection"] == b"close"
    error = orjson.loads(body)["error"]
    assert text.lower() in error.pop("message").lower()
    assert error == {"type": "invalid_request_error", "param": None, "code": None}
    served.as_new()


def test_a_broken_body_after_the_answer_is_not_answered_again(
    served: Served, caplog: pytest.LogCaptureFixture
) -> None:
    with socket.create_connection(("127.0.0.1", served.port), timeout=10) as connection:
        connection.sendall(b"POST /nowhere HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n")
        answer = b""
        while not answer.endswith(b"}}"):
            answer += connection.recv(2**16)
        assert answer.startswith(b"HTTP/1.1 404")
        connection.sendall(b"none\r\n")
        assert connection.recv(2**16) == b""
    assert "Fatal error" not in caplog.text
    served.as_new()


def test_large_bodies(serve: Serve) -> None:
    served = serve(FakeEngine(), max_body_bytes=10_000)
    body = orjson.dumps({"model": MODEL, "prompt": "a", "user": "x" * 20_000})
    for content in (body, iter([body[:15_000], body[15_000:]])):  # with a declared length, and in chunks
        reply = served.http.post("/v1/completions", content=content)
        assert reply.status_code == 413
        assert reply.json()["error"]["message"] == "the request's body is larger than 10000 bytes"
        served.as_new()


def test_a_large_body_is_not_asked_for(serve: Serve) -> None:
    """A client that waits for "100 Continue" hears 413 before it sends anything."""
    served = serve(FakeEngine(), max_body_bytes=10_000)
    connection = socket.create_connection(("127.0.0.1", served.port), timeout=10)
    connection.sendall(
        b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n"
        b"Content-Length: 100000000\r\nExpect: 100-continue\r\n\r\n"
    )
    assert connection.recv(100).startswith(b"HTTP/1.1 413")
    connection.close()
    served.as_new()


@pytest.mark.parametrize(
    "path", ["/v1/completions", "/v1/chat/completions", "/v1/embeddings", "/v1/messages"]
)
def test_a_text_far_beyond_the_context_is_not_tokenized(
    served: Served, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken: list[int] = []
    encode = FakeTokenizer.encode

    def counted(self: FakeTokenizer, text: str, **options: Any) -> list[int]:
        taken.append(len(text))
        return encode(self, text, **options)

    monkeypatch.setattr(FakeTokenizer, "encode", counted)
    text = "word " * 1_000_000
    fields: dict[str, Any] = {"prompt": text}
    if "embeddings" in path:
        fields = {"input": text}
    elif "completions" not in path or "chat" in path:
        fields = {"messages": [{"role": "user", "content": text}], "max_tokens": 5}
    reply = served.http.post(path, json={"model": MODEL, **fields})
    assert reply.status_code == 400, reply.text
    assert "context" in reply.text
    assert max(taken) < 10_000
