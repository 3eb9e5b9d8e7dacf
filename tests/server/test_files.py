"""Files through the `openai` client; what a client sends never becomes a path, and never fills the memory."""

from __future__ import annotations

import dataclasses
import os
import resource
import socket
import sqlite3
import threading
import time
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from jaxserve.server import upload
from jaxserve.server.api import files
from jaxserve.server.jobs import folder, pace, store
from tests.server.fakes import FakeEngine
from tests.server.harness import Serve, Served, until
from tests.server.test_batches import begin, content, ended, line


def send(served: Served, body: bytes, *, boundary: str = "B", length: int | None = None) -> httpx.Response:
    headers = {"Content-Type": f"multipart/form-data; boundary={boundary}"}
    return served.http.post("/v1/files", content=body, headers=headers)


def part(name: str, value: bytes, filename: str | None = None) -> bytes:
    given = "" if filename is None else f'; filename="{filename}"'
    head = f'--B\r\nContent-Disposition: form-data; name="{name}"{given}\r\n\r\n'
    return head.encode() + value + b"\r\n"


PURPOSE, FILE, END = part("purpose", b"batch"), part("file", b"abc", "a.jsonl"), b"--B--\r\n"


def leftovers(served: Served) -> list[str]:
    return [path.name for path in (Path(served.options.data_dir or "") / "incoming").iterdir()]


def test_a_file_from_upload_to_deletion(served: Served) -> None:
    client = served.openai
    before = int(time.time())
    file = client.files.create(file=("räume.jsonl", b"one\ntwo\n"), purpose="batch")
    assert (file.object, file.filename, file.bytes, file.purpose) == ("file", "räume.jsonl", 8, "batch")
    assert file.status == "processed"
    assert before <= file.created_at <= time.time()
    assert file.expires_at == file.created_at + 30 * 86400
    assert client.files.retrieve(file.id) == file
    reply = client.files.content(file.id)
    assert reply.content == b"one\ntwo\n"
    assert reply.response.headers["content-disposition"] == "attachment; filename*=UTF-8''r%C3%A4ume.jsonl"
    assert client.files.delete(file.id).deleted
    for call in (client.files.retrieve, client.files.content, client.files.delete):
        with pytest.raises(openai.NotFoundError):
            call(file.id)
    other = client.files.create(file=b"x", purpose="user_data")
    assert other.expires_at is None
    kept = client.files.create(
        file=b"x", purpose="batch", expires_after={"anchor": "created_at", "seconds": 3600}
    )
    assert kept.expires_at == kept.created_at + 3600
    assert leftovers(served) == []


def test_listing(serve: Serve) -> None:
    served = serve(FakeEngine())
    client = served.openai
    assert list(client.files.list()) == []
    assert not Path(served.options.data_dir or "").exists()  # looking makes no folder
    with pytest.raises(openai.NotFoundError):
        client.files.retrieve("file-" + "0" * 32)
    ids = [
        client.files.create(file=(f"{n}", b"x"), purpose="user_data" if n == 2 else "batch").id
        for n in range(5)
    ]
    assert [file.id for file in client.files.list()] == ids[::-1]
    assert [file.id for file in client.files.list(order="asc", limit=2)] == ids  # pages follow by themselves
    first = client.files.list(order="asc", limit=2)
    assert [file.id for file in first.data] == ids[:2] and first.has_more
    assert [file.id for file in client.files.list(purpose="user_data")] == [ids[2]]
    assert [file.id for file in client.files.list(after=ids[1]).data] == [ids[0]]
    for query in (
        "limit=0",
        "limit=10001",
        "limit=x",
        "order=up",
        "after=file-x",
        "surprise=1",
        "limit=1&limit=2",
    ):
        reply = served.http.get(f"/v1/files?{query}")
        assert reply.status_code == 400
        assert reply.json()["error"]["param"] == query.partition("=")[0]


def test_files_expire(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "BATCH_SECONDS", 1)
    served = serve(FakeEngine())
    file = served.openai.files.create(file=b"x", purpose="batch")
    until(lambda: served.http.get(f"/v1/files/{file.id}").status_code == 404)
    assert list(served.openai.files.list()) == []
    desk = served.server._context.desk
    assert desk._store is not None
    path = desk._store.path(file.id)
    assert path.exists()
    desk._thread.submit(lambda: desk._store.sweep(int(time.time()))).result()  # type: ignore[union-attr]
    assert not path.exists()


STRANGE = [
    "..%2f..%2fetc%2fpasswd",
    "file-..%2f..%2fx",
    "%00",
    "file-%00" + "0" * 31,
    "file-" + "0" * 31,
    "file-" + "A" * 32,
    "file-" + "0" * 32,
    "x" * 5000,
    "%ff",
    "jobs.sqlite",
    "%2e%2e",
]


@pytest.mark.parametrize("name", STRANGE)
def test_strange_ids(served: Served, name: str) -> None:
    for reply in (
        served.http.get(f"/v1/files/{name}"),
        served.http.get(f"/v1/files/{name}/content"),
        served.http.delete(f"/v1/files/{name}"),
        served.http.get(f"/v1/batches/{name}"),
        served.http.post(f"/v1/batches/{name}/cancel"),
    ):
        assert reply.status_code in (404, 405)
        assert reply.json()["error"]["type"] == "invalid_request_error"


def test_files_of_another_key_do_not_exist(serve: Serve) -> None:
    served = serve(FakeEngine(), keys=["one", "two"])
    file = served.openai.files.create(file=b"x", purpose="batch")
    other = served.openai.with_options(api_key="two")
    for call in (other.files.retrieve, other.files.content, other.files.delete):
        with pytest.raises(openai.NotFoundError):
            call(file.id)
    assert list(other.files.list()) == []
    assert served.http.get("/v1/files", params={"after": file.id}).status_code == 401
    with pytest.raises(openai.BadRequestError):
        other.files.list(after=file.id)
    assert served.openai.files.content(file.id).content == b"x"


BAD_FORMS = [
    (FILE + END, "purpose"),
    (PURPOSE + END, "file"),
    (part("purpose", b"fine-tune") + FILE + END, "purpose"),
    (PURPOSE + FILE + FILE + END, "file"),
    (PURPOSE + PURPOSE + FILE + END, "purpose"),
    (PURPOSE + FILE + part("surprise", b"1") + END, "surprise"),
    (PURPOSE + FILE + part("expires_after[seconds]", b"9") + END, "expires_after[seconds]"),
    (PURPOSE + FILE + part("expires_after[seconds]", b"7200") + END, "expires_after"),
    (PURPOSE + FILE + part("purpose2", b"x" * 5000) + END, "purpose2"),
    (part("purpose", b"\xff") + FILE + END, "purpose"),
    (PURPOSE + FILE, None),
    (b"", None),
    (b"nonsense", None),
    (b"--B\r\nX: y\r\n\r\nabc\r\n--B--\r\n", None),
    (b"--B\r\n" + b"X: y\r\n" * 5000 + b"\r\nabc\r\n--B--\r\n", None),
    (b"".join(part(f"f{n}", b"") for n in range(40)) + END, None),
]


@pytest.mark.parametrize(("body", "param"), BAD_FORMS)
def test_forms_that_are_refused(served: Served, body: bytes, param: str | None) -> None:
    reply = send(served, body)
    assert reply.status_code == 400
    assert reply.json()["error"]["param"] == param
    assert leftovers(served) == []


@pytest.mark.parametrize(
    "kind", ["", "application/json", "multipart/form-data", "multipart/form-data; boundary="]
)
def test_bodies_that_are_no_form(served: Served, kind: str) -> None:
    reply = served.http.post("/v1/files", content=b"{}", headers={"Content-Type": kind})
    assert reply.status_code == 400
    assert "multipart/form-data" in reply.json()["error"]["message"]


def test_names_are_no_paths(served: Served) -> None:
    for given, shown in (
        (r"..\\..\\x", "x"),
        ("/etc/passwd", "passwd"),
        ("a\u202eb\x1b[31m", "ab[31m"),
        ("", "file"),
    ):
        reply = send(served, PURPOSE + part("file", b"abc", given) + END)
        assert reply.status_code == 200
        assert reply.json()["filename"] == shown
    assert (Path(served.options.data_dir or "") / "files").is_dir()


# --- bounds ---


def pieces(count: int) -> Iterator[bytes]:
    yield PURPOSE + b'--B\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n'
    for _ in range(count):
        yield b"x" * 2**16
    yield b"\r\n" + END


def test_a_large_file_is_not_held_in_memory(serve: Serve) -> None:
    served = serve(FakeEngine())
    tracemalloc.start()
    headers = {"Content-Type": "multipart/form-data; boundary=B"}
    reply = served.http.post("/v1/files", content=pieces(600), headers=headers)  # 39 MB, chunked
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert reply.status_code == 200
    assert reply.json()["bytes"] == 600 * 2**16
    assert peak < 12 * 2**20


def test_files_that_are_too_large(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    served = serve(FakeEngine(), max_file_size=1)
    headers = {"Content-Type": "multipart/form-data; boundary=B"}
    reply = served.http.post("/v1/files", content=pieces(20), headers=headers)  # no length is declared
    assert reply.status_code == 413
    with pytest.raises(openai.APIStatusError) as raised:
        served.openai.files.create(file=b"x" * 2**21, purpose="batch")  # its length is
    assert raised.value.status_code == 413
    assert leftovers(served) == []
    served.server._context.desk.bounds = dataclasses.replace(served.server._context.desk.bounds, files=1)
    served.openai.files.create(file=b"x", purpose="batch")
    with pytest.raises(openai.PermissionDeniedError):
        served.openai.files.create(file=b"x", purpose="batch")


def test_all_files_together_have_a_bound(serve: Serve) -> None:
    served = serve(FakeEngine(), max_storage=1)
    kept = served.openai.files.create(file=b"x" * 600_000, purpose="batch")
    with pytest.raises(openai.APIStatusError) as raised:
        served.openai.files.create(file=b"x" * 600_000, purpose="batch")
    assert raised.value.status_code == 507
    served.openai.files.delete(kept.id)
    served.openai.files.create(file=b"x" * 600_000, purpose="batch")
    assert leftovers(served) == []
    assert served.server._context.desk.uploading.total() == 0


def test_uploads_that_stall_or_end_early(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(upload, "START_SECONDS", 0.3)
    served = serve(FakeEngine())
    head = b"POST /v1/files HTTP/1.1\r\nHost: localhost\r\nContent-Type: multipart/form-data; boundary=B\r\n"
    slow = socket.create_connection(("127.0.0.1", served.port), timeout=10)
    slow.sendall(head + b"Content-Length: 1000\r\n\r\n" + PURPOSE)
    gone = socket.create_connection(("127.0.0.1", served.port), timeout=10)
    gone.sendall(head + b"Content-Length: 1000\r\n\r\n" + PURPOSE)
    gone.close()
    assert slow.recv(100).startswith(b"HTTP/1.1 408")
    slow.close()
    until(lambda: leftovers(served) == [])
    served.as_new()


# --- what a crash leaves, and what others make of the folder ---


def test_what_was_half_written_is_removed(tmp_path: Path, serve: Serve) -> None:
    first = serve(FakeEngine(), data_dir=str(tmp_path))
    file = first.openai.files.create(file=b"x", purpose="batch")
    first.close()
    (tmp_path / "incoming" / "half").write_bytes(b"half")
    (tmp_path / "files" / ("file-" + "1" * 32)).write_bytes(b"no row")
    second = serve(FakeEngine(), data_dir=str(tmp_path))
    assert [found.id for found in second.openai.files.list()] == [file.id]
    assert [path.name for path in (tmp_path / "files").iterdir()] == [file.id]
    assert leftovers(second) == []


def test_a_folder_of_another_version(tmp_path: Path, serve: Serve) -> None:
    served = serve(FakeEngine(), data_dir=str(tmp_path))
    served.openai.files.create(file=b"x", purpose="batch")
    with pytest.raises(folder.FolderTaken):
        store.Store(tmp_path)
    served.close()
    database = sqlite3.connect(tmp_path / "jobs.sqlite")
    with database:
        database.execute("PRAGMA user_version = 99")
    database.close()
    with pytest.raises(folder.StorageError, match="version 99"):
        store.Store(tmp_path)
    (tmp_path / "jobs.sqlite").write_bytes(b"no database at all" * 100)
    for name in ("jobs.sqlite-wal", "jobs.sqlite-shm"):
        (tmp_path / name).unlink(missing_ok=True)
    with pytest.raises(folder.StorageError):
        store.Store(tmp_path)


def test_only_the_user_can_look_into_the_folder(serve: Serve) -> None:
    served = serve(FakeEngine())
    served.openai.files.create(file=b"x", purpose="batch")
    assert Path(served.options.data_dir or "").stat().st_mode & 0o77 == 0


# --- a full disk ---


@pytest.fixture
def full_disk() -> Iterator[Any]:
    """`with full_disk():` no file can grow beyond 100 kB (EFBIG; the database sees an I/O error)."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    class Full:
        def __enter__(self) -> None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))

        def __exit__(self, *error: object) -> None:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)

    yield Full
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_an_upload_to_a_full_disk(serve: Serve, full_disk: Any) -> None:
    served = serve(FakeEngine())
    served.openai.files.create(file=b"x", purpose="batch")
    with full_disk(), pytest.raises(openai.APIStatusError) as raised:
        served.openai.files.create(file=b"x" * 300_000, purpose="batch")
    assert raised.value.status_code == 507
    assert "it is full" in raised.value.message
    assert leftovers(served) == []
    assert len(list(served.openai.files.list())) == 1
    served.openai.files.create(file=b"x" * 300_000, purpose="batch")
    served.as_new()


def test_a_job_waits_for_room_on_the_disk(
    serve: Serve, full_disk: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pace, "RETRY_SECONDS", 0.1)
    served = serve(FakeEngine(slots=4, delay=0.002))
    batch = begin(served, [line(number, max_tokens=20, logprobs=5) for number in range(300)])
    with full_disk():
        until(lambda: "jaxserve_job_results_unwritten 0.0" not in served.http.get("/metrics").text, 20)
        time.sleep(0.3)
        assert served.openai.batches.retrieve(batch.id).status == "in_progress"
        assert served.http.get("/health").status_code == 200
        assert served.completion(max_tokens=3).json()["choices"][0]["text"] == "bcd"
        assert len(served.engine.requests) < 300  # no more is computed than can be held
        assert list(served.openai.files.list(purpose="batch_output")) == []
    done = ended(served, batch, 30)
    assert done.status == "completed"
    assert len(content(served, done.output_file_id)) == 300
    served.as_new()


SITES = ["open", "write", "fsync", "replace", "finish", "add_results", "change"]


@pytest.mark.parametrize("site", SITES)
def test_every_write_of_a_job_can_fail(serve: Serve, site: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first three times that a job's end or a result is written, the disk does not take it."""
    monkeypatch.setattr(pace, "RETRY_SECONDS", 0.01)
    served = serve(FakeEngine())
    served.server._context.desk.pause()
    batch = begin(served, [line(number, max_tokens=5) for number in range(20)])
    failures: list[str] = []

    def failing(real: Any) -> Any:
        def call(*args: Any, **options: Any) -> Any:
            if len(failures) < 3 and threading.current_thread() is not threading.main_thread():
                failures.append(site)
                raise OSError(28, "No space left on device")
            return real(*args, **options)

        return call

    from jaxserve.server.jobs import output

    match site:
        case "open":
            monkeypatch.setattr(output, "open", failing(open), raising=False)
        case "write":
            monkeypatch.setattr(output, "_put", failing(output._put))
        case "fsync":
            monkeypatch.setattr(output, "flush", failing(output.flush))
        case "replace":
            monkeypatch.setattr(store.os, "replace", failing(os.replace))
        case "finish":
            monkeypatch.setattr(store, "_insert_file", failing(store._insert_file))
        case _:
            real = getattr(store.Store, site)

            def guarded(self: store.Store, *args: Any, **options: Any) -> Any:
                with folder.storage_errors():
                    return failing(lambda: real(self, *args, **options))()

            monkeypatch.setattr(store.Store, site, guarded)
    served.server._context.desk.runner._work.paused = False
    done = ended(served, batch, 20)
    assert len(failures) == 3
    assert done.status == "completed"
    assert len(content(served, done.output_file_id)) == 20
    assert [file.purpose for file in served.openai.files.list()] == ["batch_output", "batch"]
    assert leftovers(served) == []
