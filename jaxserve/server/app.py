"""The Starlette application: routes, error answers, and the key check around all of them.

The engine comes later than the application (the port is bound before the model is loaded): routes ask the
holder for it. `run.py` serves the application.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Iterable

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from jaxserve.server.api.chat import create_chat_completion
from jaxserve.server.api.completions import create_completion
from jaxserve.server.api.health import health, metrics, ready
from jaxserve.server.api.models import get_model, list_models
from jaxserve.server.auth import KeyMiddleware
from jaxserve.server.body import MAX_BODY_BYTES, OneLengthMiddleware
from jaxserve.server.bridge import Bridge
from jaxserve.server.context import Context
from jaxserve.server.errors import ApiError, error_response
from jaxserve.server.holder import EngineHolder
from jaxserve.server.metrics import Metrics
from jaxserve.server.stream import ClientLeft

log = logging.getLogger(__name__)


def create_app(
    holder: EngineHolder,
    *,
    keys: Iterable[str] = (),
    max_body_bytes: int = MAX_BODY_BYTES,
    service_tier: str = "default",
) -> Starlette:
    """The application over an engine that may not be there yet.

    keys: those that open it; none, all may. service_tier: of requests that name none.
    """
    gauges = Metrics(holder)
    context = Context(holder, Bridge(holder, gauges), gauges, max_body_bytes, service_tier)

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        watching = asyncio.create_task(context.bridge.watch())
        yield
        watching.cancel()

    app = Starlette(
        routes=[
            Route("/health", health, methods=["GET"]),
            Route("/ready", ready, methods=["GET"]),
            Route("/metrics", metrics, methods=["GET"]),
            Route("/v1/models", list_models, methods=["GET"]),
            Route("/v1/models/{model:path}", get_model, methods=["GET"]),
            Route("/v1/completions", create_completion, methods=["POST"]),
            Route("/v1/chat/completions", create_chat_completion, methods=["POST"]),
        ],
        middleware=[Middleware(OneLengthMiddleware), Middleware(KeyMiddleware, keys=tuple(keys))],
        exception_handlers={
            ApiError: _api_error,
            HTTPException: _http_error,
            ClientLeft: _client_left,
            Exception: _internal_error,
        },
        lifespan=lifespan,
    )
    app.router.redirect_slashes = False  # a path is what it is: no redirects that carry a key elsewhere
    app.state.context = context
    return app


async def _api_error(http: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return error_response(error)


async def _http_error(http: Request, error: Exception) -> Response:
    """Starlette's own: no such route, no such method."""
    assert isinstance(error, HTTPException)
    message = f"{error.detail}: {http.method} {http.url.path}"
    return error_response(
        ApiError(
            error.status_code,
            message,
            code="not_found" if error.status_code == 404 else None,
            headers=error.headers,
        )
    )


async def _client_left(http: Request, error: Exception) -> Response:
    return Response(status_code=499)  # nobody reads it; nginx's number for this


async def _internal_error(http: Request, error: Exception) -> Response:
    return error_response(ApiError(500, "an internal error", type="server_error", code="internal_error"))
