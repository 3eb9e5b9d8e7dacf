"""Drives a model's pure steps by hand: chunks packed as a test says, pages scattered over a pool of NaN.

No scheduler and no engine: what a test compares here is `Steps.prefill`, `Steps.decode` and the output head.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import Mesh
from numpy.typing import NDArray

from jaxserve.engine.batch import SAMPLING_WIDTH, PrefillBatch
from jaxserve.engine.step import Steps
from jaxserve.models.decoder import Decoder, Params
from sharding import named_sharding

# One dispatch: (sequence, first position, tokens) of each chunk in it.
Chunks = list[tuple[int, int, int]]


def whole(lengths: Sequence[int]) -> list[Chunks]:
    """Each prompt alone and in one piece."""
    return [[(i, 0, length)] for i, length in enumerate(lengths)]


def chunked(lengths: Sequence[int], tokens: int, rows: int, rng: np.random.Generator) -> list[Chunks]:
    """Random pieces of random prompts, at most `rows` of them and `tokens` in all at a time."""
    done = [0] * len(lengths)
    steps: list[Chunks] = []
    while any(at < length for at, length in zip(done, lengths, strict=True)):
        room, step = tokens, []
        left = [i for i, length in enumerate(lengths) if done[i] < length]
        for i in rng.permutation(left)[: rng.integers(1, rows + 1)]:
            count = min(room, lengths[i] - done[i], int(rng.integers(1, 130)))
            if count:
                step.append((int(i), done[i], count))
                done[i] += count
                room -= count
        steps.append(step)
    return steps


@dataclasses.dataclass
class Cache:
    """The pool and each sequence's page table, i32[sequences, pages_per_slot]."""

    pool: jax.Array
    tables: NDArray[np.int32]

    def used(self, lengths: Sequence[int]) -> NDArray[np.bool_]:
        """bool[pages, page]: where sequences of these lengths keep a token."""
        pages, page = self.pool.shape[1:3]
        held = np.zeros((pages, page), np.bool_)
        for table, length in zip(self.tables, lengths, strict=True):
            at = np.arange(length)
            held[table[at // page], at % page] = True
        return held


class Driver:
    """One model with its two compiled programs: `tokens` packed in `rows` chunks, and `slots` decode rows."""

    def __init__(
        self,
        model: Decoder,
        params: Params,
        mesh: Mesh,
        *,
        page: int,
        max_len: int,
        tokens: int = 384,
        rows: int = 4,
        slots: int = 8,
    ) -> None:
        self.model, self.params, self.mesh = model, params, mesh
        self.page, self.pages_per_slot = page, -(-max_len // page)
        self.tokens, self.rows, self.slots = tokens, rows, slots
        steps = Steps(model, mesh, self.pages_per_slot)

        def prefill(params: Params, pool: jax.Array, batch: PrefillBatch) -> tuple[jax.Array, jax.Array]:
            hidden, pool = steps.prefill(params, pool, batch)
            return model.logits(params, hidden), pool

        def decode(params: Params, pool: jax.Array, *args: jax.Array) -> tuple[jax.Array, jax.Array]:
            hidden, pool = steps.decode(params, pool, *args)
            return model.logits(params, hidden), pool

        self._prefill = jax.jit(prefill, donate_argnums=1)
        self._decode = jax.jit(decode, donate_argnums=1)

    def cache(self, lengths: Sequence[int], rng: np.random.Generator) -> Cache:
        """NaN everywhere; pages in random order for sequences that grow to `lengths`, the rest nobody's."""
        counts = [-(-length // self.page) for length in lengths]
        pages = self.slots * self.pages_per_slot  # a fixed number: one more compiles again
        free = list(rng.permutation(pages))
        tables = np.full((len(lengths), self.pages_per_slot), -1, np.int32)
        for table, count in zip(tables, counts, strict=True):
            table[:count] = [free.pop() for _ in range(count)]
        config = self.model.config
        pool = np.full((config.num_layers, pages, self.page, 2 * config.kv_size), np.nan, self.model.dtype)
        axes = ("layer", "page", "token", "kv_heads")
        return Cache(jax.device_put(pool, named_sharding(self.mesh, axes)), tables)

    def prefill(
        self, cache: Cache, prompts: Sequence[NDArray[np.int32]], steps: Sequence[Chunks]
    ) -> list[NDArray[np.float32]]:
        """Logits after every token of every prompt: f32[length, V] each."""
        vocab = self.model.config.vocab_size
        logits = [np.full((len(prompt), vocab), np.nan, np.float32) for prompt in prompts]
        for chunks in steps:
            batch = self._pack(cache, prompts, chunks)
            out, cache.pool = self._prefill(self.params, cache.pool, batch)
            host = np.asarray(out)
            for (i, start, count), at in zip(chunks, batch.starts, strict=False):
                logits[i][start : start + count] = host[at : at + count]
        return logits

    def _pack(self, cache: Cache, prompts: Sequence[NDArray[np.int32]], chunks: Chunks) -> PrefillBatch:
        tokens, positions = np.zeros((2, self.tokens), np.int32)
        slots, starts, counts, offsets = np.zeros((4, self.rows), np.int32)
        slots[:] = -1
        tables = np.full((self.rows, self.pages_per_slot), -1, np.int32)
        at = 0
        for row, (i, start, count) in enumerate(chunks):
            tokens[at : at + count] = prompts[i][start : start + count]
            positions[at : at + count] = np.arange(start, start + count)
            slots[row], starts[row], counts[row], offsets[row] = i, at, count, start
            tables[row] = cache.tables[i]
            at += count
        starts[len(chunks) :] = at
        last, forced = np.zeros(self.rows, np.int32), np.full(self.rows, -1, np.int32)
        sampling = np.zeros((self.rows, SAMPLING_WIDTH), np.int32)
        fields = tokens, positions, slots, starts, counts, offsets, last, forced, sampling, tables
        return PrefillBatch(*fields)  # type: ignore[arg-type]

    def decode(self, cache: Cache, tokens: Sequence[int], positions: Sequence[int]) -> NDArray[np.float32]:
        """Logits after one more token of each sequence, f32[sequences, V]. Rows stand in reverse, with idle
        rows between whose token and position are nonsense."""
        count = len(tokens)
        at = np.arange(count)[::-1] + (self.slots - count) // 2
        ids, places = np.full(self.slots, 7, np.int32), np.full(self.slots, 3, np.int32)
        tables = np.zeros((self.slots, self.pages_per_slot), np.int32)  # an idle row names a page in use
        active = np.zeros(self.slots, np.bool_)
        ids[at], places[at], tables[at], active[at] = tokens, positions, cache.tables, True
        out, cache.pool = self._decode(self.params, cache.pool, ids, places, tables, active)
        return np.asarray(out)[at]

    def greedy(
        self, cache: Cache, last: Sequence[NDArray[np.float32]], lengths: Sequence[int], steps: int
    ) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
        """After prompts of `lengths` whose last logits are `last`: (i32[sequences, steps] tokens, the logits
        that each was chosen from, f32[sequences, steps, V])."""
        logits = np.stack(last)
        tokens, seen = [], []
        for step in range(steps):
            seen.append(logits)
            tokens.append(np.argmax(logits, axis=-1).astype(np.int32))
            if step + 1 < steps:
                places = [length + step for length in lengths]
                logits = self.decode(cache, tokens[-1].tolist(), places)
        return np.stack(tokens, axis=1), np.stack(seen, axis=1)


def relative_error(got: NDArray[np.float32], want: NDArray[np.float32]) -> float:
    """The largest ‖got - want‖ / ‖want‖ over rows of logits; inf for a NaN."""
    wide = want.astype(np.float64)
    error = np.linalg.norm(got - wide, axis=-1) / np.linalg.norm(wide, axis=-1)
    return float(np.nan_to_num(error, nan=np.inf).max())
