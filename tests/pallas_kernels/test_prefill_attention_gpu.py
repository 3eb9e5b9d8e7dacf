"""The Mosaic GPU prefill kernel in jax's GPU interpreter, and on a Hopper card where one is there.

As for decode, only the products are replaced: wgmma with its left operand in registers is not interpreted.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import gpu_common
from pallas_kernels.cases import paged_cache
from pallas_kernels.chips import this_chip
from pallas_kernels.prefill_attention import mosaic_gpu, reference
from pallas_kernels.prefill_attention.cases import CASES, NO_WINDOW
from tests.pallas_kernels.comparing import TOLERANCE, wide


def interpreter() -> plgpu.InterpretGPUParams:
    return plgpu.InterpretGPUParams(detect_races=True)


def check(arguments: tuple[Any, ...], options: dict[str, Any], tolerance: float, **how: Any) -> Any:
    want, want_pool = jax.jit(lambda *a: reference.prefill_attention(*a, **options))(*map(wide, arguments))
    got, got_pool = jax.jit(lambda *a: mosaic_gpu.prefill_attention(*a, **options, **how))(*arguments)
    assert got.dtype == arguments[0].dtype
    want, got = np.asarray(want, np.float64), np.asarray(got, np.float64)
    np.testing.assert_allclose(got, want, rtol=0, atol=tolerance * np.abs(want).max(initial=0.0))
    # NaN equals NaN here: the rest of the pool is as it was. (numpy knows that of f32, not of bf16.)
    np.testing.assert_array_equal(np.asarray(got_pool, np.float32), np.asarray(want_pool, np.float32))
    return got


# A chunk: (position of its first token, tokens). What is before it is cached already.
def problem(
    chunks: list[tuple[int, int]],
    *,
    gap: int = 0,
    tokens: int = 256,
    heads: tuple[int, int] = (1, 2),
    size: int = 64,
    page: int = 32,
    table_width: int = 10,
    window: int = NO_WINDOW,
    dtype: Any = jnp.bfloat16,
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """These chunks one after the other, `gap` tokens of nobody before each; what belongs to nobody is NaN."""
    rng = np.random.default_rng(0)
    kv_heads, group = heads
    width = 2 * kv_heads * size
    ends = [offset + count if count else 0 for offset, count in chunks]
    pool, table = paged_cache(rng, ends, page=page, width=width, table_width=table_width, layers=2)
    q, kv = np.full((tokens, kv_heads * group, size), np.nan), np.full((tokens, width), np.nan)
    starts, at = [], 0
    for _, count in chunks:
        at += gap
        starts.append(at)
        q[at : at + count] = rng.standard_normal((count, kv_heads * group, size))
        kv[at : at + count] = rng.standard_normal((count, width))
        at += count
    offsets, counts = zip(*chunks, strict=True)
    arguments = (
        jnp.asarray(q, dtype),
        jnp.asarray(kv, dtype),
        jnp.asarray(pool, dtype),
        jnp.int32(1),
        jnp.asarray(table),
        jnp.asarray(starts, jnp.int32),
        jnp.asarray(counts, jnp.int32),
        jnp.asarray(offsets, jnp.int32),
        jnp.int32(window),
    )
    return arguments, {"scale": size**-0.5, "soft_cap": None}


# One of each head layout, head size, page and dtype here; every pair of them with `-m slow`.
QUICK = (1, 4, 8, 17, 32)


@pytest.mark.parametrize(
    "case",
    [pytest.param(c, marks=() if i in QUICK else pytest.mark.slow) for i, c in enumerate(CASES)],
    ids=str,
)
def test_interpreted(case: Any) -> None:
    arguments, options = case.arrays()
    check(arguments, options, TOLERANCE[case.dtype], interpret=interpreter())


@pytest.mark.parametrize(
    ("chunks", "gap", "window"),
    [
        ([(0, 50), (200, 1), (0, 0), (63, 66), (0, 90)], 7, NO_WINDOW),
        ([(0, 50), (200, 1), (0, 0), (63, 66), (0, 90)], 7, 40),
        ([(0, 1), (0, 1), (31, 1), (127, 1), (128, 1), (319, 1)], 0, NO_WINDOW),
        ([(64, 256)], 0, 100),
    ],
    ids=["packed", "packed-window", "single-tokens", "whole-window"],
)
def test_chunks(chunks: list[tuple[int, int]], gap: int, window: int) -> None:
    """Warpgroups of one tile have chunks of their own, share one, and have none."""
    arguments, options = problem(chunks, gap=gap, window=window)
    check(arguments, options, 1e-2, interpret=interpreter())


def test_a_window_does_not_read_what_is_behind_it() -> None:
    """Pages wholly behind the window may be freed, and hold NaN by then; stale numbers may be left, too."""
    arguments, options = problem([(200, 30), (100, 20)], tokens=128, window=20, heads=(1, 1))
    pool, table = np.array(arguments[2], np.float32), np.asarray(arguments[4])
    for row, offset in enumerate((200, 100)):
        for at in range(offset - 19):
            pool[1, table[row, at // 32], at % 32] = np.nan
    arguments = (*arguments[:2], jnp.asarray(pool, jnp.bfloat16), *arguments[3:])
    check(arguments, options, 1e-2, interpret=interpreter())


def test_chunking_changes_nothing() -> None:
    """Bit for bit: a prompt of 100 in one piece, and its last 30 tokens elsewhere among others."""
    arguments, options = problem([(0, 100)], tokens=128, heads=(1, 1))
    whole = check(arguments, options, 1e-2, interpret=interpreter())
    q, kv, pool, layer, table, *_, window = arguments
    _, pool = reference.prefill_attention(*arguments, **options)
    chunk = (jnp.asarray(x, jnp.int32) for x in ([0, 7], [0, 30], [0, 70]))
    rolled = (jnp.roll(x, -63, axis=0) for x in (q, kv))
    later = (*rolled, pool, layer, jnp.tile(table, (2, 1)), *chunk, window)
    part = check(later, options, 1e-2, interpret=interpreter())
    np.testing.assert_array_equal(part[7:37], whole[70:100])


@pytest.mark.parametrize("tokens", [1, 40, 130])
def test_tokens_that_are_no_whole_number_of_tiles(tokens: int) -> None:
    """The reference takes multiples of its block alone; the kernel fills its own up."""
    arguments, options = problem([(3, tokens)], tokens=tokens, heads=(1, 1))
    filled, _ = problem([(3, tokens)], tokens=256, heads=(1, 1))
    filled = (
        *(jnp.pad(x, ((0, 256 - tokens),) + ((0, 0),) * (x.ndim - 1)) for x in arguments[:2]),
        *arguments[2:],
    )
    want, _ = reference.prefill_attention(*filled, **options)
    got, _ = jax.jit(lambda *a: mosaic_gpu.prefill_attention(*a, **options, interpret=interpreter()))(
        *arguments
    )
    want, got = np.asarray(want, np.float32)[:tokens], np.asarray(got, np.float32)
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-2 * np.abs(want).max())


def test_chunks_of_each_block() -> None:
    starts = jnp.asarray([0, 0, 70, 128, 300], jnp.int32)
    counts = jnp.asarray([70, 0, 58, 100, 1], jnp.int32)
    first, last = mosaic_gpu._chunks(starts, counts, 4, 128)
    np.testing.assert_array_equal(first, [0, 3, 4, 0])
    np.testing.assert_array_equal(last, [2, 3, 4, -1])


def test_shared_memory_of_the_largest() -> None:
    """What a thread block holds at once, at every head size: queries, tiles, and the exact path's own."""
    for size in range(16, 257, 16):
        for exact in (False, True):
            ring, keys, warpgroups = mosaic_gpu.tiling(
                size, exact, gpu_common.tuned(mosaic_gpu._FOLDER)["h100"]
            )
            queries = warpgroups * gpu_common.BLOCK * size * (6 if exact else 2)
            held = queries + ring * keys * size * (4 if exact else 2) + (keys * size * 2 if exact else 0)
            assert held + 4096 <= gpu_common.SHARED_BYTES


@pytest.mark.skipif(this_chip().name not in ("h100", "h200"), reason="needs a Hopper card")
@pytest.mark.parametrize("case", CASES, ids=str)
def test_on_the_card(case: Any) -> None:
    arguments, options = case.arrays()
    check(arguments, options, TOLERANCE[case.dtype], chip=this_chip())
