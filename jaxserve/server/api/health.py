"""`/health` (is the process worth keeping?), `/ready` (should it get requests?) and `/metrics`."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import Response

from jaxserve.server.context import context_of
from jaxserve.server.errors import json_response
from jaxserve.server.metrics import CONTENT_TYPE


async def health(http: Request) -> Response:
    """200 while the process lives, loading included; 503 when the engine is dead, or stuck in a step."""
    context_of(http).holder.check_health()
    return json_response({"status": "ok"})


async def ready(http: Request) -> Response:
    """200 when the model is loaded and warm; 503 before, while stopping, and when the engine is not well."""
    context_of(http).holder.ready()
    return json_response({"status": "ready"})


async def metrics(http: Request) -> Response:
    return Response(context_of(http).metrics.render(), headers={"Content-Type": CONTENT_TYPE})
