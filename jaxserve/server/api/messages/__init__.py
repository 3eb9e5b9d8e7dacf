"""`/v1/messages` and `/v1/messages/count_tokens`: Anthropic's API for an assistant's turn.

What goes wrong is answered in Anthropic's form on these paths (`errors.error_answer`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from starlette.requests import Request as HttpRequest
from starlette.responses import Response
from starlette.types import ASGIApp

from jaxserve.protocols import EngineLike
from jaxserve.scheduler.types import RequestError
from jaxserve.server.api import results
from jaxserve.server.api.fields import Caller
from jaxserve.server.api.job import prepared
from jaxserve.server.api.messages.reply import MessageJob
from jaxserve.server.api.messages.request import NAMES, CountRequest, MessagesRequest
from jaxserve.server.api.turn import Turn
from jaxserve.server.api.turn_prompt import MOST_COUNTED, Prompt
from jaxserve.server.body import read_body, validate
from jaxserve.server.context import context_of
from jaxserve.server.errors import bad_request, from_request_error, json_response
from jaxserve.server.stream import EventStream, named_event, unless_client_leaves

# known to Anthropic, of what this server does not do
UNSUPPORTED = frozenset(
    {"container", "context_management", "diagnostics", "fallbacks", "inference_geo", "mcp_servers"}
    | {"user_profile_id", "workspace_id"}
)


async def create_message(http: HttpRequest) -> ASGIApp:
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


async def count_tokens(http: HttpRequest) -> Response:
    context = context_of(http)
    engine = context.holder.ready()
    data = await read_body(http.scope, http.receive, context.max_body_bytes)
    caller = context.caller(http)
    count = await prepared(data, counted, engine, context.holder.check_model, caller, always_on_thread=True)
    return json_response({"input_tokens": count})


def prepare(
    body: Mapping[str, Any], engine: EngineLike, check_model: Callable[[str], None], caller: Caller
) -> MessageJob:
    """Everything that can be wrong with a request is found here, before it is submitted."""
    fields = _fields(MessagesRequest, body, check_model)
    try:
        asked = fields.asked()
    except RequestError as error:
        raise from_request_error(error, NAMES) from None
    return MessageJob(fields, Turn(asked, engine, caller, prefix="msg_"))


def counted(
    body: Mapping[str, Any], engine: EngineLike, check_model: Callable[[str], None], caller: Caller
) -> int:
    """Tokens of the prompt that `prepare` would make of this."""
    fields = _fields(CountRequest, body, check_model)
    names: Mapping[str, str] = NAMES
    try:
        asked = fields.asked()
        names = asked.names
        return len(Prompt(asked, engine.tokenizer, caller, context=MOST_COUNTED).ids)
    except RequestError as error:
        raise from_request_error(error, names) from None


def _fields[M: CountRequest](
    model: type[M], body: Mapping[str, Any], check_model: Callable[[str], None]
) -> M:
    for name in UNSUPPORTED & body.keys():
        raise bad_request(f"{name} is not supported", param=name, code="unsupported_parameter")
    fields = validate(model, body)
    check_model(fields.model)
    return fields
