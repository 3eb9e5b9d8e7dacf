"""The parts of a decoder: declared weights, linear maps, RMS norm, rotary embedding.

Each weight is declared once, in the module that uses it, with shape, logical axes and init; sharding, random
weights and the load check are derived from that. Knows nothing of pages or slots, and of devices only
whether a product is summed over several.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from jaxserve.models.config import Rope
from sharding import mesh_axes

INIT_SCALE = 0.02  # standard deviation of random weights, as transformers draws them


def weight(rngs: nnx.Rngs, shape: tuple[int, ...], axes: tuple[str, ...], dtype: jnp.dtype) -> nnx.Param:
    return nnx.Param(jax.nn.initializers.normal(INIT_SCALE)(rngs.params(), shape, dtype), axes=axes)


def precision(dtype: jnp.dtype) -> jax.lax.Precision:
    """f32 means f32: accelerators would otherwise round its products to bf16 or TF32."""
    return jax.lax.Precision.HIGHEST if dtype == jnp.float32 else jax.lax.Precision.DEFAULT


class Linear(nnx.Module):
    """x[..., in] -> [..., out]. The weight is [out, in] as in checkpoints: faster at few rows on CPU.

    Where `in` is divided over devices each rounds its sum to x's dtype before they are added up: half the
    bytes of f32 between devices at 16 bits. (XLA does so by itself for TPU, not for GPU.)
    """

    def __init__(
        self,
        rngs: nnx.Rngs,
        size_in: int,
        size_out: int,
        *,
        axes: tuple[str, str],
        dtype: jnp.dtype,
        bias: bool = False,
    ) -> None:
        self.weight = weight(rngs, (size_out, size_in), axes, dtype)
        self.divided = bool(mesh_axes(axes[1]))
        if bias:
            self.bias = weight(rngs, (size_out,), axes[:1], dtype)

    def __call__(self, x: Float[Array, "T i"]) -> Float[Array, "T o"]:
        w = self.weight[...]
        summed = self.divided and jax.typeof(w).sharding.mesh.size > 1
        out = project(x, w, total=x.dtype if summed else None)
        return out + self.bias[...][None, :] if hasattr(self, "bias") else out


def project(
    x: Float[Array, "T i"],
    w: Float[Array, "o i"],
    out: jnp.dtype | None = None,
    total: jnp.dtype | None = None,
) -> Float[Array, "T o"]:
    """x @ w.T, accumulated in f32, rounded to `out` (x's dtype by default); each device's to `total` (f32 by
    default)."""
    product = jax.lax.dot_general(
        x,
        w,
        (((1,), (1,)), ((), ())),
        precision=precision(x.dtype),
        preferred_element_type=jnp.float32 if total is None else total,
    )
    return product.astype(x.dtype if out is None else out)


class RMSNorm(nnx.Module):
    """Zhang and Sennrich 2019, in f32; the weight multiplies after rounding, as transformers does."""

    def __init__(self, rngs: nnx.Rngs, size: int, eps: float, *, axis: str, dtype: jnp.dtype) -> None:
        del rngs  # ones, not random
        self.weight = nnx.Param(jnp.ones((size,), dtype), axes=(axis,))
        self.eps = eps

    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        wide = x.astype(jnp.float32)
        scale = jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + self.eps)
        w = self.weight[...].reshape((1,) * (x.ndim - 1) + (-1,))
        return w * (wide * scale).astype(x.dtype)


def inverse_frequencies(rope: Rope, head_dim: int) -> list[float]:
    """f64[head_dim / 2], radians per position. Formulas as in transformers' `modeling_rope_utils`."""
    base = [rope.theta ** (-2 * i / head_dim) for i in range(head_dim // 2)]
    match rope.kind:
        case "linear":
            return [freq / rope.factor for freq in base]
        case "llama3":
            return [_llama3(rope, freq) for freq in base]
        case "yarn":
            return _yarn(rope, base, head_dim)
        case _:
            return base


def _llama3(rope: Rope, freq: float) -> float:
    """Long wavelengths are stretched, short ones kept, those between blended (Llama 3.1)."""
    turns = rope.original_max_position * freq / (2 * math.pi)  # over the original context
    if turns < rope.low_freq_factor:
        return freq / rope.factor
    if turns > rope.high_freq_factor:
        return freq
    blend = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    return (1 - blend) * freq / rope.factor + blend * freq


def _yarn(rope: Rope, base: list[float], head_dim: int) -> list[float]:
    """Peng et al. 2023: interpolate the pairs that turn rarely, keep those that turn often, ramp between."""

    def pair_with(turns: float) -> float:
        return (
            head_dim
            * math.log(rope.original_max_position / (turns * 2 * math.pi))
            / (2 * math.log(rope.theta))
        )

    low, high = pair_with(rope.beta_fast), pair_with(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    high = high + 0.001 if low == high else high
    result = []
    for pair, freq in enumerate(base):
        stretched = min(max((pair - low) / (high - low), 0.0), 1.0)
        result.append(freq / rope.factor * stretched + freq * (1 - stretched))
    return result


def rotary(
    rope: Rope, head_dim: int, positions: Int[Array, " T"]
) -> tuple[Float[Array, "T H"], Float[Array, "T H"]]:
    """(cos, sin), f32, each half repeated: `rotate` turns pair (i, i + H/2)."""
    freqs = jnp.asarray(inverse_frequencies(rope, head_dim), jnp.float32)
    angles = positions.astype(jnp.float32)[:, None] * freqs[None, :]
    angles = jnp.concatenate([angles, angles], axis=-1)
    factor = rope.attention_factor
    return jnp.cos(angles) * factor, jnp.sin(angles) * factor


def rotate(
    x: Float[Array, "T N H"], cos: Float[Array, "T H"], sin: Float[Array, "T H"]
) -> Float[Array, "T N H"]:
    """In f32, rounded once."""
    wide = x.astype(jnp.float32)
    half = x.shape[-1] // 2
    turned = jnp.concatenate([-wide[..., half:], wide[..., :half]], axis=-1)
    return (wide * cos[:, None, :] + turned * sin[:, None, :]).astype(x.dtype)
