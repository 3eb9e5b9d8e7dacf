"""From a StepPlan to the one int32 array that a program takes: host numpy in, device columns out.

One array a dispatch, because each argument that comes from the host costs microseconds. f32 values travel as
their bits. The `unpack_*` functions run inside the programs and mirror the `pack_*` functions beside them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int
from numpy.typing import NDArray

from jaxserve.scheduler.types import (
    MAX_LOGIT_BIAS,
    MAX_LOGPROBS,
    MAX_STOP_TOKENS,
    DecodeRows,
    PrefillRow,
    SamplingParams,
)

EDITED = 1  # flag: penalties, bias or a token mask; read the slot's rows of the state
LOGPROBS = 2  # flag: log-probability, rank and alternatives of the drawn token are wanted

_FLOATS = (
    "temperature",
    "top_p",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
)
_INTS = ("top_k", "seed_low", "seed_high", "min_end", "limit", "flags")
SAMPLING_WIDTH = len(_FLOATS) + len(_INTS) + MAX_STOP_TOKENS
_ROW = 6  # slot, start, count, offset, last, forced
_DECODE_ROW = 4  # slot, position, count, forced

RESULT_WIDTH = 3 + 2 * MAX_LOGPROBS  # token, logprob, rank, then alternatives and their logprobs


class SamplingRows(NamedTuple):
    """How each of B rows draws. Lengths count tokens from the start of the prompt.

    min_end: a stop token may stand at this position at the earliest.
    limit: prompt and generated tokens together.
    stop: unused entries -1.
    """

    temperature: Float[Array, " B"]
    top_p: Float[Array, " B"]
    min_p: Float[Array, " B"]
    repetition_penalty: Float[Array, " B"]
    presence_penalty: Float[Array, " B"]
    frequency_penalty: Float[Array, " B"]
    top_k: Int[Array, " B"]
    seed_low: Int[Array, " B"]
    seed_high: Int[Array, " B"]
    min_end: Int[Array, " B"]
    limit: Int[Array, " B"]
    flags: Int[Array, " B"]
    stop: Int[Array, "B stops"]


def needs_edits(params: SamplingParams) -> bool:
    return bool(
        params.logit_bias
        or params.allowed_token_ids
        or params.presence_penalty
        or params.frequency_penalty
        or params.repetition_penalty != 1.0
        or params.structured_outputs is not None
    )


def sampling_row(
    params: SamplingParams, *, stop: Sequence[int], seed: int, prompt_len: int, limit: int
) -> NDArray[np.int32]:
    """i32[SAMPLING_WIDTH]"""
    row = np.full(SAMPLING_WIDTH, -1, np.int32)
    floats = np.array([getattr(params, name) for name in _FLOATS], np.float32)
    if params.greedy:
        floats[0] = 0.0
    row[: len(_FLOATS)] = floats.view(np.int32)
    ranked = params.sequences > params.n
    flags = EDITED * needs_edits(params) | LOGPROBS * (params.logprobs is not None or ranked)
    words = np.array([seed & 0xFFFFFFFF, seed >> 32], np.uint32).view(np.int32)
    ints = (max(params.top_k, 0), *words, prompt_len + params.min_tokens, limit, flags)
    row[len(_FLOATS) : len(_FLOATS) + len(_INTS)] = ints
    row[len(_FLOATS) + len(_INTS) :][: len(stop)] = stop
    return row


def unpack_sampling(rows: Int[Array, "B width"]) -> SamplingRows:
    floats = jax.lax.bitcast_convert_type(rows[:, : len(_FLOATS)], jnp.float32)
    ints = rows[:, len(_FLOATS) : len(_FLOATS) + len(_INTS)]
    stop = rows[:, len(_FLOATS) + len(_INTS) :]
    return SamplingRows._make(
        [*(floats[:, i] for i in range(len(_FLOATS))), *(ints[:, i] for i in range(len(_INTS))), stop]
    )


class PrefillBatch(NamedTuple):
    """T packed tokens of R chunks; rows without a chunk have slot -1 and count 0."""

    tokens: Int[Array, " T"]
    positions: Int[Array, " T"]
    slots: Int[Array, " R"]
    starts: Int[Array, " R"]  # of the chunk among the packed tokens
    counts: Int[Array, " R"]
    offsets: Int[Array, " R"]  # position of its first token
    last: Int[Array, " R"]  # 1: draw a token after it
    forced: Int[Array, " R"]  # the token to take instead of drawing, or -1
    sampling: Int[Array, "R width"]
    tables: Int[Array, "R PP"]


def prefill_size(tokens: int, rows: int, pages_per_slot: int) -> int:
    return 2 * tokens + rows * (_ROW + SAMPLING_WIDTH + pages_per_slot)


def pack_prefill(
    rows: Sequence[PrefillRow], *, tokens: int, max_rows: int, pages_per_slot: int
) -> NDArray[np.int32]:
    packed = np.zeros(prefill_size(tokens, max_rows, pages_per_slot), np.int32)
    ids, positions = packed[:tokens], packed[tokens : 2 * tokens]
    table = packed[2 * tokens :].reshape(max_rows, -1)
    table[:, 0] = -1
    start = 0
    for i, row in enumerate(rows):
        count = len(row.tokens)
        ids[start : start + count] = row.tokens
        positions[start : start + count] = np.arange(row.start, row.start + count, dtype=np.int32)
        table[i, :_ROW] = (row.slot, start, count, row.start, row.last, row.forced)
        table[i, _ROW : _ROW + SAMPLING_WIDTH] = sampling_row(
            row.params,
            stop=row.stop_token_ids,
            seed=row.seed,
            prompt_len=row.prompt_len,
            limit=row.max_total_tokens,
        )
        table[i, _ROW + SAMPLING_WIDTH :] = row.table
        start += count
    table[len(rows) :, 1] = start  # empty chunks stand in order too
    return packed


def unpack_prefill(
    packed: Int[Array, " n"], *, tokens: int, max_rows: int, pages_per_slot: int
) -> PrefillBatch:
    table = packed[2 * tokens :].reshape(max_rows, _ROW + SAMPLING_WIDTH + pages_per_slot)
    return PrefillBatch._make(
        [
            packed[:tokens],
            packed[tokens : 2 * tokens],
            *(table[:, i] for i in range(_ROW)),
            table[:, _ROW : _ROW + SAMPLING_WIDTH],
            table[:, _ROW + SAMPLING_WIDTH :],
        ]
    )


class DecodeBatch(NamedTuple):
    """B rows; unused ones have slot -1. Row i draws up to counts[i] tokens."""

    slots: Int[Array, " B"]
    positions: Int[Array, " B"]
    counts: Int[Array, " B"]
    forced: Int[Array, " B"]  # the first token to take instead of drawing, or -1
    tables: Int[Array, "B PP"]


def decode_shape(rows: int, pages_per_slot: int) -> tuple[int, int]:
    return rows, _DECODE_ROW + pages_per_slot


def pack_decode(rows: DecodeRows, *, bucket: int) -> NDArray[np.int32]:
    packed = np.full(decode_shape(bucket, rows.tables.shape[1]), -1, np.int32)
    count = len(rows.slots)
    packed[:count, 0] = rows.slots
    packed[:count, 1] = rows.positions
    packed[:count, 2] = rows.steps
    if rows.forced is not None:
        packed[:count, 3] = rows.forced
    packed[:count, _DECODE_ROW:] = rows.tables
    return packed


def unpack_decode(packed: Int[Array, "B n"]) -> DecodeBatch:
    return DecodeBatch._make([*(packed[:, i] for i in range(_DECODE_ROW)), packed[:, _DECODE_ROW:]])


def allowed_words(params: SamplingParams, vocab_size: int) -> NDArray[np.int32]:
    """i32[W], a bit for each token: those of `allowed_token_ids`, or all."""
    allowed = np.zeros(-(-vocab_size // 32) * 32, np.bool_)
    allowed[slice(None) if params.allowed_token_ids is None else list(params.allowed_token_ids)] = True
    return np.packbits(allowed, bitorder="little").view(np.int32)


def masks_shape(rows: int, vocab_size: int) -> tuple[int, int]:
    return rows, 1 + -(-vocab_size // 32)


def pack_masks(
    slots: Sequence[int], masks: Sequence[NDArray[np.int32]], bucket: int, vocab_size: int
) -> NDArray[np.int32]:
    """i32[bucket, 1 + W]: a slot and the tokens that it may draw next; unused rows have slot -1."""
    packed = np.full(masks_shape(bucket, vocab_size), -1, np.int32)
    packed[: len(slots), 0] = slots
    packed[: len(slots), 1:] = masks
    return packed


def pack_spans(spans: Sequence[tuple[int, int]], rows: int) -> NDArray[np.int32]:
    """i32[rows, 2]: from where to where among the packed tokens; (0, 0) is nothing."""
    packed = np.zeros((rows, 2), np.int32)
    packed[: len(spans)] = spans
    return packed


def edits_size(vocab_size: int) -> int:
    return 1 + 2 * -(-vocab_size // 32) + 2 * MAX_LOGIT_BIAS + vocab_size


def pack_edits(
    slot: int,
    params: SamplingParams,
    prompt: NDArray[np.int32],
    generated: NDArray[np.int32],
    vocab_size: int,
    mask: NDArray[np.int32] | None = None,
) -> NDArray[np.int32]:
    """i32: the slot, its allowed tokens and its prompt's tokens as bits, its logit biases, how often each
    token was generated before (by a sequence that was preempted). mask: i32[W], what its grammar allows."""
    words = -(-vocab_size // 32)
    allowed = allowed_words(params, vocab_size)
    present = np.zeros(words * 32, np.bool_)
    present[prompt] = True
    bias_tokens = np.full(MAX_LOGIT_BIAS, vocab_size, np.int32)
    bias = np.zeros(MAX_LOGIT_BIAS, np.float32)
    for i, (token, value) in enumerate((params.logit_bias or {}).items()):
        bias_tokens[i], bias[i] = token, value
    return np.concatenate(
        [
            np.array([slot], np.int32),
            allowed if mask is None else allowed & mask,
            np.packbits(present, bitorder="little").view(np.int32),
            bias_tokens,
            bias.view(np.int32),
            np.bincount(generated, minlength=vocab_size).astype(np.int32),
        ]
    )


class Results(NamedTuple):
    """What a program says of each row, on the host.

    tokens: i32[rows], -1 where nothing was drawn. logprobs: f32[rows]. ranks: i32[rows].
    top_tokens: i32[rows, MAX_LOGPROBS], best first. top_logprobs: f32[rows, MAX_LOGPROBS].
    """

    tokens: NDArray[np.int32]
    logprobs: NDArray[np.float32]
    ranks: NDArray[np.int32]
    top_tokens: NDArray[np.int32]
    top_logprobs: NDArray[np.float32]


def unpack_results(array: NDArray[np.int32]) -> Results:
    floats = array.view(np.float32)
    return Results(
        array[:, 0],
        floats[:, 1],
        array[:, 2],
        array[:, 3 : 3 + MAX_LOGPROBS],
        floats[:, 3 + MAX_LOGPROBS :],
    )
