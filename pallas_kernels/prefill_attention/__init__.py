"""Prefill attention: packed chunks of several prompts, each over its own paged cache, written on the way."""

from __future__ import annotations

import jax
from jaxtyping import Array, Float, Int

from pallas_kernels.decode_attention import check
from pallas_kernels.prefill_attention import reference

IMPLEMENTATIONS = ("xla",)


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
    *,
    scale: float,
    implementation: str | None = None,
) -> tuple[Float[Array, "T N H"], Float[Array, "L P page 2KH"]]:
    """(what each query saw, the pool with the chunks' keys and values in it). Causal.

    Sequence r's chunk is tokens `starts[r] : starts[r] + counts[r]` of the packed ones, at positions
    `offsets[r]` and on; chunks do not overlap and stand in order; a count of 0 is an empty row. Tokens that
    belong to no chunk write nothing and see nothing: their output is zero.
    table: i32, each sequence's pages in order; unused entries negative.
    window: positions seen, the query's own included; a huge one sees all.
    Raises ValueError for shapes that do not fit or an implementation that is not there.
    """
    check(q, kv, pool, table, rows=starts.shape[0])
    if implementation not in (None, *IMPLEMENTATIONS):
        raise ValueError(f"{implementation=} of prefill attention is not one of {IMPLEMENTATIONS}")
    with jax.named_scope("prefill_attention"):
        return reference.prefill_attention(
            q, kv, pool, layer, table, starts, counts, offsets, window, scale=scale
        )
