"""Which programs serving needs: how many rows or tokens each takes, and their registration."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from jaxserve.engine import batch
from jaxserve.engine.programs import Program, Programs
from jaxserve.engine.state import EngineState, StateShape, abstract_state
from jaxserve.engine.step import Steps
from jaxserve.models.decoder import Params

PAGES_MOVED = 8  # pages that go from one pool to another at a time
MAX_PREFILL_ROWS = 16  # prompts that end in one chunk; each costs a row of the output head


def decode_buckets(max_slots: int) -> list[int]:
    """Rows per decode program: halves of `max_slots` down to 4, so that 9 sequences do not pay for 32, and
    2 for a sequence alone.

    Never 1: XLA turns a scatter of one row into an update that copies the whole pool in every layer, and at
    16 bits one row misses its fast product on CPU (a head of 49,152 tokens by 576 took 55 ms with one row
    and 3.3 with two).
    """
    least = 2
    sizes = {least, max(max_slots, least)}
    while max_slots >= 8:
        max_slots //= 2
        sizes.add(max_slots)
    return sorted(sizes)


def prefill_buckets(chunk: int, max_slots: int) -> dict[int, int]:
    """Packed tokens -> rows, a fourfold apart; multiples of the attention's query block, or at most 64, which
    is what prompt logprobs take at a time."""
    largest = -(-chunk // 128) * 128 if chunk > 64 else -(-chunk // 16) * 16
    sizes = {largest}
    while largest > 32:
        smaller = largest // 4
        largest = -(-smaller // 128) * 128 if smaller > 128 else max(32, 1 << (smaller - 1).bit_length())
        sizes.add(largest)
    most = max(2, min(MAX_PREFILL_ROWS, max_slots))
    return {tokens: min(most, max(2, tokens // 16)) for tokens in sorted(sizes)}


def mask_buckets(max_slots: int) -> list[int]:
    """Slots whose masks are written at a time."""
    return sorted({2, min(16, max(max_slots, 2)), max(max_slots, 2)})


def register_programs(
    steps: Steps,
    params: Params,
    shape: StateShape,
    prefill_rows: dict[int, int],
    decode_rows: list[int],
    max_steps: int = 1,
) -> Programs:
    """Every program that serving needs, the slowest to compile first; `params` may be abstract.

    prefill_rows, decode_rows: the buckets. max_steps: tokens that a decode program can draw per dispatch.
    """
    model, mesh = steps.model, steps.mesh
    state = abstract_state(model.config, shape, model.dtype, mesh)
    state_out = jax.tree.map(lambda leaf: leaf.sharding, state)
    everywhere = NamedSharding(mesh, PartitionSpec())

    def ints(*size: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(size, jnp.int32, sharding=everywhere)

    programs = Programs()
    for tokens, rows in sorted(prefill_rows.items(), reverse=True):

        def prefill(
            params: Params, state: Any, packed: jax.Array, tokens: int = tokens, rows: int = rows
        ) -> Any:
            return steps.prefill_step(params, state, packed, tokens=tokens, max_rows=rows)

        packed = ints(batch.prefill_size(tokens, rows, shape.pages_per_slot))
        programs.register(
            Program(
                "prefill",
                tokens,
                prefill,
                (params, state, packed),
                donate=(1,),
                lasting=(0, 1),
                out_shardings=(state_out, everywhere, everywhere),
            )
        )
    for rows in sorted(decode_rows, reverse=True):
        programs.register(
            Program(
                "decode",
                rows,
                functools.partial(steps.decode_step, max_steps=max_steps),
                (params, state, ints(*batch.decode_shape(rows, shape.pages_per_slot))),
                donate=(1,),
                lasting=(0, 1),
                out_shardings=(state_out, everywhere),
            )
        )
    for tokens in prefill_rows:
        hidden = jax.ShapeDtypeStruct((tokens, model.config.hidden_size), model.dtype, sharding=everywhere)
        programs.register(
            Program(
                "prompt_logprobs",
                tokens,
                steps.prompt_logprobs,
                (params, hidden, ints(tokens)),
                lasting=(0,),
                out_shardings=everywhere,
            )
        )
        programs.register(
            Program(
                "embed",
                tokens,
                steps.embed,
                (hidden, ints(prefill_rows[tokens], 2)),
                out_shardings=everywhere,
            )
        )
    for rows in mask_buckets(shape.max_slots):
        programs.register(
            Program(
                "mask_slots",
                rows,
                steps.mask_slots,
                (state, ints(*batch.masks_shape(rows, model.config.vocab_size))),
                donate=(0,),
                lasting=(0,),
                out_shardings=state_out,
            )
        )
    programs.register(
        Program(
            "edit_slot",
            1,
            steps.edit_slot,
            (state, ints(batch.edits_size(model.config.vocab_size))),
            donate=(0,),
            lasting=(0,),
            out_shardings=state_out,
        )
    )
    return programs


def register_moves(programs: Programs, steps: Steps, shape: StateShape) -> None:
    """What copies pages out of one pool, and into another: PAGES_MOVED at a time."""
    model, mesh = steps.model, steps.mesh
    state = abstract_state(model.config, shape, model.dtype, mesh)
    ids = jax.ShapeDtypeStruct((PAGES_MOVED,), jnp.int32, sharding=NamedSharding(mesh, PartitionSpec()))
    block = jax.ShapeDtypeStruct(
        (state.pool.shape[0], PAGES_MOVED, *state.pool.shape[2:]),
        state.pool.dtype,
        sharding=state.pool.sharding,
    )

    # page by page: XLA makes a gather or a scatter along the second axis one along the first, of a copy

    def copy(state: EngineState, ids: jax.Array) -> jax.Array:
        pages = [jax.lax.dynamic_slice_in_dim(state.pool, ids[i], 1, axis=1) for i in range(PAGES_MOVED)]
        return jnp.concatenate(pages, axis=1)

    def place(state: EngineState, ids: jax.Array, block: jax.Array) -> EngineState:
        def one(i: jax.Array, pool: jax.Array) -> jax.Array:
            at, new = jnp.maximum(ids[i], 0), jax.lax.dynamic_slice_in_dim(block, i, 1, axis=1)
            old = jax.lax.dynamic_slice_in_dim(pool, at, 1, axis=1)
            new = jnp.where(ids[i] >= 0, new, old)
            return jax.lax.dynamic_update_slice_in_dim(pool, new, at, axis=1)

        return dataclasses.replace(state, pool=jax.lax.fori_loop(0, PAGES_MOVED, one, state.pool))

    programs.register(
        Program("copy_pages", PAGES_MOVED, copy, (state, ids), lasting=(0,), out_shardings=block.sharding)
    )
    programs.register(
        Program(
            "place_pages",
            PAGES_MOVED,
            place,
            (state, ids, block),
            donate=(0,),
            lasting=(0,),
            out_shardings=jax.tree.map(lambda leaf: leaf.sharding, state),
        )
    )
