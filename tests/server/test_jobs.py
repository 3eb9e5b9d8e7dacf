"""What keeps batch jobs going: the runner outlives faults, every job ends, no key stops another, and what is
stored has a bound."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import os
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from jaxserve.engine.outputs import EngineBusy
from jaxserve.server.api import batches
from jaxserve.server.jobs import answer, desk, output, pace, store, turns
from jaxserve.server.jobs.pace import Room
from jaxserve.server.jobs.store import Batch, Bounds, File, OverBound, Result, Store
from jaxserve.server.jobs.turns import Place, Turns
from tests.server.fakes import FakeEngine
from tests.server.harness import Serve, Served, until
from tests.server.test_batches import begin, content, ended, line, upload

WIDE = Bounds(files=100, of_key=10**9, of_all=10**9)
FILE_ID, BATCH_ID = "file-" + "1" * 32, "batch_" + "2" * 32


def on_folder(served: Served, work: Any) -> Any:
    """`work(store)` on the folder's thread."""
    its = served.server._context.desk
    assert its._store is not None
    return its._thread.submit(work, its._store).result()


def of_key(served: Served, key: str, entries: list[Any]) -> Any:
    """A job of another key than the first."""
    client = served.openai.with_options(api_key=key)
    text = "".join(json.dumps(one) + "\n" for one in entries)
    file = client.files.create(file=text.encode(), purpose="batch")
    job = client.batches.create(input_file_id=file.id, endpoint="/v1/completions", completion_window="24h")
    return lambda: client.batches.retrieve(job.id)


@pytest.fixture
def opened(tmp_path: Path) -> Iterator[Store]:
    one = Store(tmp_path / "data")
    yield one
    assert (one.stored, one.of) == counted(one)  # the books are right at every test's end
    one.close()


def counted(one: Store) -> tuple[int, dict[bytes, int]]:
    rows = one._connection.execute(
        """SELECT tenant, sum(size) FROM (
            SELECT tenant, bytes AS size FROM files UNION ALL
            SELECT tenant, length(data) FROM results JOIN batches ON batches.id = results.batch
        ) GROUP BY tenant"""
    ).fetchall()
    return sum(size for _, size in rows), {tenant: size for tenant, size in rows if size}


def put_file(one: Store, size: int, tenant: bytes = b"a", bounds: Bounds = WIDE, **fields: Any) -> File:
    path = one.incoming()
    path.write_bytes(b"x" * size)
    given: dict[str, Any] = {"id": f"file-{path.name}", "expires_at": None, "bytes": size, **fields}
    file = File(filename="f", purpose="batch", created_at=0, **given)
    one.add_file(tenant, file, path, bounds)
    return file


def job(number: int, status: str = "in_progress", tenant: bytes = b"a", **fields: Any) -> Batch:
    body = {"endpoint": "/v1/completions", "completion_window": "24h", "expires_at": 2**40, **fields}
    return Batch(f"batch_{number:032}", tenant, "alphabet", status, FILE_ID, 0, 0, 0, body)


# --- the runner outlives what goes wrong ---


@pytest.mark.parametrize("site", ["open_batches", "add_results", "sweep"])
def test_a_fault_ends_neither_runner_nor_writer_nor_sweep(
    serve: Serve, site: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(pace, "RETRY_SECONDS", 0.01)
    monkeypatch.setattr(desk, "SWEEP_SECONDS", 0.01)
    calls: list[None] = []
    real = getattr(Store, site)

    def faulty(self: Store, *args: Any) -> Any:
        calls.append(None)
        if len(calls) <= 2:
            raise RuntimeError("a fault in the code")
        return real(self, *args)

    monkeypatch.setattr(Store, site, faulty)
    served = serve(FakeEngine())
    assert ended(served, begin(served, [line(0)])).status == "completed"
    until(lambda: len(calls) > 2)
    assert "a fault in the code" in caplog.text


def test_a_broken_record_fails_that_job_alone(serve: Serve) -> None:
    served = serve(FakeEngine())
    served.server._context.desk.pause()
    broken, other, well = (begin(served, [line(number)]) for number in range(3))

    def spoil(one: Store) -> None:
        with one._connection as database:
            database.execute("UPDATE batches SET body = '{garbage' WHERE id = ?", (broken.id,))
            database.execute("UPDATE batches SET body = '{}' WHERE id = ?", (other.id,))

    on_folder(served, spoil)
    served.server._context.desk.runner._work.paused = False
    assert ended(served, well).status == "completed"
    for batch in (broken, other):
        done = ended(served, batch)
        assert done.status == "failed" and done.failed_at
        assert done.errors is not None and done.errors.data is not None
        assert [error.code for error in done.errors.data] == ["batch_lost"]
    assert len(list(served.openai.batches.list())) == 3


# --- every job ends ---


def test_jobs_of_another_model_end(tmp_path: Path, serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    first = serve(FakeEngine(slots=1, delay=0.01), data_dir=str(tmp_path))
    cancelled = begin(first, [line(number, max_tokens=50) for number in range(30)])
    monkeypatch.setattr(batches, "WINDOWS", {"24h": 2})
    expired = begin(first, [line(number, max_tokens=50) for number in range(30)])
    until(lambda: first.openai.batches.retrieve(cancelled.id).status == "in_progress")
    first.close()
    second = serve(None, data_dir=str(tmp_path))
    engine = FakeEngine()
    second.holder.set_engine(engine, "another")
    assert second.openai.batches.cancel(cancelled.id).status in ("cancelling", "cancelled")
    assert ended(second, cancelled).status == "cancelled"
    assert second.openai.files.delete(cancelled.input_file_id).deleted
    done = ended(second, expired)
    assert done.status == "expired"
    assert {entry["error"]["code"] for entry in content(second, done.error_file_id)} == {"batch_expired"}
    assert engine.requests == []


def test_a_job_that_expires_before_it_is_looked_at(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batches, "WINDOWS", {"24h": -1})
    served = serve(FakeEngine())
    done = ended(served, begin(served, [line(0)]))
    assert (done.status, served.engine.requests) == ("expired", [])


def test_busy_places_hold_up_no_other_key_and_no_end(serve: Serve) -> None:
    served = serve(FakeEngine(slots=2, delay=0.003), keys=["one", "two"])
    long = [begin(served, [line(number, max_tokens=40) for number in range(300)]) for _ in range(9)]
    until(lambda: len([1 for one in running(served) if one.phase.name == "WORK"]) == 8)
    assert ended(served, begin(served, ["{"])).status == "failed"
    served.openai.batches.cancel(long[-1].id)
    assert ended(served, long[-1]).status == "cancelled"
    short = of_key(served, "two", [line(0), line(1)])
    until(lambda: short().status == "completed")
    for batch in long[:8]:
        assert served.openai.batches.retrieve(batch.id).status == "in_progress"
        served.openai.batches.cancel(batch.id)
    for batch in long[:8]:
        ended(served, batch)


def running(served: Served) -> list[Any]:
    return list(served.server._context.desk.runner._running.values())


@pytest.mark.parametrize("when", ["validating", "in_progress", "cancelling"])
def test_a_job_whose_input_is_gone_fails(serve: Serve, when: str) -> None:
    served = serve(FakeEngine())
    its = served.server._context.desk
    its.pause()
    batch = begin(served, [line(0)])

    def lose(one: Store) -> None:
        one.path(batch.input_file_id).unlink()
        if when != "validating":
            one.change(batch.id, when, only_from=["validating"], total=1)

    on_folder(served, lose)
    its.runner._work.paused = False
    done = ended(served, batch)
    assert done.status == "failed"
    assert done.errors is not None and done.errors.data is not None
    assert [error.code for error in done.errors.data] == ["input_file_lost"]
    assert served.openai.files.delete(batch.input_file_id).deleted


# --- turns and room ---


def test_places_go_key_by_key() -> None:
    a, b = b"a", b"b"
    waiting = [*((f"a{number}", a) for number in range(9)), ("b0", b)]
    fair = Turns(4)
    assert fair.begin(waiting, [], 1.0) == ["a0", "b0", "a1", "a2"]
    assert Turns(2).begin(waiting[:3], [], 1.0) == ["a0", "a1"]

    taken = [Place(f"a{number}", a, float(number)) for number in range(3)]
    assert Turns(3).leave([("a9", a)], taken, 1e6) is None  # its own jobs wait for each other
    assert Turns(3).leave([("b0", b)], taken, 3.0) == "a0"  # the longest at work
    leaving = [dataclasses.replace(taken[0], leaving=True), *taken[1:]]
    assert Turns(3).leave([("b0", b)], leaving, 3.0) is None  # one at a time
    assert Turns(4).leave([("b0", b)], taken, 3.0) is None  # there is a place
    one = [Place("a0", a, 0.0)]
    assert Turns(1).leave([("b0", b)], one, turns.SLICE_SECONDS - 1) is None
    assert Turns(1).leave([("b0", b)], one, turns.SLICE_SECONDS) == "a0"
    slices = Turns(1)
    assert slices.begin([("a0", a), ("b0", b)], [], 1.0) == ["a0"]
    assert slices.begin([("a0", a), ("b0", b)], [], 2.0) == ["b0"]  # whose turn was longer ago
    assert slices.begin([("a0", a), ("b0", b)], [], 3.0) == ["a0"]


@pytest.mark.parametrize(
    ("places", "max_bytes", "sizes", "inside"),
    [(3, 1000, [1] * 5, 3), (5, 100, [40] * 5, 2), (5, 100, [500, 1], 1)],
)
def test_room_has_places_and_bytes(places: int, max_bytes: int, sizes: list[int], inside: int) -> None:
    async def fill() -> None:
        room = Room(max_bytes)
        room.places = places
        entering = [asyncio.create_task(room.enter(size)) for size in sizes]
        for _ in range(5):
            await asyncio.sleep(0)
        assert [task.done() for task in entering] == [number < inside for number in range(len(sizes))]
        room.leave(sizes[0])
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert entering[inside].done()
        for task in entering:
            task.cancel()
        await asyncio.gather(*entering, return_exceptions=True)

    asyncio.run(fill())


def test_a_line_of_many_prompts_is_submitted_in_parts(serve: Serve) -> None:
    served = serve(FakeEngine(slots=4, delay=0.001))
    most: list[int] = []
    real = served.engine.submit
    served.engine.submit = lambda *requests: (most.append(len(requests)), real(*requests))[1]  # type: ignore[method-assign]
    prompts = [chr(ord("a") + number % 26) for number in range(100)]
    done = ended(served, begin(served, [line(0, prompt=prompts, max_tokens=2)]))
    [entry] = content(served, done.output_file_id)
    body = entry["response"]["body"]
    letters = [ord(prompt) - ord("a") for prompt in prompts]
    expected = ["".join(chr(ord("a") + (one + step) % 26) for step in (1, 2)) for one in letters]
    assert [choice["text"] for choice in body["choices"]] == expected
    assert body["usage"]["completion_tokens"] == 200
    assert max(most) == answer.LEAST_PART and sum(most) == 100


def test_grammars_that_others_hold_up_are_waited_for(serve: Serve) -> None:
    served = serve(FakeEngine())
    refused: list[None] = []
    real = served.engine.compile_grammar

    def compile_grammar(wanted: Any) -> Any:
        if len(refused) < 2:
            refused.append(None)
            raise EngineBusy(0)
        return real(wanted)

    served.engine.compile_grammar = compile_grammar  # type: ignore[method-assign]
    done = ended(served, begin(served, [line(0, guided_regex="[a-z]+", max_tokens=2)]))
    assert len(refused) == 2
    assert done.error_file_id is None
    assert content(served, done.output_file_id)[0]["response"]["status_code"] == 200


# --- bounds of what is stored ---


def uploading(served: Served, size: int) -> Any:
    """An upload that has begun; what is returned sends the rest, and says what came of it."""
    head = b'--B\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nbatch\r\n'
    head += b'--B\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n'
    tail = b"\r\n--B--\r\n"
    sent = socket.create_connection(("127.0.0.1", served.port), timeout=10)
    length = len(head) + size + len(tail)
    sent.sendall(
        f"POST /v1/files HTTP/1.1\r\nHost: 127.0.0.1:{served.port}\r\nContent-Length: {length}\r\n"
        "Content-Type: multipart/form-data; boundary=B\r\n\r\n".encode()
        + head
    )

    def rest() -> int:
        sent.sendall(b"x" * size + tail)
        status = int(sent.recv(100).split()[1])
        sent.close()
        return status

    return rest


def test_uploads_side_by_side_keep_within_the_bounds(serve: Serve) -> None:
    served = serve(FakeEngine(), max_storage=1)
    its = served.server._context.desk
    begun = [uploading(served, 400_000) for _ in range(4)]
    time.sleep(0.2)
    assert sorted(rest() for rest in begun) == [200, 200, 507, 507]
    its.bounds = dataclasses.replace(its.bounds, files=3)
    begun = [uploading(served, 10) for _ in range(3)]
    time.sleep(0.2)
    assert sorted(rest() for rest in begun) == [200, 403, 403]
    assert sum(file.bytes for file in served.openai.files.list()) == 800_010
    until(lambda: its.uploading.total() == 0)


def test_what_is_added_last_is_looked_at_again(opened: Store) -> None:
    bounds = Bounds(files=2, of_key=100, of_all=150)
    kept = put_file(opened, 60, bounds=bounds)
    for size, tenant, bound in ((41, b"a", "of_key"), (91, b"b", "of_all")):
        with pytest.raises(OverBound) as raised:
            put_file(opened, size, tenant, bounds)
        assert raised.value.bound == bound
    put_file(opened, 1, bounds=bounds)
    with pytest.raises(OverBound) as raised:
        put_file(opened, 1, bounds=bounds)
    assert raised.value.bound == "files"
    opened.delete_file(kept.id)
    put_file(opened, 60, bounds=bounds)


def test_no_key_fills_it_for_all(tmp_path: Path, serve: Serve) -> None:
    keys = tmp_path / "keys"
    keys.write_text("a: one\nb: two\n")
    served = serve(FakeEngine(), keys=["one", "two"], api_key_file=str(keys), max_storage=1)
    served.openai.files.create(file=b"x" * 450_000, purpose="batch")
    with pytest.raises(openai.APIStatusError, match="of one key") as raised:
        served.openai.files.create(file=b"x" * 100_000, purpose="batch")
    assert raised.value.status_code == 507
    served.openai.with_options(api_key="two").files.create(file=b"x" * 450_000, purpose="batch")


def test_results_count_and_wait_for_room(serve: Serve) -> None:
    served = serve(FakeEngine(slots=2, delay=0.001))
    its = served.server._context.desk
    its.pause()
    batch = begin(served, [line(number, max_tokens=4) for number in range(60)])
    other = upload(served, ["x" * 200_000])
    used = on_folder(served, lambda one: one.stored)
    its.bounds = dataclasses.replace(its.bounds, of_key=used + 2_000, of_all=used + 2_000)
    its.runner._work.paused = False
    until(lambda: not its.has_room(b""))
    time.sleep(0.5)
    assert served.openai.batches.retrieve(batch.id).status == "in_progress"
    begun = len(served.engine.requests)
    assert begun < 60
    time.sleep(0.3)
    assert len(served.engine.requests) == begun
    served.openai.files.delete(other)
    done = ended(served, batch)
    assert len(content(served, done.output_file_id)) == 60
    assert on_folder(served, lambda one: (one.stored, one.of)) == on_folder(served, counted)


def test_the_books_after_each_step(opened: Store) -> None:
    first, second = job(1, total=2), job(2, tenant=b"b")
    for one in (first, second):
        opened.add_batch(one)
    opened.add_results([Result(first.id, 1, False, b"12345"), Result(first.id, 1, False, b"1234567")])
    opened.add_results([Result(second.id, 1, True, b"123")])
    assert (opened.stored, opened.of) == (8, {b"a": 5, b"b": 3}) == counted(opened)
    path = opened.incoming()
    path.write_bytes(b"12345\n")
    made = File(FILE_ID, "o", "batch_output", 6, 0, None)
    opened.finish(dataclasses.replace(first, completed=1), "expired", [(made, path)], {})
    opened.fail(second.id, [])
    assert (opened.stored, opened.of) == (6, {b"a": 6}) == counted(opened)
    assert opened.count_batches() == {"expired": 1, "failed": 1}
    folder = opened.folder
    opened.close()
    again = Store(folder)
    assert (again.stored, again.of) == (6, {b"a": 6})
    opened.__dict__.update(again.__dict__)  # for the fixture


def test_jobs_beyond_a_number_are_forgotten(opened: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "MAX_ENDED", 3)
    file = put_file(opened, 5)
    opened.add_batch(job(99, "completed", b"b"))
    opened.add_batch(job(98))
    for number in range(8):
        opened.add_batch(job(number, "completed"))
    found = opened.batches(b"a", limit=100, after=None)
    assert found is not None
    assert [one.id for one in found] == [job(number).id for number in (7, 6, 5, 98)]
    assert opened.batch(job(99).id) is not None
    assert opened.file(b"a", file.id, 0) is not None
    assert opened.count_batches() == {"completed": 4, "in_progress": 1}


def test_jobs_are_counted_when_they_change_alone(opened: Store) -> None:
    opened.add_batch(job(1))
    asked: list[str] = []
    opened.count_batches()
    opened._connection.set_trace_callback(asked.append)
    for _ in range(3):
        assert opened.count_batches() == {"in_progress": 1}
    assert asked == []
    opened._connection.set_trace_callback(None)
    opened.change(job(1).id, "cancelling", only_from=["in_progress"])
    assert opened.count_batches() == {"cancelling": 1}


def test_the_sweep_leaves_what_an_open_job_reads(opened: Store) -> None:
    read = put_file(opened, 1, expires_at=10)
    free = put_file(opened, 1, expires_at=10)
    opened.add_batch(dataclasses.replace(job(1), input_file_id=read.id))
    opened.sweep(20)
    assert (opened.path(read.id).exists(), opened.path(free.id).exists()) == (True, False)
    opened.change(job(1).id, "cancelled", only_from=["in_progress"])
    opened.sweep(20)
    assert not opened.path(read.id).exists()


def test_the_database_is_for_its_user_alone(tmp_path: Path) -> None:
    """Also in a folder that others may look into, and when it was made readable before."""
    tmp_path.chmod(0o755)
    before = os.umask(0o022)
    try:
        for _ in range(2):
            one = Store(tmp_path)
            put_file(one, 1)
            names = ["lock", "jobs.sqlite", "jobs.sqlite-wal", "jobs.sqlite-shm"]
            assert [stat.S_IMODE((tmp_path / name).stat().st_mode) for name in names] == [0o600] * 4
            for name in ("files", "incoming"):
                assert stat.S_IMODE((tmp_path / name).stat().st_mode) == 0o700
                (tmp_path / name).chmod(0o755)
            one.close()
            (tmp_path / "jobs.sqlite").chmod(0o644)
    finally:
        os.umask(before)


# --- the last step ---


def test_results_are_closed_where_they_were_opened(opened: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    opened.add_batch(job(1, total=1))
    opened.add_results([Result(job(1).id, 1, False, b"{}")])
    entry = '{"custom_id": "a", "url": "/v1/completions", "body": {}}\n'
    (opened.folder / "input").write_text(entry)
    closed: list[int] = []
    real = Store.results

    def watched(self: Store, batch_id: str) -> Iterator[Result]:
        try:
            yield from real(self, batch_id)
        finally:
            closed.append(threading.get_ident())

    def full(*args: Any) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Store, "results", watched)
    monkeypatch.setattr(output, "_put", full)
    names = [opened.incoming(), opened.incoming()]
    with pytest.raises(Exception, match="No space") as raised:
        output._write(opened, job(1, total=1), opened.folder / "input", *names)
    assert closed == [threading.get_ident()], raised  # while the traceback still holds its frames


FINISH = """
import asyncio, json, os, signal, sys
from pathlib import Path
from types import SimpleNamespace
from jaxserve.server.jobs import output, store

folder, site = Path(sys.argv[1]), sys.argv[2]

def die(*args, **options):
    os.kill(os.getpid(), signal.SIGKILL)

if site == "written":
    store.os = SimpleNamespace(replace=die)
if site == "renamed":
    store.sync_folder = die
if site == "committing":
    real = store._insert_file
    store._insert_file = lambda *args: (real(*args), die())
opened = store.Store(folder)

async def try_run(work):
    return work(opened)

[batch] = opened.open_batches()
path = opened.path(batch.input_file_id)
asyncio.run(output.finish(SimpleNamespace(try_run=try_run), batch, path))
done = opened.batch(batch.id)
names = sorted(path.name for path in (folder / "files").iterdir())
print(json.dumps([done.status, [(name, opened.path(name).read_text()) for name in names]]))
"""


def test_kill_9_while_a_job_ends(tmp_path: Path) -> None:
    def end(folder: Path, site: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", FINISH, str(folder), site]
        return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)

    for name in ("killed", "whole"):
        one = Store(tmp_path / name)
        entries = [
            f'{{"custom_id": "{n}", "url": "/v1/completions", "body": {{}}}}\n'.encode() for n in (1, 2, 3)
        ]
        path = one.incoming()
        path.write_bytes(b"".join(entries))
        size = path.stat().st_size
        one.add_file(b"a", File(FILE_ID, "in", "batch", size, 0, None), path, WIDE)
        one.add_batch(job(1, total=3))
        one.add_results([Result(job(1).id, n, n == 2, b'{"line": %d}' % n) for n in (1, 2, 3)])
        one.close()
    for site in ("written", "renamed", "committing"):
        assert end(tmp_path / "killed", site).returncode == -signal.SIGKILL
        one = Store(tmp_path / "killed")
        [left] = one.open_batches()
        assert left.status == "finalizing"
        assert [path.name for path in (tmp_path / "killed" / "files").iterdir()] == [FILE_ID]
        assert one.finished_lines(left.id) == {1, 2, 3}
        one.close()
    again, whole = end(tmp_path / "killed", "none"), end(tmp_path / "whole", "none")
    assert again.stdout == whole.stdout, (again.stderr, whole.stderr)
    assert '"completed"' in whole.stdout and whole.stdout.count("line") == 3
