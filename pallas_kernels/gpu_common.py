"""What the Mosaic GPU kernels share: what they can run, tiles in shared memory, products, the softmax.

A tile is BLOCK cached positions of one head's keys or values. A warpgroup multiplies 64 rows of queries with
it (wgmma). float32 has no exact path on the tensor cores, so each operand is split into three bfloat16 parts
whose sum it is, and the six products that reach 2⁻²⁴ are summed, the smallest first. What is copied need not
be what is multiplied: a float32 tile is loaded, cut, and put where wgmma reads it, and a quantised one can be
scaled on that way.

Blackwell has no wgmma: there LLVM ends the process when it meets one.
"""

from __future__ import annotations

import functools
import json
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.chips import Chip, ShapeDtype

BLOCK = 64  # cached positions of a tile, and the rows that wgmma multiplies at a time
LOG2E = 1.4426950408889634
LOWEST = -1e20  # the greatest score before any was seen: above a masked one, below any real one
MASKED = -1e30  # 2 to the power of (MASKED - LOWEST) is exactly 0
SHARED_BYTES = 232_448  # of one block on Hopper


def parts(dtype: Any) -> int:
    """Into how many bfloat16 an operand is split."""
    return 3 if dtype == jnp.float32 else 1


def split(x: Float[Array, "*s"]) -> list[Float[Array, "*s"]]:
    """bf16 parts, the greatest first, that add up to `x` exactly (f32), or `x` itself (bf16).

    By cutting bits off, which no compiler simplifies away as it may do with a conversion there and back.
    """
    if x.dtype != jnp.float32:
        return [x]
    cut = []
    for _ in range(2):
        bits = jax.lax.bitcast_convert_type(x, jnp.int32) & jnp.int32(-65536)
        high = jax.lax.bitcast_convert_type(bits, jnp.float32)
        cut.append(high.astype(jnp.bfloat16))
        x = x - high
    return [*cut, x.astype(jnp.bfloat16)]


def transforms(columns: int, itemsize: int = 2) -> tuple[Any, ...]:
    """How [rows, columns] lies in shared memory for wgmma: the widest swizzle that divides the columns."""
    swizzle = _row_bytes(columns, itemsize)
    tiling: Any = plgpu.TilingTransform
    swizzling: Any = plgpu.SwizzleTransform
    return (tiling((8, swizzle // itemsize)), swizzling(swizzle))


def _row_bytes(columns: int, itemsize: int) -> int:
    return next(bytes_ for bytes_ in (128, 64, 32) if columns * itemsize % bytes_ == 0)


@functools.cache
def tuned(folder: pathlib.Path) -> dict[str, dict[str, int]]:
    """Sizes per chip."""
    return json.loads((folder / "tuned" / "gpu.json").read_text())


def refusal(chip: Chip, q: ShapeDtype, pool: ShapeDtype, chips: Sequence[str]) -> str | None:
    """Why the kernels cannot run on this chip, dtype or shape."""
    size, page = q.shape[-1], pool.shape[2]
    group = q.shape[-2] * 2 * size // pool.shape[-1]
    if chip.platform != "gpu":
        return "for NVIDIA GPUs only"
    if chip.name not in chips:
        return f"wgmma is Hopper's: compiled for {', '.join(chips)} only"
    if q.dtype not in (jnp.bfloat16, jnp.float32):
        return f"{q.dtype} is neither bfloat16 nor float32"
    if size % 16 or size > 256:
        return f"head size {size} is no multiple of 16 up to 256"
    if page % 8:
        return f"a page of {page} is no multiple of 8"
    if group > BLOCK:
        return f"{group} queries to a key/value head are more than {BLOCK}"
    return None


def bent(scores: Float[Array, "*s"], scale: float, soft_cap: float | None) -> Float[Array, "*s"]:
    """Scores from products: scaled, capped, and in powers of two, so that exp2 undoes them.

    tanh x = 1 - 2 / (e²ˣ + 1): the hardware's own tanh is good to 2⁻¹¹ only.
    """
    if soft_cap is None:
        return scores * (scale * LOG2E)
    power = jnp.exp2(scores * (2 * LOG2E * scale / soft_cap))
    return soft_cap * LOG2E - (2 * soft_cap * LOG2E) / (power + 1.0)


def along_rows(column: Float[Array, " m"], like: Float[Array, "m n"]) -> Float[Array, "m n"]:
    return jax.lax.broadcast_in_dim(column, like.shape, [0])


def softmax_step(
    scores: Float[Array, "m s"], top: Float[Array, " m"], total: Float[Array, " m"]
) -> tuple[Float[Array, "m s"], Float[Array, " m"], Float[Array, " m"], Float[Array, " m"]]:
    """(weights, what earlier sums are multiplied with, greatest score, sum of weights)."""
    new_top = jnp.maximum(top, scores.max(axis=1))
    weights = jnp.exp2(scores - along_rows(new_top, scores))
    keep = jnp.exp2(top - new_top)
    return weights, keep, new_top, total * keep + weights.sum(axis=1)


def row_layout(values: Float[Array, " m"]) -> Float[Array, " m"]:
    """One value to a row of a wgmma result."""
    return plgpu.layout_cast(values, plgpu.Layout.WGMMA.reduce(1))


def iota(shape: tuple[int, ...], dimension: int) -> Int[Array, "m n"]:
    rows, columns = shape
    return plgpu.broadcasted_iota(jnp.int32, (rows, columns), dimension, layout=plgpu.Layout.WGMMA)


def query_key(queries: Any, keys: Any, part: Any, *, interpret: bool) -> Float[Array, "m s"]:
    """queries · keysᵀ.

    queries: ref bf16[parts, m, H]. keys: ref [s, H] of bf16, or of f32 with `part`, a ref bf16[s, H] to put
        one part of them at a time where wgmma reads it.
    interpret: by products that the interpreter knows.
    """
    shape = (queries.shape[1], keys.shape[0])
    if part is None:
        return _products([([queries.at[0]], None)], keys.transpose((1, 0)), shape, interpret)
    lefts = [queries.at[a] for a in range(queries.shape[0])]
    return _products(_steps(lefts, tile_values, keys, part), part.transpose((1, 0)), shape, interpret)


def weigh(
    seen: Float[Array, "m H"],
    weights: Float[Array, "m s"],
    values: Any,
    part: Any,
    held: Callable[[tuple[int, ...]], Bool[Array, "s w"]],
    *,
    interpret: bool,
) -> Float[Array, "m H"]:
    """seen + weights · values. values, part: as the keys of `query_key`.

    held: which positions of a shape's rows there are; what lies elsewhere may be NaN. Only asked with `part`:
        without it, the caller has zeroed that.
    """
    rows, size = seen.shape
    if part is None:
        low = weights.astype(jnp.bfloat16)
        if interpret:
            return seen + _products([([low], None)], values, (rows, size), interpret)
        return pl.run_state(lambda out: plgpu.wgmma(out, low, values))(plgpu.WGMMAAccumulatorRef.init(seen))

    def load(tile: Any) -> Array:
        return jnp.where(held(tile.shape), tile_values(tile), 0.0)

    # From zero each time: the tensor cores cut sums off, and over a long context that adds up.
    lefts, sums = split(weights), []
    for column in range(0, size, 128):  # registers are short
        width = min(128, size - column)
        some = (slice(None), pl.ds(column, width))
        own = _products(
            _steps(lefts, load, values.at[some], part.at[some]), part.at[some], (rows, width), interpret
        )
        sums.append(jax.lax.slice(seen, (0, column), (rows, column + width)) + own)
    return sums[0] if len(sums) == 1 else jnp.concatenate(sums, axis=1)


def _steps(
    lefts: list[Any], load: Callable[[Any], Float[Array, "s w"]], right: Any, part: Any
) -> list[tuple[list[Any], Callable[[], None] | None]]:
    """What to multiply with `part` once it has been filled; the smallest products first."""

    def fill(number: int) -> None:
        for some in _some_columns(part):
            part.at[some][...] = split(load(right.at[some]))[number]
        plgpu.commit_smem()

    last = len(lefts) - 1
    return [
        (lefts[last - number :: -1], functools.partial(fill, number))
        for number in reversed(range(len(lefts)))
    ]


def _products(
    steps: list[tuple[list[Any], Callable[[], None] | None]],
    right: Any,
    shape: tuple[int, int],
    interpret: bool,
) -> Float[Array, "m n"]:
    """The sum of all lefts · right, a ref that each step fills. Lefts are refs, or arrays in registers."""
    if interpret:
        done = []
        for lefts, fill in steps:
            if fill is not None:
                fill()
            values = right[...]
            done += [jnp.dot(left[...], values, preferred_element_type=jnp.float32) for left in lefts]
            plgpu.commit_smem()  # wgmma reads as the copies write; these loads do not
        return functools.reduce(jnp.add, done)

    def products(out: Any) -> Array:
        for lefts, fill in steps:
            if fill is not None:
                plgpu.wgmma_wait(0)
                fill()
            for left in lefts:
                plgpu.wgmma(out, left, right)
        return out[...]

    return pl.run_scoped(products, plgpu.WGMMAAccumulatorRef(shape, jnp.float32))


def zero_unheld(tile: Any, held: Callable[[tuple[int, ...]], Bool[Array, "s w"]]) -> None:
    """Zeroes positions of a tile of values that are not held: 0 · NaN is NaN, so to mask the weights is not
    enough. held: which of a shape's rows are."""
    for some in _some_columns(tile):
        columns = tile.at[some]
        columns[...] = jnp.where(held(columns.shape), tile_values(columns), 0)
    plgpu.commit_smem()


def _some_columns(tile: Any) -> list[Any]:
    """A bf16 tile's columns, few at a time: registers are short."""
    width = _row_bytes(tile.shape[1], 2) // 2
    return [(slice(None), pl.ds(column, width)) for column in range(0, tile.shape[1], width)]


def tile_values(tile: Any) -> Float[Array, "s H"]:
    """A tile in registers."""
    return plgpu.layout_cast(tile[...], plgpu.Layout.WGMMA)
