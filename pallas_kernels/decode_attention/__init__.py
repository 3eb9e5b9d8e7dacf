"""Decode attention: one new token per row over its paged cache, its key and value written on the way."""

from __future__ import annotations

import jax
from jaxtyping import Array, Float, Int

from pallas_kernels.chips import Chip, ShapeDtype, pick, this_chip
from pallas_kernels.decode_attention import mosaic_gpu, reference, tpu

IMPLEMENTATIONS = {
    "tpu": tpu.decode_attention,
    "mosaic_gpu": mosaic_gpu.decode_attention,
    "xla": reference.decode_attention,
}


def implementation_for(
    chip: Chip, q: ShapeDtype, pool: ShapeDtype, table: ShapeDtype, implementation: str | None = None
) -> str:
    """What runs on a chip for these shapes and dtypes; `decode_attention` says what the rest means."""
    reasons = {
        "tpu": tpu.refusal(chip, q, pool, table),
        "mosaic_gpu": mosaic_gpu.refusal(chip, q, pool, table),
        "xla": None,
    }
    return pick("decode attention", implementation, chip, reasons)


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
    implementation: str | None = None,
    chip: Chip | None = None,
) -> tuple[Float[Array, "B N H"], Float[Array, "L P page 2KH"]]:
    """(what each row's query saw, the pool with the new token in it).

    lengths: cached positions including the new token, which lies at `lengths - 1`; 0 is an empty row, whose
        output is zero and which writes nothing.
    table: the row's pages in order; unused entries negative.
    window: positions seen, the query's own included; a huge one sees all.
    sinks: a score for each head that takes part in the softmax's sum and has no value.
    soft_cap: scores are bent into (-soft_cap, soft_cap).
    implementation: one of IMPLEMENTATIONS; None takes the first that can run on the chip.
    chip: compiled for; None takes the one that is here.
    Raises ValueError for shapes that do not fit or an implementation that is not there or cannot run.
    """
    check(q, kv, pool, table, rows=q.shape[0])
    chip = chip or this_chip()
    run = IMPLEMENTATIONS[implementation_for(chip, q, pool, table, implementation)]
    with jax.named_scope("decode_attention"):
        return run(
            q, kv, pool, layer, table, lengths, window, sinks, scale=scale, soft_cap=soft_cap, chip=chip
        )


def check(q: Array, kv: Array, pool: Array, table: Array, *, rows: int) -> None:
    tokens, heads, size = q.shape
    if not tokens or not rows:
        raise ValueError(f"{q.shape=} and {table.shape=}: there must be a token and a row")
    if kv.shape != (tokens, pool.shape[-1]):
        raise ValueError(
            f"{kv.shape=} must be ({tokens}, {pool.shape[-1]}): tokens, then 2·K·H as in the pool"
        )
    if pool.shape[-1] % (2 * size) or heads % (pool.shape[-1] // (2 * size)):
        raise ValueError(f"{q.shape=} and {pool.shape=} share no whole number of key/value heads")
    if table.shape[0] != rows:
        raise ValueError(f"{table.shape=} must have {rows} rows")
    if q.dtype != pool.dtype or kv.dtype != pool.dtype:
        raise ValueError(f"{q.dtype=}, {kv.dtype=} and {pool.dtype=} differ")
