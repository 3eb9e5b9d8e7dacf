"""The cases that every implementation is tried on: they hold each pair of values, and are few."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from pallas_kernels.cases import AXES, paged_cache, pairwise
from pallas_kernels.decode_attention import cases as decode_cases
from pallas_kernels.prefill_attention import cases as prefill_cases

KERNELS = {
    "decode": (decode_cases, {**AXES, "lengths": ("mixed", "one", "none")}),
    "prefill": (prefill_cases, {**AXES, "tokens": (128, 32, 384), "chunks": ("mixed", "one", "none")}),
}


def missing(axes: dict[str, Sequence[Any]], rows: list[dict[str, Any]]) -> list[tuple[Any, ...]]:
    return [
        (a, x, b, y)
        for a, b in itertools.combinations(axes, 2)
        for x, y in itertools.product(axes[a], axes[b])
        if not any(row[a] == x and row[b] == y for row in rows)
    ]


@pytest.mark.parametrize(("cases", "axes"), KERNELS.values(), ids=KERNELS)
def test_every_pair_is_there(cases: Any, axes: dict[str, Sequence[Any]]) -> None:
    rows = [{name: getattr(case, name) for name in axes} for case in cases.CASES]
    assert missing(axes, rows) == []
    assert len(rows) <= 40
    assert len({str(case) for case in cases.CASES}) == len(rows)


def test_the_search_for_pairs_sees_what_is_missing() -> None:
    axes = {"a": (1, 2), "b": (3, 4), "c": (5, 6)}
    rows = pairwise(axes)
    assert missing(axes, rows) == [] and len(rows) < 8
    assert missing(axes, rows[1:])


def test_the_axes_are_what_is_promised() -> None:
    assert set(AXES["head_size"]) >= {64, 80, 96, 128, 256}
    assert {min(AXES["page"]), max(AXES["page"])} == {16, 256}
    assert set(AXES["dtype"]) == {"bfloat16", "float32"}
    kv_heads_alone, one_to_many = (1, 1) in AXES["heads"], any(kv == 1 and n > 1 for kv, n in AXES["heads"])
    assert kv_heads_alone and one_to_many and any(kv > 1 and n == 1 for kv, n in AXES["heads"])
    assert None in AXES["window"] and None in AXES["soft_cap"] and set(AXES["sinks"]) == {False, True}


@pytest.mark.parametrize("cases", [decode_cases, prefill_cases], ids=["decode", "prefill"])
def test_cases_are_hard(cases: Any) -> None:
    """Between them: empty rows, length 1, one token over a page, a full table, shared pages, NaN around."""
    lengths, shared = set(), False
    for case in cases.CASES:
        arguments, _ = case.arrays()
        pool, table = np.asarray(arguments[2], np.float32), np.asarray(arguments[4])
        assert np.isnan(pool[:, :, -1]).any(), "no page is unused or has an unused end"
        if cases is decode_cases:
            rows = case.row_lengths
        else:
            rows = [count and offset + count for _, count, offset in case.rows]
        page = case.page
        full = table.shape[1] * page
        lengths |= {
            name
            for name, found in {
                "empty": 0 in rows,
                "one token over a page": page + 1 in rows or any(length % page == 1 for length in rows),
                "a full table": full in rows,
            }.items()
            if found
        }
        used = table[table >= 0]
        shared |= len(set(used.tolist())) < len(used)
        for row, length in zip(table, rows, strict=True):
            assert (row[: -(-length // page)] >= 0).all() and (row[-(-length // page) :] < 0).all()
    assert lengths == {"empty", "one token over a page", "a full table"}
    assert shared


def test_a_paged_cache() -> None:
    pool, table = paged_cache(
        np.random.default_rng(0), (0, 5, 4, 9), page=4, width=6, table_width=4, layers=2
    )
    assert pool.shape[0] == 2 and pool.shape[2:] == (4, 6) and table.shape == (4, 4)
    assert table[1, 0] == table[2, 0] == table[3, 0]  # filled by all three, and shared
    held = dict.fromkeys(table[1:, 0], 4) | {table[1, 1]: 1, table[3, 1]: 4, table[3, 2]: 1}
    assert (table[0] == -1).all() and (table[2, 1:] == -1).all()
    for page in range(pool.shape[1]):
        real = ~np.isnan(pool[:, page]).any(axis=(0, 2))
        assert real.tolist() == [at < held.get(page, 0) for at in range(4)]


def test_shapes_are_those_of_the_arrays() -> None:
    for case in (decode_cases.CASES[3], prefill_cases.CASES[5]):
        real, _ = case.arrays()
        abstract, _ = case.shapes()
        for a, b in zip(real, abstract, strict=True):
            assert (a is None) == (b is None)
            assert a is None or (a.shape, a.dtype) == (b.shape, b.dtype)
