"""The same weights as a GGUF file of llama.cpp's `llama` architecture: matrices bf16, norms f32, a vocabulary
of dummy tokens."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file

from benchmarks.peers.weights import Shape

BF16 = gguf.GGMLQuantizationType.BF16
LAYER = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def gguf_name(key: str) -> str:
    if key == "model.embed_tokens.weight":
        return "token_embd.weight"
    if key == "model.norm.weight":
        return "output_norm.weight"
    index, name = key.removeprefix("model.layers.").removesuffix(".weight").split(".", 1)
    return f"blk.{index}.{LAYER[name]}.weight"


def interleave(w: NDArray[np.generic], heads: int) -> NDArray[np.generic]:
    """Rotary pairs (i, i + H/2) of a head become neighbours, as `llama` wants its q and k."""
    out, size = w.shape
    return w.reshape(heads, 2, out // heads // 2, size).swapaxes(1, 2).reshape(out, size)


def write_gguf(folder: Path, path: Path, shape: Shape, norm_eps: float, rope_theta: float) -> None:
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(shape.layers)
    writer.add_context_length(shape.context)
    writer.add_embedding_length(shape.hidden)
    writer.add_feed_forward_length(shape.mlp)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.kv_heads)
    writer.add_key_length(shape.head_dim)
    writer.add_value_length(shape.head_dim)
    writer.add_rope_dimension_count(shape.head_dim)
    writer.add_rope_freq_base(rope_theta)
    writer.add_layer_norm_rms_eps(norm_eps)
    writer.add_vocab_size(shape.vocab)
    writer.add_tokenizer_model("none")
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_BF16)
    for key, tensor in load_file(folder / "model.safetensors").items():
        if tensor.ndim == 1:
            writer.add_tensor(gguf_name(key), tensor.astype(np.float32))
            continue
        if ".q_proj." in key or ".k_proj." in key:
            tensor = interleave(tensor, shape.heads if ".q_proj." in key else shape.kv_heads)
        data = np.ascontiguousarray(tensor).view(np.uint8)  # uint8[out, 2 * in]
        writer.add_tensor(gguf_name(key), data, raw_dtype=BF16)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
