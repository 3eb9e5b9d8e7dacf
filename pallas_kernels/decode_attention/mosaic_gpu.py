"""Decode attention on Hopper: the cached positions of each row are split, and the splits merged (Dao 2023).

Where a row is split follows from its own length and window alone: neither the other rows nor the chip's load
move it, so a row's bits are its own. All rows' splits are listed; a fixed number of thread blocks walks that
list, one head of one split at a time, so that a few long rows fill the card as well as many short ones. Each
thread block is one warpgroup, which copies tiles of keys and values ahead of what it computes. The queries of
a key/value head are padded to the 64 rows that wgmma multiplies.
"""

from __future__ import annotations

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

_FOLDER = pathlib.Path(__file__).parent
MERGED_AT_ONCE = 4


def refusal(chip: Chip, q: ShapeDtype, pool: ShapeDtype, table: ShapeDtype) -> str | None:
    """Why this cannot run, or None. Any table will do."""
    return gpu.refusal(chip, q, pool, tuple(gpu.tuned(_FOLDER)))


def decode_attention(
    q: Float[Array, "B N H"],
    kv: Float[Array, "B 2KH"],
    pool: Float[Array, "L P page 2KH"],
    layer: Int[Array, ""],
    table: Int[Array, "B PP"],
    lengths: Int[Array, " B"],
    window: Int[Array, ""],
    sinks: Float[Array, " N"] | None = None,
    *,
    scale: float,
    soft_cap: float | None = None,
    chip: Chip | None = None,
    interpret: Any = None,
) -> tuple[Float[Array, "B N H"], Float[Array, "L P page 2KH"]]:
    """As `pallas_kernels.decode_attention`. interpret: plgpu.InterpretGPUParams, to run it without a GPU."""
    page = pool.shape[2]
    sizes = gpu.tuned(_FOLDER)[chip.name if chip is not None and chip.platform == "gpu" else "h100"]

    last = jnp.maximum(lengths - 1, 0)
    own_page = jnp.take_along_axis(table, (last // page)[:, None], axis=1)[:, 0]
    pool = write_tokens(pool, kv, layer, jnp.where(lengths > 0, own_page, -1), last % page)

    splits = max(1, min(sizes["most_splits"], -(-table.shape[1] * page // sizes["split"])))
    work, count, counts = _work(lengths, window, splits, sizes["split"])
    seen, stats = _splits(
        q, pool, layer, table, work, count, splits, sizes, scale=scale, soft_cap=soft_cap, interpret=interpret
    )
    kv_heads = pool.shape[3] // (2 * q.shape[2])
    return _merge(seen, stats, counts, sinks, splits, kv_heads, like=q, interpret=interpret), pool


def _work(
    lengths: Int[Array, " B"], window: Int[Array, ""], splits: int, least: int
) -> tuple[Int[Array, "W 4"], Int[Array, ""], Int[Array, " B"]]:
    """((row, split, first position, one past the last) of each piece of work, how many there are, splits of
    each row).

    A row has as many splits of `least` positions as it needs, or `splits` longer ones; an empty row has none.
    """
    begin = jnp.maximum(lengths - window, 0)
    base = begin - jax.lax.rem(begin, jnp.int32(BLOCK))
    held = jnp.where(lengths > 0, lengths - base, 0)
    length = _cdiv(_cdiv(held, splits), BLOCK) * BLOCK
    length = jnp.maximum(length, least)
    counts = _cdiv(held, length)
    ends = jnp.cumsum(counts, dtype=jnp.int32)
    at = jnp.arange(lengths.shape[0] * splits, dtype=jnp.int32)
    row = jnp.sum(ends[None, :] <= at[:, None], axis=1, dtype=jnp.int32)
    row = jnp.minimum(row, lengths.shape[0] - 1)
    split = at - (ends - counts)[row]
    first = base[row] + split * length[row]
    work = [row, split, jnp.maximum(first, begin[row]), jnp.minimum(first + length[row], lengths[row])]
    return jnp.stack(work, axis=1), ends[-1], counts


def _cdiv(a: Int[Array, " B"], b: Int[Array, " B"] | int) -> Int[Array, " B"]:
    return jax.lax.div(a + (b - 1), jnp.asarray(b, jnp.int32) + jnp.zeros_like(a))


def _splits(
    q: Float[Array, "B N H"],
    pool: Float[Array, "L P page 2KH"],
    layer: Int[Array, ""],
    table: Int[Array, "B PP"],
    work: Int[Array, "W 4"],
    count: Int[Array, ""],
    splits: int,
    sizes: dict[str, int],
    *,
    scale: float,
    soft_cap: float | None,
    interpret: Any,
) -> tuple[Float[Array, "WK G Hp"], Float[Array, "WK 2 64"]]:
    """(sum of weighted values, greatest score and sum of weights) of each split and head of each row; what a
    row does not have is not written."""
    rows, heads, size = q.shape
    layers, num_pages, page, width = pool.shape
    kv_heads = width // (2 * size)
    group = heads // kv_heads
    padded = group + -group % 8  # Gp
    kept = group + (group % 2 if group > 1 else 0)  # of 3 rows of f32 and 256 columns no layout is found
    per_piece = math.gcd(page, BLOCK)
    pieces = BLOCK // per_piece
    parts = gpu.parts(q.dtype)
    exact = parts > 1
    ring, shared = _ring(size, exact, sizes)
    depth = ring // 2
    chunk = size if exact or size % 128 else size // 2  # columns of the result that leave at a time
    blocks = min(
        rows * splits * kv_heads, sizes["multiprocessors"] * _per_multiprocessor(size, exact, ring, chunk)
    )

    grouped = jnp.pad(q.reshape(rows, kv_heads, group, size), ((0, 0), (0, 0), (0, padded - group), (0, 0)))
    queries = jnp.concatenate([part.reshape(-1, size) for part in gpu.split(grouped)])
    flat = pool.reshape(layers * num_pages * page, width)
    scalars = jnp.stack([layer, count]).astype(jnp.int32)

    def body(
        queries_ref: Any,
        pool_ref: Any,
        table_ref: Any,
        work_ref: Any,
        scalars_ref: Any,
        seen_ref: Any,
        stats_ref: Any,
        *,
        queries_tile: Any,
        tiles: Any,
        stats_tile: Any,
        queries_barrier: Any,
        barriers: Any,
        part: Any = None,
        seen_tile: Any = None,
    ) -> None:
        block = jax.lax.axis_index("block")
        layer, todo = scalars_ref[0], scalars_ref[1] * kv_heads
        seen_tile = tiles.at[0] if exact else seen_tile

        def one(i: Array, _: None) -> None:
            index = block + i * blocks
            unit = jax.lax.div(index, jnp.int32(kv_heads))
            head = index - unit * kv_heads
            row, split, begin, end = (work_ref[unit, i] for i in range(4))
            first = jax.lax.div(begin, jnp.int32(BLOCK))
            steps = jax.lax.div(end + (BLOCK - 1), jnp.int32(BLOCK)) - first

            for p in range(parts):
                at = pl.multiple_of(((p * rows + row) * kv_heads + head) * padded, padded)
                plgpu.copy_gmem_to_smem(
                    queries_ref.at[pl.ds(at, padded)], queries_tile.at[p, pl.ds(0, padded)], queries_barrier
                )

            def start(j: Array, p: int) -> Array:
                """Position at which a tile's piece begins."""
                return (first + j) * BLOCK + p * per_piece

            def places(j: Array) -> tuple[Array, ...]:
                """Where each of a tile's pieces lies in the flat pool."""
                found = []
                for p in range(pieces):
                    which = jax.lax.div(start(j, p), jnp.int32(page))
                    held = table_ref[row, jnp.minimum(which, table.shape[1] - 1)]
                    held = jnp.clip(held, 0, num_pages - 1)
                    found.append((layer * num_pages + held) * page + (start(j, p) - which * page))
                return tuple(found)

            def fetch(kind: int, j: Array, places: tuple[Array, ...]) -> None:
                """Begins to copy a tile of keys (kind 0) or values (1), without pages that nobody sees."""
                slot = tile_slot(kind, j)
                columns = pl.ds(pl.multiple_of((head * 2 + kind) * size, size), size)
                for p, place in enumerate(places):

                    def copy(p: int = p, place: Array = place) -> None:
                        plgpu.copy_gmem_to_smem(
                            pool_ref.at[pl.ds(pl.multiple_of(place, per_piece), per_piece), columns],
                            tiles.at[slot, pl.ds(p * per_piece, per_piece)],
                            barriers.at[slot],
                        )

                    if pieces == 1:
                        copy()
                    else:
                        wanted = (start(j, p) < end) & (start(j, p) + per_piece > begin)
                        pl.when(wanted)(copy)
                        pl.when(jnp.logical_not(wanted))(lambda: plgpu.barrier_arrive(barriers.at[slot]))

            def tile_slot(kind: int, j: Array) -> Array:
                return jnp.int32(0) if shared else jax.lax.rem(j, jnp.int32(depth)) * 2 + kind

            if shared:
                fetch(0, jnp.int32(0), places(jnp.int32(0)))
            else:
                for j in range(depth):
                    ahead = places(jnp.int32(j))

                    @pl.when(j < steps)
                    def _(j: int = j, ahead: tuple[Array, ...] = ahead) -> None:
                        fetch(0, jnp.int32(j), ahead)
                        fetch(1, jnp.int32(j), ahead)

            plgpu.barrier_wait(queries_barrier)

            def step(j: Array, carry: Any) -> Any:
                seen, top, total, ahead = carry
                base = (first + j) * BLOCK

                def next_tile(kind: int) -> None:
                    if not shared:
                        pl.when(j + depth < steps)(lambda: fetch(kind, j + depth, ahead))
                    elif kind == 0:
                        fetch(1, j, places(j))
                    else:
                        pl.when(j + 1 < steps)(lambda: fetch(0, j + 1, places(j + 1)))

                slot = tile_slot(0, j)
                plgpu.barrier_wait(barriers.at[slot])
                scores = gpu.query_key(queries_tile, tiles.at[slot], part, interpret=interpret is not None)
                next_tile(0)
                position = base + gpu.iota(scores.shape, 1)
                visible = (position >= begin) & (position < end)
                scores = jnp.where(visible, gpu.bent(scores, scale, soft_cap), MASKED)
                weights, keep, top, total = gpu.softmax_step(scores, top, total)

                slot = tile_slot(1, j)
                plgpu.barrier_wait(barriers.at[slot])
                tile = tiles.at[slot]

                def held(shape: tuple[int, ...]) -> Array:
                    position = base + gpu.iota(shape, 0)
                    return (position >= begin) & (position < end)

                if not exact:
                    at_the_edge = (base < begin) | (base + BLOCK > end)
                    pl.when(at_the_edge)(lambda: gpu.zero_unheld(tile, held))

                seen = seen * gpu.along_rows(keep, seen)
                seen = gpu.weigh(seen, weights, tile, part, held, interpret=interpret is not None)
                next_tile(1)
                return seen, top, total, ahead if shared else places(j + (depth + 1))

            start_seen = plgpu.layout_cast(jnp.zeros((BLOCK, size), jnp.float32), plgpu.Layout.WGMMA)
            top = gpu.row_layout(jnp.full((BLOCK,), LOWEST, jnp.float32))
            total = gpu.row_layout(jnp.zeros((BLOCK,), jnp.float32))
            ahead = () if shared else places(jnp.int32(depth))
            seen, top, total, _ = jax.lax.fori_loop(0, steps, step, (start_seen, top, total, ahead))

            stats_tile[0] = top
            stats_tile[1] = total
            at = (row * splits + split) * kv_heads + head
            for column in range(0, size, chunk):
                seen_tile[...] = jax.lax.slice(seen, (0, column), (BLOCK, column + chunk))
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(
                    seen_tile.at[pl.ds(0, kept)], seen_ref.at[at, :, pl.ds(column, chunk)]
                )
                if column == 0:
                    plgpu.copy_smem_to_gmem(stats_tile, stats_ref.at[at])
                plgpu.wait_smem_to_gmem(0)

        trips = jax.lax.div(jnp.maximum(todo - block + (blocks - 1), 0), jnp.int32(blocks))
        jax.lax.fori_loop(0, trips, one, None)

    scratch: dict[str, Any] = {
        "queries_tile": plgpu.SMEM((parts, BLOCK, size), jnp.bfloat16, transforms=gpu.transforms(size)),
        "tiles": plgpu.SMEM((ring, BLOCK, size), q.dtype, transforms=() if exact else gpu.transforms(size)),
        "stats_tile": plgpu.SMEM((2, BLOCK), jnp.float32),
        "queries_barrier": plgpu.Barrier(num_arrivals=parts),
        "barriers": plgpu.Barrier(num_arrivals=pieces, num_barriers=ring),
    }
    if exact:
        scratch["part"] = plgpu.SMEM((BLOCK, size), jnp.bfloat16, transforms=gpu.transforms(size))
    else:
        scratch["seen_tile"] = plgpu.SMEM((BLOCK, chunk), jnp.float32)
    places_of = rows * splits * kv_heads
    return plgpu.kernel(
        body,
        out_type=(
            jax.ShapeDtypeStruct((places_of, kept, _wide(size)), jnp.float32),
            jax.ShapeDtypeStruct((places_of, 2, BLOCK), jnp.float32),
        ),
        scratch_types=scratch,
        grid=(blocks,),
        grid_names=("block",),
        compiler_params=plgpu.CompilerParams(approx_math=True),
        interpret=interpret,
        kernel_name="decode_attention_splits",
    )(queries, flat, table, work, scalars)


def _ring(size: int, exact: bool, sizes: dict[str, int]) -> tuple[int, bool]:
    """(tiles in flight, whether keys and values take turns in the only one)."""
    if not exact:
        return sizes["tiles"], False
    return (1, True) if size > 128 else (2, False)


def _per_multiprocessor(size: int, exact: bool, ring: int, chunk: int) -> int:
    """Thread blocks that a multiprocessor's shared memory holds at once."""
    tile = BLOCK * size
    held = tile * (8 + ring * 4 if exact else 2 + ring * 2) + (0 if exact else BLOCK * chunk * 4) + 4096
    return max(1, min(4, (gpu.SHARED_BYTES + 1024) // (held + 1024)))


def _wide(size: int) -> int:
    """Columns of a split's sum: a whole number for each of a warpgroup's threads."""
    return size + -size % 128


def _merge(
    seen: Float[Array, "WK G Hp"],
    stats: Float[Array, "WK 2 64"],
    counts: Int[Array, " B"],
    sinks: Float[Array, " N"] | None,
    splits: int,
    kv_heads: int,
    *,
    like: Float[Array, "B N H"],
    interpret: Any,
) -> Float[Array, "B N H"]:
    """The splits of each row and head, in order, weighed by their sums."""
    rows, heads, size = like.shape
    wide = seen.shape[-1]
    group = heads // kv_heads
    operands = [seen, stats, counts]
    if sinks is not None:
        operands.append(sinks.astype(jnp.float32) * gpu.LOG2E)

    def body(seen_ref: Any, stats_ref: Any, counts_ref: Any, *refs: Any) -> None:
        *sinks_ref, out_ref = refs
        row, head = jax.lax.axis_index("row"), jax.lax.axis_index("head")
        kv_head = jax.lax.div(head, jnp.int32(group))
        query = head - kv_head * group
        count = counts_ref[row]

        def some(i: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            top, total, sums = carry
            found = []
            for u in range(MERGED_AT_ONCE):
                split = i * MERGED_AT_ONCE + u
                at = (row * splits + jnp.minimum(split, count - 1)) * kv_heads + kv_head
                there = split < count
                its_top = jnp.where(there, stats_ref[at, 0, query], LOWEST)
                found.append((there, its_top, stats_ref[at, 1, query], seen_ref[at, query]))
            for there, its_top, its_total, its_sums in found:
                new_top = jnp.maximum(top, its_top)
                keep, share = jnp.exp2(top - new_top), jnp.where(there, jnp.exp2(its_top - new_top), 0.0)
                total = total * keep + its_total * share
                sums = sums * keep + its_sums * share
                top = new_top
            return top, total, sums

        if sinks_ref:
            top, total = sinks_ref[0][head], jnp.float32(1.0)
        else:
            top, total = jnp.float32(LOWEST), jnp.float32(0.0)
        trips = jax.lax.div(count + (MERGED_AT_ONCE - 1), jnp.int32(MERGED_AT_ONCE))
        start = (top, total, jnp.zeros((wide,), jnp.float32))
        _, total, sums = jax.lax.fori_loop(0, trips, some, start)
        out_ref[row, head] = (sums / jnp.maximum(total, 1e-30)).astype(like.dtype)

    out = plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((rows, heads, wide), like.dtype),
        grid=(rows, heads),
        grid_names=("row", "head"),
        compiler_params=plgpu.CompilerParams(approx_math=True),
        interpret=interpret,
        kernel_name="decode_attention_merge",
    )(*operands)
    return out[:, :, :size]
