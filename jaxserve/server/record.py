"""What is known of one HTTP request when it is over: its id, its log line, its metrics, its trace.

The record of the request that is being served is a context variable, so that what runs for it (`bridge.Call`)
finds it without being told. Prompts, replies and keys are not in it.
"""

from __future__ import annotations

import contextvars
import dataclasses
import logging
import re
import time
import uuid
from collections.abc import Callable, Mapping
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from jaxserve.server.auth import KEY_NAME
from jaxserve.server.errors import REQUEST_ID

log = logging.getLogger("jaxserve.access")

QUIET = frozenset({"/health", "/ready", "/metrics", "/state"})  # polled: only in the log when they fail
OTHER = "other"  # the route of what no route takes: its path is a client's to choose
MAX_REASONS = 8


@dataclasses.dataclass(slots=True)
class Work:
    """What the engine did for a request. Times are seconds of `time.monotonic()`.

    admitted: when its first sequence got a slot. first, last: when its first and last token came.
    """

    model: str = ""
    submitted: float | None = None
    admitted: float | None = None
    first: float | None = None
    last: float | None = None
    prompts: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    generated_tokens: int = 0
    finish_reasons: list[str] = dataclasses.field(default_factory=list)
    params: Mapping[str, Any] = dataclasses.field(
        default_factory=dict
    )  # what a trace says of the first prompt

    def finished(self, reason: str) -> None:
        if len(self.finish_reasons) < MAX_REASONS:
            self.finish_reasons.append(reason)


@dataclasses.dataclass(slots=True)
class Record:
    request_id: str
    method: str
    path: str
    time: float  # seconds since 1970
    started: float
    ended: float = 0.0
    route: str = OTHER
    key: str | None = None
    status: int = 0
    complete: bool = False  # the whole reply was handed to the connection
    work: Work = dataclasses.field(default_factory=Work)

    @property
    def fields(self) -> dict[str, Any]:
        """For the log."""
        work = self.work
        fields: dict[str, Any] = {
            "id": self.request_id,
            "key": self.key,
            "method": self.method,
            "path": self.path,
            "status": self.status,
            "seconds": round(self.ended - self.started, 6),
        }
        if not self.complete:
            fields["aborted"] = True
        if work.submitted is not None:
            fields |= {
                "queue_seconds": _between(work.submitted, work.admitted),
                "ttft_seconds": _between(work.submitted, work.first),
                "prompt_tokens": work.prompt_tokens,
                "cached_tokens": work.cached_tokens,
                "generated_tokens": work.generated_tokens,
                "finish": ",".join(sorted(set(work.finish_reasons))) or None,
            }
        return fields


def _between(start: float, end: float | None) -> float | None:
    return None if end is None else round(end - start, 6)


current: contextvars.ContextVar[Record | None] = contextvars.ContextVar("jaxserve_record", default=None)


def work() -> Work:
    """Of the request that is being served; of nobody's, outside of one."""
    record = current.get()
    return Work() if record is None else record.work


def request_id(headers: Headers) -> str:
    """The client's `X-Request-Id` if it can stand in a header, a log and a URL; else a new one."""
    given = headers.get("x-request-id", "")
    return given if re.fullmatch(r"[A-Za-z0-9._:/+=@-]{1,128}", given) else f"req_{uuid.uuid4().hex}"


class RecordMiddleware:
    """Keeps the record of each request, puts its id on the reply, and hands it to `reports` at the end.

    route_of: from a route's endpoint to its path, so that only known paths become labels. reports: each is
    called with the record and the request's headers, on the event loop; they must not wait.
    """

    def __init__(
        self,
        app: ASGIApp,
        route_of: Mapping[Any, str],
        reports: list[Callable[[Record, Headers], None]],
    ) -> None:
        self.app = app
        self._route_of = route_of
        self._reports = reports

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        record = Record(
            request_id(headers), scope["method"], scope["path"], time=time.time(), started=time.monotonic()
        )

        async def sending(message: Message) -> None:
            if message["type"] == "http.response.start":
                record.status = message["status"]
                replied = MutableHeaders(scope=message)
                for name in ("x-request-id", "request-id"):  # OpenAI's name for it, Anthropic's
                    replied[name] = record.request_id
            elif message["type"] == "http.response.body" and not message.get("more_body", False):
                record.complete = True
            await send(message)

        scope[REQUEST_ID] = record.request_id
        token = current.set(record)
        try:
            await self.app(scope, receive, sending)
        finally:
            current.reset(token)
            record.ended = time.monotonic()
            record.status = record.status or 500
            record.key = scope.get(KEY_NAME)
            record.route = self._route_of.get(scope.get("endpoint"), OTHER)
            for report in self._reports:
                report(record, headers)


def log_request(record: Record, headers: Headers) -> None:
    quiet = record.route in QUIET and record.status < 400
    log.log(logging.DEBUG if quiet else logging.INFO, "request", extra={"fields": record.fields})
