"""The server's lines on stderr: text for people or a JSON object each, one line whatever a client sent.

Values that clients control are escaped: no control character, no line separator, no direction mark reaches a
terminal. Lines are written on a thread of their own: nobody who does not read stderr can hold up the server.
When too many wait, the rest is dropped, and counted.
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import queue
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal

MAX_WAITING = 10_000  # lines
MAX_VALUE = 256  # characters of a value, of which the rest is cut off
FLUSH_SECONDS = 2.0  # at the end, for a stderr that is still read
LEVELS = {"debug": logging.DEBUG, "info": logging.INFO, "warning": logging.WARNING, "error": logging.ERROR}
CLOSED = frozenset({errno.EPIPE, errno.EBADF})  # nobody will ever read what is written

Write = Callable[[str], None]


def shown(text: str, most: int = MAX_VALUE) -> str:
    """The text with every character that is not printable spelled out (`\\x1b`, `\\u2028`), and cut."""
    if len(text) > most:
        text = text[:most] + "..."
    if text.isprintable():
        return text
    return "".join(one if one.isprintable() else one.encode("unicode_escape").decode("ascii") for one in text)


class Formatter(logging.Formatter):
    """`time level message name=value …`, or a JSON object. The values are the record's `fields`."""

    def __init__(self, form: Literal["text", "json"]) -> None:
        super().__init__()
        self._json = form == "json"

    def format(self, record: logging.LogRecord) -> str:
        fields: Mapping[str, Any] = getattr(record, "fields", {})
        message = record.getMessage()
        if record.exc_info:
            message += "\n" + self.formatException(record.exc_info)
        moment = _moment(record.created)
        level = record.levelname.lower()
        if self._json:
            return json_line(
                {"time": moment, "level": level, "logger": record.name, "message": message, **fields}
            )
        # a traceback stays readable: its lines are ours, and what they quote is escaped in them
        lines = "\n".join(shown(line, 10_000) for line in message.split("\n"))
        values = "".join(f" {name}={_value(value)}" for name, value in fields.items() if value is not None)
        return f"{moment} {level} {lines}{values}"


def json_line(content: Mapping[str, Any]) -> str:
    """ASCII alone; lone surrogates are spelled out as the rest is."""
    return json.dumps({k: v for k, v in content.items() if v is not None}).replace("\x7f", "\\u007f")


def _moment(seconds: float) -> str:
    """UTC, RFC 3339, in milliseconds."""
    whole = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(seconds))
    return f"{whole}.{int(seconds * 1000) % 1000:03d}Z"


def _value(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    text = shown(str(value))
    return json.dumps(text, ensure_ascii=False) if re.search(r'[\s"=]|^$', text) else text


class Writer:
    """Hands lines to `write` on a thread."""

    def __init__(self, write: Write) -> None:
        self._write = write
        self._lines: queue.Queue[str | None] = queue.Queue(MAX_WAITING)
        self._dropped = 0  # for want of room in the queue
        self._thread = threading.Thread(target=self._run, name="jaxserve-log", daemon=True)
        self._thread.start()

    def put(self, line: str) -> None:
        try:
            self._lines.put_nowait(line)
        except queue.Full:
            self._dropped += 1

    def close(self) -> None:
        """Waits for what was put, but not for long."""
        with contextlib.suppress(queue.Full):
            self._lines.put(None, timeout=FLUSH_SECONDS)
        self._thread.join(FLUSH_SECONDS)

    def _run(self) -> None:
        missing = 0
        while (line := self._lines.get()) is not None:
            dropped, self._dropped = self._dropped, 0
            missing += dropped
            if missing:
                line = f"{line}\n({missing} lines were dropped: they could not be written in time)"
            try:
                self._write(line)
            except ValueError:  # stderr is closed: there is nobody to tell
                return
            except OSError as error:
                if error.errno in CLOSED:
                    return
                missing += 1  # a full disk has room again some day
            else:
                missing = 0


class _Handler(logging.Handler):
    def __init__(self, writer: Writer) -> None:
        super().__init__()
        self._writer = writer

    def emit(self, record: logging.LogRecord) -> None:
        self._writer.put(self.format(record))


@contextlib.contextmanager
def logging_to(write: Write, form: Literal["text", "json"], level: str) -> Iterator[Write]:
    """Until it is left, all that is logged goes through `write`, line by line.

    Yields what says a line of progress: as it is in text, as an object's message in JSON.
    """
    writer = Writer(write)
    handler = _Handler(writer)
    handler.setFormatter(Formatter(form))
    root, ours = logging.getLogger(), logging.getLogger("jaxserve")
    before = (root.handlers[:], ours.level)
    root.handlers[:] = [handler]
    ours.setLevel(LEVELS[level])

    def say(line: str) -> None:
        if form == "json":
            line = json_line({"time": _moment(time.time()), "level": "info", "message": line})
        writer.put(line)

    try:
        yield say
    finally:
        root.handlers[:], old = before
        ours.setLevel(old)
        writer.close()
