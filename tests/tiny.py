"""A tiny random Llama in a Hugging Face folder, for tests that need a real model and not a good one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

VOCAB = 320
CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_act": "silu",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
    "vocab_size": VOCAB,
}


def shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Every key of the checkpoint, with its shape."""
    d, f, v = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    head = d // config["num_attention_heads"]
    kv = config["num_key_value_heads"] * head
    result = {"model.embed_tokens.weight": (v, d), "model.norm.weight": (d,), "lm_head.weight": (v, d)}
    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}."
        result |= {
            layer + "input_layernorm.weight": (d,),
            layer + "post_attention_layernorm.weight": (d,),
            layer + "self_attn.q_proj.weight": (d, d),
            layer + "self_attn.k_proj.weight": (kv, d),
            layer + "self_attn.v_proj.weight": (kv, d),
            layer + "self_attn.o_proj.weight": (d, d),
            layer + "mlp.gate_proj.weight": (f, d),
            layer + "mlp.up_proj.weight": (f, d),
            layer + "mlp.down_proj.weight": (d, f),
        }
    return result


def tensors(config: dict[str, Any], seed: int = 0) -> dict[str, np.ndarray]:
    """Random f32 weights, wide enough that greedy replies do not fall into one token at once."""
    rng = np.random.default_rng(seed)
    return {
        key: (
            np.ones(shape, np.float32)
            if "norm" in key
            else (rng.standard_normal(shape) * 3 / np.sqrt(shape[-1])).astype(np.float32)
        )
        for key, shape in shapes(config).items()
    }


def write_model(folder: Path, *, seed: int = 0, **changes: Any) -> Path:
    """The folder, with config.json and model.safetensors in it; `changes` go into the config."""
    folder.mkdir(parents=True, exist_ok=True)
    config = CONFIG | changes
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors(config, seed), folder / "model.safetensors")
    return folder
