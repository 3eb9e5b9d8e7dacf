"""Paged attention as loops over plain numbers, in float64: what both references are held against.

It knows nothing of blocks, of running softmaxes or of jax. It reads a page only where a query may see it.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Wide = NDArray[np.float64]


def write(pool: Wide, kv: Wide, layer: int, pages: NDArray[np.int32], position: int) -> None:
    """One token's keys and values to its place in the pool [L, P, page, 2KH], in place."""
    page = pool.shape[2]
    pool[layer, pages[position // page], position % page] = kv


def attend(
    query: Wide,
    pool: Wide,
    layer: int,
    pages: NDArray[np.int32],
    position: int,
    window: int,
    scale: float,
    soft_cap: float | None = None,
    sinks: Wide | None = None,
) -> Wide:
    """What one query [N, H] at `position` sees of its sequence: [N, H].

    sinks [N]: each head's is a key more, whose score it is and whose value is zero.
    """
    heads, size = query.shape
    page, kv_heads = pool.shape[2], pool.shape[3] // (2 * size)
    seen = np.arange(max(0, position - window + 1), position + 1)
    cached = pool[layer, pages[seen // page], seen % page].reshape(len(seen), kv_heads, 2, size)
    out = np.zeros((heads, size))
    for head in range(heads):
        keys, values = cached[:, head // (heads // kv_heads), 0], cached[:, head // (heads // kv_heads), 1]
        scores = keys @ query[head] * scale
        if soft_cap is not None:
            scores = soft_cap * np.tanh(scores / soft_cap)
        if sinks is not None:
            scores, values = np.append(scores, sinks[head]), np.vstack([values, np.zeros(size)])
        weights = np.exp(scores - scores.max())
        out[head] = weights @ values / weights.sum()
    return out
