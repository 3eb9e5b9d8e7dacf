"""A request's body: bounded in bytes and in time, strict JSON, checked against a pydantic model.

orjson refuses NaN, infinities and lone surrogates; integers beyond 64 bits come out of it as floats, which no
integer field takes. A refusal is a 4xx that names the field at fault.
"""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import re
from collections.abc import Mapping
from typing import Any

import orjson
import pydantic
from pydantic_core import CoreSchema, PydanticCustomError, core_schema
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from jaxserve.server.errors import ApiError, bad_request, error_response
from jaxserve.server.parts import check_parts
from jaxserve.server.stream import ClientLeft

MAX_BODY_BYTES = 16 * 2**20
BODY_SECONDS = 60.0  # a body that takes longer to arrive is given up
MAX_DEPTH = 200  # levels of a body, whose parts an answer may repeat
WRITTEN_DEPTH = 254  # levels that orjson writes; it reads 1,024
MAX_MEMBERS = 256  # of the body, and of any object in it that has a model: more than any has fields
OFF_LOOP_BYTES = 16 * 2**10  # larger bodies are parsed and tokenized on a thread
# what Python's `json` writes, and what is too large for a float; the sign may be before it
NOT_FINITE = re.compile(r"NaN|Infinity|-?\d{1,400}(\.\d{0,400})?[eE]\+?\d{1,9}")


class OneLengthMiddleware:
    """Refuses a request that says twice how long it is, and closes the connection.

    A proxy in front may go by the other header, and take the rest of the body for somebody's next request
    (RFC 9112, section 6.3: request smuggling).
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        lengths = {"content-length", "transfer-encoding"}
        if scope["type"] == "lifespan" or not lengths <= set(Headers(scope=scope)):
            await self.app(scope, receive, send)
            return
        error = ApiError(
            400,
            "a request may have Content-Length or Transfer-Encoding, not both",
            headers={"Connection": "close"},
        )
        await error_response(error)(scope, receive, send)


class Arrivals:
    """The bodies that are on their way. Once it is closed, nobody waits for what is missing of them."""

    def __init__(self) -> None:
        self._error: ApiError | None = None
        self._waits: set[asyncio.Timeout] = set()

    def close(self, error: ApiError) -> None:
        """Raises `error` where a body is waited for, now and later."""
        self._error = error
        for wait in self._waits:
            wait.reschedule(0)  # on the loop's clock: at once

    def watched(self, receive: Receive) -> Receive:
        """`receive`, ended by `close` until the body's last byte has come."""
        whole = False

        async def watched() -> Message:
            nonlocal whole
            if whole:  # what comes now is the client's leaving, which streams wait for
                return await receive()
            if self._error is not None:
                raise self._error
            try:
                async with asyncio.timeout(None) as wait:
                    self._waits.add(wait)
                    message = await receive()
            except TimeoutError:
                assert self._error is not None
                raise self._error from None
            finally:
                self._waits.discard(wait)
            whole = not message.get("more_body", False)
            return message

        return watched


async def read_body(scope: Scope, receive: Receive, limit: int = MAX_BODY_BYTES) -> bytes:
    """The body's bytes. Raises ApiError 413, 408 or 415, or ClientLeft."""
    headers = Headers(scope=scope)
    declared = headers.get("content-length", "")
    too_large = ApiError(
        413,
        f"the request's body is larger than {limit} bytes",
        code="request_too_large",
        headers={"Connection": "close"},
    )
    if declared.isdecimal() and int(declared) > limit and "expect" in headers:
        raise too_large  # the client waits for leave to send: do not give it
    try:
        async with asyncio.timeout(BODY_SECONDS):
            data = await _read(receive, limit, too_large, asyncio.get_running_loop().time() + BODY_SECONDS)
    except TimeoutError:
        raise ApiError(
            408,
            f"the request's body did not arrive within {BODY_SECONDS:g} s",
            code="request_timeout",
            headers={"Connection": "close"},
        ) from None
    coding = headers.get("content-encoding", "identity").strip().lower()
    if coding not in ("", "identity"):
        raise ApiError(
            415,
            f"Content-Encoding: {coding[:64]!r} is not supported: send the body as it is",
            code="unsupported_media_type",
            headers={"Accept-Encoding": "identity"},  # RFC 9110, section 12.5.3
        )
    return data


async def _read(receive: Receive, limit: int, too_large: ApiError, ends: float) -> bytes:
    """Reads a body that is too large to its end, or to 8 times the limit, without keeping it: a client
    that is still sending would not see the answer. ends: on the loop's clock; raises TimeoutError."""
    kept: list[bytes] = []
    size = 0
    more = True
    while more and size <= 8 * limit:
        message: Message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientLeft
        if asyncio.get_running_loop().time() > ends:
            raise TimeoutError  # no timer interrupts what does not have to wait
        data = message.get("body", b"")
        more = message.get("more_body", False)
        size += len(data)
        if size <= limit:
            kept.append(data)
        else:
            kept.clear()
    if size > limit:
        raise too_large
    return b"".join(kept)


def parse_object(data: bytes) -> dict[str, Any]:
    """The body as a JSON object without its null members: null means "as if absent", as at OpenAI."""
    check_parts(data)
    try:
        value = orjson.loads(data)
    except orjson.JSONDecodeError as error:
        _refuse_non_finite(error.doc, error.pos)
        raise bad_request(f"the body is not valid JSON: {error}", code="invalid_json") from None
    if not isinstance(value, dict):
        raise bad_request("the body must be a JSON object", code="invalid_json")
    if len(value) > MAX_MEMBERS:
        raise bad_request(f"the body has {len(value)} members; at most {MAX_MEMBERS} are taken")
    if data.count(b"[") + data.count(b"{") > MAX_DEPTH and is_deep(value):  # few bodies have as many
        raise bad_request(f"the body nests more than {MAX_DEPTH} levels", code="invalid_json")
    return {name: member for name, member in value.items() if member is not None}


def is_deep(value: Any) -> bool:
    """Whether what was read from JSON has more than MAX_DEPTH levels of lists and objects.

    Writing it once tells, many times faster than a search of it here would.
    """
    for _ in range(WRITTEN_DEPTH - MAX_DEPTH):
        value = [value]
    try:
        orjson.dumps(value)
    except orjson.JSONEncodeError:
        return True
    return False


def _refuse_non_finite(text: str, place: int) -> None:
    """Raises ApiError 400 naming the body's field, if it is a NaN or an infinity that is no JSON at `place`.

    What comes before it is JSON, and becomes an object if the field's value is 0 and its last.
    """
    number = NOT_FINITE.match(text, place)
    if number is None:
        return
    begin = text[:place].removesuffix("-")
    try:
        value = orjson.loads(begin + "0}")
    except ValueError:  # it is deeper
        return
    # no name that could not be sent back, such as a lone surrogate
    if isinstance(value, dict) and value and (name := next(reversed(value))).isidentifier():
        shown = float(text[len(begin) : number.end()])
        name = name[:64]
        raise bad_request(f"{name}={shown} must be a finite number", param=name, code="invalid_value")


def validate[M: pydantic.BaseModel](model: type[M], fields: Mapping[str, Any]) -> M:
    """The fields as `model`. Raises ApiError 400 naming the first field at fault."""
    for name in fields:
        if name not in known_fields(model):
            raise bad_request(f"unknown field: {_shown(name)}", param=name[:64], code="unknown_parameter")
    try:
        return model.model_validate(fields)
    except pydantic.ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        param = _path(first["loc"])
        if first["type"] == "missing":
            message, code = f"{param} is required", "missing_required_parameter"
        elif first["type"] == "extra_forbidden":
            message, code = f"unknown field: {param}", "unknown_parameter"
        else:
            message, code = f"{param}: {first['msg']}", "invalid_value"
        raise bad_request(message, param=param, code=code) from None


class Strict(pydantic.BaseModel):
    """An object that has these fields and no others, of these types and no others; null is as if absent.

    Refused by its size alone, before pydantic collects an error for each member: it holds the interpreter
    meanwhile, and with it every stream.
    """

    model_config = pydantic.ConfigDict(strict=True, extra="forbid", protected_namespaces=())

    @pydantic.model_validator(mode="before")
    @classmethod
    def _given(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        if len(value) > MAX_MEMBERS:
            raise PydanticCustomError(
                "too_long",
                "there are {count} members; at most {most} are taken",
                {"count": len(value), "most": MAX_MEMBERS},
            )
        return {name: member for name, member in value.items() if member is not None}


@dataclasses.dataclass(frozen=True, slots=True)
class AtMost:
    """Of a list or a dict in a model: refused by its length alone, before anything in it is looked at.

    pydantic's own `max_length` comes after the items, and collects an error for each of them. Of a list no
    more than the first error is looked for.
    """

    items: int

    def __get_pydantic_core_schema__(self, source: Any, handler: pydantic.GetCoreSchemaHandler) -> CoreSchema:
        schema: Any = handler(source)
        inner = schema
        while inner["type"] != "list" and "schema" in inner:
            inner = inner["schema"]
        if inner["type"] == "list":
            inner["fail_fast"] = True
        return core_schema.no_info_before_validator_function(self._check, schema)

    def __get_pydantic_json_schema__(
        self, schema: CoreSchema, handler: pydantic.GetJsonSchemaHandler
    ) -> dict[str, Any]:
        made = handler(schema)
        return made | {"maxProperties" if made.get("type") == "object" else "maxItems": self.items}

    def _check(self, value: Any) -> Any:
        if isinstance(value, list | dict) and len(value) > self.items:
            raise PydanticCustomError(
                "too_long",
                "there are {count} items; at most {most} items are taken",
                {"count": len(value), "most": self.items},
            )
        return value


@functools.cache
def known_fields(model: type[pydantic.BaseModel]) -> frozenset[str]:
    return frozenset(model.model_fields)


def _path(location: tuple[int | str, ...]) -> str:
    """`messages[0].content` from pydantic's ("messages", 0, "content")."""
    text = ""
    for part in location:
        text += f"[{part}]" if isinstance(part, int) else f".{part[:64]}" if text else part[:64]
    return text


def _shown(name: str) -> str:
    return repr(name if len(name) <= 64 else name[:61] + "...")
