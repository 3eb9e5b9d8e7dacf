"""Prefill attention in plain XLA: the oracle, and the path for CPU and GPUs without a kernel.

For each sequence, for each block of packed queries that it touches, for each block of cached positions that
those queries may see: one step of a softmax that is rescaled as it goes. All three trip counts are dynamic,
so cost follows what is really there. A block that holds the end of one chunk and the start of the next is
visited once for each.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.chips import Chip
from pallas_kernels.paging import (
    MASKED,
    cap,
    pad_table,
    pages_per_block,
    precision,
    read_pages,
    softmax_start,
    write_tokens,
)

QUERY_BLOCK = 128  # packed query tokens at a time
KEY_BLOCK = 128  # cached positions at a time


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
    chip: Chip | None = None,  # the same on each
) -> tuple[Float[Array, "T N H"], Float[Array, "L P page 2KH"]]:
    given, heads, size = q.shape
    queries = min(QUERY_BLOCK, given)
    if more := -given % queries:  # tokens of nobody
        q, kv = jnp.pad(q, ((0, more), (0, 0), (0, 0))), jnp.pad(kv, ((0, more), (0, 0)))
    tokens = given + more
    page = pool.shape[2]
    kv_heads = pool.shape[3] // (2 * size)
    group = heads // kv_heads

    pages, positions = _places(table, starts, counts, offsets, tokens, page)
    pool = write_tokens(pool, kv, layer, pages, positions % page)

    per_block = pages_per_block(pool, table.shape[1], KEY_BLOCK)
    block = per_block * page  # S
    table = pad_table(table, per_block)
    dot: dict[str, Any] = {"precision": precision(q.dtype), "preferred_element_type": jnp.float32}
    grouped = q.reshape(tokens, kv_heads, group, size)

    def query_block(i: Array, row: Array, out: Array) -> Array:
        start, end, offset = starts[row], starts[row] + counts[row], offsets[row]
        index = i * queries + jnp.arange(queries, dtype=jnp.int32)
        mine = (index >= start) & (index < end)
        position = offset + index - start  # of each query
        query = jax.lax.dynamic_slice_in_dim(grouped, i * queries, queries, axis=0)
        query = query.transpose(1, 0, 2, 3).reshape(kv_heads, queries * group, size)
        first = offset + jnp.maximum(start, i * queries) - start
        last = offset + jnp.minimum(end, (i + 1) * queries) - start - 1

        def key_block(j: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            top, total, seen = carry
            chosen = jax.lax.dynamic_slice(table, (row, j * per_block), (1, per_block))[0]
            key_position = j * block + jnp.arange(block, dtype=jnp.int32)
            # Zeroed, not only masked: a freed page may hold a NaN, and 0 · NaN is NaN.
            held = (key_position <= last) & (key_position > first - window)
            cached = jnp.where(held[:, None], read_pages(pool, layer, chosen), 0)
            cached = cached.reshape(block, kv_heads, 2, size)
            ahead = position[:, None] - key_position[None, :]
            visible = ((ahead >= 0) & (ahead < window) & mine[:, None])[None, :, None, :]
            scores = jnp.einsum("kqh,skh->kqs", query, cached[:, :, 0], **dot) * scale
            scores = cap(scores, soft_cap).reshape(kv_heads, queries, group, block)
            scores = jnp.where(visible, scores, MASKED)
            new_top = jnp.maximum(top, jnp.max(scores, axis=-1))
            weights = jnp.where(visible, jnp.exp(scores - new_top[..., None]), 0.0)
            keep = jnp.exp(top - new_top)
            total = total * keep + jnp.sum(weights, axis=-1)
            flat = weights.astype(pool.dtype).reshape(kv_heads, queries * group, block)
            values = jnp.einsum("kqs,skh->kqh", flat, cached[:, :, 1], **dot)
            values = values.reshape(kv_heads, queries, group, size)
            return new_top, total, seen * keep[..., None] + values

        shape = (kv_heads, queries, group)
        top, total = softmax_start(shape, None if sinks is None else sinks.reshape(kv_heads, 1, group))
        begin = (top, total, jnp.zeros((*shape, size), jnp.float32))
        low = jnp.maximum(first - window + 1, 0) // block
        _, total, seen = jax.lax.fori_loop(low, last // block + 1, key_block, begin)
        done = (seen / jnp.maximum(total, 1e-30)[..., None]).transpose(1, 0, 2, 3).astype(q.dtype)
        old = jax.lax.dynamic_slice_in_dim(out, i * queries, queries, axis=0)
        new = jnp.where(mine[:, None, None, None], done, old)
        return jax.lax.dynamic_update_slice_in_dim(out, new, i * queries, axis=0)

    def sequence(row: Array, out: Array) -> Array:
        start, count = starts[row], counts[row]
        low, high = start // queries, (start + count + queries - 1) // queries
        return jax.lax.fori_loop(
            low, jnp.where(count > 0, high, low), lambda i, out: query_block(i, row, out), out
        )

    out = jax.lax.fori_loop(0, starts.shape[0], sequence, jnp.zeros_like(grouped))
    return out.reshape(tokens, heads, size)[:given], pool


def _places(
    table: Int[Array, "R PP"],
    starts: Int[Array, " R"],
    counts: Int[Array, " R"],
    offsets: Int[Array, " R"],
    tokens: int,
    page: int,
) -> tuple[Int[Array, " T"], Int[Array, " T"]]:
    """(page, position) of each packed token; the page of one that belongs to no chunk is -1."""
    index = jnp.arange(tokens, dtype=jnp.int32)[:, None]
    member = (index >= starts[None, :]) & (index < (starts + counts)[None, :])  # [T, R]
    row = jnp.argmax(member, axis=1)
    position = offsets[row] + index[:, 0] - starts[row]
    position = jnp.clip(position, 0, table.shape[1] * page - 1)
    pages = table[row, position // page]
    return jnp.where(jnp.any(member, axis=1), pages, -1), position
