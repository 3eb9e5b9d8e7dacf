"""The decoder that all families share, and how its weights are laid out.

    embed -> L x (norm, attention, norm, MLP) -> norm -> hidden states

What attends to what is the caller's: `Attend` gets q, k and v of the packed tokens and returns what they saw.
Logits are not computed here; heads take the hidden states.

Parameters are plain nested dicts of arrays, so that a step costs no Python per weight beyond flattening.
Layers are stacked, `[L, ...]`, and scanned (TPU, CPU: compile time does not grow with depth), or a tuple of
one dict per layer, unrolled (GPU, where a scan copies each layer's weights under XLA's matmuls). Experts are
stacked within a layer, `[E, ...]`; the scan does not slice them, `SparseMLP` reads only those that it uses.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from jaxserve.models import FAMILIES
from jaxserve.models.config import ModelConfig
from jaxserve.models.layers import Linear, RMSNorm, project, rotary, rotate, weight
from jaxserve.models.moe import SparseMLP

Params = dict[str, Any]
Pool = Float[Array, "L P page 2KH"]
# (q [T, N, H], kv [T, 2·K·H], pool, layer i32[], window i32[]) -> (out [T, N, H], pool)
Attend = Callable[..., tuple[Float[Array, "T N H"], Pool]]
Layout = Literal["scan", "unrolled"]

NO_WINDOW = 2**30  # more positions than any context: masks nothing


class Attention(nnx.Module):
    def __init__(self, config: ModelConfig, rngs: nnx.Rngs, dtype: jnp.dtype) -> None:
        c = config
        self.config = config
        q_axes, kv_axes = ("heads", "embed"), ("kv_heads", "embed")
        self.q_proj = Linear(rngs, c.hidden_size, c.q_size, axes=q_axes, dtype=dtype, bias=c.qkv_bias)
        self.k_proj = Linear(rngs, c.hidden_size, c.kv_size, axes=kv_axes, dtype=dtype, bias=c.qkv_bias)
        self.v_proj = Linear(rngs, c.hidden_size, c.kv_size, axes=kv_axes, dtype=dtype, bias=c.qkv_bias)
        self.o_proj = Linear(
            rngs, c.q_size, c.hidden_size, axes=("embed", "heads"), dtype=dtype, bias=c.o_bias
        )
        if c.qk_norm:
            self.q_norm = RMSNorm(rngs, c.head_dim, c.norm_eps, axis="head", dtype=dtype)
            self.k_norm = RMSNorm(rngs, c.head_dim, c.norm_eps, axis="head", dtype=dtype)

    def __call__(
        self, x: Float[Array, "T D"], cos: Array, sin: Array, attend: Attend
    ) -> tuple[Float[Array, "T D"], Pool]:
        c, tokens = self.config, x.shape[0]
        q = self.q_proj(x).reshape(tokens, c.num_heads, c.head_dim)
        k = self.k_proj(x).reshape(tokens, c.num_kv_heads, c.head_dim)
        v = self.v_proj(x).reshape(tokens, c.num_kv_heads, c.head_dim)
        if c.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        kv = jnp.stack([k, v], axis=2).reshape(tokens, 2 * c.kv_size)  # per head: its key, then its value
        out, pool = attend(q, kv)
        return self.o_proj(out.reshape(tokens, c.q_size)), pool


class MLP(nnx.Module):
    """down(silu(gate x) * up x) (Shazeer 2020). Three products: fusing two of them costs relayouts."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs, dtype: jnp.dtype) -> None:
        c = config
        up = ("mlp", "embed")
        self.gate_proj = Linear(rngs, c.hidden_size, c.mlp_size, axes=up, dtype=dtype, bias=c.mlp_bias)
        self.up_proj = Linear(rngs, c.hidden_size, c.mlp_size, axes=up, dtype=dtype, bias=c.mlp_bias)
        self.down_proj = Linear(
            rngs, c.mlp_size, c.hidden_size, axes=("embed", "mlp"), dtype=dtype, bias=c.mlp_bias
        )

    def __call__(self, x: Float[Array, "T D"]) -> Float[Array, "T D"]:
        return self.down_proj(jax.nn.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nnx.Module):
    def __init__(self, config: ModelConfig, rngs: nnx.Rngs, dtype: jnp.dtype) -> None:
        c = config
        self.input_layernorm = RMSNorm(rngs, c.hidden_size, c.norm_eps, axis="embed", dtype=dtype)
        self.self_attn = Attention(config, rngs, dtype)
        self.post_attention_layernorm = RMSNorm(rngs, c.hidden_size, c.norm_eps, axis="embed", dtype=dtype)
        self.mlp = SparseMLP(config, rngs, dtype) if c.num_experts else MLP(config, rngs, dtype)

    def __call__(
        self,
        x: Float[Array, "T D"],
        cos: Array,
        sin: Array,
        attend: Attend,
        valid: Bool[Array, " T"] | None,
        layer: Int[Array, ""],
    ) -> tuple[Float[Array, "T D"], Pool]:
        with jax.named_scope("attention"):
            seen, pool = self.self_attn(self.input_layernorm(x), cos, sin, attend)
            x = x + seen
        with jax.named_scope("mlp"):
            inner = self.post_attention_layernorm(x)
            mlp = self.mlp(inner, valid, layer) if isinstance(self.mlp, SparseMLP) else self.mlp(inner)
            return x + mlp, pool


class Ends(nnx.Module):
    """What stands before and after the layers."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs, dtype: jnp.dtype) -> None:
        c = config
        self.embed_tokens = nnx.Dict(
            weight=weight(rngs, (c.vocab_size, c.hidden_size), ("vocab", "embed"), dtype)
        )
        self.norm = RMSNorm(rngs, c.hidden_size, c.norm_eps, axis="embed", dtype=dtype)
        if not c.tie_embeddings:
            self.lm_head = nnx.Dict(
                weight=weight(rngs, (c.vocab_size, c.hidden_size), ("vocab", "embed"), dtype)
            )


# Name of a declared weight -> its key in a Hugging Face checkpoint; {} is the layer. A family with other keys
# has its own WEIGHT_NAMES over these.
WEIGHT_NAMES = {
    "ends.embed_tokens.weight": "model.embed_tokens.weight",
    "ends.norm.weight": "model.norm.weight",
    "ends.lm_head.weight": "lm_head.weight",
    **{
        f"layers.{name}": f"model.layers.{{}}.{name}"
        for name in (
            "input_layernorm.weight",
            "post_attention_layernorm.weight",
            *(f"self_attn.{p}_proj.{kind}" for p in "qkvo" for kind in ("weight", "bias")),
            *(f"self_attn.{p}_norm.weight" for p in "qk"),
            *(f"mlp.{p}_proj.{kind}" for p in ("gate", "up", "down") for kind in ("weight", "bias")),
        )
    },
}


@dataclasses.dataclass(frozen=True)
class Weight:
    """One declared weight: `layers.*` stand for all layers, with the layer axis not in `shape` or `axes`.

    Experts are stacked along the first axis of `shape`; a checkpoint has a tensor for each.
    """

    name: str
    shape: tuple[int, ...]
    axes: tuple[str, ...]
    dtype: np.dtype
    checkpoint_key: str  # with {} for the layer, and a second one for the expert

    @property
    def per_layer(self) -> bool:
        return self.name.startswith("layers.")

    @property
    def experts(self) -> int:
        """How many are stacked; 0: the weight is one tensor of the checkpoint."""
        return self.shape[0] if self.axes[0] == "expert" else 0

    @property
    def checkpoint_shape(self) -> tuple[int, ...]:
        """Of one of its tensors in the checkpoint."""
        return self.shape[1:] if self.experts else self.shape

    def checkpoint_keys(self, layer: int | None) -> list[str]:
        """Its tensors of one layer, expert by expert. `layer` counts only where it is `per_layer`."""
        at = () if layer is None else (layer,)
        if not self.experts:
            return [self.checkpoint_key.format(*at)]
        return [self.checkpoint_key.format(*at, expert) for expert in range(self.experts)]


class Decoder:
    """A model's graph without its weights: split once, merged with plain arrays while tracing."""

    def __init__(self, config: ModelConfig, dtype: jnp.dtype) -> None:
        self.config = config
        self.dtype = jnp.dtype(dtype)
        block = nnx.eval_shape(lambda: Block(config, nnx.Rngs(0), self.dtype))
        ends = nnx.eval_shape(lambda: Ends(config, nnx.Rngs(0), self.dtype))
        self._block_graph, block_state = nnx.split(block)
        self._ends_graph, ends_state = nnx.split(ends)
        names = {**WEIGHT_NAMES, **getattr(FAMILIES[config.model_type], "WEIGHT_NAMES", {})}
        self.weights = tuple(
            _declared(names, prefix, path, variable)
            for prefix, state in (("ends", ends_state), ("layers", block_state))
            for path, variable in nnx.to_flat_state(state)
        )

    def tree(self, leaf: Callable[[Weight, int | None], Any], layout: Layout) -> Params:
        """The parameters' nested dicts of `leaf(weight, layer)`; a stacked leaf has layer None."""
        ends: Params = {}
        for declared in self.weights:
            if not declared.per_layer:
                _put(ends, declared.name.removeprefix("ends."), leaf(declared, None))

        def layer_dict(layer: int | None) -> Params:
            tree: Params = {}
            for declared in self.weights:
                if declared.per_layer:
                    _put(tree, declared.name.removeprefix("layers."), leaf(declared, layer))
            return tree

        if layout == "scan":
            return {"ends": ends, "layers": layer_dict(None)}
        return {"ends": ends, "layers": tuple(layer_dict(i) for i in range(self.config.num_layers))}

    def hidden_states(
        self,
        params: Params,
        pool: Pool,
        tokens: Int[Array, " T"],
        positions: Int[Array, " T"],
        attend: Attend,
        valid: Bool[Array, " T"] | None = None,
    ) -> tuple[Float[Array, "T D"], Pool]:
        """After the last norm. `attend` is called once a layer (once in all, traced, in a scan).

        valid: which tokens are of some row; no expert computes the others. None: all are.
        """
        c = self.config
        ends = nnx.merge(self._ends_graph, params["ends"])
        x = jnp.take(ends.embed_tokens["weight"][...], tokens, axis=0, mode="clip")
        cos, sin = rotary(c.rope, c.head_dim, positions)
        windows = jnp.asarray([NO_WINDOW if w is None else w for w in c.windows], jnp.int32)

        def layer_step(
            carry: tuple[Array, Pool], layer: tuple[Params, Array, Array]
        ) -> tuple[tuple[Array, Pool], None]:
            x, pool = carry
            weights, index, window = layer
            block = nnx.merge(self._block_graph, _with_experts(weights, experts))
            return block(x, cos, sin, lambda q, kv: attend(q, kv, pool, index, window), valid, index), None

        carry = (x, pool)
        indices = jnp.arange(c.num_layers, dtype=jnp.int32)
        layers, experts = params["layers"], None
        if isinstance(layers, tuple):
            step = jax.jit(layer_step)  # traced and lowered once: XLA then inlines it layer by layer
            for i, weights in enumerate(layers):
                carry, _ = step(carry, (weights, indices[i], windows[i]))
        else:
            if c.num_experts:
                experts = layers["mlp"]["experts"]
                layers = {**layers, "mlp": {"gate": layers["mlp"]["gate"]}}
            carry, _ = jax.lax.scan(layer_step, carry, (layers, indices, windows))
        x, pool = carry
        return ends.norm(x), pool

    def logits(self, params: Params, hidden: Float[Array, "T D"]) -> Float[Array, "T V"]:
        """f32, sharded over the vocabulary like the head's weight."""
        ends = params["ends"]
        head = ends["embed_tokens"] if self.config.tie_embeddings else ends["lm_head"]
        with jax.named_scope("logits"):
            return project(hidden, head["weight"], jnp.dtype(jnp.float32))


def _with_experts(weights: Params, experts: Params | None) -> Params:
    """One layer's weights with the experts of all layers, which a scan keeps out of its slices."""
    return weights if experts is None else {**weights, "mlp": {**weights["mlp"], "experts": experts}}


def _declared(names: dict[str, str], prefix: str, path: tuple[Any, ...], variable: nnx.Variable) -> Weight:
    name = ".".join((prefix, *map(str, path)))
    value: jax.ShapeDtypeStruct = variable.get_value()
    axes: tuple[str, ...] = variable.get_metadata()["axes"]
    return Weight(name, tuple(value.shape), axes, np.dtype(value.dtype), names[name])


def _put(tree: Params, name: str, value: Any) -> None:
    *parents, last = name.split(".")
    for parent in parents:
        tree = tree.setdefault(parent, {})
    tree[last] = value
