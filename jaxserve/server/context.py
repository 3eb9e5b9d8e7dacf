"""What every route needs, in one object that the application carries."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from starlette.requests import Request

from jaxserve.config import ServerOptions
from jaxserve.server.api.fields import Caller
from jaxserve.server.auth import tenant_of
from jaxserve.server.body import MAX_BODY_BYTES
from jaxserve.server.bridge import Bridge
from jaxserve.server.holder import EngineHolder
from jaxserve.server.metrics import Metrics

if TYPE_CHECKING:
    from jaxserve.server.jobs.desk import Desk


@dataclasses.dataclass(frozen=True, slots=True)
class Context:
    """desk: files and batches."""

    holder: EngineHolder
    bridge: Bridge
    metrics: Metrics
    options: ServerOptions
    desk: Desk
    max_body_bytes: int = MAX_BODY_BYTES

    def caller(self, http: Request) -> Caller:
        return Caller(
            tenant_of(http),
            self.options.service_tier,
            self.options.tool_parser,
            self.options.reasoning_parser,
        )


def context_of(request: Request) -> Context:
    context = request.app.state.context
    assert isinstance(context, Context)
    return context
