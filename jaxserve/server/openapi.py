"""`/openapi.json`: what this server takes and answers, as an OpenAPI 3.1 document.

Built from the models that requests are validated by and those of `replies.py`; what no model says (statuses,
streams, forms) is in the table below. A route that is missing there has no place in the document, which a
test finds.
"""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import re
from collections.abc import Iterable, Mapping
from typing import Any

import orjson
import pydantic
import pydantic.json_schema
from starlette.requests import Request
from starlette.responses import Response

from jaxserve import __version__
from jaxserve.prompts import TIERS
from jaxserve.scheduler.types import (
    MAX_LOGIT_BIAS,
    MAX_LOGPROBS,
    MAX_N,
    MAX_PRIORITY,
    MAX_STOP_STRINGS,
    MAX_STOP_TOKENS,
)
from jaxserve.server import replies
from jaxserve.server.api.batches import BatchesQuery, BatchRequest
from jaxserve.server.api.chat import ChatRequest
from jaxserve.server.api.completions import CompletionRequest
from jaxserve.server.api.embeddings import EmbeddingRequest
from jaxserve.server.api.fields import (
    INERT,
    MAX_CACHE_SALT,
    MAX_METADATA,
    MAX_METADATA_KEY,
    MAX_METADATA_VALUE,
    MAX_USER,
)
from jaxserve.server.api.files import Fields, FilesQuery
from jaxserve.server.api.messages.request import CountRequest, MessagesRequest
from jaxserve.server.api.responses.request import ResponseRequest
from jaxserve.server.api.tokenize import DetokenizeRequest, TokenizeRequest
from jaxserve.server.body import MAX_DEPTH

Schema = dict[str, Any]
REF = "#/components/schemas/{model}"

# --- what can be answered ------------------------------------------------------------------------------

STATUSES = {
    400: "The request is at fault: `error.param` names the field.",
    401: "The API key is missing, or not one of the server's.",
    403: "The caller has as much as it may have.",
    404: "There is no such model, or no such thing of this key.",
    408: "The request did not arrive in time, or its own `timeout` passed.",
    409: "The state that it is in does not allow this.",
    413: "The body is larger than the server takes.",
    415: "The body is compressed.",
    429: "Too much waits: `Retry-After` says for how many seconds.",
    431: "The headers are larger than the server takes.",
    500: "The server is at fault.",
    503: "The model is still loading, the server stops, or the engine does no work.",
    507: "The server's storage is full.",
}
ALWAYS = (400, 408, 431, 500, 503)  # the connection's own matters among them
WITH_BODY = (413, 415)
WITH_MODEL = (404,)
QUEUED = (404, *WITH_BODY, 429)
BODY_PARSE_LIMITS = f"nesting beyond {MAX_DEPTH} levels, NaN, infinities and lone surrogates are refused"


@dataclasses.dataclass(frozen=True, slots=True)
class Operation:
    """A route.

    takes: the model of its JSON body. query: of its query string. form: of a multipart form, a `file` beside
    it. gives: the model of its JSON reply. events: the model of a stream's events. other: content types of
    replies that are not JSON. statuses: that it answers beside those of every route.
    """

    summary: str
    tag: str
    takes: type[pydantic.BaseModel] | None = None
    query: type[pydantic.BaseModel] | None = None
    form: type[pydantic.BaseModel] | None = None
    gives: type[replies.Reply] | None = None
    events: type[pydantic.BaseModel] | None = None
    other: tuple[str, ...] = ()
    statuses: tuple[int, ...] = ()
    open: bool = False  # no key
    inert: bool = False  # takes the fields that change nothing, too


CHAT, TEXT, BATCH, SERVER = "Assistants", "Text", "Files and batches", "Server"
OPERATIONS: Mapping[tuple[str, str], Operation] = {
    ("POST", "/v1/chat/completions"): Operation(
        "A conversation's next message",
        CHAT,
        takes=ChatRequest,
        gives=replies.ChatCompletion,
        events=replies.ChatCompletionChunk,
        statuses=QUEUED,
        inert=True,
    ),
    ("POST", "/v1/responses"): Operation(
        "A response to items, in OpenAI's later form",
        CHAT,
        takes=ResponseRequest,
        gives=replies.Response,
        events=replies.ResponseEvent,
        statuses=QUEUED,
        inert=True,
    ),
    ("POST", "/v1/messages"): Operation(
        "An assistant's message, in Anthropic's form",
        CHAT,
        takes=MessagesRequest,
        gives=replies.AssistantMessage,
        events=replies.MessageEvent,
        statuses=QUEUED,
    ),
    ("POST", "/v1/messages/count_tokens"): Operation(
        "How many tokens a message's prompt has",
        CHAT,
        takes=CountRequest,
        gives=replies.TokenCount,
        statuses=WITH_MODEL + WITH_BODY,
    ),
    ("POST", "/v1/completions"): Operation(
        "How texts go on",
        TEXT,
        takes=CompletionRequest,
        gives=replies.Completion,
        events=replies.Completion,
        statuses=QUEUED,
        inert=True,
    ),
    ("POST", "/v1/embeddings"): Operation(
        "A vector for each text",
        TEXT,
        takes=EmbeddingRequest,
        gives=replies.Embeddings,
        statuses=QUEUED,
        inert=True,
    ),
    ("POST", "/tokenize"): Operation(
        "A text's tokens, or a conversation's",
        TEXT,
        takes=TokenizeRequest,
        gives=replies.Tokens,
        statuses=WITH_MODEL + WITH_BODY,
    ),
    ("POST", "/detokenize"): Operation(
        "The text of tokens",
        TEXT,
        takes=DetokenizeRequest,
        gives=replies.DetokenizedText,
        statuses=WITH_MODEL + WITH_BODY,
    ),
    ("GET", "/tokenizer_info"): Operation("The tokenizer", TEXT, gives=replies.TokenizerInfo),
    ("POST", "/v1/files"): Operation(
        "Uploads a file", BATCH, form=Fields, gives=replies.FileObject, statuses=(403, 413, 507)
    ),
    ("GET", "/v1/files"): Operation(
        "This key's files", BATCH, query=FilesQuery, gives=replies.Files, statuses=(507,)
    ),
    ("GET", "/v1/files/{file_id}"): Operation("A file", BATCH, gives=replies.FileObject, statuses=(404, 507)),
    ("DELETE", "/v1/files/{file_id}"): Operation(
        "Deletes a file", BATCH, gives=replies.DeletedFile, statuses=(404, 409, 507)
    ),
    ("GET", "/v1/files/{file_id}/content"): Operation(
        "What is in a file", BATCH, other=("application/octet-stream",), statuses=(404, 507)
    ),
    ("POST", "/v1/batches"): Operation(
        "Begins a batch",
        BATCH,
        takes=BatchRequest,
        gives=replies.BatchObject,
        statuses=(*WITH_BODY, 429, 507),
    ),
    ("GET", "/v1/batches"): Operation(
        "This key's batches", BATCH, query=BatchesQuery, gives=replies.Batches, statuses=(507,)
    ),
    ("GET", "/v1/batches/{batch_id}"): Operation(
        "A batch", BATCH, gives=replies.BatchObject, statuses=(404, 507)
    ),
    ("POST", "/v1/batches/{batch_id}/cancel"): Operation(
        "Cancels a batch", BATCH, gives=replies.BatchObject, statuses=(404, 409, 507)
    ),
    ("GET", "/v1/models"): Operation("The model that this server has", SERVER, gives=replies.Models),
    ("GET", "/v1/models/{model}"): Operation("A model", SERVER, gives=replies.Model, statuses=WITH_MODEL),
    ("GET", "/health"): Operation("Is the process worth keeping?", SERVER, gives=replies.Status, open=True),
    ("GET", "/ready"): Operation("Should it get requests?", SERVER, gives=replies.Status, open=True),
    ("GET", "/metrics"): Operation("Figures for Prometheus", SERVER, other=("text/plain",)),
    ("GET", "/state"): Operation("Slots, pages and the queue", SERVER, gives=replies.State),
    ("GET", "/openapi.json"): Operation("This document", SERVER, other=("application/json",)),
}
INERT_FIELDS: dict[str, Schema] = {
    "user": {"type": "string", "maxLength": MAX_USER},
    "safety_identifier": {"type": "string", "maxLength": MAX_USER},
    "store": {"type": "boolean"},
    "metadata": {
        "type": "object",
        "maxProperties": MAX_METADATA,
        "propertyNames": {"maxLength": MAX_METADATA_KEY},
        "additionalProperties": {"type": "string", "maxLength": MAX_METADATA_VALUE},
    },
}
_COUNT = {"type": "integer", "minimum": 0, "maximum": MAX_LOGPROBS}
_TOKENS = {"type": "integer", "minimum": 0, "maximum": 2**31 - 1}
_SEQUENCES = {"type": "integer", "minimum": 1, "maximum": MAX_N}
_PENALTY = {"type": "number", "minimum": -2, "maximum": 2}
# what `SamplingParams` and `check_request` hold fields to, wherever one has this name and this type
BOUNDS: dict[str, Schema] = {
    "n": _SEQUENCES,
    "best_of": _SEQUENCES,
    "max_tokens": _TOKENS,
    "max_completion_tokens": _TOKENS,
    "max_output_tokens": _TOKENS,
    "min_tokens": _TOKENS,
    "logprobs": _COUNT,
    "top_logprobs": _COUNT,
    "prompt_logprobs": _COUNT,
    "seed": {"type": "integer", "minimum": 0, "maximum": 2**63 - 1},
    "temperature": {"type": "number", "minimum": 0, "maximum": 100},
    "top_p": {"type": "number", "exclusiveMinimum": 0, "maximum": 1},
    "min_p": {"type": "number", "minimum": 0, "maximum": 1},
    "top_k": {"type": "integer", "minimum": -1, "maximum": 2**31 - 1},
    "presence_penalty": _PENALTY,
    "frequency_penalty": _PENALTY,
    "repetition_penalty": {"type": "number", "exclusiveMinimum": 0, "maximum": 100},
    "priority": {"type": "integer", "minimum": -MAX_PRIORITY, "maximum": MAX_PRIORITY},
    "timeout": {"type": "number", "exclusiveMinimum": 0},
    "cache_salt": {"type": "string", "maxLength": MAX_CACHE_SALT},
    "stop": {"type": "array", "maxItems": MAX_STOP_STRINGS, "items": {"type": "string", "minLength": 1}},
    "stop_sequences": {"type": "array", "items": {"type": "string", "minLength": 1}},
    "stop_token_ids": {
        "type": "array",
        "maxItems": MAX_STOP_TOKENS // 2,
        "items": {"type": "integer", "minimum": 0, "maximum": 2**31 - 1},
    },
    "logit_bias": {
        "type": "object",
        "maxProperties": MAX_LOGIT_BIAS,
        "propertyNames": {"pattern": "^[0-9]{1,10}$"},
        "additionalProperties": {"type": "number", "minimum": -100, "maximum": 100},
    },
}
HEADERS = {
    "x-request-id": {"$ref": "#/components/headers/RequestId"},
    "request-id": {"$ref": "#/components/headers/RequestId"},
}
RETRY = {"Retry-After": {"$ref": "#/components/headers/RetryAfter"}}


# --- the route -----------------------------------------------------------------------------------------


async def openapi(http: Request) -> Response:
    return Response(await asyncio.to_thread(document_bytes), media_type="application/json")


@functools.cache
def document_bytes() -> bytes:
    return orjson.dumps(document())


# --- the document --------------------------------------------------------------------------------------


def document() -> dict[str, Any]:
    schemas = _schemas()
    paths: dict[str, dict[str, Any]] = {}
    for (method, path), operation in OPERATIONS.items():
        paths.setdefault(path, {})[method.lower()] = _operation(path, operation, schemas)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "jaxserve",
            "version": __version__,
            "summary": "OpenAI's and Anthropic's APIs over one model",
            "description": "Unknown fields are refused, and so are known ones that cannot be honoured; "
            f"null is as if a field were absent. Of JSON, {BODY_PARSE_LIMITS}.",
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        "servers": [{"url": "/"}],
        "security": [{"bearer": []}, {"x-api-key": []}],
        "tags": [{"name": name} for name in (CHAT, TEXT, BATCH, SERVER)],
        "paths": paths,
        "components": {
            "schemas": schemas,
            "headers": {
                "RequestId": {"description": "Of this request, in the logs.", "schema": {"type": "string"}},
                "RetryAfter": {
                    "description": "Seconds.",
                    "schema": {"type": "integer", "minimum": 1, "maximum": 120},
                },
            },
            "securitySchemes": {
                "bearer": {"type": "http", "scheme": "bearer"},
                "x-api-key": {"type": "apiKey", "in": "header", "name": "x-api-key"},
            },
        },
    }


def _schemas() -> dict[str, Schema]:
    """Every model that the table names, with those that it refers to."""
    models: dict[str, type[pydantic.BaseModel]] = {}
    for operation in OPERATIONS.values():
        for model in (
            operation.takes,
            operation.query,
            operation.form,
            operation.gives,
            operation.events,
        ):
            if model is not None:
                models[model.__name__] = model
    for model in (replies.Error, replies.AnthropicError):
        models[model.__name__] = model
    _, found = pydantic.json_schema.models_json_schema(
        [(model, "validation") for model in models.values()], ref_template=REF, schema_generator=_Plain
    )
    schemas: dict[str, Schema] = found["$defs"]
    for operation in OPERATIONS.values():
        if operation.inert:
            assert operation.takes is not None
            properties = schemas[operation.takes.__name__]["properties"]
            properties |= {name: INERT_FIELDS[name] for name in sorted(INERT)}
        if operation.takes is not None:
            _bound(schemas[operation.takes.__name__])
    return dict(sorted(schemas.items()))


def _bound(schema: Schema) -> None:
    for name, member in schema["properties"].items():
        for form in (member, *member.get("anyOf", ())):
            if name in BOUNDS and form.get("type") == BOUNDS[name]["type"]:
                form |= BOUNDS[name]
        if name == "service_tier" and {"type": "string"} in member.get("anyOf", ()):
            member["anyOf"] = [{"enum": sorted(TIERS)}, {"type": "null"}]


class _Plain(pydantic.json_schema.GenerateJsonSchema):
    """Without titles, which say what the names say, and without defaults of null, which are absence."""

    def generate_definitions(self, inputs: Any) -> Any:
        maps, definitions = super().generate_definitions(inputs)
        for schema in definitions.values():
            _simplify(schema)
        return maps, definitions


def _simplify(schema: Any) -> None:
    if isinstance(schema, list):
        for one in schema:
            _simplify(one)
    elif isinstance(schema, dict):
        if isinstance(schema.get("title"), str):
            del schema["title"]
        if "default" in schema and schema["default"] is None:
            del schema["default"]
        if "description" in schema and isinstance(schema["description"], str):
            schema["description"] = " ".join(schema["description"].split())
        for name, one in schema.items():
            if name == "properties":
                for member in one.values():
                    _simplify(member)
            elif name not in ("default", "enum", "const", "examples"):
                _simplify(one)


def _operation(path: str, operation: Operation, schemas: Mapping[str, Schema]) -> dict[str, Any]:
    body: dict[str, Any] = {
        "operationId": _operation_id(operation, path),
        "summary": operation.summary,
        "tags": [operation.tag],
        "parameters": [*_path_parameters(path), *_query_parameters(operation.query, schemas)],
        "responses": _responses(path, operation),
    }
    if not body["parameters"]:
        del body["parameters"]
    if operation.takes is not None:
        content = {"application/json": {"schema": _ref(operation.takes)}}
        body["requestBody"] = {"required": True, "content": content}
    if operation.form is not None:
        body["requestBody"] = {
            "required": True,
            "content": {"multipart/form-data": {"schema": _form(operation.form, schemas)}},
        }
    if operation.open:
        body["security"] = []
    return body


def _operation_id(operation: Operation, path: str) -> str:
    method = next(method for (method, at), one in OPERATIONS.items() if one is operation and at == path)
    return "_".join([method.lower(), *re.findall(r"\w+", path.removeprefix("/v1"))])


def _path_parameters(path: str) -> list[Schema]:
    return [
        {"name": name, "in": "path", "required": True, "schema": {"type": "string", "minLength": 1}}
        for name in re.findall(r"\{(\w+)\}", path)
    ]


def _query_parameters(
    model: type[pydantic.BaseModel] | None, schemas: Mapping[str, Schema]
) -> Iterable[Schema]:
    if model is not None:
        for name, schema in schemas[model.__name__]["properties"].items():
            yield {"name": name, "in": "query", "required": False, "schema": schema}


def _form(model: type[pydantic.BaseModel], schemas: Mapping[str, Schema]) -> Schema:
    schema = schemas[model.__name__]
    file = {"type": "string", "format": "binary", "contentMediaType": "application/octet-stream"}
    return {
        **schema,
        "properties": {**schema["properties"], "file": file},
        "required": [*schema.get("required", ()), "file"],
    }


def _responses(path: str, operation: Operation) -> dict[str, Any]:
    answered: dict[str, Any] = {"200": _ok(operation)}
    keyed = () if operation.open else (401,)
    for status in sorted({*ALWAYS, *keyed, *operation.statuses}):
        headers = HEADERS | RETRY if status in (429, 503) else HEADERS
        schema = _ref(replies.Error)
        if path.startswith("/v1/messages"):  # what is wrong before the path is known has OpenAI's form
            schema = {"oneOf": [_ref(replies.AnthropicError), schema]}
        answered[str(status)] = {
            "description": STATUSES[status],
            "headers": headers,
            "content": {"application/json": {"schema": schema}},
        }
    return answered


def _ok(operation: Operation) -> dict[str, Any]:
    content: dict[str, Any] = {}
    if operation.gives is not None:
        content["application/json"] = {"schema": _ref(operation.gives)}
    if operation.events is not None:
        content["text/event-stream"] = {"schema": _event(operation.events)}
    for kind in operation.other:
        plain = {"type": "object"} if kind == "application/json" else {"type": "string"}
        content[kind] = {"schema": plain}
    return {"description": "As asked.", "headers": HEADERS, "content": content}


def _event(model: type[pydantic.BaseModel]) -> Schema:
    """Of each event. Those that have names end without a last word."""
    json = {"anyOf": [_ref(model), _ref(replies.Error)]}
    data: Schema = {"type": "string", "contentMediaType": "application/json", "contentSchema": json}
    if "type" not in model.model_fields:
        data = {"anyOf": [{"const": "[DONE]"}, data]}
    return {
        "description": "With `stream: true`: of each event.",
        "type": "object",
        "properties": {"event": {"type": "string"}, "data": data},
        "required": ["data"],
    }


def _ref(model: type[pydantic.BaseModel]) -> Schema:
    return {"$ref": REF.format(model=model.__name__)}
