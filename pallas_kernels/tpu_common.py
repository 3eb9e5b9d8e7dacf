"""What both attention kernels for TPU share: where heads lie in a page's lanes, and pages brought to VMEM.

A page is read as it lies in HBM, `[page, 2·K·H]`, and a head is taken out of it by lanes. Lanes come in tiles
of 128, so each head's key and value get a window of whole tiles that holds them; queries are put at the key's
place in that window, with zeros around, and outputs are taken from the value's. With heads of 128 or 256 the
windows are the keys and values themselves, with 64 they hold both, and with 80 or 96 a neighbour's part too.

Positions are moved in pieces of whole pages, or at a sequence's ends of whole tiles of rows: a page of which
only some rows are seen costs these rows. Nothing else of the pool is read.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from pallas_kernels.chips import Chip, ShapeDtype

LANES, SUBLANES = 128, 8  # of one tile of f32
VMEM = {"v4": 16 * 2**20, "v5p": 64 * 2**20, "v7x": 64 * 2**20}  # bytes, as the compiler says
MOST_VMEM = 128 * 2**20  # of the others
VMEM_LIMIT = 96 * 2**20  # that a kernel may take where there is so much; what it takes is far less
TABLE_LIMIT = 960 * 2**10  # bytes of a page table in SMEM, which has 1 MiB
LOG2_E = math.log2(math.e)
MASKED = -1e30  # a score that is not seen
LOWEST = -5e29  # the greatest score before any was seen: 2 to the power of MASKED - LOWEST is 0


def rows_per_tile(dtype: Any) -> int:
    """Rows of the smallest piece that a copy may move: 8 of 32 bits, 16 of 16 bits."""
    return 32 // jnp.dtype(dtype).itemsize


def refusal(chip: Chip, q: ShapeDtype, pool: ShapeDtype, table: ShapeDtype) -> str | None:
    """Why neither kernel can run, or None."""
    if chip.platform != "tpu":
        return "it is written for TPUs"
    if pool.dtype not in (jnp.bfloat16, jnp.float32):
        return f"pages of {pool.dtype}: only bfloat16 and float32 are built"
    if pool.shape[2] % rows_per_tile(pool.dtype):
        return f"pages of {pool.shape[2]} positions are no whole number of {rows_per_tile(pool.dtype)} rows"
    if (size := 4 * table.shape[0] * table.shape[1]) > TABLE_LIMIT:
        return f"a page table of {size} bytes is more than scalar memory's {TABLE_LIMIT}: use larger pages"
    return None


@functools.cache
def tuned(folder: Path, chip: str) -> dict[str, int]:
    """Sizes for a chip by its name; the file's `default` for one that it does not name."""
    sizes = json.loads((folder / "tuned" / "tpu.json").read_text())
    return sizes.get(chip, sizes["default"])


@dataclasses.dataclass(frozen=True)
class Heads:
    """Where a pool's heads lie: each one's keys, and its values, in a window of `width` lanes."""

    size: int
    lanes: int  # of a page

    @property
    def count(self) -> int:
        return self.lanes // (2 * self.size)

    @property
    def width(self) -> int:
        """The most whole tiles that hold any head's key or value; pages of broken tiles are taken whole."""
        if self.lanes % LANES:
            return self.lanes
        starts = range(0, self.lanes, self.size)
        return LANES * max(-(-(start + self.size) // LANES) - start // LANES for start in starts)

    @property
    def stride(self) -> int:
        """Lanes of a query or an output: `width` in whole tiles."""
        return -(-self.width // LANES) * LANES

    def keys(self, k: Any) -> Any:
        """The first lane of the window of head k's key; k may be traced."""
        return self._window(2 * k * self.size)

    def values(self, k: Any) -> Any:
        return self._window((2 * k + 1) * self.size)

    def _window(self, start: Any) -> Any:
        if self.width == self.lanes:
            return 0
        low, most = start // LANES * LANES, self.lanes - self.width
        return min(low, most) if isinstance(low, int) else pl.multiple_of(jnp.minimum(low, most), LANES)

    def place(self, q: Float[Array, "B N H"]) -> Float[Array, "B N W"]:
        """Each query where its head's keys lie in their window, zeros around."""
        if self.stride == self.size:
            return q
        group = q.shape[1] // self.count
        places = [2 * k * self.size - self.keys(k) for k in range(self.count)]
        placed = [
            jnp.pad(q[:, k * group : (k + 1) * group], ((0, 0), (0, 0), (at, self.stride - at - self.size)))
            for k, at in enumerate(places)
        ]
        return jnp.concatenate(placed, axis=1)

    def extract(self, out: Float[Array, "B N W"]) -> Float[Array, "B N H"]:
        """Each head's part of its values' window."""
        if self.stride == self.size:
            return out
        group = out.shape[1] // self.count
        places = [(2 * k + 1) * self.size - self.values(k) for k in range(self.count)]
        parts = [out[:, k * group : (k + 1) * group, at : at + self.size] for k, at in enumerate(places)]
        return jnp.concatenate(parts, axis=1)


def bent(products: Float[Array, "*s"], scale: float, soft_cap: float | None) -> Float[Array, "*s"]:
    """Scores of products q·k, in units of log 2: the chip's exponential has base 2."""
    if soft_cap is None:
        return products * (scale * LOG2_E)
    return jnp.tanh(products * (scale / soft_cap)) * (soft_cap * LOG2_E)


def positions(limit_bytes: int, pool: jax.Array, table_width: int) -> int:
    """Of one fetch: whole pages, at least one, in about so many bytes of VMEM, no more than a table holds."""
    page, lanes = pool.shape[2], -(-pool.shape[3] // LANES) * LANES
    pages = limit_bytes // (page * lanes * pool.dtype.itemsize)
    return page * max(1, min(pages, table_width))


def part(fetch: int, limit: int, rows: int) -> int:
    """The largest divisor of a fetch that is no more than `limit` positions and a whole number of tiles."""
    return max(size for size in range(rows, min(fetch, limit) + rows, rows) if fetch % size == 0)


@dataclasses.dataclass(frozen=True)
class Fetch:
    """Blocks of `size` positions, from the pool in HBM to a ring of buffers in VMEM.

    pool: [L, P, page, C] in HBM. table: i32[R·table_width] in SMEM, row after row. buffers: [slots, size, C]
    in VMEM. semaphores: one for each slot.
    """

    pool: Any
    layer: Any
    table: Any
    table_width: int
    buffers: Any
    semaphores: Any

    @property
    def slots(self) -> int:
        return self.buffers.shape[0]

    @property
    def size(self) -> int:
        return self.buffers.shape[1]

    def start(self, row: Any, block: Any, low: Any, high: Any, slot: Any) -> None:
        """Begins to copy positions `low : high` of a row, as far as they are in the block."""
        self._each_copy(row, block, low, high, slot, lambda copy: copy.start())

    def wait(self, row: Any, block: Any, low: Any, high: Any, slot: Any) -> None:
        """Until what `start` with the same arguments began is there."""
        self._each_copy(row, block, low, high, slot, lambda copy: copy.wait())

    def _each_copy(
        self, row: Any, block: Any, low: Any, high: Any, slot: Any, do: Callable[[Any], None]
    ) -> None:
        page, rows = self.pool.shape[2], rows_per_tile(self.pool.dtype)
        start = block * self.size
        low, high = jnp.maximum(low, start), jnp.minimum(high, start + self.size)

        def one_page(i: Any, _: None) -> None:
            source = self.pool.at[self.layer, self.table[row * self.table_width + i]]
            first = jnp.maximum(low - i * page, 0) // rows
            last = pl.cdiv(jnp.minimum(high - i * page, page), rows)
            whole = last - first == page // rows

            def one_piece(from_row: Any, count: int) -> None:
                to_row = pl.multiple_of(i * page - start + from_row, rows)
                target = self.buffers.at[slot, pl.ds(to_row, count)]
                piece = source.at[pl.ds(from_row, count)]
                do(pltpu.make_async_copy(piece, target, self.semaphores.at[slot]))

            def one_tile(tile: Any, _: None) -> None:
                one_piece(pl.multiple_of(tile * rows, rows), rows)

            pl.when(whole)(lambda: one_piece(0, page))
            pl.when(~whole)(lambda: jax.lax.fori_loop(first, last, one_tile, None))

        jax.lax.fori_loop(low // page, pl.cdiv(high, page), one_page, None)

    def clear_outside(self, block: Any, low: Any, high: Any, slot: Any, part: int) -> None:
        """Zeros at all positions before `low` or from `high` on, in those parts that are not wholly so.

        What lies there was never written, or is a page's old content, and may be NaN: 0 · NaN is NaN.
        """
        rows = rows_per_tile(self.pool.dtype)
        low, high = low - block * self.size, high - block * self.size
        buffer = self.buffers.at[slot]

        def trim(tile: Any) -> None:
            at = pl.ds(pl.multiple_of(tile * rows, rows), rows)
            here = tile * rows + jax.lax.broadcasted_iota(jnp.int32, (rows, buffer.shape[1]), 0)
            kept = jnp.where((here >= low) & (here < high), buffer[at].astype(jnp.float32), 0.0)
            buffer[at] = kept.astype(buffer.dtype)

        def wipe(tile: Any, _: None) -> None:
            buffer[pl.ds(pl.multiple_of(tile * rows, rows), rows)] = jnp.zeros(
                (rows, buffer.shape[1]), buffer.dtype
            )

        @pl.when((low > 0) & (low % part != 0))
        def before() -> None:
            jax.lax.fori_loop(low // part * (part // rows), low // rows, wipe, None)
            pl.when(low % rows != 0)(lambda: trim(low // rows))

        @pl.when((high < self.size) & (high % part != 0))
        def behind() -> None:
            pl.when(high % rows != 0)(lambda: trim(high // rows))
            jax.lax.fori_loop(pl.cdiv(high, rows), pl.cdiv(high, part) * (part // rows), wipe, None)
