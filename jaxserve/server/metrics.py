"""`/metrics`: what the engine counts and what clients wait, for Prometheus.

Each figure has our own name and, where routers and dashboards read one, vLLM's as an alias (Gateway API
inference extension, "model server protocol"; vLLM, "Production Metrics"). Gauges are read from
`Engine.stats()` when scraped, so they cost nothing in between. The registry is our own: nothing that a
library registers appears here. Labels take values from short lists, never from what clients send.
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from jaxserve.server.holder import EngineHolder

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
TTFT_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
ITL_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1.0, 2.5)
LATENCY_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0, 1800.0)
TOKEN_BUCKETS = tuple(float(2**power) for power in range(18))  # to 131,072
SHARE_BUCKETS = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 1.0)
TIERS = {"default": "online", "flex": "batch"}  # as HTTP calls them -> as `Engine.stats()` does
ROWS = "decode_steps_of_"  # of `Engine.stats()`: decode steps by the least bound that holds their rows
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
    """What is observed as it happens, on the event loop; the rest is collected when scraped."""

    def __init__(self, holder: EngineHolder) -> None:
        self._holder = holder
        self._registry = CollectorRegistry()
        self._registry.register(_EngineCollector(holder))
        self.time_to_first_token = self._histogram(
            "time_to_first_token_seconds",
            "From a request's submission to its first token",
            TTFT_BUCKETS,
            alias="time_to_first_token_seconds",
        )
        self.inter_token_latency = self._histogram(
            "inter_token_latency_seconds",
            "Between two tokens of one sequence",
            ITL_BUCKETS,
            alias="inter_token_latency_seconds",
        )
        self.queue_time = self._histogram(
            "queue_seconds",
            "From a request's submission to its slot",
            TTFT_BUCKETS,
            alias="request_queue_time_seconds",
        )
        self._latency = self._histogram(
            "request_seconds",
            "From a request's submission to a sequence's end",
            LATENCY_BUCKETS,
            alias="e2e_request_latency_seconds",
        )
        self._prompt_tokens = self._histogram(
            "request_prompt_tokens", "A prompt's tokens", TOKEN_BUCKETS, alias="request_prompt_tokens"
        )
        self._generation_tokens = self._histogram(
            "request_generation_tokens",
            "A sequence's generated tokens",
            TOKEN_BUCKETS,
            alias="request_generation_tokens",
        )
        self._prefix_share = self._histogram(
            "request_prefix_hit_ratio", "Share of a prompt that the prefix cache had", SHARE_BUCKETS
        )
        self._page_share = self._histogram(
            "kv_cache_usage_sampled_ratio",
            "Share of the KV pages in use, looked at twice a second",
            SHARE_BUCKETS,
        )
        self._finished = self._counter(
            "finished",
            "Sequences that ended",
            ["finish_reason"],
            alias=("request_success", "finished_reason"),
        )
        self._http_requests = self._counter("http_requests", "HTTP requests", ["route", "status"])
        self._http_seconds = Histogram(
            "jaxserve_http_request_seconds",
            "From an HTTP request's headers to its last byte",
            ["route"],
            buckets=LATENCY_BUCKETS,
            registry=None,
        )
        self._registry.register(_Aliased(self._http_seconds))

    def finished(self, reason: str, seconds: float, prompt: int, generated: int, cached: int) -> None:
        """A sequence ended. prompt, generated, cached: tokens; `cached` of the prompt."""
        self._finished.labels(reason).inc()
        self._latency.observe(seconds)
        self._prompt_tokens.observe(prompt)
        self._generation_tokens.observe(generated)
        self._prefix_share.observe(cached / prompt)

    def http(self, route: str, status: int, seconds: float) -> None:
        self._http_requests.labels(route, str(status)).inc()
        self._http_seconds.labels(route).observe(seconds)

    def sample(self) -> None:
        """Called twice a second."""
        engine = self._holder.engine
        if engine is not None and engine.healthy:
            stats = engine.stats()
            self._page_share.observe(stats["pages_used"] / max(1, stats["pages_total"]))

    def watch_jobs(self, count: Callable[[], Mapping[str, int]], waiting: Callable[[], int]) -> None:
        """count: jobs by state. waiting: results that cannot be written for want of room on the disk."""
        self._registry.register(_JobsCollector(count, waiting))

    def render(self) -> bytes:
        """The page in Prometheus' text format."""
        return generate_latest(self._registry)

    def _histogram(
        self, name: str, text: str, buckets: tuple[float, ...], *, alias: str | None = None
    ) -> Tally:
        names = (f"jaxserve_{name}",) if alias is None else (f"jaxserve_{name}", f"vllm:{alias}")
        tally = Tally(names, text, buckets)
        self._registry.register(tally)
        return tally

    def _counter(
        self, name: str, text: str, labels: list[str], *, alias: tuple[str, str] | None = None
    ) -> Counter:
        """alias: vLLM's name, and what it calls the one label."""
        counter = Counter(f"jaxserve_{name}", text, labels, registry=None)
        renamed = {} if alias is None else {labels[0]: alias[1]}
        self._registry.register(_Aliased(counter, None if alias is None else f"vllm:{alias[0]}", renamed))
        return counter


class Tally(Collector):
    """A histogram under one name or two, counted on the event loop and made when it is read: the library's
    own takes a lock for each value, and there is one for each token.

    bounds: the buckets' upper ones. counts: in each bucket, the last beyond every bound.
    """

    def __init__(self, names: Sequence[str], text: str, bounds: Sequence[float]) -> None:
        self.bounds = tuple(bounds)
        self.counts = [0] * (len(bounds) + 1)
        self.sum = 0.0
        self._names, self._text = names, text

    def observe(self, value: float) -> None:
        self.counts[bisect.bisect_left(self.bounds, value)] += 1
        self.sum += value

    def cumulative(self) -> list[int]:
        """For each bound, and without one, how many values were not beyond it."""
        return list(itertools.accumulate(self.counts))

    def collect(self) -> Iterable[Metric]:
        bounds = [*(str(float(bound)) for bound in self.bounds), "+Inf"]
        buckets = [(bound, float(count)) for bound, count in zip(bounds, self.cumulative(), strict=True)]
        for name in self._names:
            yield HistogramMetricFamily(name, self._text, buckets=buckets, sum_value=self.sum)


class _Aliased(Collector):
    """One metric under one name or two, observed once."""

    def __init__(
        self,
        metric: Histogram | Counter,
        alias: str | None = None,
        renamed: Mapping[str, str] | None = None,
    ) -> None:
        self._metric = metric
        self._alias = alias
        self._renamed = renamed or {}

    def collect(self) -> Iterable[Metric]:
        for metric in self._metric.collect():
            samples = [sample for sample in metric.samples if not sample.name.endswith("_created")]
            for name in (metric.name, self._alias):
                if name is None:
                    continue
                copy = Metric(name, metric.documentation, metric.type)
                for sample in samples:
                    labels = sample.labels
                    if name == self._alias:
                        labels = {self._renamed.get(label, label): value for label, value in labels.items()}
                    copy.add_sample(sample.name.replace(metric.name, name, 1), labels, sample.value)
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
        yield from _batch_size(stats)
        if "response_cache_bytes" in stats:
            yield from _counters(stats, RESPONSE_CACHE_COUNTERS)
            yield GaugeMetricFamily(
                "jaxserve_response_cache_bytes", "Its size on disk", float(stats["response_cache_bytes"])
            )


class _JobsCollector(Collector):
    def __init__(self, count: Callable[[], Mapping[str, int]], waiting: Callable[[], int]) -> None:
        self._count = count
        self._waiting = waiting

    def collect(self) -> Iterable[Metric]:
        jobs = GaugeMetricFamily("jaxserve_jobs", "Batch jobs of this server by state", labels=["state"])
        for state, count in self._count().items():
            jobs.add_metric([state], float(count))
        yield jobs
        text = "Results of batch jobs that wait for room on the disk"
        yield GaugeMetricFamily("jaxserve_job_results_unwritten", text, float(self._waiting()))


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


def _batch_size(stats: Mapping[str, Any]) -> Iterable[Metric]:
    """A histogram from the engine's own counts, none where it keeps none."""
    bounds = sorted(int(name.removeprefix(ROWS)) for name in stats if name.startswith(ROWS))
    if not bounds:
        return
    buckets, steps = [], 0
    for bound in bounds:
        steps += stats[f"{ROWS}{bound}"]
        buckets.append((str(float(bound)), float(steps)))
    buckets[-1] = ("+Inf", float(steps))  # the last counts all that is larger, too
    yield HistogramMetricFamily(
        "jaxserve_batch_size",
        "Sequences per decode step",
        buckets=buckets,
        sum_value=float(stats["decode_rows"]),
    )
