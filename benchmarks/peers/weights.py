"""Random weights of a Llama's shape in a Hugging Face folder, the same for every peer.

By numpy and safetensors alone, so that no peer is needed to make them: normal as transformers draws them,
norms 1, a fixed seed. The tokenizer is made up: a byte or a word for every id.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

EMBEDDING_SCALE = 0.02
SEED = 135
KEYS = {
    "hidden": "hidden_size",
    "layers": "num_hidden_layers",
    "heads": "num_attention_heads",
    "kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "mlp": "intermediate_size",
    "vocab": "vocab_size",
    "context": "max_position_embeddings",
}


@dataclasses.dataclass(frozen=True, slots=True)
class Shape:
    """Tied embeddings, no biases."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp: int
    vocab: int
    context: int

    @classmethod
    def from_folder(cls, folder: Path) -> Shape:
        read = json.loads((folder / "config.json").read_text())
        return cls(**{field: read[key] for field, key in KEYS.items()})

    @property
    def q(self) -> int:
        return self.heads * self.head_dim

    @property
    def kv(self) -> int:
        return self.kv_heads * self.head_dim

    @property
    def layer_weights(self) -> int:
        return self.hidden * (2 * self.q + 2 * self.kv + 3 * self.mlp)

    @property
    def head_weights(self) -> int:
        return self.vocab * self.hidden


SMOLLM_135M = Shape(576, 30, 9, 3, 64, 1536, 49152, 2048)
TINY = Shape(64, 2, 4, 2, 16, 128, 512, 256)


def config(shape: Shape) -> dict[str, object]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        **{key: getattr(shape, field) for field, key in KEYS.items()},
        "tie_word_embeddings": True,
        "attention_bias": False,
        "mlp_bias": False,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "dtype": "bfloat16",
        "bos_token_id": None,
        "eos_token_id": None,
    }


def tensors(shape: Shape) -> dict[str, NDArray[np.generic]]:
    """bf16[out, in] by checkpoint key."""
    rng = np.random.default_rng(SEED)

    # 0.02 at 576; a narrower model with that would repeat its last token for ever, whatever its layers do
    scale = 0.48 / shape.hidden**0.5

    def normal(*size: int, scale: float = scale) -> NDArray[np.generic]:
        return (scale * rng.standard_normal(size, np.float32)).astype(ml_dtypes.bfloat16)

    ones = np.ones(shape.hidden, ml_dtypes.bfloat16)
    named = {
        "model.embed_tokens.weight": normal(shape.vocab, shape.hidden, scale=EMBEDDING_SCALE),
        "model.norm.weight": ones,
    }
    for i in range(shape.layers):
        at = f"model.layers.{i}"
        named |= {
            f"{at}.input_layernorm.weight": ones,
            f"{at}.self_attn.q_proj.weight": normal(shape.q, shape.hidden),
            f"{at}.self_attn.k_proj.weight": normal(shape.kv, shape.hidden),
            f"{at}.self_attn.v_proj.weight": normal(shape.kv, shape.hidden),
            f"{at}.self_attn.o_proj.weight": normal(shape.hidden, shape.q),
            f"{at}.post_attention_layernorm.weight": ones,
            f"{at}.mlp.gate_proj.weight": normal(shape.mlp, shape.hidden),
            f"{at}.mlp.up_proj.weight": normal(shape.mlp, shape.hidden),
            f"{at}.mlp.down_proj.weight": normal(shape.hidden, shape.mlp),
        }
    return named


def write_tokenizer(folder: Path, vocab: int) -> None:
    """Byte-level: the 256 bytes, then made-up words."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = [*letters, *(f"Ġw{i}" for i in range(vocab - len(letters)))]
    tokenizer = Tokenizer(models.BPE(vocab={word: i for i, word in enumerate(words)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))


def write_model(folder: Path, shape: Shape) -> None:
    from safetensors.numpy import save_file

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config(shape), indent=1))
    write_tokenizer(folder, shape.vocab)
    save_file(tensors(shape), folder / "model.safetensors", metadata={"format": "pt"})
