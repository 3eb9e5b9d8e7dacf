"""config.json to numbers: what is refused, by which name; what is passed over; real models' own files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from jaxserve import build
from jaxserve.config import EngineOptions
from jaxserve.models import config_from_hf
from jaxserve.models.config import ConfigError, ModelConfig, context_limit
from jaxserve.models.decoder import Decoder
from jaxserve.models.layers import inverse_frequencies

LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 320,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 128,
}


def parse(**changed: Any) -> ModelConfig:
    return config_from_hf({**LLAMA, **changed})


def qwen2(**changed: Any) -> ModelConfig:
    return parse(model_type="qwen2", **changed)


# -- refused ---------------------------------------------------------------------------------------------

REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"model_type": "gpt2"}, "model_type='gpt2' is not supported; .* one of llama, mistral, mixtral, qwen2"),
    ({"model_type": None}, "model_type=None"),
    ({"model_type": ["llama"]}, r"model_type=\['llama'\]"),
    ({"hidden_act": "gelu"}, "hidden_act='gelu' is not supported; it must be 'silu'"),
    ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
    ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config="),
    ({"num_local_experts": 8}, "num_local_experts=8"),
    ({"attn_logit_softcapping": 50.0}, "attn_logit_softcapping=50.0"),
    ({"sliding_window": 128}, "sliding_window=128"),  # Llama has none
    ({"some_new_feature": True}, "some_new_feature=True"),
    ({"rope_interleaved": True}, "rope_interleaved=True"),
    ({"hidden_size": None}, "no 'hidden_size'"),
    ({"hidden_size": 0}, "hidden_size=0"),
    ({"hidden_size": -64}, "hidden_size=-64"),
    ({"hidden_size": 64.0}, "hidden_size=64.0"),
    ({"hidden_size": "64"}, "hidden_size='64'"),
    ({"hidden_size": 2**40}, "hidden_size=1099511627776"),
    ({"num_hidden_layers": True}, "num_hidden_layers=True"),
    ({"num_hidden_layers": 0}, "num_hidden_layers=0"),
    ({"num_hidden_layers": 2**31 - 1}, "num_hidden_layers=2147483647"),
    ({"vocab_size": []}, r"vocab_size=\[\]"),
    ({"intermediate_size": {}}, "intermediate_size="),
    ({"max_position_embeddings": "many"}, "max_position_embeddings='many'"),
    ({"hidden_size": 66}, "hidden_size=66 is not a multiple of num_attention_heads=4"),
    ({"num_key_value_heads": 3}, "num_attention_heads=4 is not a multiple of num_key_value_heads=3"),
    ({"num_key_value_heads": 8}, "num_attention_heads=4 is not a multiple of num_key_value_heads=8"),
    ({"head_dim": 15}, "head_dim=15 is odd"),
    ({"hidden_size": 60}, "head_dim=15 is odd"),
    ({"head_dim": 0}, "head_dim=0"),
    ({"head_dim": "16"}, "head_dim='16'"),
    ({"rms_norm_eps": 0}, "rms_norm_eps=0"),
    ({"rms_norm_eps": float("nan")}, "rms_norm_eps=nan"),
    ({"rms_norm_eps": "1e-5"}, "rms_norm_eps='1e-5'"),
    ({"tie_word_embeddings": "yes"}, "tie_word_embeddings='yes'"),
    ({"attention_bias": 1}, "attention_bias=1"),
    ({"torch_dtype": "float8_e4m3fn"}, "torch_dtype='float8_e4m3fn'"),
    ({"dtype": 16}, "dtype=16"),
    ({"rope_theta": -1.0}, "rope_theta=-1.0"),
    ({"rope_theta": "big"}, "rope_theta='big'"),
    ({"rope_scaling": "linear"}, "rope_scaling='linear' must be an object"),
    ({"rope_scaling": {"rope_type": "longrope", "factor": 4.0}}, "rope_scaling.rope_type='longrope'"),
    ({"rope_scaling": {"type": "su", "factor": 4.0}}, "rope_type='su'"),
    ({"rope_scaling": {"type": "linear"}}, "rope_scaling of type 'linear' has no 'factor'"),
    ({"rope_scaling": {"type": "linear", "factor": "4"}}, "rope_scaling.factor='4'"),
    ({"rope_scaling": {"type": "linear", "factor": 4.0, "beta_fast": 32}}, "unknown keys: beta_fast"),
    ({"rope_scaling": {**LLAMA3, "high_freq_factor": None}}, "has no 'high_freq_factor'"),
    ({"rope_scaling": {**LLAMA3, "original_max_position_embeddings": "8k"}}, "position_embeddings='8k'"),
    ({"rope_scaling": {**YARN, "truncate": "no"}}, "truncate='no'"),
    ({"rope_scaling": {**YARN, "mscale": "1", "mscale_all_dim": 1.0}}, "mscale='1'"),
    ({"rope_scaling": {**YARN, "attention_factor": "1"}}, "attention_factor='1'"),
    ({"rope_scaling": {**YARN, "finetuned": True}}, "unknown keys: finetuned"),
    ({"rope_parameters": {"rope_type": "longrope"}}, "rope_parameters.rope_type='longrope'"),
    ({"rope_parameters": {"partial_rotary_factor": 0.25}}, "partial_rotary_factor=0.25"),
    ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "unknown keys: full_attention"),
    # false is a value
    ({"is_causal": False}, "is_causal=False"),
    ({"use_rope": False}, "use_rope=False"),
    ({"rope_interleaved": 0}, "rope_interleaved=0"),
    ({"_sliding_window_pattern": 6}, "_sliding_window_pattern=6"),
    ({"_remove_final_layer_norm": False}, "_remove_final_layer_norm=False"),
    # two keys that say different things
    ({"dtype": "float16", "torch_dtype": "bfloat16"}, "torch_dtype='bfloat16' and dtype='float16' differ"),
    ({"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_parameters": YARN},
     "rope_parameters and rope_scaling differ"),
    ({"rope_scaling": YARN, "rope_parameters": {**YARN, "factor": 8.0}}, "and rope_scaling differ"),
    ({"rope_scaling": {**YARN, "type": "linear"}}, "rope_type='yarn' and rope_scaling.type='linear' differ"),
    ({"rope_theta": 1e4, "rope_parameters": {"rope_theta": 5e5}},
     "rope_theta=10000.0 and rope_parameters.rope_theta=500000.0 differ"),
    ({"rope_scaling": {**YARN, "rope_theta": 5e5}, "rope_parameters": {**YARN, "rope_theta": 1e4}}, "differ"),
    # a value that its kind has no use for
    ({"rope_scaling": {"factor": 4.0}}, "type 'default' has unknown keys: factor"),
    ({"rope_scaling": {"rope_type": "default", "factor": 4.0}}, "type 'default' has unknown keys: factor"),
    ({"rope_scaling": {"type": "", "factor": 4.0}}, "rope_type='' is not supported"),
    ({"rope_scaling": {"type": "linear", "factor": 4.0, "original_max_position_embeddings": 128}},
     "type 'linear' has unknown keys: original_max_position_embeddings"),
    ({"rope_theta": 1, "rope_scaling": YARN}, "rope_theta=1 must be more than 1"),
    ({"rope_theta": 0.5}, "rope_theta=0.5 must be more than 1"),
]  # fmt: skip


@pytest.mark.parametrize(("changed", "message"), REFUSED, ids=lambda value: str(value)[:50])
def test_refused_by_name(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse(**changed)


WINDOWS_REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"layer_types": ["full_attention"] * 2}, "layer_types must list 3 layers"),
    ({"layer_types": "full_attention"}, "layer_types must list 3 layers"),
    ({"layer_types": ["full_attention", "chunked_attention", "full_attention"]}, "'chunked_attention'"),
    ({"layer_types": ["sliding_attention"] * 3}, "sliding_attention, but sliding_window is not set"),
    ({"use_sliding_window": "yes"}, "use_sliding_window='yes'"),
    ({"use_sliding_window": True, "sliding_window": 0}, "sliding_window=0"),
    ({"use_sliding_window": True, "sliding_window": 8.5}, "sliding_window=8.5"),
    ({"use_sliding_window": True, "sliding_window": 8, "max_window_layers": -1}, "max_window_layers=-1"),
    ({"use_mrope": True}, "use_mrope=True"),
    ({"num_hidden_layers": "3"}, "num_hidden_layers='3'"),
    ({"num_hidden_layers": 2**70}, "num_hidden_layers=1180591620717411303424"),  # and at once
]


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
@pytest.mark.parametrize(("changed", "message"), WINDOWS_REFUSED, ids=lambda value: str(value)[:50])
def test_windows_refused_by_name(family: str, changed: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse(model_type=family, **changed)


@pytest.mark.parametrize("window", [0, -1, "4096"])
def test_mistral_window_refused(window: Any) -> None:
    with pytest.raises(ConfigError, match=f"sliding_window={window!r}"):
        parse(model_type="mistral", sliding_window=window)


def test_several_unknown_keys_are_named_together() -> None:
    with pytest.raises(ConfigError, match=r"2 value\(s\).*ape=1, bee=2") as error:
        parse(bee=2, ape=1)
    assert len(str(error.value)) < 400
    with pytest.raises(ConfigError) as error:
        parse(huge=["x" * 1000] * 1000)
    assert len(str(error.value)) < 400


def test_every_value_of_a_wrong_type_is_a_config_error() -> None:
    """Whatever a key holds, the answer is a configuration or a ConfigError, never another exception."""
    keys = [
        *LLAMA, "head_dim", "hidden_act", "rope_theta", "rope_scaling", "rope_parameters", "sliding_window",
        "layer_types", "use_sliding_window", "max_window_layers", "attention_bias", "mlp_bias", "torch_dtype",
        "dtype", "tie_word_embeddings", "partial_rotary_factor", "use_mrope", "num_local_experts",
        "num_experts", "num_experts_per_tok", "moe_intermediate_size", "norm_topk_prob",
        "decoder_sparse_step", "mlp_only_layers",
    ]  # fmt: skip
    values = [
        None,
        True,
        False,
        0,
        -1,
        7,
        2**70,
        0.0,
        1.5,
        float("inf"),
        float("nan"),
        "",
        "silu",
        [],
        [1],
        {},
        {"a": 1},
    ]
    for family in ("llama", "mistral", "mixtral", "qwen2", "qwen3", "qwen3_moe"):
        for key in keys:
            for value in values:
                try:
                    config = parse(**{"model_type": family, key: value})
                except ConfigError as error:
                    assert len(str(error)) < 400
                else:
                    hash(config)  # frozen and complete
    inner = [
        "rope_type", "type", "rope_theta", "factor", "original_max_position_embeddings", "low_freq_factor",
        "high_freq_factor", "beta_fast", "attention_factor", "mscale", "mscale_all_dim", "truncate",
    ]  # fmt: skip
    for base in (YARN, LLAMA3, {"type": "linear", "factor": 2}, {"type": "dynamic", "factor": 2}):
        for key in inner:
            for value in values:
                try:
                    config = parse(rope_scaling={**base, "mscale": 1.0, key: value})
                except ConfigError as error:
                    assert len(str(error)) < 400
                else:
                    assert all(np.isfinite(inverse_frequencies(config.rope, config.head_dim)))


# -- passed over -----------------------------------------------------------------------------------------


def test_inert_keys_change_nothing() -> None:
    inert = {
        "architectures": ["LlamaForCausalLM"], "attention_dropout": 0.1, "bos_token_id": 1, "pad_token_id": 0,
        "eos_token_id": [1, 2], "initializer_range": 0.02, "pretraining_tp": 2, "use_cache": False,
        "transformers_version": "4.40.1", "torch_dtype": None, "_name_or_path": "somewhere/else",
        "_attn_implementation_autoset": True, "_commit_hash": "abc", "use_mrope": False, "another": None,
        "rope_interleaved": False, "is_llama_config": True, "transformers.js_config": {"dtype": "q4"},
        "unsloth_version": "2025.1",
    }  # fmt: skip
    assert parse(**inert) == parse()


def test_null_is_absent() -> None:
    keys = [
        "num_key_value_heads", "head_dim", "hidden_act", "rms_norm_eps", "rope_theta", "rope_scaling",
        "rope_parameters", "tie_word_embeddings", "torch_dtype", "attention_bias", "mlp_bias",
        "sliding_window",
    ]  # fmt: skip
    without = {key: value for key, value in LLAMA.items() if key not in keys}
    assert config_from_hf({**without, **dict.fromkeys(keys)}) == config_from_hf(without)


def test_defaults() -> None:
    config = config_from_hf(
        {key: LLAMA[key] for key in LLAMA if key not in ("num_key_value_heads", "rms_norm_eps")}
    )
    assert (config.num_kv_heads, config.head_dim, config.norm_eps) == (4, 16, 1e-6)
    assert (config.rope.kind, config.rope.theta, config.windows) == ("default", 10000.0, (None,) * 3)
    assert not (
        config.tie_embeddings or config.qkv_bias or config.o_bias or config.mlp_bias or config.qk_norm
    )
    assert config.dtype is None
    assert parse(model_type="qwen3").head_dim == 128  # not hidden / heads
    assert parse(model_type="mistral").windows == (4096,) * 3
    mistral = {key: value for key, value in LLAMA.items() if key != "num_key_value_heads"}
    mistral |= {"model_type": "mistral", "num_attention_heads": 16}
    assert config_from_hf(mistral).num_kv_heads == 8  # transformers' own default, not the head count
    assert parse(model_type="mistral", sliding_window=None).windows == (None,) * 3


def test_families_and_their_biases() -> None:
    flags = {
        family: (config.qkv_bias, config.o_bias, config.mlp_bias, config.qk_norm)
        for family in ("llama", "mistral", "qwen2", "qwen3")
        for config in [parse(model_type=family)]
    }
    assert flags == {
        "llama": (False, False, False, False),
        "mistral": (False, False, False, False),
        "qwen2": (True, False, False, False),
        "qwen3": (False, False, False, True),
    }
    assert parse(attention_bias=True, mlp_bias=True).mlp_bias
    config = parse(model_type="qwen3", attention_bias=True)
    assert config.qkv_bias and config.o_bias and not config.mlp_bias


def test_windows_of_qwen() -> None:
    sliding = {"use_sliding_window": True, "sliding_window": 8}
    types = ["sliding_attention", "full_attention", "sliding_attention"]
    assert qwen2(sliding_window=8, max_window_layers=1).windows == (None,) * 3
    assert qwen2(**sliding, max_window_layers=1).windows == (None, 8, 8)
    assert qwen2(**sliding, max_window_layers=0).windows == (8,) * 3
    assert qwen2(**sliding).windows == (None,) * 3  # max_window_layers is 28 by default
    assert qwen2(**sliding, layer_types=types, max_window_layers=1).windows == (8, None, 8)
    assert qwen2(use_sliding_window=True, sliding_window=None).windows == (None,) * 3


def test_dtype() -> None:
    assert parse(torch_dtype="bfloat16").dtype == "bfloat16"
    assert parse(dtype="float16").dtype == "float16"
    assert parse(dtype="float32", torch_dtype="float32").dtype == "float32"


# -- rotary embedding ------------------------------------------------------------------------------------

ROPES: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default", "rope_theta": 5e5},
    "linear": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.5},
    "llama3": {**LLAMA3, "rope_theta": 5e5},
    "yarn": {**YARN, "rope_theta": 1e6},
    "yarn untruncated": {**YARN, "rope_theta": 1e4, "truncate": False, "beta_fast": 8.0, "beta_slow": 2.0},
    "yarn attention factor": {**YARN, "rope_theta": 1e4, "attention_factor": 0.7},
    "yarn mscale": {**YARN, "rope_theta": 1e4, "mscale": 1.0, "mscale_all_dim": 0.5},
    "yarn one mscale": {**YARN, "rope_theta": 1e4, "mscale": 2.0},
    "yarn factor 1": {**YARN, "rope_theta": 1e4, "factor": 1.0},
    "yarn of its own length": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0},
    "llama3 of its own length": {
        key: value for key, value in {**LLAMA3, "rope_theta": 1e4}.items() if not key.startswith("original")
    },
    "dynamic": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 3.0},
}


@pytest.mark.parametrize("head_dim", [16, 64, 128])
@pytest.mark.parametrize("values", ROPES.values(), ids=ROPES)
def test_frequencies_are_those_of_transformers(values: dict[str, Any], head_dim: int) -> None:
    """In both spellings; `dynamic` within its original length."""
    theirs = transformers.LlamaConfig(
        **{key: value for key, value in LLAMA.items() if key != "model_type"},
        head_dim=head_dim,
        rope_parameters=dict(values),
    )
    rotary = transformers.models.llama.modeling_llama.LlamaRotaryEmbedding(theirs)
    rotary(torch.zeros(1), torch.arange(512)[None])
    older = dict(values)
    scaling = {"rope_theta": older.pop("rope_theta"), "rope_scaling": {**older, "type": older["rope_type"]}}
    for spelling in ({"rope_parameters": values}, scaling, {**scaling, "rope_parameters": values}):
        config = parse(head_dim=head_dim, **spelling)
        got = np.array(inverse_frequencies(config.rope, head_dim))
        np.testing.assert_allclose(got, rotary.inv_freq.numpy(), rtol=2e-6)
        assert config.rope.attention_factor == pytest.approx(rotary.attention_scaling)


def test_dynamic_stops_at_its_original_length() -> None:
    """Beyond it every cached key would change."""
    config = parse(rope_scaling={"type": "dynamic", "factor": 4.0})
    assert context_limit(config) == 512
    config = parse(rope_scaling={"type": "dynamic", "factor": 4.0, "original_max_position_embeddings": 128})
    assert context_limit(config) == 128
    assert context_limit(parse(rope_scaling=YARN)) == 512
    assert context_limit(parse()) == 512


def test_max_model_len_beyond_the_context_is_refused(tmp_path: Path) -> None:
    scaling = {"type": "dynamic", "factor": 4.0, "original_max_position_embeddings": 128}
    config = {**LLAMA, "rope_scaling": scaling}
    (tmp_path / "config.json").write_text(json.dumps(config))
    options = EngineOptions(load_format="dummy")
    assert build.read_model(str(tmp_path), options).max_model_len == 128
    with pytest.raises(ValueError, match=r"--max-model-len=129 .* 128 tokens \(rope dynamic"):
        build.read_model(str(tmp_path), EngineOptions(load_format="dummy", max_model_len=129))


# -- real models' config.json ----------------------------------------------------------------------------

LLAMA_3_1_8B = """{
  "architectures": ["LlamaForCausalLM"], "attention_bias": false, "attention_dropout": 0.0,
  "bos_token_id": 128000, "eos_token_id": 128001, "hidden_act": "silu", "hidden_size": 4096,
  "initializer_range": 0.02, "intermediate_size": 14336, "max_position_embeddings": 131072, "mlp_bias": false,
  "model_type": "llama", "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 8,
  "pretraining_tp": 1, "rms_norm_eps": 1e-05,
  "rope_scaling": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                   "original_max_position_embeddings": 8192, "rope_type": "llama3"},
  "rope_theta": 500000.0, "tie_word_embeddings": false, "torch_dtype": "bfloat16",
  "transformers_version": "4.43.0.dev0", "use_cache": true, "vocab_size": 128256}"""

MISTRAL_7B_V01 = """{
  "architectures": ["MistralForCausalLM"], "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu",
  "hidden_size": 4096, "initializer_range": 0.02, "intermediate_size": 14336,
  "max_position_embeddings": 32768, "model_type": "mistral", "num_attention_heads": 32,
  "num_hidden_layers": 32, "num_key_value_heads": 8, "rms_norm_eps": 1e-05, "rope_theta": 10000.0,
  "sliding_window": 4096, "tie_word_embeddings": false, "torch_dtype": "bfloat16",
  "transformers_version": "4.34.0.dev0", "use_cache": true, "vocab_size": 32000}"""

MISTRAL_7B_V03 = """{
  "architectures": ["MistralForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 1, "eos_token_id": 2,
  "hidden_act": "silu", "hidden_size": 4096, "initializer_range": 0.02, "intermediate_size": 14336,
  "max_position_embeddings": 32768, "model_type": "mistral", "num_attention_heads": 32,
  "num_hidden_layers": 32, "num_key_value_heads": 8, "rms_norm_eps": 1e-05, "rope_theta": 1000000.0,
  "sliding_window": null, "tie_word_embeddings": false, "torch_dtype": "bfloat16",
  "transformers_version": "4.42.0.dev0", "use_cache": true, "vocab_size": 32768}"""

QWEN2_5_7B = """{
  "architectures": ["Qwen2ForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 151643,
  "eos_token_id": 151643, "hidden_act": "silu", "hidden_size": 3584, "initializer_range": 0.02,
  "intermediate_size": 18944, "max_position_embeddings": 131072, "max_window_layers": 28,
  "model_type": "qwen2", "num_attention_heads": 28, "num_hidden_layers": 28, "num_key_value_heads": 4,
  "rms_norm_eps": 1e-06, "rope_theta": 1000000.0, "sliding_window": 131072, "tie_word_embeddings": false,
  "torch_dtype": "bfloat16", "transformers_version": "4.40.1", "use_cache": true, "use_mrope": false,
  "use_sliding_window": false, "vocab_size": 152064}"""

QWEN3_8B = """{
  "architectures": ["Qwen3ForCausalLM"], "attention_bias": false, "attention_dropout": 0.0,
  "bos_token_id": 151643, "eos_token_id": 151645, "head_dim": 128, "hidden_act": "silu", "hidden_size": 4096,
  "initializer_range": 0.02, "intermediate_size": 12288, "max_position_embeddings": 40960,
  "max_window_layers": 36, "model_type": "qwen3", "num_attention_heads": 32, "num_hidden_layers": 36,
  "num_key_value_heads": 8, "rms_norm_eps": 1e-06, "rope_scaling": null, "rope_theta": 1000000,
  "sliding_window": null, "tie_word_embeddings": false, "torch_dtype": "bfloat16",
  "transformers_version": "4.51.0", "use_cache": true, "use_sliding_window": false, "vocab_size": 151936}"""

SMOLLM2_135M = """{
  "architectures": ["LlamaForCausalLM"], "attention_bias": false, "attention_dropout": 0.0,
  "bos_token_id": 0, "eos_token_id": 0, "hidden_act": "silu", "hidden_size": 576,
  "initializer_range": 0.041666666666666664, "intermediate_size": 1536, "is_llama_config": true,
  "max_position_embeddings": 8192, "model_type": "llama", "num_attention_heads": 9, "num_hidden_layers": 30,
  "num_key_value_heads": 3, "pretraining_tp": 1, "rms_norm_eps": 1e-05, "rope_interleaved": false,
  "rope_scaling": null, "rope_theta": 100000, "tie_word_embeddings": true, "torch_dtype": "bfloat16",
  "transformers_version": "4.40.1", "use_cache": true, "vocab_size": 49152}"""

TINYLLAMA = """{
  "architectures": ["LlamaForCausalLM"], "attention_bias": false, "bos_token_id": 1, "eos_token_id": 2,
  "hidden_act": "silu", "hidden_size": 2048, "initializer_range": 0.02, "intermediate_size": 5632,
  "max_position_embeddings": 2048, "model_type": "llama", "num_attention_heads": 32,
  "num_hidden_layers": 22, "num_key_value_heads": 4, "pretraining_tp": 1, "rms_norm_eps": 1e-05,
  "rope_scaling": null, "rope_theta": 10000.0, "tie_word_embeddings": false, "torch_dtype": "bfloat16",
  "transformers_version": "4.35.0", "use_cache": true, "vocab_size": 32000}"""

MIXTRAL_8X7B = """{
  "architectures": ["MixtralForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 1, "eos_token_id": 2,
  "hidden_act": "silu", "hidden_size": 4096, "initializer_range": 0.02, "intermediate_size": 14336,
  "max_position_embeddings": 32768, "model_type": "mixtral", "num_attention_heads": 32,
  "num_experts_per_tok": 2, "num_hidden_layers": 32, "num_key_value_heads": 8, "num_local_experts": 8,
  "output_router_logits": false, "rms_norm_eps": 1e-05, "rope_theta": 1000000.0,
  "router_aux_loss_coef": 0.02, "sliding_window": null, "tie_word_embeddings": false,
  "torch_dtype": "bfloat16", "transformers_version": "4.36.0.dev0", "use_cache": true, "vocab_size": 32000}"""

QWEN3_30B_A3B = """{
  "architectures": ["Qwen3MoeForCausalLM"], "attention_bias": false, "attention_dropout": 0.0,
  "bos_token_id": 151643, "decoder_sparse_step": 1, "eos_token_id": 151645, "head_dim": 128,
  "hidden_act": "silu", "hidden_size": 2048, "initializer_range": 0.02, "intermediate_size": 6144,
  "max_position_embeddings": 40960, "max_window_layers": 48, "mlp_only_layers": [], "model_type": "qwen3_moe",
  "moe_intermediate_size": 768, "norm_topk_prob": true, "num_attention_heads": 32, "num_experts": 128,
  "num_experts_per_tok": 8, "num_hidden_layers": 48, "num_key_value_heads": 4, "output_router_logits": false,
  "rms_norm_eps": 1e-06, "rope_scaling": null, "rope_theta": 1000000.0, "router_aux_loss_coef": 0.001,
  "sliding_window": null, "tie_word_embeddings": false, "torch_dtype": "bfloat16",
  "transformers_version": "4.51.0", "use_cache": true, "use_sliding_window": false, "vocab_size": 151936}"""

# What else the hub holds of these families: the keys as published, the sizes of the base model above where
# they do not matter.
QWEN_YARN = {"factor": 4.0, "original_max_position_embeddings": 32768}
PUBLISHED: dict[str, dict[str, Any]] = {
    "Llama-2-7b": {
        "_name_or_path": "meta-llama/Llama-2-7b-hf", "architectures": ["LlamaForCausalLM"],
        "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu", "hidden_size": 4096,
        "initializer_range": 0.02, "intermediate_size": 11008, "max_position_embeddings": 4096,
        "model_type": "llama", "num_attention_heads": 32, "num_hidden_layers": 32,
        "num_key_value_heads": 32, "pretraining_tp": 1, "rms_norm_eps": 1e-05, "rope_scaling": None,
        "tie_word_embeddings": False, "torch_dtype": "float16", "transformers_version": "4.31.0.dev0",
        "use_cache": True, "vocab_size": 32000,
    },
    "Llama-3.2-1B-Instruct": {
        **json.loads(LLAMA_3_1_8B), "eos_token_id": [128001, 128008, 128009], "head_dim": 64,
        "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
        "rope_scaling": {**json.loads(LLAMA_3_1_8B)["rope_scaling"], "factor": 32.0},
        "tie_word_embeddings": True,
    },
    "Mistral-Nemo-2407": {
        **json.loads(MISTRAL_7B_V03), "head_dim": 128, "hidden_size": 5120, "num_hidden_layers": 40,
        "max_position_embeddings": 131072, "vocab_size": 131072,
    },
    "Qwen2.5-7B-Instruct with its card's YaRN": {
        **json.loads(QWEN2_5_7B), "rope_scaling": {**QWEN_YARN, "type": "yarn"},
    },
    "Qwen3-8B with its card's YaRN": {
        **json.loads(QWEN3_8B), "rope_scaling": {**QWEN_YARN, "rope_type": "yarn"},
    },
    "Qwen3-4B-Instruct-2507": {
        **json.loads(QWEN3_8B), "hidden_size": 2560, "intermediate_size": 9728,
        "max_position_embeddings": 262144, "rope_theta": 5000000, "tie_word_embeddings": True,
    },
    "Mixtral-8x22B": {
        **json.loads(MIXTRAL_8X7B), "hidden_size": 6144, "intermediate_size": 16384, "num_hidden_layers": 56,
        "max_position_embeddings": 65536, "num_attention_heads": 48, "router_jitter_noise": 0.0,
    },
    "Qwen3-235B-A22B": {
        **json.loads(QWEN3_30B_A3B), "hidden_size": 4096, "intermediate_size": 12288, "max_window_layers": 94,
        "moe_intermediate_size": 1536, "num_attention_heads": 64, "num_hidden_layers": 94,
    },
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configs_are_read(name: str) -> None:
    config = config_from_hf(PUBLISHED[name])
    kind = "llama3" if name.startswith("Llama-3") else "yarn" if "YaRN" in name else "default"
    assert (config.rope.kind, config.num_layers) == (kind, PUBLISHED[name]["num_hidden_layers"])


@pytest.mark.parametrize("family", ["Llama", "Mistral", "Qwen2", "Qwen3", "Mixtral", "Qwen3Moe"])
@pytest.mark.parametrize("rope", ["default", "yarn", "llama3", "linear"])
def test_what_transformers_writes_is_read(family: str, rope: str, tmp_path: Path) -> None:
    """Every key that `save_pretrained` of the installed version leaves in the file."""
    rope_parameters = {**ROPES[rope], "rope_theta": 1e6}
    kind = getattr(transformers, f"{family}Config")
    kind(rope_parameters=rope_parameters, dtype="bfloat16").save_pretrained(tmp_path)
    full = kind(rope_parameters=rope_parameters, dtype="bfloat16").to_dict()
    config = config_from_hf(json.loads((tmp_path / "config.json").read_text()))
    assert (config.rope.kind, config.rope.theta, config.dtype) == (rope, 1e6, "bfloat16")
    assert config_from_hf(full) == config


# name -> (config.json, (V, D, F, L, N, K, H, context), theta, windows, tied, parameters in millions)
REAL: dict[str, tuple[str, tuple[int, ...], float, int | None, bool, float]] = {
    "Llama-3.1-8B": (LLAMA_3_1_8B, (128256, 4096, 14336, 32, 32, 8, 128, 131072), 5e5, None, False, 8030.3),
    "Mistral-7B-v0.1": (
        MISTRAL_7B_V01,
        (32000, 4096, 14336, 32, 32, 8, 128, 32768),
        1e4,
        4096,
        False,
        7241.7,
    ),
    "Mistral-7B-v0.3": (
        MISTRAL_7B_V03,
        (32768, 4096, 14336, 32, 32, 8, 128, 32768),
        1e6,
        None,
        False,
        7248.0,
    ),
    "Qwen2.5-7B": (QWEN2_5_7B, (152064, 3584, 18944, 28, 28, 4, 128, 131072), 1e6, None, False, 7615.6),
    "Qwen3-8B": (QWEN3_8B, (151936, 4096, 12288, 36, 32, 8, 128, 40960), 1e6, None, False, 8190.7),
    "Mixtral-8x7B": (MIXTRAL_8X7B, (32000, 4096, 14336, 32, 32, 8, 128, 32768), 1e6, None, False, 46702.8),
    "Qwen3-30B-A3B": (QWEN3_30B_A3B, (151936, 2048, 768, 48, 32, 4, 128, 40960), 1e6, None, False, 30532.1),
    "SmolLM2-135M": (SMOLLM2_135M, (49152, 576, 1536, 30, 9, 3, 64, 8192), 1e5, None, True, 134.5),
    "TinyLlama-1.1B": (TINYLLAMA, (32000, 2048, 5632, 22, 32, 4, 64, 2048), 1e4, None, False, 1100.0),
}


@pytest.mark.parametrize("name", REAL)
def test_real_models(name: str) -> None:
    text, sizes, theta, window, tied, millions = REAL[name]
    config = config_from_hf(json.loads(text))
    assert sizes == (
        config.vocab_size,
        config.hidden_size,
        config.mlp_size,
        config.num_layers,
        config.num_heads,
        config.num_kv_heads,
        config.head_dim,
        config.max_position,
    )
    assert (config.rope.theta, config.tie_embeddings, config.dtype) == (theta, tied, "bfloat16")
    assert config.windows == (window,) * config.num_layers
    assert config.norm_eps == json.loads(text)["rms_norm_eps"]
    assert config.rope.kind == ("llama3" if name == "Llama-3.1-8B" else "default")
    assert parameters(config) / 1e6 == pytest.approx(millions, abs=0.1)


def parameters(config: ModelConfig) -> int:
    """As the model cards count them: every declared weight."""
    weights = Decoder(config, jnp.bfloat16).weights
    return sum(int(np.prod(w.shape)) * (config.num_layers if w.per_layer else 1) for w in weights)
