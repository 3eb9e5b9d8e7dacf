"""Start-up: what is refused and how, what fits, how weights get to their places."""

from __future__ import annotations

import dataclasses
import json
import os
import re
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

from checkpoints.huggingface import CheckpointError
from jaxserve import build
from jaxserve.config import EngineOptions
from jaxserve.engine.programs import Programs, device_bytes
from jaxserve.models.config import ConfigError
from jaxserve.scheduler.types import SamplingParams, check_request
from jaxserve.weights import load_params, open_weights
from tests import tiny

SMALL = EngineOptions(max_slots=2, page_size=16, prefill_chunk=32, memory_fraction=0.5)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.write_model(tmp_path_factory.mktemp("models") / "tiny")


def options(**changes) -> EngineOptions:
    return dataclasses.replace(SMALL, **changes)


def greedy(engine, prompt, tokens=12) -> list[int]:
    out: list[int] = []
    params = SamplingParams(temperature=0.0, max_tokens=tokens)
    request = check_request("r", prompt, params, engine.limits, 0.0)
    engine.submit((request, lambda o: out.extend(o.token_ids)))
    while engine.step():
        pass
    return out


def test_two_devices_answer_as_one(folder):
    one = build.build_engine(str(folder), SMALL)
    two = build.build_engine(str(folder), options(mesh="data=1,tensor=2,expert=1"))
    assert one._runner._state.pool.sharding.num_devices == 1
    shards = {shard.data.shape[-1] for shard in two._runner._state.pool.addressable_shards}
    assert len(two._runner._state.pool.addressable_shards) == 2 and shards == {
        one._runner._state.pool.shape[-1] // 2
    }
    for prompt in ([1], list(range(40)), [5] * 70):
        assert greedy(one, prompt) == greedy(two, prompt)


def test_dry_run_names_programs_pool_and_what_fits(folder):
    text = build.dry_run(str(folder), SMALL)
    for word in ("prefill 32", "decode 2", "prompt_logprobs 32", "edit_slot 1", "fits"):
        assert word in text
    pool = re.search(r"pool: (\d+) pages of 16 tokens = (\d+) tokens", text)
    assert pool and int(pool[1]) == 2 * 256 // 16 and int(pool[2]) == 2 * 256


def test_dummy_weights_need_no_checkpoint(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(tiny.CONFIG))
    engine = build.build_engine(str(tmp_path), options(load_format="dummy", seed=3))
    assert len(greedy(engine, [1, 2, 3])) == 12
    again = build.build_engine(str(tmp_path), options(load_format="dummy", seed=3))
    other = build.build_engine(str(tmp_path), options(load_format="dummy", seed=4))
    assert greedy(engine, [4]) == greedy(again, [4]) != greedy(other, [4])


@pytest.mark.parametrize("stored", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("layout", ["scan", "unrolled"])
def test_weights_arrive_in_every_dtype_and_layout(tmp_path, stored, layout):
    import ml_dtypes

    dtype = {"bfloat16": ml_dtypes.bfloat16, "float16": np.float16, "float32": np.float32}[stored]
    (tmp_path / "config.json").write_text(json.dumps(tiny.CONFIG | {"torch_dtype": stored}))
    values = {key: array.astype(dtype) for key, array in tiny.tensors(tiny.CONFIG).items()}
    save_file(values, tmp_path / "model.safetensors")
    loaded = build.read_model(str(tmp_path), options(dtype="auto"))
    assert loaded.dtype == np.dtype(dtype)
    decoder = build.Decoder(loaded.config, loaded.dtype)
    mesh = build.make_mesh(build.parse_mesh("tensor=2"))
    params = load_params(decoder, open_weights(decoder, loaded.folder), mesh, layout)
    layer = params["layers"]
    got = layer["mlp"]["up_proj"]["weight"][1] if layout == "scan" else layer[1]["mlp"]["up_proj"]["weight"]
    np.testing.assert_array_equal(np.asarray(got), values["model.layers.1.mlp.up_proj.weight"])
    assert all(leaf.dtype == np.dtype(dtype) for leaf in jax.tree.leaves(params))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kv_pages": 10**12}, r"--kv-pages=1000000000000 needs .* bytes .* may be used"),
        (
            {"memory_fraction": 1e-9},
            r"one sequence of --max-model-len needs 16 pages of \d+ bytes .*--max-model-len",
        ),
        ({"max_model_len": 257}, r"--max-model-len=257 is beyond the model's context of 256"),
        ({"mesh": "tensor=3"}, r"--mesh tensor=3 does not divide .*intermediate_size=128; .* 1, 2, 4$"),
        ({"mesh": "tensor=64"}, r"does not divide|there are \d+"),
        ({"mesh": "data=2"}, r"one engine is one replica"),
        ({"mesh": "rows=2"}, r"'rows' is not an axis"),
    ],
)
def test_what_does_not_fit_is_refused_by_flag_and_bytes(folder, changes, message):
    with pytest.raises(ValueError, match=message):
        build.plan_engine(str(folder), options(**changes), lambda line: None)


def test_an_unknown_architecture_is_refused(tmp_path):
    tiny.write_model(tmp_path, model_type="mamba")
    with pytest.raises(
        ConfigError,
        match=r"model_type='mamba' is not supported.*llama, mistral, mixtral, qwen2, qwen3, qwen3",
    ):
        build.build_engine(str(tmp_path), SMALL)


def test_corrupt_folders_are_refused_by_name(tmp_path):
    with pytest.raises(ValueError, match="nowhere"):
        build.build_engine(str(tmp_path / "nowhere"), SMALL)
    with pytest.raises(CheckpointError, match=r"config\.json"):
        build.build_engine(str(tmp_path), SMALL)
    tiny.write_model(tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        build.build_engine(str(tmp_path), SMALL)
    values = tiny.tensors(tiny.CONFIG)
    values["model.layers.7.mlp.up_proj.weight"] = values.pop("model.layers.1.mlp.up_proj.weight")
    save_file(values, weights)
    with pytest.raises(CheckpointError, match=r"model\.layers\.[17]\.mlp\.up_proj\.weight"):
        build.build_engine(str(tmp_path), SMALL)


def test_an_unwritable_compilation_cache_is_a_warning(tmp_path, monkeypatch):
    blocked = tmp_path / "file"
    blocked.write_text("")
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(blocked / "cache"))
    lines: list[str] = []
    try:
        build.enable_compilation_cache(lines.append)
        assert not jax.config.jax_enable_compilation_cache  # or JAX warns of every program
    finally:
        jax.config.update("jax_enable_compilation_cache", True)
    assert len(lines) == 1 and "warning: no compilation cache" in lines[0] and os.fspath(blocked) in lines[0]


def test_the_pool_takes_what_memory_leaves(folder, monkeypatch):
    """Less memory, fewer pages: sized from the programs' own analysis, and within the limit."""
    roomy = build.plan_engine(str(folder), SMALL, lambda line: None)
    assert roomy.shape.num_pages == 32  # two slots of 256 tokens: more could never be used
    limit = roomy.programs.needed() - 10 * roomy.page_bytes
    monkeypatch.setattr(build, "memory_limit", lambda *_: limit)
    tight = build.plan_engine(str(folder), SMALL, lambda line: None)
    assert 16 <= tight.shape.num_pages < roomy.shape.num_pages
    tight.programs.compile(tight.programs.largest())
    assert tight.programs.needed() <= limit


def test_every_program_counts_beside_weights_and_pool(folder):
    """A program that takes neither pool nor state runs while they lie there."""
    plan = build.plan_engine(str(folder), SMALL, lambda line: None)
    programs = plan.programs
    key = ("prompt_logprobs", programs.buckets("prompt_logprobs")[-1])
    params, state, _ = programs._registered["decode", programs.buckets("decode")[-1]].arguments
    memory = programs.memory(key)
    own = memory.peak - device_bytes(params)
    assert memory.peak < device_bytes(params) + device_bytes(state) + own <= programs.needed()


def test_what_does_not_fit_is_said_by_dry_run_too(folder, monkeypatch):
    plan = build.plan_engine(str(folder), SMALL, lambda line: None)
    limit = plan.programs.needed() - 17 * plan.page_bytes  # less than one sequence's pages are left
    monkeypatch.setattr(build, "memory_limit", lambda *_: limit)
    with pytest.raises(ValueError, match=rf"{limit} bytes may be used\. Lower --max-model-len"):
        build.dry_run(str(folder), SMALL)


def test_a_broken_folder_is_found_before_anything_is_compiled(tmp_path):
    tiny.write_model(tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    lines: list[str] = []
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        build.dry_run(str(tmp_path), SMALL, lines.append)
    assert not any("compiled" in line for line in lines)


def test_generation_config_gives_the_sampling_defaults(tmp_path):
    assert build.sampling_defaults(tmp_path) == {}
    file = tmp_path / "generation_config.json"
    file.write_text(json.dumps({"temperature": 0.6, "top_p": 0.9, "top_k": None, "eos_token_id": 2}))
    assert build.sampling_defaults(tmp_path) == {"temperature": 0.6, "top_p": 0.9}
    file.write_text(json.dumps({"top_p": 7}))
    with pytest.raises(ValueError, match=r"generation_config\.json: top_p=7"):
        build.sampling_defaults(tmp_path)


def test_a_pool_smaller_than_one_sequence_is_refused(folder):
    with pytest.raises(ValueError, match=r"--kv-pages=3 .* hold 48 tokens, less than .*--max-model-len=256"):
        build.plan_engine(str(folder), options(kv_pages=3), lambda line: None)


def test_the_fingerprint_of_answers(tmp_path: Path) -> None:
    """What changes an answer changes it; what does not, does not."""
    folder = tiny.write_model(tmp_path / "model")
    (folder / "tokenizer.json").write_text("{}")
    options = EngineOptions()
    before = build.fingerprint(folder, options, "float32")
    for same in ({"max_queued": 5}, {"response_cache": 9}, {"step_timeout": 1.0}, {"kv_pages": 99}):
        assert build.fingerprint(folder, dataclasses.replace(options, **same), "float32") == before
    changed = [build.fingerprint(folder, options, "bfloat16")]
    for other in ({"page_size": 128}, {"reproducible": True}, {"prefill_chunk": 64}, {"max_slots": 4}):
        changed.append(build.fingerprint(folder, dataclasses.replace(options, **other), "float32"))
    (folder / "generation_config.json").write_text("{}")  # what it says is in the requests
    assert build.fingerprint(folder, options, "float32") == before
    for name in ("tokenizer.json", "tokenizer_config.json", "config.json", "model.safetensors"):
        with (folder / name).open("ab") as file:
            file.write(b" ")
        changed.append(build.fingerprint(folder, options, "float32"))
    assert len({before, *changed}) == 1 + len(changed)


def test_on_a_gpu_reproducible_means_that_nothing_is_timed() -> None:
    chosen = build.compiler_options("gpu", reproducible=True)
    assert chosen == {
        "xla_gpu_deterministic_ops": True,
        "xla_gpu_autotune_level": 0,
        "xla_gpu_enable_triton_gemm": False,
    }
    for platform, reproducible in (("gpu", False), ("cpu", True), ("tpu", True)):
        assert build.compiler_options(platform, reproducible=reproducible) == {}


def test_a_compiler_without_room_gets_fewer_pages(folder, monkeypatch):
    real, refused = Programs.compile, []

    def compile(self, *args, **kwargs):
        if len(refused) < 2:
            refused.append(self)
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Ran out of memory on HBM")
        real(self, *args, **kwargs)

    monkeypatch.setattr(Programs, "compile", compile)
    lines = []
    plan = build.plan_engine(str(folder), options(max_slots=4), lines.append)
    first = 4 * 256 // 16
    assert plan.shape.num_pages == int(int(first * build.FEWER) * build.FEWER)
    assert [line for line in lines if "finds no room beside 64 pages; with 54 now" in line]
    refused.clear()
    with pytest.raises(jax.errors.JaxRuntimeError, match="RESOURCE_EXHAUSTED"):  # as many as were asked for
        build.plan_engine(str(folder), options(kv_pages=64), lines.append)
