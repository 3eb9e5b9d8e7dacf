"""The log: one line whatever a client sends, and nothing in it that is secret."""

from __future__ import annotations

import errno
import io
import json
import logging
import os
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from jaxserve.server import logs
from jaxserve.server.logs import Formatter, Writer, logging_to, shown
from tests.server.fakes import FakeEngine
from tests.server.harness import Serve, until

NASTY = "a\r\nforged: 1\x1b[31m\u2028\u2029\u202e\x7f\x85\x00\t\ud800z"


@pytest.fixture
def written() -> Iterator[list[str]]:
    """What is logged, as the lines of a log at level debug in JSON."""
    lines: list[str] = []
    with logging_to(lines.append, "json", "debug"):
        yield lines


def test_what_is_shown_is_one_printable_line() -> None:
    text = shown(NASTY)
    assert text.isprintable() and text.isascii()
    assert text.startswith(r"a\r\nforged: 1\x1b[31m\u2028\u2029\u202e\x7f\x85\x00\t")
    assert shown("plain, größer ✓") == "plain, größer ✓"
    assert shown("x" * 1000) == "x" * 256 + "..."


@pytest.mark.parametrize("form", ["text", "json"])
def test_values_cannot_forge_a_line(form: Any) -> None:
    record = logging.LogRecord("jaxserve", logging.INFO, "", 0, "request", (), None)
    record.fields = {"path": NASTY, "empty": "", "space": 'a b="c"', "none": None, "number": 1.23456789}
    line = Formatter(form).format(record)
    assert line.splitlines() == [line]
    assert line.isprintable()
    if form == "json":
        assert json.loads(line)["path"] == NASTY
        assert json.loads(line)["message"] == "request"
    else:
        assert 'empty=""' in line and r'space="a b=\"c\""' in line and "none" not in line
        assert line.endswith("number=1.235")


def test_a_line_for_each_request(serve: Serve, written: list[str]) -> None:
    served = serve(FakeEngine(), keys=["secret"])
    served.openai.completions.create(model="alphabet", prompt="confidential", max_tokens=4)
    list(served.openai.completions.create(model="alphabet", prompt="confidential", max_tokens=4, stream=True))
    served.http.get("/v1/models/none", headers={"Authorization": "Bearer wrong"})
    served.http.get("/health")
    until(lambda: len(written) >= 4)
    whole, stream, refused, health = map(json.loads, written[:4])
    for entry in (whole, stream):
        assert (entry["method"], entry["path"], entry["status"]) == ("POST", "/v1/completions", 200)
        assert entry["key"] == "key-1"
        assert entry["id"].startswith("req_")
        assert (entry["prompt_tokens"], entry["generated_tokens"], entry["finish"]) == (12, 4, "length")
        assert 0 <= entry["queue_seconds"] <= entry["ttft_seconds"] <= entry["seconds"] < 10
    assert whole["cached_tokens"] == 0 and stream["cached_tokens"] == 11
    assert (refused["status"], refused.get("key"), refused["level"]) == (401, None, "info")
    assert (health["status"], health["level"]) == (200, "debug")  # polled
    assert not [line for line in written if "secret" in line or "confidential" in line or "wrong" in line]


def test_what_clients_send_is_escaped(serve: Serve, written: list[str]) -> None:
    served = serve(FakeEngine())
    served.http.get("/%0d%0aforged%1b%5b31m%e2%80%a8x", headers={"X-Request-Id": "a b"})
    served.http.get("/y", headers={"X-Request-Id": "given-1"})
    until(lambda: len(written) >= 2)
    assert all(line.splitlines() == [line] and line.isprintable() for line in written)
    assert json.loads(written[0])["path"] == "/\r\nforged\x1b[31m\u2028x"
    assert json.loads(written[0])["id"] != "a b"
    assert json.loads(written[1])["id"] == "given-1"


def test_a_client_that_left_is_in_the_log(serve: Serve, written: list[str]) -> None:
    served = serve(FakeEngine(delay=0.01))
    content = json.dumps({"model": "alphabet", "prompt": "a", "max_tokens": 200, "stream": True})
    connection = served.connect("/v1/completions", content.encode())
    assert connection.recv(12) == b"HTTP/1.1 200"
    connection.close()
    until(lambda: len(written) >= 1)
    entry = json.loads(written[0])
    assert entry["aborted"] is True and entry["status"] == 200
    assert 0 < entry["generated_tokens"] < 200


def test_batch_work_is_nobodys_request(serve: Serve, written: list[str]) -> None:
    from tests.server.test_batches import begin, ended, line

    served = serve(FakeEngine())
    ended(served, begin(served, [line(0)]))
    until(lambda: any("is done" in one for one in written))
    assert all(json.loads(one).get("path") != "/v1/completions" for one in written)


def test_levels_and_progress() -> None:
    for form, level, expected in (("text", "warning", 2), ("text", "info", 3), ("json", "error", 2)):
        lines: list[str] = []
        with logging_to(lines.append, form, level) as say:  # type: ignore[arg-type]
            say("listening")
            logging.getLogger("jaxserve.x").info("info")
            logging.getLogger("jaxserve.x").error("error %s", "\x1b")
        assert len(lines) == expected
        assert "\x1b" not in "".join(lines)
        assert lines[0] == "listening" if form == "text" else json.loads(lines[0])["message"] == "listening"
    assert logging.getLogger("jaxserve").level == logging.NOTSET


def test_tracebacks_stay_readable() -> None:
    lines: list[str] = []
    with logging_to(lines.append, "text", "info"):
        try:
            raise ValueError("a\x1b[31m\nb")
        except ValueError:
            logging.getLogger("jaxserve").exception("failed")
    [entry] = lines
    assert "Traceback" in entry and "\x1b" not in entry
    with logging_to(lines.append, "json", "info"):
        logging.getLogger("jaxserve").error("a\nb")
    assert json.loads(lines[1])["message"] == "a\nb" and "\n" not in lines[1]


def test_nobody_who_does_not_read_holds_up_the_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logs, "MAX_WAITING", 10)
    monkeypatch.setattr(logs, "FLUSH_SECONDS", 0.1)
    reading = threading.Event()
    lines: list[str] = []

    def write(line: str) -> None:
        reading.wait()
        lines.append(line)

    writer = Writer(write)
    for number in range(100):
        writer.put(f"{number}")  # returns at once
    writer.close()
    reading.set()
    until(lambda: len(lines) >= 10)
    assert "lines were dropped" in "".join(lines)


@pytest.mark.parametrize(
    ("number", "goes_on"),
    [(errno.ENOSPC, True), (errno.EIO, True), (errno.EPIPE, False), (errno.EBADF, False)],
)
def test_a_write_that_fails(number: int, goes_on: bool) -> None:
    """On a full disk two lines are lost, and that is said; a pipe that is closed stays closed."""
    lines: list[str] = []
    asked: list[str] = []

    def write(line: str) -> None:
        asked.append(line)
        if len(asked) <= 2:
            raise OSError(number, os.strerror(number))
        lines.append(line)

    writer = Writer(write)
    for name in "abcd":
        writer.put(name)
    writer.close()
    if goes_on:
        assert [line.split("\n")[0] for line in lines] == ["c", "d"]
        assert "(2 lines were dropped: " in lines[0] and "\n" not in lines[1]
    else:
        assert asked == ["a"]


def test_a_closed_stderr_ends_nothing() -> None:
    stream = io.StringIO()
    stream.close()
    with logging_to(lambda line: print(line, file=stream), "text", "info") as say:
        for _ in range(10):
            say("x")
