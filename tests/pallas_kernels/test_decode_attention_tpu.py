"""Decode attention's TPU kernel, interpreted: against the reference in f32, and what it must not touch.

The interpreter keeps the chip's memories, copies and semaphores apart, hands out memory full of NaN, finishes
a copy only when something waits for it, and stops at a data race and at an address that is not there.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu
from numpy.typing import NDArray

from pallas_kernels.chips import Chip
from pallas_kernels.decode_attention import reference, tpu
from pallas_kernels.decode_attention.cases import CASES, Case
from tests.pallas_kernels.comparing import TOLERANCE, wide

V5E = Chip("tpu", "v5e")
V5P = Chip("tpu", "v5p")  # two cores
NOWHERE = 10**6  # a page that the pool does not have
COMMON = Case((2, 4), 128, 32, "bfloat16", None, None, False, "mixed")


@pytest.fixture(autouse=True)
def fresh_interpreter() -> Iterator[None]:
    """One that raised has to be reset."""
    yield
    pltpu.reset_tpu_interpret_mode_state()


def run(arguments: tuple[Any, ...], options: dict[str, Any], chip: Chip = V5E) -> tuple[NDArray, NDArray]:
    interpret = pltpu.InterpretParams(detect_races=True, num_cores_or_threads=2 if chip == V5P else 1)
    out, pool = tpu.decode_attention(*arguments, **options, chip=chip, interpret=interpret)
    return np.asarray(out), np.asarray(pool)


def check(case: Case, chip: Chip) -> None:
    arguments, options = case.arrays()
    want, want_pool = reference.decode_attention(*map(wide, arguments), **options)
    out, pool = run(arguments, options, chip)
    assert out.dtype == arguments[0].dtype and out.shape == arguments[0].shape
    error = np.abs(out.astype(np.float32) - np.asarray(want)).max()
    assert error <= TOLERANCE[case.dtype] * np.abs(want).max()
    np.testing.assert_array_equal(pool.astype(np.float32), np.asarray(want_pool))  # NaN equals NaN here
    assert not out[np.asarray(case.row_lengths) == 0].any()


@pytest.mark.parametrize("case", CASES[::4], ids=str)
def test_cases(case: Case) -> None:
    check(case, V5E)


@pytest.mark.slow
@pytest.mark.parametrize("case", [case for i, case in enumerate(CASES) if i % 4], ids=str)
def test_more_cases(case: Case) -> None:
    check(case, V5E)


@pytest.mark.parametrize("case", [COMMON, dataclasses.replace(COMMON, window=40, lengths="one")], ids=str)
def test_two_cores(case: Case) -> None:
    check(case, V5P)


def test_several_blocks_to_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """A page to a block: the queue goes from row to row, over empty ones, and around its ring."""
    monkeypatch.setattr(tpu.tpu_common, "positions", lambda limit, pool, width: pool.shape[2])
    check(COMMON, V5E)
    check(dataclasses.replace(COMMON, window=40), V5E)


@pytest.mark.parametrize("window", [None, 40])
def test_only_what_is_seen_is_fetched(window: int | None) -> None:
    """Every table entry that no query sees names a page that does not exist."""
    arguments, options = dataclasses.replace(COMMON, window=window).arrays()
    q, kv, pool, layer, table, lengths, *rest = arguments
    wanted = run(arguments, options)[0]
    page, blind = COMMON.page, np.asarray(table).copy()
    for row, length in enumerate(COMMON.row_lengths):
        first = max(0, length - window) // page if window else 0
        blind[row, :first] = NOWHERE
        blind[row, -(-length // page) :] = NOWHERE
    assert (blind == NOWHERE).sum() > (blind != NOWHERE).sum() / 2
    got = run((q, kv, pool, layer, jnp.asarray(blind), lengths, *rest), options)[0]
    np.testing.assert_array_equal(got, wanted)

    row = COMMON.row_lengths.index(3 * page)
    blind[row, 1 if window is None else 2] = NOWHERE  # one that is seen
    with pytest.raises(Exception, match=r"(?i)out.of.bounds"):
        run((q, kv, pool, layer, jnp.asarray(blind), lengths, *rest), options)


def test_a_row_does_not_depend_on_the_others() -> None:
    """Its bits, alone and at another place among others."""
    arguments, options = COMMON.arrays()
    q, kv, pool, layer, table, lengths, *rest = arguments
    wanted = run(arguments, options)[0]
    order = np.array([4, 0, 6, 1, 2, 3, 7, 5])
    shuffled = (q[order], kv[order], pool, layer, table[order], lengths[order], *rest)
    np.testing.assert_array_equal(run(shuffled, options)[0], wanted[order])
    alone = (q[4:5], kv[4:5], pool, layer, table[4:5], lengths[4:5], *rest)
    np.testing.assert_array_equal(run(alone, options)[0], wanted[4:5])


@pytest.mark.parametrize(
    ("chip", "dtype", "page", "reason"),
    [
        (Chip("cpu", "cpu"), jnp.bfloat16, 16, "written for TPUs"),
        (Chip("gpu", "h100"), jnp.bfloat16, 16, "written for TPUs"),
        (V5E, jnp.float16, 16, "float16"),
        (V5E, jnp.bfloat16, 24, "24 positions"),
        (V5E, jnp.bfloat16, 16, None),
        (V5E, jnp.float32, 8, None),
    ],
)
def test_refusal(chip: Chip, dtype: Any, page: int, reason: str | None) -> None:
    q, pool = jnp.zeros((1, 4, 128), dtype), jnp.zeros((1, 1, page, 512), dtype)
    refused = tpu.refusal(chip, q, pool, jnp.zeros((4, 9), jnp.int32))
    assert refused is None if reason is None else reason in (refused or "")
