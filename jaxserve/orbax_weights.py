"""The model's weights as an Orbax checkpoint holds them: one array per layer, under the names it declares.

`layers.mlp.up_proj.weight`, whatever its layout on the devices, is `layers.0.mlp.up_proj.weight` and so on in
the checkpoint; stacked experts are one array. It does not know where a checkpoint is or what is in a file.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.layout import Format
from jax.sharding import NamedSharding, PartitionSpec, Sharding
from jaxtyping import Array, Float

from checkpoints import huggingface, orbax_io
from checkpoints.files import CheckpointError, listing
from jaxserve.models.decoder import Decoder, Layout, Params, Weight


def array_names(model: Decoder) -> Iterator[tuple[str, Weight, int | None]]:
    """(name in the checkpoint, weight, layer) of everything declared."""
    for weight in model.weights:
        for layer in range(model.config.num_layers) if weight.per_layer else (None,):
            name = weight.name if layer is None else weight.name.replace("layers.", f"layers.{layer}.", 1)
            yield name, weight, layer


def shapes(model: Decoder) -> dict[str, tuple[int, ...]]:
    """What a checkpoint of this model holds."""
    return {name: weight.shape for name, weight, _ in array_names(model)}


def leaves_to_save(
    model: Decoder, checkpoint: huggingface.Checkpoint, dtype: np.dtype | None
) -> Iterator[orbax_io.Leaf]:
    """Every weight of a checked Hugging Face checkpoint, to be read when it is saved.

    In `dtype`, or as it is stored (float32 where experts that are stacked are stored in different ones).
    """
    for name, weight, layer in array_names(model):
        keys = weight.checkpoint_keys(layer)
        kinds = {checkpoint.read(key).dtype for key in keys}
        kind = dtype if dtype is not None else kinds.pop() if len(kinds) == 1 else np.dtype(np.float32)
        targets = [huggingface.Target(key, weight.checkpoint_shape, kind) for key in keys]
        yield orbax_io.Leaf(
            name=name,
            shape=weight.shape,
            dtype=kind,
            read=functools.partial(_read, checkpoint, weight, targets),
            release=functools.partial(_release, checkpoint, keys),
        )


def _read(
    checkpoint: huggingface.Checkpoint, weight: Weight, targets: list[huggingface.Target]
) -> np.ndarray:
    if not weight.experts:
        return huggingface.read_target(checkpoint, targets[0])
    stacked = np.empty(weight.shape, targets[0].dtype)
    for expert, target in enumerate(targets):
        stacked[expert] = huggingface.read_target(checkpoint, target)
        checkpoint.release(target.key)
    return stacked


def _release(checkpoint: huggingface.Checkpoint, keys: list[str]) -> None:
    for key in keys:
        checkpoint.release(key)


def restore_params(
    model: Decoder, checkpoint: orbax_io.OrbaxCheckpoint, abstract: Params, layout: Layout
) -> Params:
    """Every weight from the checkpoint to its place, which `abstract` gives. A stack of layers is made where
    it stays and filled one layer after the other: beside the weights there is only what is being restored.

    Raises CheckpointError naming the key of what cannot be read, or does not fit into float16.
    """
    flat, structure = jax.tree.flatten(abstract)
    slots = jax.tree.leaves(model.tree(_Slot, layout))
    specs = dict(zip(slots, flat, strict=True))
    arrays: dict[_Slot, jax.Array] = {}
    too_large: dict[str, jax.Array] = {}
    found = {name: (weight, layer) for name, weight, layer in array_names(model)}
    shardings = {name: _of_one_layer(specs, weight, layer) for name, (weight, layer) in found.items()}
    for name, array in orbax_io.restore(checkpoint, shardings):
        weight, layer = found[name]
        if weight.dtype == jnp.float16 and array.dtype != weight.dtype:
            too_large[name] = _overflows(array)
        slot = _Slot(weight, layer)
        if slot in specs:
            arrays[slot] = jax.device_put(array.astype(weight.dtype), _place(specs[slot]))
        else:
            slot = _Slot(weight, None)
            new, put = _updates(specs[slot].shape, weight.dtype, _place(specs[slot]))
            stack = arrays.pop(slot) if slot in arrays else new()
            arrays[slot] = put(stack, array, np.int32(layer or 0))
            del stack
        del array
    if names := [name for name, flag in too_large.items() if flag]:
        raise CheckpointError(
            f"{checkpoint.folder}: {listing(names)}: values beyond float16's 65504; use bfloat16 or float32"
        )
    return jax.tree.unflatten(structure, [arrays[slot] for slot in slots])


@dataclasses.dataclass(frozen=True, slots=True)
class _Slot:
    """A leaf of the parameters; layer None: not in a layer, or a stack of all."""

    weight: Weight
    layer: int | None


def _of_one_layer(specs: Mapping[_Slot, jax.ShapeDtypeStruct], weight: Weight, layer: int | None) -> Sharding:
    """Where one layer's array goes: as the stack, less its first axis."""
    if (spec := specs.get(_Slot(weight, layer))) is not None:
        return spec.sharding
    stack = specs[_Slot(weight, None)].sharding
    return NamedSharding(stack.mesh, PartitionSpec(*stack.spec[1:]))


def _place(spec: jax.ShapeDtypeStruct) -> Sharding | Format:
    return spec.sharding if spec.format.layout is None else spec.format


@functools.lru_cache(maxsize=64)  # a place is met once for each layer
def _updates(
    shape: tuple[int, ...], dtype: np.dtype, place: Sharding | Format
) -> tuple[Callable[[], jax.Array], Callable[[jax.Array, jax.Array, np.int32], jax.Array]]:
    """(a stack of zeros, the stack with one layer replaced in place, in the stack's dtype)."""

    def put(stack: Array, array: Array, layer: Array) -> Array:
        return jax.lax.dynamic_update_index_in_dim(stack, array.astype(dtype), layer, 0)

    def new() -> Array:
        return jnp.zeros(shape, dtype)

    return jax.jit(new, out_shardings=place), jax.jit(put, donate_argnums=0, out_shardings=place)


@jax.jit
def _overflows(array: Float[Array, "*shape"]) -> Array:
    """Whether a finite value is infinite as float16."""
    return jnp.any(jnp.isinf(array.astype(jnp.float16)) & ~jnp.isinf(array))
