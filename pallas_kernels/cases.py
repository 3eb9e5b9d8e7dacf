"""What every implementation is tried on: pairwise combinations, and the arrays of one. NumPy alone.

The pool is full of NaN wherever no sequence has written: in pages that nobody owns, and behind each
sequence's end in its last page. What leaks from there shows.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

# of every kernel over the paged cache
AXES: dict[str, Sequence[Any]] = {
    "heads": ((1, 1), (2, 1), (1, 8), (2, 4), (4, 2), (2, 3), (1, 16)),  # (key/value heads, queries to each)
    "head_size": (64, 80, 96, 128, 256),
    "page": (16, 32, 64, 128, 256),
    "dtype": ("bfloat16", "float32"),
    "window": (None, 1, 40),
    "soft_cap": (None, 5.0),
    "sinks": (False, True),
}


def pairwise(axes: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    """Few combinations that hold every pair of two axes' values: greedily the one with most new pairs.

    The same each time: no chance is involved.
    """
    names = list(axes)
    left = {
        (a, i, b, j)
        for a, b in itertools.combinations(names, 2)
        for i in range(len(axes[a]))
        for j in range(len(axes[b]))
    }
    rows = []
    while left:
        first = min(left)
        chosen = {first[0]: first[1], first[2]: first[3]}
        for name in names:
            if name not in chosen:
                gains = [
                    sum(_ordered(names, name, i, other, chosen[other]) in left for other in chosen)
                    for i in range(len(axes[name]))
                ]
                chosen[name] = gains.index(max(gains))
        for a, b in itertools.combinations(names, 2):
            left.discard((a, chosen[a], b, chosen[b]))
        rows.append({name: axes[name][chosen[name]] for name in names})
    return rows


def _ordered(names: list[str], a: str, i: int, b: str, j: int) -> tuple[str, int, str, int]:
    return (a, i, b, j) if names.index(a) < names.index(b) else (b, j, a, i)


def paged_cache(
    rng: np.random.Generator, lengths: Sequence[int], *, page: int, width: int, table_width: int, layers: int
) -> tuple[NDArray[np.float32], NDArray[np.int32]]:
    """(pool f32[layers, P, page, width], table i32[len(lengths), table_width]) where sequence r has
    `lengths[r]` positions.

    Pages stand in no order, there are more than are used, and neighbours in the list share their first page
    if both fill it.
    """
    pages = sum(-(-length // page) for length in lengths)
    free = rng.permutation(pages + 3).tolist()
    pool = np.full((layers, pages + 3, page, width), np.nan, np.float32)
    table = np.full((len(lengths), table_width), -1, np.int32)
    for r, length in enumerate(lengths):
        for i in range(-(-length // page)):
            if i == 0 and r and min(length, lengths[r - 1]) >= page:
                table[r, 0] = table[r - 1, 0]
                continue
            table[r, i] = free.pop()
            held = min(page, length - i * page)
            pool[:, table[r, i], :held] = rng.standard_normal((layers, held, width))
    return pool, table
