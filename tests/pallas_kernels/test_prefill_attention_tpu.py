"""Prefill attention's TPU kernels, interpreted: against the reference in f32, and what they must not touch.

See test_decode_attention_tpu.py for what the interpreter checks.
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

from pallas_kernels import tpu_common
from pallas_kernels.chips import Chip
from pallas_kernels.prefill_attention import reference, tpu
from pallas_kernels.prefill_attention.cases import CASES, Case
from tests.pallas_kernels.comparing import TOLERANCE, wide

V5E = Chip("tpu", "v5e")
V5P = Chip("tpu", "v5p")  # two cores
NOWHERE = 10**6  # a page that the pool does not have
COMMON = Case((2, 4), 128, 32, "bfloat16", None, None, False, 128, "mixed")


@pytest.fixture(autouse=True)
def fresh_interpreter() -> Iterator[None]:
    """One that raised has to be reset."""
    yield
    pltpu.reset_tpu_interpret_mode_state()


def run(arguments: tuple[Any, ...], options: dict[str, Any], chip: Chip = V5E) -> tuple[NDArray, NDArray]:
    interpret = pltpu.InterpretParams(detect_races=True, num_cores_or_threads=2 if chip == V5P else 1)
    out, pool = tpu.prefill_attention(*arguments, **options, chip=chip, interpret=interpret)
    return np.asarray(out), np.asarray(pool)


def check(case: Case, chip: Chip) -> None:
    arguments, options = case.arrays()
    q, kv, *rest = arguments
    nobody = np.ones(case.tokens, np.bool_)
    for start, count, _ in case.rows:
        nobody[start : start + count] = False
    zeroed = (jnp.where(nobody[:, None, None], 0, q), jnp.where(nobody[:, None], 0, kv), *rest)
    spoiled = (jnp.where(nobody[:, None, None], jnp.nan, q), jnp.where(nobody[:, None], jnp.nan, kv), *rest)
    want, want_pool = reference.prefill_attention(*map(wide, zeroed), **options)
    out, pool = run(spoiled, options, chip)
    assert out.dtype == q.dtype and out.shape == q.shape
    error = np.abs(out.astype(np.float32) - np.asarray(want)).max()
    assert error <= TOLERANCE[case.dtype] * np.abs(want).max()
    np.testing.assert_array_equal(pool.astype(np.float32), np.asarray(want_pool))  # NaN equals NaN here
    assert not out[nobody].any()


@pytest.mark.parametrize("case", CASES[::4], ids=str)
def test_cases(case: Case) -> None:
    check(case, V5E)


@pytest.mark.slow
@pytest.mark.parametrize("case", [case for i, case in enumerate(CASES) if i % 4], ids=str)
def test_more_cases(case: Case) -> None:
    check(case, V5E)


@pytest.mark.slow
@pytest.mark.parametrize("case", [COMMON, dataclasses.replace(COMMON, window=40, chunks="one")], ids=str)
def test_two_cores(case: Case) -> None:
    check(case, V5P)


def test_several_blocks_to_a_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few tokens to a grid step and a page to a block: chunks begin and end within both, tiles are written by
    two steps, and the queue goes around its ring."""
    sizes = {"cores": 1, "query_rows": 128, "query_tokens": 32, "write_tokens": 32, "buffers": 3,
             "fetch_bytes": 1, "compute_positions": 16}  # fmt: skip
    monkeypatch.setattr(tpu_common, "tuned", lambda folder, chip: sizes)
    check(COMMON, V5E)
    check(dataclasses.replace(COMMON, window=40), V5E)


@pytest.mark.parametrize("window", [None, 40])
def test_parts_that_all_queries_see(window: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """With history before the chunk most parts need no mask: but for those at the diagonal, and with a window
    those that some of the block's queries see and others do not."""
    sizes = {"cores": 1, "query_rows": 128, "query_tokens": 16, "write_tokens": 32, "buffers": 3,
             "fetch_bytes": 1, "compute_positions": 16}  # fmt: skip
    monkeypatch.setattr(tpu_common, "tuned", lambda folder, chip: sizes)
    check(dataclasses.replace(COMMON, chunks="one", tokens=64, window=window), V5E)


@pytest.mark.parametrize("window", [None, 20])
def test_only_what_is_seen_is_fetched(window: int | None) -> None:
    """Every table entry that no query sees and no token is written to names a page that does not exist."""
    case = dataclasses.replace(COMMON, window=window)
    arguments, options = case.arrays()
    q, kv, pool, layer, table, *rest = arguments
    wanted = run(arguments, options)[0]
    page, blind = case.page, np.asarray(table).copy()
    for row, (_, count, offset) in enumerate(case.rows):
        first = max(0, offset - window + 1) // page if window else 0
        blind[row, : first if count else None] = NOWHERE
        blind[row, -(-(offset + count) // page) :] = NOWHERE
    got = run((q, kv, pool, layer, jnp.asarray(blind), *rest), options)[0]
    np.testing.assert_array_equal(got, wanted)

    blind[-1, -2 if window is None else -1] = NOWHERE  # one that is seen
    with pytest.raises(Exception, match=r"(?i)out.of.bounds"):
        run((q, kv, pool, layer, jnp.asarray(blind), *rest), options)


def test_a_chunk_does_not_depend_on_the_others() -> None:
    """Its bits, with the others and alone."""
    arguments, options = COMMON.arrays()
    counts = np.asarray(arguments[6])
    wanted = run(arguments, options)[0]
    for row in (0, 2):
        start = int(arguments[5][row])
        only = jnp.asarray(np.where(np.arange(len(counts)) == row, counts, 0), jnp.int32)
        got = run((*arguments[:6], only, *arguments[7:]), options)[0]
        np.testing.assert_array_equal(got[start : start + counts[row]], wanted[start : start + counts[row]])


@pytest.mark.parametrize(
    ("chip", "dtype", "page", "reason"),
    [
        (Chip("cpu", "cpu"), jnp.bfloat16, 16, "written for TPUs"),
        (V5E, jnp.float16, 16, "float16"),
        (V5E, jnp.bfloat16, 24, "24 positions"),
        (V5E, jnp.bfloat16, 16, None),
    ],
)
def test_refusal(chip: Chip, dtype: Any, page: int, reason: str | None) -> None:
    q, pool = jnp.zeros((16, 4, 128), dtype), jnp.zeros((1, 1, page, 512), dtype)
    refused = tpu.refusal(chip, q, pool, jnp.zeros((4, 9), jnp.int32))
    assert refused is None if reason is None else reason in (refused or "")
