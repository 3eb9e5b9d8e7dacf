"""Bytes of the pool that one call of a kernel takes from device memory and puts there, by what it was given.

Plain counting of what the kernels' own docstrings say that they fetch; a test counts the copies that they
make in interpret mode and holds this against them. NumPy alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence


def decode_bytes(
    implementation: str, lengths: Sequence[int], window: int, *, page: int, width: int, itemsize: int
) -> int:
    """Of decode attention over rows of these lengths, the new token's included. width: 2·K·H.

    Raises ValueError for an implementation that nothing is known of.
    """
    unit, written = _units(implementation, page, itemsize)
    moved = 0
    for length in lengths:
        if length:
            first = max(length - window, 0) // unit * unit
            moved += -(-length // unit) * unit - first + written
    return moved * width * itemsize


def _units(implementation: str, page: int, itemsize: int) -> tuple[int, int]:
    """(positions that are fetched together, positions that are written for one new token)."""
    if implementation == "tpu":
        tile = 32 // itemsize  # rows of the smallest piece that a copy may move
        return tile, tile
    if implementation == "mosaic_gpu":
        return math.gcd(page, 64), 0  # XLA writes the new token before the kernel runs
    raise ValueError(f"what {implementation=} fetches is not known")
