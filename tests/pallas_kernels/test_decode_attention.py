"""Decode attention against loops in float64, over pages of NaN wherever no sequence has written."""

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

from pallas_kernels import decode_attention
from tests.pallas_kernels import oracle

ALL = 2**30  # a window that sees everything
LAYERS, LAYER = 2, 1
TOLERANCE = {np.dtype(np.float32): 1e-5, np.dtype(ml_dtypes.bfloat16): 1e-2}

attend = jax.jit(
    decode_attention, static_argnames=("scale", "soft_cap", "implementation"), donate_argnames="pool"
)


@dataclasses.dataclass
class Problem:
    """Arguments in the pool's own dtype; see `decode_attention`."""

    q: NDArray[Any]
    kv: NDArray[Any]
    pool: NDArray[Any]
    table: NDArray[np.int32]
    lengths: NDArray[np.int32]
    window: int
    scale: float
    soft_cap: float | None = None
    sinks: NDArray[np.float32] | None = None

    def run(self) -> tuple[NDArray[Any], NDArray[Any]]:
        """(output, pool); the pool's buffer is given away, as the engine does."""
        out, pool = attend(
            self.q, self.kv, jnp.asarray(self.pool), np.int32(LAYER), self.table, self.lengths,
            np.int32(self.window), self.sinks, scale=self.scale, soft_cap=self.soft_cap,
        )  # fmt: skip
        return np.asarray(out), np.asarray(pool)

    def expected(self) -> tuple[NDArray[Any], NDArray[Any]]:
        pool, q = self.pool.astype(np.float64), self.q.astype(np.float64)
        out, sinks = np.zeros(q.shape), None if self.sinks is None else self.sinks.astype(np.float64)
        for row, length in enumerate(self.lengths):
            if length:
                oracle.write(pool, self.kv[row].astype(np.float64), LAYER, self.table[row], length - 1)
        for row, length in enumerate(self.lengths):
            if length:
                out[row] = oracle.attend(
                    q[row], pool, LAYER, self.table[row], length - 1, self.window, self.scale,
                    self.soft_cap, sinks,
                )  # fmt: skip
        return out, pool.astype(self.pool.dtype)


def problem(
    lengths: list[int],
    *,
    heads: tuple[int, int] = (4, 2),
    size: int = 16,
    page: int = 16,
    table_width: int = 20,
    window: int = ALL,
    dtype: Any = np.float32,
    seed: int = 0,
) -> Problem:
    """Sequences of these lengths, the new token counted, whose place in the pool is NaN; pages scattered."""
    rng = np.random.default_rng(seed)
    query_heads, kv_heads = heads
    width = 2 * kv_heads * size
    counts = [-(-length // page) for length in lengths]
    pages = rng.permutation(len(lengths) * table_width)  # a fixed number: one more compiles again
    pool = np.full((LAYERS, len(pages), page, width), np.nan)
    table = np.full((len(lengths), table_width), -1, np.int32)
    taken = 0
    for row, (length, count) in enumerate(zip(lengths, counts, strict=True)):
        table[row, :count] = pages[taken : taken + count]
        taken += count
        for at in range(length - 1):
            pool[LAYER, table[row, at // page], at % page] = rng.standard_normal(width)
    table[[length == 0 for length in lengths]] = table[np.argmax(lengths)]  # must not be written to
    return Problem(
        q=(2 * rng.standard_normal((len(lengths), query_heads, size))).astype(dtype),
        kv=rng.standard_normal((len(lengths), width)).astype(dtype),
        pool=pool.astype(dtype),
        table=table,
        lengths=np.array(lengths, np.int32),
        window=window,
        scale=size**-0.5,
    )


def check(case: Problem, tolerance: float | None = None) -> None:
    want, want_pool = case.expected()
    out, pool = case.run()
    assert out.dtype == case.q.dtype and out.shape == case.q.shape
    error = np.abs(out.astype(np.float64) - want).max(initial=0.0)
    assert error <= (tolerance or TOLERANCE[case.pool.dtype]) * np.abs(want).max(initial=0.0), error
    # NaN equals NaN here: the rest of the pool is as it was. (numpy knows that of f32, not of bf16.)
    np.testing.assert_array_equal(pool.astype(np.float32), want_pool.astype(np.float32))
    empty = case.lengths == 0
    assert not out[empty].any()


# Lengths are data, not shapes: with six rows, each head layout, page size and dtype compiles once.
LENGTHS = {
    "length 1 and empty rows": [1, 0, 1, 0, 0, 1],
    "about one page": [15, 16, 17, 1, 0, 33],
    "about one block": [127, 128, 129, 0, 2, 130],
    "a full table": [320, 319, 1, 0, 64, 65],
    "the first row empty": [0, 5, 90, 31, 32, 200],
}


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_lengths(lengths: list[int]) -> None:
    check(problem(lengths))


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize(("page", "table_width"), [(16, 20), (64, 5)])
@pytest.mark.parametrize("heads", [(4, 4), (6, 2), (4, 1)], ids=["MHA", "GQA", "MQA"])
def test_heads_pages_and_dtypes(heads: tuple[int, int], page: int, table_width: int, dtype: Any) -> None:
    check(problem([1, 65, 0, 320, 64, 129], heads=heads, page=page, table_width=table_width, dtype=dtype))


@pytest.mark.parametrize("window", [1, 2, 16, 100, 128, 129, 320])
def test_window(window: int) -> None:
    check(problem([1, 65, 0, 320, 16, 129], window=window))


def test_a_window_does_not_read_what_is_behind_it() -> None:
    """Pages wholly behind the window may be freed, and hold NaN by then."""
    case = problem([1, 65, 0, 320, 16, 129], window=20)
    for row, length in enumerate(case.lengths):
        for at in range(max(0, length - 20)):
            case.pool[LAYER, case.table[row, at // 16], at % 16] = np.nan
    check(case)


@pytest.mark.parametrize("window", [ALL, 40])
@pytest.mark.parametrize("soft_cap", [0.5, 5.0, 50.0])
def test_soft_cap(soft_cap: float, window: int) -> None:
    case = problem([1, 65, 0, 320, 16, 129], window=window)
    want, _ = case.expected()
    case.soft_cap = soft_cap
    bent, _ = case.expected()
    assert np.abs(bent - want).max() > 1e-3  # or this would show nothing
    check(case)


@pytest.mark.parametrize("window", [ALL, 1])
@pytest.mark.parametrize("soft_cap", [None, 5.0])
def test_sinks(soft_cap: float | None, window: int) -> None:
    """Far below every score, among them, and far above: from no share of the weight to nearly all of it."""
    case = problem([1, 65, 0, 320, 16, 129], window=window)
    case.soft_cap = soft_cap
    case.sinks = np.array([-100.0, 0.0, 2.0, 30.0], np.float32)
    check(case)
    out, _ = case.run()
    without, _ = dataclasses.replace(case, sinks=None).run()
    np.testing.assert_array_equal(out[:, 0], without[:, 0])
    assert np.abs(out[:, 3]).max() < 1e-6


@pytest.mark.parametrize("heads", [(4, 4), (6, 2), (4, 1)], ids=["MHA", "GQA", "MQA"])
def test_sinks_and_soft_cap_in_bf16(heads: tuple[int, int]) -> None:
    case = problem([1, 65, 0, 320, 16, 129], heads=heads, dtype=ml_dtypes.bfloat16)
    case.soft_cap = 5.0
    case.sinks = np.linspace(-2, 4, heads[0], dtype=np.float32)
    check(case)


def test_pages_shared_between_sequences() -> None:
    """Three rows with a common prefix of 128 positions and an end of their own."""
    case = problem([160, 129, 150, 0, 1, 128])
    case.table[1, :8] = case.table[0, :8]
    case.table[2, :8] = case.table[0, :8]
    check(case)


def test_a_table_narrower_than_a_block() -> None:
    check(problem([48, 1, 0, 47, 33, 16], table_width=3))


def test_a_table_that_is_no_multiple_of_a_block() -> None:
    check(problem([144, 1, 0, 129, 143, 128], table_width=9))


@pytest.mark.parametrize("seed", range(8))
def test_random(seed: int) -> None:
    rng = np.random.default_rng(seed)
    lengths = np.where(rng.random(6) < 0.2, 0, rng.integers(1, 321, 6)).tolist()
    check(problem(lengths, window=int(rng.choice([ALL, 1, 50, 200])), seed=seed))


def test_large_scores() -> None:
    """Scores of some thousands, where f32 itself is good to 1e-4: the running maximum keeps them finite."""
    case = problem([320, 200, 0, 1, 128, 129])
    case.q *= 1000
    check(case, tolerance=1e-3)


def test_a_row_does_not_depend_on_the_others() -> None:
    """Bit for bit: alone among empty rows, at another place, beside longer ones."""
    case = problem([129, 320, 1, 64, 200, 17])
    together, _ = case.run()
    for row in (0, 2, 4):
        lengths = np.zeros(6, np.int32)
        lengths[5 - row] = case.lengths[row]
        order = np.arange(6)
        order[[row, 5 - row]] = order[[5 - row, row]]
        alone, _ = dataclasses.replace(
            case, q=case.q[order], kv=case.kv[order], table=case.table[order], lengths=lengths
        ).run()
        np.testing.assert_array_equal(alone[5 - row], together[row])


def change(**fields: Callable[[Problem], Any]) -> Problem:
    case = problem([5, 1, 0, 9, 3, 2])
    return dataclasses.replace(case, **{name: make(case) for name, make in fields.items()})


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
    with pytest.raises(ValueError, match=message):
        change(**fields).run()


def test_an_unknown_implementation() -> None:
    case = problem([5, 1, 0, 9, 3, 2])
    with pytest.raises(ValueError, match="implementation='triton' of decode attention"):
        decode_attention(
            case.q, case.kv, case.pool, np.int32(0), case.table, case.lengths, np.int32(ALL),
            scale=1.0, implementation="triton",
        )  # fmt: skip
