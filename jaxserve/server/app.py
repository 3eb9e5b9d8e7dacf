"""The Starlette application: routes, error answers, and the key check around all of them.

The engine comes later than the application (the port is bound before the model is loaded): routes ask the
holder for it. `run.py` serves the application.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Collection, Iterable
from typing import Any

from starlette.applications import Starlette
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from jaxserve.config import ServerOptions
from jaxserve.server.api.batches import batch_routes
from jaxserve.server.api.chat import create_chat_completion
from jaxserve.server.api.completions import create_completion
from jaxserve.server.api.embeddings import create_embeddings
from jaxserve.server.api.files import file_routes
from jaxserve.server.api.health import health, metrics, ready
from jaxserve.server.api.messages import count_tokens, create_message
from jaxserve.server.api.models import get_model, list_models
from jaxserve.server.api.page import page_routes
from jaxserve.server.api.responses import create_response
from jaxserve.server.api.state import state
from jaxserve.server.api.tokenize import detokenize, tokenize, tokenizer_info
from jaxserve.server.auth import KeyMiddleware, Keys, fixed_keys, is_open
from jaxserve.server.body import MAX_BODY_BYTES, Arrivals, OneLengthMiddleware
from jaxserve.server.bridge import Bridge
from jaxserve.server.context import Context
from jaxserve.server.errors import ApiError, error_answer, stopping
from jaxserve.server.holder import EngineHolder
from jaxserve.server.jobs.desk import Desk
from jaxserve.server.local import LocalMiddleware, is_loopback
from jaxserve.server.logs import shown
from jaxserve.server.metrics import Metrics
from jaxserve.server.openapi import openapi
from jaxserve.server.record import Record, RecordMiddleware, log_request
from jaxserve.server.stream import ClientLeft

Report = Callable[[Record, Headers], None]
WHILE_STOPPING = frozenset({"/metrics", "/state"})  # what those who watch it still read


def routes() -> list[Route]:
    """All that is served; what is not here is a 404, behind the key check."""
    return [
        Route("/health", health, methods=["GET"]),
        Route("/ready", ready, methods=["GET"]),
        Route("/metrics", metrics, methods=["GET"]),
        Route("/state", state, methods=["GET"]),
        Route("/openapi.json", openapi, methods=["GET"]),
        *page_routes(),
        Route("/v1/models", list_models, methods=["GET"]),
        Route("/v1/models/{model:path}", get_model, methods=["GET"]),
        Route("/v1/completions", create_completion, methods=["POST"]),
        Route("/v1/chat/completions", create_chat_completion, methods=["POST"]),
        Route("/v1/responses", create_response, methods=["POST"]),
        Route("/v1/messages", create_message, methods=["POST"]),
        Route("/v1/messages/count_tokens", count_tokens, methods=["POST"]),
        Route("/v1/embeddings", create_embeddings, methods=["POST"]),
        Route("/tokenize", tokenize, methods=["POST"]),
        Route("/detokenize", detokenize, methods=["POST"]),
        Route("/tokenizer_info", tokenizer_info, methods=["GET"]),
        *file_routes(),
        *batch_routes(),
    ]


class App(Starlette):
    """Starlette with the record of each request around everything, answers to what goes wrong included."""

    reports: list[Report]

    def build_middleware_stack(self) -> ASGIApp:
        route_of: dict[Any, str] = {}
        for route in self.routes:
            if isinstance(route, Route):
                route_of.setdefault(route.endpoint, route.path)
        return RecordMiddleware(super().build_middleware_stack(), route_of, self.reports)


def create_app(
    holder: EngineHolder,
    options: ServerOptions | None = None,
    *,
    keys: Keys | Iterable[str] = (),
    max_body_bytes: int = MAX_BODY_BYTES,
    reports: Iterable[Report] = (),
) -> App:
    """The application over an engine that may not be there yet.

    keys: those that open it; none, all may. reports: called with the record of each request that is over.
    """
    options = ServerOptions() if options is None else options
    keys = keys if isinstance(keys, Keys) else fixed_keys(keys)
    gauges = Metrics(holder)
    bridge = Bridge(holder, gauges)
    desk = Desk(options, bridge)
    gauges.watch_jobs(desk.count_jobs, desk.count_unwritten)
    arrivals = Arrivals()
    context = Context(holder, bridge, gauges, options, desk, max_body_bytes)

    def count(record: Record, headers: Headers) -> None:
        gauges.http(record.route, record.status, record.ended - record.started)

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        watching = asyncio.create_task(bridge.watch())
        await desk.start()
        yield
        await desk.stop()
        watching.cancel()

    middleware = [
        Middleware(OneLengthMiddleware),
        Middleware(KeyMiddleware, keys=keys),
        Middleware(StoppingMiddleware, holder=holder, arrivals=arrivals),
    ]
    if options.cors_origins:
        middleware.insert(1, Middleware(CrossOriginMiddleware, origins=options.cors_origins))
    if is_loopback(options.host):
        middleware.insert(1, Middleware(LocalMiddleware, keys=keys, origins=options.cors_origins))
    app = App(
        routes=routes(),
        middleware=middleware,
        exception_handlers={
            ApiError: _api_error,
            HTTPException: _http_error,
            ClientLeft: _client_left,
            Exception: _internal_error,
        },
        lifespan=lifespan,
    )
    app.reports = [count, log_request, *reports]
    app.router.redirect_slashes = False  # a path is what it is: no redirects that carry a key elsewhere
    app.state.context = context
    app.state.arrivals = arrivals
    return app


def create_metrics_app(context: Context) -> App:
    """What whoever watches the server reads, on a port of its own and without a key."""
    app = App(
        routes=[
            Route("/metrics", metrics, methods=["GET"]),
            Route("/health", health, methods=["GET"]),
            Route("/ready", ready, methods=["GET"]),
        ],
        exception_handlers={ApiError: _api_error, HTTPException: _http_error, Exception: _internal_error},
    )
    app.reports = []
    app.router.redirect_slashes = False
    app.state.context = context
    return app


class CrossOriginMiddleware(CORSMiddleware):
    """CORS for the origins that are allowed; others are treated as if there were none."""

    def __init__(self, app: ASGIApp, origins: Collection[str]) -> None:
        super().__init__(
            app,
            allow_origins=origins,
            allow_methods=("GET", "POST", "DELETE"),
            allow_headers=("*",),
            expose_headers=("x-request-id", "retry-after"),
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and self.is_allowed_origin(Headers(scope=scope).get("origin", "")):
            await super().__call__(scope, receive, send)
        else:
            await self.app(scope, receive, send)


class StoppingMiddleware:
    """Once the server is told to stop, what was begun may end, and the rest hears why it is not begun."""

    def __init__(self, app: ASGIApp, holder: EngineHolder, arrivals: Arrivals) -> None:
        self.app = app
        self._holder = holder
        self._arrivals = arrivals

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self._holder.stopping and not is_open(scope) and scope["path"] not in WHILE_STOPPING:
            await error_answer(scope, stopping())(scope, receive, send)
        elif scope["type"] == "http":
            await self.app(scope, self._arrivals.watched(receive), send)
        else:
            await self.app(scope, receive, send)


async def _api_error(http: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return error_answer(http.scope, error)


async def _http_error(http: Request, error: Exception) -> Response:
    """Starlette's own: no such route, no such method."""
    assert isinstance(error, HTTPException)
    message = f"{error.detail}: {http.method} {shown(http.scope['path'])}"
    return error_answer(
        http.scope,
        ApiError(
            error.status_code,
            message,
            code="not_found" if error.status_code == 404 else None,
            headers=error.headers,
        ),
    )


async def _client_left(http: Request, error: Exception) -> Response:
    return Response(status_code=499)  # nobody reads it; nginx's number for this


async def _internal_error(http: Request, error: Exception) -> Response:
    internal = ApiError(500, "an internal error", type="server_error", code="internal_error")
    return error_answer(http.scope, internal)
