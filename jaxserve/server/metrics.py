"""`/metrics`: what the engine counts and what clients wait, for Prometheus.

Each figure has our own name and, where routers read one, vLLM's as an alias (Gateway API inference
extension, "model server protocol"). Gauges are read from `Engine.stats()` when scraped, so they cost
nothing in between. The registry is our own: nothing that a library registers appears here.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from prometheus_client import CollectorRegistry, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from jaxserve.server.holder import EngineHolder

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
TTFT_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
ITL_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1.0, 2.5)
TIERS = {"default": "online", "flex": "batch"}  # as HTTP calls them -> as `Engine.stats()` does
# our name, vLLM's or none, text, key of `Engine.stats()`
COUNTERS = (
    ("prompt_tokens", "prompt_tokens", "Prompt tokens taken", "prompt_tokens_total"),
    ("generation_tokens", "generation_tokens", "Tokens generated", "generation_tokens_total"),
    ("requests", None, "Requests taken", "requests_total"),
    ("requests_rejected", None, "Requests refused because the queue was full", "rejected_total"),
    (
        "prefix_cache_queries",
        "prefix_cache_queries",
        "Prompt tokens looked up in the prefix cache",
        "prefix_queries_tokens",
    ),
    ("prefix_cache_hits", "prefix_cache_hits", "Prompt tokens that it had", "prefix_hit_tokens"),
    ("prefix_cache_evictions", None, "Pages that it had to give up", "evictions"),
    ("preemptions", "num_preemptions", "Sequences that gave their slot to others", "preemptions"),
)
RESPONSE_CACHE_COUNTERS = (
    ("response_cache_hits", None, "Requests answered without computing", "response_cache_hits"),
    ("response_cache_misses", None, "Requests that it could have answered", "response_cache_misses"),
)


class Metrics:
    def __init__(self, holder: EngineHolder) -> None:
        self.time_to_first_token = Histogram(
            "jaxserve_time_to_first_token_seconds",
            "From a request's submission to its first token",
            buckets=TTFT_BUCKETS,
            registry=None,
        )
        self.inter_token_latency = Histogram(
            "jaxserve_inter_token_latency_seconds",
            "Between two tokens of one sequence",
            buckets=ITL_BUCKETS,
            registry=None,
        )
        self._registry = CollectorRegistry()
        self._registry.register(_EngineCollector(holder))
        self._registry.register(_Aliased(self.time_to_first_token, "vllm:time_to_first_token_seconds"))
        self._registry.register(_Aliased(self.inter_token_latency, "vllm:inter_token_latency_seconds"))

    def render(self) -> bytes:
        """The page in Prometheus' text format."""
        return generate_latest(self._registry)


class _Aliased(Collector):
    """One histogram under two names, observed once."""

    def __init__(self, histogram: Histogram, alias: str) -> None:
        self._histogram = histogram
        self._alias = alias

    def collect(self) -> Iterable[Metric]:
        for metric in self._histogram.collect():
            samples = [sample for sample in metric.samples if not sample.name.endswith("_created")]
            for name in (metric.name, self._alias):
                copy = Metric(name, metric.documentation, metric.type)
                for sample in samples:
                    copy.add_sample(sample.name.replace(metric.name, name, 1), sample.labels, sample.value)
                yield copy


class _EngineCollector(Collector):
    """The engine's own figures; none while it loads."""

    def __init__(self, holder: EngineHolder) -> None:
        self._holder = holder

    def collect(self) -> Iterable[Metric]:
        engine = self._holder.engine
        yield GaugeMetricFamily(
            "jaxserve_ready", "1 when the model is loaded and warm", float(engine is not None)
        )
        if engine is None:
            return
        stats = engine.stats()
        total, used = stats["pages_total"], stats["pages_used"]
        usage = used / total if total else 0.0
        gauges = (
            ("jaxserve_slots", "Sequences that can decode together", stats["slots"]),
            ("jaxserve_requests_running", "Sequences that hold a slot", stats["running"]),
            ("vllm:num_requests_running", "Sequences that hold a slot", stats["running"]),
            ("jaxserve_requests_waiting", "Sequences that wait for a slot", stats["waiting"]),
            ("vllm:num_requests_waiting", "Sequences that wait for a slot", stats["waiting"]),
            ("jaxserve_kv_pages_used", "KV pages in use", used),
            ("jaxserve_kv_pages_cached", "KV pages that only the prefix cache holds", stats["pages_cached"]),
            ("jaxserve_queue_tokens", "Prompt tokens that wait", stats["waiting_tokens"]),
            ("jaxserve_kv_cache_usage_ratio", "Share of the KV pages in use, 0 to 1", usage),
            ("vllm:kv_cache_usage_perc", "Share of the KV pages in use, 0 to 1", usage),
        )
        for name, text, value in gauges:
            yield GaugeMetricFamily(name, text, float(value))
        yield from _by_tier(stats)
        page_size = str(stats["page_size"])
        for name, labels in (
            ("jaxserve_kv_cache_info", {"page_size": page_size, "pages": str(total)}),
            ("vllm:cache_config_info", {"block_size": page_size, "num_gpu_blocks": str(total)}),
        ):
            info = GaugeMetricFamily(name, "The KV cache's layout", labels=list(labels))
            info.add_metric(list(labels.values()), 1.0)
            yield info
        yield from _counters(stats, COUNTERS)
        if "response_cache_bytes" in stats:
            yield from _counters(stats, RESPONSE_CACHE_COUNTERS)
            yield GaugeMetricFamily(
                "jaxserve_response_cache_bytes", "Its size on disk", float(stats["response_cache_bytes"])
            )


def _by_tier(stats: Mapping[str, Any]) -> Iterable[Metric]:
    for state, text in (
        ("running", "Sequences that hold a slot"),
        ("waiting", "Sequences that wait for a slot"),
        ("preempted", "Sequences that wait with a part of their output"),
    ):
        gauge = GaugeMetricFamily(f"jaxserve_tier_{state}", text, labels=["service_tier"])
        for tier, key in TIERS.items():
            gauge.add_metric([tier], float(stats[f"{state}_{key}"]))
        yield gauge


def _counters(
    stats: Mapping[str, Any], counters: Iterable[tuple[str, str | None, str, str]]
) -> Iterable[Metric]:
    for name, alias, text, key in counters:
        yield CounterMetricFamily(f"jaxserve_{name}", text, float(stats[key]))
        if alias is not None:
            yield CounterMetricFamily(f"vllm:{alias}", text, float(stats[key]))
