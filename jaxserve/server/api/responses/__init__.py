"""`/v1/responses`: OpenAI's later API for an assistant's turn. Nothing is kept from one to the next."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from starlette.requests import Request as HttpRequest
from starlette.types import ASGIApp

from jaxserve.protocols import EngineLike
from jaxserve.scheduler.types import RequestError
from jaxserve.server.api import results
from jaxserve.server.api.fields import Caller, take_known
from jaxserve.server.api.job import prepared
from jaxserve.server.api.responses.reply import ResponseJob
from jaxserve.server.api.responses.request import LOGPROBS, NAMES, ResponseRequest
from jaxserve.server.api.turn import Turn
from jaxserve.server.body import read_body, validate
from jaxserve.server.context import context_of
from jaxserve.server.errors import bad_request, from_request_error, json_response
from jaxserve.server.stream import EventStream, named_event, unless_client_leaves

# known to OpenAI, of what this server does not do
UNSUPPORTED = {
    "previous_response_id": "no response is kept: send the items of the conversation as input",
    "conversation": "no conversation is kept: send its items as input",
    "prompt": "there are no prompt templates here",
    "context_management": "the input is taken as it is",
    "moderation": "there is no moderation here",
    "access_programs": "there are none here",
    "image": "only text is served",
    "generate": "there is nothing to prepare",
}


async def create_response(http: HttpRequest) -> ASGIApp:
    context = context_of(http)
    engine = context.holder.ready()
    data = await read_body(http.scope, http.receive, context.max_body_bytes)
    caller = context.caller(http)
    job = await prepared(data, prepare, engine, context.holder.check_model, caller, always_on_thread=True)
    call = context.bridge.open(engine, job.requests)
    if job.stream:
        return EventStream(
            call,
            job.chunks,
            job.closing,
            opening=job.opening,
            failed=job.failed,
            frame=named_event,
            end=b"",
        )
    answers = await unless_client_leaves(http.receive, results.collect(call, job.requests, job.usage))
    return json_response(job.answer(answers))


def prepare(
    body: Mapping[str, Any], engine: EngineLike, check_model: Callable[[str], None], caller: Caller
) -> ResponseJob:
    """Everything that can be wrong with a request is found here, before it is submitted."""
    for name, reason in UNSUPPORTED.items():
        if body.get(name) is not None:
            raise bad_request(f"{name} is not supported: {reason}", param=name, code="unsupported_parameter")
    fields = validate(ResponseRequest, take_known(body, ResponseRequest))
    check_model(fields.model)
    if fields.top_logprobs and LOGPROBS not in fields.include:
        raise bad_request(f"top_logprobs is only allowed with include: [{LOGPROBS!r}]", param="top_logprobs")
    if fields.stream_options is not None and not fields.stream:
        raise bad_request("stream_options is only allowed with stream: true", param="stream_options")
    try:
        asked = fields.asked()
    except RequestError as error:
        raise from_request_error(error, NAMES) from None
    return ResponseJob(fields, Turn(asked, engine, caller, prefix="resp_"), dict(body), caller.now)
