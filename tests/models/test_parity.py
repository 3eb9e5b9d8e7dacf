"""Every model family and every variant of it against transformers, in float32 with random weights.

The weights go through a checkpoint on disk and jaxserve's own loading. Variants are combined pairwise: each
case below turns several of them on at once.
"""

from __future__ import annotations

import copy
import dataclasses
import inspect
import json
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
import torch
import transformers
from numpy.typing import NDArray

from checkpoints.embedded import MODEL_DIR
from jaxserve import build
from jaxserve.config import EngineOptions
from jaxserve.models.decoder import Decoder, Layout
from jaxserve.weights import load_params, open_weights
from sharding import make_mesh, parse_mesh
from tests.models.driving import Driver, chunked, relative_error, whole

VOCABULARY, WIDTH = 320, 64
GENERATED = 64
TOLERANCE = 1e-4  # relative, per position; also how near two best logits may be and still change places


@dataclasses.dataclass(frozen=True)
class Case:
    """config: over the family's base. without: changes that each turn one variant off; the reference's logits
    must move, or the case would not show that variant. old: config.json as before transformers 5."""

    name: str
    family: str
    config: dict[str, Any]
    without: tuple[dict[str, Any], ...] = ()
    old: bool = False
    layout: Layout = "scan"
    stored: str = "float32"
    shard_size: str = "5GB"
    page: int = 16

    def __str__(self) -> str:
        return self.name


def rope(kind: str, theta: float = 10000.0, **values: Any) -> dict[str, Any]:
    return {"rope_type": kind, "rope_theta": theta, **values}


def heads(query: int, key_value: int, size: int) -> dict[str, Any]:
    return {"num_attention_heads": query, "num_key_value_heads": key_value, "head_dim": size}


PLAIN = {"rope_parameters": rope("default")}
NO_WINDOW = {"sliding_window": None, "layer_types": ["full_attention"] * 3}
LLAMA3 = {
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 128,
}
YARN = {"factor": 4.0, "original_max_position_embeddings": 128}
FEW_BYTES = "40KB"  # several shards

CASES = [
    Case("llama-mha", "llama", heads(4, 4, 16)),
    Case(
        "llama-gqa-biases-llama3-old",
        "llama",
        {
            **heads(4, 2, 24),
            "attention_bias": True,
            "mlp_bias": True,
            "rope_parameters": rope("llama3", **LLAMA3),
        },
        (PLAIN,),
        old=True,
        layout="unrolled",
        stored="bfloat16",
        shard_size=FEW_BYTES,
        page=64,
    ),
    Case(
        "llama-mqa-tied-linear",
        "llama",
        {**heads(4, 1, 16), "tie_word_embeddings": True, "rope_parameters": rope("linear", factor=4.0)},
        (PLAIN,),
        stored="float16",
    ),
    Case(
        "llama-tied-yarn-old",
        "llama",
        {**heads(4, 2, 16), "tie_word_embeddings": True, "rope_parameters": rope("yarn", **YARN)},
        (PLAIN,),
        old=True,
        layout="unrolled",
        shard_size=FEW_BYTES,
    ),
    Case(
        "llama-yarn-attention-factor-untruncated",
        "llama",
        {
            **heads(4, 2, 24),
            "rope_parameters": rope("yarn", **YARN, attention_factor=1.3, beta_fast=8.0, truncate=False),
        },
        (
            {"rope_parameters": rope("yarn", **YARN, attention_factor=1.3, beta_fast=8.0)},
            {"rope_parameters": rope("yarn", **YARN, beta_fast=8.0, truncate=False)},
            {"rope_parameters": rope("yarn", **YARN, attention_factor=1.3, truncate=False)},
        ),
        page=64,
    ),
    Case(
        "llama-mqa-bias-yarn-mscale",
        "llama",
        {
            **heads(8, 1, 16),
            "attention_bias": True,
            "rope_parameters": rope("yarn", **YARN, mscale=1.5, mscale_all_dim=0.5),
        },
        ({"rope_parameters": rope("yarn", **YARN)},),
        layout="unrolled",
        stored="bfloat16",
    ),
    Case(
        "llama-mlp-bias-dynamic",
        "llama",
        {**heads(4, 2, 16), "mlp_bias": True, "rope_parameters": rope("dynamic", factor=2.0)},
        old=True,
        shard_size=FEW_BYTES,
    ),
    Case(
        "mistral-gqa-window",
        "mistral",
        {**heads(4, 2, 16), "sliding_window": 40},
        ({"sliding_window": None},),
    ),
    Case(
        "mistral-mha-tied-linear-old",
        "mistral",
        {
            **heads(4, 4, 32),
            "sliding_window": None,
            "tie_word_embeddings": True,
            "rope_parameters": rope("linear", factor=2.0),
        },
        (PLAIN,),
        old=True,
        layout="unrolled",
        stored="float16",
        shard_size=FEW_BYTES,
        page=64,
    ),
    Case(
        "mistral-mqa-narrow-window-yarn",
        "mistral",
        {**heads(4, 1, 24), "sliding_window": 5, "rope_parameters": rope("yarn", **YARN)},
        ({"sliding_window": 6}, PLAIN),
        layout="unrolled",
    ),
    Case(
        "qwen2-gqa",
        "qwen2",
        {**heads(4, 2, 16), "rope_parameters": rope("default", theta=1e6)},
        (PLAIN,),
        old=True,
        stored="bfloat16",
    ),
    Case(
        "qwen2-mha-tied-late-window-yarn-old",
        "qwen2",
        {
            **heads(4, 4, 16),
            "tie_word_embeddings": True,
            "use_sliding_window": True,
            "sliding_window": 33,
            "max_window_layers": 2,
            "rope_parameters": rope("yarn", **YARN),
        },
        ({"max_window_layers": 3}, {"max_window_layers": 1}, {"sliding_window": 32}),
        old=True,
        layout="unrolled",
        page=64,
    ),
    Case(
        "qwen2-mqa-layer-types-llama3",
        "qwen2",
        {
            **heads(4, 1, 16),
            "use_sliding_window": True,
            "sliding_window": 64,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            "rope_parameters": rope("llama3", **LLAMA3),
        },
        (NO_WINDOW, PLAIN),
        stored="float16",
        shard_size=FEW_BYTES,
    ),
    Case(
        "qwen3-gqa-tied",
        "qwen3",
        {**heads(4, 2, 32), "tie_word_embeddings": True},
        shard_size=FEW_BYTES,
        page=64,
    ),
    Case(
        "qwen3-mha-bias-layer-types-yarn",
        "qwen3",
        {
            **heads(4, 4, 24),
            "attention_bias": True,
            "use_sliding_window": True,
            "sliding_window": 17,
            "layer_types": ["full_attention", "sliding_attention", "full_attention"],
            "rope_parameters": rope("yarn", **YARN),
        },
        (NO_WINDOW, PLAIN),
        layout="unrolled",
        stored="bfloat16",
    ),
    Case(
        "qwen3-mqa-all-windows-linear-old",
        "qwen3",
        {
            **heads(4, 1, 16),
            "use_sliding_window": True,
            "sliding_window": 130,
            "max_window_layers": 0,
            "rope_parameters": rope("linear", factor=4.0),
        },
        ({"sliding_window": 131}, PLAIN),
        old=True,
        layout="unrolled",
    ),
]

EXPERTS = {
    "moe_intermediate_size": 48,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "norm_topk_prob": True,
}
CASES += [
    Case(
        "mixtral-gqa",
        "mixtral",
        {**heads(4, 2, 16), "num_local_experts": 8, "num_experts_per_tok": 2},
        ({"num_experts_per_tok": 3}, {"num_experts_per_tok": 1}),
        page=64,
    ),
    Case(
        "mixtral-mha-window-tied-linear-old",
        "mixtral",
        {
            **heads(4, 4, 24),
            "num_local_experts": 3,
            "num_experts_per_tok": 1,
            "sliding_window": 40,
            "tie_word_embeddings": True,
            "rope_parameters": rope("linear", factor=2.0),
        },
        ({"sliding_window": None}, PLAIN),
        old=True,
        layout="unrolled",
        stored="bfloat16",
        shard_size=FEW_BYTES,
    ),
    Case(
        "mixtral-mqa-narrow-window-all-experts-yarn",
        "mixtral",
        {
            **heads(4, 1, 16),
            "num_local_experts": 4,
            "num_experts_per_tok": 4,
            "sliding_window": 5,
            "rope_parameters": rope("yarn", **YARN),
        },
        ({"sliding_window": 6}, {"num_experts_per_tok": 3}, PLAIN),
        stored="float16",
        shard_size=FEW_BYTES,
    ),
    Case(
        "qwen3-moe-gqa",
        "qwen3_moe",
        {**heads(4, 2, 32), **EXPERTS},
        ({"norm_topk_prob": False}, {"num_experts_per_tok": 3}),
        shard_size=FEW_BYTES,
        page=64,
    ),
    Case(
        "qwen3-moe-mha-unnormalised-bias-yarn-old",
        "qwen3_moe",
        {
            **heads(4, 4, 16),
            **EXPERTS,
            "num_experts": 16,
            "num_experts_per_tok": 5,
            "norm_topk_prob": False,
            "attention_bias": True,
            "rope_parameters": rope("yarn", **YARN),
        },
        ({"norm_topk_prob": True}, PLAIN),
        old=True,
        layout="unrolled",
    ),
    Case(
        "qwen3-moe-mqa-window-one-expert-llama3",
        "qwen3_moe",
        {
            **heads(4, 1, 24),
            **EXPERTS,
            "num_experts_per_tok": 1,
            "norm_topk_prob": False,
            "use_sliding_window": True,
            "sliding_window": 33,
            "rope_parameters": rope("llama3", **LLAMA3),
        },
        ({"use_sliding_window": False}, {"sliding_window": 32}, {"num_experts_per_tok": 2}, PLAIN),
        stored="bfloat16",
    ),
    Case(
        "qwen3-moe-mha-window-normalised",
        "qwen3_moe",
        {
            **heads(4, 4, 16),
            **EXPERTS,
            "num_experts_per_tok": 7,
            "use_sliding_window": True,
            "sliding_window": 130,
            "tie_word_embeddings": True,
        },
        ({"norm_topk_prob": False}, {"use_sliding_window": False}),
        layout="unrolled",
        stored="float16",
        page=64,
    ),
]

EMBEDDED = Case(
    "embedded", "llama", {}, page=64
)  # the model that jaxserve brings along, with its own weights


def random_model(case: Case, **changed: Any) -> torch.nn.Module:
    """Weights large enough that logits spread by about 2 and every part moves them; norms around 1."""
    config = transformers.AutoConfig.for_model(
        case.family,
        **{
            "vocab_size": VOCABULARY,
            "hidden_size": WIDTH,
            "intermediate_size": 96,
            "num_hidden_layers": 3,
            "max_position_embeddings": 512,
            "rms_norm_eps": 1e-5,
            "rope_parameters": rope("default"),
            **case.config,
            **changed,
        },
    )
    torch.manual_seed(sum(case.name.encode()))
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith("norm.weight"):
                weight.normal_(1.0, 0.2)
            elif name.endswith("bias"):
                weight.normal_(0.0, 0.3)
            elif "embed_tokens" in name or "lm_head" in name:
                weight.normal_(0.0, 2.0 / WIDTH**0.5)
            else:
                weight.normal_(0.0, 1.3 / weight.shape[-1] ** 0.5)
            weight.copy_(weight.to(getattr(torch, case.stored)))  # as the checkpoint will hold it
    return model


def write_folder(case: Case, model: torch.nn.Module, folder: Path) -> None:
    stored = copy.deepcopy(model).to(getattr(torch, case.stored))
    stored.save_pretrained(folder, max_shard_size=case.shard_size)  # type: ignore[operator]
    assert (folder / "model.safetensors.index.json").exists() == (case.shard_size == FEW_BYTES)
    path = folder / "config.json"
    config = json.loads(path.read_text())
    if case.old:
        values = config.pop("rope_parameters")
        config["rope_theta"] = values.pop("rope_theta")
        values["type"] = values.pop("rope_type")
        config["rope_scaling"] = None if values["type"] == "default" else values
        config["torch_dtype"] = config.pop("dtype")
        config.pop("layer_types", None)
    path.write_text(json.dumps(config))


def reference(model: torch.nn.Module, tokens: NDArray[np.int32]) -> NDArray[np.float32]:
    with torch.no_grad():
        return model(torch.from_numpy(tokens).long()[None]).logits[0].numpy()


@dataclasses.dataclass
class Pair:
    """A loaded model and its reference, with prompts and the reference's logits for them."""

    case: Case
    model: torch.nn.Module
    driver: Driver
    prompts: list[NDArray[np.int32]]
    want: list[NDArray[np.float32]]

    @property
    def lengths(self) -> list[int]:
        return [len(prompt) for prompt in self.prompts]

    def rng(self) -> np.random.Generator:
        return np.random.default_rng(sum(self.case.name.encode()))


@pytest.fixture(scope="module", params=[*CASES, EMBEDDED], ids=str)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    case: Case = request.param
    rng = np.random.default_rng(len(case.name))
    edge = int(rng.choice([15, 16, 64, 65, 128]))
    lengths = [1, int(rng.integers(2, 40)), 300, int(rng.integers(40, 180)), edge]
    if case is EMBEDDED:
        folder = MODEL_DIR
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        source = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json")).encode(
            inspect.getsource(textwrap)
        )
        prompts = [np.array(source.ids[at : at + length], np.int32) for at, length in enumerate(lengths)]
    else:
        folder = tmp_path_factory.mktemp("model")
        model = random_model(case)
        write_folder(case, model, folder)
        prompts = [rng.integers(0, VOCABULARY, length).astype(np.int32) for length in lengths]
    loaded = build.read_model(str(folder), EngineOptions(dtype="float32"))
    mesh = make_mesh(parse_mesh(""))
    decoder = Decoder(loaded.config, jnp.dtype(loaded.dtype))
    params = load_params(decoder, open_weights(decoder, loaded.folder), mesh, case.layout)
    driver = Driver(decoder, params, mesh, page=case.page, max_len=300 + GENERATED)
    yield Pair(case, model, driver, prompts, [reference(model, prompt) for prompt in prompts])


def test_the_embedded_model_reads_text(pair: Pair) -> None:
    if pair.case is EMBEDDED:
        tokenizer = tokenizers.Tokenizer.from_file(str(MODEL_DIR / "tokenizer.json"))
        text = tokenizer.decode(pair.prompts[2].tolist())
        assert len(text) > 300 and text in inspect.getsource(textwrap)


def test_prefill_in_one_piece(pair: Pair) -> None:
    """Each prompt alone, then all but the longest packed: logits at every position."""
    rng = pair.rng()
    cache = pair.driver.cache(pair.lengths, rng)
    for got, want in zip(
        pair.driver.prefill(cache, pair.prompts, whole(pair.lengths)), pair.want, strict=True
    ):
        assert relative_error(got, want) < TOLERANCE
    packed = [i for i in range(5) if i != 2]
    cache = pair.driver.cache(pair.lengths, rng)
    got = pair.driver.prefill(cache, pair.prompts, [[(i, 0, pair.lengths[i]) for i in packed]])
    for i in packed:
        assert relative_error(got[i], pair.want[i]) < TOLERANCE


def test_prefill_in_packed_chunks(pair: Pair) -> None:
    """And the pool holds what was written, where it belongs, and nothing else."""
    rng = pair.rng()
    cache = pair.driver.cache(pair.lengths, rng)
    steps = chunked(pair.lengths, pair.driver.tokens, pair.driver.rows, rng)
    assert max(len(step) for step in steps) > 1 and len(steps) > 2
    for got, want in zip(pair.driver.prefill(cache, pair.prompts, steps), pair.want, strict=True):
        assert relative_error(got, want) < TOLERANCE
    written = np.isfinite(np.asarray(cache.pool))
    assert (written == cache.used(pair.lengths)[None, :, :, None]).all()


def test_greedy_decode(pair: Pair) -> None:
    """Every token is the reference's own choice after the same text, but where its two best logits are within
    TOLERANCE; so both write the same text up to the first such place."""
    rng = pair.rng()
    lengths = pair.lengths
    cache = pair.driver.cache([length + GENERATED for length in lengths], rng)
    steps = chunked(lengths, pair.driver.tokens, pair.driver.rows, rng)
    last = [logits[-1] for logits in pair.driver.prefill(cache, pair.prompts, steps)]
    tokens, logits = pair.driver.greedy(cache, last, lengths, GENERATED)
    assert pair.case is EMBEDDED or len(np.unique(tokens)) > 20, (
        "the model repeats itself, and the test shows little"
    )
    for prompt, drawn, got in zip(pair.prompts, tokens, logits, strict=True):
        want = reference(pair.model, np.concatenate([prompt, drawn[:-1]]))[len(prompt) - 1 :]
        assert relative_error(got, want) < TOLERANCE
        best = np.sort(want, axis=-1)
        tie = best[:, -1] - best[:, -2] < TOLERANCE
        assert ((drawn == np.argmax(want, axis=-1)) | tie).all()
        assert tie.mean() < 0.1
    written = np.isfinite(np.asarray(cache.pool))
    assert (written == cache.used([length + GENERATED - 1 for length in lengths])[None, :, :, None]).all()


@pytest.mark.parametrize("case", [case for case in CASES if case.without], ids=str)
def test_the_variant_moves_the_reference(case: Case) -> None:
    """With the same weights and the variant turned off the reference answers otherwise."""
    tokens = np.random.default_rng(0).integers(0, VOCABULARY, 300).astype(np.int32)
    want = reference(random_model(case), tokens)
    for changed in case.without:
        assert relative_error(reference(random_model(case, **changed), tokens), want) > 100 * TOLERANCE
