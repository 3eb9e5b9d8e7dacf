"""A file that comes as `multipart/form-data` (RFC 7578), written to the disk as it comes.

In memory there is never more than one piece of the file, and the other fields, which are short. Everything
that can be counted has a bound: fields, their bytes, a part's headers, the file's bytes; and a client may be
slow, but not without end.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header
from starlette.datastructures import Headers
from starlette.types import Receive, Scope

from jaxserve.server.errors import ApiError, bad_request
from jaxserve.server.jobs.folder import flush, storage_errors
from jaxserve.server.stream import ClientLeft

PIECE_BYTES = 2**20  # of the file, that are written at once
MAX_FIELDS = 16
MAX_FIELD_BYTES = 4096
MAX_PART_HEADERS = 4096  # bytes
ENVELOPE_BYTES = MAX_FIELDS * (MAX_FIELD_BYTES + MAX_PART_HEADERS)  # at most, of a body beside the file
MAX_FILENAME = 255  # characters
START_SECONDS = 60.0  # to send anything, and on top of what the least rate makes of what came
LEAST_RATE = 64 * 2**10  # bytes per second
DISCARD_SECONDS = 10.0


class Upload:
    """fields: the short ones, by name. filename: of the file. size: its bytes so far."""

    def __init__(self, path: Path, file: BinaryIO, boundary: bytes, max_bytes: int) -> None:
        self.path = path
        self.fields: dict[str, str] = {}
        self.filename: str | None = None
        self.size = 0
        self._file = file
        self._max_bytes = max_bytes
        self._piece = bytearray()
        self._in_file = False
        self._name = ""
        self._value = bytearray()
        self._header_name, self._header_value = bytearray(), bytearray()
        self._headers: dict[bytes, bytes] = {}
        self._header_bytes = 0
        self.whole = False  # the last boundary has come
        self._parser = MultipartParser(
            boundary,
            {
                "on_part_begin": self._begin_part,
                "on_header_field": self._take_header_name,
                "on_header_value": self._take_header_value,
                "on_header_end": self._end_header,
                "on_headers_finished": self._begin_content,
                "on_part_data": self._take_content,
                "on_part_end": self._end_part,
                "on_end": self._end,
            },
        )

    async def take(self, data: bytes) -> None:
        """Raises ApiError for what cannot be, StorageError where the disk does not take it."""
        try:
            self._parser.write(data)
        except FormParserError as error:
            raise bad_request(f"the body is not valid multipart/form-data: {error}") from None
        if len(self._piece) >= PIECE_BYTES:
            await self._write()

    async def close(self) -> None:
        """The file is on the disk when this returns. Raises as `take` does."""
        if not self.whole:
            raise bad_request("the body ends before its last boundary")
        if self.filename is None:
            raise bad_request("file is required", param="file", code="missing_required_parameter")
        await self._write()
        await asyncio.to_thread(_finish, self._file)

    async def _write(self) -> None:
        piece, self._piece = self._piece, bytearray()
        await asyncio.to_thread(_write, self._file, piece)

    # --- called by the parser ---

    def _begin_part(self) -> None:
        self._headers, self._header_bytes = {}, 0

    def _take_header_name(self, data: bytes, start: int, end: int) -> None:
        self._header_name += data[start:end]
        self._count_header(end - start)

    def _take_header_value(self, data: bytes, start: int, end: int) -> None:
        self._header_value += data[start:end]
        self._count_header(end - start)

    def _count_header(self, count: int) -> None:
        self._header_bytes += count
        if self._header_bytes > MAX_PART_HEADERS:
            raise bad_request(f"a part's headers are larger than {MAX_PART_HEADERS} bytes")

    def _end_header(self) -> None:
        self._headers[bytes(self._header_name).lower()] = bytes(self._header_value)
        self._header_name.clear()
        self._header_value.clear()

    def _begin_content(self) -> None:
        kind, options = parse_options_header(self._headers.get(b"content-disposition", b""))
        name = options.get(b"name", b"").decode("utf-8", "replace")
        if kind != b"form-data" or not name:
            raise bad_request("a part has no name: Content-Disposition must be form-data with a name")
        self._in_file = name == "file"
        if self._in_file:
            if self.filename is not None:
                raise bad_request("there may be one file only", param="file")
            self.filename = _plain_name(options.get(b"filename", b""))
            return
        if name in self.fields:
            raise bad_request(f"{name[:64]} is given twice", param=name[:64])
        if len(self.fields) == MAX_FIELDS:
            raise bad_request(f"the body has more than {MAX_FIELDS} fields")
        self._name = name
        self._value.clear()

    def _take_content(self, data: bytes, start: int, end: int) -> None:
        if not self._in_file:
            self._value += data[start:end]
            if len(self._value) > MAX_FIELD_BYTES:
                name = self._name[:64]
                raise bad_request(f"{name} is longer than {MAX_FIELD_BYTES} bytes", param=name)
            return
        self.size += end - start
        if self.size > self._max_bytes:
            raise file_too_large(self._max_bytes)
        self._piece += data[start:end]

    def _end_part(self) -> None:
        if not self._in_file:
            try:
                self.fields[self._name] = self._value.decode()
            except UnicodeDecodeError:
                raise bad_request(f"{self._name[:64]} is not UTF-8", param=self._name[:64]) from None

    def _end(self) -> None:
        self.whole = True


async def receive_upload(
    scope: Scope, receive: Receive, path: Path, max_bytes: int, counted: Callable[[int], None]
) -> Upload:
    """The upload, whole and on the disk at `path`. counted: called with each number of bytes that came.

    Raises ApiError, StorageError or ClientLeft; `path` is then for the caller to remove.
    """
    headers = Headers(scope=scope)
    kind, options = parse_options_header(headers.get("content-type", ""))
    boundary = options.get(b"boundary", b"")
    if kind != b"multipart/form-data" or not re.fullmatch(rb"[ -~]{1,70}", boundary):
        raise bad_request("the body must be multipart/form-data with a boundary")
    declared = headers.get("content-length", "")
    if declared.isdecimal() and int(declared) > max_bytes + ENVELOPE_BYTES:
        await _Body(receive).discard(max_bytes)
        raise file_too_large(max_bytes)
    with storage_errors():
        file = await asyncio.to_thread(open, path, "xb", 0)
    body = _Body(receive)
    try:
        return await _receive(body, path, file, boundary, max_bytes, counted)
    except ApiError as error:
        if error.status != 408:
            await body.discard(max_bytes)
        raise
    finally:
        file.close()


async def _receive(
    body: _Body,
    path: Path,
    file: BinaryIO,
    boundary: bytes,
    max_bytes: int,
    counted: Callable[[int], None],
) -> Upload:
    upload = Upload(path, file, boundary, max_bytes)
    begun, total = time.monotonic(), 0
    while body.more:
        deadline = _deadline(begun, total)
        try:
            async with asyncio.timeout_at(deadline):
                data = await body.read()
            if asyncio.get_running_loop().time() > deadline:
                raise TimeoutError  # no timer interrupts what does not have to wait
        except TimeoutError:
            raise ApiError(
                408,
                f"the file comes more slowly than {LEAST_RATE} bytes per second",
                code="request_timeout",
                headers={"Connection": "close"},
            ) from None
        total += len(data)
        counted(len(data))
        if total > max_bytes + ENVELOPE_BYTES:
            raise file_too_large(max_bytes)
        await upload.take(data)
    await upload.close()
    return upload


class _Body:
    """What still comes. more: whether anything does."""

    def __init__(self, receive: Receive) -> None:
        self.more = True
        self._receive = receive

    async def read(self) -> bytes:
        message = await self._receive()
        if message["type"] == "http.disconnect":
            raise ClientLeft
        self.more = message.get("more_body", False)
        data: bytes = message.get("body", b"")
        return data

    async def discard(self, most: int) -> None:
        """Reads on for a while: a client that is still sending would not see the answer."""
        with contextlib.suppress(TimeoutError, ClientLeft):
            async with asyncio.timeout(DISCARD_SECONDS):
                while self.more and most > 0:
                    most -= len(await self.read())


def file_too_large(limit: int) -> ApiError:
    return ApiError(
        413,
        f"the file is larger than {limit} bytes",
        param="file",
        code="file_too_large",
        headers={"Connection": "close"},
    )


def _deadline(begun: float, received: int) -> float:
    """On the event loop's clock."""
    passed = time.monotonic() - begun
    return asyncio.get_running_loop().time() - passed + START_SECONDS + received / LEAST_RATE


def _plain_name(given: bytes) -> str:
    """A file's name without folders; it is shown, and never becomes a path."""
    name = re.split(r"[/\\]", given.decode("utf-8", "replace"))[-1]
    return "".join(one for one in name if one.isprintable())[:MAX_FILENAME] or "file"


def _write(file: BinaryIO, piece: bytearray) -> None:
    with storage_errors():
        view = memoryview(piece)
        while view:  # an unbuffered file may take a part
            view = view[file.write(view) :]


def _finish(file: BinaryIO) -> None:
    with storage_errors():
        flush(file)
