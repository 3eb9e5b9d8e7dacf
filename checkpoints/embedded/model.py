"""The embedded model's forward pass for training, and its export to the Hugging Face layout.

A plain Llama (RMSNorm, rotary positions, grouped-query attention, gated MLP, tied embeddings) as pure functions
over a dict of arrays, written for gradient descent on a CPU. It knows nothing of serving, caches or sampling:
the engine reads the exported folder like any other checkpoint.

Letters: B rows, T query tokens, S key tokens, N query heads, K key/value heads, G = N / K, H head size,
D model size, F MLP size, V vocabulary, L layers.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

Params = dict[str, Array]


@dataclass(frozen=True)
class ModelConfig:
    """The architecture; every field is a `LlamaConfig` field under a shorter name."""

    vocabulary: int = 4096
    hidden: int = 256
    layers: int = 6
    mlp: int = 768
    heads: int = 4
    kv_heads: int = 2
    context: int = 1024
    rope_theta: float = 10000.0
    norm_eps: float = 1e-5

    def __post_init__(self) -> None:
        if self.hidden % self.heads or self.heads % self.kv_heads:
            raise ValueError(f"{self.hidden=} must divide by {self.heads=}, and that by {self.kv_heads=}")

    @property
    def head_size(self) -> int:
        return self.hidden // self.heads

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Every weight by its Hugging Face name. A projection is stored `[in, out]` here and transposed on export."""
        d, f, kv = self.hidden, self.mlp, self.kv_heads * self.head_size
        shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (self.vocabulary, d)}
        for i in range(self.layers):
            layer = f"model.layers.{i}."
            shapes |= {
                f"{layer}input_layernorm.weight": (d,),
                f"{layer}self_attn.q_proj.weight": (d, d),
                f"{layer}self_attn.k_proj.weight": (d, kv),
                f"{layer}self_attn.v_proj.weight": (d, kv),
                f"{layer}self_attn.o_proj.weight": (d, d),
                f"{layer}post_attention_layernorm.weight": (d,),
                f"{layer}mlp.gate_proj.weight": (d, f),
                f"{layer}mlp.up_proj.weight": (d, f),
                f"{layer}mlp.down_proj.weight": (f, d),
            }
        return shapes | {"model.norm.weight": (d,)}


def initialise(config: ModelConfig, seed: int) -> Params:
    """f32 weights: norms 1, matrices normal with deviation 0.02, those that end a residual branch / sqrt(2 L)."""
    rng = np.random.default_rng(seed)
    params = {}
    for name, shape in config.shapes().items():
        if len(shape) == 1:
            value = np.ones(shape, np.float32)
        else:
            scale = 0.02 / (2 * config.layers) ** 0.5 if "o_proj" in name or "down_proj" in name else 0.02
            value = (scale * rng.standard_normal(shape)).astype(np.float32)
        params[name] = jnp.asarray(value)
    return params


def rms_norm(x: Float[Array, "B T D"], weight: Float[Array, "D"], eps: float) -> Float[Array, "B T D"]:
    """Normalised over D in f32; returns x's dtype."""
    y = x.astype(jnp.float32)
    y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + eps)
    return (y * weight[None, None, :]).astype(x.dtype)


def rotate(x: Float[Array, "B T heads H"], theta: float) -> Float[Array, "B T heads H"]:
    """Rotary positions 0..T-1, the half-split form of Hugging Face's Llama."""
    half = x.shape[-1] // 2
    frequency = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angle = jnp.arange(x.shape[1], dtype=jnp.float32)[:, None] * frequency[None, :]  # f32[T, H/2]
    cos, sin = jnp.cos(angle)[None, :, None, :], jnp.sin(angle)[None, :, None, :]
    a, b = x[..., :half].astype(jnp.float32), x[..., half:].astype(jnp.float32)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)


def attend(
    q: Float[Array, "B T N H"], k: Float[Array, "B T K H"], v: Float[Array, "B T K H"], block: int
) -> Float[Array, "B T D"]:
    """Causal attention. Queries go in blocks, each against the keys up to its own end: with 1,024 tokens in blocks
    of 256 that is 62 % of the whole square."""
    rows, length, heads, size = q.shape
    kv_heads = k.shape[2]
    q = (q * size**-0.5).reshape(rows, length, kv_heads, heads // kv_heads, size).transpose(0, 2, 3, 1, 4)
    k, v = k.transpose(0, 2, 3, 1), v.transpose(0, 2, 1, 3)
    out = []
    for start in range(0, length, block):
        end = min(start + block, length)
        queries = q[:, :, :, start:end].reshape(rows, kv_heads, -1, size)
        scores = jnp.einsum("bkth,bkhs->bkts", queries, k[..., :end])
        scores = scores.reshape(rows, kv_heads, heads // kv_heads, end - start, end)
        seen = jnp.arange(start, end)[:, None] >= jnp.arange(end)[None, :]
        scores = jnp.where(seen[None, None, None], scores.astype(jnp.float32), -1e30)
        weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype).reshape(rows, kv_heads, -1, end)
        mixed = jnp.einsum("bkts,bksh->bkth", weights, v[:, :, :end])
        out.append(mixed.reshape(rows, kv_heads, heads // kv_heads, end - start, size))
    joined = jnp.concatenate(out, axis=3)  # [B, K, G, T, H]
    return joined.transpose(0, 3, 1, 2, 4).reshape(rows, length, heads * size)


def hidden_states(
    params: Params, tokens: Int[Array, "B T"], config: ModelConfig, dtype: jnp.dtype, block: int = 256
) -> Float[Array, "B T D"]:
    """The last norm's output, in `dtype`; products are computed in `dtype` too."""
    rows, length = tokens.shape

    def product(x: Array, name: str) -> Array:
        return x @ params[name].astype(dtype)

    x = params["model.embed_tokens.weight"][tokens].astype(dtype)
    for i in range(config.layers):
        layer = f"model.layers.{i}."
        y = rms_norm(x, params[f"{layer}input_layernorm.weight"], config.norm_eps)
        q = product(y, f"{layer}self_attn.q_proj.weight").reshape(rows, length, config.heads, -1)
        k = product(y, f"{layer}self_attn.k_proj.weight").reshape(rows, length, config.kv_heads, -1)
        v = product(y, f"{layer}self_attn.v_proj.weight").reshape(rows, length, config.kv_heads, -1)
        mixed = attend(rotate(q, config.rope_theta), rotate(k, config.rope_theta), v, block)
        x = x + product(mixed, f"{layer}self_attn.o_proj.weight")
        y = rms_norm(x, params[f"{layer}post_attention_layernorm.weight"], config.norm_eps)
        gated = jax.nn.silu(product(y, f"{layer}mlp.gate_proj.weight")) * product(y, f"{layer}mlp.up_proj.weight")
        x = x + product(gated, f"{layer}mlp.down_proj.weight")
    return rms_norm(x, params["model.norm.weight"], config.norm_eps)


def token_losses(
    params: Params, tokens: Int[Array, "B T+1"], config: ModelConfig, dtype: jnp.dtype
) -> Float[Array, "B T"]:
    """Nats of each token after the first of its row, given those before it in the row."""
    hidden = hidden_states(params, tokens[:, :-1], config, dtype)
    logits = hidden @ params["model.embed_tokens.weight"].astype(dtype).T
    logits = logits.astype(jnp.float32)
    actual = jnp.take_along_axis(logits, tokens[:, 1:, None], axis=-1)[..., 0]
    return jax.nn.logsumexp(logits, axis=-1) - actual
