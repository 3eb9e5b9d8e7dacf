"""From `data=1,tensor=4,expert=1` to a `jax.sharding.Mesh`. One device is a mesh of one.

Only `make_mesh` imports jax: the command line reads a shape before it pays for that.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import jax

AXES = ("data", "tensor", "expert")


@dataclasses.dataclass(frozen=True, slots=True)
class MeshShape:
    """Devices along each axis."""

    data: int = 1
    tensor: int = 1
    expert: int = 1

    @property
    def devices(self) -> int:
        return self.data * self.tensor * self.expert


def parse_mesh(text: str) -> MeshShape:
    """The shape that `text` names; axes left out are 1. Raises ValueError naming the part at fault."""
    sizes: dict[str, int] = {}
    for part in filter(None, text.split(",")):
        axis, _, size = part.partition("=")
        if axis not in AXES:
            raise ValueError(f"--mesh {text!r}: {axis!r} is not an axis; they are {', '.join(AXES)}")
        if axis in sizes:
            raise ValueError(f"--mesh {text!r}: {axis!r} stands twice")
        if not size.isdecimal() or int(size) < 1:
            raise ValueError(f"--mesh {text!r}: {part!r} must be {axis}=N with N at least 1")
        sizes[axis] = int(size)
    return MeshShape(**sizes)


def make_mesh(shape: MeshShape, devices: Sequence[jax.Device] | None = None) -> jax.sharding.Mesh:
    """A mesh over the first `shape.devices` of `devices` (all of this process's by default).

    Raises ValueError when there are too few.
    """
    import jax

    devices = jax.devices() if devices is None else devices
    if shape.devices > len(devices):
        raise ValueError(f"--mesh asks for {shape.devices} devices ({shape}); there are {len(devices)}")
    grid = np.asarray(devices[: shape.devices]).reshape(shape.data, shape.tensor, shape.expert)
    return jax.sharding.Mesh(grid, AXES, axis_types=(jax.sharding.AxisType.Auto,) * len(AXES))
