"""The Mosaic GPU decode kernel in jax's GPU interpreter, and on a Hopper card where one is there.

The interpreter runs all of it but wgmma with its left operand in registers, so products are taken by a plain
one (`interpret`); the page walk, copies, barriers, masks, softmax, splits and merge are the kernel's own, and
a race between them is an error.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import gpu_common
from pallas_kernels.cases import paged_cache
from pallas_kernels.chips import Chip, this_chip
from pallas_kernels.decode_attention import mosaic_gpu, reference
from pallas_kernels.decode_attention.cases import CASES, NO_WINDOW
from tests.pallas_kernels.comparing import TOLERANCE, wide

H100 = Chip("gpu", "h100")
# Splits of two blocks, few thread blocks: a row has several splits, a thread block several of them.
SMALL = {"h100": {"multiprocessors": 1, "tiles": 2, "split": 128, "most_splits": 3}}


def interpreter() -> plgpu.InterpretGPUParams:
    return plgpu.InterpretGPUParams(detect_races=True)


def check(arguments: tuple[Any, ...], options: dict[str, Any], tolerance: float, **how: Any) -> None:
    want, want_pool = jax.jit(lambda *a: reference.decode_attention(*a, **options))(*map(wide, arguments))
    got, got_pool = jax.jit(lambda *a: mosaic_gpu.decode_attention(*a, **options, **how))(*arguments)
    assert got.dtype == arguments[0].dtype
    want, got = np.asarray(want, np.float64), np.asarray(got, np.float64)
    np.testing.assert_allclose(got, want, rtol=0, atol=tolerance * np.abs(want).max(initial=0.0))
    # NaN equals NaN here: the rest of the pool is as it was. (numpy knows that of f32, not of bf16.)
    np.testing.assert_array_equal(np.asarray(got_pool, np.float32), np.asarray(want_pool, np.float32))


def problem(
    lengths: list[int],
    *,
    heads: tuple[int, int] = (2, 2),
    size: int = 64,
    page: int = 32,
    table_width: int = 20,
    window: int = NO_WINDOW,
    dtype: Any = jnp.float32,
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments for rows of these lengths; all there is but what they hold is NaN."""
    rng = np.random.default_rng(0)
    kv_heads, group = heads
    width = 2 * kv_heads * size
    pool, table = paged_cache(rng, lengths, page=page, width=width, table_width=table_width, layers=2)
    arguments = (
        jnp.asarray(rng.standard_normal((len(lengths), kv_heads * group, size)), dtype),
        jnp.asarray(rng.standard_normal((len(lengths), width)), dtype),
        jnp.asarray(pool, dtype),
        jnp.int32(1),
        jnp.asarray(table),
        jnp.asarray(lengths, jnp.int32),
        jnp.int32(window),
    )
    return arguments, {"scale": size**-0.5, "soft_cap": None}


# One of each head layout, head size, page and dtype here; every pair of them with `-m slow`.
QUICK = (1, 3, 8, 12, 21)


@pytest.mark.parametrize(
    "case",
    [pytest.param(c, marks=() if i in QUICK else pytest.mark.slow) for i, c in enumerate(CASES)],
    ids=str,
)
def test_interpreted(case: Any) -> None:
    arguments, options = case.arrays()
    check(arguments, options, TOLERANCE[case.dtype], interpret=interpreter())


@pytest.mark.parametrize("window", [NO_WINDOW, 150])
def test_many_splits(monkeypatch: pytest.MonkeyPatch, window: int) -> None:
    """Three splits of unlike lengths, two, one and none; several of them to each thread block."""
    monkeypatch.setattr(gpu_common, "tuned", lambda folder: SMALL)
    arguments, options = problem([640, 385, 0, 130, 7], window=window)
    check(arguments, options, 1e-5, interpret=interpreter())


def test_a_row_does_not_depend_on_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bit for bit: among others, and at another place, with a wider table and other thread blocks."""
    (q, kv, pool, layer, table, lengths, window), options = problem([300, 77], heads=(1, 2))

    def run(order: list[int], table: Any, multiprocessors: int) -> Any:
        sizes = {"h100": SMALL["h100"] | {"multiprocessors": multiprocessors}}
        monkeypatch.setattr(gpu_common, "tuned", lambda folder: sizes)
        rows = jnp.asarray(order)
        arguments = (q[rows], kv[rows], pool, layer, table[rows], lengths[rows], window)
        how = {**options, "interpret": interpreter()}
        out, _ = jax.jit(lambda *a: mosaic_gpu.decode_attention(*a, **how))(*arguments)
        return np.asarray(out)

    together = run([0, 1], table, 1)
    wide = jnp.pad(table, ((0, 0), (0, 20)), constant_values=-1)
    np.testing.assert_array_equal(run([1, 1, 0], wide, 2), together[[1, 1, 0]])


@pytest.mark.parametrize("window", [NO_WINDOW, 1, 40])
def test_only_pages_that_are_seen_are_copied(monkeypatch: pytest.MonkeyPatch, window: int) -> None:
    """Counted in the interpreter, and a page that must not be read has no number that could be."""
    copied: list[tuple[int, int]] = []
    copy = gpu_callbacks.copy_gmem_to_smem

    def counted(*, src_transforms: Any, **rest: Any) -> Any:
        rows = src_transforms[-1].indices[0]
        copied.append((int(rows.start), int(rows.size)))
        return copy(src_transforms=src_transforms, **rest)

    monkeypatch.setattr(gpu_callbacks, "copy_gmem_to_smem", counted)
    page, lengths = 16, [100, 0, 33, 16, 1]
    arguments, options = problem(lengths, page=page, table_width=8, window=window, heads=(1, 2))
    table = np.asarray(arguments[4])
    num_pages = arguments[2].shape[1]
    check(arguments, options, 1e-5, interpret=interpreter())
    want = sum(
        2  # the keys', and the values'
        for row, length in enumerate(lengths)
        for at in range(-(-length // page))
        if (at + 1) * page > length - window and table[row, at] >= 0
    )
    pages = [((start - num_pages * page) // page) for start, size in copied if size == page]
    assert len(pages) == want
    assert set(pages) <= set(table[table >= 0].tolist())


@pytest.mark.parametrize("splits", [1, 3, 32])
@pytest.mark.parametrize("window", [1, 100, 700, NO_WINDOW])
def test_work(splits: int, window: int) -> None:
    """Each position that a row sees is in one piece of work, in order."""
    lengths = [0, 1, 64, 65, 511, 512, 513, 2000, 0, 4096, 3]
    work, count, counts = mosaic_gpu._work(jnp.asarray(lengths, jnp.int32), jnp.int32(window), splits, 512)
    assert work.shape == (len(lengths) * splits, 4)
    seen: dict[int, list[tuple[int, int]]] = {}
    for row, split, begin, end in np.asarray(work)[: int(count)].tolist():
        assert split == len(seen.setdefault(row, []))
        seen[row].append((begin, end))
    for row, length in enumerate(lengths):
        pieces = seen.get(row, [])
        assert len(pieces) == int(counts[row]) <= splits
        low = max(length - window, 0)
        assert [p for begin, end in pieces for p in range(begin, end)] == list(range(low, length))
        assert all(begin % gpu_common.BLOCK == 0 for begin, _ in pieces[1:])
        assert all(begin < end for begin, end in pieces)


def test_parts_add_up_to_the_whole() -> None:
    x = np.random.default_rng(0).standard_normal(1000).astype(np.float32) * 10.0 ** np.arange(-20, 20, 0.04)
    x = x.astype(np.float32)
    cut = [np.asarray(part, np.float64) for part in jax.jit(gpu_common.split)(jnp.asarray(x))]
    np.testing.assert_array_equal(sum(cut), x.astype(np.float64))


@pytest.mark.parametrize("soft_cap", [None, 5.0, 50.0])
def test_scores_are_bent_as_by_tanh(soft_cap: float | None) -> None:
    scores = np.concatenate([np.linspace(-300, 300, 1001), [-1e30, -1e6, 0.0, 1e6, 1e30]])
    got = gpu_common.bent(jnp.asarray(scores, jnp.float32), 0.5, soft_cap)
    want = 0.5 * scores if soft_cap is None else soft_cap * np.tanh(0.5 * scores / soft_cap)
    np.testing.assert_allclose(np.asarray(got) / math.log2(math.e), want, rtol=1e-6, atol=5e-6)


@pytest.mark.parametrize(
    ("chip", "q", "pool", "dtype", "reason"),
    [
        (H100, (4, 8, 128), (2, 9, 64, 512), "bfloat16", None),
        (H100, (4, 8, 80), (2, 9, 16, 320), "float32", None),
        (Chip("tpu", "v5e"), (4, 8, 128), (2, 9, 64, 512), "bfloat16", "NVIDIA"),
        (Chip("cpu", "cpu"), (4, 8, 128), (2, 9, 64, 512), "bfloat16", "NVIDIA"),
        (Chip("gpu", "b200"), (4, 8, 128), (2, 9, 64, 512), "bfloat16", "Hopper"),
        (H100, (4, 8, 128), (2, 9, 64, 512), "float16", "float16"),
        (H100, (4, 8, 72), (2, 9, 64, 288), "bfloat16", "head size 72"),
        (H100, (4, 8, 512), (2, 9, 64, 2048), "bfloat16", "head size 512"),
        (H100, (4, 8, 128), (2, 9, 12, 512), "bfloat16", "page of 12"),
        (H100, (4, 71, 64), (2, 9, 64, 128), "bfloat16", "71 queries"),
    ],
)
def test_refusal(chip: Chip, q: Any, pool: Any, dtype: str, reason: str | None) -> None:
    said = mosaic_gpu.refusal(chip, *(jax.ShapeDtypeStruct(shape, dtype) for shape in (q, pool, (4, 9))))
    assert said is None if reason is None else said is not None and reason in said


@pytest.mark.skipif(this_chip().name not in ("h100", "h200"), reason="needs a Hopper card")
@pytest.mark.parametrize("case", CASES, ids=str)
def test_on_the_card(case: Any) -> None:
    arguments, options = case.arrays()
    check(arguments, options, TOLERANCE[case.dtype], chip=this_chip())
