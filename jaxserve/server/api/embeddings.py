"""`/v1/embeddings`: one vector of length 1 per input.

Source of the form: OpenAI's API reference, "Embeddings"; `pooling` is ours, and `add_special_tokens`,
`priority`, `timeout` and `cache_salt` are vLLM's. base64 is of little-endian f32, as OpenAI's clients decode.
"""

from __future__ import annotations

import base64
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal

import numpy as np
import orjson
import pydantic
from starlette.requests import Request as HttpRequest
from starlette.responses import StreamingResponse
from starlette.types import ASGIApp

from jaxserve.engine.outputs import Output, unit_length
from jaxserve.prompts import encode_text
from jaxserve.protocols import EngineLike
from jaxserve.scheduler.types import Pooling, Request, RequestError, SamplingParams, check_request
from jaxserve.server.api import results
from jaxserve.server.api.fields import TEXTS_OR_TOKENS, Caller, PlaceFields, service_tier, take_known
from jaxserve.server.api.job import prepared
from jaxserve.server.body import read_body, validate
from jaxserve.server.context import context_of
from jaxserve.server.errors import bad_request, from_request_error, json_response
from jaxserve.server.stream import unless_client_leaves

MAX_INPUTS = 2048  # OpenAI's own
MAX_TOKENS = 300_000  # likewise, of all inputs together
PIECE_FLOATS = 2**16  # numbers that are spelled without letting others have a turn, about 5 ms


# --- model ---------------------------------------------------------------------------------------------


class EmbeddingRequest(PlaceFields):
    # checked by `split_inputs`: pydantic's errors for a union of four forms name none of them
    input: Annotated[Any, pydantic.WithJsonSchema(TEXTS_OR_TOKENS)]
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: int | None = None
    pooling: Literal["last", "mean"] | None = None
    add_special_tokens: bool = True


def split_inputs(given: Any) -> list[str | list[int]]:
    """The inputs, each a text or token ids. Raises RequestError."""
    if isinstance(given, str):
        return [given]
    if not isinstance(given, list):
        raise RequestError("input must be a string, token ids, or a list of either", param="input")
    if not given:
        raise RequestError("the input is empty: it must hold at least one token", param="input")
    if not isinstance(given[0], str | list):
        return [_token_ids(given, "input")]
    if len(given) > MAX_INPUTS:
        raise RequestError(f"input has {len(given)} inputs; at most {MAX_INPUTS}", param="input")
    for number, one in enumerate(given):
        if type(one) is not type(given[0]):
            raise RequestError("input mixes strings and token ids", param=f"input[{number}]")
        if isinstance(one, list):
            _token_ids(one, f"input[{number}]")
    return given


def _token_ids(ids: list[Any], param: str) -> list[int]:
    if len(ids) > MAX_TOKENS:
        raise RequestError(f"{param} has {len(ids)} tokens; at most {MAX_TOKENS}", param=param)
    if not all(type(token) is int for token in ids):  # not isinstance: True is no token id
        raise RequestError(f"{param}: token ids must be integers of at most 64 bits", param=param)
    return ids


# --- route ---------------------------------------------------------------------------------------------


async def create_embeddings(http: HttpRequest) -> ASGIApp:
    context = context_of(http)
    engine = context.holder.ready()
    data = await read_body(http.scope, http.receive, context.max_body_bytes)
    job = await prepared(data, prepare, engine, context.holder.check_model, context.caller(http))
    call = context.bridge.open(engine, job.requests)
    answers = await unless_client_leaves(http.receive, results.collect(call, job.requests, job.usage))
    if len(answers) * job.size <= PIECE_FLOATS:
        return json_response(job.answer(answers))
    # starlette runs a plain iterator on a thread, piece by piece
    return StreamingResponse(job.pieces(answers), media_type="application/json")


def prepare(
    body: Mapping[str, Any], engine: EngineLike, check_model: Callable[[str], None], caller: Caller
) -> EmbeddingJob:
    """Everything that can be wrong with a request is found here, before any of it is submitted."""
    fields = validate(EmbeddingRequest, take_known(body))
    check_model(fields.model)
    try:
        return EmbeddingJob(fields, engine, caller)
    except RequestError as error:
        raise from_request_error(error, {"prompt": "input"}) from None


# --- translation ---------------------------------------------------------------------------------------


class EmbeddingJob:
    """A valid request: what to ask of the engine, and how to say what it answers."""

    stream = False

    def __init__(self, fields: EmbeddingRequest, engine: EngineLike, caller: Caller) -> None:
        self.fields = fields
        self.size, own = embeddings_of(engine.facts)
        if fields.dimensions not in (None, self.size):
            raise bad_request(
                f"dimensions={fields.dimensions}: the embeddings have {self.size} and cannot be shortened",
                param="dimensions",
                code="unsupported_value",
            )
        self.pooling = own if fields.pooling is None else Pooling(fields.pooling)
        now = time.monotonic()
        place = fields.place(caller, now)
        self.service_tier = service_tier(place["tier"])
        params = SamplingParams(max_tokens=0)
        self.requests: list[Request] = []
        self.tokens = 0
        name = caller.new_id("embd-")
        for number, one in enumerate(split_inputs(fields.input)):
            ids = one
            if isinstance(ids, str):
                ids = encode_text(
                    engine.tokenizer,
                    ids,
                    add_special_tokens=fields.add_special_tokens,
                    param="input",
                    context=engine.limits.max_model_len,
                )
            self.tokens += len(ids)
            if self.tokens > MAX_TOKENS:
                raise RequestError(f"the inputs have more than {MAX_TOKENS} tokens together", param="input")
            self.requests.append(
                check_request(
                    f"{name}-{number}", ids, params, engine.limits, now, pooling=self.pooling, **place
                )
            )
        self.usage = results.Usage(self.requests)

    def answer(self, answers: Sequence[results.Answer]) -> dict[str, Any]:
        """The whole reply at once; what is in `data` is JSON already."""
        data = [orjson.Fragment(self._item(number, answer)) for number, answer in enumerate(answers)]
        return {"object": "list", "data": data, **self._rest()}

    def pieces(self, answers: Sequence[results.Answer]) -> Iterator[bytes]:
        """The same as JSON, in pieces that are quick to make."""
        yield b'{"object":"list","data":['
        for number, answer in enumerate(answers):
            yield (b"," if number else b"") + self._item(number, answer)
        yield b"]," + orjson.dumps(self._rest())[1:]

    def chunks(self, prompt: int, output: Output) -> Iterable[dict[str, Any]]:
        raise NotImplementedError("embeddings are not streamed")

    def closing(self) -> Iterable[dict[str, Any]]:
        raise NotImplementedError("embeddings are not streamed")

    def _item(self, number: int, answer: results.Answer) -> bytes:
        if answer.embedding is None:
            raise ValueError(f"the engine answered input {number} without an embedding")
        unit = np.ascontiguousarray(unit_length(answer.embedding), "<f4")
        return orjson.dumps(
            {
                "object": "embedding",
                "index": number,
                "embedding": unit
                if self.fields.encoding_format == "float"
                else base64.b64encode(unit.tobytes()).decode(),
            },
            option=orjson.OPT_SERIALIZE_NUMPY,
        )

    def _rest(self) -> dict[str, Any]:
        return {
            "model": self.fields.model,
            "pooling": self.pooling.value,
            "service_tier": self.service_tier,
            "usage": {"prompt_tokens": self.tokens, "total_tokens": self.tokens},
        }


def embeddings_of(facts: Mapping[str, Any]) -> tuple[int, Pooling]:
    """Numbers per vector, and the pooling of requests that name none. Raises ApiError 400."""
    if "embedding_size" not in facts:
        raise bad_request("this server makes no embeddings", code="unsupported_endpoint")
    return int(facts["embedding_size"]), Pooling(facts["embedding_pooling"])
