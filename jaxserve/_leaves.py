"""Checks that the three leaf packages, whose names are generic, are ours.

`sharding`, `pallas_kernels` and `checkpoints` lie beside `jaxserve`. A user's own `sharding.py` in the folder
of a script shadows ours and would fail much later, inside an import, about something else.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

LEAVES = ("sharding", "pallas_kernels", "checkpoints")
ROOT = Path(__file__).resolve().parent.parent


def check_leaves() -> None:
    """Raises ImportError naming the package that Python would not take from beside `jaxserve`.

    Finds without importing, so it is quick and loads no jax.
    """
    for name in LEAVES:
        found = _location(name)
        if found is None:
            raise ImportError(f"the package {name!r} is missing; it belongs at {ROOT / name}")
        if found.parent != ROOT:
            raise ImportError(
                f"{name!r} was found at {found}, but jaxserve needs its own, at {ROOT / name}:"
                f" rename that file or folder, or run from elsewhere"
            )


def _location(name: str) -> Path | None:
    """Where Python finds the module: the folder of a package, or the file of a plain module."""
    try:
        spec = importlib.util.find_spec(name)
    except ValueError:  # already imported by something that left no spec
        spec = None
    if spec is None:
        return None
    if spec.submodule_search_locations:
        return Path(next(iter(spec.submodule_search_locations))).resolve()
    return Path(spec.origin).resolve() if spec.origin else None
