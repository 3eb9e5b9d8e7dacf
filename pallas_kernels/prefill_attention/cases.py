"""The cases of prefill attention."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.cases import AXES, paged_cache, pairwise

TABLE_WIDTH = 4
LAYERS = 2
NO_WINDOW = 2**30


@dataclasses.dataclass(frozen=True)
class Case:
    """tokens: of the whole pack. chunks: mixed has a fresh prompt, an empty row, a later chunk that begins
    within a page, one that ends at a page's end, a single token, and tokens that belong to nobody."""

    heads: tuple[int, int]
    head_size: int
    page: int
    dtype: str
    window: int | None
    soft_cap: float | None
    sinks: bool
    tokens: int
    chunks: str

    def __str__(self) -> str:
        return "-".join(f"{value}" for value in dataclasses.astuple(self)).replace(" ", "")

    @property
    def rows(self) -> tuple[tuple[int, int, int], ...]:
        """(start, count, offset) of each sequence's chunk."""
        t, page = self.tokens, self.page
        full = TABLE_WIDTH * page
        if self.chunks == "one":  # as long as the pack, and as far back as the table lets it be
            return ((0, min(t, full), max(full - t, 0)),)
        if self.chunks == "none":
            return ((0, 0, 0), (0, 0, 0))
        eighth = t // 8
        last = min(eighth + 3, page)
        return (
            (0, min(2 * eighth + 1, full), 0),
            (0, 0, 0),
            (2 * eighth + 1, min(eighth, full - page - 5), page + 5),
            (3 * eighth + 1, last, 2 * page - last),
            (3 * eighth + 1 + last, 1, full - 1),
        )

    def arrays(self, seed: int = 0) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """(positional, keyword) arguments of `prefill_attention`; layer 1 of two."""
        rng = np.random.default_rng(seed)
        kv_heads, group = self.heads
        width = 2 * kv_heads * self.head_size
        starts, counts, offsets = np.asarray(self.rows, np.int32).T
        before = [int(offset) if count else 0 for _, count, offset in self.rows]
        pool, table = paged_cache(
            rng, before, page=self.page, width=width, table_width=TABLE_WIDTH, layers=LAYERS
        )
        new = sum(-(-int(c + o) // self.page) for c, o in zip(counts, offsets, strict=True))
        pool = np.concatenate([pool, np.full((LAYERS, new, *pool.shape[2:]), np.nan, np.float32)], axis=1)
        taken = set(table[table >= 0].tolist())
        fresh = (page for page in range(pool.shape[1]) if page not in taken)
        for r, (_, count, offset) in enumerate(self.rows):
            for i in range(-(-(offset + count) // self.page) if count else 0):
                if table[r, i] < 0:
                    table[r, i] = next(fresh)
        dtype = jnp.dtype(self.dtype)
        arguments = (
            jnp.asarray(rng.standard_normal((self.tokens, kv_heads * group, self.head_size)), dtype),
            jnp.asarray(rng.standard_normal((self.tokens, width)), dtype),
            jnp.asarray(pool, dtype),
            jnp.int32(1),
            jnp.asarray(table),
            jnp.asarray(starts),
            jnp.asarray(counts),
            jnp.asarray(offsets),
            jnp.int32(NO_WINDOW if self.window is None else self.window),
            jnp.asarray(rng.standard_normal(kv_heads * group), jnp.float32) if self.sinks else None,
        )
        return arguments, {"scale": self.head_size**-0.5, "soft_cap": self.soft_cap}

    def shapes(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """As `arrays`, but abstract."""
        arguments, options = self.arrays()
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), arguments), options


CASES = [
    Case(**case) for case in pairwise({**AXES, "tokens": (128, 32, 384), "chunks": ("mixed", "one", "none")})
]
