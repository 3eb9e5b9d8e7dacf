"""Decode attention on Mosaic TPU: each row's pages walked once, its new token put in on the way.

The pages of a row come to VMEM in blocks, several of them under way while an earlier one is computed with.
The queue goes on from a row's last block to the next row's first, over empty rows, so that the copy engine
does not wait between rows. What is computed with at a time is a part of a block. The tile of rows where a
row's new token belongs gets its key and value and goes back to its page: it is in VMEM anyway, and one row
alone is less than a copy may move.

Quantised pages: their scales, `[L, P, page, 2K]`, come to VMEM beside the pages, in `Fetch`; a key's scale
multiplies its score, a value's its weight, both here, in `part`.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
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
from pallas_kernels.tpu_common import LANES, LOG2_E, LOWEST, MASKED, SUBLANES, Fetch, Heads, rows_per_tile

refusal = tpu_common.refusal


# what is to be done next, as the cursor in SMEM holds it
ROW, BLOCK, STARTED, DONE = range(4)


@dataclasses.dataclass(frozen=True)
class Plan:
    """Sizes that are fixed by chip, dtype and shapes, and what else is static."""

    heads: Heads
    scale: float
    soft_cap: float | None
    with_sinks: bool
    cores: int
    rows: int  # of one grid step
    steps: int  # grid steps of one core
    part: int  # positions computed with at a time
    table_width: int

    def row(self, i: Any, core: Any) -> Any:
        """The core's i-th row: cores take turns by grid steps."""
        return (i // self.rows * self.cores + core) * self.rows + jax.lax.rem(i, self.rows)

    def by_head(self, num_heads: int, product: Callable[[slice, int], Array]) -> Float[Array, "N X"]:
        """For each query head its row of `product(rows, k)`, k its key/value head.

        A product costs as much for one row as for a tile of 8, so it is made for the tiles that hold the
        head's queries, and rows of other heads that share them are left out.
        """
        group = num_heads // self.heads.count
        tiles: dict[int, Array] = {}
        for k in range(self.heads.count):
            first = k * group // SUBLANES * SUBLANES
            last = min(-(-(k + 1) * group // SUBLANES) * SUBLANES, num_heads)
            rows = product(slice(first, last), k)
            for at in range(first, last, SUBLANES):
                tile = rows[at - first : at - first + SUBLANES]
                if at in tiles:
                    here = at + jax.lax.broadcasted_iota(jnp.int32, tile.shape, 0)
                    tile = jnp.where(here >= k * group, tile, tiles[at])
                tiles[at] = tile
        return jnp.concatenate([tiles[at] for at in sorted(tiles)])


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
    interpret: pltpu.InterpretParams | None = None,
) -> tuple[Float[Array, "B N H"], Float[Array, "L P page 2KH"]]:
    """As `pallas_kernels.decode_attention`. interpret: how to run it where there is no TPU."""
    batch, num_heads, size = q.shape
    heads = Heads(size, pool.shape[3])
    sizes = tpu_common.tuned(Path(__file__).parent, (chip or this_chip()).name)

    rows = min(sizes["rows"], -(-batch // sizes["cores"]))
    steps = -(-batch // (rows * sizes["cores"]))
    fetch = tpu_common.positions(sizes["fetch_bytes"], pool, table.shape[1])
    plan = Plan(
        heads=heads,
        scale=scale,
        soft_cap=soft_cap,
        with_sinks=sinks is not None,
        cores=sizes["cores"],
        rows=rows,
        steps=steps,
        part=tpu_common.part(fetch, sizes["compute_positions"], rows_per_tile(pool.dtype)),
        table_width=table.shape[1],
    )

    queries = heads.place(q)
    extra = (
        [] if sinks is None else [jnp.broadcast_to(sinks.astype(jnp.float32)[:, None], (num_heads, LANES))]
    )
    more = rows * plan.cores * steps - batch
    if more:
        queries = jnp.pad(queries, ((0, more), (0, 0), (0, 0)))
        kv = jnp.pad(kv, ((0, more), (0, 0)))
        lengths = jnp.pad(lengths, (0, more))

    def of_step(*shape: int) -> pl.BlockSpec:
        zeros = (0,) * len(shape)
        return pl.BlockSpec((rows, *shape), lambda core, step, *_: (step * plan.cores + core, *zeros))

    lanes = pool.shape[3]
    whole = pl.BlockSpec((num_heads, LANES), lambda *_: (0, 0))
    in_hbm = pl.BlockSpec(memory_space=pl.ANY)
    out_shape = jax.ShapeDtypeStruct(queries.shape, q.dtype)
    out, pool = pl.pallas_call(
        functools.partial(_kernel, plan=plan),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=4,
            grid=(plan.cores, steps),
            in_specs=[
                of_step(*queries.shape[1:]),
                pl.BlockSpec((None, rows, lanes), lambda core, step, *_: (step * plan.cores + core, 0, 0)),
                *[whole] * len(extra),
                in_hbm,
            ],
            out_specs=[of_step(*out_shape.shape[1:]), in_hbm],
            scratch_shapes=[
                pltpu.VMEM((sizes["buffers"], fetch, lanes), pool.dtype),
                pltpu.VMEM((rows_per_tile(pool.dtype), lanes), pool.dtype),
                pltpu.VMEM((num_heads, LANES), jnp.float32),
                pltpu.VMEM((num_heads, LANES), jnp.float32),
                pltpu.VMEM((num_heads, heads.width), jnp.float32),
                pltpu.VMEM((rows, lanes), jnp.float32),
                pltpu.SMEM((4,), jnp.int32),
                pltpu.SemaphoreType.DMA((sizes["buffers"],)),
                pltpu.SemaphoreType.DMA(()),
            ],
        ),
        out_shape=[out_shape, jax.ShapeDtypeStruct(pool.shape, pool.dtype)],
        input_output_aliases={6 + len(extra): 1},
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=tpu_common.VMEM_LIMIT
        ),
        interpret=False if interpret is None else interpret,
        name="decode_attention",
    )(
        layer[None],
        window[None],
        lengths,
        table.reshape(-1),
        queries,
        kv.reshape(-1, rows, lanes),
        *extra,
        pool,
    )
    return heads.extract(out[:batch]), pool


def _kernel(
    layer_: Any, window_: Any, lengths: Any, table: Any, q: Any, kv: Any, *refs: Any, plan: Plan
) -> None:
    """One grid step: `plan.rows` rows.

    q: [rows, N, W] in VMEM. kv: [rows, C] in VMEM. sinks: f32[N, 128], if any.
    The pool comes twice, as input and as output: they are one buffer, and the output is used for both.
    """
    sinks, refs = (refs[0], refs[1:]) if plan.with_sinks else (None, refs)
    _, out, pool, buffers, tile, top, total, seen, new, cursor, fetched, written = refs
    layer, window = layer_[0], window_[0]
    core, step = pl.program_id(0), pl.program_id(1)
    fetch = Fetch(pool, layer, table, plan.table_width, buffers, fetched)
    rows_of_core = plan.rows * plan.steps

    def seen_by(row: Any) -> tuple[Any, Any]:
        return jnp.maximum(lengths[row] - window, 0), lengths[row]

    def row_of(i: Any) -> Any:
        return plan.row(jnp.minimum(i, rows_of_core - 1), core)

    def go_to_row(i: Any) -> None:
        """The next block to fetch is the first of the core's i-th row, or of the next that is not empty."""

        def is_empty(i: Any) -> Any:
            return (i < rows_of_core) & (lengths[row_of(i)] == 0)

        cursor[ROW] = i = jax.lax.while_loop(is_empty, lambda i: i + 1, i)
        low, _ = seen_by(row_of(i))
        cursor[BLOCK] = low // fetch.size

    def fetch_next() -> None:
        row, block = row_of(cursor[ROW]), cursor[BLOCK]
        low, high = seen_by(row)
        fetch.start(row, block, low, high, jax.lax.rem(cursor[STARTED], fetch.slots))
        cursor[STARTED] += 1
        cursor[BLOCK] = block + 1
        pl.when((block + 1) * fetch.size >= high)(lambda: go_to_row(cursor[ROW] + 1))

    def fetch_next_if_any() -> None:
        pl.when(cursor[ROW] < rows_of_core)(fetch_next)

    @pl.when(step == 0)
    def begin() -> None:
        cursor[STARTED] = cursor[DONE] = 0
        go_to_row(0)
        for _ in range(fetch.slots - 1):
            fetch_next_if_any()

    new[...] = kv[...].astype(jnp.float32)  # one row of 16 bits cannot be taken out by a number that varies

    def each_row(r: Any, _: None) -> None:
        row = plan.row(step * plan.rows + r, core)
        low, high = seen_by(row)
        if sinks is None:
            top[...] = jnp.full(top.shape, LOWEST, jnp.float32)
            total[...] = jnp.zeros(total.shape, jnp.float32)
        else:
            top[...] = sinks[...] * LOG2_E
            total[...] = jnp.ones(total.shape, jnp.float32)
        seen[...] = jnp.zeros(seen.shape, jnp.float32)

        def writing() -> Any:
            rows, page = tile.shape[0], pool.shape[2]
            at = pl.multiple_of(jax.lax.rem(high - 1, page) // rows * rows, rows)
            place = pool.at[layer, table[row * plan.table_width + (high - 1) // page], pl.ds(at, rows)]
            return pltpu.make_async_copy(tile, place, written)

        def each_block(block: Any, _: None) -> None:
            fetch_next_if_any()
            slot = jax.lax.rem(cursor[DONE], fetch.slots)
            fetch.wait(row, block, low, high, slot)

            @pl.when((block + 1) * fetch.size >= high)
            def write() -> None:
                rows = tile.shape[0]
                position = high - 1 - block * fetch.size
                at = pl.ds(pl.multiple_of(position // rows * rows, rows), rows)
                here = jax.lax.broadcasted_iota(jnp.int32, tile.shape, 0) == jax.lax.rem(position, rows)
                old = buffers[slot, at].astype(jnp.float32)
                tile[...] = jnp.where(here, new[pl.ds(r, 1)], old).astype(tile.dtype)
                buffers[slot, at] = tile[...]
                writing().start()

            fetch.clear_outside(block, low, high, slot, plan.part)
            start = block * fetch.size
            first = jnp.maximum(low - start, 0) // plan.part
            last = pl.cdiv(jnp.minimum(high - start, fetch.size), plan.part)
            attend = functools.partial(_part, q.at[r], buffers.at[slot], top, total, seen, plan=plan)
            jax.lax.fori_loop(first, last, lambda i, _: attend(i, low=low - start, high=high - start), None)
            cursor[DONE] += 1

        @pl.when(high > 0)
        def walk() -> None:
            jax.lax.fori_loop(low // fetch.size, pl.cdiv(high, fetch.size), each_block, None)

        done = seen[...] / jnp.maximum(total[:, :1], 1e-30)  # an empty row has total 0 and seen 0
        out[r, :, : plan.heads.width] = done.astype(out.dtype)
        pl.when(high > 0)(lambda: writing().wait())

    jax.lax.fori_loop(0, plan.rows, each_row, None)


def _part(
    q: Any, buffer: Any, top: Any, total: Any, seen: Any, i: Any, *, low: Any, high: Any, plan: Plan
) -> None:
    """The softmax goes on over part i of a block, whose positions `low : high` are visible.

    q: [N, W]. buffer: [S, C]. top, total: [N, 128], all lanes alike. seen: [N, W], to be divided by total.
    """
    start = pl.multiple_of(i * plan.part, plan.part)
    at = pl.ds(start, plan.part)
    dot: dict[str, Any] = {"precision": precision(buffer.dtype), "preferred_element_type": jnp.float32}

    def scores_of(rows: slice, k: int) -> Array:
        keys = buffer[at, pl.ds(plan.heads.keys(k), plan.heads.width)]
        return jax.lax.dot_general(q[rows, : plan.heads.width], keys, (((1,), (1,)), ((), ())), **dot)

    def values_of(rows: slice, k: int) -> Array:
        values = buffer[at, pl.ds(plan.heads.values(k), plan.heads.width)]
        return jnp.dot(weights[rows].astype(buffer.dtype), values, **dot)

    scores = plan.by_head(q.shape[0], scores_of)
    position = start + jax.lax.broadcasted_iota(jnp.int32, scores.shape, 1)
    visible = (position >= low) & (position < high)
    scores = jnp.where(visible, tpu_common.bent(scores, plan.scale, plan.soft_cap), MASKED)
    old_top = top[:, :1]
    new_top = jnp.maximum(old_top, jnp.max(scores, axis=1, keepdims=True))
    weights = jnp.exp2(scores - new_top)
    keep = jnp.exp2(old_top - new_top)
    top[...] = jnp.broadcast_to(new_top, top.shape)
    total[...] = total[...] * keep + jnp.sum(weights, axis=1, keepdims=True)
    seen[...] = seen[...] * keep + plan.by_head(q.shape[0], values_of)
