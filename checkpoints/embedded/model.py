"""The embedded model's forward pass for training, and its export to the Hugging Face layout.

A plain Llama (RMSNorm, rotary positions, grouped-query attention, gated MLP, tied embeddings) as pure
functions over a dict of arrays, written for gradient descent on a CPU. It knows nothing of serving, caches or
sampling: the engine reads the exported folder like any other checkpoint.

Letters: B rows, T query tokens, S key tokens, N query heads, K key/value heads, G = N / K, H head size,
D model size, F MLP size, V vocabulary, L layers.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int
from safetensors.flax import load_file, save_file

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
        """Every weight by its Hugging Face name. Projections are `[in, out]`, transposed on export."""
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
    """f32 weights: norms 1, matrices normal of deviation 0.02, those ending a residual branch / sqrt(2 L)."""
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


def rms_norm(x: Float[Array, "BT D"], weight: Float[Array, " D"], eps: float) -> Float[Array, "BT D"]:
    """Normalised over D."""
    return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + eps) * weight[None, :]


def rotate(x: Float[Array, "B T heads H"], theta: float) -> Float[Array, "B T heads H"]:
    """Rotary positions 0..T-1, the half-split form of Hugging Face's Llama."""
    half = x.shape[-1] // 2
    frequency = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angle = jnp.arange(x.shape[1], dtype=jnp.float32)[:, None] * frequency[None, :]  # f32[T, H/2]
    cos, sin = jnp.cos(angle)[None, :, None, :], jnp.sin(angle)[None, :, None, :]
    a, b = x[..., :half], x[..., half:]
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


def attend(
    q: Float[Array, "B T N H"], k: Float[Array, "B T K H"], v: Float[Array, "B T K H"], block: int
) -> Float[Array, "B T D"]:
    """Causal attention.

    Queries go in blocks, each against the keys up to its own end: with 1,024 tokens in blocks of 128 that is
    56 % of the whole square.
    """
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
    params: Params, tokens: Int[Array, "B T"], config: ModelConfig, dtype: DTypeLike, block: int = 128
) -> Float[Array, "BT D"]:
    """f32: the last norm's output, rows and positions flattened into one axis.

    Products of activations with weights take their inputs in `dtype`; all else is f32. Flat, because XLA's
    CPU backend is 1.5 times slower on the weight gradients of a three-axis product.
    """
    rows, length = tokens.shape

    def product(x: Array, name: str) -> Array:
        return (x.astype(dtype) @ params[name].astype(dtype)).astype(jnp.float32)

    def heads(x: Array, count: int) -> Array:
        return x.reshape(rows, length, count, config.head_size)

    x = params["model.embed_tokens.weight"][tokens.reshape(-1)]
    for i in range(config.layers):
        layer = f"model.layers.{i}."
        y = rms_norm(x, params[f"{layer}input_layernorm.weight"], config.norm_eps)
        q = rotate(heads(product(y, f"{layer}self_attn.q_proj.weight"), config.heads), config.rope_theta)
        k = rotate(heads(product(y, f"{layer}self_attn.k_proj.weight"), config.kv_heads), config.rope_theta)
        v = heads(product(y, f"{layer}self_attn.v_proj.weight"), config.kv_heads)
        mixed = attend(q, k, v, block).reshape(rows * length, config.hidden)
        x = x + product(mixed, f"{layer}self_attn.o_proj.weight")
        y = rms_norm(x, params[f"{layer}post_attention_layernorm.weight"], config.norm_eps)
        gated = jax.nn.silu(product(y, f"{layer}mlp.gate_proj.weight")) * product(
            y, f"{layer}mlp.up_proj.weight"
        )
        x = x + product(gated, f"{layer}mlp.down_proj.weight")
    return rms_norm(x, params["model.norm.weight"], config.norm_eps)


def token_losses(
    params: Params,
    tokens: Int[Array, "B T+1"],
    config: ModelConfig,
    dtype: DTypeLike,
    length: int | None = None,
) -> Float[Array, "B T"]:
    """Nats of each token after the first of its row, given those before it in the row.

    With `length`, a divisor of T, rows are cut into pieces of so many tokens that do not see each other.
    """
    inputs, actual = tokens[:, :-1], tokens[:, 1:]
    hidden = hidden_states(params, inputs.reshape(-1, length or inputs.shape[1]), config, dtype)
    logits = hidden @ params["model.embed_tokens.weight"].T  # f32[BT, V]
    picked = jnp.take_along_axis(logits, actual.reshape(-1, 1), axis=-1)[:, 0]
    return (jax.nn.logsumexp(logits, axis=-1) - picked).reshape(actual.shape)


def save_model(folder: Path, params: Params, config: ModelConfig) -> None:
    """Writes `config.json` and bf16 `model.safetensors` as Hugging Face does: `[out, in]`, no tied head."""
    weights = {}
    for name, value in params.items():
        is_projection = name.endswith("_proj.weight")
        weights[name] = jnp.asarray(value.T if is_projection else value).astype(jnp.bfloat16)
    save_file(weights, str(folder / "model.safetensors"), metadata={"format": "pt"})
    (folder / "model.safetensors").chmod(0o644)
    description = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "bfloat16",
        "vocab_size": config.vocabulary,
        "hidden_size": config.hidden,
        "intermediate_size": config.mlp,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_size,
        "hidden_act": "silu",
        "max_position_embeddings": config.context,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "tie_word_embeddings": True,
        "attention_bias": False,
        "mlp_bias": False,
        "initializer_range": 0.02,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 1,
        "use_cache": True,
    }
    (folder / "config.json").write_text(json.dumps(description, indent=2) + "\n")


def load_model(folder: Path) -> tuple[Params, ModelConfig]:
    """What `save_model` wrote, as f32; raises where a weight is missing, unknown or of another shape."""
    read = json.loads((folder / "config.json").read_text())
    config = ModelConfig(
        vocabulary=read["vocab_size"],
        hidden=read["hidden_size"],
        layers=read["num_hidden_layers"],
        mlp=read["intermediate_size"],
        heads=read["num_attention_heads"],
        kv_heads=read["num_key_value_heads"],
        context=read["max_position_embeddings"],
        rope_theta=read["rope_theta"],
        norm_eps=read["rms_norm_eps"],
    )
    params = {
        name: (value.T if name.endswith("_proj.weight") else value).astype(jnp.float32)
        for name, value in load_file(str(folder / "model.safetensors")).items()
    }
    shapes = {name: value.shape for name, value in params.items()}
    if shapes != config.shapes():
        raise ValueError(
            f"{folder}: weights differ from config.json: {set(shapes.items()) ^ set(config.shapes().items())}"
        )
    return params, config
