"""A batch job's input, line by line: `{"custom_id", "method", "url", "body"}`, and what is wrong with it.

Source of the format: OpenAI's "Batch API" guide. Files are read from the beginning, a line at a time: as much
memory as the longest line. Knows nothing of what a body asks for.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import orjson

MAX_LINES = 50_000  # OpenAI's own limit
MAX_LINE_BYTES = 16 * 2**20
MAX_CUSTOM_ID = 512  # characters
MAX_ERRORS = 100  # of a job, that are listed
MEMBERS = frozenset({"custom_id", "method", "url", "body"})


@dataclasses.dataclass(frozen=True, slots=True)
class Line:
    """number: from 1, lines without anything on them included."""

    number: int
    custom_id: str
    body: dict[str, Any]
    size: int  # bytes


class LineError(ValueError):
    """A line that is no request."""

    def __init__(self, code: str, message: str, line: int | None = None, param: str | None = None) -> None:
        super().__init__(message)
        self.code = code
        self.line = line
        self.param = param

    def body(self) -> dict[str, Any]:
        """OpenAI's form."""
        return {"code": self.code, "message": str(self), "param": self.param, "line": self.line}


class InputLost(Exception):
    """The job's input file is no longer there."""


def check_lines(path: Path, endpoint: str) -> tuple[int, list[LineError]]:
    """(number of requests, what is wrong with them: then the job fails). Raises InputLost or OSError."""
    errors: list[LineError] = []
    seen: dict[bytes, int] = {}  # digest of a custom_id -> its line
    count = 0
    for number, data in raw_lines(path):
        count += 1
        if count > MAX_LINES:
            errors.append(
                LineError("too_many_requests", f"the file has more than {MAX_LINES} requests", number)
            )
            break
        try:
            line = parse_line(number, data, endpoint)
            digest = hashlib.blake2b(line.custom_id.encode(), digest_size=16).digest()
            if digest in seen:
                raise LineError(
                    "duplicate_custom_id",
                    f"custom_id {line.custom_id!r} is that of line {seen[digest]}, too",
                    number,
                    "custom_id",
                )
            seen[digest] = number
        except LineError as error:
            errors.append(error)
            if len(errors) == MAX_ERRORS:
                break
    if not count:
        errors.append(LineError("empty_file", "the file has no request in it"))
    return count, errors


def lines(path: Path, endpoint: str) -> Iterator[Line]:
    """Of a file that `check_lines` found in order. Raises InputLost or OSError."""
    for number, data in raw_lines(path):
        yield parse_line(number, data, endpoint)


def raw_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """(number, content) of each line that has any; of one that is too long, the beginning."""
    try:
        opened = open(path, "rb")  # noqa: SIM115  # closed below
    except FileNotFoundError:
        raise InputLost from None
    with opened as file:
        number = 0
        while data := file.readline(MAX_LINE_BYTES + 1):
            number += 1
            whole = data
            while not whole.endswith(b"\n") and len(whole) > MAX_LINE_BYTES:  # the rest of one too long
                whole = file.readline(MAX_LINE_BYTES + 1)
            if data.strip():
                yield number, data


def parse_line(number: int, data: bytes, endpoint: str) -> Line:
    """Raises LineError."""
    if len(data) > MAX_LINE_BYTES:
        raise LineError("line_too_long", f"the line is longer than {MAX_LINE_BYTES} bytes", number)
    try:
        fields = orjson.loads(data)
    except orjson.JSONDecodeError as error:
        raise LineError("invalid_json_line", f"the line is not valid JSON: {error}", number) from None
    if not isinstance(fields, dict):
        raise LineError("invalid_json_line", "the line must be a JSON object", number)
    for name in ("custom_id", "url", "body"):
        if fields.get(name) is None:
            raise LineError("missing_required_parameter", f"{name} is required", number, name)
    unknown = next((name for name in fields if name not in MEMBERS), None)
    if unknown is not None:
        raise LineError("unknown_parameter", f"unknown field: {unknown[:64]!r}", number, unknown[:64])
    custom_id, body = fields["custom_id"], fields["body"]
    if not isinstance(custom_id, str) or not 1 <= len(custom_id) <= MAX_CUSTOM_ID:
        text = f"custom_id must be a text of 1 to {MAX_CUSTOM_ID} characters"
        raise LineError("invalid_custom_id", text, number, "custom_id")
    if fields.get("method", "POST") != "POST":
        raise LineError("invalid_method", "method must be POST", number, "method")
    if fields["url"] != endpoint:
        raise LineError("invalid_url", f"url must be the batch's endpoint, {endpoint}", number, "url")
    if not isinstance(body, dict):
        raise LineError("invalid_body", "body must be a JSON object", number, "body")
    return Line(number, custom_id, body, len(data))
