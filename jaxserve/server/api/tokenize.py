"""`/tokenize`, `/detokenize`, `/tokenizer_info`: the model's tokenizer, for those who count or score.

Source of the form: vLLM's endpoints of these names, which lm-evaluation-harness reads. `model` may be left
out: there is one.
"""

from __future__ import annotations

from asyncio import to_thread
from collections.abc import Callable, Mapping
from typing import Annotated, Any

import pydantic
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from jaxserve.protocols import EngineLike, TokenizerLike
from jaxserve.scheduler.types import RequestError
from jaxserve.server.api.conversation import Messages, Tools, neutral
from jaxserve.server.api.fields import Caller, SamplingFields
from jaxserve.server.api.job import Prepare, prepared
from jaxserve.server.api.turn_prompt import MOST_COUNTED, Prompt, TurnRequest
from jaxserve.server.body import OFF_LOOP_BYTES, Strict, read_body, validate
from jaxserve.server.context import context_of
from jaxserve.server.errors import bad_request, from_request_error, json_response

MAX_CHARACTERS = 2**22  # of a text
MAX_TOKENS = 2**20
CHAT_ONLY = ("tools", "add_generation_prompt", "continue_final_message", "chat_template_kwargs")
TOKENS = {"type": "array", "maxItems": MAX_TOKENS, "items": {"type": "integer", "minimum": 0}}


# --- models --------------------------------------------------------------------------------------------


class TokenizeRequest(Strict):
    """A text (`prompt`), or a conversation (`messages` and what goes with them) as chat completions would lay
    it out. add_special_tokens: of a text; a chat template writes its own."""

    model: str | None = None
    prompt: Annotated[str, pydantic.Field(max_length=MAX_CHARACTERS)] | None = None
    messages: Messages | None = None
    add_special_tokens: bool | None = None
    return_token_strs: bool = False
    tools: Tools | None = None
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    chat_template_kwargs: dict[str, Any] = pydantic.Field({})

    def asked(self) -> TurnRequest:
        """The conversation's. Raises RequestError."""
        return TurnRequest(
            messages=neutral(self.messages or ()),
            sampling=SamplingFields(model=self.model or ""),
            tools=[tool.neutral() for tool in self.tools or ()],
            template=self.chat_template_kwargs,
            add_generation_prompt=self.add_generation_prompt,
            continue_final_message=self.continue_final_message,
        )


class DetokenizeRequest(Strict):
    model: str | None = None
    # checked by `_check_tokens`, as quickly as a million of them need
    tokens: Annotated[Any, pydantic.WithJsonSchema(TOKENS)]
    skip_special_tokens: bool = False


# --- routes --------------------------------------------------------------------------------------------


async def tokenize(http: HttpRequest) -> Response:
    return await _answer(http, tokens_of)


async def detokenize(http: HttpRequest) -> Response:
    return await _answer(http, text_of)


async def tokenizer_info(http: HttpRequest) -> Response:
    engine = context_of(http).holder.ready()
    return json_response(info(engine))


async def _answer(http: HttpRequest, work: Prepare[dict[str, Any]]) -> Response:
    context = context_of(http)
    engine = context.holder.ready()
    data = await read_body(http.scope, http.receive, context.max_body_bytes)
    caller = context.caller(http)
    # a template takes what it takes, and a reply of a million tokens is long
    body = await prepared(data, work, engine, context.holder.check_model, caller, always_on_thread=True)
    return json_response(body) if len(data) <= OFF_LOOP_BYTES else await to_thread(json_response, body)


# --- translation ---------------------------------------------------------------------------------------


def tokens_of(
    body: Mapping[str, Any], engine: EngineLike, check_model: Callable[[str], None], caller: Caller
) -> dict[str, Any]:
    """Raises ApiError."""
    fields = validate(TokenizeRequest, body)
    if fields.model is not None:
        check_model(fields.model)
    tokenizer = _tokenizer(engine)
    if fields.messages is not None:
        ids = _conversation(fields, tokenizer, caller)
    else:
        ids = _text(fields, tokenizer)
    strings = [tokenizer.token_text(token) for token in ids] if fields.return_token_strs else None
    return {
        "count": len(ids),
        "max_model_len": engine.limits.max_model_len,
        "tokens": ids,
        "token_strs": strings,
    }


def _text(fields: TokenizeRequest, tokenizer: TokenizerLike) -> list[int]:
    if fields.prompt is None:
        raise bad_request("prompt or messages is required", param="prompt", code="missing_required_parameter")
    for name in CHAT_ONLY:
        if name in fields.model_fields_set:
            raise bad_request(f"{name} goes with messages", param=name)
    return tokenizer.encode(fields.prompt, add_special_tokens=fields.add_special_tokens is not False)


def _conversation(fields: TokenizeRequest, tokenizer: TokenizerLike, caller: Caller) -> list[int]:
    if fields.prompt is not None:
        raise bad_request("prompt and messages contradict each other: give one", param="messages")
    if fields.add_special_tokens:
        raise bad_request(
            "add_special_tokens: the chat template writes them itself",
            param="add_special_tokens",
            code="unsupported_parameter",
        )
    try:
        return Prompt(fields.asked(), tokenizer, caller, context=MOST_COUNTED).ids
    except RequestError as error:
        raise from_request_error(error) from None


def text_of(
    body: Mapping[str, Any], engine: EngineLike, check_model: Callable[[str], None], caller: Caller
) -> dict[str, Any]:
    """Raises ApiError."""
    fields = validate(DetokenizeRequest, body)
    if fields.model is not None:
        check_model(fields.model)
    _check_tokens(fields.tokens, engine.limits.vocab_size)
    tokenizer = _tokenizer(engine)
    return {"prompt": tokenizer.decode(fields.tokens, skip_special_tokens=fields.skip_special_tokens)}


def info(engine: EngineLike) -> dict[str, Any]:
    """What the harness asks for: the tokens that begin and end a text, by name and number, and the chat
    template. `vocab_size` is the tokenizer's; the model's may be padded beyond it."""
    tokenizer = _tokenizer(engine)
    bos, end = tokenizer.bos_token_id, next(iter(tokenizer.eos_token_ids), None)
    return {
        "tokenizer_class": type(tokenizer).__name__,
        "vocab_size": tokenizer.vocab_size,
        "max_model_len": engine.limits.max_model_len,
        "bos_token": None if bos is None else tokenizer.token_text(bos),
        "bos_token_id": bos,
        "eos_token": None if end is None else tokenizer.token_text(end),
        "eos_token_id": end,
        "eos_token_ids": list(tokenizer.eos_token_ids),
        "chat_template": tokenizer.chat_template_source,
    }


def _check_tokens(tokens: Any, vocab_size: int) -> None:
    if not isinstance(tokens, list):
        raise bad_request("tokens must be a list of token ids", param="tokens", code="invalid_value")
    if len(tokens) > MAX_TOKENS:
        raise bad_request(f"tokens has {len(tokens)} entries; at most {MAX_TOKENS}", param="tokens")
    for place, token in enumerate(tokens):
        if type(token) is not int or not 0 <= token < vocab_size:  # not isinstance: True is no token id
            raise bad_request(
                f"tokens[{place}] is no token id; ids lie in [0, {vocab_size - 1}]",
                param=f"tokens[{place}]",
                code="invalid_value",
            )


def _tokenizer(engine: EngineLike) -> TokenizerLike:
    if engine.tokenizer is None:
        raise bad_request("this model has no tokenizer", code="unsupported_endpoint")
    return engine.tokenizer
