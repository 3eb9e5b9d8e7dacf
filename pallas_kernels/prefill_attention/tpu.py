"""Prefill attention on Mosaic TPU: blocks of packed queries against blocks of pages (Dao et al. 2022).

One grid step is a block of queries. For each sequence that has tokens in it, in turn, the pages that they may
see come to VMEM in blocks, several under way while an earlier one is computed with; the queue goes on over
sequences and query blocks. Queries of other sequences in the block are masked, so one running softmax serves
them all. Blocks that all queries of the step see whole skip the mask.

The chunks' keys and values are put into their pages before that, by a kernel of their own: tile by tile, from
wherever they stand among the packed tokens. A tile that a chunk fills only in part is read first. (XLA's
scatter reads a tile of 8 rows for every token: 8 times the bytes, and waits for them.)

Quantised pages: their scales, `[L, P, page, 2K]`, come to VMEM beside the pages, in `Fetch`; a key's scale
multiplies its column of scores, a value's its column of weights, both here, in `_part`.
"""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from pallas_kernels import tpu_common
from pallas_kernels.chips import Chip, this_chip
from pallas_kernels.paging import precision
from pallas_kernels.tpu_common import LANES, LOWEST, MASKED, SUBLANES, Fetch, Heads, rows_per_tile

refusal = tpu_common.refusal

# what is to be fetched next, as the cursor in SMEM holds it
STEP, PAIR, BLOCK, STARTED, DONE = range(5)

WRITES = 16  # tiles on their way to their pages at a time


@dataclasses.dataclass(frozen=True)
class Plan:
    """Sizes that are fixed by chip, dtype and shapes, and what else is static."""

    heads: Heads
    num_heads: int
    scale: float
    soft_cap: float | None
    with_sinks: bool
    cores: int
    steps: int  # grid steps of one core
    queries: int  # tokens of one grid step
    part: int  # positions computed with at a time
    table_width: int

    @property
    def group(self) -> int:
        return self.num_heads // self.heads.count


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
    interpret: pltpu.InterpretParams | None = None,
) -> tuple[Float[Array, "T N H"], Float[Array, "L P page 2KH"]]:
    """As `pallas_kernels.prefill_attention`. interpret: how to run it where there is no TPU."""
    tokens, num_heads, size = q.shape
    heads = Heads(size, pool.shape[3])
    sizes = tpu_common.tuned(Path(__file__).parent, (chip or this_chip()).name)
    group = num_heads // heads.count
    rows = rows_per_tile(pool.dtype)
    fetch = tpu_common.positions(sizes["fetch_bytes"], pool, table.shape[1])
    taken = sizes["buffers"] * fetch * pool.shape[3] * pool.dtype.itemsize
    # of a token: the softmax's sums, and its queries and outputs, twice each to come and go
    per_token = num_heads * (4 * (2 * LANES + heads.width) + 4 * heads.stride * q.dtype.itemsize)
    room = tpu_common.VMEM.get((chip or this_chip()).name, tpu_common.MOST_VMEM) * 3 // 4 - taken
    each = -(-tokens // sizes["cores"]) + rows - 1
    most = min(sizes["query_rows"] // group, sizes["query_tokens"], each, room // per_token)
    queries = max(rows, most // rows * rows)
    plan = Plan(
        heads=heads,
        num_heads=num_heads,
        scale=scale,
        soft_cap=soft_cap,
        with_sinks=sinks is not None,
        cores=sizes["cores"],
        steps=-(-tokens // (queries * sizes["cores"])),
        queries=queries,
        part=tpu_common.part(fetch, sizes["compute_positions"], rows),
        table_width=table.shape[1],
    )
    blocks = plan.cores * plan.steps

    pool = _write(
        kv, pool, layer, table, starts, counts, offsets, tokens=sizes["write_tokens"], interpret=interpret
    )

    flat = heads.place(q).reshape(tokens, num_heads * heads.stride)
    if more := blocks * queries - tokens:
        flat = jnp.pad(flat, ((0, more), (0, 0)))
    extra = (
        [] if sinks is None else [jnp.broadcast_to(sinks.astype(jnp.float32)[:, None], (num_heads, LANES))]
    )

    def of_step(width: int) -> pl.BlockSpec:
        return pl.BlockSpec((queries, width), lambda core, step, *_: (step * plan.cores + core, 0))

    out = pl.pallas_call(
        functools.partial(_kernel, plan=plan),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=8,
            grid=(plan.cores, plan.steps),
            in_specs=[
                of_step(flat.shape[1]),
                *[pl.BlockSpec((num_heads, LANES), lambda *_: (0, 0))] * len(extra),
                pl.BlockSpec(memory_space=pl.ANY),
            ],
            out_specs=of_step(flat.shape[1]),
            scratch_shapes=[
                pltpu.VMEM((sizes["buffers"], fetch, pool.shape[3]), pool.dtype),
                pltpu.VMEM((num_heads * queries, LANES), jnp.float32),
                pltpu.VMEM((num_heads * queries, LANES), jnp.float32),
                pltpu.VMEM((num_heads * queries, heads.width), jnp.float32),
                pltpu.SMEM((5,), jnp.int32),
                pltpu.SemaphoreType.DMA((sizes["buffers"],)),
            ],
        ),
        out_shape=jax.ShapeDtypeStruct(flat.shape, q.dtype),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=tpu_common.VMEM_LIMIT
        ),
        interpret=False if interpret is None else interpret,
        name="prefill_attention",
    )(
        layer[None],
        window[None],
        starts,
        counts,
        offsets,
        table.reshape(-1),
        *_pairs(starts, counts, queries, blocks),
        flat,
        *extra,
        pool,
    )
    return heads.extract(out[:tokens].reshape(tokens, num_heads, heads.stride)), pool


def _pairs(
    starts: Int[Array, " R"], counts: Int[Array, " R"], queries: int, blocks: int
) -> tuple[Int[Array, " pairs"], Int[Array, " blocks+1"]]:
    """(the sequence of each pair of a query block and a sequence with tokens in it, each block's first pair).

    Pairs stand in the blocks' order, and within a block in the sequences'.
    """
    first = starts // queries
    touched = jnp.where(counts > 0, (starts + counts - 1) // queries - first + 1, 0)
    pair = jnp.arange(blocks + starts.shape[0], dtype=jnp.int32)
    sequence = jnp.sum(jnp.cumsum(touched)[None, :] <= pair[:, None], axis=1, dtype=jnp.int32)
    block = jnp.arange(blocks + 1, dtype=jnp.int32)
    before = jnp.clip(block[:, None] - first[None, :], 0, touched[None, :])
    return sequence, jnp.sum(before, axis=1, dtype=jnp.int32)


def _write(
    kv: Float[Array, "T C"],
    pool: Float[Array, "L P page C"],
    layer: Int[Array, ""],
    table: Int[Array, "R PP"],
    starts: Int[Array, " R"],
    counts: Int[Array, " R"],
    offsets: Int[Array, " R"],
    *,
    tokens: int,
    interpret: pltpu.InterpretParams | None,
) -> Float[Array, "L P page C"]:
    """The pool with the chunks' keys and values in their pages. tokens: of one grid step."""
    rows, lanes = rows_per_tile(pool.dtype), pool.shape[3]
    tokens = min(tokens, -(-kv.shape[0] // rows) * rows)
    blocks = -(-kv.shape[0] // tokens)
    in_hbm = pl.BlockSpec(memory_space=pl.ANY)
    return pl.pallas_call(
        functools.partial(_write_kernel, table_width=table.shape[1]),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=7,
            grid=(blocks,),
            in_specs=[pl.BlockSpec((tokens, lanes), lambda step, *_: (step, 0)), in_hbm],
            out_specs=in_hbm,
            scratch_shapes=[
                pltpu.VMEM((tokens + 2 * rows, lanes), jnp.float32),
                pltpu.VMEM((WRITES, rows, lanes), pool.dtype),
                pltpu.SemaphoreType.DMA((WRITES,)),
                pltpu.SemaphoreType.DMA(()),
            ],
        ),
        out_shape=jax.ShapeDtypeStruct(pool.shape, pool.dtype),
        input_output_aliases={8: 0},
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("arbitrary",), vmem_limit_bytes=tpu_common.VMEM_LIMIT
        ),
        interpret=False if interpret is None else interpret,
        name="prefill_attention_write",
    )(
        layer[None],
        starts,
        counts,
        offsets,
        table.reshape(-1),
        *_pairs(starts, counts, tokens, blocks),
        kv,
        pool,
    )


def _write_kernel(
    layer: Any,
    starts: Any,
    counts: Any,
    offsets: Any,
    table: Any,
    sequences: Any,
    first_pairs: Any,
    kv: Any,
    _: Any,
    pool: Any,
    wide: Any,
    tiles: Any,
    written: Any,
    read: Any,
    *,
    table_width: int,
) -> None:
    """One grid step: the tokens of one block. kv: [tokens, C] in VMEM.

    wide: the same in f32, with a tile's rows of anything before and after: rows of 32 bits can be shifted by
    a number that varies.
    tiles: a ring of those that are on their way to their pages.
    """
    ring, rows, _ = tiles.shape
    tokens = kv.shape[0]
    page = pool.shape[2]
    step = pl.program_id(0)
    wide[pl.ds(rows, tokens)] = kv[...].astype(jnp.float32)

    def wait(slot: Any) -> None:
        pltpu.make_async_copy(tiles.at[slot], pool.at[0, 0, pl.ds(0, rows)], written.at[slot]).wait()

    def each_pair(pair: Any, count: Any) -> Any:
        row = sequences[pair]
        begin = jnp.maximum(starts[row], step * tokens)
        end = jnp.minimum(starts[row] + counts[row], (step + 1) * tokens)
        shift = offsets[row] - starts[row]
        low, high = begin + shift, end + shift  # positions

        def each_tile(tile: Any, count: Any) -> Any:
            slot = jax.lax.rem(count, ring)
            pl.when(count >= ring)(lambda: wait(slot))
            first = tile * rows
            at = pl.ds(pl.multiple_of(jax.lax.rem(first, page), rows), rows)
            place = pool.at[layer[0], table[row * table_width + first // page], at]
            token = first - shift - step * tokens + rows  # in `wide`, of the tile's first row
            both = wide[pl.ds(pl.multiple_of(token // rows * rows, rows), 2 * rows)]
            new = pltpu.roll(both, 2 * rows - jax.lax.rem(token, rows), 0)[:rows]

            @pl.when((first < low) | (first + rows > high))
            def read_first() -> None:
                old = pltpu.make_async_copy(place, tiles.at[slot], read)
                old.start()
                old.wait()

            here = first + jax.lax.broadcasted_iota(jnp.int32, new.shape, 0)
            kept = jnp.where((here >= low) & (here < high), new, tiles[slot].astype(jnp.float32))
            tiles[slot] = kept.astype(tiles.dtype)
            pltpu.make_async_copy(tiles.at[slot], place, written.at[slot]).start()
            return count + 1

        return jax.lax.fori_loop(low // rows, pl.cdiv(high, rows), each_tile, count)

    count = jax.lax.fori_loop(first_pairs[step], first_pairs[step + 1], each_pair, jnp.int32(0))
    # all of it: the next step may go on in the last tile
    jax.lax.fori_loop(jnp.maximum(count - ring, 0), count, lambda i, _: wait(jax.lax.rem(i, ring)), None)


def _kernel(
    layer: Any,
    window: Any,
    starts: Any,
    counts: Any,
    offsets: Any,
    table: Any,
    sequences: Any,
    first_pairs: Any,
    q: Any,
    *refs: Any,
    plan: Plan,
) -> None:
    """One grid step: one block of queries. q: [queries, N·W] in VMEM. sinks: f32[N, 128], if any."""
    sinks, refs = (refs[0], refs[1:]) if plan.with_sinks else (None, refs)
    pool, out, buffers, top, total, seen, cursor, fetched = refs
    core, step = pl.program_id(0), pl.program_id(1)
    fetch = Fetch(pool, layer[0], table, plan.table_width, buffers, fetched)

    def query_block(step: Any) -> Any:
        """Of this core: they take turns."""
        return jnp.minimum(step, plan.steps - 1) * plan.cores + core

    def seen_by(pair: Any, block: Any) -> tuple[Any, Any, Any, Any, Any]:
        """(sequence, its first packed token in the query block, the one after its last there,
        the first position that any of these tokens sees, the one after the last)."""
        row = sequences[pair]
        begin = jnp.maximum(starts[row], block * plan.queries)
        end = jnp.minimum(starts[row] + counts[row], (block + 1) * plan.queries)
        shift = offsets[row] - starts[row]
        return row, begin, end, jnp.maximum(begin + shift - window[0] + 1, 0), end + shift

    def go_to_pair(step: Any, pair: Any) -> None:
        """The next block of pages to fetch is the first of this pair, or of the core's next one."""

        def or_first(step: Any) -> Any:
            return jnp.maximum(pair, first_pairs[query_block(step)])

        def is_behind(step: Any) -> Any:
            return (step < plan.steps) & (or_first(step) >= first_pairs[query_block(step) + 1])

        cursor[STEP] = step = jax.lax.while_loop(is_behind, lambda step: step + 1, step)

        @pl.when(step < plan.steps)
        def at_its_first_block() -> None:
            cursor[PAIR] = or_first(step)
            *_, low, _ = seen_by(or_first(step), query_block(step))
            cursor[BLOCK] = low // fetch.size

    def fetch_next() -> None:
        pair, block = cursor[PAIR], cursor[BLOCK]
        row, _, _, low, high = seen_by(pair, query_block(cursor[STEP]))
        fetch.start(row, block, low, high, jax.lax.rem(cursor[STARTED], fetch.slots))
        cursor[STARTED] += 1
        cursor[BLOCK] = block + 1
        pl.when((block + 1) * fetch.size >= high)(lambda: go_to_pair(cursor[STEP], pair + 1))

    def fetch_next_if_any() -> None:
        pl.when(cursor[STEP] < plan.steps)(fetch_next)

    @pl.when(step == 0)
    def begin() -> None:
        cursor[STARTED] = cursor[DONE] = 0
        go_to_pair(jnp.int32(0), jnp.int32(0))
        for _ in range(fetch.slots - 1):
            fetch_next_if_any()

    if sinks is None:
        top[...] = jnp.full(top.shape, LOWEST, jnp.float32)
        total[...] = jnp.zeros(total.shape, jnp.float32)
    else:
        for n in range(plan.num_heads):
            rows = slice(n * plan.queries, (n + 1) * plan.queries)
            top[rows] = jnp.broadcast_to(sinks[n : n + 1] * tpu_common.LOG2_E, (plan.queries, LANES))
        total[...] = jnp.ones(total.shape, jnp.float32)
    seen[...] = jnp.zeros(seen.shape, jnp.float32)

    here = query_block(step)

    def each_pair(pair: Any, _: None) -> None:
        row, begin, end, low, high = seen_by(pair, here)
        shift = offsets[row] - starts[row]

        def each_block(block: Any, _: None) -> None:
            fetch_next_if_any()
            slot = jax.lax.rem(cursor[DONE], fetch.slots)
            fetch.wait(row, block, low, high, slot)
            fetch.clear_outside(block, low, high, slot, plan.part)
            start = block * fetch.size

            def each_part(i: Any, _: None) -> None:
                first_key = start + i * plan.part
                attend = functools.partial(_part, q, buffers.at[slot], top, total, seen, i, plan=plan)
                seen_whole = (
                    (end - begin == plan.queries)
                    & (begin + shift >= first_key + plan.part - 1)
                    & (end - 1 + shift - first_key < window[0])
                )

                def visible() -> Any:
                    shape = (plan.queries, plan.part)
                    token = here * plan.queries + jax.lax.broadcasted_iota(jnp.int32, shape, 0)
                    key = first_key + jax.lax.broadcasted_iota(jnp.int32, shape, 1)
                    ahead = token + shift - key
                    return (ahead >= 0) & (ahead < window[0]) & (token >= begin) & (token < end)

                pl.when(seen_whole)(lambda: attend(visible=None))
                pl.when(~seen_whole)(lambda: attend(visible=visible()))

            first = jnp.maximum(low - start, 0) // plan.part
            last = pl.cdiv(jnp.minimum(high - start, fetch.size), plan.part)
            jax.lax.fori_loop(first, last, each_part, None)
            cursor[DONE] += 1

        jax.lax.fori_loop(low // fetch.size, pl.cdiv(high, fetch.size), each_block, None)

    jax.lax.fori_loop(first_pairs[here], first_pairs[here + 1], each_pair, None)

    for n in range(plan.num_heads):
        rows = slice(n * plan.queries, (n + 1) * plan.queries)
        done = seen[rows] / jnp.maximum(total[rows, :1], 1e-30)  # of nobody's token total is 0 and seen 0
        first = n * plan.heads.stride
        out[:, first : first + plan.heads.width] = done.astype(out.dtype)


def _part(q: Any, buffer: Any, top: Any, total: Any, seen: Any, i: Any, *, visible: Any, plan: Plan) -> None:
    """The softmax goes on over part i of a block.

    q: [queries, N·W]. buffer: [S, C]. top, total: [N·queries, 128], all lanes alike, a head's queries
    together. seen: [N·queries, W], to be divided by total. visible: bool[queries, part], or None for all.
    """
    at = pl.ds(pl.multiple_of(i * plan.part, plan.part), plan.part)
    group, stride = plan.group, plan.heads.stride
    dot: dict[str, Any] = {"precision": precision(buffer.dtype), "preferred_element_type": jnp.float32}
    if visible is not None:
        visible = jnp.concatenate([visible.astype(jnp.int32)] * group) != 0

    def one_head(k: Any, _: None) -> None:
        rows = pl.ds(pl.multiple_of(k * group * plan.queries, SUBLANES), group * plan.queries)
        first = pl.multiple_of(k * group * stride, LANES)
        query = jnp.concatenate([q[:, lanes(first + g * stride)] for g in range(group)])
        keys, values = buffer[at, lanes(plan.heads.keys(k))], buffer[at, lanes(plan.heads.values(k))]
        scores = jax.lax.dot_general(query, keys, (((1,), (1,)), ((), ())), **dot)
        scores = tpu_common.bent(scores, plan.scale, plan.soft_cap)
        if visible is not None:
            scores = jnp.where(visible, scores, MASKED)
        old_top = top[rows, :1]
        new_top = jnp.maximum(old_top, jnp.max(scores, axis=1, keepdims=True))
        weights = jnp.exp2(scores - new_top)
        keep = jnp.exp2(old_top - new_top)
        top[rows] = jnp.broadcast_to(new_top, (group * plan.queries, LANES))
        total[rows] = total[rows] * keep + jnp.sum(weights, axis=1, keepdims=True)
        product = jnp.dot(weights.astype(buffer.dtype), values, **dot)
        seen[rows] = seen[rows] * keep + product

    def lanes(start: Any) -> Any:
        return pl.ds(start, plan.heads.width)

    jax.lax.fori_loop(0, plan.heads.count, one_head, None)
