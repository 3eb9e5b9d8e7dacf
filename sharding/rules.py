"""The one table that says which logical axis lies along which axes of the mesh.

Weights and state name their axes (`("heads", "embed")`); nothing else knows how they are laid out.
Megatron's split (Shoeybi et al. 2019): q, k, v, gate and up by output, o and down by input, so that a
layer needs one all-reduce after attention and one after the MLP. Experts are spread along an axis of their
own; attention and the vocabulary are divided over that one too. Key/value heads are repeated along the
`*_copy` axes, which are longer than 1 where there are fewer of them than devices (`sharding.mesh`). jax is
imported when it is used, so that `sharding.mesh` can be had without it.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

_TENSOR = ("tensor", "tensor_copy")
_EXPERT = ("expert", "expert_copy")

RULES: dict[str, tuple[str, ...] | None] = {
    "layer": None,
    "vocab": (*_TENSOR, *_EXPERT),
    "embed": None,
    "heads": (*_TENSOR, *_EXPERT),  # query heads x head size, flat
    "kv_heads": ("tensor", "expert"),  # key/value heads x head size, flat
    "head": None,  # within one head
    "mlp": _TENSOR,  # within one expert, too
    "expert": _EXPERT,
    "router": None,  # experts' scores: each device routes all tokens
    "page": None,
    "token": None,
    "slot": None,
}


def mesh_axes(axis: str) -> tuple[str, ...]:
    """Of the mesh, those that a logical axis is divided along. Raises KeyError for one that is unknown."""
    return RULES[axis] or ()


def parts(mesh: Mesh, axis: str) -> int:
    """How many parts a logical axis is divided into."""
    return math.prod(mesh.shape[name] for name in mesh_axes(axis))


def partition_spec(axes: tuple[str | None, ...]) -> PartitionSpec:
    """Raises KeyError for an axis that the table does not know."""
    from jax.sharding import PartitionSpec

    return PartitionSpec(*(None if axis is None else RULES[axis] for axis in axes))


def named_sharding(mesh: Mesh, axes: tuple[str | None, ...]) -> NamedSharding:
    from jax.sharding import NamedSharding

    return NamedSharding(mesh, partition_spec(axes))
