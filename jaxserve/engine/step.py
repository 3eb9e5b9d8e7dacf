"""The device's side of a step, as pure functions: state in, state out.

`prefill` and `decode` end in hidden states; the `*_step` functions add the head that draws, and are what is
compiled. Two small ones stand beside them: `edit_slot` and `prompt_logprobs`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from jaxserve.engine import heads
from jaxserve.engine.batch import (
    EDITED,
    RESULT_WIDTH,
    PrefillBatch,
    SamplingRows,
    unpack_decode,
    unpack_prefill,
    unpack_sampling,
)
from jaxserve.engine.state import EngineState, mask_words
from jaxserve.models.decoder import Attend, Decoder, Params, Pool
from jaxserve.scheduler.types import MAX_LOGIT_BIAS
from pallas_kernels import decode_attention, prefill_attention
from pallas_kernels.chips import Chip, chip_of
from pallas_kernels.decode_attention import implementation_for as decode_implementation
from pallas_kernels.prefill_attention import implementation_for as prefill_implementation
from sharding import partition_spec, parts

LOGPROB_CHUNK = 64  # prompt tokens whose whole vocabulary row exists at one time


@dataclasses.dataclass(frozen=True)
class Steps:
    """The step functions of one model on one mesh."""

    model: Decoder
    mesh: Mesh
    pages_per_slot: int

    def prefill(self, params: Params, pool: Pool, batch: PrefillBatch) -> tuple[Float[Array, "T D"], Pool]:
        """Hidden states of packed chunks, and the pool with their keys and values."""
        chip = self._chip

        def call(q: Array, kv: Array, pool: Pool, layer: Array, window: Array, *rows: Array) -> tuple:
            table, starts, counts, offsets = rows
            return prefill_attention(
                q, kv, pool, layer, table, starts, counts, offsets, window, scale=self._scale, chip=chip
            )

        rows = (batch.tables, batch.starts, batch.counts, batch.offsets)
        valid = jnp.arange(batch.tokens.shape[0], dtype=jnp.int32) < jnp.sum(batch.counts)
        return self.model.hidden_states(
            params, pool, batch.tokens, batch.positions, self._attend(call, rows), valid
        )

    def decode(
        self,
        params: Params,
        pool: Pool,
        tokens: Int[Array, " B"],
        positions: Int[Array, " B"],
        tables: Int[Array, "B PP"],
        active: Bool[Array, " B"],
    ) -> tuple[Float[Array, "B D"], Pool]:
        """Hidden states of one token per row, and the pool with its key and value.

        Inactive rows write nothing.
        """
        chip = self._chip

        def call(q: Array, kv: Array, pool: Pool, layer: Array, window: Array, *rows: Array) -> tuple:
            table, lengths = rows
            return decode_attention(q, kv, pool, layer, table, lengths, window, scale=self._scale, chip=chip)

        rows = (tables, jnp.where(active, positions + 1, 0))
        return self.model.hidden_states(params, pool, tokens, positions, self._attend(call, rows), active)

    def prefill_step(
        self, params: Params, state: EngineState, packed: Int[Array, " n"], *, tokens: int, max_rows: int
    ) -> tuple[EngineState, Int[Array, "R result"], Float[Array, "T D"]]:
        """The state after packed chunks, what was drawn after each prompt that ends here, hidden states."""
        batch = unpack_prefill(packed, tokens=tokens, max_rows=max_rows, pages_per_slot=self.pages_per_slot)
        hidden, pool = self.prefill(params, state.pool, batch)
        ends = jnp.clip(batch.starts + batch.counts - 1, 0, tokens - 1)
        used = batch.slots >= 0
        state = dataclasses.replace(
            state, pool=pool, sampling=_scatter(state.sampling, batch.slots, used, batch.sampling)
        )
        return *self._draw(
            params,
            state,
            hidden[ends],
            unpack_sampling(batch.sampling),
            batch.slots,
            positions=batch.offsets + batch.counts,
            active=used & (batch.last != 0),
            reset=used,
            forced=batch.forced,
        ), hidden

    def decode_step(
        self, params: Params, state: EngineState, packed: Int[Array, "B n"], *, max_steps: int
    ) -> tuple[EngineState, Int[Array, "steps B result"]]:
        """The state after as many more tokens as each row asks for, at most `max_steps`, and those tokens.

        A row ends early when it is done, the whole when every row has: the tokens that were not drawn are -1.
        One program for one token and for many: a row's bits do not depend on how they were asked for.
        """
        batch = unpack_decode(packed)
        at = jnp.maximum(batch.slots, 0)
        rows = unpack_sampling(state.sampling[at])

        def active(i: Array, state: EngineState) -> Bool[Array, " B"]:
            return (batch.slots >= 0) & ~state.done[at] & (i < batch.counts)

        def one(i: Array, state: EngineState) -> tuple[EngineState, Int[Array, "B result"]]:
            now = active(i, state)
            at_position = jnp.maximum(batch.positions, 0) + i
            hidden, pool = self.decode(params, state.pool, state.tokens[at], at_position, batch.tables, now)
            return self._draw(
                params,
                dataclasses.replace(state, pool=pool),
                hidden,
                rows,
                batch.slots,
                positions=at_position + 1,
                active=now,
                reset=now,
                forced=jnp.where(i == 0, batch.forced, -1),
            )

        if max_steps == 1:
            state, result = one(jnp.int32(0), state)
            return state, result[None]

        def step(carry: tuple[Array, EngineState, Array]) -> tuple[Array, EngineState, Array]:
            i, state, results = carry
            state, result = one(i, state)
            return i + 1, state, results.at[i].set(result)

        nothing = jnp.full((max_steps, packed.shape[0], RESULT_WIDTH), -1, jnp.int32)
        _, state, results = jax.lax.while_loop(
            lambda carry: jnp.any(active(carry[0], carry[1])), step, (jnp.int32(0), state, nothing)
        )
        return state, results

    def _draw(
        self,
        params: Params,
        state: EngineState,
        hidden: Float[Array, "B D"],
        rows: SamplingRows,
        slots: Int[Array, " B"],
        *,
        positions: Int[Array, " B"],
        active: Bool[Array, " B"],
        reset: Bool[Array, " B"],
        forced: Int[Array, " B"],
    ) -> tuple[EngineState, Int[Array, "B result"]]:
        """Draws for `positions` where active, or takes the `forced` token where that is not negative; `reset`
        rows get a new `done`."""
        rows, slots, positions, active, reset, forced = self._everywhere(
            (rows, slots, positions, active, reset, forced)
        )
        at = jnp.maximum(slots, 0)
        logits = self.model.logits(params, hidden)
        # an unused row must not switch the optional parts on
        rows = rows._replace(
            flags=jnp.where(active, rows.flags, 0),
            temperature=jnp.where(active, rows.temperature, 0.0),
            min_end=jnp.where(active, rows.min_end, 0),
        )
        edits = heads.Edits(state.counts, state.prompt, state.allowed, state.bias_tokens, state.bias)
        drawn = heads.sample(logits, rows, edits, at, positions, self.mesh)
        drawn = jnp.where(active, jnp.where(forced >= 0, forced, drawn), -1)
        stopped = jnp.any(rows.stop == drawn[:, None], axis=1) | (positions + 1 >= rows.limit)
        edited = active & ((rows.flags & EDITED) != 0)
        counted = jnp.where(edited, at, state.counts.shape[0])

        def count(counts: Array) -> Array:
            return counts.at[counted, jnp.maximum(drawn, 0)].add(1, mode="drop")

        state = dataclasses.replace(
            state,
            tokens=_scatter(state.tokens, slots, active, drawn),
            done=_scatter(state.done, slots, reset, active & stopped),
            counts=jax.lax.cond(jnp.any(edited), count, lambda counts: counts, state.counts),
        )
        return state, heads.result_columns(logits, drawn, rows, self.mesh)

    def _everywhere(self, tree: Any) -> Any:
        """Whole on every device: XLA for TPU would divide these few numbers and send them about."""
        if self.mesh.size == 1:
            return tree
        return jax.lax.with_sharding_constraint(tree, NamedSharding(self.mesh, PartitionSpec()))

    def edit_slot(self, state: EngineState, packed: Int[Array, " n"]) -> EngineState:
        """The state with a slot's logit edits replaced; see `batch.pack_edits`."""
        vocab = self.model.config.vocab_size
        words = mask_words(vocab)
        slot = packed[0]
        ends = np.cumsum([words, words, MAX_LOGIT_BIAS, MAX_LOGIT_BIAS])
        allowed, prompt, bias_tokens, bias, counts = jnp.split(packed[1:], ends.tolist())

        def bits(x: Array, dtype: DTypeLike) -> Array:
            return jax.lax.bitcast_convert_type(x, dtype)

        return dataclasses.replace(
            state,
            counts=state.counts.at[slot].set(counts),
            allowed=state.allowed.at[slot].set(bits(allowed, jnp.uint32)),
            prompt=state.prompt.at[slot].set(bits(prompt, jnp.uint32)),
            bias_tokens=state.bias_tokens.at[slot].set(bias_tokens),
            bias=state.bias.at[slot].set(bits(bias, jnp.float32)),
        )

    def mask_slots(self, state: EngineState, packed: Int[Array, "B n"]) -> EngineState:
        """The state with other tokens allowed in some slots; see `batch.pack_masks`."""
        slots, words = packed[:, 0], jax.lax.bitcast_convert_type(packed[:, 1:], jnp.uint32)
        return dataclasses.replace(state, allowed=_scatter(state.allowed, slots, slots >= 0, words))

    def embed(self, hidden: Float[Array, "T D"], packed: Int[Array, "R 2"]) -> Float[Array, "R D"]:
        """f32, the sum of the hidden states of each span; see `batch.pack_spans`."""
        places = jnp.arange(hidden.shape[0], dtype=jnp.int32)[None, :]
        within = (places >= packed[:, :1]) & (places < packed[:, 1:])
        return jnp.matmul(
            within.astype(jnp.float32), hidden.astype(jnp.float32), precision=jax.lax.Precision.HIGHEST
        )

    def prompt_logprobs(
        self, params: Params, hidden: Float[Array, "T D"], targets: Int[Array, " T"]
    ) -> Int[Array, "T result"]:
        """Rows of results for tokens that are given: how likely was targets[t] after hidden[t].

        LOGPROB_CHUNK rows of the vocabulary exist at a time.
        """
        chunk = min(LOGPROB_CHUNK, hidden.shape[0])

        def part(pair: tuple[Array, Array]) -> Array:
            return heads.logprob_columns(self.model.logits(params, pair[0]), pair[1], self.mesh)

        rows = jax.lax.map(part, (hidden.reshape(-1, chunk, hidden.shape[1]), targets.reshape(-1, chunk)))
        return rows.reshape(hidden.shape[0], -1)

    def kernels(self, page_size: int, slots: int, prefill_rows: int) -> dict[str, str]:
        """Kernel -> the implementation of it that this model takes on this mesh."""
        c, mesh = self.model.config, self.mesh
        q = jax.ShapeDtypeStruct((1, c.num_heads // parts(mesh, "heads"), c.head_dim), self.model.dtype)
        width = 2 * c.kv_size // parts(mesh, "kv_heads")
        pool = jax.ShapeDtypeStruct((1, 1, page_size, width), self.model.dtype)
        chip = self._chip

        def table(rows: int) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct((rows, self.pages_per_slot), jnp.int32)

        return {
            "decode attention": decode_implementation(chip, q, pool, table(slots)),
            "prefill attention": prefill_implementation(chip, q, pool, table(prefill_rows)),
        }

    @property
    def _chip(self) -> Chip:
        return chip_of(self.mesh.devices.flat[0])

    @property
    def _scale(self) -> float:
        return self.model.config.head_dim**-0.5

    def _attend(self, call: Callable[..., Any], rows: tuple[Array, ...]) -> Attend:
        """`call` on each device's own heads: attention needs nothing from the others. Devices that hold the
        same key/value head each write it."""
        if self.mesh.size == 1:
            return lambda q, kv, pool, layer, window: call(q, kv, pool, layer, window, *rows)
        q_spec = partition_spec(("token", "heads", "head"))
        kv_spec = partition_spec(("token", "kv_heads"))
        pool_spec = partition_spec(("layer", "page", "token", "kv_heads"))
        everywhere = PartitionSpec()
        mapped = jax.shard_map(
            call,
            mesh=self.mesh,
            in_specs=(q_spec, kv_spec, pool_spec, everywhere, everywhere, *(everywhere for _ in rows)),
            out_specs=(q_spec, pool_spec),
            check_vma=False,
        )
        return lambda q, kv, pool, layer, window: mapped(q, kv, pool, layer, window, *rows)


def _scatter(array: Array, slots: Int[Array, " B"], chosen: Bool[Array, " B"], values: Array) -> Array:
    """`array` with `values[i]` at `slots[i]` where chosen."""
    return array.at[jnp.where(chosen, slots, array.shape[0])].set(values, mode="drop")
