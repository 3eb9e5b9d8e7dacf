"""Weights: as declared, from a checkpoint, or random; each leaf at its place on the mesh."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from checkpoints import huggingface
from jaxserve.models.decoder import Decoder, Layout, Params, Weight
from jaxserve.models.layers import INIT_SCALE
from sharding import named_sharding


def layout_for(platform: str) -> Layout:
    return "unrolled" if platform in ("gpu", "cuda", "rocm") else "scan"


def model_digest(folder: Path, *, weights: bool) -> str:
    """Of every byte of the configuration, the tokenizer and, if so, the weights: about a second per GB.

    generation_config.json is left out: what it says is in the requests.
    """
    suffixes = {".json", ".jinja", ".model", ".txt"} | ({".safetensors"} if weights else set())
    digest = hashlib.blake2b(digest_size=16)
    for file in sorted(folder.iterdir()):
        if file.suffix not in suffixes or file.name == "generation_config.json":
            continue
        digest.update(file.name.encode() + b"\0")
        with file.open("rb") as opened:
            digest.update(hashlib.file_digest(opened, "blake2b").digest())
    return digest.hexdigest()


def abstract_params(model: Decoder, mesh: Mesh, layout: Layout) -> Params:
    def leaf(weight: Weight, layer: int | None) -> jax.ShapeDtypeStruct:
        stacked = weight.per_layer and layer is None
        shape = (model.config.num_layers, *weight.shape) if stacked else weight.shape
        axes = ("layer", *weight.axes) if stacked else weight.axes
        return jax.ShapeDtypeStruct(shape, weight.dtype, sharding=named_sharding(mesh, axes))

    return model.tree(leaf, layout)


def open_weights(model: Decoder, folder: Path) -> huggingface.Checkpoint:
    """The folder's checkpoint, its headers checked: every weight is there, in its shape, and nothing else.

    Raises CheckpointError naming the key at fault. No weight is read.
    """
    checkpoint = huggingface.open_checkpoint(folder)
    layers = range(model.config.num_layers)
    targets = [_target(w, i) for w in model.weights for i in (layers if w.per_layer else (None,))]
    tied = {"lm_head.weight": "model.embed_tokens.weight"} if model.config.tie_embeddings else None
    huggingface.check(
        checkpoint, targets, ignored=(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq",), tied=tied
    )
    return checkpoint


def _target(weight: Weight, layer: int | None) -> huggingface.Target:
    key = weight.checkpoint_key if layer is None else weight.checkpoint_key.format(layer)
    return huggingface.Target(key, weight.shape, weight.dtype)


def load_params(model: Decoder, checkpoint: huggingface.Checkpoint, mesh: Mesh, layout: Layout) -> Params:
    """Every weight from the checkpoint (`open_weights`) to its place on the mesh, one leaf at a time: each
    device's part is read from the file by itself."""
    layers = range(model.config.num_layers)
    abstract = abstract_params(model, mesh, layout)

    def leaf(weight: Weight, layer: int | None) -> Callable[[tuple[slice, ...]], np.ndarray]:
        def part(index: tuple[slice, ...]) -> np.ndarray:
            if weight.per_layer and layer is None:
                chosen = [
                    huggingface.read_target(checkpoint, _target(weight, i), index[1:])
                    for i in layers[index[0]]
                ]
                return np.stack(chosen)
            return huggingface.read_target(checkpoint, _target(weight, layer), index)

        return part

    readers = model.tree(leaf, layout)
    return jax.tree.map(
        lambda spec, read: jax.make_array_from_callback(spec.shape, spec.sharding, read), abstract, readers
    )


def dummy_params(model: Decoder, mesh: Mesh, layout: Layout, seed: int) -> Params:
    """Random weights, drawn on the devices where they stay: norms 1, the rest normal."""
    abstract = abstract_params(model, mesh, layout)
    leaves, tree = jax.tree.flatten_with_path(abstract)

    def draw() -> Params:
        keys = jax.random.split(jax.random.key(seed), len(leaves))
        arrays = [
            jnp.ones(spec.shape, spec.dtype)
            if "norm" in jax.tree_util.keystr(path)
            else jax.random.normal(key, spec.shape, spec.dtype) * INIT_SCALE
            for key, (path, spec) in zip(keys, leaves, strict=True)
        ]
        return jax.tree.unflatten(tree, arrays)

    return jax.jit(draw, out_shardings=jax.tree.map(lambda spec: spec.sharding, abstract))()
