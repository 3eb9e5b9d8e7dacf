"""`/v1/batches`: many requests in one file, answered in another, in what online work leaves free.

Source of the form: OpenAI's API reference, "Batch". A job belongs to the key that made it; to every other it
does not exist. `jaxserve.server.jobs` carries them out.
"""

from __future__ import annotations

import re
import secrets
import time
from typing import Annotated, Any, Literal

import pydantic
from starlette.requests import Request as HttpRequest
from starlette.responses import Response
from starlette.routing import Route

from jaxserve.server.api.files import LEAST_KEPT, MOST_KEPT, list_body, parse_query
from jaxserve.server.auth import tenant_of
from jaxserve.server.body import parse_object, read_body, validate
from jaxserve.server.context import context_of
from jaxserve.server.errors import ApiError, bad_request, json_response
from jaxserve.server.jobs.answer import ENDPOINTS
from jaxserve.server.jobs.store import ENDED, Batch, Store

WINDOWS = {"24h": 86400}  # seconds
MAX_OPEN = 100  # jobs of one key that have not ended
MAX_BODY_BYTES = 64 * 2**10
TIMES = (
    *("in_progress_at", "expires_at", "finalizing_at", "completed_at", "failed_at"),
    *("expired_at", "cancelling_at", "cancelled_at"),
)


def batch_routes() -> list[Route]:
    return [
        Route("/v1/batches", create_batch, methods=["POST"]),
        Route("/v1/batches", list_batches, methods=["GET"]),
        Route("/v1/batches/{batch_id}", get_batch, methods=["GET"]),
        Route("/v1/batches/{batch_id}/cancel", cancel_batch, methods=["POST"]),
    ]


# --- model ---------------------------------------------------------------------------------------------


class ExpiresAfter(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(strict=True, extra="forbid")

    anchor: Literal["created_at"]
    seconds: Annotated[int, pydantic.Field(ge=LEAST_KEPT, le=MOST_KEPT)]


MetadataKey = Annotated[str, pydantic.Field(max_length=64)]
MetadataValue = Annotated[str, pydantic.Field(max_length=512)]


class BatchRequest(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(strict=True, extra="forbid")

    input_file_id: str
    endpoint: str
    completion_window: str
    metadata: Annotated[dict[MetadataKey, MetadataValue], pydantic.Field(max_length=16)] | None = None
    output_expires_after: ExpiresAfter | None = None


class BatchesQuery(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="forbid")

    limit: int = pydantic.Field(20, ge=1, le=100)
    after: str | None = None


# --- routes --------------------------------------------------------------------------------------------


async def create_batch(http: HttpRequest) -> Response:
    context, tenant = context_of(http), tenant_of(http)
    context.holder.ready()  # its model is what the job will ask for
    data = await read_body(http.scope, http.receive, MAX_BODY_BYTES)
    fields = validate(BatchRequest, parse_object(data))
    if fields.endpoint not in ENDPOINTS:
        raise bad_request(
            f"endpoint={fields.endpoint[:64]!r} must be one of {', '.join(ENDPOINTS)}",
            param="endpoint",
            code="invalid_value",
        )
    if fields.completion_window not in WINDOWS:
        raise bad_request(
            f"completion_window={fields.completion_window[:64]!r} must be {', '.join(WINDOWS)}",
            param="completion_window",
            code="invalid_value",
        )
    now = int(time.time())
    body: dict[str, Any] = {
        "endpoint": fields.endpoint,
        "completion_window": fields.completion_window,
        "expires_at": now + WINDOWS[fields.completion_window],
        "metadata": fields.metadata,
    }
    if fields.output_expires_after is not None:
        body["output_expires_after"] = fields.output_expires_after.seconds
    batch = Batch(
        id=f"batch_{secrets.token_hex(16)}",
        tenant=tenant,
        model=context.holder.model_name,
        status="validating",
        input_file_id=fields.input_file_id,
        created_at=now,
        completed=0,
        failed=0,
        body=body,
    )

    def add(store: Store) -> None:
        """Raises ApiError, or the file is held by the job: nothing comes between on this thread."""
        known = re.fullmatch(r"file-[0-9a-f]{32}", fields.input_file_id)
        file = store.file(tenant, fields.input_file_id, now) if known else None
        if file is None:
            text = f"input_file_id: no such file: {fields.input_file_id[:64]!r}"
            raise bad_request(text, param="input_file_id", code="invalid_value")
        if file.purpose != "batch":
            text = f"input_file_id: the file's purpose is {file.purpose}, not batch"
            raise bad_request(text, param="input_file_id", code="invalid_value")
        if store.count_open(tenant) >= MAX_OPEN:
            raise ApiError(
                429,
                f"{MAX_OPEN} batches have not ended yet: wait for one of them, or cancel it",
                type="requests",
                code="too_many_batches",
                headers={"Retry-After": "60", "x-should-retry": "false"},
            )
        store.add_batch(batch)

    await context.desk.run(add)
    context.desk.runner.wake()
    return json_response(batch_body(batch))


async def list_batches(http: HttpRequest) -> Response:
    tenant, query = tenant_of(http), parse_query(http, BatchesQuery)
    desk = context_of(http).desk
    found: list[Batch] | None = None if query.after else []
    if desk.exists:
        found = await desk.run(lambda store: store.batches(tenant, limit=query.limit + 1, after=query.after))
    if found is None:
        raise bad_request("after: there is no such batch", param="after", code="invalid_value")
    return json_response(list_body(list(map(batch_body, found[: query.limit])), len(found) > query.limit))


async def get_batch(http: HttpRequest) -> Response:
    return json_response(batch_body(await find(http)))


async def cancel_batch(http: HttpRequest) -> Response:
    """The job stops; what it has so far it keeps. Cancelling what is being cancelled changes nothing."""
    batch, desk = await find(http), context_of(http).desk

    def cancel(store: Store) -> Batch | None:
        now = int(time.time())
        store.change(batch.id, "cancelling", only_from=["validating", "in_progress"], cancelling_at=now)
        return store.batch(batch.id)

    current = await desk.run(cancel)
    if current is None or (current.status in ENDED and current.status != "cancelled"):
        status = "gone" if current is None else current.status
        raise ApiError(
            409,
            f"{batch.id} is {status}, and cannot be cancelled",
            code="batch_ended",
            headers={"x-should-retry": "false"},
        )
    desk.runner.cancel(batch.id)
    return json_response(batch_body(current))


async def find(http: HttpRequest) -> Batch:
    """The job of this key that the path names. Raises ApiError 404."""
    batch_id, tenant, desk = http.path_params["batch_id"], tenant_of(http), context_of(http).desk
    batch = None
    if desk.exists and re.fullmatch(r"batch_[0-9a-f]{32}", batch_id):
        batch = await desk.run(lambda store: store.batch(batch_id, tenant))
    if batch is None:
        raise ApiError(404, f"no such batch: {batch_id[:64]!r}", param="batch_id", code="not_found")
    return batch


def batch_body(batch: Batch) -> dict[str, Any]:
    body = batch.body
    errors = body.get("errors")
    return {
        "id": batch.id,
        "object": "batch",
        "endpoint": body["endpoint"],
        "model": batch.model,
        "errors": None if errors is None else {"object": "list", "data": errors},
        "input_file_id": batch.input_file_id,
        "completion_window": body["completion_window"],
        "status": batch.status,
        "output_file_id": body.get("output_file_id"),
        "error_file_id": body.get("error_file_id"),
        "created_at": batch.created_at,
        **{name: body.get(name) for name in TIMES},
        "request_counts": {"total": batch.total, "completed": batch.completed, "failed": batch.failed},
        "metadata": body.get("metadata"),
    }
