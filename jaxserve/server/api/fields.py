"""The request fields that completions and chat share, and those that neither takes yet.

A field is honoured, accepted because it asks for nothing of the model (INERT), or refused by name. Knows
nothing of prompts and messages.
"""

from __future__ import annotations

import dataclasses
import hashlib
import re
from collections.abc import Callable, Mapping
from typing import Annotated, Any, TypedDict

import pydantic

from jaxserve.prompts import tier_of
from jaxserve.scheduler.types import RequestError, SamplingParams, Tier
from jaxserve.server.errors import bad_request

MAX_SEQUENCES = 2048  # prompts times n (or best_of), of one HTTP request
MAX_CACHE_SALT = 256  # bytes

INERT = frozenset({"user", "metadata", "store", "safety_identifier"})


def _only(*values: Any) -> Callable[[Any], bool]:
    return lambda value: any(type(value) is type(allowed) and value == allowed for allowed in values)


# known to OpenAI or vLLM, not supported here yet -> whether a value asks for what happens anyway
UNSUPPORTED: Mapping[str, Callable[[Any], bool]] = {
    "response_format": _only({"type": "text"}),
    "modalities": _only(["text"]),
    **dict.fromkeys(
        (
            *("audio", "function_call", "functions", "parallel_tool_calls", "prediction", "suffix"),
            *("prompt_cache_key", "prompt_cache_retention", "reasoning_effort", "verbosity"),
            *("tool_choice", "tools", "web_search_options", "request_id"),
            *("structured_outputs", "guided_json", "guided_regex", "guided_choice", "guided_grammar"),
            *("bad_words", "use_beam_search", "length_penalty", "include_stop_str_in_output"),
            *("truncate_prompt_tokens", "spaces_between_special_tokens", "return_token_ids"),
            *("return_tokens_as_token_ids", "logits_processors", "add_generation_prompt"),
            *("continue_final_message", "chat_template", "chat_template_kwargs", "documents"),
            *("prompt_embeds", "mm_processor_kwargs", "kv_transfer_params", "vllm_xargs"),
        ),
        _only(),
    ),
}


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


@dataclasses.dataclass(frozen=True, slots=True)
class Caller:
    """What the server knows of a request before it reads it.

    tenant: a digest of the API key that opened the server, empty if it is open to all.
    service_tier: for requests that name none.
    """

    tenant: bytes = b""
    service_tier: str = "default"


class Place(TypedDict):
    """Where a request stands in the queue and in the caches, as `check_request` takes it."""

    tier: Tier
    priority: int
    deadline: float | None
    salt: bytes


class StreamOptions(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(strict=True, extra="forbid")

    include_usage: bool = False
    include_obfuscation: bool = False

    @pydantic.field_validator("include_obfuscation")
    @classmethod
    def _plain(cls, value: bool) -> bool:
        if value:
            raise ValueError("not supported yet")
        return value


class SamplingFields(pydantic.BaseModel):
    """OpenAI's fields and vLLM's additions. Ranges are `SamplingParams`' matter, types are checked here."""

    model_config = pydantic.ConfigDict(strict=True, extra="forbid", protected_namespaces=())

    model: str
    n: int = 1
    stream: bool = False
    stream_options: StreamOptions | None = None
    temperature: float = 1.0
    top_p: float = 1.0
    max_tokens: int | None = None
    stop: Annotated[list[str], pydantic.BeforeValidator(_as_list)] = []
    seed: int | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: dict[str, float] | None = None

    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    min_tokens: int = 0
    stop_token_ids: list[int] = []
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    allowed_token_ids: list[int] | None = None
    prompt_logprobs: int | None = None

    service_tier: str | None = None
    priority: int = 0
    cache_salt: str = ""
    timeout: Annotated[float, pydantic.Field(gt=0, allow_inf_nan=False)] | None = None

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    def check_streaming(self) -> None:
        """What only makes sense with `stream`, and what does not go with it."""
        if self.stream_options is not None and not self.stream:
            raise bad_request("stream_options is only allowed with stream: true", param="stream_options")
        if self.stream and self.prompt_logprobs is not None:
            raise bad_request("prompt_logprobs is not available with stream: true", param="prompt_logprobs")

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

    def sampling(
        self,
        defaults: Mapping[str, float | int],
        *,
        max_tokens: int | None,
        logprobs: int | None,
        prompt_logprobs: int | None,
        best_of: int | None = None,
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
        )


def service_tier(tier: Tier) -> str:
    """What a reply calls the tier that was used."""
    return "flex" if tier is Tier.BATCH else "default"


def take_known(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that are left to validate; raises ApiError 400 for one that is known but not served yet."""
    taken = {}
    for name, value in fields.items():
        harmless = UNSUPPORTED.get(name)
        if harmless is not None:
            if not harmless(value):
                raise bad_request(f"{name} is not supported yet", param=name, code="unsupported_parameter")
        elif name not in INERT:
            taken[name] = value
    return taken


def _token_keys(bias: Mapping[str, float]) -> dict[int, float]:
    """JSON's keys are strings; OpenAI's are token ids in decimal."""
    keyed = {}
    for name, value in bias.items():
        if not re.fullmatch(r"[0-9]{1,10}", name):
            raise RequestError(f"logit_bias: {name[:64]!r} is not a token id", param="logit_bias")
        keyed[int(name)] = value
    return keyed
