"""One line of a batch job: from its body to what its output file says of it.

The same `prepare` that the endpoint's route uses, so a line is answered as a request would be; but nothing in
the reply comes from the clock, from chance, or from what else the server was doing.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import dataclasses
import functools
import hashlib
import logging
import uuid
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Mapping, Sequence
from typing import Any

import orjson

from jaxserve.config import ServerOptions
from jaxserve.engine.outputs import Output
from jaxserve.protocols import EngineLike
from jaxserve.scheduler.types import Request, Tier
from jaxserve.server.api import chat, completions, embeddings, responses, results
from jaxserve.server.api.fields import Caller
from jaxserve.server.api.job import Job, Prepare
from jaxserve.server.body import MAX_DEPTH, is_deep
from jaxserve.server.bridge import Bridge
from jaxserve.server.errors import ApiError, bad_request, error_body
from jaxserve.server.jobs.lines import Line
from jaxserve.server.jobs.store import Batch, Result

log = logging.getLogger(__name__)

Answers = Sequence[results.Answer]
# from what submits and collects, to its task once it has submitted
Begin = Callable[[Callable[[], Coroutine[Any, Any, Answers]]], Awaitable[asyncio.Task[Answers]]]
LEAST_PART = 8  # sequences of one line that are submitted at once, also with fewer slots
# its own: requests that wait for a thread are not to wait behind a job's lines
_threads = concurrent.futures.ThreadPoolExecutor(2, "jaxserve-lines")

ENDPOINTS: Mapping[str, Prepare[Job]] = {
    "/v1/chat/completions": chat.prepare,
    "/v1/completions": completions.prepare,
    "/v1/embeddings": embeddings.prepare,
    "/v1/responses": responses.prepare,
}


async def answer_line(
    bridge: Bridge,
    options: ServerOptions,
    engine: EngineLike,
    batch: Batch,
    line: Line,
    begin: Begin,
    *,
    failure: ApiError | None = None,
) -> Result:
    """What becomes of the line. begin: submits it when it is its turn. failure: its answer, without a run.

    Raises ApiError where that is not the line's fault: the engine is busy (429), died or is stopping (5xx).
    """
    caller = Caller(
        batch.tenant,
        "flex",
        options.tool_parser,
        options.reasoning_parser,
        origin=_origin(batch, line),
        created=batch.created_at,
    )
    try:
        if failure is not None:
            raise failure
        body = await _reply(bridge, engine, batch.body["endpoint"], line, caller, begin)
        return await _beside(lambda: _result(batch, line, caller, 200, body))
    except ApiError as error:
        if failure is None and (error.status == 429 or error.status >= 500):
            raise
        fault = error
    except Exception:
        log.exception("batch %s line %d could not be answered", batch.id, line.number)
        fault = ApiError(500, "an internal error", type="server_error", code="internal_error")
    return _result(batch, line, caller, fault.status, error_body(fault))


async def _beside[T](work: Callable[[], T]) -> T:
    return await asyncio.get_running_loop().run_in_executor(_threads, work)


def unanswered(batch: Batch, line: Line, code: str, message: str) -> bytes:
    """The error file's line for one that was not run, or not to its end."""
    content = {
        "id": Caller(origin=_origin(batch, line)).new_id("batch_req_"),
        "custom_id": line.custom_id,
        "response": None,
        "error": {"code": code, "message": message},
    }
    return orjson.dumps(content)


def _origin(batch: Batch, line: Line) -> bytes:
    return hashlib.blake2b(f"{batch.id} {line.number}".encode(), digest_size=32).digest()


def _result(batch: Batch, line: Line, caller: Caller, status: int, body: dict[str, Any]) -> Result:
    content = {
        "id": caller.new_id("batch_req_"),
        "custom_id": line.custom_id,
        "response": {"status_code": status, "request_id": caller.new_id("req_"), "body": body},
        "error": None,
    }
    return Result(batch.id, line.number, status != 200, orjson.dumps(content))


async def _reply(
    bridge: Bridge, engine: EngineLike, endpoint: str, line: Line, caller: Caller, begin: Begin
) -> dict[str, Any]:
    def prepare() -> tuple[Job, list[Request]]:
        body = _for_batch(line.body)
        job = ENDPOINTS[endpoint](body, engine, bridge.holder.check_model, caller)
        return job, [_fixed(request, number, caller) for number, request in enumerate(job.requests)]

    job, requests = await _beside(prepare)
    answers: list[results.Answer] = []
    for part in _parts(requests, max(LEAST_PART, engine.stats()["slots"])):
        usage = _PartUsage(job.usage, len(answers))
        collecting = await begin(functools.partial(_collect, bridge, engine, part, usage))
        try:
            answers += await collecting
        finally:
            collecting.cancel()
    return _settled(await _beside(lambda: job.answer(answers)))


async def _collect(
    bridge: Bridge, engine: EngineLike, requests: list[Request], usage: results.Usage
) -> Answers:
    return await results.collect(bridge.open(engine, requests), requests, usage)


def _parts(requests: list[Request], most: int) -> Iterator[list[Request]]:
    """The requests in parts of at most so many sequences, which are submitted one after the other: a line of
    2,048 prompts is not to be the engine's whole queue. One request is never divided."""
    part: list[Request] = []
    for request in requests:
        if part and sum(one.params.sequences for one in part) + request.params.sequences > most:
            yield part
            part = []
        part.append(request)
    if part:
        yield part


class _PartUsage(results.Usage):
    """Adds to the usage of all, of which this part begins at prompt `start`."""

    def __init__(self, whole: results.Usage, start: int) -> None:
        self._whole = whole
        self._start = start

    def add(self, prompt: int, output: Output) -> None:
        self._whole.add(self._start + prompt, output)


def _for_batch(body: Mapping[str, Any]) -> dict[str, Any]:
    """The body without nulls, as over HTTP. Raises ApiError for what makes no sense here."""
    if is_deep(body):
        raise bad_request(f"the body nests more than {MAX_DEPTH} levels", code="invalid_json")
    fields = {name: value for name, value in body.items() if value is not None}
    if fields.get("stream"):
        raise bad_request("stream is not available in a batch", param="stream")
    if fields.get("background"):
        raise bad_request("background is not available in a batch", param="background")
    if "timeout" in fields:
        raise bad_request("timeout is not available in a batch: it has a completion_window", param="timeout")
    if fields.pop("service_tier", "auto") not in ("auto", "flex"):
        raise bad_request("service_tier: the requests of a batch run as flex", param="service_tier")
    return fields


def _fixed(request: Request, number: int, caller: Caller) -> Request:
    """As batch work, with a seed of its own where it brings none. The engine's id is new each time: an
    earlier run of the same line may still be on its way out."""
    params = request.params
    if params.seed is None:
        digest = hashlib.blake2b(b"%d" % number, key=caller.origin, digest_size=8).digest()
        params = dataclasses.replace(params, seed=int.from_bytes(digest) >> 1)
    return dataclasses.replace(
        request, params=params, tier=Tier.BATCH, request_id=f"batch-{uuid.uuid4().hex}"
    )


def _settled(body: dict[str, Any]) -> dict[str, Any]:
    """Without what caches had of it: that is another number when the line runs again."""
    usage = body.get("usage")
    if isinstance(usage, dict):
        usage.pop("response_cached", None)
        for name in ("prompt_tokens_details", "input_tokens_details"):
            if name in usage:
                usage[name] = {**usage[name], "cached_tokens": 0}
    return body
