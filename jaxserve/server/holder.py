"""The engine as the server sees it: still loading, ready, failed, or being put away.

The port is bound before the model is loaded, so every route asks here first. Written by the loading thread,
read on the event loop: each change is one assignment.
"""

from __future__ import annotations

import time

from jaxserve.protocols import EngineLike
from jaxserve.server.errors import ApiError, engine_failed, not_ready

MAX_SHOWN = 128  # characters of what a client calls a model


class EngineHolder:
    def __init__(self) -> None:
        self.engine: EngineLike | None = None
        self.model_name = ""
        self.created = int(time.time())
        self.stopping = False

    def set_engine(self, engine: EngineLike, model_name: str) -> None:
        """The engine is warm: requests may come."""
        self.model_name = model_name
        self.engine = engine  # last: this is what `ready` reads

    @property
    def alive(self) -> bool:
        """False once the engine's thread died. A process that is still loading is alive."""
        return self.engine is None or self.engine.healthy

    def check_health(self) -> None:
        """Raises ApiError 503 that says why the engine does no work; a process that loads is well."""
        if self.engine is None:
            return
        if not self.engine.healthy:
            raise not_ready(
                f"the engine failed: {describe(self.engine)}", code="engine_failed", retry_after=None
            )
        if stuck := self.engine.stuck:
            raise not_ready(stuck, code="engine_stuck")

    def ready(self) -> EngineLike:
        """The engine, or an ApiError that says why there is none to use."""
        engine = self.engine
        if self.stopping:
            raise not_ready("the server is stopping", code="stopping", retry_after=None)
        if engine is None:
            raise not_ready("the model is still loading", code="loading")
        self.check_health()
        return engine

    def check_model(self, name: str) -> None:
        if name != self.model_name:
            shown = name if len(name) <= MAX_SHOWN else name[: MAX_SHOWN - 3] + "..."
            raise ApiError(
                404,
                f"the model {shown!r} does not exist; this server has {self.model_name!r}",
                param="model",
                code="model_not_found",
            )

    def failure(self) -> ApiError:
        """What a request in flight hears when the engine dies under it."""
        return engine_failed(f"the engine failed: {'' if self.engine is None else describe(self.engine)}")


def describe(engine: EngineLike) -> str:
    failure = engine.failure
    return "it stopped" if failure is None else f"{type(failure).__name__}: {failure}"
