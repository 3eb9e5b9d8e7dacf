"""What fits, which mesh is taken, what the report says: by arithmetic, with a stand-in for the compiler."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.experimental.layout import Format, Layout
from jax.sharding import NamedSharding, PartitionSpec

from benchmarks.plan_table import MODELS
from jaxserve import models
from jaxserve.build import FEWER
from jaxserve.engine.programs import Memory, device_bytes
from jaxserve.engine.state import StateShape, abstract_state
from jaxserve.models.decoder import Decoder
from jaxserve.plan import report as shown
from jaxserve.plan.chips import chips
from jaxserve.plan.choose import Candidate, candidate, full, meshes, point
from jaxserve.plan.compiled import Analysis, Compiled
from jaxserve.plan.examine import examine
from jaxserve.plan.options import PlanOptions
from jaxserve.plan.sizes import _laid_out, parameters, sizes
from jaxserve.weights import abstract_params, layout_for
from sharding import MeshShape, make_mesh
from sharding.topology import parse_slice
from tests import tiny

TEMPORARIES = 10**8


def analysis(chosen: Candidate, temporaries: int = TEMPORARIES) -> Analysis:
    """As if the compiler had laid everything out as counted."""
    programs = tuple(
        Compiled(
            kind=kind,
            bucket=bucket,
            memory=Memory(chosen.needed, chosen.needed, chosen.needed, temporaries),
            weights=chosen.sizes.weights,
            pool=chosen.pool_bytes,
            pages=chosen.pages,
            copies=0,
            kernel_calls=1,
            collectives={"all-reduce": 2},
            seconds=1.0,
        )
        for kind, bucket in (("decode", chosen.slots), ("prefill", 512))
    )
    return Analysis(programs, chosen.needed + temporaries, {"decode attention": "tpu"})


def made(
    name: str, where: str, temporaries: int = TEMPORARIES, avoid: Sequence[str] = (), **options: Any
) -> dict[str, Any]:
    return examine(
        MODELS[name],
        name,
        parse_slice(where),
        PlanOptions(**options),
        jax.devices(),
        compile=lambda model, chosen: analysis(chosen, temporaries),
        avoid=avoid,
    )


def never(model: Decoder, chosen: Candidate) -> Analysis:
    raise AssertionError("compiled what arithmetic refuses")


def decoder(config: dict[str, Any]) -> Decoder:
    read = models.config_from_hf(config)
    return Decoder(read, jnp.dtype(read.dtype))


# -- bytes ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", list(MODELS))
@pytest.mark.parametrize("shape", [MeshShape(), MeshShape(tensor=8), MeshShape(tensor=2, expert=2)], ids=str)
def test_sizes_are_those_of_the_engines_own_tree(name: str, shape: MeshShape) -> None:
    model = decoder(MODELS[name])
    if shape.expert > 1 and not model.config.num_experts:
        shape = MeshShape(tensor=4)
    mesh = make_mesh(shape, kv_heads=model.config.num_kv_heads)
    size = sizes(model, mesh, 64)
    assert size.weights == device_bytes(abstract_params(model, mesh, layout_for("cpu")))
    state = abstract_state(model.config, StateShape(7, 11, 64, 3), model.dtype, mesh)
    assert 7 * size.slot + 11 * size.page == device_bytes(state)
    assert 11 * size.page == device_bytes(state.pool)
    embedding = model.config.vocab_size * model.config.hidden_size * 2 // mesh.size
    part = size.part
    assert part.layers + part.head + part.experts + embedding == size.weights
    assert part.kv * model.config.num_layers * 64 == size.page


def test_a_tpus_tiles_are_filled_up() -> None:
    """By hand: experts of 96 columns, whose last two axes lie the other way round, take 128."""
    mesh = make_mesh(MeshShape(tensor=2))
    spec = NamedSharding(mesh, PartitionSpec(None, ("tensor", "tensor_copy"), None))
    transposed = Format(Layout((0, 2, 1)), spec)
    experts = jax.ShapeDtypeStruct((4, 192, 256), jnp.bfloat16, sharding=transposed)
    assert _laid_out(experts, "tpu") == 4 * 256 * 128 * 2
    assert _laid_out(experts, "gpu") == 4 * 256 * 96 * 2
    plain = jax.ShapeDtypeStruct((4, 192, 256), jnp.bfloat16, sharding=spec)
    assert _laid_out(plain, "tpu") == 4 * 96 * 256 * 2
    narrow = jax.ShapeDtypeStruct((20, 100), jnp.float32, sharding=NamedSharding(mesh, PartitionSpec()))
    assert _laid_out(narrow, "tpu") == 24 * 128 * 4 and _laid_out(narrow, "cpu") == 20 * 100 * 4


def test_published_sizes() -> None:
    """Parameters as the models' own pages say, to the digits that they give."""
    said = {"Llama-3.1-8B": 8.03, "Llama-3.1-70B": 70.55, "Mixtral-8x7B": 46.70, "Qwen3-30B-A3B": 30.53}
    assert {name: round(parameters(decoder(MODELS[name])) / 1e9, 2) for name in MODELS} == said


def test_tied_embeddings_are_read_as_the_head() -> None:
    model = decoder({**tiny.CONFIG, "tie_word_embeddings": True})
    part = sizes(model, make_mesh(MeshShape()), 16).part
    assert part.head == tiny.VOCAB * tiny.CONFIG["hidden_size"] * 4


# -- meshes --------------------------------------------------------------------------------------------------


def test_which_meshes_are_compared() -> None:
    dense = models.config_from_hf(MODELS["Llama-3.1-8B"])
    assert [str(one) for one in meshes(dense, 8, None)] == [
        "data=1,tensor=8,expert=1",
        "data=2,tensor=4,expert=1",
        "data=4,tensor=2,expert=1",
        "data=8,tensor=1,expert=1",
    ]
    sparse = models.config_from_hf(MODELS["Mixtral-8x7B"])
    found = meshes(sparse, 8, None)
    assert MeshShape(tensor=2, expert=4) in found and MeshShape(data=2, expert=4) in found
    assert all(one.devices == 8 for one in found)
    nine = models.config_from_hf({**tiny.CONFIG, "num_attention_heads": 1, "num_key_value_heads": 1})
    assert meshes(nine, 8, None) == [MeshShape(data=8)]  # nothing of it divides


def test_a_mesh_that_is_asked_for() -> None:
    config = models.config_from_hf(MODELS["Llama-3.1-8B"])
    assert meshes(config, 8, "data=2,tensor=4") == [MeshShape(data=2, tensor=4)]
    with pytest.raises(ValueError, match="is for 4 chips; the slice has 8"):
        meshes(config, 8, "tensor=4")
    with pytest.raises(ValueError, match="has no experts"):
        meshes(config, 8, "expert=8")
    assert made("Llama-3.1-8B", "v6e-8", mesh="tensor=8")["mesh"] == {"data": 1, "tensor": 8, "expert": 1}


def test_the_best_mesh_is_the_best_of_those_compared() -> None:
    for objective, key, pick in (("throughput", "with_prompts", max), ("latency", "token_alone", min)):
        report = made("Llama-3.1-8B", "v6e-8", objective=objective)
        fitting = {one["mesh"]: one[key] for one in report["meshes"] if one["fits"]}
        assert len(fitting) > 2
        assert shown.mesh_text(report["mesh"]) == pick(fitting, key=fitting.__getitem__)


def test_a_lone_sequence_wants_all_chips() -> None:
    assert made("Llama-3.1-8B", "v6e-8", objective="latency")["mesh"]["tensor"] == 8


# -- refusals ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("where", "fits"), [("v5e-8", False), ("h100-1", False), ("v6e-8", True), ("h100-8", True)]
)
def test_a_70b(where: str, fits: bool) -> None:
    """141 GB: 17.6 GB on each of 8. v5e has 15.75 GiB, and 0.9 of that may be used."""
    report = examine(
        MODELS["Llama-3.1-70B"], "70b", parse_slice(where), PlanOptions(), jax.devices(),
        compile=(lambda model, chosen: analysis(chosen)) if fits else never,
    )  # fmt: skip
    assert report["fits"] is fits
    if fits:
        assert report["missing_bytes"] == 0
        return
    limit = int(chips()[where.partition("-")[0]].usable() * 0.9)
    count = parse_slice(where).chips
    assert report["bytes"]["weights"] == pytest.approx(141.1e9 / count, rel=0.001)
    assert report["missing_bytes"] == report["bytes"]["weights"] - limit > 0
    assert f"{report['missing_bytes']} are missing" in report["reason"]
    text = shown.text(report)
    assert f"does not fit: {report['reason']}" in text
    assert ("XLA_CLIENT_MEM_FRACTION=0.95" in text) == (where == "h100-1")


def test_weights_fit_and_the_context_does_not() -> None:
    """Mixtral's weights leave 3.5 GB on each of 8 v5e: no room for a sequence of 32k on each of its pages."""
    report = made("Qwen3-30B-A3B", "v6e-1", max_model_len=40960)
    assert not report["fits"] and "bytes of each device and" in report["reason"]
    model = decoder(MODELS["Llama-3.1-8B"])
    limit = sizes(model, make_mesh(MeshShape()), 64).weights + 10**9
    options = PlanOptions(max_model_len=8192)  # 8192 tokens of 131,072 bytes: 1.07 GB
    found = candidate(model, MeshShape(), jax.devices(), limit, options)
    assert found.missing == 8192 * 131072 - 10**9 and not found.fits
    assert f"{found.missing} are missing" in str(found.reason)


def test_programs_may_leave_less_for_the_pool() -> None:
    """Beyond what is free already, temporaries are taken from the pool, and at last it does not fit."""
    roomy, tight = (made("Llama-3.1-8B", "h100-1", size) for size in (TEMPORARIES, 20 * 10**9))
    assert tight["fits"] and tight["pool"]["pages"] < roomy["pool"]["pages"]
    assert (
        tight["bytes"]["needed"]
        <= tight["bytes"]["limit"]
        < tight["bytes"]["needed"] + tight["bytes"]["page"]
    )
    none = made("Llama-3.1-8B", "h100-1", 60 * 10**9)
    assert not none["fits"] and none["missing_bytes"] > 0
    assert "weights, state, programs and 2048 tokens of KV cache" in none["reason"]


def test_what_the_compiler_itself_refuses() -> None:
    def refuse(model: Decoder, chosen: Candidate) -> Analysis:
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Ran out of memory on HBM\nmore")

    report = examine(MODELS["Llama-3.1-8B"], "8b", parse_slice("v5e-8"), PlanOptions(), jax.devices(), refuse)
    assert not report["fits"]
    assert report["reason"] == "the compiler: RESOURCE_EXHAUSTED: Ran out of memory on HBM"
    assert "does not fit" in shown.text(report)


def test_a_compiler_without_room_gets_a_smaller_pool() -> None:
    """As the engine does it, and the rows of the report agree with what was found in the end."""
    pages: list[int] = []

    def refuse_twice(model: Decoder, chosen: Candidate) -> Analysis:
        pages.append(chosen.pages)
        if len(pages) < 3:
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Ran out of memory on HBM\nmore")
        return analysis(chosen, 10**8)

    where = parse_slice("h100-1")
    report = examine(MODELS["Llama-3.1-8B"], "8b", where, PlanOptions(), jax.devices(), refuse_twice)
    assert report["fits"] and pages == [pages[0], int(pages[0] * FEWER), int(int(pages[0] * FEWER) * FEWER)]
    assert report["pool"]["pages"] <= pages[-1]
    (row,) = [one for one in report["meshes"] if one["mesh"] == shown.mesh_text(report["mesh"])]
    assert row["slots"] == report["slots"]["full"] == report["points"][-1]["slots"]
    assert report["slots"]["bound"] == "the pool"
    assert f"(serve --max-slots {report['slots']['of_a_replica']})" in shown.text(report)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_model_len": 200000}, "--max-model-len=200000 is beyond the model's context of 131072"),
        ({"input_tokens": 131072}, "--input-tokens=131072 and --output-tokens=1024 together are beyond"),
        ({"max_model_len": 1024}, "beyond the context of 1024 tokens"),
        ({"mesh": "tensor=3"}, "is for 3 chips"),
        ({"dtype": "float16"}, "--dtype=float16: the rate of v5e"),
    ],
)
def test_wrong_options_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match="--") as error:
        made("Llama-3.1-8B", "v5e-8", **options)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"price": 0.0}, "--price"),
        ({"input_tokens": 0}, "--input-tokens"),
        ({"page_size": 3}, "--page-size"),
        ({"max_slots": 0}, "--max-slots"),
        ({"mesh": "rows=2"}, "--mesh"),
        ({"memory_fraction": 2.0}, "--memory-fraction"),
    ],
)
def test_options_are_checked_when_they_are_made(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PlanOptions(**options)


# -- what the report says ------------------------------------------------------------------------------------


def test_slots_contexts_and_speeds() -> None:
    report = made("Llama-3.1-8B", "v5e-8", price=1.2, mesh="data=2,tensor=4")
    pool, most = report["pool"], report["slots"]["full"]
    assert pool["tokens"] == pool["pages"] * 64 * 2
    assert most == 2 * min(256, pool["pages"] // 32)  # 2,048 tokens are 32 pages
    by_slots = {one["slots"]: one["tokens"] for one in report["contexts"]}
    assert list(by_slots) == [1, 8, 64, most]
    assert by_slots[8] == pool["pages"] // 4 * 64 and by_slots[1] == 131072
    points = {one["slots"]: one for one in report["points"]}
    assert [slots for slots, one in points.items() if one["shown"]] == [1, 8, 64, most]
    assert 128 in points and list(points) == sorted(points)
    for slots, one in points.items():
        assert one["tokens_per_second"] == pytest.approx(slots / one["token"])
        assert one["with_prompts"] < one["tokens_per_second"]
        assert one["cost_per_million_output"] == pytest.approx(
            1.2 * 8 / 3600 / one["tokens_per_second"] * 1e6
        )
    assert points[1]["token"] < points[8]["token"] < points[64]["token"]
    assert points[1]["token"] == points[2]["token"]  # each replica has one
    assert points[2]["first_token"] == points[1]["first_token"] < points[4]["first_token"]
    assert report["prefill"]["bound"] == "arithmetic"
    json.dumps(report)


def test_with_prompts_by_hand() -> None:
    """All of a replica's requests: their prompts one after the other, then their tokens together."""
    model, options = decoder(MODELS["Llama-3.1-8B"]), PlanOptions(input_tokens=512, output_tokens=100)
    chip = chips()["h100"]
    found = candidate(model, MeshShape(), jax.devices(), int(chip.usable() * 0.9), options)
    slots = full(found, options)
    assert slots == min(256, found.pages // math.ceil(612 / 64))
    one, alone = point(found, chip, options, 4), point(found, chip, options, 1)
    assert one.with_prompts == pytest.approx(400 / (4 * alone.first_token + 100 * one.token))
    # beside three that draw, one chunk waits for one of their steps
    assert one.first_token == pytest.approx(alone.first_token + point(found, chip, options, 3).token)


def test_page_tables_of_all_rows_lie_in_a_tpus_scalar_memory() -> None:
    """960 KiB of tables, 2,048 pages a row: 120 rows."""

    class Tpu:
        platform, device_kind, num_cores = "tpu", "TPU v5", 1

    model, limit = decoder(MODELS["Llama-3.1-8B"]), 90 * 10**9
    found = candidate(model, MeshShape(), [Tpu()], limit, PlanOptions())  # type: ignore[list-item]
    assert found.max_model_len == 131072 and found.slots == 120
    assert "scalar memory" in found.slots_bound
    short = candidate(model, MeshShape(), [Tpu()], limit, PlanOptions(max_model_len=8192))  # type: ignore[list-item]
    assert short.slots == short.pages // 32 == 247  # 2,048 tokens are 32 pages


def test_the_text_holds_what_is_asked_for() -> None:
    report = made("Mixtral-8x7B", "h100-8", price=2.0)
    text = shown.text(report)
    assert text.splitlines()[0] == (
        "Mixtral-8x7B: mixtral of 46.70 B parameters in bfloat16, on h100-8 (8 chip(s), 8)"
    )
    for words in (
        "fits, with --mesh",
        "KV pool",
        "temporaries",
        "slots x longest context",
        "per 1M drawn",
        " *",
    ):
        assert words in text
    assert "bound by this command, without --max-slots" in text
    assert "per 1M" not in shown.text(made("Mixtral-8x7B", "h100-8"))


def test_the_plot(tmp_path: Path) -> None:
    for name, where in (("Llama-3.1-8B", "v5e-8"), ("Llama-3.1-70B", "v5e-8")):
        file = tmp_path / f"{name}.png"
        shown.plot(made(name, where), file)
        assert file.read_bytes()[:4] == b"\x89PNG"
