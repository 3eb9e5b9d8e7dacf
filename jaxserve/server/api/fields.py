"""The request fields that completions and chat share, and those that neither takes yet.

A field is honoured, accepted because it asks for nothing of the model (INERT), or refused by name. Knows
nothing of prompts and messages.
"""

from __future__ import annotations

import dataclasses
import hashlib
import re
import time
import uuid
from collections.abc import Callable, Mapping
from typing import Annotated, Any, TypedDict

import pydantic
from pydantic_core import PydanticCustomError

from jaxserve.prompts import tier_of
from jaxserve.scheduler.types import (
    MAX_LOGIT_BIAS,
    MAX_STOP_STRINGS,
    MAX_STOP_TOKENS,
    RequestError,
    SamplingParams,
    StructuredOutputs,
    Tier,
)
from jaxserve.server.body import AtMost, Strict, known_fields
from jaxserve.server.errors import bad_request

MAX_SEQUENCES = 2048  # prompts times n (or best_of), of one HTTP request
MAX_CACHE_SALT = 256  # bytes
MAX_METADATA, MAX_METADATA_KEY, MAX_METADATA_VALUE = 16, 64, 512  # OpenAI's own
MAX_TOKEN_IDS = 2**19  # more than any vocabulary has
MAX_USER = 512  # characters of `user` and `safety_identifier`

# the JSON schema of what endpoints over texts take
TEXTS_OR_TOKENS = {
    "anyOf": [
        {"type": "string", "minLength": 1},
        {"type": "array", "minItems": 1, "items": {"type": "integer", "minimum": 0}},
        {"type": "array", "minItems": 1, "items": {"type": "string", "minLength": 1}},
        {
            "type": "array",
            "minItems": 1,
            "items": {"type": "array", "minItems": 1, "items": {"type": "integer", "minimum": 0}},
        },
    ]
}
INERT = frozenset({"user", "metadata", "store", "safety_identifier"})


def _only(*values: Any) -> Callable[[Any], bool]:
    return lambda value: any(type(value) is type(allowed) and value == allowed for allowed in values)


# known to OpenAI or vLLM, and not to every endpoint here -> whether a value asks for what happens anyway
UNSUPPORTED: Mapping[str, Callable[[Any], bool]] = {
    "response_format": _only({"type": "text"}),
    "modalities": _only(["text"]),
    "truncation_side": _only("left"),
    "use_beam_search": _only(False),
    "length_penalty": _only(1.0, 1),
    "spaces_between_special_tokens": _only(True),
    "return_prompt_text": _only(False),
    "return_token_offsets": _only(False),
    "watermarking": _only(False),
    "bad_words": _only([]),
    **dict.fromkeys(
        (
            # OpenAI's
            *("audio", "function_call", "functions", "moderation", "prediction", "prompt_cache_key"),
            *("prompt_cache_options", "prompt_cache_retention", "suffix", "verbosity", "web_search_options"),
            *("parallel_tool_calls", "reasoning_effort", "tool_choice", "tools"),
            # vLLM's
            *("structured_outputs", "guided_json", "guided_regex", "guided_choice", "guided_grammar"),
            *("guided_decoding_backend", "guided_whitespace_pattern", "structural_tag"),
            *("request_id", "session_id", "include_stop_str_in_output", "include_reasoning"),
            *("truncate_prompt_tokens", "return_token_ids", "return_tokens_as_token_ids"),
            *("logits_processors", "logprob_token_ids", "thinking_token_budget", "repetition_detection"),
            *("add_generation_prompt", "continue_final_message", "chat_template", "chat_template_kwargs"),
            *("documents", "prompt_embeds", "media_io_kwargs", "mm_processor_kwargs", "return_mm_kwargs"),
            *("kv_transfer_params", "ec_transfer_params", "vllm_xargs", "stream_interval"),
            "routed_experts_prompt_start",
        ),
        _only(),
    ),
}
INSTEAD = {"functions": "tools", "function_call": "tool_choice"}


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


Stop = Annotated[
    list[str],
    AtMost(MAX_STOP_STRINGS),
    pydantic.BeforeValidator(_as_list, json_schema_input_type=str | list[str]),
]


@dataclasses.dataclass(frozen=True, slots=True)
class Caller:
    """What the server knows of a request before it reads it.

    tenant: a digest of the API key that opened the server, empty if it is open to all.
    service_tier: for requests that name none.
    tool_parser, reasoning_parser: `ServerOptions`' own.
    origin: of a batch's line, a name that no other has: what is left to chance or to the clock elsewhere is
        made from it, so that a line that runs twice has one reply.
    created: of a batch's line, what its prompt and its reply call the time, in seconds since 1970.
    """

    tenant: bytes = b""
    service_tier: str = "default"
    tool_parser: str = "auto"
    reasoning_parser: str = "auto"
    origin: bytes = b""
    created: int | None = None

    def new_id(self, prefix: str, *parts: int) -> str:
        """An id for the reply, or for a numbered part of it, such as a tool call."""
        if not self.origin:
            return f"{prefix}{uuid.uuid4().hex}"
        text = f"{prefix}{parts}".encode()
        return f"{prefix}{hashlib.blake2b(text, key=self.origin, digest_size=16).hexdigest()}"

    def now(self) -> int:
        """When the reply was made, in seconds since 1970."""
        return int(time.time()) if self.created is None else self.created


class Place(TypedDict):
    """Where a request stands in the queue and in the caches, as `check_request` takes it."""

    tier: Tier
    priority: int
    deadline: float | None
    salt: bytes


def _no_obfuscation(value: bool) -> bool:
    if value:
        raise PydanticCustomError("unsupported", "not supported: events are not padded")
    return value


class StreamOptions(Strict):
    include_usage: bool = False
    continuous_usage_stats: bool = False
    include_obfuscation: Annotated[bool, pydantic.AfterValidator(_no_obfuscation)] = False


class PlaceFields(Strict):
    """Which model, and where the request stands in the queue and in the caches."""

    model: str
    service_tier: str | None = None
    priority: int = 0
    cache_salt: str = ""
    timeout: Annotated[float, pydantic.Field(gt=0, allow_inf_nan=False)] | None = None

    def place(self, caller: Caller, now: float) -> Place:
        """`now`: when the request came, by `time.monotonic()`. Raises RequestError naming the field."""
        return Place(
            tier=tier_of(self.service_tier or caller.service_tier),
            priority=self.priority,
            deadline=None if self.timeout is None else now + self.timeout,
            salt=self._salt(caller.tenant),
        )

    def _salt(self, tenant: bytes) -> bytes:
        """Of two keys or two salts no entry of a cache is shared: each makes another digest."""
        salt = self.cache_salt.encode()
        if len(salt) > MAX_CACHE_SALT:
            raise RequestError(
                f"cache_salt has {len(salt)} bytes; at most {MAX_CACHE_SALT}", param="cache_salt"
            )
        return hashlib.blake2b(salt, key=tenant, digest_size=32).digest() if salt or tenant else b""


class SamplingFields(PlaceFields):
    """OpenAI's fields and vLLM's additions. Ranges are `SamplingParams`' matter, types are checked here."""

    n: int = 1
    stream: bool = False
    stream_options: StreamOptions | None = None
    temperature: float = 1.0
    top_p: float = 1.0
    max_tokens: int | None = None
    stop: Stop = pydantic.Field(default_factory=list)
    seed: int | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Annotated[dict[str, float], AtMost(MAX_LOGIT_BIAS)] | None = None

    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    min_tokens: int = 0
    stop_token_ids: Annotated[list[int], AtMost(MAX_STOP_TOKENS)] = pydantic.Field(default_factory=list)
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    allowed_token_ids: Annotated[list[int], AtMost(MAX_TOKEN_IDS)] | None = None
    prompt_logprobs: int | None = None
    include_stop_str_in_output: bool = False
    truncate_prompt_tokens: Annotated[int, pydantic.Field(ge=1)] | None = None

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    @property
    def continuous_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.continuous_usage_stats

    def truncated(self, ids: list[int]) -> list[int]:
        """The last `truncate_prompt_tokens` of a prompt, where that is asked for."""
        return ids if self.truncate_prompt_tokens is None else ids[-self.truncate_prompt_tokens :]

    def check_streaming(self) -> None:
        """What only makes sense with `stream`, and what does not go with it."""
        if self.stream_options is not None and not self.stream:
            raise bad_request("stream_options is only allowed with stream: true", param="stream_options")
        if self.stream and self.prompt_logprobs is not None:
            raise bad_request("prompt_logprobs is not available with stream: true", param="prompt_logprobs")

    def sampling(
        self,
        defaults: Mapping[str, float | int],
        *,
        max_tokens: int | None,
        logprobs: int | None,
        prompt_logprobs: int | None,
        best_of: int | None = None,
        structured: StructuredOutputs | None = None,
    ) -> SamplingParams:
        """`defaults` are the model's own, for fields that the request leaves out.

        Raises RequestError naming the field.
        """

        def given(name: str) -> Any:
            value = getattr(self, name)
            return value if name in self.model_fields_set else defaults.get(name, value)

        return SamplingParams(
            temperature=given("temperature"),
            top_p=given("top_p"),
            top_k=given("top_k"),
            min_p=given("min_p"),
            n=self.n,
            best_of=best_of,
            seed=self.seed,
            max_tokens=max_tokens,
            min_tokens=self.min_tokens,
            stop=tuple(self.stop),
            stop_token_ids=tuple(self.stop_token_ids),
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            repetition_penalty=given("repetition_penalty"),
            logit_bias=None if self.logit_bias is None else _token_keys(self.logit_bias),
            allowed_token_ids=None if self.allowed_token_ids is None else tuple(self.allowed_token_ids),
            logprobs=logprobs,
            prompt_logprobs=prompt_logprobs,
            ignore_eos=self.ignore_eos,
            skip_special_tokens=self.skip_special_tokens,
            structured_outputs=structured,
        )


def service_tier(tier: Tier) -> str:
    """What a reply calls the tier that was used."""
    return "flex" if tier is Tier.BATCH else "default"


def take_known(fields: Mapping[str, Any], model: type[pydantic.BaseModel] | None = None) -> dict[str, Any]:
    """The fields that are left to validate, without nulls, which mean "as if absent".

    Raises ApiError 400 for one that is known, but not to `model`, and asks for something.
    """
    own = frozenset[str]() if model is None else known_fields(model)
    taken = {}
    for name, value in fields.items():
        if value is None:
            continue
        if name in INERT:
            _check_inert(name, value)
        elif name in own or name not in UNSUPPORTED:
            taken[name] = value
        elif not UNSUPPORTED[name](value):
            instead = f": use {INSTEAD[name]}" if name in INSTEAD else ""
            raise bad_request(f"{name} is not supported{instead}", param=name, code="unsupported_parameter")
    return taken


def _check_inert(name: str, value: Any) -> None:
    if name == "metadata":
        if (
            not isinstance(value, dict)
            or len(value) > MAX_METADATA
            or not all(isinstance(one, str) and len(one) <= MAX_METADATA_VALUE for one in value.values())
            or max(map(len, value), default=0) > MAX_METADATA_KEY
        ):
            raise bad_request(
                f"metadata must be at most {MAX_METADATA} pairs of strings, the keys of at most"
                f" {MAX_METADATA_KEY} characters and the values of at most {MAX_METADATA_VALUE}",
                param="metadata",
                code="invalid_value",
            )
    elif name == "store":
        if not isinstance(value, bool):
            raise bad_request("store must be true or false", param=name, code="invalid_value")
    elif not isinstance(value, str) or len(value) > MAX_USER:
        raise bad_request(
            f"{name} must be a string of at most {MAX_USER} characters", param=name, code="invalid_value"
        )


def _token_keys(bias: Mapping[str, float]) -> dict[int, float]:
    """JSON's keys are strings; OpenAI's are token ids in decimal."""
    keyed = {}
    for name, value in bias.items():
        if not re.fullmatch(r"[0-9]{1,10}", name):
            raise RequestError(f"logit_bias: {name[:64]!r} is not a token id", param="logit_bias")
        keyed[int(name)] = value
    return keyed
