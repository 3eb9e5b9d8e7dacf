"""What goes wrong over HTTP, as OpenAI's error object; as Anthropic's where their clients ask.

Source of the forms: OpenAI's API reference, "Error codes"; Anthropic's, "Errors". Knows nothing of engines;
the routes raise, the application's exception handlers answer.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import orjson
from starlette.responses import Response
from starlette.types import Scope

from jaxserve.engine.outputs import EngineBusy
from jaxserve.scheduler.types import RequestError

REQUEST_ID = "jaxserve.request_id"  # in the ASGI scope
ANTHROPIC_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    504: "timeout_error",
    529: "overloaded_error",
}


class ApiError(Exception):
    """An answer with an error status. `param` names the field at fault, `code` is for machines."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        type: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.type = type
        self.param = param
        self.code = code
        self.headers = headers


def bad_request(message: str, *, param: str | None = None, code: str | None = None) -> ApiError:
    return ApiError(400, message, param=param, code=code)


def from_request_error(error: RequestError, names: Mapping[str, str] | None = None) -> ApiError:
    """The engine's refusal as a 400. `names`: what the client called the fields that went by another name."""
    param, message = error.param, str(error)
    if param is not None and names and param in names:
        if message.startswith((f"{param}:", f"{param}=")):
            message = names[param] + message[len(param) :]
        param = names[param]
    return bad_request(message, param=param, code=error.code)


def not_ready(message: str, *, code: str, retry_after: int | None = 2) -> ApiError:
    headers = None if retry_after is None else {"Retry-After": str(retry_after)}
    return ApiError(503, message, type="server_error", code=code, headers=headers)


def stopping() -> ApiError:
    return not_ready("the server is stopping", code="stopping", retry_after=None)


def engine_failed(message: str) -> ApiError:
    return ApiError(500, message, type="server_error", code="engine_failed")


def queue_full(error: EngineBusy) -> ApiError:
    """OpenAI's words for it: its clients wait for as long as the header says, and try again."""
    return ApiError(
        429,
        f"the server has more requests than it can queue; try again in {error.retry_after} s",
        type="requests",
        code="rate_limit_exceeded",
        headers={"Retry-After": str(error.retry_after)},
    )


def too_late() -> ApiError:
    """The request's own `timeout` passed. OpenAI's clients repeat a 408 unless they are told not to."""
    return ApiError(
        408,
        "the request's timeout passed before it was answered",
        type="timeout_error",
        param="timeout",
        code="timeout",
        headers={"x-should-retry": "false"},
    )


def error_body(error: ApiError) -> dict[str, Any]:
    return {"error": {"message": error.message, "type": error.type, "param": error.param, "code": error.code}}


def anthropic_error_body(error: ApiError, request_id: str | None = None) -> dict[str, Any]:
    kind = ANTHROPIC_TYPES.get(error.status, "api_error" if error.status >= 500 else "invalid_request_error")
    body = {"type": "error", "error": {"type": kind, "message": error.message}}
    return body if request_id is None else {**body, "request_id": request_id}


def error_response(error: ApiError) -> Response:
    return json_response(error_body(error), status=error.status, headers=error.headers)


def error_answer(scope: Scope, error: ApiError) -> Response:
    """In the form that clients of this path read."""
    path = scope["path"]
    if path == "/v1/messages" or path.startswith("/v1/messages/"):
        body = anthropic_error_body(error, scope.get(REQUEST_ID))
        return json_response(body, status=error.status, headers=error.headers)
    return error_response(error)


def json_response(content: Any, *, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    return Response(orjson.dumps(content), status_code=status, media_type="application/json", headers=headers)
