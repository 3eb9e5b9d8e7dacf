"""What the kernels' tests share: how close is close, and what the oracle is given."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp

TOLERANCE = {"float32": 1e-5, "bfloat16": 1e-2}  # of the largest value


def wide(x: Any) -> Any:
    """The oracle computes in float32, from what the kernel is given."""
    return x.astype(jnp.float32) if getattr(x, "dtype", None) == jnp.bfloat16 else x
