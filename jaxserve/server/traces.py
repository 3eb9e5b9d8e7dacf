"""A span for each request, for OpenTelemetry: what was asked of the model, and where its time went.

Attributes are those of the semantic conventions for generative AI and for HTTP servers; the parent comes from
the request's `traceparent` (W3C, "Trace Context"). Spans are made when a request is over, from its record: a
stream costs nothing while it runs. Prompts and replies are not in them. Needs the extra `jaxserve[otel]`;
nothing of it is imported without an endpoint.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from starlette.datastructures import Headers

import jaxserve
from jaxserve.server.record import OTHER, Record

if TYPE_CHECKING:
    from opentelemetry.sdk.trace.export import SpanExporter

OPERATIONS = {
    "/v1/completions": "text_completion",
    "/v1/chat/completions": "chat",
    "/v1/responses": "chat",
    "/v1/messages": "chat",
    "/v1/embeddings": "embeddings",
}
QUIET = frozenset({"/health", "/ready", "/metrics"})
SHUTDOWN_MILLISECONDS = 2000


class TracesError(ValueError):
    """Traces cannot be sent: the message says what is missing."""


def otlp_exporter(endpoint: str) -> SpanExporter:
    """Sends to `endpoint`, to whose address OTLP/HTTP's path is added unless it has one.

    Raises TracesError where the extra is not installed.
    """
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    except ImportError as error:
        raise TracesError(
            f"--otel-endpoint needs the extra: pip install 'jaxserve[otel]' ({error})"
        ) from None
    if not endpoint.startswith(("http://", "https://")):
        raise TracesError(f"--otel-endpoint={endpoint} must begin with http:// or https://")
    bare = endpoint.rstrip("/")
    return OTLPSpanExporter(endpoint=bare if bare.endswith("/v1/traces") else f"{bare}/v1/traces")


class Traces:
    """`report` makes the spans of a request that is over; a thread of the library sends them in batches."""

    def __init__(self, exporter: SpanExporter) -> None:
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        # OTEL_SERVICE_NAME and OTEL_RESOURCE_ATTRIBUTES of the environment come in through `create`
        resource = Resource.create({"service.version": jaxserve.__version__})
        if str(resource.attributes.get("service.name", "unknown_service")).startswith("unknown_service"):
            resource = resource.merge(Resource({"service.name": "jaxserve"}))
        self._provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer("jaxserve", jaxserve.__version__)
        self._propagator = TraceContextTextMapPropagator()

    def report(self, record: Record, headers: Headers) -> None:
        if record.route in QUIET:
            return
        from opentelemetry import trace

        parent = self._propagator.extract(dict(headers))
        name = f"{record.method} {record.route}" if record.route != OTHER else record.method
        offset = record.time - record.started  # from the monotonic clock to the one that spans are dated by
        span = self._tracer.start_span(
            name,
            context=parent,
            kind=trace.SpanKind.SERVER,
            attributes=attributes(record),
            start_time=_nanoseconds(record.time),
        )
        if record.status >= 500:
            span.set_status(trace.Status(trace.StatusCode.ERROR))
        inside = trace.set_span_in_context(span)
        for part, start, end in parts(record):
            child = self._tracer.start_span(part, context=inside, start_time=_nanoseconds(start + offset))
            child.end(_nanoseconds(end + offset))
        span.end(_nanoseconds(record.ended + offset))

    def close(self) -> None:
        self._provider.force_flush(SHUTDOWN_MILLISECONDS)
        self._provider.shutdown()


def attributes(record: Record) -> dict[str, Any]:
    """Of a request's span. Source: OpenTelemetry's semantic conventions, "Gen AI" and "HTTP server"."""
    work = record.work
    found: dict[str, Any] = {
        "http.request.method": record.method,
        "http.response.status_code": record.status,
        "jaxserve.request_id": record.request_id,
    }
    if record.route != OTHER:
        found["http.route"] = record.route
    if record.key is not None:
        found["jaxserve.key"] = record.key
    if work.submitted is None:
        return found
    found |= {
        "gen_ai.operation.name": OPERATIONS.get(record.route, "generate_content"),
        "gen_ai.provider.name": "jaxserve",
        "gen_ai.request.model": work.model,
        "gen_ai.response.model": work.model,
        "gen_ai.usage.input_tokens": work.prompt_tokens,
        "gen_ai.usage.output_tokens": work.generated_tokens,
        "gen_ai.usage.cache_read.input_tokens": work.cached_tokens,
        **work.params,
    }
    if work.finish_reasons:
        found["gen_ai.response.finish_reasons"] = work.finish_reasons
    if work.first is not None:
        found["gen_ai.response.time_to_first_chunk"] = work.first - record.started
    return found


def parts(record: Record) -> Iterator[tuple[str, float, float]]:
    """(name, start, end) of what a request went through, as far as it came."""
    work = record.work
    if work.submitted is None:
        return
    begun = work.admitted
    if begun is not None:
        yield "queue", work.submitted, begun
    if work.first is not None:
        yield "prefill", work.submitted if begun is None else begun, work.first
        if work.last is not None and work.last > work.first:
            yield "decode", work.first, work.last


def _nanoseconds(seconds: float) -> int:
    return int(seconds * 1e9)
