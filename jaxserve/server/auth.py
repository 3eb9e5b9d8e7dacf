"""The API key check: every route needs a key, but for those that say whether the process lives, and the page.

The digest of the key that opened the door goes on with the request: caches, files and jobs are separate by
it.

Keys are compared as SHA-256 digests in constant time, so neither a key's length nor a shared prefix can be
timed. A path that is not exactly an open one is closed, whatever its form (`//health`, `/health/`).
"""

from __future__ import annotations

import hashlib
import hmac
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.types import ASGIApp, Receive, Scope, Send

from jaxserve.config import ServerOptions
from jaxserve.server.api.page import PATHS as PAGE_PATHS
from jaxserve.server.errors import ApiError, error_answer

OPEN_PATHS = frozenset({"/health", "/ready", *PAGE_PATHS})
OPEN_METHODS = frozenset({"GET", "HEAD"})
TENANT, KEY_NAME = "jaxserve.tenant", "jaxserve.key_name"  # in the ASGI scope
MAX_KEYS = 10_000


class ApiKey(NamedTuple):
    """name: what the log calls it."""

    name: str
    key: str


class Keys:
    """Those that open the server; none, and it is open to all. `reload` may come at any time."""

    def __init__(self, read: Callable[[], list[ApiKey]]) -> None:
        """Raises what `read` raises."""
        self._read = read
        self.reload()

    def reload(self) -> None:
        """Raises what `read` raises, and keeps the keys that it had."""
        keys = self._read()
        if getattr(self, "_keys", None) and not keys:
            raise ValueError("there is no key any more, and the server was not started open to all")
        self._keys = [(name, _digest(key)) for name, key in keys]

    def __bool__(self) -> bool:
        return bool(self._keys)

    def find(self, key: str) -> tuple[str, bytes] | None:
        """Name and digest of the key, if it is one of those."""
        given = _digest(key)
        # every key is compared, so that the time does not tell which one matched
        matches = [name for name, digest in self._keys if hmac.compare_digest(given, digest)]
        return (matches[0], given) if matches else None


def fixed_keys(keys: Iterable[str]) -> Keys:
    named = [ApiKey(f"key-{number}", key) for number, key in enumerate(keys, start=1)]
    return Keys(lambda: named)


def load_keys(options: ServerOptions) -> list[ApiKey]:
    """The keys that open the server, none if it is open to all. Raises ValueError naming the flag."""
    keys = []
    if options.api_key is not None:
        keys.append(ApiKey("api-key", options.api_key))
    if options.api_key_file is not None:
        try:
            lines = Path(options.api_key_file).read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"--api-key-file={options.api_key_file} cannot be read: {error}") from error
        from_file = [_parse(number, line) for number, line in enumerate(lines, start=1) if line.strip()]
        if not from_file:  # an empty file must not mean "open to all"
            raise ValueError(f"--api-key-file={options.api_key_file} holds no key")
        keys += from_file
    if len(keys) > MAX_KEYS:  # each is compared for every request
        raise ValueError(f"--api-key-file has {len(keys)} keys; at most {MAX_KEYS}")
    for name, key in keys:
        if not key or not key.isascii() or not key.isprintable() or " " in key:
            raise ValueError(f"an API key must be printable ASCII without spaces, and not empty ({name})")
    return keys


def _parse(number: int, line: str) -> ApiKey:
    """`key`, or `name: key`; a key has no space in it, so a colon in it makes no name."""
    name, colon, key = line.strip().partition(": ")
    if colon and re.fullmatch(r"[A-Za-z0-9._@-]{1,64}", name):
        return ApiKey(name, key.strip())
    return ApiKey(f"line-{number}", line.strip())


class KeyMiddleware:
    """Answers 401 to a request without one of the keys; plain ASGI, so that streams pass untouched."""

    def __init__(self, app: ASGIApp, keys: Keys) -> None:
        self.app = app
        self._keys = keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan" or not self._keys or is_open(scope):
            await self.app(scope, receive, send)
            return
        found = self._keys.find(given_key(Headers(scope=scope)))
        if found is not None:
            scope[KEY_NAME], scope[TENANT] = found
            await self.app(scope, receive, send)
            return
        error = ApiError(
            401,
            "a valid API key is needed: send it as 'Authorization: Bearer KEY' or 'x-api-key: KEY'",
            code="invalid_api_key",
            headers={"WWW-Authenticate": "Bearer"},
        )
        await error_answer(scope, error)(scope, receive, send)


def is_open(scope: Scope) -> bool:
    """Whether the request needs no key."""
    return scope["method"] in OPEN_METHODS and scope["path"] in OPEN_PATHS


def given_key(headers: Headers) -> str:
    """The key that a request brings, or nothing: a bearer's token before Anthropic's `x-api-key`."""
    scheme, _, token = headers.get("authorization", "").partition(" ")
    return token.strip() if scheme.lower() == "bearer" else headers.get("x-api-key", "").strip()


def tenant_of(http: Request) -> bytes:
    """Of a request that came in: the digest of its API key, empty where the server needs none."""
    tenant: bytes = http.scope.get(TENANT, b"")
    return tenant


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()
