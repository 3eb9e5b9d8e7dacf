"""Tiers, queue, deadlines, caches and `--reproducible` together, over HTTP and on a real engine."""

from __future__ import annotations

import concurrent.futures
import contextlib
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from tests.serving import Server, started

ROOT = Path(__file__).resolve().parent.parent
MODEL = "jaxserve-embedded"
SLOTS, QUEUED = 4, 8
ARGS = ["--max-slots", str(SLOTS), "--prefill-chunk", "64", "--max-model-len", "512", "--page-size", "16"]
ARGS += ["--reproducible", "--response-cache", "16", "--max-queued", str(QUEUED)]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("serve")
    with started(folder, ARGS, {"XDG_CACHE_HOME": str(folder)}) as server:
        yield server


@pytest.fixture
def client(server: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client
    server.settle()


def post(server: Server, **fields: Any) -> httpx.Response:
    """A completion that is computed anew unless `cache_salt` says otherwise."""
    salt = f"{time.monotonic_ns()}"
    body = {"model": MODEL, "prompt": "x", "temperature": 0, "cache_salt": salt} | fields
    return httpx.post(f"{server.url}/v1/completions", json=body, timeout=60)


def long(server: Server, tokens: int = 400, **fields: Any) -> httpx.Response:
    return post(server, max_tokens=tokens, ignore_eos=True, **fields)


def test_a_prefix_is_computed_once(server: Server, client: openai.OpenAI) -> None:
    question = "def fibonacci(n):\n" * 20
    before = server.metric("jaxserve_prefix_cache_hits_total")
    first = client.completions.create(model=MODEL, prompt=question, max_tokens=1, seed=1)
    again = client.completions.create(model=MODEL, prompt=question + "print(", max_tokens=1, seed=1)
    assert first.usage.prompt_tokens_details.cached_tokens == 0
    cached = again.usage.prompt_tokens_details.cached_tokens
    whole_pages = first.usage.prompt_tokens // 16 * 16
    assert cached == whole_pages > 32
    assert server.metric("jaxserve_prefix_cache_hits_total") == before + cached
    salted = client.completions.create(
        model=MODEL, prompt=question, max_tokens=1, seed=1, extra_body={"cache_salt": "another tenant"}
    )
    assert salted.usage.prompt_tokens_details.cached_tokens == 0


def test_beyond_the_queue_only_429_and_the_others_do_not_notice(server: Server) -> None:
    alone = long(server, 200).json()["choices"][0]["text"]
    refused: list[tuple[float, httpx.Response]] = []

    def one() -> str | None:
        begin = time.monotonic()
        reply = long(server, 200)
        if reply.status_code == 200:
            return str(reply.json()["choices"][0]["text"])
        refused.append((time.monotonic() - begin, reply))
        return None

    with concurrent.futures.ThreadPoolExecutor(3 * (SLOTS + QUEUED)) as pool:
        replies = [each.result() for each in [pool.submit(one) for _ in range(3 * (SLOTS + QUEUED))]]
    texts = [text for text in replies if text is not None]
    assert len(texts) >= SLOTS + QUEUED and set(texts) == {alone}
    assert refused and {reply.status_code for _, reply in refused} == {429}
    for _, reply in refused:
        assert 1 <= int(reply.headers["retry-after"]) <= 120
        assert reply.json()["error"]["code"] == "rate_limit_exceeded", reply.text
    server.settle()
    assert long(server, 200).json()["choices"][0]["text"] == alone


def test_a_deadline_frees_the_slot(server: Server) -> None:
    reply = long(server, timeout=0.05)
    assert reply.status_code == 408
    server.settle()


def test_batch_work_gives_way_and_loses_nothing(server: Server) -> None:
    prompts = [f"class Number{i}:" for i in range(SLOTS + 3)]
    alone = [long(server, prompt=prompt).json()["choices"][0] for prompt in prompts]
    before = server.metric("jaxserve_preemptions_total")
    ended: list[float] = []

    def one(prompt: str) -> Any:
        reply = long(server, prompt=prompt, service_tier="flex", stream=False).json()
        ended.append(time.monotonic())
        return reply["choices"][0]

    with concurrent.futures.ThreadPoolExecutor(len(prompts)) as pool:
        behind = [pool.submit(one, prompt) for prompt in prompts]
        while server.metric("jaxserve_requests_running") < SLOTS:
            time.sleep(0.01)
        ahead = post(server, prompt="import", max_tokens=4)
        came = time.monotonic()
        assert ahead.status_code == 200 and not ended, "the interactive request waited for batch work"
        assert [each.result() for each in behind] == alone
    assert came < min(ended)
    assert server.metric("jaxserve_preemptions_total") > before


def test_the_response_cache_changes_no_answer(server: Server) -> None:
    fields: dict[str, Any] = {"prompt": "for i in", "max_tokens": 24, "logprobs": 3, "n": 2, "seed": 5}
    fields |= {"temperature": 0.9}
    computed = post(server, **fields).json()  # under a salt of its own
    first = post(server, **fields, cache_salt="a").json()
    deadline = time.monotonic() + 10
    while not (again := post(server, **fields, cache_salt="a").json())["usage"].get("response_cached"):
        assert time.monotonic() < deadline
    assert computed["choices"] == first["choices"] == again["choices"]
    assert not first["usage"].get("response_cached")
    assert server.metric("jaxserve_response_cache_hits_total") >= 1
    streamed = post(server, **fields, cache_salt="a", stream=True).text
    assert streamed.count("data: ") > 2 and streamed.endswith("data: [DONE]\n\n")


def test_the_best_of_several_share_their_prompt(server: Server) -> None:
    prompt = "def quicksort(items):\n" * 10
    before = server.metric("jaxserve_prompt_tokens_total")
    reply = post(server, prompt=prompt, best_of=4, n=2, temperature=1.0, seed=3, max_tokens=8).json()
    assert len(reply["choices"]) == 2
    assert reply["usage"]["prompt_tokens"] == server.metric("jaxserve_prompt_tokens_total") - before


def test_many_leave_in_every_state(server: Server) -> None:
    expected = post(server, max_tokens=16).json()["choices"]
    stop = threading.Event()

    def leave(after: float) -> None:
        while not stop.is_set():
            body = {"model": MODEL, "prompt": "y " * 100, "max_tokens": 300, "service_tier": "flex"}
            with contextlib.suppress(httpx.ReadTimeout):
                httpx.post(f"{server.url}/v1/completions", json=body | {"ignore_eos": True}, timeout=after)

    leaving = [threading.Thread(target=leave, args=(0.01 * 3**i,)) for i in range(3) for _ in range(2)]
    for thread in leaving:
        thread.start()
    replies = [post(server, max_tokens=16).json()["choices"] for _ in range(10)]
    stop.set()
    for thread in leaving:
        thread.join()
    assert replies == [expected] * 10
    server.settle()


@pytest.mark.slow
def test_traffic_leaves_nothing_behind(tmp_path: Path) -> None:
    """A minute of what `benchmarks/endurance.py` does for an hour."""
    command = [sys.executable, "-m", "benchmarks.endurance"]
    options = ["--seconds", "40", "--every", "2", "--clients", "12"]
    env = {**os.environ, "XDG_CACHE_HOME": str(tmp_path)}
    done = subprocess.run([*command, *options], cwd=ROOT, capture_output=True, text=True, env=env)
    report = json.loads(done.stdout)
    assert done.returncode == 0 and report["healthy"], (report["result"] | {"readings": None}, done.stderr)
    assert report["result"]["counts"]["left"] and report["result"]["counts"]["200"]
