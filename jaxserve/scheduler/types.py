"""The words that scheduler, engine and server share: what is asked for, what runs, what is planned.

Plain Python and numpy: nothing here knows of devices, programs, tokenizers or HTTP.
Field names of `SamplingParams` are vLLM's; their meaning and limits are in its docstring.
"""

from __future__ import annotations

import dataclasses
import enum
import json
import math
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

MAX_LOGPROBS = 20  # alternatives per token; the width of the step's result row
MAX_STOP_TOKENS = 16  # stop token ids per request, the model's own end tokens included
MAX_LOGIT_BIAS = 300  # OpenAI's own limit
MAX_STOP_STRINGS = 16
MAX_N = 128
MAX_PRIORITY = 2**31 - 1
MAX_SALT = 1024  # bytes
GREEDY_BELOW = 1e-5  # a temperature under this divides logits into infinities; it means greedy


class RequestError(ValueError):
    """A request that cannot be served as asked.

    param: the field at fault (OpenAI's `error.param`), or None.
    code: a short machine-readable word such as `context_length_exceeded`, or None.
    """

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.param = param
        self.code = code


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class StructuredOutputs:
    """What the text of a reply must look like: exactly one of these (vLLM's names).

    json: a JSON schema, as its text or as the object. json_object: any JSON object. regex: the whole text
    matches it. choice: the text is one of these. grammar: in llguidance's dialect of Lark.
    """

    json: str | Mapping[str, Any] | None = None
    json_object: bool = False
    regex: str | None = None
    choice: tuple[str, ...] | None = None
    grammar: str | None = None

    def __post_init__(self) -> None:
        if isinstance(self.json, Mapping):
            object.__setattr__(self, "json", json.dumps(self.json, ensure_ascii=False))
        if self.choice is not None:
            _tuple(self, "choice")
        given = [f.name for f in dataclasses.fields(self) if getattr(self, f.name) not in (None, False)]
        if len(given) != 1:
            raise RequestError(
                f"structured_outputs must give one of json, json_object, regex, choice and grammar,"
                f" not {', '.join(given) or 'none'}",
                param="structured_outputs",
            )
        for name in ("json", "regex", "grammar"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, str):
                raise RequestError(f"{name} must be a text", param=f"structured_outputs.{name}")
        if self.choice is not None and not (self.choice and all(isinstance(c, str) for c in self.choice)):
            raise RequestError("choice must be a list of texts", param="structured_outputs.choice")

    def source(self) -> tuple[str, str]:
        """What is given, and its text: a JSON list for `choice`, for json_object a schema."""
        if self.json_object:
            return "json", '{"type": "object"}'
        if self.choice is not None:
            return "choice", json.dumps(self.choice)
        name = next(name for name in ("json", "regex", "grammar") if getattr(self, name) is not None)
        return name, getattr(self, name)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How tokens are drawn and when a sequence ends. Raises `RequestError` naming the field.

    numpy's scalars are taken as the Python numbers they hold.

    temperature: 0 is greedy; logits are divided by it otherwise.
    top_p: keep the smallest set of tokens whose probability reaches this, in (0, 1].
    top_k: keep the k likeliest; 0 or -1 keeps all.
    min_p: keep tokens at least this fraction as likely as the likeliest, in [0, 1].
    n: sequences per prompt.
    best_of: draw this many and return the `n` likeliest; at least `n`, and 1 when greedy (OpenAI's old API).
    seed: 0 <= seed < 2**63; None draws one.
    max_tokens: None means what is left of the context.
    min_tokens: stop tokens cannot be drawn before this many, and text before is not searched for `stop`.
    stop: strings that end the text and are not part of it.
    stop_token_ids: tokens that end the sequence, besides the model's own end tokens.
    presence_penalty, frequency_penalty: in [-2, 2], over the generated tokens (OpenAI's formula).
    repetition_penalty: > 0, over prompt and generated tokens (CTRL, Keskar et al. 2019).
    logit_bias: token id -> addition to its logit, in [-100, 100].
    allowed_token_ids: only these can be drawn.
    logprobs: also return this many likeliest alternatives per generated token (0: the token alone).
    prompt_logprobs: likewise for the prompt's tokens.
    ignore_eos: the model's own end tokens do not end the sequence.
    structured_outputs: what the text must look like; not with min_tokens or ignore_eos.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    n: int = 1
    best_of: int | None = None
    seed: int | None = None
    max_tokens: int | None = 16
    min_tokens: int = 0
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] | None = None
    allowed_token_ids: tuple[int, ...] | None = None
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    structured_outputs: StructuredOutputs | None = None

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            object.__setattr__(self, field.name, _plain(getattr(self, field.name)))
        stop: object = self.stop
        if isinstance(stop, str):
            object.__setattr__(self, "stop", (stop,))
        _tuple(self, "stop")
        _tuple(self, "stop_token_ids")
        if self.allowed_token_ids is not None:
            _tuple(self, "allowed_token_ids")
        _number(self, "temperature", 0.0, 100.0)
        _number(self, "top_p", 0.0, 1.0, low_open=True)
        _number(self, "min_p", 0.0, 1.0)
        _number(self, "presence_penalty", -2.0, 2.0)
        _number(self, "frequency_penalty", -2.0, 2.0)
        _number(self, "repetition_penalty", 0.0, 100.0, low_open=True)
        _integer(self, "top_k", -1, 2**31 - 1)
        _integer(self, "n", 1, MAX_N)
        _integer(self, "best_of", 1, MAX_N, optional=True)
        _integer(self, "min_tokens", 0, 2**31 - 1)
        _integer(self, "max_tokens", 0, 2**31 - 1, optional=True)
        _integer(self, "seed", 0, 2**63 - 1, optional=True)
        _integer(self, "logprobs", 0, MAX_LOGPROBS, optional=True)
        _integer(self, "prompt_logprobs", 0, MAX_LOGPROBS, optional=True)
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise RequestError(
                f"min_tokens={self.min_tokens} is more than max_tokens={self.max_tokens}", param="min_tokens"
            )
        if len(self.stop) > MAX_STOP_STRINGS:
            raise RequestError(f"stop has {len(self.stop)} strings; at most {MAX_STOP_STRINGS}", param="stop")
        if not all(isinstance(text, str) and text for text in self.stop):
            raise RequestError("stop must hold non-empty strings", param="stop")
        if len(self.stop_token_ids) > MAX_STOP_TOKENS // 2:
            raise RequestError(
                f"stop_token_ids has {len(self.stop_token_ids)} entries; at most {MAX_STOP_TOKENS // 2}",
                param="stop_token_ids",
            )
        for token in self.stop_token_ids:
            _token_id(token, "stop_token_ids")
        for token in self.allowed_token_ids or ():
            _token_id(token, "allowed_token_ids")
        if self.allowed_token_ids is not None and not self.allowed_token_ids:
            raise RequestError("allowed_token_ids is empty: nothing can be drawn", param="allowed_token_ids")
        if self.structured_outputs is not None:
            for name in ("min_tokens", "ignore_eos"):
                if getattr(self, name):
                    raise RequestError(f"{name} does not go with structured_outputs", param=name)
        self._check_best_of()
        self._check_logit_bias()

    def _check_best_of(self) -> None:
        if self.best_of is None:
            return
        if self.best_of < self.n:
            raise RequestError(f"best_of={self.best_of} is less than n={self.n}", param="best_of")
        if self.best_of > 1 and self.greedy:
            raise RequestError(
                f"best_of={self.best_of} needs a temperature above 0: greedy sequences are all the same",
                param="best_of",
            )

    def _check_logit_bias(self) -> None:
        if self.logit_bias is None:
            return
        if not isinstance(self.logit_bias, Mapping):
            raise RequestError("logit_bias must map token ids to numbers", param="logit_bias")
        bias = {_plain(token): _plain(value) for token, value in self.logit_bias.items()}
        object.__setattr__(self, "logit_bias", bias)  # the caller keeps its own
        if len(self.logit_bias) > MAX_LOGIT_BIAS:
            raise RequestError(
                f"logit_bias has {len(self.logit_bias)} entries; at most {MAX_LOGIT_BIAS}", param="logit_bias"
            )
        for token, value in self.logit_bias.items():
            _token_id(token, "logit_bias")
            if isinstance(value, bool) or not isinstance(value, int | float) or not -100 <= value <= 100:
                raise RequestError(
                    f"logit_bias of token {token} is {value!r}; it must lie in [-100, 100]",
                    param="logit_bias",
                )

    @property
    def greedy(self) -> bool:
        return self.temperature < GREEDY_BELOW

    @property
    def sequences(self) -> int:
        """Sequences to run: `best_of` where it is more than `n`."""
        return max(self.n, self.best_of or 1)


def _plain(value: Any) -> Any:
    """A numpy scalar as the Python value it holds; anything else as it is."""
    return value.item() if isinstance(value, np.generic) else value


def _number(params: SamplingParams, name: str, low: float, high: float, *, low_open: bool = False) -> None:
    value = getattr(params, name)
    # bool is an int in Python; `temperature=True` is a mistake, not 1.0
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise RequestError(f"{name}={value!r} must be a finite number", param=name)
    if isinstance(value, float) and not math.isfinite(value):  # isfinite(10**400) overflows
        raise RequestError(f"{name}={value!r} must be a finite number", param=name)
    if value < low or value > high or (low_open and value == low):
        bracket = "(" if low_open else "["
        raise RequestError(f"{name}={value} must lie in {bracket}{low:g}, {high:g}]", param=name)


def _tuple(params: SamplingParams | StructuredOutputs, name: str) -> None:
    value = getattr(params, name)
    if isinstance(value, str | bytes | Mapping) or not isinstance(value, Iterable):
        raise RequestError(f"{name}={value!r} must be a list", param=name)
    object.__setattr__(params, name, tuple(map(_plain, value)))


def _integer(params: SamplingParams, name: str, low: int, high: int, *, optional: bool = False) -> None:
    value = getattr(params, name)
    if value is None and optional:
        return
    if isinstance(value, bool) or not isinstance(value, int):
        raise RequestError(f"{name}={value!r} must be an integer", param=name)
    if not low <= value <= high:
        raise RequestError(f"{name}={value} must lie in [{low}, {high}]", param=name)


def _token_id(token: object, name: str) -> None:
    if isinstance(token, bool) or not isinstance(token, int) or token < 0:
        raise RequestError(f"{name}: {token!r} is not a token id", param=name)


class Pooling(enum.StrEnum):
    """How the hidden states of a prompt's tokens become one vector."""

    LAST = "last"  # the last token's
    MEAN = "mean"  # their mean


class Tier(enum.StrEnum):
    """Whose turn it is: batch work runs in what online work leaves free, and gives it back."""

    ONLINE = "online"
    BATCH = "batch"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One prompt and how to continue it, validated against a model by `check_request`.

    prompt_token_ids: i32[tokens], at least one.
    stop_token_ids: every token that ends it, the model's own included unless `ignore_eos`; at most
        MAX_STOP_TOKENS.
    max_total_tokens: prompt plus generated tokens, at most the context.
    priority: within its tier, lower runs first.
    deadline: when it ends, finished or not, on the clock of `arrival_time`; None: never.
    salt: prompts share cached pages only with prompts of the same salt.
    grammar: `params.structured_outputs`, compiled: whatever `EngineLike.compile_grammar` made of it.
    pooling: the answer is a vector (`Output.embedding`), and nothing is drawn.
    """

    request_id: str
    prompt_token_ids: NDArray[np.int32]
    params: SamplingParams
    stop_token_ids: tuple[int, ...]
    max_total_tokens: int
    arrival_time: float
    tier: Tier = Tier.ONLINE
    priority: int = 0
    deadline: float | None = None
    salt: bytes = b""
    grammar: Any = None
    pooling: Pooling | None = None


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What a running engine can take: the numbers a request is checked against.

    sampling_defaults: of parameters that a request leaves out, from the model's `generation_config.json`.
    """

    vocab_size: int
    max_model_len: int  # tokens, prompt and generated together
    pool_tokens: int  # tokens that the whole page pool holds
    eos_token_ids: tuple[int, ...] = ()
    sampling_defaults: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def check_request(
    request_id: str,
    prompt_token_ids: Any,
    params: SamplingParams,
    limits: Limits,
    arrival_time: float,
    *,
    tier: Tier = Tier.ONLINE,
    priority: int = 0,
    deadline: float | None = None,
    salt: bytes = b"",
    grammar: Any = None,
    pooling: Pooling | None = None,
) -> Request:
    """The validated request; `pooling` needs max_tokens=0.

    Raises `RequestError` naming the field at fault, as HTTP names it: tier is `service_tier` there, deadline
    is `timeout`, salt is `cache_salt`.
    """
    _check_place(tier, priority, deadline, salt)
    ids = _prompt_ids(prompt_token_ids, limits.vocab_size)
    length = len(ids)
    if length > limits.max_model_len or (length == limits.max_model_len and params.max_tokens != 0):
        raise RequestError(
            f"the prompt has {length} tokens; the context is {limits.max_model_len} tokens"
            " and must hold the prompt and at least one more",
            param="prompt",
            code="context_length_exceeded",
        )
    room = limits.max_model_len - length
    max_tokens = room if params.max_tokens is None else params.max_tokens
    if max_tokens > room:
        raise RequestError(
            f"max_tokens={max_tokens} and a prompt of {length} tokens exceed the context of"
            f" {limits.max_model_len} tokens",
            param="max_tokens",
            code="context_length_exceeded",
        )
    if params.structured_outputs is not None and grammar is None:
        raise ValueError("structured_outputs need their compiled grammar")
    if pooling is not None and (max_tokens or params.sequences > 1 or params.prompt_logprobs is not None):
        raise RequestError("an embedding is of a prompt alone: max_tokens must be 0", param="max_tokens")
    if max_tokens == 0 and params.prompt_logprobs is None and pooling is None:
        raise RequestError("max_tokens=0 needs echo or prompt_logprobs", param="max_tokens")
    if length + max_tokens > limits.pool_tokens:
        raise RequestError(
            f"{length} prompt tokens and max_tokens={max_tokens} need more than the whole page pool of"
            f" {limits.pool_tokens} tokens; lower max_tokens, or start the server with more --kv-pages",
            param="max_tokens",
            code="context_length_exceeded",
        )
    for name in ("stop_token_ids", "allowed_token_ids", "logit_bias"):
        for token in getattr(params, name) or ():
            if token >= limits.vocab_size:
                raise RequestError(
                    f"{name}: token {token} is not in the vocabulary of {limits.vocab_size}", param=name
                )
    own = () if params.ignore_eos else limits.eos_token_ids
    stop = tuple(dict.fromkeys((*params.stop_token_ids, *own)))
    if len(stop) > MAX_STOP_TOKENS:
        raise RequestError(
            f"{len(stop)} stop tokens, the model's own {len(own)} included; at most {MAX_STOP_TOKENS}",
            param="stop_token_ids",
        )
    if params.min_tokens and params.allowed_token_ids and set(params.allowed_token_ids) <= set(stop):
        raise RequestError(
            f"every one of allowed_token_ids ends the sequence, which min_tokens={params.min_tokens} forbids:"
            " no token could be drawn",
            param="allowed_token_ids",
        )
    return Request(
        request_id=request_id,
        prompt_token_ids=ids,
        params=params,
        stop_token_ids=stop,
        max_total_tokens=length + max_tokens,
        arrival_time=arrival_time,
        tier=tier,
        priority=priority,
        deadline=deadline,
        salt=salt,
        grammar=grammar,
        pooling=pooling,
    )


def _check_place(tier: object, priority: object, deadline: object, salt: object) -> None:
    """Raises `RequestError` unless these say where a request stands in the queue and in the cache."""
    if not isinstance(tier, Tier):
        raise RequestError(f"tier={tier!r} must be one of {[t.value for t in Tier]}", param="service_tier")
    if isinstance(priority, bool) or not isinstance(priority, int):
        raise RequestError(f"priority={priority!r} must be an integer", param="priority")
    if abs(priority) > MAX_PRIORITY:
        raise RequestError(
            f"priority={priority} must lie in [-{MAX_PRIORITY}, {MAX_PRIORITY}]", param="priority"
        )
    if deadline is not None and (
        isinstance(deadline, bool) or not isinstance(deadline, int | float) or not abs(deadline) < math.inf
    ):
        raise RequestError(f"deadline={deadline!r} must be a finite number", param="timeout")
    if not isinstance(salt, bytes):
        raise RequestError(f"salt={salt!r} must be bytes", param="cache_salt")
    if len(salt) > MAX_SALT:
        raise RequestError(f"the salt has {len(salt)} bytes; at most {MAX_SALT}", param="cache_salt")


def _prompt_ids(prompt: Any, vocab_size: int) -> NDArray[np.int32]:
    # numpy would take [5, True] for integers
    if isinstance(prompt, list | tuple) and any(isinstance(token, bool) for token in prompt):
        raise RequestError("the prompt must be a list of token ids", param="prompt")
    try:
        ids = np.asarray(prompt)
    except (ValueError, OverflowError) as error:  # ragged lists, integers beyond 64 bits
        raise RequestError("the prompt must be a list of token ids", param="prompt") from error
    if ids.size == 0:
        raise RequestError("the prompt is empty: it must hold at least one token", param="prompt")
    if ids.ndim != 1 or ids.dtype.kind not in "iu":
        raise RequestError("the prompt must be a list of token ids", param="prompt")
    bad = ids[(ids < 0) | (ids >= vocab_size)]
    if bad.size:
        raise RequestError(
            f"the prompt holds token id {int(bad[0])}; ids lie in [0, {vocab_size - 1}]", param="prompt"
        )
    return ids.astype(np.int32)


class Finish(enum.StrEnum):
    """Why a sequence ended (OpenAI's `finish_reason`)."""

    STOP = "stop"  # a stop token or a stop string
    LENGTH = "length"  # max_tokens or the context
    ABORT = "abort"  # the client left
    TIMEOUT = "timeout"  # the deadline passed


class Status(enum.StrEnum):
    WAITING = "waiting"
    PREFILL = "prefill"
    DECODE = "decode"
    PREEMPTED = "preempted"  # waits again, with the output that it had
    FINISHED = "finished"


@dataclasses.dataclass(slots=True, eq=False)
class Sequence:
    """One of a request's `n` continuations, as the scheduler tracks it.

    `computed` and `sampled` count what was *dispatched* in the slot that it holds; `output` holds what was
    *read back*. The difference is in flight, and lost with the slot at a preemption.
    """

    request: Request
    index: int  # 0 .. n-1 within the request
    seed: int
    status: Status = Status.WAITING
    slot: int = -1
    pages: list[int] = dataclasses.field(default_factory=list)
    computed: int = 0  # tokens whose keys and values were dispatched by prefill, or came from the cache
    sampled: int = 0  # tokens whose sampling was dispatched, or that go through prefill
    output: list[int] = dataclasses.field(default_factory=list)
    finish: Finish | None = None
    cached: int = 0  # prompt tokens that came from the prefix cache when it was first admitted
    waits: bool = False  # it has a grammar, and what it drew last was read and has not been followed yet
    admitted_at: float | None = None  # when that was
    # the scheduler's own
    rank: tuple[bool, float, int] = (False, 0.0, 0)  # whose turn it is: the least first
    admitted: int = 0  # the admission's number
    begun: bool = False  # its first chunk was planned once
    resumed: int = 0  # tokens of the output that go through prefill, after a preemption
    matched: int = -1  # pages that came from the prefix cache; -1 before its first chunk in this slot
    scored: bool = False  # all of its prompt's logprobs were read back
    digests: list[bytes] | None = None  # of its whole pages
    known: int = 0  # its first pages, as many as the prefix cache was told of

    @property
    def prompt_len(self) -> int:
        return len(self.request.prompt_token_ids)

    @property
    def prefill_len(self) -> int:
        """Tokens that prefill computes: the prompt, and after a preemption the output, unless replayed."""
        return self.prompt_len + self.resumed

    def tokens(self, start: int, end: int) -> NDArray[np.int32]:
        """i32[end - start], a copy: of the prompt followed by the output."""
        prompt = self.request.prompt_token_ids
        output = self.output[max(start - len(prompt), 0) : max(end - len(prompt), 0)]
        return np.concatenate([prompt[start:end], np.asarray(output, np.int32)])

    @property
    def max_new_tokens(self) -> int:
        return self.request.max_total_tokens - self.prompt_len


@dataclasses.dataclass(frozen=True, slots=True)
class PrefillRow:
    """A chunk of one prompt, and all that the device must know of its sequence.

    The prompt of a sequence that was preempted may go on with the tokens it had generated; `prompt_len` is
    then still the request's. A chunk may start at a page that the prefix cache had, so that `first` says
    nothing about `start`.

    table: i32[pages_per_slot], the sequence's pages in order, covering positions
        0 .. start+len(tokens)-1; the rest is -1.
    targets: i32[chunk], the token that follows each one (-1 after the last), when prompt logprobs are wanted.
    forced: the token that the row must yield instead of drawing one, because it was drawn before a
        preemption; -1: draw.
    generated: i32[k], the tokens generated before a preemption that are now computed as if they were prompt;
        in the first row, if a penalty counts them.
    pooling: its hidden states are to become one vector.
    """

    slot: int
    start: int  # position of tokens[0]
    tokens: NDArray[np.int32]  # i32[chunk]
    table: NDArray[np.int32]
    first: bool  # the sequence's first chunk in this slot: whatever the slot held before is void
    last: bool  # the prompt ends here: draw a token, unless max_total_tokens is prompt_len
    params: SamplingParams
    stop_token_ids: tuple[int, ...]
    seed: int
    prompt_len: int
    max_total_tokens: int
    targets: NDArray[np.int32] | None = None
    prompt: NDArray[np.int32] | None = None  # i32[prompt_len], in the first row if a penalty needs it
    forced: int = -1
    generated: NDArray[np.int32] | None = None
    pooling: Pooling | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class DecodeRows:
    """`steps` more tokens for each running sequence.

    The last one drawn in `slots[i]` enters at `positions[i]`, the one drawn after it at `positions[i] + 1`,
    and so on until the sequence ends.

    tables: covers every position that the row may still write in these steps.
    forced: the token that each row must yield instead of drawing one, -1 where it draws; None if all draw.
    """

    slots: NDArray[np.int32]  # i32[rows]
    positions: NDArray[np.int32]  # i32[rows]
    tables: NDArray[np.int32]  # i32[rows, pages_per_slot], unused entries -1
    forced: NDArray[np.int32] | None = None  # i32[rows]
    steps: int = 1


@dataclasses.dataclass(frozen=True, slots=True)
class StepPlan:
    """What the device does next: a prefill of packed chunks, then one decode step; either may be absent.

    Plain data that does not depend on tokens not read back yet, so it can be sent to other hosts.
    """

    step: int
    prefill: tuple[PrefillRow, ...]
    decode: DecodeRows | None

    @property
    def empty(self) -> bool:
        return not self.prefill and self.decode is None


@dataclasses.dataclass(frozen=True, slots=True)
class SlotView:
    """A held slot, for people to look at.

    status: prefill or decode. prompt, computed, cached, generated: tokens; `computed` of the prompt, of which
    `cached` came from the prefix cache. pages: that it holds; shared: of these, held by others too.
    """

    slot: int
    request_id: str
    index: int
    tier: Tier
    status: Status
    prompt: int
    computed: int
    cached: int
    generated: int
    pages: int
    shared: int
