"""Prefill attention on Hopper: one warpgroup copies keys and values, the others compute (Shah et al. 2024).

A thread block has one query head of a tile of packed tokens. It walks the sequences that the tile touches,
and for each the blocks of cached positions that its tokens may see. Since each token belongs to one sequence,
one running softmax serves them all: to a token of another sequence a block adds exactly nothing. The blocks
lie at multiples of their size, so what a token sees does not depend on how its prompt was cut or packed.
"""

from __future__ import annotations

import functools
import math
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from pallas_kernels import gpu_common as gpu
from pallas_kernels.chips import Chip, ShapeDtype
from pallas_kernels.gpu_common import BLOCK, LOWEST, MASKED
from pallas_kernels.paging import write_tokens
from pallas_kernels.prefill_attention import reference

_FOLDER = pathlib.Path(__file__).parent


def refusal(chip: Chip, q: ShapeDtype, pool: ShapeDtype, table: ShapeDtype) -> str | None:
    """Why this cannot run, or None. Any table will do."""
    return gpu.refusal(chip, q, pool, tuple(gpu.tuned(_FOLDER)))


def prefill_attention(
    q: Float[Array, "T N H"],
    kv: Float[Array, "T 2KH"],
    pool: Float[Array, "L P page 2KH"],
    layer: Int[Array, ""],
    table: Int[Array, "R PP"],
    starts: Int[Array, " R"],
    counts: Int[Array, " R"],
    offsets: Int[Array, " R"],
    window: Int[Array, ""],
    sinks: Float[Array, " N"] | None = None,
    *,
    scale: float,
    soft_cap: float | None = None,
    chip: Chip | None = None,
    interpret: Any = None,
) -> tuple[Float[Array, "T N H"], Float[Array, "L P page 2KH"]]:
    """As `pallas_kernels.prefill_attention`. interpret: plgpu.InterpretGPUParams, to run it without a GPU."""
    tokens, heads, size = q.shape
    layers, num_pages, page, width = pool.shape
    group = heads // (width // (2 * size))
    sizes = gpu.tuned(_FOLDER)[chip.name if chip is not None and chip.platform == "gpu" else "h100"]

    pages, positions = reference._places(table, starts, counts, offsets, tokens, page)
    pool = write_tokens(pool, kv, layer, pages, positions % page)

    interpreted = interpret is not None
    count = gpu.parts(q.dtype)
    exact = count > 1
    ring, keys, warpgroups = tiling(size, exact, sizes)
    shared = ring == 1
    depth = ring // 2
    registers = (232, 40) if size > 128 else (224, 56)  # of a thread that computes, and of one that copies
    per_piece = math.gcd(page, keys)
    pieces = keys // per_piece
    per_block = warpgroups * BLOCK  # tokens
    blocks = -(-tokens // per_block)

    padded = jnp.pad(q.reshape(tokens, heads * size), ((0, -tokens % per_block), (0, 0)))
    queries = jnp.concatenate(gpu.split(padded))
    rows = padded.shape[0]
    flat = pool.reshape(layers * num_pages * page, width)
    first_chunk, last_chunk = _chunks(starts, counts, blocks, per_block)
    scalars = jnp.stack([layer, window]).astype(jnp.int32)
    operands = [queries, flat, table, starts, counts, offsets, first_chunk, last_chunk, scalars]
    if sinks is not None:
        operands.append(sinks.astype(jnp.float32) * gpu.LOG2E)

    def body(
        queries_ref: Any,
        pool_ref: Any,
        table_ref: Any,
        starts_ref: Any,
        counts_ref: Any,
        offsets_ref: Any,
        first_ref: Any,
        last_ref: Any,
        scalars_ref: Any,
        *refs: Any,
        queries_tile: Any,
        tiles: Any,
        queries_barrier: Any,
        full: Any,
        free: Any,
        zeroed: Any,
        part: Any = None,
    ) -> None:
        *sinks_ref, out_ref = refs
        index = jax.lax.axis_index("block")
        which = jax.lax.div(index, jnp.int32(heads))
        head = index - which * heads
        block = (blocks - 1) - which  # the last tokens see most: they begin first
        kv_head = jax.lax.div(head, jnp.int32(group))
        warpgroup = jax.lax.axis_index("warpgroup")
        layer, window = scalars_ref[0], scalars_ref[1]
        first_chunk, last_chunk = first_ref[block], last_ref[block]

        def spans(row: Array, token: Array, length: int) -> tuple[Array, ...]:
            """(start, end, offset, first position, last position) of a chunk within these packed tokens."""
            start, offset = starts_ref[row], offsets_ref[row]
            end = start + counts_ref[row]
            first = offset + jnp.maximum(start, token) - start
            last = offset + jnp.minimum(end, token + length) - start - 1
            return start, end, offset, first, last

        def key_blocks(row: Array) -> tuple[Array, Array]:
            """(first, one past the last) block of positions that the thread block's part of a chunk sees."""
            _, _, _, first, last = spans(row, block * per_block, per_block)
            low = jax.lax.div(jnp.maximum(first - window + 1, 0), jnp.int32(keys))
            high = jax.lax.div(jnp.maximum(last, 0), jnp.int32(keys)) + 1
            return low, jnp.where(last >= first, high, low)

        def held(row: Array) -> tuple[Array, Array]:
            """A chunk's tokens see only positions between these: above the first, below the second. What lies
            elsewhere is not copied, and may be NaN in a page that is."""
            return offsets_ref[row] - window, offsets_ref[row] + counts_ref[row]

        def tile_slot(kind: int, step: Array) -> Array:
            return jnp.int32(0) if shared else jax.lax.rem(step, jnp.int32(depth)) * 2 + kind

        def copy_tiles() -> None:
            def chunk(row: Array, step: Array) -> Array:
                low, high = held(row)

                def one(j: Array, step: Array) -> Array:
                    places = []
                    for p in range(pieces):
                        position = j * keys + p * per_piece
                        nth = jax.lax.div(position, jnp.int32(page))
                        number = table_ref[row, jnp.minimum(nth, table.shape[1] - 1)]
                        number = jnp.clip(number, 0, num_pages - 1)
                        wanted = (position < high) & (position + per_piece - 1 > low)
                        places.append((wanted, (layer * num_pages + number) * page + (position - nth * page)))
                    for kind in range(2):
                        slot = tile_slot(kind, step)
                        columns = pl.ds(pl.multiple_of((kv_head * 2 + kind) * size, size), size)
                        plgpu.barrier_wait(free.at[slot])
                        for p, (wanted, place) in enumerate(places):

                            def copy(
                                slot: Array = slot, columns: Any = columns, p: int = p, place: Array = place
                            ) -> None:
                                rows_of = pl.ds(pl.multiple_of(place, per_piece), per_piece)
                                plgpu.copy_gmem_to_smem(
                                    pool_ref.at[rows_of, columns],
                                    tiles.at[slot, pl.ds(p * per_piece, per_piece)],
                                    full.at[slot],
                                )

                            def leave(slot: Array = slot) -> None:
                                plgpu.barrier_arrive(full.at[slot])

                            pl.when(wanted)(copy)
                            pl.when(jnp.logical_not(wanted))(leave)
                    return step + 1

                return jax.lax.fori_loop(*key_blocks(row), one, step)

            jax.lax.fori_loop(first_chunk, last_chunk + 1, chunk, jnp.int32(0))
            for slot in range(ring):  # no phase of a barrier ends unseen
                plgpu.barrier_wait(free.at[slot])

        def compute() -> None:
            token = block * per_block + warpgroup * BLOCK  # the first of this warpgroup's
            mine = queries_tile.at[pl.ds(warpgroup * count, count)]
            columns = pl.ds(pl.multiple_of(head * size, size), size)
            for p in range(count):
                plgpu.copy_gmem_to_smem(
                    queries_ref.at[pl.ds(pl.multiple_of(p * rows + token, BLOCK), BLOCK), columns],
                    queries_tile.at[warpgroup * count + p],
                    queries_barrier.at[warpgroup],
                )
            for slot in range(ring):
                plgpu.barrier_arrive(free.at[slot])
            plgpu.barrier_wait(queries_barrier.at[warpgroup])

            def chunk(row: Array, carry: Any) -> Any:
                start, end, offset, first, last = spans(row, token, BLOCK)
                low, high = held(row)

                def one(j: Array, carry: Any) -> Any:
                    step, softmax = carry[0], carry[1:]
                    base = j * keys
                    key_slot, value_slot = tile_slot(0, step), tile_slot(1, step)

                    def holds(shape: tuple[int, ...], at: Array) -> Array:
                        position = at + gpu.iota(shape, 0)
                        return (position > low) & (position < high)

                    unheld = (base <= low) | (base + keys > high)
                    plgpu.barrier_wait(full.at[key_slot])

                    def wait_for_values() -> None:
                        """And for the first warpgroup to have zeroed what is not held of them."""
                        plgpu.barrier_wait(full.at[value_slot])
                        if exact:
                            return

                        @pl.when(unheld & (warpgroup == 0))
                        def _() -> None:
                            for k in range(0, keys, BLOCK):
                                tile = tiles.at[value_slot, pl.ds(k, BLOCK)]
                                gpu.zero_unheld(tile, functools.partial(holds, at=base + k))
                            plgpu.barrier_arrive(zeroed.at[value_slot])

                        if warpgroups > 1:
                            pl.when(unheld & (warpgroup > 0))(
                                lambda: plgpu.barrier_wait(zeroed.at[value_slot])
                            )

                    def attend(seen: Array, top: Array, total: Array) -> tuple[Array, Array, Array]:
                        scores = gpu.query_key(mine, tiles.at[key_slot], part, interpret=interpreted)
                        plgpu.barrier_arrive(free.at[key_slot])
                        scores = gpu.bent(scores, scale, soft_cap)

                        def mask(scores: Array) -> Array:
                            index = token + gpu.iota(scores.shape, 0)
                            ahead = (offset - start - base) + index - gpu.iota(scores.shape, 1)
                            visible = (index >= start) & (index < end) & (ahead >= 0) & (ahead < window)
                            return jnp.where(visible, scores, MASKED)

                        whole = (start <= token) & (token + BLOCK <= end) & (base + keys - 1 <= first)
                        whole &= last - base < window
                        scores = jax.lax.cond(whole, lambda x: x, mask, scores)
                        weights, keep, top, total = gpu.softmax_step(scores, top, total)
                        wait_for_values()
                        there = functools.partial(holds, at=base)
                        seen = seen * gpu.along_rows(keep, seen)
                        tile = tiles.at[value_slot]
                        seen = gpu.weigh(seen, weights, tile, part, there, interpret=interpreted)
                        plgpu.barrier_arrive(free.at[value_slot])
                        return seen, top, total

                    def skip(seen: Array, top: Array, total: Array) -> tuple[Array, Array, Array]:
                        plgpu.barrier_arrive(free.at[key_slot])
                        wait_for_values()
                        plgpu.barrier_arrive(free.at[value_slot])
                        return seen, top, total

                    sees = (first <= last) & (base <= last) & (base + keys > first - window + 1)
                    return (step + 1, *jax.lax.cond(sees, attend, skip, *softmax))

                return jax.lax.fori_loop(*key_blocks(row), one, carry)

            if sinks_ref:
                top, total = sinks_ref[0][head], jnp.float32(1.0)
            else:
                top, total = jnp.float32(LOWEST), jnp.float32(0.0)
            begin = (
                jnp.int32(0),
                plgpu.layout_cast(jnp.zeros((BLOCK, size), jnp.float32), plgpu.Layout.WGMMA),
                gpu.row_layout(jnp.full((BLOCK,), top, jnp.float32)),
                gpu.row_layout(jnp.full((BLOCK,), total, jnp.float32)),
            )
            _, seen, _, total = jax.lax.fori_loop(first_chunk, last_chunk + 1, chunk, begin)
            out = seen * gpu.along_rows(1.0 / jnp.maximum(total, 1e-30), seen)
            tile = tiles.at[0] if exact else queries_tile.at[warpgroup]
            tile[...] = out.astype(q.dtype)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(tile, out_ref.at[pl.ds(pl.multiple_of(token, BLOCK), BLOCK), columns])
            plgpu.wait_smem_to_gmem(0)

        @pl.when(warpgroup < warpgroups)
        def _() -> None:
            if warpgroups == 2:
                plgpu.set_max_registers(registers[0], action="increase")
            compute()

        @pl.when(warpgroup == warpgroups)
        def _() -> None:
            if warpgroups == 2:
                plgpu.set_max_registers(registers[1], action="decrease")
            copy_tiles()

    scratch: dict[str, Any] = {
        "queries_tile": plgpu.SMEM(
            (warpgroups * count, BLOCK, size), jnp.bfloat16, transforms=gpu.transforms(size)
        ),
        "tiles": plgpu.SMEM((ring, keys, size), q.dtype, transforms=() if exact else gpu.transforms(size)),
        "queries_barrier": plgpu.Barrier(num_arrivals=count, num_barriers=warpgroups),
        "full": plgpu.Barrier(num_arrivals=pieces, num_barriers=ring),
        "free": plgpu.Barrier(num_arrivals=warpgroups, num_barriers=ring),
        "zeroed": plgpu.Barrier(num_barriers=ring),
    }
    if exact:
        scratch["part"] = plgpu.SMEM((keys, size), jnp.bfloat16, transforms=gpu.transforms(size))
    out = plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct(padded.shape, q.dtype),
        scratch_types=scratch,
        grid=(blocks * heads,),
        grid_names=("block",),
        num_threads=warpgroups + 1,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(approx_math=True),
        interpret=interpret,
        kernel_name="prefill_attention",
    )(*operands)
    return out[:tokens].reshape(tokens, heads, size), pool


def tiling(size: int, exact: bool, sizes: dict[str, int]) -> tuple[int, int, int]:
    """(tiles in flight, positions of each, warpgroups that compute). An only tile is for keys and values."""
    if exact:
        return (1 if size > 128 else 2), BLOCK, 1
    return sizes["tiles"], (BLOCK if size > 128 else sizes["keys"]), sizes["warpgroups"]


def _chunks(
    starts: Int[Array, " R"], counts: Int[Array, " R"], blocks: int, per_block: int
) -> tuple[Int[Array, " blocks"], Int[Array, " blocks"]]:
    """(first, last) chunk with a token in each block of packed tokens; (0, -1) where there is none."""
    at = jnp.arange(blocks, dtype=jnp.int32)[:, None] * per_block
    start, count = starts[None, :], counts[None, :]
    touches = (count > 0) & (start < at + per_block) & (start + count > at)  # [blocks, R]
    row = jnp.arange(starts.shape[0], dtype=jnp.int32)[None, :]
    last = jnp.max(jnp.where(touches, row, -1), axis=1)
    first = jnp.min(jnp.where(touches, row, starts.shape[0]), axis=1)
    return jnp.where(last < 0, 0, first), last
