"""Prefill attention: packed chunks of several prompts, each over its own paged cache, written on the way."""

from __future__ import annotations

import jax
from jaxtyping import Array, Float, Int

from pallas_kernels.chips import Chip, ShapeDtype, pick, this_chip
from pallas_kernels.decode_attention import check
from pallas_kernels.prefill_attention import mosaic_gpu, reference, tpu

IMPLEMENTATIONS = {
    "tpu": tpu.prefill_attention,
    "mosaic_gpu": mosaic_gpu.prefill_attention,
    "xla": reference.prefill_attention,
}


def implementation_for(
    chip: Chip, q: ShapeDtype, pool: ShapeDtype, table: ShapeDtype, implementation: str | None = None
) -> str:
    """What runs on a chip for these shapes and dtypes; `prefill_attention` says what the rest means."""
    reasons = {
        "tpu": tpu.refusal(chip, q, pool, table),
        "mosaic_gpu": mosaic_gpu.refusal(chip, q, pool, table),
        "xla": None,
    }
    return pick("prefill attention", implementation, chip, reasons)


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
    implementation: str | None = None,
    chip: Chip | None = None,
) -> tuple[Float[Array, "T N H"], Float[Array, "L P page 2KH"]]:
    """(what each query saw, the pool with the chunks' keys and values in it). Causal.

    Sequence r's chunk is tokens `starts[r] : starts[r] + counts[r]` of the packed ones, at positions
    `offsets[r]` and on; chunks do not overlap and stand in order; a count of 0 is an empty row. Tokens that
    belong to no chunk write nothing and see nothing: their output is zero.
    table: i32, each sequence's pages in order; unused entries negative.
    window: positions seen, the query's own included; a huge one sees all.
    sinks: a score for each head that takes part in the softmax's sum and has no value.
    soft_cap: scores are bent into (-soft_cap, soft_cap).
    implementation: one of IMPLEMENTATIONS; None takes the first that can run on the chip.
    chip: compiled for; None takes the one that is here.
    Raises ValueError for shapes that do not fit or an implementation that is not there or cannot run.
    """
    check(q, kv, pool, table, rows=starts.shape[0])
    chip = chip or this_chip()
    run = IMPLEMENTATIONS[implementation_for(chip, q, pool, table, implementation)]
    with jax.named_scope("prefill_attention"):
        return run(
            q,
            kv,
            pool,
            layer,
            table,
            starts,
            counts,
            offsets,
            window,
            sinks,
            scale=scale,
            soft_cap=soft_cap,
            chip=chip,
        )
