"""Bytes on one device: read from the very tree of weights and state that the engine places on a mesh.

A TPU keeps matrices in tiles of 128 columns and, at 16 bits, 16 rows, and fills what is short: the experts of
Qwen3-30B-A3B divided by 8 are 96 wide and take as much as 128.
"""

from __future__ import annotations

import dataclasses
import math

import jax
from jax.sharding import Mesh

from jaxserve.engine.programs import device_bytes
from jaxserve.engine.state import StateShape, abstract_state
from jaxserve.models.decoder import Decoder
from jaxserve.plan.roofline import Part
from jaxserve.weights import abstract_params, layout_for
from sharding import parts

LANES, SUBLANE_BYTES = 128, 32  # of a TPU's tile: columns, and bytes of a column


@dataclasses.dataclass(frozen=True, slots=True)
class Sizes:
    """weights: all of them. page: of the pool, all layers. slot: what a slot takes of the rest of the state.
    part: what a step reads of them."""

    weights: int
    page: int
    slot: int
    part: Part


def sizes(model: Decoder, mesh: Mesh, page_size: int) -> Sizes:
    """On one device of a replica's mesh."""
    config = model.config
    platform = mesh.devices.flat[0].platform
    params = abstract_params(model, mesh, layout_for(platform))
    by_kind = {"embed_tokens": 0, "lm_head": 0, "experts": 0, "": 0}
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        name = jax.tree_util.keystr(path)
        by_kind[next(kind for kind in by_kind if kind in name)] += _laid_out(leaf, platform)
    state, more = (
        abstract_state(config, StateShape(slots, slots, page_size, 1), model.dtype, mesh) for slots in (1, 2)
    )
    page = device_bytes(state.pool)
    heads = config.num_heads // parts(mesh, "heads")
    return Sizes(
        weights=sum(_laid_out(leaf, platform) for leaf in jax.tree.leaves(params)),
        page=page,
        slot=device_bytes(more) - device_bytes(state) - page,
        part=Part(
            layers=by_kind[""],
            head=by_kind["embed_tokens"] if config.tie_embeddings else by_kind["lm_head"],
            experts=by_kind["experts"],
            kv=page // (config.num_layers * page_size),
            query=heads * config.head_dim,
            hidden=config.hidden_size,
            itemsize=model.dtype.itemsize,
            dtype=model.dtype.name,
            windows=config.windows,
            devices=mesh.size,
            num_experts=config.num_experts,
            experts_per_token=config.experts_per_token,
        ),
    )


def _laid_out(leaf: jax.ShapeDtypeStruct, platform: str) -> int:
    """Bytes of an array on one device, with what its tiles are filled up with."""
    shape = leaf.sharding.shard_shape(leaf.shape)
    if platform == "tpu" and len(shape) > 1:
        layout = leaf.format.layout
        order = range(len(shape)) if layout is None else layout.major_to_minor
        *outer, rows, columns = (shape[axis] for axis in order)
        sublanes = SUBLANE_BYTES // leaf.dtype.itemsize
        shape = (*outer, -(-rows // sublanes) * sublanes, -(-columns // LANES) * LANES)
    return math.prod(shape) * leaf.dtype.itemsize


def parameters(model: Decoder) -> int:
    """Of the whole model."""
    layers = model.config.num_layers
    return sum(math.prod(w.shape) * (layers if w.per_layer else 1) for w in model.weights)
