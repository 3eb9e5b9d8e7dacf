"""The embedded model's forward pass for training, and its export to the Hugging Face layout.

A plain Llama (RMSNorm, rotary positions, grouped-query attention, gated MLP, tied embeddings) as pure
functions over a dict of arrays, written for gradient descent on a CPU. It knows nothing of serving, caches or
sampling: the engine reads the exported folder like any other checkpoint.

Letters: B rows, T query tokens, S key tokens, N query heads, K key/value heads, M queries that share a
key/value head, H head size, D model size, F MLP size, V vocabulary, L layers, I and O a product's sizes.
"""

import json
from dataclasses import dataclass
from math import gcd
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int, Shaped
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


@jax.custom_vjp
def linear(x: Shaped[Array, "BT I"], weight: Shaped[Array, "I O"]) -> Shaped[Array, "BT O"]:
    """`x @ weight`, both of one dtype; the gradients are products that XLA's CPU backend is fast at.

    Written plainly, that of the weight runs at a third of the forward product's rate (it contracts the first
    axis of both) and that of `x` is computed in f32. With the contracted axis cut in two, both keep the rate.
    """
    return x @ weight


def _linear_forward(x: Array, weight: Array) -> tuple[Array, tuple[Array, Array]]:
    return x @ weight, (x, weight)


def _linear_backward(kept: tuple[Array, Array], slope: Array) -> tuple[Array, Array]:
    x, weight = kept
    out = slope.shape[1]
    pieces = gcd(out, 8)
    to_x = jnp.einsum(
        "tco,ico->ti", slope.reshape(-1, pieces, out // pieces), weight.reshape(-1, pieces, out // pieces)
    )
    return to_x, _weight_gradient(x, slope)


def _weight_gradient(x: Array, slope: Array) -> Array:
    """`x.T @ slope`: [BT, I], [BT, O] to [I, O]."""
    pieces = gcd(x.shape[0], 8)
    return jnp.einsum(
        "cti,cto->io", x.reshape(pieces, -1, x.shape[1]), slope.reshape(pieces, -1, slope.shape[1])
    )


linear.defvjp(_linear_forward, _linear_backward)


@jax.custom_vjp
def gated(gate: Shaped[Array, "BT F"], up: Shaped[Array, "BT F"]) -> Shaped[Array, "BT F"]:
    """`silu(gate) * up`, computed in f32; keeps its inputs alone for the gradient."""
    return _gated_forward(gate, up)[0]


def _gated_forward(gate: Array, up: Array) -> tuple[Array, tuple[Array, Array]]:
    g, u = gate.astype(jnp.float32), up.astype(jnp.float32)
    return (g * jax.nn.sigmoid(g) * u).astype(gate.dtype), (gate, up)


def _gated_backward(kept: tuple[Array, Array], slope: Array) -> tuple[Array, Array]:
    gate, up = kept
    g, u, slope = (a.astype(jnp.float32) for a in (gate, up, slope))
    s = jax.nn.sigmoid(g)
    return (slope * u * s * (1 + g * (1 - s))).astype(gate.dtype), (slope * g * s).astype(up.dtype)


gated.defvjp(_gated_forward, _gated_backward)


@jax.custom_vjp
def masked_attention(
    q: Float[Array, "B K M H"],
    k: Float[Array, "B K S H"],
    v: Float[Array, "B K S H"],
    seen: Bool[Array, "M S"],
) -> Float[Array, "B K M H"]:
    """Softmax attention of scaled queries over the keys they see; every query must see one.

    The gradient takes each row's weighted mean of slopes from the output (Dao et al., FlashAttention,
    arXiv:2205.14135, section B.2) instead of another pass over the scores.
    """
    return _attention_forward(q, k, v, seen)[0]


def _attention_forward(q: Array, k: Array, v: Array, seen: Array) -> tuple[Array, tuple[Array, ...]]:
    scores = jnp.where(seen[None, None], jnp.einsum("bkmh,bksh->bkms", q, k), -1e30)
    weights = jnp.exp(scores - scores.max(axis=-1, keepdims=True))
    total = weights.sum(axis=-1, keepdims=True)
    out = jnp.einsum("bkms,bksh->bkmh", weights, v) / total
    return out, (q, k, v, weights, total, out)


def _attention_backward(kept: tuple[Array, ...], slope: Array) -> tuple[Array, Array, Array, None]:
    q, k, v, weights, total, out = kept
    slope = slope / total
    mean = (slope * out).sum(axis=-1, keepdims=True)
    to_scores = weights * (jnp.einsum("bkmh,bksh->bkms", slope, v) - mean)
    to_q = jnp.einsum("bkms,bksh->bkmh", to_scores, k)
    to_k = jnp.einsum("bkms,bkmh->bksh", to_scores, q)
    to_v = jnp.einsum("bkms,bkmh->bksh", weights, slope)
    return to_q, to_k, to_v, None


masked_attention.defvjp(_attention_forward, _attention_backward)


def attend(
    q: Float[Array, "B T N H"], k: Float[Array, "B T K H"], v: Float[Array, "B T K H"], block: int
) -> Float[Array, "B T D"]:
    """Causal attention.

    Queries go in blocks, each against the keys up to its own end: with 1,024 tokens in blocks of 128 that is
    56 % of the whole square.
    """
    rows, length, heads, size = q.shape
    kv_heads = k.shape[2]
    group = heads // kv_heads
    q = (q * size**-0.5).reshape(rows, length, kv_heads, group, size).transpose(0, 2, 3, 1, 4)
    k, v = k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3)
    out = []
    for start in range(0, length, block):
        end = min(start + block, length)
        queries = q[:, :, :, start:end].reshape(rows, kv_heads, -1, size)
        seen = jnp.arange(start, end)[:, None] >= jnp.arange(end)[None, :]
        mixed = masked_attention(queries, k[:, :, :end], v[:, :, :end], jnp.tile(seen, (group, 1)))
        out.append(mixed.reshape(rows, kv_heads, group, end - start, size))
    joined = jnp.concatenate(out, axis=3)  # [B, K, G, T, H]
    return joined.transpose(0, 3, 1, 2, 4).reshape(rows, length, heads * size)


def hidden_states(
    params: Params, tokens: Int[Array, "B T"], config: ModelConfig, dtype: DTypeLike, block: int = 128
) -> Float[Array, "BT D"]:
    """f32: the last norm's output, rows and positions flattened into one axis.

    Products of activations with weights take and give `dtype`; all else is f32.
    """
    rows, length = tokens.shape

    def product(x: Array, name: str) -> Array:
        return linear(x.astype(dtype), params[name].astype(dtype))

    def heads(x: Array, count: int) -> Array:
        return x.astype(jnp.float32).reshape(rows, length, count, config.head_size)

    x = params["model.embed_tokens.weight"][tokens.reshape(-1)]
    for i in range(config.layers):
        layer = f"model.layers.{i}."
        y = rms_norm(x, params[f"{layer}input_layernorm.weight"], config.norm_eps)
        q = rotate(heads(product(y, f"{layer}self_attn.q_proj.weight"), config.heads), config.rope_theta)
        k = rotate(heads(product(y, f"{layer}self_attn.k_proj.weight"), config.kv_heads), config.rope_theta)
        v = heads(product(y, f"{layer}self_attn.v_proj.weight"), config.kv_heads)
        mixed = attend(q, k, v, block).reshape(rows * length, config.hidden)
        x = x + product(mixed, f"{layer}self_attn.o_proj.weight").astype(jnp.float32)
        y = rms_norm(x, params[f"{layer}post_attention_layernorm.weight"], config.norm_eps)
        inner = gated(product(y, f"{layer}mlp.gate_proj.weight"), product(y, f"{layer}mlp.up_proj.weight"))
        x = x + product(inner, f"{layer}mlp.down_proj.weight").astype(jnp.float32)
    return rms_norm(x, params["model.norm.weight"], config.norm_eps)


@jax.custom_vjp
def cross_entropy(
    hidden: Shaped[Array, "BT D"], embedding: Shaped[Array, "V D"], actual: Int[Array, " BT"]
) -> Float[Array, " BT"]:
    """Nats of the actual tokens under the softmax of `hidden @ embedding.T`; logits and softmax in f32."""
    return _cross_entropy_forward(hidden, embedding, actual)[0]


def _cross_entropy_forward(hidden: Array, embedding: Array, actual: Array) -> tuple[Array, tuple[Array, ...]]:
    contract = (((1,), (1,)), ((), ()))
    logits = jax.lax.dot_general(hidden, embedding, contract, preferred_element_type=jnp.float32)
    norm = jax.nn.logsumexp(logits, axis=-1)
    picked = jnp.take_along_axis(logits, actual[:, None], axis=-1)[:, 0]
    is_actual = actual[:, None] == jnp.arange(embedding.shape[0])[None, :]
    to_logits = jnp.exp(logits - norm[:, None]) - is_actual.astype(jnp.float32)
    return norm - picked, (hidden, embedding, to_logits.astype(hidden.dtype))


def _cross_entropy_backward(kept: tuple[Array, ...], slope: Array) -> tuple[Array, Array, None]:
    hidden, embedding, to_logits = kept
    to_logits = to_logits * slope.astype(to_logits.dtype)[:, None]
    return to_logits @ embedding, _weight_gradient(to_logits, hidden), None


cross_entropy.defvjp(_cross_entropy_forward, _cross_entropy_backward)


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
    embedding = params["model.embed_tokens.weight"].astype(dtype)
    return cross_entropy(hidden.astype(dtype), embedding, actual.reshape(-1)).reshape(actual.shape)


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
