"""What `/metrics` says after work that can be counted by hand; the names that routers and dashboards read."""

from __future__ import annotations

from prometheus_client.parser import text_string_to_metric_families

from tests.server.fakes import FakeEngine
from tests.server.harness import Serve, Served, until

# read by the Gateway API inference extension ("model server protocol") and by vLLM's dashboards
ALIASES = {
    "vllm:num_requests_waiting",
    "vllm:num_requests_running",
    "vllm:kv_cache_usage_perc",
    "vllm:cache_config_info",
    "vllm:time_to_first_token_seconds_bucket",
    "vllm:inter_token_latency_seconds_bucket",
    "vllm:e2e_request_latency_seconds_bucket",
    "vllm:request_queue_time_seconds_bucket",
    "vllm:request_prompt_tokens_bucket",
    "vllm:request_generation_tokens_bucket",
    "vllm:request_success_total",
    "vllm:prompt_tokens_total",
    "vllm:generation_tokens_total",
    "vllm:prefix_cache_queries_total",
    "vllm:prefix_cache_hits_total",
    "vllm:num_preemptions_total",
}
Samples = dict[tuple[str, ...], float]


def scrape(served: Served) -> Samples:
    text = served.http.get("/metrics").text
    return {
        (sample.name, *(f"{name}={value}" for name, value in sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_what_is_counted(serve: Serve) -> None:
    served = serve(FakeEngine(delay=0.001))
    served.completion(prompt="abcd", max_tokens=5)
    served.completion(prompt="abcd", max_tokens=3, n=2)
    served.completion(prompt="X", max_tokens=9)  # YZ and the end token
    samples = scrape(served)
    assert {name for name, *_ in samples} >= ALIASES
    for prefix, word in (("jaxserve_finished", "finish_reason"), ("vllm:request_success", "finished_reason")):
        assert samples[f"{prefix}_total", f"{word}=length"] == 3
        assert samples[f"{prefix}_total", f"{word}=stop"] == 1
    for name, count, total in (
        ("request_generation_tokens", 4, 5 + 3 + 3 + 3),
        ("request_prompt_tokens", 4, 4 + 4 + 4 + 1),
    ):
        for prefix in ("jaxserve_", "vllm:"):
            assert samples[f"{prefix}{name}_count",] == count
            assert samples[f"{prefix}{name}_sum",] == total
    assert samples["jaxserve_request_generation_tokens_bucket", "le=4.0"] == 3
    assert samples["jaxserve_queue_seconds_count",] == 4
    assert samples["jaxserve_request_seconds_count",] == 4
    assert samples["jaxserve_request_prefix_hit_ratio_sum",] == 0.75 * 2  # the second request's two sequences
    assert 0 <= samples["jaxserve_queue_seconds_sum",] <= samples["jaxserve_request_seconds_sum",]


def test_sequences_per_step(serve: Serve) -> None:
    samples = scrape(serve(FakeEngine()))
    assert samples["jaxserve_batch_size_bucket", "le=1.0"] == 2
    assert samples["jaxserve_batch_size_bucket", "le=+Inf"] == 5
    assert samples["jaxserve_batch_size_count",] == 5
    assert samples["jaxserve_batch_size_sum",] == 8


def test_pages_in_use_are_looked_at_while_it_runs(serve: Serve) -> None:
    served = serve(FakeEngine(delay=0.02, pages=16, page_size=16, slots=1))
    with served.http.stream(
        "POST",
        "/v1/completions",
        json={"model": "alphabet", "prompt": "a", "max_tokens": 200, "stream": True},
    ) as reply:
        lines = reply.iter_lines()
        next(lines)
        until(lambda: served.server._context.metrics._page_share.sum > 0)
    name = "jaxserve_kv_cache_usage_sampled_ratio"
    assert 0 < scrape(served)[f"{name}_sum",] <= scrape(served)[f"{name}_count",]


def test_labels_are_not_for_clients_to_choose(serve: Serve) -> None:
    served = serve(FakeEngine(), keys=["secret"])
    served.http.headers["Authorization"] = "Bearer secret"
    for number in range(50):
        served.http.get(f"/nowhere/{number}")
        served.http.get(f"/v1/models/{number}")
        served.http.request(f"METHOD{number}", "/v1/models")
    samples = scrape(served)
    counted = {key: value for key, value in samples.items() if key[0] == "jaxserve_http_requests_total"}
    assert counted == {
        ("jaxserve_http_requests_total", "route=other", "status=404"): 50,
        ("jaxserve_http_requests_total", "route=/v1/models/{model:path}", "status=404"): 50,
        ("jaxserve_http_requests_total", "route=/v1/models", "status=405"): 50,
    }
    assert scrape(served)["jaxserve_http_request_seconds_count", "route=/metrics"] == 1
