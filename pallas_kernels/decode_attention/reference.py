"""Decode attention in plain XLA: the oracle, and the path for CPU and GPUs without a kernel.

A loop over blocks of pages with a softmax that is rescaled as it goes (Milakov and Gimelshein 2018; Dao et
al. 2022). It runs as often as the longest row needs, so cost follows the context that is there. A row's bits
do not depend on the others: past its own end a block adds exactly nothing.
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

BLOCK = 64  # cached positions at a time: at 32 rows of 160 positions a fifth faster on CPU than 128


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
    chip: Chip | None = None,  # the same on each
) -> tuple[Float[Array, "B N H"], Float[Array, "L P page 2KH"]]:
    rows, heads, size = q.shape
    page = pool.shape[2]
    kv_heads = pool.shape[3] // (2 * size)
    group = heads // kv_heads

    last = jnp.maximum(lengths - 1, 0)
    own_page = jnp.take_along_axis(table, (last // page)[:, None], axis=1)[:, 0]
    pool = write_tokens(pool, kv, layer, jnp.where(lengths > 0, own_page, -1), last % page)

    per_block = pages_per_block(pool, table.shape[1], BLOCK)
    block = per_block * page  # S
    table = pad_table(table, per_block)
    query = q.reshape(rows, kv_heads, group, size)
    dot: dict[str, Any] = {"precision": precision(q.dtype), "preferred_element_type": jnp.float32}

    def body(i: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        top, total, seen = carry
        pages = jax.lax.dynamic_slice_in_dim(table, i * per_block, per_block, axis=1)
        positions = i * block + jnp.arange(block, dtype=jnp.int32)[None, :]
        visible = (positions < lengths[:, None]) & (positions >= (lengths - window)[:, None])
        # Zeroed, not only masked: a freed page may hold a NaN, and 0 · NaN is NaN.
        cached = jnp.where(visible[:, :, None], read_pages(pool, layer, pages), 0)
        cached = cached.reshape(rows, block, kv_heads, 2, size)
        scores = jnp.einsum("bkgh,bskh->bkgs", query, cached[:, :, :, 0], **dot) * scale
        scores = jnp.where(visible[:, None, None, :], cap(scores, soft_cap), MASKED)
        new_top = jnp.maximum(top, jnp.max(scores, axis=-1))
        weights = jnp.where(visible[:, None, None, :], jnp.exp(scores - new_top[..., None]), 0.0)
        keep = jnp.exp(top - new_top)
        total = total * keep + jnp.sum(weights, axis=-1)
        values = jnp.einsum("bkgs,bskh->bkgh", weights.astype(pool.dtype), cached[:, :, :, 1], **dot)
        return new_top, total, seen * keep[..., None] + values

    shape = (rows, kv_heads, group)
    top, total = softmax_start(shape, None if sinks is None else sinks.reshape(kv_heads, group))
    start = (top, total, jnp.zeros((*shape, size), jnp.float32))
    first = jnp.min(jnp.where(lengths > 0, jnp.maximum(lengths - window, 0), jnp.int32(2**30))) // block
    _, total, seen = jax.lax.fori_loop(first, (jnp.max(lengths) + block - 1) // block, body, start)
    out = seen / jnp.maximum(total, 1e-30)[..., None]  # an empty row has total 0 and seen 0
    return out.reshape(rows, heads, size).astype(q.dtype), pool
