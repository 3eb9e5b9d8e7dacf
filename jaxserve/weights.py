"""Weights: as declared, from a checkpoint, or random; each leaf at its place on the mesh."""

from __future__ import annotations

import functools
import hashlib
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.layout import Format
from jax.experimental.layout import Layout as DeviceLayout
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding
from jaxtyping import Array

from checkpoints import huggingface, orbax_io
from jaxserve import orbax_weights
from jaxserve.models.decoder import Decoder, Layout, Params, Weight
from jaxserve.models.layers import INIT_SCALE
from sharding import named_sharding

Checkpoint = huggingface.Checkpoint | orbax_io.OrbaxCheckpoint


def layout_for(platform: str) -> Layout:
    return "unrolled" if platform in ("gpu", "cuda", "rocm") else "scan"


def model_digest(folder: Path, *, weights: bool) -> str:
    """Of every byte of the configuration, the tokenizer and, if so, the weights: about a second per GB.

    generation_config.json is left out: what it says is in the requests.
    """
    suffixes = {".json", ".jinja", ".model", ".txt"} | ({".safetensors"} if weights else set())
    digest = hashlib.blake2b(digest_size=16)
    files = [file for file in sorted(folder.iterdir()) if file.suffix in suffixes]
    if weights and orbax_io.is_orbax(folder):
        files += orbax_io.weight_files(folder)
    for file in files:
        if file.name == "generation_config.json":
            continue
        digest.update(str(file.relative_to(folder)).encode() + b"\0")
        with file.open("rb") as opened:
            digest.update(hashlib.file_digest(opened, "blake2b").digest())
    return digest.hexdigest()


def abstract_params(model: Decoder, mesh: Mesh, layout: Layout) -> Params:
    """Shapes with shardings; on TPU, experts also with the layout that its grouped product takes uncopied."""

    def leaf(weight: Weight, layer: int | None) -> jax.ShapeDtypeStruct:
        stacked = weight.per_layer and layer is None
        shape = (model.config.num_layers, *weight.shape) if stacked else weight.shape
        axes = ("layer", *weight.axes) if stacked else weight.axes
        sharding = named_sharding(mesh, axes)
        if weight.experts and mesh.devices.flat[0].platform == "tpu":
            place = Format(DeviceLayout(_transposed(len(shape))), sharding)
            return jax.ShapeDtypeStruct(shape, weight.dtype, sharding=place)
        return jax.ShapeDtypeStruct(shape, weight.dtype, sharding=sharding)

    return model.tree(leaf, layout)


def _transposed(axes: int) -> tuple[int, ...]:
    """Major to minor, the last two the other way round: [E, out, in] lies as [E, in, out]."""
    return (*range(axes - 2), axes - 1, axes - 2)


def _place(spec: jax.ShapeDtypeStruct, sharding: Sharding | None = None) -> Sharding | Format:
    """Where an array of this kind goes, `sharding` in place of its own where given."""
    sharding = spec.sharding if sharding is None else sharding
    return sharding if spec.format.layout is None else Format(spec.format.layout, sharding)


def open_weights(model: Decoder, folder: Path) -> Checkpoint:
    """The folder's checkpoint, its headers checked: every weight is there, in its shape, and nothing else.

    Raises CheckpointError naming the key at fault. No weight is read.
    """
    if orbax_io.is_orbax(folder):
        return orbax_io.open_orbax(folder, orbax_weights.shapes(model))
    return open_huggingface(model, folder)


def open_huggingface(model: Decoder, folder: Path) -> huggingface.Checkpoint:
    checkpoint = huggingface.open_checkpoint(folder)
    targets = checkpoint_targets(model)
    tied = {"lm_head.weight": "model.embed_tokens.weight"} if model.config.tie_embeddings else None
    huggingface.check(
        checkpoint, targets, ignored=(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq",), tied=tied
    )
    return checkpoint


def checkpoint_targets(model: Decoder) -> Iterator[huggingface.Target]:
    """Every tensor of the checkpoint: layer by layer and expert by expert."""
    for weight in model.weights:
        for layer in range(model.config.num_layers) if weight.per_layer else (None,):
            for key in weight.checkpoint_keys(layer):
                yield huggingface.Target(key, weight.checkpoint_shape, weight.dtype)


def load_params(model: Decoder, checkpoint: Checkpoint, mesh: Mesh, layout: Layout) -> Params:
    """Every weight from the checkpoint (`open_weights`) to its place on the mesh, one leaf at a time: each
    device's part is read from the file by itself. Of stacked experts one tensor's part is held at a time."""
    layers = range(model.config.num_layers)
    abstract = abstract_params(model, mesh, layout)
    if isinstance(checkpoint, orbax_io.OrbaxCheckpoint):
        return orbax_weights.restore_params(model, checkpoint, abstract, layout)

    def read(key: str, weight: Weight, index: tuple[slice, ...]) -> np.ndarray:
        target = huggingface.Target(key, weight.checkpoint_shape, weight.dtype)
        return huggingface.read_target(checkpoint, target, index)

    def leaf(weight: Weight, layer: int | None) -> Callable[[jax.ShapeDtypeStruct], jax.Array]:
        key = weight.checkpoint_key.format

        def part(index: tuple[slice, ...] | None) -> np.ndarray:
            assert index is not None  # no weight is a scalar
            if weight.per_layer and layer is None:
                return np.stack([read(key(i), weight, index[1:]) for i in layers[index[0]]])
            return read(key(layer), weight, index)

        def expert(at: tuple[int, ...], index: tuple[slice, ...]) -> np.ndarray:
            return read(key(at[0] if layer is None else layer, at[-1]), weight, index)

        def load(spec: jax.ShapeDtypeStruct) -> jax.Array:
            if weight.experts:
                return _streamed(spec, expert)
            return jax.make_array_from_callback(spec.shape, spec.sharding, part)

        return load

    loaders = model.tree(leaf, layout)
    return jax.tree.map(lambda spec, load: load(spec), abstract, loaders)


def _streamed(
    spec: jax.ShapeDtypeStruct, read: Callable[[tuple[int, ...], tuple[slice, ...]], np.ndarray]
) -> jax.Array:
    """An array of matrices, put together on the devices: `read(leading indices, slices of the matrix)`."""
    shards = []
    for device, index in spec.sharding.addressable_devices_indices_map(spec.shape).items():
        ranges = [range(size)[cut] for size, cut in zip(spec.shape, index, strict=True)]
        place = _place(spec, SingleDeviceSharding(device))
        new, put = _updates(tuple(map(len, ranges)), spec.dtype, place)
        stack, firsts = new(), [each[0] for each in ranges[:-2]]
        for at in itertools.product(*ranges[:-2]):
            local = np.subtract(at, firsts).astype(np.int32)
            stack = put(stack, read(at, index[-2:]), local)
            stack.block_until_ready()  # else the host would hold all that waits to be sent
        shards.append(stack)
    return jax.make_array_from_single_device_arrays(spec.shape, spec.sharding, shards)


@functools.lru_cache(maxsize=64)  # a place is met once for each leaf
def _updates(
    shape: tuple[int, ...], dtype: np.dtype, place: Sharding | Format
) -> tuple[Callable[[], jax.Array], Callable[[jax.Array, np.ndarray, np.ndarray], jax.Array]]:
    """(an array of zeros, the array with one matrix replaced in place)."""

    def put(stack: Array, matrix: Array, at: Array) -> Array:
        zero = jnp.int32(0)
        start = [*(at[i] for i in range(len(shape) - 2)), zero, zero]
        return jax.lax.dynamic_update_slice(
            stack, matrix.reshape((1,) * (len(shape) - 2) + matrix.shape), start
        )

    def new() -> Array:
        return jnp.zeros(shape, dtype)

    return jax.jit(new, out_shardings=place), jax.jit(put, donate_argnums=0, out_shardings=place)


def copy_params(params: Params, model: Decoder, mesh: Mesh, layout: Layout) -> Params:
    """The weights of one mesh on another, from device to device; what lies there already stays."""
    return jax.tree.map(
        lambda array, spec: jax.device_put(array, _place(spec)), params, abstract_params(model, mesh, layout)
    )


def dummy_params(model: Decoder, mesh: Mesh, layout: Layout, seed: int) -> Params:
    """Random weights, drawn on the devices where they stay: norms 1, the rest normal."""
    abstract = abstract_params(model, mesh, layout)
    leaves, tree = jax.tree.flatten_with_path(abstract)

    def draw() -> Params:
        keys = jax.random.split(jax.random.key(seed), len(leaves))
        arrays = [
            jnp.ones(spec.shape, spec.dtype) if "norm" in jax.tree_util.keystr(path) else _normal(key, spec)
            for key, (path, spec) in zip(keys, leaves, strict=True)
        ]
        return jax.tree.unflatten(tree, arrays)

    return jax.jit(draw, out_shardings=jax.tree.map(_place, abstract))()


def _normal(key: Array, spec: jax.ShapeDtypeStruct) -> Array:
    """Experts of all layers one layer at a time: drawing takes some times the bytes that are drawn."""
    shape, dtype = spec.shape, spec.dtype
    if len(shape) < 4:
        return jax.random.normal(key, shape, dtype) * INIT_SCALE
    place = NamedSharding(spec.sharding.mesh, PartitionSpec(*spec.sharding.spec[1:]))

    def layer(key: Array) -> Array:
        drawn = jax.random.normal(key, shape[1:], dtype) * INIT_SCALE
        return jax.lax.with_sharding_constraint(drawn, place)

    return jax.lax.map(layer, jax.random.split(key, shape[0]))
