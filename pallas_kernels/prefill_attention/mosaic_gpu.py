from __future__ import annotations

from typing import Any

import jax

from pallas_kernels.chips import Chip


def refusal(chip: Chip, q: jax.Array, pool: jax.Array) -> str | None:
    return "not built yet"


def prefill_attention(*arguments: Any, **options: Any) -> Any:
    raise NotImplementedError
