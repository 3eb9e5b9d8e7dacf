"""The registry of compiled programs, the buckets, and what the compiled steps do with the pool."""

from __future__ import annotations

import dataclasses
import json
import operator
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxserve import build
from jaxserve.config import EngineOptions
from jaxserve.engine import batch
from jaxserve.engine.buckets import (
    MAX_PREFILL_ROWS,
    decode_buckets,
    mask_buckets,
    prefill_buckets,
    register_programs,
)
from jaxserve.engine.programs import Program, Programs, bucket_for
from jaxserve.engine.step import LOGPROB_CHUNK
from jaxserve.models.decoder import Layout
from jaxserve.scheduler.types import DecodeRows
from jaxserve.weights import abstract_params, dummy_params
from pallas_kernels.prefill_attention.reference import QUERY_BLOCK

CONFIG = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 320,
    "max_position_embeddings": 256,
}
MAX_STEPS = 4
OPTIONS = EngineOptions(
    load_format="dummy", dtype="float32", max_slots=4, kv_pages=300, page_size=16, prefill_chunk=64
)


# -- the registry ------------------------------------------------------------------------------------------


def double(kind: str, bucket: int) -> Program:
    return Program(kind, bucket, lambda x: x * 2, (jax.ShapeDtypeStruct((bucket,), jnp.int32),), donate=(0,))


def test_register_compile_call() -> None:
    programs = Programs()
    for program in (double("b", 8), double("a", 4), double("a", 16), double("a", 2)):
        programs.register(program)
    assert programs.keys() == [("b", 8), ("a", 4), ("a", 16), ("a", 2)]
    assert programs.buckets("a") == [2, 4, 16] and programs.buckets("none") == []
    lines: list[str] = []
    programs.compile([("a", 2)], progress=lines.append)
    programs.compile(threads=2, progress=lines.append)
    programs.compile(threads=2, progress=lines.append)  # nothing is left
    assert len(lines) == 4
    assert re.fullmatch(r"compiled program 1 of 4: a 2 in \d+\.\d s", lines[0])
    assert lines[-1].startswith("compiled program 4 of 4: ")
    given = jnp.arange(4, dtype=jnp.int32)
    assert programs["a", 4](given).tolist() == [0, 2, 4, 6]
    assert given.is_deleted()
    with pytest.raises(TypeError, match="compiled with"):  # another shape is an error, not a compilation
        programs["a", 4](jnp.arange(5, dtype=jnp.int32))


def test_registering_a_key_twice_is_an_error() -> None:
    programs = Programs()
    programs.register(double("a", 4))
    with pytest.raises(ValueError, match=r"\('a', 4\) is registered twice"):
        programs.register(double("a", 4))


def test_a_program_that_was_not_compiled_is_an_error() -> None:
    programs = Programs()
    programs.register(double("a", 4))
    for key in (("a", 4), ("a", 5), ("b", 4)):
        with pytest.raises(KeyError, match=r"was not compiled at start-up; there are \[\('a', 4\)\]"):
            programs[key]


def test_a_program_that_does_not_compile_raises() -> None:
    programs = Programs()
    programs.register(Program("bad", 1, lambda x: x.reshape(7), (jax.ShapeDtypeStruct((4,), jnp.int32),)))
    with pytest.raises(TypeError, match="reshape"):
        programs.compile(threads=2)


def test_memory_counts_what_is_donated_once() -> None:
    programs = Programs()
    programs.register(double("donated", 1024))
    programs.register(dataclasses.replace(double("kept", 1024), donate=()))
    programs.compile()
    donated, kept = programs.memory(("donated", 1024)), programs.memory(("kept", 1024))
    assert (donated.arguments, donated.outputs, donated.aliased) == (4096, 4096, 4096)
    assert kept.aliased == 0 and kept.peak - donated.peak == 4096


# -- buckets -----------------------------------------------------------------------------------------------


def test_bucket_for() -> None:
    assert [bucket_for([2, 8, 32], size) for size in (0, 1, 2, 3, 8, 9, 32)] == [2, 2, 2, 8, 8, 32, 32]
    with pytest.raises(ValueError, match="33 is beyond the largest bucket 32"):
        bucket_for([2, 8, 32], 33)


SLOTS = [*range(1, 130), 255, 256, 257, 1000, 4095, 4096]


def test_decode_buckets() -> None:
    """Every number of running sequences fits; few programs; never one row alone."""
    for slots in SLOTS:
        buckets = decode_buckets(slots)
        assert buckets == sorted(set(buckets))
        assert buckets[0] == 2 and buckets[-1] == max(slots, 2)
        assert len(buckets) <= 12
        for count in range(1, slots + 1):
            assert count <= bucket_for(buckets, count) <= max(2 * count + 1, 16)


def test_prefill_buckets() -> None:
    """Every plan within the chunk fits; whole query blocks; whole pieces for the prompt's logprobs."""
    for chunk in [*range(16, 300), 511, 512, 513, 1000, 2048, 5000, 65535, 65536]:
        for slots in (1, 2, 16, 300):
            buckets = prefill_buckets(chunk, slots)
            sizes = list(buckets)
            assert sizes == sorted(set(sizes))
            assert chunk <= sizes[-1] < chunk + QUERY_BLOCK
            assert len(sizes) <= 8 and sizes[0] <= 32
            for tokens, rows in buckets.items():
                assert tokens <= QUERY_BLOCK or tokens % QUERY_BLOCK == 0
                assert tokens <= LOGPROB_CHUNK or tokens % LOGPROB_CHUNK == 0
                assert 2 <= rows <= max(2, min(MAX_PREFILL_ROWS, slots))
            assert list(buckets.values()) == sorted(buckets.values())


# -- the compiled steps ------------------------------------------------------------------------------------


@dataclasses.dataclass
class Compiled:
    plan: build.Plan
    programs: Programs  # of one layout, the largest prefill and decode compiled

    @property
    def pool(self) -> str:
        """As a compiled program writes its shape."""
        shape = self.plan.shape
        return f"f32[3,{shape.num_pages},{shape.page_size},64]"

    @property
    def pool_bytes(self) -> int:
        return self.plan.page_bytes * self.plan.shape.num_pages

    def key(self, kind: str) -> tuple[str, int]:
        return kind, self.programs.buckets(kind)[-1]


@pytest.fixture(scope="module", params=["scan", "unrolled"])
def compiled(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Compiled:
    folder = tmp_path_factory.mktemp("model")
    (folder / "config.json").write_text(json.dumps(CONFIG))
    plan = build.plan_engine(str(folder), OPTIONS, lambda line: None)
    layout: Layout = request.param
    if layout == plan.layout:
        plan.programs.compile(step_keys(plan.programs))
        return Compiled(plan, plan.programs)
    programs = register_programs(
        plan.steps,
        abstract_params(plan.model, plan.mesh, layout),
        plan.shape,
        plan.prefill_rows,
        decode_buckets(plan.shape.max_slots),
        MAX_STEPS,
    )
    programs.compile(step_keys(programs))
    return Compiled(plan, programs)


def step_keys(programs: Programs) -> list[tuple[str, int]]:
    return [(kind, bucket) for kind in ("prefill", "decode") for bucket in programs.buckets(kind)]


def entry(text: str) -> tuple[list[str], list[str], dict[int, int]]:
    """(shapes of the arguments, shapes of the outputs, output -> the argument whose buffer it takes over)."""
    head = text.splitlines()[0]
    layout = head.split("entry_computation_layout={", 1)[1]
    arguments, outputs = (re.findall(r"\w+\[[\d,]*\]", part) for part in layout.split("->", 1))
    aliases = head.split("input_output_alias={", 1)[1].split("entry_computation_layout", 1)[0]
    pairs = re.findall(r"\{(\d+)\}: \((\d+), \{\}, (?:may|must)-alias\)", aliases)
    return arguments, outputs, {int(out): int(argument) for out, argument in pairs}


def test_the_pool_is_updated_in_place(compiled: Compiled) -> None:
    """In every bucket: the pool comes out in the buffer that it came in, and is copied nowhere between.

    The smallest are the ones to watch: a scatter of a single row becomes an update that copies its operand.
    """
    flat = f"f32[{3 * compiled.plan.shape.num_pages},{compiled.plan.shape.page_size},64]"
    for key in step_keys(compiled.programs):
        text = compiled.programs[key].as_text()
        arguments, outputs, aliases = entry(text)
        assert arguments.count(compiled.pool) == outputs.count(compiled.pool) == 1
        assert aliases[outputs.index(compiled.pool)] == arguments.index(compiled.pool)
        for shape in (compiled.pool, flat):
            copies = rf"= \(?{re.escape(shape)}\S* (copy|copy-start|transpose|concatenate)\("
            assert not re.search(copies, text), key
        assert compiled.programs.memory(key).temporary < compiled.pool_bytes / 4, key


@pytest.mark.parametrize("kind", ["decode", "prefill"])
def test_the_whole_state_is_updated_in_place(compiled: Compiled, kind: str) -> None:
    _, outputs, aliases = entry(compiled.programs[compiled.key(kind)].as_text())
    fields = 9  # of EngineState, which comes first
    assert set(range(fields)) <= set(aliases) and len(set(aliases.values())) == len(aliases)
    assert len(outputs) == fields + (1 if kind == "decode" else 2)


def test_the_pool_of_a_step_is_given_away(compiled: Compiled) -> None:
    """The old state's arrays are gone after a step, and the new pool lies where the old one lay."""
    plan = compiled.plan
    abstract = build.abstract_state(plan.loaded.config, plan.shape, plan.loaded.dtype, plan.mesh)
    state = build.new_state(abstract)
    params = dummy_params(plan.model, plan.mesh, plan.layout, 0)
    if compiled.programs is not plan.programs:
        layers = [jax.tree.map(operator.itemgetter(i), params["layers"]) for i in range(3)]
        params = {"ends": params["ends"], "layers": tuple(layers)}
    place = state.pool.unsafe_buffer_pointer()
    one = DecodeRows(
        slots=np.array([0], np.int32),
        positions=np.array([0], np.int32),
        tables=np.full((1, plan.shape.pages_per_slot), -1, np.int32),
    )
    one.tables[0, 0] = 7
    rows = batch.pack_decode(one, bucket=4)
    new, _ = compiled.programs[compiled.key("decode")](params, state, rows)
    assert state.pool.is_deleted() and state.counts.is_deleted()
    assert new.pool.unsafe_buffer_pointer() == place
    written = np.flatnonzero(np.asarray(new.pool).any(axis=(0, 2, 3)))
    assert written.tolist() == [7]


def test_every_kind_is_registered(compiled: Compiled) -> None:
    programs, prefill = compiled.programs, list(compiled.plan.prefill_rows)
    assert programs.buckets("decode") == decode_buckets(OPTIONS.max_slots)
    assert programs.buckets("prefill") == programs.buckets("prompt_logprobs") == prefill
    assert programs.buckets("embed") == prefill
    assert programs.buckets("edit_slot") == [1]
    assert programs.buckets("mask_slots") == mask_buckets(OPTIONS.max_slots)
    kinds = {kind for kind, _ in programs.keys()}
    assert kinds == {"decode", "prefill", "prompt_logprobs", "embed", "edit_slot", "mask_slots"}
    assert compiled.plan.shape.pages_per_slot == 16
