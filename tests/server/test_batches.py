"""Batch jobs through the `openai` client: what they answer, how they fail, and that nothing is lost."""

from __future__ import annotations

import json
import shutil
import time
import types
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from openai.types import Batch

from jaxserve.scheduler.types import Tier
from jaxserve.server.api import batches
from jaxserve.server.errors import ApiError
from jaxserve.server.jobs import answer, lines, work
from tests.server import templates
from tests.server.fakes import FakeEngine
from tests.server.harness import MODEL, Serve, Served, until

DONE = ("completed", "failed", "expired", "cancelled")


def line(number: int, url: str = "/v1/completions", **body: Any) -> dict[str, Any]:
    prompt: dict[str, Any] = {"prompt": chr(ord("a") + number % 26)}
    if url in ("/v1/embeddings", "/v1/responses"):
        prompt = {"input": chr(ord("a") + number % 26)}
    if url == "/v1/chat/completions":
        prompt = {"messages": [{"role": "user", "content": chr(ord("a") + number % 26)}]}
    return {
        "custom_id": f"line {number}",
        "method": "POST",
        "url": url,
        "body": {"model": MODEL, **prompt, **body},
    }


def upload(served: Served, entries: Iterable[Any]) -> str:
    content = "".join((one if isinstance(one, str) else json.dumps(one)) + "\n" for one in entries)
    return served.openai.files.create(file=("in.jsonl", content.encode()), purpose="batch").id


def begin(served: Served, entries: Iterable[Any], endpoint: Any = "/v1/completions", **fields: Any) -> Batch:
    return served.openai.batches.create(
        input_file_id=upload(served, entries), endpoint=endpoint, completion_window="24h", **fields
    )


def ended(served: Served, batch: Batch, seconds: float = 10.0) -> Batch:
    end = time.monotonic() + seconds
    while (found := served.openai.batches.retrieve(batch.id)).status not in DONE:
        assert time.monotonic() < end, found
        time.sleep(0.01)
    return found


def content(served: Served, file_id: str | None) -> list[dict[str, Any]]:
    if file_id is None:
        return []
    return [json.loads(one) for one in served.openai.files.content(file_id).text.splitlines()]


def test_a_job_from_upload_to_output(serve: Serve) -> None:
    served = serve(FakeEngine(slots=4))
    batch = begin(served, [line(number, max_tokens=3) for number in range(40)], metadata={"who": "me"})
    assert (batch.object, batch.status, batch.endpoint) == ("batch", "validating", "/v1/completions")
    assert batch.expires_at == batch.created_at + 86400
    done = ended(served, batch)
    assert done.status == "completed"
    assert done.request_counts is not None
    assert done.request_counts.to_dict() == {"total": 40, "completed": 40, "failed": 0}
    assert done.metadata == {"who": "me"}
    assert done.error_file_id is None
    assert done.in_progress_at and done.finalizing_at and done.completed_at
    output = content(served, done.output_file_id)
    assert [entry["custom_id"] for entry in output] == [f"line {number}" for number in range(40)]
    for number, entry in enumerate(output):
        assert entry["error"] is None
        assert entry["response"]["status_code"] == 200
        body = entry["response"]["body"]
        follows = [chr(ord("a") + (number + step) % 26) for step in (1, 2, 3)]
        assert body["choices"][0]["text"] == "".join(follows)
        assert body["created"] == batch.created_at
        assert body["service_tier"] == "flex"
    assert len({entry["id"] for entry in output}) == 40
    file = served.openai.files.retrieve(done.output_file_id or "")
    assert file.expires_at is not None and done.completed_at is not None
    assert abs(file.expires_at - done.completed_at - 30 * 86400) <= 1
    assert (file.purpose, file.bytes) == ("batch_output", len(served.openai.files.content(file.id).content))
    assert {request.tier for request in served.engine.requests} == {Tier.BATCH}
    seeds = {request.params.seed for request in served.engine.requests}
    assert len(seeds) == 40 and None not in seeds
    assert [found.id for found in served.openai.batches.list()] == [batch.id]
    served.as_new()


@pytest.mark.parametrize("endpoint", ["/v1/chat/completions", "/v1/embeddings", "/v1/responses"])
def test_other_endpoints(serve: Serve, endpoint: str) -> None:
    served = serve(FakeEngine())
    fields = {
        "/v1/chat/completions": {"max_completion_tokens": 2, "n": 2},
        "/v1/embeddings": {},
        "/v1/responses": {"max_output_tokens": 3},
    }[endpoint]
    done = ended(served, begin(served, [line(number, endpoint, **fields) for number in range(3)], endpoint))
    assert done.status == "completed"
    for entry in content(served, done.output_file_id):
        body = entry["response"]["body"]
        if endpoint == "/v1/embeddings":
            assert len(body["data"][0]["embedding"]) == 8
        elif endpoint == "/v1/responses":
            assert (body["object"], body["usage"]["output_tokens"]) == ("response", 3)
        else:
            assert len(body["choices"]) == 2


@pytest.mark.parametrize("kind", ["completions", "chat", "responses", "embeddings"])
def test_two_runs_have_the_same_bytes(kind: str, tmp_path: Path, serve: Serve) -> None:
    """Copies of one folder with a job in it, run by two servers, one after much other work."""
    first = serve(None, data_dir=str(tmp_path / "a"))
    first.holder.model_name = MODEL
    url, fields = {
        "completions": ("/v1/completions", {"max_tokens": 4, "logprobs": 2}),
        "chat": ("/v1/chat/completions", {"n": 2, "max_tokens": 4, "logprobs": True}),
        "responses": ("/v1/responses", {"max_output_tokens": 4}),
        "embeddings": ("/v1/embeddings", {}),
    }[kind]
    entries = [line(number, url, **fields) for number in range(30)]
    entries.insert(7, line(99, url, priority=10**30))
    first.load(FakeEngine())
    first.server._context.desk.pause()
    batch = begin(first, entries, url)
    first.close()
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    one = serve(FakeEngine(slots=4), data_dir=str(tmp_path / "a"))
    done = ended(one, batch)
    other = serve(FakeEngine(slots=2), data_dir=str(tmp_path / "b"))
    for _ in range(3):
        other.completion(prompt="b", max_tokens=9)
    again = ended(other, batch)
    assert done.output_file_id == again.output_file_id
    seeds = [
        sorted(asked.params.seed or 0 for asked in served.engine.requests if asked.tier is Tier.BATCH)
        for served in (one, other)
    ]
    assert seeds[0] == seeds[1] and len(set(seeds[0])) == 30
    for name in ("output_file_id", "error_file_id"):
        left = one.openai.files.content(getattr(done, name)).content
        right = other.openai.files.content(getattr(again, name)).content
        assert left == right
        assert left.count(b"\n") == (30 if name == "output_file_id" else 1)


# --- what is wrong with a line or a job ---


def test_lines_that_fail_are_in_the_error_file(serve: Serve) -> None:
    served = serve(FakeEngine())
    bad = [
        ({"max_tokens": -1}, 400, "max_tokens"),
        ({"model": "nobody"}, 404, "model"),
        ({"stream": True}, 400, "stream"),
        ({"timeout": 3}, 400, "timeout"),
        ({"service_tier": "default"}, 400, "service_tier"),
        ({"surprise": 1}, 400, "surprise"),
        ({"temperature": 1e300}, 400, "temperature"),
    ]
    entries = [
        line(0),
        *(line(number, **fields) for number, (fields, _, _) in enumerate(bad, start=1)),
        line(9),
    ]
    done = ended(served, begin(served, entries))
    assert done.status == "completed"
    assert done.request_counts is not None
    assert done.request_counts.to_dict() == {"total": len(bad) + 2, "completed": 2, "failed": len(bad)}
    assert [entry["custom_id"] for entry in content(served, done.output_file_id)] == ["line 0", "line 9"]
    for entry, (_, status, param) in zip(content(served, done.error_file_id), bad, strict=True):
        assert entry["error"] is None
        assert entry["response"]["status_code"] == status
        assert entry["response"]["body"]["error"]["param"] == param


INVALID = [
    (["{"], "invalid_json_line", 1, None),
    (["[1]"], "invalid_json_line", 1, None),
    ([line(0), '{"a": NaN}'], "invalid_json_line", 2, None),
    ([line(0), line(0)], "duplicate_custom_id", 2, "custom_id"),
    (["", line(0), "", line(1, "/v1/chat/completions")], "invalid_url", 4, "url"),
    ([{**line(0), "method": "GET"}], "invalid_method", 1, "method"),
    ([{**line(0), "custom_id": 3}], "invalid_custom_id", 1, "custom_id"),
    ([{**line(0), "body": []}], "invalid_body", 1, "body"),
    ([{**line(0), "x": 1}], "unknown_parameter", 1, "x"),
    ([{"custom_id": "a"}], "missing_required_parameter", 1, "url"),
    (["", " "], "empty_file", None, None),
]


@pytest.mark.parametrize(("entries", "code", "number", "param"), INVALID)
def test_files_that_cannot_be_run(
    serve: Serve, entries: list[Any], code: str, number: int | None, param: str | None
) -> None:
    served = serve(FakeEngine())
    done = ended(served, begin(served, entries))
    assert done.status == "failed"
    assert done.failed_at
    assert done.errors is not None and done.errors.data is not None
    [error] = done.errors.data
    assert (error.code, error.line, error.param) == (code, number, param)
    assert served.engine.requests == []


def test_too_many_and_too_long_lines(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lines, "MAX_LINES", 5)
    monkeypatch.setattr(lines, "MAX_LINE_BYTES", 1000)
    served = serve(FakeEngine())
    long = line(1, user="x" * 5000)
    done = ended(served, begin(served, [line(0), long, *map(line, range(2, 9))]))
    assert done.errors is not None and done.errors.data is not None
    assert [(e.code, e.line) for e in done.errors.data] == [("line_too_long", 2), ("too_many_requests", 6)]


BAD_JOBS = [
    ({"endpoint": "/v1/images"}, "endpoint"),
    ({"completion_window": "1h"}, "completion_window"),
    ({"input_file_id": "file-" + "0" * 32}, "input_file_id"),
    ({"input_file_id": "file-../../../etc/passwd"}, "input_file_id"),
    ({"input_file_id": "\0"}, "input_file_id"),
    ({"metadata": {str(n): "" for n in range(17)}}, "metadata"),
    ({"metadata": {"a": "x" * 513}}, "metadata.a"),
    ({"output_expires_after": {"anchor": "created_at", "seconds": 1}}, "output_expires_after.seconds"),
    ({"surprise": 1}, "surprise"),
]


@pytest.mark.parametrize(("fields", "param"), BAD_JOBS)
def test_jobs_that_are_refused(served: Served, fields: dict[str, Any], param: str) -> None:
    body = {"endpoint": "/v1/completions", "completion_window": "24h", "input_file_id": "file-x", **fields}
    reply = served.http.post("/v1/batches", json=body)
    assert reply.status_code == 400
    assert reply.json()["error"]["param"] == param


def test_only_so_many_jobs_wait(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batches, "MAX_OPEN", 2)
    served = serve(FakeEngine(delay=0.05), keys=["one", "two"])
    for _ in range(2):
        begin(served, [line(0, max_tokens=200)])
    with pytest.raises(openai.RateLimitError):
        begin(served, [line(0)])
    other = served.openai.with_options(api_key="two")
    file = other.files.create(file=b"{}", purpose="batch")
    other.batches.create(input_file_id=file.id, endpoint="/v1/completions", completion_window="24h")


# --- cancelling, expiry, deletion ---


def test_cancelling(serve: Serve) -> None:
    served = serve(FakeEngine(slots=2, delay=0.005))
    batch = begin(served, [line(number, max_tokens=4) for number in range(500)])
    until(lambda: served.openai.batches.retrieve(batch.id).request_counts.completed >= 4)  # type: ignore[union-attr]
    assert served.openai.batches.cancel(batch.id).status == "cancelling"
    done = ended(served, batch)
    assert done.status == "cancelled"
    assert done.cancelling_at and done.cancelled_at
    good, bad = content(served, done.output_file_id), content(served, done.error_file_id)
    assert len(good) >= 4 and len(bad) > 100 and len(good) + len(bad) == 500
    assert {entry["error"]["code"] for entry in bad} == {"batch_cancelled"}
    assert {entry["custom_id"] for entry in good + bad} == {f"line {number}" for number in range(500)}
    assert done.request_counts is not None
    assert (done.request_counts.completed, done.request_counts.failed) == (len(good), len(bad))
    assert served.openai.batches.cancel(batch.id).status == "cancelled"
    served.as_new()


def test_what_has_ended_cannot_be_cancelled(serve: Serve) -> None:
    served = serve(FakeEngine())
    batch = ended(served, begin(served, [line(0)]))
    with pytest.raises(openai.ConflictError):
        served.openai.batches.cancel(batch.id)


def test_expiry(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batches, "WINDOWS", {"24h": 4})
    served = serve(FakeEngine(slots=2, delay=0.01))
    batch = begin(served, [line(number, max_tokens=100) for number in range(500)])
    done = ended(served, batch, 30)
    assert done.status == "expired"
    assert done.expired_at is not None and done.expired_at >= batch.created_at + 4
    good, bad = content(served, done.output_file_id), content(served, done.error_file_id)
    assert good and len(good) + len(bad) == 500
    assert {entry["error"]["code"] for entry in bad} == {"batch_expired"}
    served.as_new()


def test_files_in_use_are_not_deleted(serve: Serve) -> None:
    served = serve(FakeEngine(slots=1, delay=0.01))
    batch = begin(served, [line(number, max_tokens=20) for number in range(40)])
    with pytest.raises(openai.ConflictError, match="is being read by batch_"):
        served.openai.files.delete(batch.input_file_id)
    served.openai.batches.cancel(batch.id)
    done = ended(served, batch)
    assert served.openai.files.delete(batch.input_file_id).deleted
    assert served.openai.files.delete(done.error_file_id or "").deleted
    with pytest.raises(openai.NotFoundError):
        served.openai.files.content(done.error_file_id or "")
    assert served.openai.batches.retrieve(batch.id).status == "cancelled"


def test_jobs_of_another_key_do_not_exist(serve: Serve) -> None:
    served = serve(FakeEngine(), keys=["one", "two"])
    batch = ended(served, begin(served, [line(0)]))
    other = served.openai.with_options(api_key="two")
    for call in (other.batches.retrieve, other.batches.cancel):
        with pytest.raises(openai.NotFoundError):
            call(batch.id)
    with pytest.raises(openai.NotFoundError):
        other.files.content(batch.output_file_id or "")
    with pytest.raises(openai.BadRequestError):
        other.batches.create(
            input_file_id=batch.input_file_id, endpoint="/v1/completions", completion_window="24h"
        )
    assert list(other.batches.list()) == []


# --- beside other work ---


def test_online_requests_go_first(serve: Serve) -> None:
    served = serve(FakeEngine(slots=2, delay=0.002, max_queued=4))
    batch = begin(served, [line(number, max_tokens=30) for number in range(60)])
    until(lambda: served.engine.stats()["running"] == 2)
    for _ in range(20):  # never 429: the job leaves the queue to others
        assert served.completion(max_tokens=1).status_code == 200
    assert ended(served, batch, 30).status == "completed"


def test_a_busy_engine_is_waited_for(serve: Serve) -> None:
    engine = FakeEngine(slots=2, retry_after=1)
    served = serve(engine)
    engine.busy = 3
    done = ended(served, begin(served, [line(number) for number in range(6)]))
    assert engine.rejected == 3
    assert done.request_counts is not None and done.request_counts.completed == 6


def test_jobs_take_turns(serve: Serve) -> None:
    served = serve(FakeEngine(slots=2, delay=0.002))
    long = begin(served, [line(number, max_tokens=10) for number in range(400)])
    until(lambda: served.engine.stats()["running"] == 2)
    short = begin(served, [line(number, max_tokens=10) for number in range(4)])
    assert ended(served, short).status == "completed"
    assert served.openai.batches.retrieve(long.id).status == "in_progress"
    served.openai.batches.cancel(long.id)
    ended(served, long)


def test_a_dead_engine_loses_no_line(tmp_path: Path, serve: Serve) -> None:
    served = serve(FakeEngine(slots=2, delay=0.002), data_dir=str(tmp_path))
    batch = begin(served, [line(number, max_tokens=10) for number in range(50)])
    until(lambda: served.openai.batches.retrieve(batch.id).request_counts.completed >= 4)  # type: ignore[union-attr]
    served.engine.fail_next = RuntimeError("out of device memory")
    until(lambda: not served.engine.healthy)
    assert served.openai.batches.retrieve(batch.id).status == "in_progress"
    served.close()
    again = serve(FakeEngine(), data_dir=str(tmp_path))
    done = ended(again, batch)
    assert done.request_counts is not None
    assert done.request_counts.to_dict() == {"total": 50, "completed": 50, "failed": 0}


def test_a_job_waits_for_its_model(tmp_path: Path, serve: Serve) -> None:
    served = serve(FakeEngine(), data_dir=str(tmp_path))
    served.server._context.desk.pause()
    batch = begin(served, [line(0)])
    served.close()
    other = serve(None, data_dir=str(tmp_path))
    engine = FakeEngine()
    other.holder.set_engine(engine, "another")
    until(lambda: other.openai.batches.retrieve(batch.id).status == "in_progress")  # it was looked at
    time.sleep(0.1)
    assert engine.requests == []
    other.close()
    assert ended(serve(FakeEngine(), data_dir=str(tmp_path)), batch).status == "completed"


def test_stopping_and_going_on(tmp_path: Path, serve: Serve) -> None:
    """A server that is told to stop in the middle of a job leaves it for the next one."""
    served = serve(FakeEngine(slots=2, delay=0.002), data_dir=str(tmp_path))
    batch = begin(served, [line(number, max_tokens=10) for number in range(200)])
    until(lambda: served.openai.batches.retrieve(batch.id).request_counts.completed >= 10)  # type: ignore[union-attr]
    served.close()
    again = serve(FakeEngine(slots=8), data_dir=str(tmp_path))
    done = ended(again, batch)
    output = content(again, done.output_file_id)
    assert [entry["custom_id"] for entry in output] == [f"line {number}" for number in range(200)]
    assert len(again.engine.requests) < 200  # the first ones were not run again


def test_two_servers_do_not_share_a_folder(tmp_path: Path, serve: Serve) -> None:
    first = serve(FakeEngine(), data_dir=str(tmp_path))
    batch = ended(first, begin(first, [line(0)]))
    second = serve(FakeEngine(), data_dir=str(tmp_path))
    for call in (
        lambda: second.http.get(f"/v1/batches/{batch.id}"),
        lambda: second.http.get("/v1/files"),
        lambda: second.http.post("/v1/files", files={"file": b"x"}, data={"purpose": "batch"}),
    ):
        reply: httpx.Response = call()
        assert reply.status_code == 503
        assert "another server uses" in reply.json()["error"]["message"]
        assert reply.json()["error"]["code"] == "data_dir_in_use"
    first.close()
    assert second.http.get(f"/v1/batches/{batch.id}").status_code == 200  # it is free now


def test_jobs_in_metrics(serve: Serve) -> None:
    served = serve(FakeEngine())
    ended(served, begin(served, [line(0)]))
    text = served.http.get("/metrics").text
    assert 'jaxserve_jobs{state="completed"} 1.0' in text
    assert "jaxserve_job_results_unwritten 0.0" in text


def nested(levels: int) -> Any:
    value: Any = {}
    for _ in range(levels):
        value = {"a": value}
    return value


@pytest.mark.parametrize("endpoint", ["/v1/responses", "/v1/chat/completions"])
def test_deep_lines_are_a_400_as_over_http(serve: Serve, endpoint: str) -> None:
    served = serve(templates.engine(templates.HERMES, "hello"))
    deep = {"metadata": nested(300)}
    if endpoint == "/v1/responses":
        tool = {"type": "function", "name": "f", "parameters": nested(300)}
        entries = [line(0, endpoint), line(1, endpoint, tools=[tool]), line(2, endpoint, **deep)]
    else:
        kwargs = {"chat_template_kwargs": {"x": nested(300)}}
        entries = [line(0, endpoint), line(1, endpoint, **kwargs), line(2, endpoint, **deep)]
    done = ended(served, begin(served, entries, endpoint))
    assert done.request_counts is not None
    assert done.request_counts.to_dict() == {"total": 3, "completed": 1, "failed": 2}
    for entry in content(served, done.error_file_id):
        assert entry["response"]["status_code"] == 400
        assert "more than 200 levels" in entry["response"]["body"]["error"]["message"]


def test_a_reply_that_cannot_be_written_is_given_up(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    settled = answer._settled

    def unwritable(body: dict[str, Any]) -> dict[str, Any]:
        text = body["choices"][0]["text"]
        return {**settled(body), "deep": nested(300) if text == "c" else 0}

    monkeypatch.setattr(answer, "_settled", unwritable)
    served = serve(FakeEngine())
    done = ended(served, begin(served, [line(number, max_tokens=1) for number in range(3)]))
    assert done.status == "completed"
    [entry] = content(served, done.error_file_id)
    assert (entry["custom_id"], entry["response"]["status_code"]) == ("line 1", 500)


def test_the_date_in_a_lines_prompt_is_the_batchs(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    source = "{{ strftime_now('%s') }}" + templates.PLAIN
    served = serve(templates.engine(source, "x"))
    before = int(time.time()) - 3600
    with monkeypatch.context() as patch:
        patch.setattr(batches, "time", types.SimpleNamespace(time=lambda: before))
        batch = begin(served, [line(0, "/v1/chat/completions")], "/v1/chat/completions")
    assert batch.created_at == before
    ended(served, batch)
    assert templates.prompt(served).startswith(f"{batch.created_at}<user>")
    served.http.post(
        "/v1/chat/completions", json={"model": MODEL, "messages": [{"role": "user", "content": "a"}]}
    )
    assert int(templates.prompt(served).partition("<")[0]) >= before + 3600


def test_a_line_that_keeps_failing_is_given_up(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    """An answer that cannot be put together is that line's matter, and not the job's."""

    def broken(*args: Any) -> Any:
        raise KeyError("a fault in the code")

    monkeypatch.setattr(answer, "ENDPOINTS", {"/v1/completions": broken})
    served = serve(FakeEngine())
    done = ended(served, begin(served, [line(0)]))
    [entry] = content(served, done.error_file_id)
    assert entry["response"]["status_code"] == 500
    assert entry["response"]["body"]["error"]["code"] == "internal_error"


def test_an_engine_that_keeps_refusing_a_line(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    """While it is well: three times, and then that is the line's result."""
    tried: list[str] = []

    def refuse(body: Any, *args: Any) -> Any:
        tried.append(body["prompt"])
        raise ApiError(500, "not this one", code="engine_failed", headers={"Retry-After": "0"})

    monkeypatch.setattr(answer, "ENDPOINTS", {"/v1/completions": refuse})
    served = serve(FakeEngine())
    done = ended(served, begin(served, [line(0)]))
    [entry] = content(served, done.error_file_id)
    assert entry["response"]["body"]["error"]["message"] == "not this one"
    assert len(tried) == work.MAX_FAILURES
