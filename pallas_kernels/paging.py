"""What both attention references share: pages in plain XLA, and the softmax that is rescaled as it goes."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

MASKED = -1e30  # a score that loses to any real one; -inf would make inf - inf in an empty row


def precision(dtype: jnp.dtype) -> jax.lax.Precision:
    return jax.lax.Precision.HIGHEST if dtype == jnp.float32 else jax.lax.Precision.DEFAULT


def cap(scores: Float[Array, "*s"], soft_cap: float | None) -> Float[Array, "*s"]:
    """Scores bent into (-soft_cap, soft_cap) (Bello et al. 2016; Gemma 2)."""
    return scores if soft_cap is None else soft_cap * jnp.tanh(scores / soft_cap)


def softmax_start(
    shape: tuple[int, ...], sinks: Float[Array, "*heads"] | None
) -> tuple[Float[Array, "*shape"], Float[Array, "*shape"]]:
    """(the greatest score, the sum of exponentials over it) before any key was seen.

    sinks: a score for each head that takes part in the sum and has no value (Xiao et al. 2023; gpt-oss).
    """
    if sinks is None:
        return jnp.full(shape, MASKED, jnp.float32), jnp.zeros(shape, jnp.float32)
    return jnp.broadcast_to(sinks.astype(jnp.float32), shape), jnp.ones(shape, jnp.float32)


def write_tokens(
    pool: Float[Array, "L P page C"],
    kv: Float[Array, "T C"],
    layer: Int[Array, ""],
    pages: Int[Array, " T"],
    offsets: Int[Array, " T"],
) -> Float[Array, "L P page C"]:
    """The pool with `kv[t]` at `[layer, pages[t], offsets[t]]`; a token whose page is negative is dropped."""
    layers, num_pages = pool.shape[:2]
    flat = pool.reshape(layers * num_pages, *pool.shape[2:])
    rows = jnp.where(pages >= 0, layer * num_pages + pages, layers * num_pages)
    return flat.at[rows, offsets].set(kv, mode="drop").reshape(pool.shape)


def pages_per_block(pool: Float[Array, "L P page C"], table_width: int, positions: int) -> int:
    """Pages to read at a time so that they hold about so many positions."""
    return max(1, min(positions // pool.shape[2], table_width))


def pad_table(table: Int[Array, "B PP"], multiple: int) -> Int[Array, "B PP"]:
    return jnp.pad(table, ((0, 0), (0, -table.shape[1] % multiple)), constant_values=-1)


def read_pages(
    pool: Float[Array, "L P page C"], layer: Int[Array, ""], pages: Int[Array, "*B n"]
) -> Float[Array, "*B S C"]:
    """S = n·page positions a row. Negative pages read some page; the caller masks what it may not see."""
    layers, num_pages, page, width = pool.shape
    flat = pool.reshape(layers * num_pages, page, width)
    rows = layer * num_pages + jnp.maximum(pages, 0)
    taken = flat.at[rows].get(mode="promise_in_bounds")
    return taken.reshape(*pages.shape[:-1], pages.shape[-1] * page, width)
