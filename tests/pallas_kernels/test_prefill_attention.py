"""Prefill attention against loops in float64, over pages of NaN wherever no sequence has written."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from numpy.typing import NDArray

from pallas_kernels import decode_attention, prefill_attention
from tests.pallas_kernels import oracle

ALL = 2**30  # a window that sees everything
LAYERS, LAYER = 2, 1
ROWS, TOKENS = 4, 256
TOLERANCE = {np.dtype(np.float32): 1e-5, np.dtype(ml_dtypes.bfloat16): 1e-2}

attend = jax.jit(
    prefill_attention, static_argnames=("scale", "soft_cap", "implementation"), donate_argnames="pool"
)

# A chunk: (position of its first token, tokens). What is before it is cached already.
Chunk = tuple[int, int]


@dataclasses.dataclass
class Problem:
    """Arguments in the pool's own dtype; see `prefill_attention`."""

    q: NDArray[Any]
    kv: NDArray[Any]
    pool: NDArray[Any]
    table: NDArray[np.int32]
    starts: NDArray[np.int32]
    counts: NDArray[np.int32]
    offsets: NDArray[np.int32]
    window: int
    scale: float
    soft_cap: float | None = None
    sinks: NDArray[np.float32] | None = None

    def run(self) -> tuple[NDArray[Any], NDArray[Any]]:
        """(output, pool); the pool's buffer is given away, as the engine does."""
        out, pool = attend(
            self.q, self.kv, jnp.asarray(self.pool), np.int32(LAYER), self.table, self.starts, self.counts,
            self.offsets, np.int32(self.window), self.sinks, scale=self.scale, soft_cap=self.soft_cap,
        )  # fmt: skip
        return np.asarray(out), np.asarray(pool)

    def expected(self) -> tuple[NDArray[Any], NDArray[Any]]:
        pool, q = self.pool.astype(np.float64), self.q.astype(np.float64)
        kv, out = self.kv.astype(np.float64), np.zeros(q.shape)
        sinks = None if self.sinks is None else self.sinks.astype(np.float64)
        tokens = [
            (row, self.starts[row] + i, self.offsets[row] + i)
            for row in range(len(self.starts))
            for i in range(self.counts[row])
        ]
        for row, at, position in tokens:
            oracle.write(pool, kv[at], LAYER, self.table[row], position)
        for row, at, position in tokens:
            out[at] = oracle.attend(
                q[at], pool, LAYER, self.table[row], position, self.window, self.scale, self.soft_cap, sinks
            )
        return out, pool.astype(self.pool.dtype)


def problem(
    chunks: list[Chunk],
    *,
    gap: int = 0,
    heads: tuple[int, int] = (4, 2),
    size: int = 16,
    page: int = 16,
    table_width: int = 20,
    tokens: int = TOKENS,
    window: int = ALL,
    dtype: Any = np.float32,
    seed: int = 0,
) -> Problem:
    """These chunks packed one after the other, `gap` tokens of nobody before each; further rows are empty.
    Pages are scattered; queries, keys and values of tokens outside of any chunk are NaN."""
    rng = np.random.default_rng(seed)
    query_heads, kv_heads = heads
    width = 2 * kv_heads * size
    needed = [-(-(offset + count) // page) for offset, count in chunks]
    pages = rng.permutation(ROWS * table_width)  # a fixed number: one more compiles again
    pool = np.full((LAYERS, len(pages), page, width), np.nan)
    table = np.full((ROWS, table_width), -1, np.int32)
    starts, counts, offsets = np.zeros((3, ROWS), np.int32)
    q, kv = np.full((tokens, query_heads, size), np.nan), np.full((tokens, width), np.nan)
    taken = start = 0
    for row, ((offset, count), pages_of) in enumerate(zip(chunks, needed, strict=True)):
        table[row, :pages_of] = pages[taken : taken + pages_of]
        taken += pages_of
        for at in range(offset):
            pool[LAYER, table[row, at // page], at % page] = rng.standard_normal(width)
        start += gap
        starts[row], counts[row], offsets[row] = start, count, offset
        q[start : start + count] = 2 * rng.standard_normal((count, query_heads, size))
        kv[start : start + count] = rng.standard_normal((count, width))
        start += count
    starts[len(chunks) :] = start
    table[counts == 0] = table[np.argmax(counts + offsets)]  # must not be written to
    q, kv, pool = q.astype(dtype), kv.astype(dtype), pool.astype(dtype)
    return Problem(q, kv, pool, table, starts, counts, offsets, window, size**-0.5)


def check(case: Problem, tolerance: float | None = None) -> None:
    want, want_pool = case.expected()
    out, pool = case.run()
    assert out.dtype == case.q.dtype and out.shape == case.q.shape
    error = np.abs(out.astype(np.float64) - want).max(initial=0.0)
    assert error <= (tolerance or TOLERANCE[case.pool.dtype]) * np.abs(want).max(initial=0.0), error
    # NaN equals NaN here: the rest of the pool is as it was. (numpy knows that of f32, not of bf16.)
    np.testing.assert_array_equal(pool.astype(np.float32), want_pool.astype(np.float32))
    outside = np.ones(len(out), np.bool_)
    for start, count in zip(case.starts, case.counts, strict=True):
        outside[start : start + count] = False
    assert not out[outside].any()


# Lengths are data, not shapes: each head layout, page size and dtype compiles once.
CHUNKS: dict[str, list[Chunk]] = {
    "a single token": [(0, 1)],
    "a whole prompt": [(0, 256)],
    "about one page": [(0, 15), (0, 16), (0, 17), (0, 33)],
    "chunks share query blocks": [(0, 100), (0, 20), (0, 90), (0, 46)],
    "the second block alone": [(0, 128), (0, 128)],
    "empty rows between": [(0, 0), (0, 60), (0, 0), (0, 70)],
    "continues a cached prefix": [(100, 60)],
    "continue prefixes, packed": [(1, 30), (128, 100), (0, 40), (15, 86)],
    "a full table": [(64, 256)],
    "one token after a long prefix": [(319, 1), (128, 1), (127, 1), (16, 1)],
    "nothing at all": [],
}


@pytest.mark.parametrize("chunks", CHUNKS.values(), ids=CHUNKS)
def test_chunks(chunks: list[Chunk]) -> None:
    check(problem(chunks))


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize(("page", "table_width"), [(16, 20), (64, 5)])
@pytest.mark.parametrize("heads", [(4, 4), (6, 2), (4, 1)], ids=["MHA", "GQA", "MQA"])
def test_heads_pages_and_dtypes(heads: tuple[int, int], page: int, table_width: int, dtype: Any) -> None:
    chunks = [(0, 65), (190, 90), (0, 0), (63, 66)]
    check(problem(chunks, heads=heads, page=page, table_width=table_width, dtype=dtype))


@pytest.mark.parametrize("window", [1, 2, 16, 100, 128, 129, 320])
def test_window(window: int) -> None:
    check(problem([(0, 65), (190, 90), (5, 20), (63, 66)], window=window))


def test_a_window_does_not_read_what_is_behind_it() -> None:
    """Pages wholly behind the window may be freed, and hold NaN by then."""
    case = problem([(0, 65), (190, 90), (5, 20), (200, 66)], window=20)
    for row, offset in enumerate(case.offsets):
        for at in range(max(0, offset - 19)):
            case.pool[LAYER, case.table[row, at // 16], at % 16] = np.nan
    check(case)


def test_tokens_of_nobody_between_chunks() -> None:
    check(problem([(0, 50), (70, 40), (0, 0), (10, 60)], gap=13))


@pytest.mark.parametrize("window", [ALL, 40])
@pytest.mark.parametrize("soft_cap", [0.5, 5.0, 50.0])
def test_soft_cap(soft_cap: float, window: int) -> None:
    case = problem([(0, 65), (190, 90), (5, 20), (63, 66)], window=window)
    want, _ = case.expected()
    case.soft_cap = soft_cap
    bent, _ = case.expected()
    assert np.abs(bent - want).max() > 1e-3  # or this would show nothing
    check(case)


@pytest.mark.parametrize("window", [ALL, 1])
@pytest.mark.parametrize("soft_cap", [None, 5.0])
def test_sinks(soft_cap: float | None, window: int) -> None:
    """Far below every score, among them, and far above: from no share of the weight to nearly all of it."""
    case = problem([(0, 65), (190, 90), (5, 20), (63, 66)], window=window)
    case.soft_cap = soft_cap
    case.sinks = np.array([-100.0, 0.0, 2.0, 30.0], np.float32)
    check(case)
    out, _ = case.run()
    without, _ = dataclasses.replace(case, sinks=None).run()
    np.testing.assert_array_equal(out[:, 0], without[:, 0])
    assert np.abs(out[:, 3]).max() < 1e-6


@pytest.mark.parametrize("heads", [(4, 4), (6, 2), (4, 1)], ids=["MHA", "GQA", "MQA"])
def test_sinks_and_soft_cap_in_bf16(heads: tuple[int, int]) -> None:
    case = problem([(0, 65), (190, 90), (5, 20), (63, 66)], heads=heads, dtype=ml_dtypes.bfloat16)
    case.soft_cap = 5.0
    case.sinks = np.linspace(-2, 4, heads[0], dtype=np.float32)
    check(case)


def test_pages_shared_between_sequences() -> None:
    """Three rows continue one cached prefix of 128 positions."""
    case = problem([(128, 70), (128, 60), (128, 33), (0, 5)])
    case.table[1, :8] = case.table[0, :8]
    case.table[2, :8] = case.table[0, :8]
    check(case)


def test_few_tokens() -> None:
    """Fewer than a query block: the whole is one block."""
    check(problem([(0, 5), (30, 20), (0, 0), (3, 7)], tokens=32))


@pytest.mark.parametrize("table_width", [3, 9])
def test_a_table_that_is_no_whole_number_of_blocks(table_width: int) -> None:
    limit = table_width * 16
    check(problem([(0, limit), (limit - 5, 5), (0, 1), (limit - 20, 20)], table_width=table_width))


@pytest.mark.parametrize("seed", range(8))
def test_random(seed: int) -> None:
    rng = np.random.default_rng(seed)
    cuts = np.sort(rng.integers(0, TOKENS + 1, ROWS))
    counts = np.diff(cuts, prepend=0)
    chunks = [(int(rng.integers(0, 321 - count)), int(count)) for count in counts]
    check(problem(chunks, window=int(rng.choice([ALL, 1, 50, 200])), seed=seed))


def test_large_scores() -> None:
    """Scores of some thousands, where f32 itself is good to 1e-4: the running maximum keeps them finite."""
    case = problem([(0, 65), (190, 90), (5, 20), (63, 66)])
    case.q *= 1000
    check(case, tolerance=1e-3)


def test_chunking_changes_nothing() -> None:
    """One prompt of 200 in one piece, and in three that lie elsewhere among the packed tokens."""
    case = problem([(0, 200)])
    want, _ = case.run()
    pool, got = jnp.asarray(case.pool), []
    for start, count in ((0, 70), (70, 58), (128, 72)):
        part = dataclasses.replace(case, pool=np.asarray(pool))
        part.q, part.kv = np.zeros_like(case.q), np.zeros_like(case.kv)
        part.q[40 : 40 + count], part.kv[40 : 40 + count] = (
            case.q[start : start + count],
            case.kv[start : start + count],
        )
        part.starts = np.full(ROWS, 40, np.int32)
        part.counts = np.array([count, 0, 0, 0], np.int32)
        part.offsets = np.array([start, 0, 0, 0], np.int32)
        out, pool = part.run()
        got.append(out[40 : 40 + count])
    error = np.abs(np.concatenate(got) - want[:200]).max()
    assert error < 1e-6


def test_decode_continues_prefill() -> None:
    """A chunk of one token is a decode step."""
    case = problem([(100, 1), (17, 1), (0, 1), (319, 1)])
    out, pool = case.run()
    one, one_pool = decode_attention(
        case.q[:4], case.kv[:4], jnp.asarray(case.pool), np.int32(LAYER), case.table, case.offsets + 1,
        np.int32(ALL), scale=case.scale,
    )  # fmt: skip
    np.testing.assert_allclose(out[:4], np.asarray(one), rtol=0, atol=1e-6)
    np.testing.assert_array_equal(pool, np.asarray(one_pool))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"kv": lambda case: case.kv[:, :-2]}, "kv.shape"),
        ({"kv": lambda case: case.kv[:-1]}, "kv.shape"),
        ({"q": lambda case: case.q[:, :3]}, "whole number of key/value heads"),
        ({"q": lambda case: case.q[:, :, :12]}, "whole number of key/value heads"),
        ({"table": lambda case: case.table[:-1]}, "table.shape"),
        ({"q": lambda case: case.q.astype(ml_dtypes.bfloat16)}, "differ"),
        ({"kv": lambda case: case.kv.astype(np.float16)}, "differ"),
    ],
)
def test_arguments_that_do_not_fit(fields: dict[str, Callable[[Problem], Any]], message: str) -> None:
    case = problem([(0, 5)])
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(case, **{name: make(case) for name, make in fields.items()}).run()


@pytest.mark.parametrize("tokens", [130, 200])
def test_any_number_of_tokens(tokens: int) -> None:
    case = problem([(0, 100), (17, 30)])
    wanted, pool = case.run()
    assert len(wanted) > tokens
    out, same = dataclasses.replace(case, q=case.q[:tokens], kv=case.kv[:tokens]).run()
    np.testing.assert_array_equal(out, wanted[:tokens])
    np.testing.assert_array_equal(same, pool)


def test_an_unknown_implementation() -> None:
    case = problem([(0, 5)])
    with pytest.raises(ValueError, match="implementation='triton' of prefill attention"):
        prefill_attention(
            case.q, case.kv, case.pool, np.int32(0), case.table, case.starts, case.counts, case.offsets,
            np.int32(ALL), scale=1.0, implementation="triton",
        )  # fmt: skip
