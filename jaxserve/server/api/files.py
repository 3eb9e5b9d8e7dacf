"""`/v1/files`: what batch jobs read and write.

Source of the form: OpenAI's API reference, "Files". A file belongs to the key that brought it; to every other
it does not exist. Purposes that nothing here would use are refused.
"""

from __future__ import annotations

import asyncio
import re
import secrets
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO, Literal
from urllib.parse import quote

import pydantic
from starlette.requests import Request as HttpRequest
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from jaxserve.server.auth import tenant_of
from jaxserve.server.body import validate
from jaxserve.server.context import context_of
from jaxserve.server.errors import ApiError, bad_request, json_response
from jaxserve.server.jobs.desk import storage_failed
from jaxserve.server.jobs.folder import StorageError, storage_errors
from jaxserve.server.jobs.store import KEEP_SECONDS, Bounds, File, OverBound, Store
from jaxserve.server.upload import receive_upload

BATCH_SECONDS = KEEP_SECONDS  # how long files for batches are kept, unless the upload says otherwise
LEAST_KEPT, MOST_KEPT = 3600, 30 * 86400  # seconds, of `expires_after`
PIECE_BYTES = 2**18  # of a file, that are read and sent at once
PURPOSES = ("batch", "user_data")


def file_routes() -> list[Route]:
    return [
        Route("/v1/files", create_file, methods=["POST"]),
        Route("/v1/files", list_files, methods=["GET"]),
        Route("/v1/files/{file_id}", get_file, methods=["GET"]),
        Route("/v1/files/{file_id}", delete_file, methods=["DELETE"]),
        Route("/v1/files/{file_id}/content", get_content, methods=["GET"]),
    ]


# --- model ---------------------------------------------------------------------------------------------


class Fields(pydantic.BaseModel):
    """Of the form, beside the file; `expires_after` comes in two, its members' names in brackets."""

    model_config = pydantic.ConfigDict(extra="forbid")

    purpose: str
    anchor: Literal["created_at"] | None = pydantic.Field(None, alias="expires_after[anchor]")
    seconds: int | None = pydantic.Field(None, alias="expires_after[seconds]", ge=LEAST_KEPT, le=MOST_KEPT)

    def expires_at(self, now: int) -> int | None:
        if (self.anchor is None) != (self.seconds is None):
            raise bad_request("expires_after needs both anchor and seconds", param="expires_after")
        if self.seconds is not None:
            return now + self.seconds
        return now + BATCH_SECONDS if self.purpose == "batch" else None


class FilesQuery(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="forbid")

    limit: int = pydantic.Field(10_000, ge=1, le=10_000)
    after: str | None = None
    order: Literal["asc", "desc"] = "desc"
    purpose: str | None = None


# --- routes --------------------------------------------------------------------------------------------


async def create_file(http: HttpRequest) -> Response:
    desk, tenant = context_of(http).desk, tenant_of(http)
    path, count = await desk.run(lambda store: (store.incoming(), store.count_files(tenant)))
    if count >= desk.bounds.files:
        raise over_bound(OverBound("files"), desk.bounds)
    reserved = 0

    def counted(size: int) -> None:
        nonlocal reserved
        reserved += size
        desk.uploading[tenant] += size
        desk.check_room(tenant)

    try:
        upload = await receive_upload(http.scope, http.receive, path, desk.max_file_bytes, counted)
        fields = validate_form(upload.fields)
        now = int(time.time())
        file = File(
            id=f"file-{secrets.token_hex(16)}",
            filename=upload.filename or "",
            purpose=fields.purpose,
            bytes=upload.size,
            created_at=now,
            expires_at=fields.expires_at(now),
        )
        await desk.run(lambda store: store.add_file(tenant, file, path, desk.bounds))
    except OverBound as error:
        raise over_bound(error, desk.bounds) from None
    except StorageError as error:
        raise storage_failed(error) from None
    finally:
        desk.uploading[tenant] -= reserved
        if not desk.uploading[tenant]:
            del desk.uploading[tenant]
        await asyncio.to_thread(path.unlink, missing_ok=True)
    return json_response(file_body(file))


def validate_form(given: Mapping[str, str]) -> Fields:
    """Raises ApiError naming the field."""
    names = {field.alias or name for name, field in Fields.model_fields.items()}
    unknown = next((name for name in given if name not in names), None)
    if unknown is not None:
        raise bad_request(f"unknown field: {unknown[:64]!r}", param=unknown[:64], code="unknown_parameter")
    try:
        fields = Fields.model_validate(given)
    except pydantic.ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        param = str(first["loc"][0])
        code = "missing_required_parameter" if first["type"] == "missing" else "invalid_value"
        raise bad_request(f"{param}: {first['msg']}", param=param, code=code) from None
    if fields.purpose not in PURPOSES:
        text = f"purpose={fields.purpose[:64]!r} is not supported; there are {', '.join(PURPOSES)}"
        raise bad_request(text, param="purpose", code="invalid_value")
    return fields


async def list_files(http: HttpRequest) -> Response:
    tenant, query = tenant_of(http), parse_query(http, FilesQuery)
    now = int(time.time())

    def look(store: Store) -> list[File] | None:
        return store.files(
            tenant,
            now,
            limit=query.limit + 1,
            after=query.after,
            newest_first=query.order == "desc",
            purpose=query.purpose,
        )

    desk = context_of(http).desk
    found = await desk.run(look) if desk.exists else None if query.after else []
    if found is None:
        raise bad_request("after: there is no such file", param="after", code="invalid_value")
    bodies = await asyncio.to_thread(lambda: [file_body(file) for file in found[: query.limit]])
    return json_response(list_body(bodies, len(found) > query.limit))


async def get_file(http: HttpRequest) -> Response:
    return json_response(file_body(await find(http)))


async def delete_file(http: HttpRequest) -> Response:
    file = await find(http)

    def work(store: Store) -> str | None:
        job = store.job_that_reads(file.id)
        if job is None:
            store.delete_file(file.id)
        return job

    job = await context_of(http).desk.run(work)
    if job is not None:
        raise ApiError(
            409,
            f"{file.id} is being read by {job}: cancel it, or wait until it has ended",
            code="file_in_use",
            headers={"x-should-retry": "false"},
        )
    return json_response({"id": file.id, "object": "file", "deleted": True})


async def get_content(http: HttpRequest) -> ASGIApp:
    file = await find(http)
    path = await context_of(http).desk.run(lambda store: store.path(file.id))
    try:
        opened = await asyncio.to_thread(_open, path)
    except StorageError:  # deleted meanwhile
        raise not_found(file.id) from None
    return Content(file, opened)


# --- answers -------------------------------------------------------------------------------------------


class Content:
    """A file as a response, a piece at a time; whole also if the file is deleted under it."""

    def __init__(self, file: File, opened: BinaryIO) -> None:
        self._file = file
        self._opened = opened

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        name = quote(self._file.filename, safe="")
        headers = [
            (b"content-type", b"application/octet-stream"),
            (b"content-length", str(self._file.bytes).encode()),
            (b"content-disposition", f"attachment; filename*=UTF-8''{name}".encode("ascii")),
            (b"x-content-type-options", b"nosniff"),
        ]
        with self._opened:
            await send({"type": "http.response.start", "status": 200, "headers": headers})
            while scope["method"] != "HEAD" and (
                data := await asyncio.to_thread(self._opened.read, PIECE_BYTES)
            ):
                await send({"type": "http.response.body", "body": data, "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})


async def find(http: HttpRequest) -> File:
    """The file of this key that the path names. Raises ApiError 404."""
    file_id, tenant, now = http.path_params["file_id"], tenant_of(http), int(time.time())
    desk = context_of(http).desk
    if not desk.exists or not re.fullmatch(r"file-[0-9a-f]{32}", file_id):
        raise not_found(file_id)
    file = await desk.run(lambda store: store.file(tenant, file_id, now))
    if file is None:
        raise not_found(file_id)
    return file


def over_bound(error: OverBound, bounds: Bounds) -> ApiError:
    """403 for a number, 507 for bytes; neither is worth repeating at once."""
    headers = {"x-should-retry": "false"}
    if error.bound == "files":
        text = f"there are {bounds.files} files already: delete some"
        return ApiError(403, text, code="too_many_files", headers=headers)
    text = f"all files and results together may have {bounds.of_all} bytes: delete some (--max-storage)"
    if error.bound == "of_key":
        text = f"the files and results of one key may have {bounds.of_key} bytes: delete some (--max-storage)"
    return ApiError(507, text, type="server_error", code="storage_full", headers=headers)


def not_found(file_id: str) -> ApiError:
    return ApiError(404, f"no such file: {file_id[:64]!r}", param="file_id", code="not_found")


def file_body(file: File) -> dict[str, Any]:
    body = {
        "id": file.id,
        "object": "file",
        "bytes": file.bytes,
        "created_at": file.created_at,
        "filename": file.filename,
        "purpose": file.purpose,
        "status": "processed",
    }
    return body if file.expires_at is None else {**body, "expires_at": file.expires_at}


def list_body(data: list[dict[str, Any]], more: bool) -> dict[str, Any]:
    return {
        "object": "list",
        "data": data,
        "first_id": data[0]["id"] if data else None,
        "last_id": data[-1]["id"] if data else None,
        "has_more": more,
    }


def parse_query[M: pydantic.BaseModel](http: HttpRequest, model: type[M]) -> M:
    """The query string's fields. Raises ApiError 400 naming the first at fault."""
    given = http.query_params.multi_items()
    names = [name for name, _ in given]
    twice = next((name for name in names if names.count(name) > 1), None) if len(names) <= 64 else names[0]
    if twice is not None:
        raise bad_request(f"{twice[:64]!r} is given more than once", param=twice[:64], code="invalid_value")
    return validate(model, dict(given))


def _open(path: Path) -> BinaryIO:
    with storage_errors():
        return open(path, "rb")
