"""`jaxserve serve` as a user runs it: a process, the embedded model, the `openai` client, a real engine."""

from __future__ import annotations

import signal
from collections.abc import Iterator

import httpx
import openai
import pytest

from tests.serving import Server, started

ARGS = ["--max-slots", "4", "--prefill-chunk", "64", "--max-model-len", "256", "--page-size", "16"]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with started(tmp_path_factory.mktemp("serve"), ARGS) as server:
        yield server


@pytest.fixture
def client(server: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


MODEL = "jaxserve-embedded"


def greedy(client: openai.OpenAI) -> str:
    reply = client.completions.create(model=MODEL, prompt="def add(a, b):", max_tokens=16, temperature=0)
    return reply.choices[0].text


def test_it_says_what_it_does_while_it_starts(server: Server) -> None:
    printed = server.printed()
    for words in (
        "compiled program 1 of",
        "weights in place",
        "objective throughput: ",
        "warm after",
        server.url,
        "curl",
        "tokens/s",
    ):
        assert words in printed, printed
    assert [model["id"] for model in httpx.get(f"{server.url}/v1/models").json()["data"]] == [MODEL]


def test_streams_and_whole_replies_agree(server: Server, client: openai.OpenAI) -> None:
    question = [{"role": "user", "content": "write the function that adds two numbers"}]
    options = {"model": MODEL, "messages": question, "max_tokens": 40, "temperature": 0}
    whole = client.chat.completions.create(**options)
    chunks = list(client.chat.completions.create(**options, stream=True))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content
    assert whole.usage.completion_tokens > 0
    assert chunks[-1].choices[0].finish_reason == whole.choices[0].finish_reason


def test_echo_with_logprobs_scores_the_prompt(client: openai.OpenAI) -> None:
    reply = client.completions.create(
        model=MODEL, prompt="import os\n", max_tokens=0, echo=True, logprobs=2, temperature=0
    )
    scores = reply.choices[0].logprobs
    assert reply.choices[0].text == "import os\n"
    assert scores.token_logprobs[0] is None and all(value < 0 for value in scores.token_logprobs[1:])


def test_a_client_that_leaves_frees_its_slot(server: Server, client: openai.OpenAI) -> None:
    before = greedy(client)
    for stream in (True, False):
        for _ in range(6):  # four run, two wait
            try:
                with (
                    httpx.Client(timeout=0.3) as leaving,
                    leaving.stream(
                        "POST",
                        f"{server.url}/v1/completions",
                        json={
                            "model": MODEL,
                            "prompt": "x",
                            "max_tokens": 250,
                            "ignore_eos": True,
                            "stream": stream,
                        },
                    ) as response,
                ):
                    next(response.iter_raw())
            except httpx.ReadTimeout:
                pass
    server.settle()
    assert greedy(client) == before


BAD = [
    ({"prompt": ""}, 400, "empty"),
    ({"prompt": []}, 400, "prompt"),
    ({"prompt": [1] * 300}, 400, "300 tokens"),
    ({"prompt": [-1]}, 400, "-1"),
    ({"prompt": [10**6]}, 400, "1000000"),
    ({"max_tokens": -1}, 400, "max_tokens"),
    ({"max_tokens": 10**18}, 400, "max_tokens"),
    ({"max_tokens": 0}, 400, "max_tokens"),
    ({"model": "nobody"}, 404, "nobody"),
    ({"surprise": 1}, 400, "surprise"),
]


@pytest.mark.parametrize(("changes", "status", "words"), BAD)
def test_bad_input_is_refused_and_the_next_request_is_served(server, client, changes, status, words) -> None:
    before = greedy(client)
    body = {"model": MODEL, "prompt": "x", "max_tokens": 4} | changes
    reply = httpx.post(f"{server.url}/v1/completions", json=body)
    assert reply.status_code == status and words in reply.json()["error"]["message"]
    assert greedy(client) == before


@pytest.mark.parametrize("body", [b"{", b"", b'{"temperature": NaN}', b"\xff", b"[" * 100_000])
def test_what_is_not_json_is_refused(server, client, body) -> None:
    reply = httpx.post(f"{server.url}/v1/completions", content=body)
    assert reply.status_code == 400 and reply.json()["error"]["message"]
    assert greedy(client)


def test_sigterm_ends_it_with_0(server: Server, client: openai.OpenAI) -> None:
    server.settle()
    server.process.send_signal(signal.SIGTERM)
    assert server.process.wait(30) == 0
