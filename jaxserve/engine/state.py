"""Everything on the device that outlives a step: one pytree, donated to each program and handed back."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int, UInt32

from jaxserve.engine.batch import SAMPLING_WIDTH
from jaxserve.models.config import ModelConfig
from jaxserve.scheduler.types import MAX_LOGIT_BIAS
from sharding import named_sharding


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class EngineState:
    """B is the number of slots, W = ceil(V / 32) words of one bit per token.

    pool: KV pages; see `pallas_kernels`.
    tokens: the last token drawn in each slot.
    done: the slot's sequence met a stop token or its length; it draws no more.
    sampling: how each slot draws (`batch.sampling_row`).
    The rest is read only for slots whose sampling row says that their logits are edited:
    counts: how often each token was generated; prompt: which tokens the prompt holds; allowed: which may be
    drawn; bias_tokens, bias: additions to single logits, unused entries at token V.
    """

    pool: Float[Array, "L P page 2KH"]
    tokens: Int[Array, " B"]
    done: Bool[Array, " B"]
    sampling: Int[Array, "B width"]
    counts: Int[Array, "B V"]
    prompt: UInt32[Array, "B W"]
    allowed: UInt32[Array, "B W"]
    bias_tokens: Int[Array, "B n"]
    bias: Float[Array, "B n"]


@dataclasses.dataclass(frozen=True, slots=True)
class StateShape:
    """The sizes that fix every program's arguments."""

    max_slots: int
    num_pages: int
    page_size: int
    pages_per_slot: int


def mask_words(vocab_size: int) -> int:
    return -(-vocab_size // 32)


def abstract_state(config: ModelConfig, shape: StateShape, dtype: np.dtype, mesh: Mesh) -> EngineState:
    """The state's shapes, dtypes and shardings, as `jax.ShapeDtypeStruct`s."""
    words = mask_words(config.vocab_size)
    slots = shape.max_slots

    def array(shape: tuple[int, ...], dtype: DTypeLike, axes: tuple[str | None, ...]) -> Any:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=named_sharding(mesh, axes))

    return EngineState(
        pool=array(
            (config.num_layers, shape.num_pages, shape.page_size, 2 * config.kv_size),
            dtype,
            ("layer", "page", "token", "kv_heads"),
        ),
        tokens=array((slots,), jnp.int32, ("slot",)),
        done=array((slots,), jnp.bool_, ("slot",)),
        sampling=array((slots, SAMPLING_WIDTH), jnp.int32, ("slot", None)),
        counts=array((slots, config.vocab_size), jnp.int32, ("slot", "vocab")),
        prompt=array((slots, words), jnp.uint32, ("slot", None)),
        allowed=array((slots, words), jnp.uint32, ("slot", None)),
        bias_tokens=array((slots, MAX_LOGIT_BIAS), jnp.int32, ("slot", None)),
        bias=array((slots, MAX_LOGIT_BIAS), jnp.float32, ("slot", None)),
    )


def new_state(abstract: EngineState) -> EngineState:
    """Zeros everywhere, each array made where it lives."""
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    make = jax.jit(
        lambda: jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), abstract),
        out_shardings=shardings,
    )
    return make()


def page_bytes(config: ModelConfig, page_size: int, dtype: np.dtype) -> int:
    """Bytes of one page over all layers, on all devices together if no two hold the same head."""
    return config.num_layers * page_size * 2 * config.kv_size * np.dtype(dtype).itemsize
