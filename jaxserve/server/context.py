"""What every route needs, in one object that the application carries."""

from __future__ import annotations

import dataclasses

from starlette.requests import Request

from jaxserve.server.api.fields import Caller
from jaxserve.server.auth import tenant_of
from jaxserve.server.body import MAX_BODY_BYTES
from jaxserve.server.bridge import Bridge
from jaxserve.server.holder import EngineHolder
from jaxserve.server.metrics import Metrics


@dataclasses.dataclass(frozen=True, slots=True)
class Context:
    holder: EngineHolder
    bridge: Bridge
    metrics: Metrics
    max_body_bytes: int = MAX_BODY_BYTES
    service_tier: str = "default"

    def caller(self, http: Request) -> Caller:
        return Caller(tenant_of(http), self.service_tier)


def context_of(request: Request) -> Context:
    context = request.app.state.context
    assert isinstance(context, Context)
    return context
