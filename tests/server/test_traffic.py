"""Whose turn it is and what happens when there is too much: tiers, priorities, salts, timeouts, overload, a
stuck device, what was cached, and the best of several.
"""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

import httpx
import openai
import orjson
import pytest
from prometheus_client.parser import text_string_to_metric_families

from jaxserve.response_cache import CachingEngine, ResponseCache
from jaxserve.scheduler.types import Tier
from tests.server.fakes import FakeEngine
from tests.server.harness import MODEL, Serve, Served, until

HELLO: Any = [{"role": "user", "content": "a"}]


def ask(served: Served, endpoint: str, **fields: object) -> httpx.Response:
    return served.chat(**fields) if endpoint == "chat" else served.completion(**fields)


def samples(served: Served) -> dict[tuple[str, ...], float]:
    """Sample name, then label values -> value."""
    return {
        (sample.name, *sample.labels.values()): sample.value
        for family in text_string_to_metric_families(served.http.get("/metrics").text)
        for sample in family.samples
    }


both = pytest.mark.parametrize("endpoint", ["completions", "chat"])

# --- where a request stands ---


@both
@pytest.mark.parametrize(
    ("default", "fields", "tier", "said"),
    [
        ("default", {}, Tier.ONLINE, "default"),
        ("default", {"service_tier": "default"}, Tier.ONLINE, "default"),
        ("default", {"service_tier": "auto"}, Tier.ONLINE, "default"),
        ("default", {"service_tier": "flex"}, Tier.BATCH, "flex"),
        ("flex", {}, Tier.BATCH, "flex"),
        ("flex", {"service_tier": None}, Tier.BATCH, "flex"),
        ("flex", {"service_tier": "default"}, Tier.ONLINE, "default"),
    ],
)
def test_service_tier(
    serve: Serve, endpoint: str, default: str, fields: dict[str, Any], tier: Tier, said: str
) -> None:
    served = serve(FakeEngine(), service_tier=default)
    assert ask(served, endpoint, max_tokens=1, **fields).json()["service_tier"] == said
    streamed = ask(served, endpoint, max_tokens=1, stream=True, **fields).text
    chunks = [orjson.loads(line[6:]) for line in streamed.split("\n\n")[:-2]]
    assert {chunk["service_tier"] for chunk in chunks} == {said}
    assert [request.tier for request in served.engine.requests] == [tier, tier]


def test_the_openai_client_asks_for_a_tier(serve: Serve) -> None:
    served = serve(FakeEngine())
    reply = served.openai.chat.completions.create(model=MODEL, messages=HELLO, service_tier="flex")
    assert reply.service_tier == "flex"
    [request] = served.engine.requests
    assert request.tier is Tier.BATCH


@both
def test_priority_and_timeout_reach_the_engine(serve: Serve, endpoint: str) -> None:
    served = serve(FakeEngine())
    before = time.monotonic()
    assert ask(served, endpoint, max_tokens=1).status_code == 200
    assert ask(served, endpoint, max_tokens=1, priority=-3, timeout=90).status_code == 200
    plain, request = served.engine.requests
    assert (plain.priority, plain.deadline, plain.salt) == (0, None, b"")
    assert request.priority == -3
    assert request.deadline is not None
    assert before + 90 <= request.deadline <= time.monotonic() + 90
    assert request.deadline == pytest.approx(request.arrival_time + 90)


def test_caches_are_separate_by_key_and_by_salt(serve: Serve) -> None:
    served = serve(FakeEngine(), keys=["ann", "bob"])
    for key in ("ann", "bob"):
        for salt in (None, "", "x", "y"):
            for endpoint in ("completions", "chat/completions"):
                prompt = {"messages": HELLO} if "chat" in endpoint else {"prompt": "a"}
                reply = served.http.post(
                    f"/v1/{endpoint}",
                    json={"model": MODEL, **prompt, "max_tokens": 1, "cache_salt": salt},
                    headers={"Authorization": f"Bearer {key}"},
                )
                assert reply.status_code == 200
    salts = [request.salt for request in served.engine.requests]
    assert len(set(salts)) == 6  # two keys times none, "x" and "y"; both endpoints, null and "" are one
    assert all(len(salt) == 32 for salt in salts)


def test_without_keys_the_salt_alone_separates(serve: Serve) -> None:
    served = serve(FakeEngine())
    for salt in (None, "x", "x", "y"):
        served.http.post(
            "/v1/completions",
            json={"model": MODEL, "prompt": "a", "max_tokens": 1, "cache_salt": salt},
            headers={"Authorization": "Bearer whatever"},  # nobody checked it, so it says nothing
        )
    none, first, again, other = [request.salt for request in served.engine.requests]
    assert none == b""
    assert first == again
    assert len({none, first, other}) == 3


def test_a_long_salt_is_taken(served: Served) -> None:
    assert served.completion(max_tokens=1, cache_salt="x" * 256).status_code == 200


# --- too much ---


@both
@pytest.mark.parametrize("stream", [False, True])
def test_a_full_queue_is_429(serve: Serve, endpoint: str, stream: bool) -> None:
    engine = FakeEngine(slots=1, max_queued=1, delay=0.01, retry_after=3)
    served = serve(engine)
    connections = []
    for number in range(2):
        connections.append(
            served.connect(
                "/v1/completions", orjson.dumps({"model": MODEL, "prompt": "a", "max_tokens": 200})
            )
        )
        until(lambda taken=number + 1: len(engine.requests) == taken)  # type: ignore[misc]
        until(lambda: engine.stats()["running"] == 1)
    reply = ask(served, endpoint, stream=stream)
    assert reply.status_code == 429
    assert reply.headers["retry-after"] == "3"
    assert reply.json()["error"] == {
        "message": "the server has more requests than it can queue; try again in 3 s",
        "type": "requests",
        "param": None,
        "code": "rate_limit_exceeded",
    }
    assert samples(served)["jaxserve_requests_rejected_total",] == 1
    for connection in connections:
        connection.close()
    served.as_new()


def test_a_request_of_several_prompts_is_all_or_nothing(serve: Serve) -> None:
    engine = FakeEngine(slots=1, max_queued=1, delay=0.01)
    served = serve(engine)
    six = ["a", "b", "c", "d", "e", "f"]  # more than may queue, but nobody waits
    assert len(served.completion(prompt=six, max_tokens=1).json()["choices"]) == 6
    body = {"model": MODEL, "prompt": ["a", "a"], "max_tokens": 250}
    connection = served.connect("/v1/completions", orjson.dumps(body))
    until(lambda: engine.stats()["waiting"] == 1)
    taken = len(engine.requests)
    assert served.completion(prompt=six, max_tokens=200).status_code == 429
    assert len(engine.requests) == taken
    connection.close()
    served.as_new()


def test_the_openai_client_waits_as_told_and_tries_again(serve: Serve) -> None:
    served = serve(FakeEngine(retry_after=1))
    with pytest.raises(openai.RateLimitError) as refused:
        served.engine.busy = 1
        served.openai.completions.create(model=MODEL, prompt="a")
    assert refused.value.code == "rate_limit_exceeded"
    served.engine.busy = 1
    begin = time.monotonic()
    reply = served.openai.with_options(max_retries=1).completions.create(
        model=MODEL, prompt="a", max_tokens=2
    )
    assert reply.choices[0].text == "bc"
    assert time.monotonic() - begin >= 1.0


# --- too late ---


@both
@pytest.mark.parametrize("slots", [1, 2])
def test_a_deadline_is_408(serve: Serve, endpoint: str, slots: int) -> None:
    """Queued behind another, or while it runs."""
    served = serve(FakeEngine(slots=slots, delay=0.01))
    before = served.connect(
        "/v1/completions", orjson.dumps({"model": MODEL, "prompt": "a", "max_tokens": 250})
    )
    until(lambda: served.engine.stats()["running"] == 1)
    reply = ask(served, endpoint, max_tokens=200, timeout=0.2)
    assert reply.status_code == 408
    assert reply.json()["error"] == {
        "message": "the request's timeout passed before it was answered",
        "type": "timeout_error",
        "param": "timeout",
        "code": "timeout",
    }
    assert served.engine.stats()["running"] == 1  # the other is not disturbed
    before.close()
    served.as_new()


def test_a_deadline_in_a_stream_is_an_event_and_the_end(serve: Serve) -> None:
    served = serve(FakeEngine(delay=0.01))
    reply = served.completion(max_tokens=200, timeout=0.2, stream=True)
    assert reply.status_code == 200
    *events, error, done, rest = reply.text.split("\n\n")
    assert (done, rest) == ("data: [DONE]", "")
    assert orjson.loads(error[6:])["error"]["code"] == "timeout"
    text = "".join(orjson.loads(event[6:])["choices"][0]["text"] for event in events)
    assert text.startswith("bcd")
    assert len(text) < 200
    served.as_new()


def test_one_prompt_too_late_ends_them_all(serve: Serve) -> None:
    served = serve(FakeEngine(slots=1, delay=0.01))
    assert served.completion(prompt=["X", "a"], max_tokens=200, timeout=0.3).status_code == 408
    served.as_new()


def test_the_openai_client_does_not_repeat_what_came_too_late(serve: Serve) -> None:
    served = serve(FakeEngine(delay=0.01))
    client = served.openai.with_options(max_retries=2)
    with pytest.raises(openai.APIStatusError) as late:
        client.completions.create(model=MODEL, prompt="a", max_tokens=200, extra_body={"timeout": 0.1})
    assert (late.value.status_code, late.value.code) == (408, "timeout")
    assert len(served.engine.requests) == 1


def test_a_timeout_that_is_kept_changes_nothing(served: Served) -> None:
    assert served.completion(max_tokens=3, timeout=60).json()["choices"][0]["text"] == "bcd"


# --- stuck ---


def test_a_stuck_device_fails_health_until_it_comes_back(serve: Serve) -> None:
    served = serve(FakeEngine())
    served.as_new()
    served.engine.stuck = "the device has not finished step 7 (prefill 512) for 130 s"
    for path in ("/health", "/ready", "/v1/models"):
        reply = served.http.get(path)
        assert reply.status_code == 503
        error = reply.json()["error"]
        assert (error["message"], error["code"]) == (served.engine.stuck, "engine_stuck")
    assert served.completion().status_code == 503
    served.engine.stuck = None
    served.as_new()


# --- what was cached ---


def test_cached_tokens_in_usage(serve: Serve) -> None:
    served = serve(FakeEngine())
    for cached in (0, 2):
        reply = served.openai.chat.completions.create(model=MODEL, messages=HELLO, max_tokens=2)
        assert reply.usage is not None
        assert reply.usage.prompt_tokens == 3
        assert reply.usage.prompt_tokens_details is not None
        assert reply.usage.prompt_tokens_details.cached_tokens == cached
    reply = served.completion(prompt=["bca", "cba", "bca"], n=2, max_tokens=2).json()
    assert reply["usage"]["prompt_tokens_details"] == {"cached_tokens": 0}
    reply = served.completion(prompt=["bca", "cbx"], n=2, max_tokens=2).json()
    assert reply["usage"]["prompt_tokens_details"] == {"cached_tokens": 2}  # once for both sequences
    assert "response_cached" not in reply["usage"]


@both
def test_cached_tokens_in_a_streams_usage(serve: Serve, endpoint: str) -> None:
    served = serve(FakeEngine())
    fields = {"max_tokens": 2, "stream": True, "stream_options": {"include_usage": True}}
    for turn in range(2):
        last = orjson.loads(ask(served, endpoint, **fields).text.split("\n\n")[-3][6:])
        tokens = last["usage"]["prompt_tokens"]
        assert last["usage"]["prompt_tokens_details"] == {"cached_tokens": (tokens - 1) * turn}


@both
@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_from_the_response_cache(serve: Serve, tmp_path: Path, endpoint: str, stream: bool) -> None:
    inner = FakeEngine()
    cache = ResponseCache(tmp_path / "responses.sqlite", 2**20, pytest.fail)
    served = serve(CachingEngine(inner, cache), keys=["ann", "bob"])

    def say(key: str, **fields: object) -> tuple[list[Any], bool]:
        """The choices, and whether they were cached."""
        prompt = {"messages": HELLO} if endpoint == "chat" else {"prompt": "a"}
        options = {"stream": True, "stream_options": {"include_usage": True}} if stream else {}
        path = "chat/completions" if endpoint == "chat" else "completions"
        reply = served.http.post(
            f"/v1/{path}",
            json={"model": MODEL, **prompt, "max_tokens": 5, "temperature": 0, **options, **fields},
            headers={"Authorization": f"Bearer {key}"},
        )
        assert reply.status_code == 200
        replies = (
            [orjson.loads(event[6:]) for event in reply.text.split("\n\n")[:-2]] if stream else [reply.json()]
        )
        cached = [one["usage"].get("response_cached", False) for one in replies if one.get("usage")]
        return [one["choices"] for one in replies], cached == [True]

    first, cached = say("ann", n=2)
    assert not cached
    until(lambda: served.caching.stats()["response_cache_bytes"] > 0)
    until(lambda: say("ann", n=2) == (first, True))
    assert say("bob", n=2) == (first, False)
    assert not say("ann", n=2, cache_salt="x")[1]
    assert not say("ann", temperature=1)[1]
    metrics = served.http.get("/metrics", headers={"Authorization": "Bearer ann"}).text
    lines = dict(line.split(" ") for line in metrics.splitlines() if line.startswith("jaxserve_response"))
    assert float(lines["jaxserve_response_cache_hits_total"]) == 1
    assert float(lines["jaxserve_response_cache_misses_total"]) == len(inner.requests) - 1
    assert 0 < float(lines["jaxserve_response_cache_bytes"]) <= 2**20


# --- the best of several ---


def test_best_of(serve: Serve) -> None:
    """Index 0 is the likeliest, then 1, ...; so "best" are the first, though they may end last."""
    served = serve(FakeEngine())
    reply = served.openai.completions.create(
        model=MODEL, prompt=["a", "0"], n=2, best_of=4, max_tokens=3, logprobs=0, echo=True
    )
    assert [choice.index for choice in reply.choices] == [0, 1, 2, 3]
    assert [choice.text for choice in reply.choices] == ["abcd", "acde", "0123", "0234"]
    assert reply.choices[1].logprobs is not None
    assert reply.choices[1].logprobs.tokens == ["a", "c", "d", "e"]
    assert reply.usage is not None
    assert reply.usage.completion_tokens == 2 * 4 * 3  # all were computed, and count


def test_the_best_is_found_wherever_it_is(serve: Serve) -> None:
    served = serve(FakeEngine(likelihoods=(-9.0, -1.0, -6.0, -2.0)))
    reply = served.completion(best_of=4, n=3, max_tokens=2).json()
    assert [choice["text"] for choice in reply["choices"]] == ["cd", "ef", "de"]
    # per token: "YZ" with its end token is likelier at -9 than the end token alone at -4
    served = serve(FakeEngine(likelihoods=(-9.0, -8.0, -4.0)))
    reply = served.completion(prompt="X", best_of=3, n=1, max_tokens=5).json()
    assert reply["choices"][0]["text"] == "YZ"


def test_best_of_n_is_n(served: Served) -> None:
    for stream in (False, True):
        assert served.completion(best_of=2, n=2, max_tokens=1, stream=stream).status_code == 200


def test_too_many_to_choose_from(served: Served) -> None:
    reply = served.completion(prompt=["a"] * 100, best_of=100)
    assert reply.status_code == 400
    assert reply.json()["error"]["param"] == "best_of"
    assert "100 prompts times best_of=100" in reply.json()["error"]["message"]


def test_chat_has_no_best_of(served: Served) -> None:
    reply = served.chat(best_of=2)
    assert (reply.status_code, reply.json()["error"]["param"]) == (400, "best_of")


# --- metrics ---


def test_metrics(serve: Serve) -> None:
    engine = FakeEngine(slots=1, delay=0.01)
    served = serve(engine)
    connections = []
    for number, tier in enumerate(("default", "flex", "flex")):
        body = {"model": MODEL, "prompt": "xa", "max_tokens": 250, "service_tier": tier}
        connections.append(served.connect("/v1/completions", orjson.dumps(body)))
        until(lambda taken=number + 1: len(engine.requests) == taken)  # type: ignore[misc]
        until(lambda: engine.stats()["running"] == 1)
    found = samples(served)
    expected = {
        ("jaxserve_tier_running", "default"): 1,
        ("jaxserve_tier_running", "flex"): 0,
        ("jaxserve_tier_waiting", "default"): 0,
        ("jaxserve_tier_waiting", "flex"): 2,
        ("jaxserve_tier_preempted", "flex"): 0,
        ("jaxserve_queue_tokens",): 4,
        ("jaxserve_kv_pages_cached",): 3,
        ("jaxserve_requests_rejected_total",): 0,
        ("jaxserve_prefix_cache_queries_total",): 6,
        ("vllm:prefix_cache_queries_total",): 6,
        ("jaxserve_prefix_cache_hits_total",): found["vllm:prefix_cache_hits_total",],
        ("jaxserve_prefix_cache_evictions_total",): 5,
        ("jaxserve_preemptions_total",): 6,
        ("vllm:num_preemptions_total",): 6,
        ("vllm:prompt_tokens_total",): found["jaxserve_prompt_tokens_total",],
        ("vllm:generation_tokens_total",): found["jaxserve_generation_tokens_total",],
        ("vllm:num_requests_waiting",): 2,
    }
    assert {name: found[name] for name in expected} == expected
    assert not any("response_cache" in name for name, *_ in found)
    assert all(math.isfinite(value) for value in found.values())
    for connection in connections:
        connection.close()
    served.as_new()
