"""A mixture of experts in place of an MLP: every token goes to the k experts that its router scores best.

Dropless: an expert takes as many tokens as choose it, and work follows what they chose. (token, expert)
pairs are sorted by expert, so that each expert's tokens lie together: the grouped product of MegaBlocks (Gale
et al. 2022). On TPU that is `jax.lax.ragged_dot`. Elsewhere XLA makes a product with all experts of it, `E`
times the arithmetic, so there it is a loop over the experts that are chosen, and over blocks of their tokens.

Experts are stacked. Which of them lie here is read off the weights' mesh: along `expert` a device has some
experts whole, along `tensor` a part of each; it adds up what its own give, one all-reduce adds up devices.
Every product has the same rows whoever shares the batch, and a token's experts are added in the router's
order, so that a token's bits depend on itself alone. Knows nothing of sequences or pages.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from jaxserve.models.config import ModelConfig
from jaxserve.models.layers import precision, project, weight
from sharding import mesh_axes, partition_spec

UP_AXES = ("expert", "mlp", "embed")
DOWN_AXES = ("expert", "embed", "mlp")
# rows [P, i] by weights [G, o, i], grouped along P
RAGGED = jax.lax.RaggedDotDimensionNumbers(
    dot_dimension_numbers=(([1], [2]), ([], [])), lhs_ragged_dimensions=[0], rhs_group_dimensions=[0]
)
MIN_BLOCK, MAX_BLOCK = 8, 128  # rows of a product; in bf16 on CPU, bits drift below 8


class Router(nnx.Module):
    def __init__(self, config: ModelConfig, rngs: nnx.Rngs, dtype: jnp.dtype) -> None:
        self.config = config
        self.weight = weight(rngs, (config.num_experts, config.hidden_size), ("router", "embed"), dtype)

    def __call__(self, x: Float[Array, "T D"]) -> tuple[Float[Array, "T k"], Int[Array, "T k"]]:
        """(weights, experts) of each token, best first. All in f32, the product's result too."""
        probabilities = jax.nn.softmax(project(x, self.weight[...], jnp.dtype(jnp.float32)), axis=-1)
        weights, chosen = jax.lax.top_k(probabilities, self.config.experts_per_token)
        if self.config.normalise_top_k:
            weights = weights / jnp.sum(weights, axis=-1, keepdims=True)
        return weights, chosen.astype(jnp.int32)


class SparseMLP(nnx.Module):
    """down(silu(gate x) * up x) of each token's experts, weighted and added."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs, dtype: jnp.dtype) -> None:
        c = config
        self.gate = Router(config, rngs, dtype)
        up, down = (c.num_experts, c.mlp_size, c.hidden_size), (c.num_experts, c.hidden_size, c.mlp_size)
        self.experts = nnx.Dict(
            gate_proj=weight(rngs, up, UP_AXES, dtype),
            up_proj=weight(rngs, up, UP_AXES, dtype),
            down_proj=weight(rngs, down, DOWN_AXES, dtype),
        )

    def __call__(
        self, x: Float[Array, "T D"], valid: Bool[Array, " T"] | None, layer: Int[Array, ""]
    ) -> Float[Array, "T D"]:
        """`valid`: tokens of some row; the others come out 0 and no expert sees them. The experts are one
        layer's, or those of all layers, `[L, E, ...]`: slicing a layer's out would copy it."""
        with jax.named_scope("router"):
            weights, chosen = self.gate(x)
            if valid is not None:
                chosen = jnp.where(valid[:, None], chosen, -1)
        stacks = [self.experts[name][...] for name in ("gate_proj", "up_proj", "down_proj")]
        if stacks[0].ndim == 3:
            stacks, layer = [stack[None] for stack in stacks], jnp.int32(0)
        block = block_rows(chosen.size, self.gate.config.num_experts)
        mesh = jax.typeof(stacks[0]).sharding.mesh
        if mesh.empty or mesh.size == 1:
            return run_experts(x, weights, chosen, layer, *stacks, block=block).astype(x.dtype)

        def own(x: Array, weights: Array, chosen: Array, layer: Array, *stacks: Array) -> Array:
            first = jax.lax.axis_index(mesh_axes("expert")) * stacks[0].shape[1]
            part = run_experts(x, weights, chosen - first, layer, *stacks, block=block)
            return jax.lax.psum(part.astype(x.dtype), mesh_axes("mlp") + mesh_axes("expert"))

        everywhere = PartitionSpec()
        specs = [partition_spec(("layer", *axes)) for axes in (UP_AXES, UP_AXES, DOWN_AXES)]
        mapped = jax.shard_map(
            own, mesh=mesh, in_specs=(*[everywhere] * 4, *specs), out_specs=everywhere, check_vma=False
        )
        return mapped(x, weights, chosen, layer, *stacks)


@dataclasses.dataclass(frozen=True)
class Groups:
    """(token, expert) pairs sorted by expert; pairs of no expert here stand last."""

    token: Int[Array, " P"]  # of each pair
    place: Int[Array, "T k"]  # where the pairs of a token stand
    counts: Int[Array, " E"]  # pairs of each expert


def group(chosen: Int[Array, "T k"], experts: int) -> Groups:
    """`chosen` outside [0, experts) is no expert here."""
    here = (chosen >= 0) & (chosen < experts)
    flat = jnp.where(here, chosen, experts).reshape(-1)
    order = jnp.argsort(flat, stable=True).astype(jnp.int32)
    place = jnp.argsort(order).astype(jnp.int32).reshape(chosen.shape)  # a scatter is far slower on CPU
    counts = jnp.sum(flat[:, None] == jnp.arange(experts, dtype=jnp.int32)[None, :], axis=0, dtype=jnp.int32)
    return Groups(order // chosen.shape[1], place, counts)


def block_rows(pairs: int, experts: int) -> int:
    """The largest power of two that an expert fills on average, within bounds."""
    mean = max(1, pairs // experts)
    return min(MAX_BLOCK, max(MIN_BLOCK, 1 << (mean.bit_length() - 1)))


def run_experts(
    x: Float[Array, "T D"],
    weights: Float[Array, "T k"],
    chosen: Int[Array, "T k"],
    layer: Int[Array, ""],
    gate: Float[Array, "L E F D"],
    up: Float[Array, "L E F D"],
    down: Float[Array, "L E D F"],
    *,
    block: int,
) -> Float[Array, "T D"]:
    """f32: each token's experts among those of `layer`, weighted and added; pairs outside [0, E) give 0."""
    experts = gate.shape[1]
    groups = group(chosen, experts)
    stacks = [stack.reshape(-1, *stack.shape[2:]) for stack in (gate, up, down)]  # no copy
    with jax.named_scope("experts"):
        rows = jax.lax.platform_dependent(
            x,
            groups.token,
            groups.counts,
            layer * experts,
            *stacks,
            tpu=_ragged,
            default=functools.partial(_looped, block=block),
        )
    here = (chosen >= 0) & (chosen < experts)
    weighted = rows[groups.place].astype(jnp.float32) * weights[:, :, None]
    return jnp.sum(jnp.where(here[:, :, None], weighted, 0.0), axis=1)


def _looped(
    x: Float[Array, "T D"],
    token: Int[Array, " P"],
    counts: Int[Array, " E"],
    first: Int[Array, ""],
    gate: Float[Array, "G F D"],
    up: Float[Array, "G F D"],
    down: Float[Array, "G D F"],
    *,
    block: int,
) -> Float[Array, "P D"]:
    """What the experts [first, first + E) of G make of their pairs; rows beyond the last pair are undefined.

    Blocks and experts follow each other: what a block writes beyond its expert's last pair is written again
    by the next one, or is beyond the last pair of all.
    """
    starts = jnp.cumsum(counts) - counts
    used = jnp.argsort(counts == 0, stable=True)  # those with pairs, in order
    padded = jnp.pad(token, (0, block))

    def expert(i: Array, out: Array) -> Array:
        e = used[i]
        w_gate, w_up, w_down = (
            jax.lax.dynamic_index_in_dim(stack, first + e.astype(jnp.int32), keepdims=False)
            for stack in (gate, up, down)
        )

        def rows(b: Array, out: Array) -> Array:
            at = starts[e] + b * block
            mine = x[jax.lax.dynamic_slice_in_dim(padded, at, block)]
            inner = jax.nn.silu(project(mine, w_gate)) * project(mine, w_up)
            return jax.lax.dynamic_update_slice_in_dim(out, project(inner, w_down), at, axis=0)

        return jax.lax.fori_loop(0, (counts[e] + block - 1) // block, rows, out)

    out = jnp.zeros((padded.shape[0], x.shape[1]), x.dtype)
    out = jax.lax.fori_loop(0, jnp.sum(counts > 0, dtype=jnp.int32), expert, out)
    return out[: token.shape[0]]


def _ragged(
    x: Float[Array, "T D"],
    token: Int[Array, " P"],
    counts: Int[Array, " E"],
    first: Int[Array, ""],
    gate: Float[Array, "G F D"],
    up: Float[Array, "G F D"],
    down: Float[Array, "G D F"],
) -> Float[Array, "P D"]:
    """As `_looped`, in one grouped product for each weight.

    The experts of other layers are groups without rows, which the kernel passes over: no weight is copied.
    """
    sizes = jnp.zeros(gate.shape[0], jnp.int32)
    sizes = jax.lax.dynamic_update_slice(sizes, counts, (first,))

    def product(rows: Array, stack: Array) -> Array:
        out = jax.lax.ragged_dot_general(
            rows,
            stack,
            sizes,
            RAGGED,
            precision=precision(rows.dtype),
            preferred_element_type=jnp.float32,
        )
        return out.astype(rows.dtype)

    mine = x[token]
    return product(jax.nn.silu(product(mine, gate)) * product(mine, up), down)
