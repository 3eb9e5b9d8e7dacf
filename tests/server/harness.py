"""A real server on a free port, with the fake engine behind it, and clients for it."""

from __future__ import annotations

import asyncio
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, Literal

import httpx
import openai

from jaxserve.config import ServerOptions
from jaxserve.response_cache import CachingEngine
from jaxserve.server.app import Report
from jaxserve.server.holder import EngineHolder
from jaxserve.server.run import Server, bind, url
from tests.server.fakes import FakeEngine

MODEL = "alphabet"


class Served:
    """The server's thread, its engine, and clients for it."""

    def __init__(
        self,
        engine: FakeEngine | CachingEngine | None,
        keys: Sequence[str] = (),
        max_body_bytes: int | None = None,
        service_tier: Literal["default", "flex"] = "default",
        reports: Sequence[Report] = (),
        **options: Any,
    ) -> None:
        self.holder = EngineHolder()
        self._folder = tempfile.TemporaryDirectory(prefix="jaxserve-test-")
        defaults = {"data_dir": f"{self._folder.name}/state", "drain_seconds": 2.0}
        self.options = ServerOptions(service_tier=service_tier, **(defaults | options))
        self.server = Server(self.holder, list(keys), self.options, reports)
        if max_body_bytes is not None:
            context = self.server._context
            object.__setattr__(context, "max_body_bytes", max_body_bytes)
        self.listener = bind("127.0.0.1", 0)
        self.port: int = self.listener.getsockname()[1]
        self.url = url("127.0.0.1", self.port)
        self.http = httpx.Client(base_url=self.url, timeout=20)
        self.openai = openai.OpenAI(
            base_url=f"{self.url}/v1", api_key=keys[0] if keys else "none", max_retries=0, timeout=20
        )
        self._thread = threading.Thread(
            target=lambda: asyncio.run(self.server.serve(sockets=[self.listener])), daemon=True
        )
        self._thread.start()
        until(lambda: self.server.started)
        self._engine: FakeEngine | CachingEngine | None = None
        if engine is not None:
            self.load(engine)

    def load(self, engine: FakeEngine | CachingEngine) -> None:
        self._engine = engine
        engine.start()
        self.holder.set_engine(engine, MODEL)

    @property
    def engine(self) -> FakeEngine:
        assert isinstance(self._engine, FakeEngine)
        return self._engine

    @property
    def caching(self) -> CachingEngine:
        assert isinstance(self._engine, CachingEngine)
        return self._engine

    def completion(self, **fields: object) -> httpx.Response:
        return self.http.post("/v1/completions", json={"model": MODEL, "prompt": "a", **fields})

    def chat(self, **fields: object) -> httpx.Response:
        messages = [{"role": "user", "content": "a"}]
        return self.http.post("/v1/chat/completions", json={"model": MODEL, "messages": messages, **fields})

    def connect(self, path: str, body: bytes) -> socket.socket:
        """A connection on which a request was sent and nothing read: closing it is a client that leaves."""
        connection = socket.create_connection(("127.0.0.1", self.port), timeout=20)
        head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n"
        connection.sendall(head.encode() + body)
        return connection

    def as_new(self) -> None:
        """The server answers as if nothing had happened, and holds nothing."""
        until(lambda: self.engine.stats()["running"] == self.engine.stats()["waiting"] == 0)
        assert self.engine.stats()["pages_used"] == 0
        assert self.http.get("/health").status_code == 200
        reply = self.completion(max_tokens=3)
        assert reply.status_code == 200
        assert reply.json()["choices"][0]["text"] == "bcd"

    def close(self) -> None:
        self.openai.close()
        self.http.close()
        self.server.should_exit = True
        self._thread.join(20)
        assert not self._thread.is_alive()
        if self._engine is not None:
            self._engine.close()
        self._folder.cleanup()


def until(condition: Callable[[], bool], seconds: float = 10.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come true in time"
        time.sleep(0.002)


Serve = Callable[..., Served]
