"""The one table that says which logical axis lies along which mesh axis.

Weights and state name their axes (`("heads", "embed")`); nothing else knows how they are laid out.
Megatron's split (Shoeybi et al. 2019): q, k, v, gate and up by output, o and down by input, so that a
layer needs one all-reduce after attention and one after the MLP. Experts are spread along an axis of their
own; all else is repeated along it. jax is imported when it is used, so that `sharding.mesh` can be had
without it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

RULES: dict[str, str | None] = {
    "layer": None,
    "vocab": "tensor",
    "embed": None,
    "heads": "tensor",  # query heads x head size, flat
    "kv_heads": "tensor",  # key/value heads x head size, flat
    "head": None,  # within one head
    "mlp": "tensor",  # within one expert, too
    "expert": "expert",
    "router": None,  # experts' scores: each device routes all tokens
    "page": None,
    "token": None,
    "slot": None,
}


def partition_spec(axes: tuple[str | None, ...]) -> PartitionSpec:
    """Raises KeyError for an axis that the table does not know."""
    from jax.sharding import PartitionSpec

    return PartitionSpec(*(None if axis is None else RULES[axis] for axis in axes))


def named_sharding(mesh: Mesh, axes: tuple[str | None, ...]) -> NamedSharding:
    from jax.sharding import NamedSharding

    return NamedSharding(mesh, partition_spec(axes))
