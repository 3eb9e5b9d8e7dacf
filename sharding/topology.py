"""Slices of accelerators by the names that people rent them by: `v5e-8`, `v5p:2x2x1`, `h100-8`.

A cloud counts what it rents differently from chip to chip: v5e and v6e by chips, v5p by cores, of which each
chip has two. Standard library alone; knows no chip's speed and no compiler.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping

# chips -> the shape that a cloud gives when it is asked for so many (cloud.google.com/tpu/docs)
_PLANE = {1: (1, 1), 4: (2, 2), 8: (2, 4), 16: (4, 4), 32: (4, 8), 64: (8, 8), 128: (8, 16), 256: (16, 16)}
_CUBE = {1: (1, 1, 1), 4: (2, 2, 1), 8: (2, 2, 2), 16: (2, 2, 4), 32: (2, 4, 4), 64: (4, 4, 4)}
_HOST = {count: (count,) for count in (1, 2, 4, 8)}  # cards of one host, all linked to all


@dataclasses.dataclass(frozen=True, slots=True)
class Kind:
    """sizes: chips of a slice -> its shape. counted: what a cloud name counts on each chip."""

    sizes: Mapping[int, tuple[int, ...]]
    counted: int = 1


KINDS = {
    "v5e": Kind(_PLANE),
    "v5p": Kind(_CUBE, counted=2),
    "v6e": Kind(_PLANE),
    "h100": Kind(_HOST),
}
_OTHER_NAMES = {"v5litepod": "v5e", "v5lite": "v5e"}


@dataclasses.dataclass(frozen=True, slots=True)
class Slice:
    """Chips that are linked: which, and in what shape."""

    chip: str
    shape: tuple[int, ...]

    @property
    def chips(self) -> int:
        return math.prod(self.shape)

    @property
    def form(self) -> str:
        """The shape as it is written: 2x2x1."""
        return "x".join(map(str, self.shape))

    def __str__(self) -> str:
        kind = KINDS[self.chip]
        if kind.counted == 1 and kind.sizes.get(self.chips) == self.shape:
            return f"{self.chip}-{self.chips}"
        return f"{self.chip}:{self.form}"


def parse_slice(text: str) -> Slice:
    """The slice that `text` names: `CHIP-N`, N as the cloud counts, or `CHIP:AxB` or `CHIP:AxBxC` in chips.

    Raises ValueError naming the part at fault and what there is.
    """
    match = re.fullmatch(r"([a-z0-9]+)(?:-([0-9]+)|:([0-9]+(?:x[0-9]+)*))", text.strip().lower())
    if not match:
        raise ValueError(f"--chips {text!r} must be CHIP-N or CHIP:AxB, such as v5e-8, v5p:2x2x1 or h100-8")
    name, count, form = match.groups()
    chip = _OTHER_NAMES.get(name, name)
    if chip not in KINDS:
        raise ValueError(f"--chips {text!r}: {name!r} is not a known chip; there are {', '.join(KINDS)}")
    kind = KINDS[chip]
    if form:
        shape = tuple(map(int, form.split("x")))
        axes = len(kind.sizes[1])
        if len(shape) != axes or 0 in shape:
            raise ValueError(
                f"--chips {text!r}: a slice of {chip} has {axes} axis(es) of at least one chip each, such as"
                f" {chip}:{'x'.join(map(str, kind.sizes[4]))}"
            )
        return Slice(chip, shape)
    chips, over = divmod(int(count), kind.counted)
    if over or chips not in kind.sizes:
        known = ", ".join(f"{chip}-{size * kind.counted}" for size in kind.sizes)
        cores = f" ({kind.counted} cores a chip are counted)" if kind.counted > 1 else ""
        raise ValueError(f"--chips {text!r}: there are {known}{cores}")
    return Slice(chip, kind.sizes[chips])
