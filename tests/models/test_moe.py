"""The mixture of experts: against a plain loop over tokens, bit for bit whoever shares the batch, and what
the compiled layer computes and copies."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import torch
import transformers
from flax import nnx
from jax.experimental.layout import Format
from jax.experimental.layout import Layout as DeviceLayout
from numpy.typing import NDArray

from checkpoints.huggingface import CheckpointError
from jaxserve import build, weights
from jaxserve.config import EngineOptions
from jaxserve.engine.programs import device_bytes
from jaxserve.models import config_from_hf, moe
from jaxserve.models.config import ConfigError, ModelConfig
from jaxserve.models.decoder import Decoder, Layout
from jaxserve.models.meshes import check_mesh
from jaxserve.weights import abstract_params, dummy_params, load_params, open_weights
from sharding import MeshShape, make_mesh, named_sharding, parse_mesh

SIZES = {
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 320,
    "max_position_embeddings": 512,
}
MIXTRAL: dict[str, Any] = {
    **SIZES, "model_type": "mixtral", "intermediate_size": 96, "num_local_experts": 4,
    "num_experts_per_tok": 2,
}  # fmt: skip
QWEN: dict[str, Any] = {
    **SIZES, "model_type": "qwen3_moe", "intermediate_size": 512, "moe_intermediate_size": 48,
    "num_experts": 8, "num_experts_per_tok": 3, "norm_topk_prob": True,
}  # fmt: skip


# -- the layer against a plain loop ------------------------------------------------------------------------

Array = NDArray[Any]
LAYERS, EXPERTS, INNER, WIDTH = 3, 5, 24, 16


def by_hand(x: Array, scores: Array, chosen: Array, stacks: list[Array]) -> Array:
    """Token by token and expert by expert, in f64."""
    gate, up, down = (stack.astype(np.float64) for stack in stacks)
    out = np.zeros_like(x, np.float64)
    for t, row in enumerate(x.astype(np.float64)):
        for score, e in zip(scores[t], chosen[t], strict=True):
            if 0 <= e < len(gate):
                inner = gate[e] @ row
                out[t] += score * (down[e] @ (inner / (1 + np.exp(-inner)) * (up[e] @ row)))
    return out


def spread(rng: np.random.Generator, tokens: int, per_token: int) -> Array:
    return np.stack([rng.permutation(EXPERTS)[:per_token] for _ in range(tokens)])


CHOICES: dict[str, Callable[[np.random.Generator, int, int], Array]] = {
    "spread": spread,
    "one expert has all": lambda rng, tokens, k: np.stack([rng.permutation([2, 7, 8, -1])[:k]] * tokens),
    "some elsewhere": lambda rng, tokens, k: rng.integers(-2, EXPERTS + 3, (tokens, k)),
    "none here": lambda rng, tokens, k: np.full((tokens, k), -1),
    "the last": lambda rng, tokens, k: np.full((tokens, k), EXPERTS - 1),
}


@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize(("tokens", "per_token"), [(1, 1), (2, 3), (33, 2), (150, 4)])
def test_experts_equal_a_plain_loop(choice: str, tokens: int, per_token: int) -> None:
    """The loop of CPU and GPU, in blocks of several sizes, and TPU's grouped product (XLA's own here)."""
    rng = np.random.default_rng(tokens)
    x = rng.normal(0, 1, (tokens, WIDTH)).astype(np.float32)
    stacks = [
        rng.normal(0, 0.3, (LAYERS, EXPERTS, *shape)).astype(np.float32)
        for shape in ((INNER, WIDTH), (INNER, WIDTH), (WIDTH, INNER))
    ]
    chosen = CHOICES[choice](rng, tokens, per_token).astype(np.int32)
    scores = rng.uniform(0, 1, chosen.shape).astype(np.float32)
    want = by_hand(x, scores, chosen, [stack[1] for stack in stacks])
    for block in (8, 16, 128):
        run = jax.jit(functools.partial(moe.run_experts, block=block))
        np.testing.assert_allclose(run(x, scores, chosen, jnp.int32(1), *stacks), want, rtol=0, atol=1e-5)
    groups = moe.group(jnp.asarray(chosen), EXPERTS)
    flat = [stack.reshape(-1, *stack.shape[2:]) for stack in stacks]
    rows = moe._ragged(jnp.asarray(x), groups.token, groups.counts, jnp.int32(EXPERTS), *flat)
    here = ((chosen >= 0) & (chosen < EXPERTS))[:, :, None]
    picked = np.where(here, np.asarray(rows)[np.asarray(groups.place)], 0) * scores[:, :, None]
    np.testing.assert_allclose(picked.sum(axis=1), want, rtol=0, atol=1e-5)


def test_groups() -> None:
    """Pairs in the order of their experts, each expert's in the tokens' order; those of none here last."""
    chosen = np.array([[2, 0], [-1, 2], [0, 9]], np.int32)
    groups = moe.group(jnp.asarray(chosen), 3)
    assert np.asarray(groups.counts).tolist() == [2, 0, 2]
    assert np.asarray(groups.token)[:4].tolist() == [0, 2, 0, 1]
    assert np.asarray(groups.place)[chosen == 2].tolist() == [2, 3]
    assert np.asarray(groups.place)[chosen == 0].tolist() == [0, 1]
    assert sorted(np.asarray(groups.place).ravel().tolist()) == list(range(6))


def test_block_rows() -> None:
    """A block is no larger than what an expert gets on average, within bounds, and a power of two."""
    assert [moe.block_rows(*sizes) for sizes in ((32, 8), (256, 8), (1024, 8), (4096, 128), (2**16, 8))] == [
        8, 32, 128, 32, 128,
    ]  # fmt: skip
    for pairs in range(1, 3000, 7):
        for experts in (1, 8, 60, 128):
            block = moe.block_rows(pairs, experts)
            wasted = experts * (block - 1)  # at most, in the last block of each
            assert block & (block - 1) == 0 and wasted <= max(pairs, experts * (moe.MIN_BLOCK - 1))


# -- bits --------------------------------------------------------------------------------------------------


def sparse_mlp(config: dict[str, Any], dtype: Any) -> Callable[..., Array]:
    """layer(x, valid) of one random layer, on weights spread wide."""
    parsed = config_from_hf(config)
    graph, state = nnx.split(moe.SparseMLP(parsed, nnx.Rngs(0), jnp.dtype(dtype)))
    state = jax.tree.map(lambda leaf: leaf * 6, state)

    @jax.jit
    def layer(state: Any, x: jax.Array, valid: jax.Array) -> jax.Array:
        return nnx.merge(graph, state)(x, valid, jnp.int32(0))

    return lambda x, valid: np.asarray(layer(state, x, valid))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("config", [MIXTRAL, QWEN], ids=["mixtral", "qwen3_moe"])
@pytest.mark.parametrize("tokens", [8, 64, 256])
def test_a_token_does_not_depend_on_the_others(config: dict[str, Any], dtype: Any, tokens: int) -> None:
    """Its bits are the same among other tokens, elsewhere among the same, and with the rest absent."""
    layer = sparse_mlp(config, dtype)
    rng = np.random.default_rng(tokens)
    x = rng.normal(0, 1, (tokens, 64)).astype(dtype)
    everyone = np.ones(tokens, np.bool_)
    want = layer(x, everyone)
    assert np.isfinite(want.astype(np.float32)).all() and np.unique(want).size > tokens
    order = rng.permutation(tokens)
    np.testing.assert_array_equal(layer(x[order], everyone), want[order])
    for _ in range(3):
        kept = rng.uniform(0, 1, tokens) < 0.4
        others = np.where(kept[:, None], x, rng.normal(0, 3, x.shape).astype(dtype))
        np.testing.assert_array_equal(layer(others, everyone)[kept], want[kept])
        np.testing.assert_array_equal(layer(others, kept)[kept], want[kept])


def test_an_invalid_token_reaches_no_expert() -> None:
    """It may be NaN; it comes out 0, and nobody else notices."""
    layer = sparse_mlp(QWEN, jnp.float32)
    rng = np.random.default_rng(0)
    x = rng.normal(0, 1, (40, 64)).astype(np.float32)
    valid = np.arange(40) % 3 != 0
    want = layer(x, np.ones(40, np.bool_))
    x[~valid] = np.nan
    got = layer(x, valid)
    np.testing.assert_array_equal(got[valid], want[valid])
    assert not got[~valid].any()


# -- routing -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("normalise", [True, False])
def test_routing_is_transformers(normalise: bool) -> None:
    config = transformers.Qwen3MoeConfig(
        hidden_size=64, num_experts=16, num_experts_per_tok=5, norm_topk_prob=normalise
    )
    theirs = transformers.models.qwen3_moe.modeling_qwen3_moe.Qwen3MoeTopKRouter(config)
    rng = np.random.default_rng(0)
    matrix, x = (rng.normal(0, 0.5, shape).astype(np.float32) for shape in ((16, 64), (200, 64)))
    with torch.no_grad():
        theirs.weight.copy_(torch.from_numpy(matrix))
        _, scores, chosen = theirs(torch.from_numpy(x))
    changed = {"num_experts": 16, "num_experts_per_tok": 5, "norm_topk_prob": normalise}
    router = moe.Router(config_from_hf({**QWEN, **changed}), nnx.Rngs(0), jnp.dtype(jnp.float32))
    router.weight[...] = jnp.asarray(matrix)
    got, experts = router(jnp.asarray(x))
    np.testing.assert_array_equal(experts, chosen.numpy())
    np.testing.assert_allclose(got, scores.numpy(), rtol=1e-5)


# -- what is compiled --------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [MIXTRAL, QWEN], ids=["mixtral", "qwen3_moe"])
def test_what_the_compiled_step_computes(config: dict[str, Any], tmp_path: Path) -> None:
    """Products with an expert's weights are of one block and one expert, so a prefill's arithmetic follows
    its tokens, not the number of experts; the experts of a layer are never copied or cut out whole."""
    (tmp_path / "config.json").write_text(json.dumps(config))
    options = EngineOptions(
        load_format="dummy", dtype="float32", max_slots=4, kv_pages=128, page_size=16, prefill_chunk=256
    )
    plan = build.plan_engine(str(tmp_path), options, lambda line: None)
    parsed = plan.loaded.config
    inner, width, count = parsed.mlp_size, parsed.hidden_size, parsed.num_experts
    for kind in ("prefill", "decode"):
        bucket = plan.programs.buckets(kind)[-1]
        block = moe.block_rows(bucket * parsed.experts_per_token, count)
        assert kind == "decode" or block > moe.MIN_BLOCK
        text = plan.programs[kind, bucket].as_text()
        products = re.findall(r"= f32\[([\d,]+)\]\S* dot\([^\n]*/experts/", text)
        assert sorted(products) == sorted([f"{block},{inner}"] * 2 + [f"{block},{width}"])
        for layers in ("", "1,", f"{parsed.num_layers},"):
            for sizes in (f"{inner},{width}", f"{width},{inner}"):
                stack = rf"f32\[{layers}{count},{sizes}\]\S*"
                made = re.findall(rf"= {stack} (?!parameter|get-tuple-element|bitcast)([\w-]+)\(", text)
                assert not made, made


# -- loading -----------------------------------------------------------------------------------------------


def declared_tensors(config: ModelConfig) -> dict[str, Array]:
    """A random tensor for every key of the checkpoint."""
    rng = np.random.default_rng(0)
    model = Decoder(config, jnp.dtype(jnp.float32))
    return {
        target.key: rng.normal(0, 1, target.shape).astype(np.float32)
        for target in weights.checkpoint_targets(model)
    }


@pytest.fixture(params=[MIXTRAL, QWEN], ids=["mixtral", "qwen3_moe"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text(json.dumps(request.param))
    safetensors.numpy.save_file(
        declared_tensors(config_from_hf(request.param)), tmp_path / "model.safetensors"
    )
    return tmp_path


def published_key(family: str, layer: int, expert: int, name: str) -> str:
    if family == "mixtral":
        short = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}[name]
        return f"model.layers.{layer}.block_sparse_moe.experts.{expert}.{short}.weight"
    return f"model.layers.{layer}.mlp.experts.{expert}.{name}.weight"


@pytest.mark.parametrize("layout", ["scan", "unrolled"])
@pytest.mark.parametrize("mesh", ["", "expert=2,tensor=2"])
def test_each_expert_is_loaded_to_its_place(folder: Path, layout: Layout, mesh: str) -> None:
    loaded = build.read_model(str(folder), EngineOptions(dtype="float32"))
    model = Decoder(loaded.config, jnp.dtype(jnp.float32))
    params = load_params(model, open_weights(model, folder), make_mesh(parse_mesh(mesh)), layout)
    stored = safetensors.numpy.load_file(folder / "model.safetensors")
    for layer in range(loaded.config.num_layers):
        for name in ("gate_proj", "up_proj", "down_proj"):
            if layout == "scan":
                stack = np.asarray(params["layers"]["mlp"]["experts"][name])[layer]
            else:
                stack = np.asarray(params["layers"][layer]["mlp"]["experts"][name])
            for expert in range(loaded.config.num_experts):
                key = published_key(loaded.config.model_type, layer, expert, name)
                np.testing.assert_array_equal(stack[expert], stored[key])


def test_one_tensor_is_read_at_a_time(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No host array is larger than one expert's matrix while experts are put together."""
    loaded = build.read_model(str(folder), EngineOptions(dtype="float32"))
    model = Decoder(loaded.config, jnp.dtype(jnp.float32))
    read, stack = weights.huggingface.read_target, weights.np.stack
    keys: list[str] = []

    def noted(checkpoint: Any, target: Any, index: Any = None) -> Array:
        keys.append(target.key)
        return read(checkpoint, target, index)

    def no_experts(arrays: list[Array]) -> Array:
        assert not any("experts" in key for key in keys[-len(arrays) :])
        return stack(arrays)

    monkeypatch.setattr(weights.huggingface, "read_target", noted)
    monkeypatch.setattr(weights.np, "stack", no_experts)
    load_params(model, open_weights(model, folder), make_mesh(parse_mesh("")), "scan")
    experts = [key for key in keys if "experts" in key]
    assert len(experts) == len(set(experts)) == 3 * 3 * loaded.config.num_experts


@pytest.mark.parametrize("fault", ["absent", "misshaped", "spare"])
def test_a_wrong_expert_is_named(folder: Path, fault: str) -> None:
    loaded = build.read_model(str(folder), EngineOptions(dtype="float32"))
    family, count = loaded.config.model_type, loaded.config.num_experts
    key = published_key(family, 1, count if fault == "spare" else 2, "up_proj")
    stored = safetensors.numpy.load_file(folder / "model.safetensors")
    if fault == "absent":
        del stored[key]
    else:
        stored[key] = np.zeros((3, 4), np.float32)
    safetensors.numpy.save_file(stored, folder / "model.safetensors")
    model = Decoder(loaded.config, jnp.dtype(jnp.float32))
    with pytest.raises(CheckpointError, match=re.escape(key)):
        open_weights(model, folder)


@pytest.mark.parametrize("layout", ["scan", "unrolled"])
def test_dummy_weights(layout: Layout) -> None:
    """Of the declared shapes and spread, and no two experts alike."""
    model = Decoder(config_from_hf(QWEN), jnp.dtype(jnp.bfloat16))
    mesh = make_mesh(parse_mesh("expert=4,tensor=2"))
    params = dummy_params(model, mesh, layout, 0)
    abstract = abstract_params(model, mesh, layout)
    for leaf, spec in zip(jax.tree.leaves(params), jax.tree.leaves(abstract), strict=True):
        assert (leaf.shape, leaf.dtype, leaf.sharding) == (spec.shape, spec.dtype, spec.sharding)
    first = params["layers"] if layout == "scan" else params["layers"][0]
    stack = np.asarray(first["mlp"]["experts"]["up_proj"]).astype(np.float32)
    assert stack.std() == pytest.approx(0.02, rel=0.05)
    assert len(np.unique(stack.reshape(-1, 48 * 64)[:, :8], axis=0)) == stack.size // (48 * 64)


def test_stacks_that_lie_transposed() -> None:
    """As on TPU: the same array, in memory the other way round, put together in place on every device."""
    mesh = make_mesh(parse_mesh("expert=2,tensor=2"))
    values = np.random.default_rng(0).normal(0, 1, (3, 4, 6, 8)).astype(np.float32)
    sharding = named_sharding(mesh, ("layer", *moe.UP_AXES))
    place = Format(DeviceLayout(weights._transposed(4)), sharding)
    spec = jax.ShapeDtypeStruct(values.shape, values.dtype, sharding=place)
    stack = weights._streamed(spec, lambda at, index: values[at][index])
    np.testing.assert_array_equal(stack, values)
    assert stack.sharding == sharding
    assert stack.format.layout is not None and stack.format.layout.major_to_minor == (0, 1, 3, 2)


def test_bytes_on_each_device() -> None:
    """Counted before anything is loaded, and what is loaded takes just that."""
    model = Decoder(config_from_hf(MIXTRAL), jnp.dtype(jnp.float32))
    for text, share in (("", 1), ("expert=4", 4), ("expert=2,tensor=2", 4)):
        mesh = make_mesh(parse_mesh(text))
        experts = abstract_params(model, mesh, "scan")["layers"]["mlp"]["experts"]
        assert device_bytes(experts) == 3 * 4 * 3 * 96 * 64 * 4 // share
        params = dummy_params(model, mesh, "scan", 0)
        held = sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(params))
        assert held == device_bytes(abstract_params(model, mesh, "scan"))


# -- config.json -------------------------------------------------------------------------------------------

REFUSED: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    (QWEN, {"decoder_sparse_step": 2}, "decoder_sparse_step=2 is not supported; it must be 1"),
    (QWEN, {"mlp_only_layers": [0]}, r"mlp_only_layers=\[0\] is not supported"),
    (QWEN, {"norm_topk_prob": "yes"}, "norm_topk_prob='yes'"),
    (QWEN, {"moe_intermediate_size": 0}, "moe_intermediate_size=0"),
    (QWEN, {"num_experts_per_tok": 9}, "num_experts_per_tok=9 is more than the 8 experts"),
    (QWEN, {"num_experts": 0}, "num_experts=0"),
    (QWEN, {"num_local_experts": 4}, "num_local_experts=4 and num_experts=8 differ"),
    (QWEN, {"shared_expert_intermediate_size": 64}, "shared_expert_intermediate_size=64"),
    (QWEN, {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2}, "max_window_layers=2"),
    (QWEN, {"layer_types": ["full_attention"] * 3}, "layer_types="),
    (MIXTRAL, {"num_local_experts": "8"}, "num_local_experts='8'"),
    (MIXTRAL, {"num_experts_per_tok": 5}, "num_experts_per_tok=5 is more than the 4 experts"),
    (MIXTRAL, {"num_experts_per_tok": 0}, "num_experts_per_tok=0"),
    (MIXTRAL, {"sliding_window": 0}, "sliding_window=0"),
    (MIXTRAL, {"hidden_act": "gelu"}, "hidden_act='gelu'"),
    (MIXTRAL, {"norm_topk_prob": True}, "norm_topk_prob=True"),
    (MIXTRAL, {"quantization_config": {"quant_method": "awq"}}, "quantization_config="),
]


@pytest.mark.parametrize(("base", "changed", "message"), REFUSED, ids=lambda value: str(value)[:40])
def test_refused_by_name(base: dict[str, Any], changed: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config_from_hf({**base, **changed})


def test_defaults_are_transformers() -> None:
    for base, kind in ((MIXTRAL, transformers.MixtralConfig), (QWEN, transformers.Qwen3MoeConfig)):
        bare = {key: base[key] for key in base if not key.startswith(("num_local", "num_exp", "norm_"))}
        bare = {key: value for key, value in bare.items() if key not in ("num_key_value_heads", "head_dim")}
        bare["num_attention_heads"] = 32
        theirs = kind(**{key: value for key, value in bare.items() if key != "model_type"})
        ours = config_from_hf(bare)
        assert ours.num_kv_heads == theirs.num_key_value_heads
        assert ours.norm_eps == theirs.rms_norm_eps
        assert ours.rope.theta == theirs.rope_parameters["rope_theta"]
        assert (ours.num_experts, ours.experts_per_token) == (theirs.num_experts, theirs.num_experts_per_tok)
        assert ours.normalise_top_k == getattr(theirs, "norm_topk_prob", True)
        assert ours.windows == (theirs.sliding_window,) * 3 == (None,) * 3
    assert config_from_hf({**QWEN, "use_sliding_window": True}).windows == (4096,) * 3


def test_inert_keys_change_nothing() -> None:
    training = {"router_aux_loss_coef": 0.02, "output_router_logits": True}
    assert config_from_hf({**QWEN, **training, "decoder_sparse_step": 1, "mlp_only_layers": []}) == (
        config_from_hf(QWEN)
    )
    assert config_from_hf({**MIXTRAL, **training, "router_jitter_noise": 0.1}) == config_from_hf(MIXTRAL)
    assert config_from_hf({**MIXTRAL, "num_experts": 4}) == config_from_hf(MIXTRAL)


@pytest.mark.parametrize(
    ("config", "shape", "message"),
    [
        (MIXTRAL, MeshShape(expert=3), "expert=3 does not divide the model's num_experts=4"),
        (MIXTRAL, MeshShape(tensor=5), "tensor=5 does not divide the inner size of an expert, 96"),
        ({**SIZES, "model_type": "llama", "intermediate_size": 96}, MeshShape(expert=2, tensor=2),
         "expert=2: llama is a dense model .* use tensor=4"),
    ],
)  # fmt: skip
def test_meshes_that_do_not_fit(config: dict[str, Any], shape: MeshShape, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_mesh(config_from_hf(config), shape)
