"""Spans, looked at in memory: what they say of a request, and whose child they are."""

from __future__ import annotations

import subprocess
import sys

import pytest
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from jaxserve.server import traces
from jaxserve.server.traces import Traces, TracesError, otlp_exporter
from tests.server.fakes import FakeEngine
from tests.server.harness import MODEL, Serve, until

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


@pytest.fixture
def exporter() -> InMemorySpanExporter:
    return InMemorySpanExporter()


def spans(made: Traces, exporter: InMemorySpanExporter, count: int) -> dict[str, ReadableSpan]:
    def come() -> bool:
        made._provider.force_flush()
        return len(exporter.get_finished_spans()) >= count

    until(come, 60)
    return {span.name: span for span in exporter.get_finished_spans()}


def test_a_request_and_its_parts(serve: Serve, exporter: InMemorySpanExporter) -> None:
    made = Traces(exporter)
    served = serve(FakeEngine(delay=0.001), keys=["secret"], reports=[made.report])
    headers = {
        "traceparent": f"00-{TRACE}-{PARENT}-01",
        "Authorization": "Bearer secret",
        "X-Request-Id": "r1",
    }
    body = {"model": MODEL, "prompt": "confidential", "max_tokens": 5, "temperature": 0.5, "stream": True}
    served.http.post("/v1/completions", json=body, headers=headers)
    served.http.get("/health")
    found = spans(made, exporter, 4)
    assert set(found) == {"POST /v1/completions", "queue", "prefill", "decode"}
    span = found["POST /v1/completions"]
    assert span.context is not None and span.parent is not None
    assert f"{span.context.trace_id:032x}" == TRACE and f"{span.parent.span_id:016x}" == PARENT
    assert dict(span.attributes or {}) == {
        "http.request.method": "POST",
        "http.response.status_code": 200,
        "http.route": "/v1/completions",
        "jaxserve.request_id": "r1",
        "jaxserve.key": "key-1",
        "gen_ai.operation.name": "text_completion",
        "gen_ai.provider.name": "jaxserve",
        "gen_ai.request.model": MODEL,
        "gen_ai.response.model": MODEL,
        "gen_ai.request.max_tokens": 5,
        "gen_ai.request.temperature": 0.5,
        "gen_ai.request.top_p": 1.0,
        "gen_ai.request.choice.count": 1,
        "gen_ai.usage.input_tokens": 12,
        "gen_ai.usage.output_tokens": 5,
        "gen_ai.usage.cache_read.input_tokens": 0,
        "gen_ai.response.finish_reasons": ("length",),
        "gen_ai.response.time_to_first_chunk": pytest.approx(0.5, abs=0.5),
    }
    times = [span.start_time]
    for name in ("queue", "prefill", "decode"):
        child = found[name]
        assert child.parent is not None and child.parent.span_id == span.context.span_id
        times += [child.start_time, child.end_time]
    assert [*times, span.end_time] == sorted([*times, span.end_time])  # type: ignore[type-var]
    assert found["decode"].end_time - found["decode"].start_time >= 4e6  # type: ignore[operator]  # 4 steps
    assert "confidential" not in str([one.to_json() for one in found.values()])
    made.close()


def test_what_fails(serve: Serve, exporter: InMemorySpanExporter) -> None:
    made = Traces(exporter)
    served = serve(None, reports=[made.report])
    served.completion()
    served.http.get("/nowhere/%0a")
    found = spans(made, exporter, 2)
    assert not found["POST /v1/completions"].status.is_ok
    assert found["POST /v1/completions"].parent is None
    assert found["GET"].status.is_ok or found["GET"].status.is_unset
    assert found["GET"].attributes is not None and found["GET"].attributes["http.response.status_code"] == 404
    made.close()


def test_a_traceparent_that_is_none(serve: Serve, exporter: InMemorySpanExporter) -> None:
    made = Traces(exporter)
    served = serve(FakeEngine(), reports=[made.report])
    for value in ("x", "00-" + "0" * 32 + "-" + "0" * 16 + "-01", "00-\x1b"):
        assert served.http.get("/v1/models", headers={"traceparent": value}).status_code == 200
    until(lambda: made._provider.force_flush() and len(exporter.get_finished_spans()) == 3)
    assert [span.parent for span in exporter.get_finished_spans()] == [None] * 3
    made.close()


def test_where_traces_go() -> None:
    for given in ("http://127.0.0.1:4318", "http://127.0.0.1:4318/", "http://127.0.0.1:4318/v1/traces"):
        assert otlp_exporter(given)._endpoint == "http://127.0.0.1:4318/v1/traces"  # type: ignore[attr-defined]
    with pytest.raises(TracesError, match="must begin with http"):
        otlp_exporter("127.0.0.1:4318")


def test_without_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.http.trace_exporter", None)
    with pytest.raises(TracesError, match=r"pip install 'jaxserve\[otel\]'"):
        otlp_exporter("http://127.0.0.1:4318")


def test_nothing_is_imported_without_the_flag() -> None:
    program = (
        "import sys, jaxserve.server.run; print([m for m in sys.modules if m.startswith('opentelemetry')])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
    assert traces.QUIET
