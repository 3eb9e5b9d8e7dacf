"""The cases of decode attention."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.cases import AXES, paged_cache, pairwise

TABLE_WIDTH = 3
LAYERS = 2
NO_WINDOW = 2**30


@dataclasses.dataclass(frozen=True)
class Case:
    """lengths: mixed has empty rows, one token, a page's last position, the one after, and a full table."""

    heads: tuple[int, int]
    head_size: int
    page: int
    dtype: str
    window: int | None
    soft_cap: float | None
    sinks: bool
    lengths: str

    def __str__(self) -> str:
        return "-".join(f"{value}" for value in dataclasses.astuple(self)).replace(" ", "")

    @property
    def row_lengths(self) -> tuple[int, ...]:
        """Cached positions of each row, the new token's included."""
        full = TABLE_WIDTH * self.page
        mixed = (0, 1, self.page, self.page + 1, full, full - 1, 2 * self.page, 0)
        return {"mixed": mixed, "one": (0, 0, 0, 2 * self.page - 3), "none": (0,) * 4}[self.lengths]

    def arrays(self, seed: int = 0) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """(positional, keyword) arguments of `decode_attention`; layer 1 of two."""
        rng = np.random.default_rng(seed)
        kv_heads, group = self.heads
        rows, width = len(self.row_lengths), 2 * kv_heads * self.head_size
        before = [max(length - 1, 0) for length in self.row_lengths]
        pool, table = paged_cache(
            rng, before, page=self.page, width=width, table_width=TABLE_WIDTH, layers=LAYERS
        )
        taken = set(table[table >= 0].tolist())
        fresh = (page for page in range(pool.shape[1]) if page not in taken)
        for r, length in enumerate(self.row_lengths):
            if length and table[r, (length - 1) // self.page] < 0:
                table[r, (length - 1) // self.page] = next(fresh)
        dtype = jnp.dtype(self.dtype)
        arguments = (
            jnp.asarray(rng.standard_normal((rows, kv_heads * group, self.head_size)), dtype),
            jnp.asarray(rng.standard_normal((rows, width)), dtype),
            jnp.asarray(pool, dtype),
            jnp.int32(1),
            jnp.asarray(table),
            jnp.asarray(self.row_lengths, jnp.int32),
            jnp.int32(NO_WINDOW if self.window is None else self.window),
            jnp.asarray(rng.standard_normal(kv_heads * group), jnp.float32) if self.sinks else None,
        )
        return arguments, {"scale": self.head_size**-0.5, "soft_cap": self.soft_cap}

    def shapes(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """As `arrays`, but abstract."""
        arguments, options = self.arrays()
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), arguments), options


CASES = [Case(**case) for case in pairwise({**AXES, "lengths": ("mixed", "one", "none")})]
