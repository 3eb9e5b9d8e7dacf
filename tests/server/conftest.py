"""Servers for the tests of this folder."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, Literal

import pytest

from jaxserve.response_cache import CachingEngine
from tests.server.fakes import FakeEngine
from tests.server.harness import Serve, Served


@pytest.fixture
def serve() -> Iterator[Serve]:
    """Starts servers: `serve(engine=FakeEngine(...), keys=[...])`; `engine=None` is one that still loads."""
    with contextlib.ExitStack() as stack:

        def start(
            engine: FakeEngine | CachingEngine | None,
            *,
            keys: list[str] | None = None,
            max_body_bytes: int | None = None,
            service_tier: Literal["default", "flex"] = "default",
            **options: Any,
        ) -> Served:
            """options: also those of `ServerOptions`."""
            served = Served(engine, keys or [], max_body_bytes, service_tier, **options)
            stack.callback(served.close)
            return served

        yield start


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    """One server for all tests of a module that leave it as it was."""
    one = Served(FakeEngine())
    yield one
    one.close()
