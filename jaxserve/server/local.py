"""Who may use a server that needs no key and listens on this machine alone: its programs, and its own page.

A browser on the machine lets pages of any origin send to it: a form or a `text/plain` fetch needs no
preflight, and a name of the page's own that is made to resolve to 127.0.0.1 makes it the same origin (DNS
rebinding). Browsers say in `Origin` whose page it is, and in `Host` under which name it was reached.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Collection

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from jaxserve.server.auth import Keys
from jaxserve.server.errors import ApiError, error_answer
from jaxserve.server.logs import shown


def is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


class LocalMiddleware:
    """Answers 403 to what other pages of a browser send, as long as there is no key that would stop them.

    origins: those that are allowed beside the server's own; `*` is all.
    """

    def __init__(self, app: ASGIApp, keys: Keys, origins: Collection[str]) -> None:
        self.app = app
        self._keys = keys
        self._origins = frozenset(origins)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        error = None
        if scope["type"] == "http" and not self._keys:
            error = self._fault(Headers(scope=scope))
        if error is None:
            await self.app(scope, receive, send)
        else:
            await error_answer(scope, error)(scope, receive, send)

    def _fault(self, headers: Headers) -> ApiError | None:
        host, origin = headers.get("host"), headers.get("origin")
        if host is not None and not is_loopback(_name(host)):
            return _forbidden(
                f"Host: {shown(host, 64)} is no name of a server that only this machine can reach: use "
                "localhost or 127.0.0.1, or set --api-key",
                "host_not_allowed",
            )
        if origin is None or origin in self._origins or "*" in self._origins:
            return None
        if host is not None and origin.lower() in (f"http://{host.lower()}", f"https://{host.lower()}"):
            return None
        return _forbidden(
            f"pages of {shown(origin, 64)} may not use this server: allow them with --cors-origin, or set "
            "--api-key",
            "origin_not_allowed",
        )


def _name(host: str) -> str:
    """Of a Host header, without the port; empty if it is none (RFC 9110, section 7.2)."""
    match = re.fullmatch(r"(?:\[([0-9A-Fa-f:.]+)\]|([^\[\]:]+))(?::[0-9]*)?", host)
    return "" if match is None else (match[1] or match[2]).lower()


def _forbidden(message: str, code: str) -> ApiError:
    return ApiError(403, message, type="permission_error", code=code)
