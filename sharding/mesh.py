"""From `data=1,tensor=4,expert=1` to a `jax.sharding.Mesh`. One device is a mesh of one.

Attention is divided over `tensor` and `expert` together, and where that makes more parts than the model has
key/value heads, several devices hold the same one. So that the rules can say so, the mesh itself has two axes
for each of the two: along `tensor` and `expert` key/value heads are divided, along `tensor_copy` and
`expert_copy` they are repeated.

Only `make_mesh` imports jax: the command line reads a shape before it pays for that.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import jax

AXES = ("data", "tensor", "expert")  # of a shape
MESH_AXES = ("data", "tensor", "tensor_copy", "expert", "expert_copy")


@dataclasses.dataclass(frozen=True, slots=True)
class MeshShape:
    """Devices along each axis."""

    data: int = 1
    tensor: int = 1
    expert: int = 1

    @property
    def devices(self) -> int:
        return self.data * self.replica

    @property
    def replica(self) -> int:
        """Devices that hold the model once: those that attention is divided over."""
        return self.tensor * self.expert

    def __str__(self) -> str:
        return ",".join(f"{axis}={getattr(self, axis)}" for axis in AXES)


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


def kv_parts(shape: MeshShape, kv_heads: int) -> int:
    """Parts that key/value heads are divided into; where they are fewer than the replica's devices, each is
    held by `shape.replica // kv_heads` of them.

    Raises ValueError where devices would need parts of heads, or groups of devices that the mesh has not.
    """
    devices = shape.replica
    parts = min(devices, kv_heads)
    if devices % parts or kv_heads % parts:
        raise ValueError(
            f"{devices} devices do not divide {kv_heads} key/value heads, nor are they a multiple of them:"
            " the queries of one device would need parts of several heads"
        )
    if parts % shape.tensor and shape.tensor % parts:
        raise ValueError(
            f"tensor={shape.tensor} does not divide {kv_heads} key/value heads, nor is it a multiple of them"
        )
    return parts


def make_mesh(
    shape: MeshShape, devices: Sequence[jax.Device] | None = None, *, kv_heads: int | None = None
) -> jax.sharding.Mesh:
    """A mesh over the first `shape.devices` of `devices` (all there are by default).

    kv_heads: of the model, if there may be more devices than those. Raises ValueError when there are too few
    devices, or where the heads do not go with the shape.
    """
    import jax

    devices = jax.devices() if devices is None else devices
    if shape.devices > len(devices):
        raise ValueError(f"--mesh asks for {shape.devices} devices ({shape}); there are {len(devices)}")
    parts = shape.replica if kv_heads is None else kv_parts(shape, kv_heads)
    tensor = min(shape.tensor, parts)
    expert = parts // tensor
    sizes = (shape.data, tensor, shape.tensor // tensor, expert, shape.expert // expert)
    grid = np.asarray(devices[: shape.devices]).reshape(sizes)
    return jax.sharding.Mesh(grid, MESH_AXES, axis_types=(jax.sharding.AxisType.Auto,) * len(MESH_AXES))
