"""The API key check: every route needs a key, but for those that say whether the process lives.

The digest of the key that opened the door goes on with the request: caches are separate by it.

Keys are compared as SHA-256 digests in constant time, so neither a key's length nor a shared prefix can be
timed. A path that is not exactly an open one is closed, whatever its form (`//health`, `/health/`).
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Iterable
from pathlib import Path

from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.types import ASGIApp, Receive, Scope, Send

from jaxserve.config import ServerOptions
from jaxserve.server.errors import ApiError, error_response

OPEN_PATHS = frozenset({"/health", "/ready"})
TENANT = "jaxserve.tenant"  # in the ASGI scope


def load_keys(options: ServerOptions) -> list[str]:
    """The keys that open the server, none if it is open to all. Raises ValueError naming the flag."""
    keys = []
    if options.api_key is not None:
        keys.append(options.api_key)
    if options.api_key_file is not None:
        try:
            lines = Path(options.api_key_file).read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"--api-key-file={options.api_key_file} cannot be read: {error}") from error
        from_file = [line.strip() for line in lines if line.strip()]
        if not from_file:  # an empty file must not mean "open to all"
            raise ValueError(f"--api-key-file={options.api_key_file} holds no key")
        keys += from_file
    for key in keys:
        if not key or not key.isascii() or not key.isprintable() or " " in key:
            raise ValueError("an API key must be printable ASCII without spaces, and not empty")
    return keys


class KeyMiddleware:
    """Answers 401 to a request without one of the keys; plain ASGI, so that streams pass untouched."""

    def __init__(self, app: ASGIApp, keys: Iterable[str]) -> None:
        self.app = app
        self._digests = [_digest(key) for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan" or not self._digests or scope["path"] in OPEN_PATHS:
            await self.app(scope, receive, send)
            return
        tenant = self._tenant(Headers(scope=scope).get("authorization", ""))
        if tenant is not None:
            scope[TENANT] = tenant
            await self.app(scope, receive, send)
            return
        error = ApiError(
            401,
            "a valid API key is needed: send it as 'Authorization: Bearer KEY'",
            code="invalid_api_key",
            headers={"WWW-Authenticate": "Bearer"},
        )
        await error_response(error)(scope, receive, send)

    def _tenant(self, authorization: str) -> bytes | None:
        """The key's digest, if it is one of those that open the server."""
        scheme, _, key = authorization.partition(" ")
        given = _digest(key.strip())
        # every key is compared, so that the time does not tell which one matched
        matches = [hmac.compare_digest(given, digest) for digest in self._digests]
        return given if scheme.lower() == "bearer" and any(matches) else None


def tenant_of(http: Request) -> bytes:
    """Of a request that came in: the digest of its API key, empty where the server needs none."""
    tenant: bytes = http.scope.get(TENANT, b"")
    return tenant


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()
