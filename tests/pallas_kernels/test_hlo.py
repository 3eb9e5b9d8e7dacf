"""The counter of bytes on programs whose answer is known: written by hand, and compiled here for the CPU."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import hlo

KB = 1024


def moved(text: str, **options: Any) -> int:
    return hlo.total(hlo.Module(text).bytes_moved(**options))


def program(body: str, *, before: str = "", header: str = "HloModule test, is_scheduled=true") -> str:
    return f"{header}\n\n{before}\nENTRY %main (a: f32[8]) -> f32[8] {{\n{body}\n}}\n"


# -- shapes ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("f32[]", 4),
        ("f32[8,16]{1,0}", 512),
        ("bf16[8,16]{0,1}", 256),
        ("pred[10]{0}", 10),
        ("s4[10]{0}", 5),
        ("f8e4m3fn[10]{0}", 10),
        ("c64[3]{0}", 24),
        ("token[]", 0),
        ("f32[0,5]{1,0}", 0),
        ("bf16[64,4096]{1,0:T(8,128)(2,1)}", 64 * 4096 * 2),
        ("f32[60,1]{1,0:T(8,128)}", 64 * 128 * 4),  # padded to whole tiles
        ("f32[1,60]{0,1:T(8,128)}", 64 * 128 * 4),
        ("f32[3,100]{1,0:T(128)}", 3 * 128 * 4),
        ("s32[]{:T(128)}", 4),
        ("bf16[64,4096]{1,0:T(8,128)(2,1)S(1)}", 0),  # in VMEM
    ],
)
def test_bytes_of_a_shape(text: str, size: int) -> None:
    line = program(f"  ROOT %a = {text} parameter(0)")
    [shape] = hlo.Module(line).arguments
    assert shape.bytes == size


def test_arguments_outputs_and_aliases() -> None:
    text = program(
        "  %a = f32[8]{0} parameter(1)\n"
        "  %b = (s32[], /*index=1*/f32[2,2]{1,0}) parameter(0)\n"
        "  ROOT %t = (f32[8]{0}, (s32[], f32[2,2]{1,0})) tuple(%a, %b)",
        header="HloModule test, input_output_alias={ {0}: (2, {}, may-alias), {2}: (1, {}, must-alias) }, "
        "entry_computation_layout={(s32[])->s32[]}",
    )
    module = hlo.Module(text)
    assert [shape.dims for shape in module.arguments] == [(), (2, 2), (8,)]
    assert [shape.dims for shape in module.outputs] == [(8,), (), (2, 2)]
    assert module.aliases == {0: 2, 2: 1}


def test_what_is_not_a_program() -> None:
    with pytest.raises(ValueError, match="no entry computation"):
        hlo.Module("not a program")


# -- written by hand ---------------------------------------------------------------------------------------


A = "  %a = f32[256]{0} parameter(0)\n"
COPY = "  %c = f32[256]{0} copy(%a)\n"


def test_operands_and_outputs() -> None:
    assert moved(program(A + "  ROOT %n = f32[256]{0} negate(%a)")) == 2 * KB
    assert moved(program(A + "  ROOT %n = f32[256]{0} add(%a, %a)")) == 3 * KB


def test_what_hands_on_is_free() -> None:
    body = A + (
        "  %t = (f32[256]{0}, f32[256]{0}) tuple(%a, %a)\n"
        "  %g = f32[256]{0} get-tuple-element(%t), index=1\n"
        "  ROOT %b = f32[16,16]{1,0} bitcast(%g)"
    )
    assert moved(program(body)) == 0


def test_an_asynchronous_copy_counts_once() -> None:
    to_vmem = A + (
        "  %s = (f32[256]{0:T(256)S(1)}, f32[256]{0}, u32[]{:S(2)}) copy-start(%a)\n"
        "  ROOT %d = f32[256]{0:T(256)S(1)} copy-done(%s)"
    )
    assert moved(program(to_vmem)) == KB  # read; what is written lies in VMEM
    sliced = A + (
        "  %s = ((f32[256]{0}), f32[64]{0}, s32[]) slice-start(%a), slice={[0:64]}\n"
        "  ROOT %d = f32[64]{0} slice-done(%s)"
    )
    assert moved(program(sliced)) == 512


def test_a_collective_counts_what_this_device_moves() -> None:
    body = A + (
        "  %s = (f32[256]{0}, f32[2048]{0}) all-gather-start(%a), dimensions={0}\n"
        "  ROOT %d = f32[2048]{0} all-gather-done(%s)"
    )
    assert moved(program(body)) == 9 * KB


def test_slices_count_what_they_take() -> None:
    body = A + (
        "  %i = s32[] parameter(1)\n  ROOT %d = f32[64]{0} dynamic-slice(%a, %i), dynamic_slice_sizes={64}"
    )
    assert moved(program(body)) == 512 + 4


def test_an_update_in_place_counts_what_it_changes() -> None:
    body = A + (
        "  %u = f32[64]{0} parameter(1)\n  %i = s32[] parameter(2)\n"
        "  ROOT %d = f32[256]{0} dynamic-update-slice(%a, %u, %i)"
    )
    assert moved(program(body)) == 512 + 4


ASSIGN = (
    "%put (x: f32[], y: f32[]) -> f32[] {\n  %x = f32[] parameter(0)\n  ROOT %y = f32[] parameter(1)\n}\n"
)
ADD = (
    "%sum (x: f32[], y: f32[]) -> f32[] {\n  %x = f32[] parameter(0)\n  %y = f32[] parameter(1)\n"
    "  ROOT %s = f32[] add(%x, %y)\n}\n"
)


@pytest.mark.parametrize(("how", "name", "rows"), [(ASSIGN, "put", 2), (ADD, "sum", 3)])
def test_a_scatter_counts_what_it_changes(how: str, name: str, rows: int) -> None:
    """Updates read and written; what was there is read too where it is added to."""
    body = (
        "  %a = f32[100,64]{1,0} parameter(0)\n  %i = s32[3,1]{1,0} parameter(1)\n"
        "  %u = f32[3,64]{1,0} parameter(2)\n"
        f"  ROOT %s = f32[100,64]{{1,0}} scatter(%a, %i, %u), update_window_dims={{1}}, to_apply=%{name}"
    )
    assert moved(program(body, before=how)) == rows * 3 * 64 * 4 + 12


def test_a_fusion_counts_what_it_takes_and_changes() -> None:
    before = (
        "%fused (p: f32[8,256], i: s32[], q: f32[256]) -> (f32[8,256], f32[256]) {\n"
        "  %p = f32[8,256]{1,0} parameter(0)\n  %i = s32[] parameter(1)\n  %q = f32[256]{0} parameter(2)\n"
        "  %zero = s32[] constant(0)\n"
        "  %slice = f32[1,256]{1,0} dynamic-slice(%p, %i, %zero), dynamic_slice_sizes={1,256}\n"
        "  %row = f32[256]{0} bitcast(%slice)\n  %new = f32[256]{0} add(%row, %q)\n"
        "  %one = f32[1,256]{1,0} bitcast(%new)\n"
        "  %put = f32[8,256]{1,0} dynamic-update-slice(%p, %one, %i, %zero)\n"
        "  ROOT %t = (f32[8,256]{1,0}, f32[256]{0}) tuple(%put, %new)\n}\n"
    )
    body = (
        "  %p = f32[8,256]{1,0} parameter(0)\n  %i = s32[] parameter(1)\n  %q = f32[256]{0} parameter(2)\n"
        "  ROOT %f = (f32[8,256]{1,0}, f32[256]{0}) fusion(%p, %i, %q), kind=kLoop, calls=%fused"
    )
    assert moved(program(body, before=before)) == 4 * KB + 4  # row, q; row, new
    whole = before.replace("dynamic-update-slice(%p,", "dynamic-update-slice(%twice,").replace(
        "  %put", "  %twice = f32[8,256]{1,0} add(%p, %p)\n  %put"
    )
    assert moved(program(body, before=whole)) == 8 * KB + KB + 8 * KB + KB + 4  # nothing is in place


def test_a_fusion_in_a_fusion() -> None:
    before = (
        "%inner (p: f32[8,256], i: s32[]) -> f32[256] {\n  %p = f32[8,256]{1,0} parameter(0)\n"
        "  %i = s32[] parameter(1)\n  %z = s32[] constant(0)\n"
        "  %s = f32[1,256]{1,0} dynamic-slice(%p, %i, %z), dynamic_slice_sizes={1,256}\n"
        "  ROOT %b = f32[256]{0} bitcast(%s)\n}\n"
        "%outer (p: f32[8,256], i: s32[]) -> f32[256] {\n  %p = f32[8,256]{1,0} parameter(0)\n"
        "  %i = s32[] parameter(1)\n  %f = f32[256]{0} fusion(%p, %i), kind=kLoop, calls=%inner\n"
        "  ROOT %n = f32[256]{0} negate(%f)\n}\n"
    )
    body = (
        "  %p = f32[8,256]{1,0} parameter(0)\n  %i = s32[] parameter(1)\n"
        "  ROOT %f = f32[256]{0} fusion(%p, %i), kind=kLoop, calls=%outer"
    )
    assert moved(program(body, before=before)) == 2 * KB + 4


LOOP = """
%body (t: (s32[], f32[256])) -> (s32[], f32[256]) {
  %t = (s32[], f32[256]{0}) parameter(0)
  %i = s32[] get-tuple-element(%t), index=0
  %x = f32[256]{0} get-tuple-element(%t), index=1
  %one = s32[] constant(1)
  %next = s32[] add(%i, %one)
  %y = f32[256]{0} negate(%x)
  ROOT %r = (s32[], f32[256]{0}) tuple(%next, %y)
}
%condition (t: (s32[], f32[256])) -> pred[] {
  %t = (s32[], f32[256]{0}) parameter(0)
  %i = s32[] get-tuple-element(%t), index=0
  %n = s32[] constant(7)
  ROOT %less = pred[] compare(%i, %n), direction=LT
}
"""
BEGIN = (
    A + "  %zero = s32[] constant(2)\n  %c = s32[] copy(%zero)\n  %t = (s32[], f32[256]{0}) tuple(%c, %a)\n"
)
WHILE = "  ROOT %w = (s32[], f32[256]{0}) while(%t), condition=%condition, body=%body"
ROUND = 2 * KB + 3 * 4 + 4 + 4 + 1  # negate, add, compare


def test_a_loop_counts_its_trips() -> None:
    """Known to the compiler; counted from the constants of its condition; or told."""
    begin = 8  # the counter's copy
    known = WHILE + ', backend_config={"known_trip_count":{"n":"32"}}'
    assert moved(program(BEGIN + known, before=LOOP)) == 32 * ROUND + begin
    assert moved(program(BEGIN + WHILE, before=LOOP)) == 5 * ROUND + begin
    dynamic = BEGIN.replace("constant(2)", "parameter(1)")
    with pytest.raises(ValueError, match=r"how often does the loop w \(\) run"):
        moved(program(dynamic + WHILE, before=LOOP))
    assert moved(program(dynamic + WHILE, before=LOOP), trips=lambda loop: 3) == 3 * ROUND + begin


def test_one_branch_is_taken() -> None:
    before = (
        "%dear (x: f32[256]) -> f32[256] {\n  %x = f32[256]{0} parameter(0)\n"
        "  ROOT %n = f32[256]{0} negate(%x)\n}\n"
        "%free (x: f32[256]) -> f32[256] {\n  ROOT %x = f32[256]{0} parameter(0)\n}\n"
    )
    body = A + (
        "  %p = pred[] parameter(1)\n"
        "  ROOT %c = f32[256]{0} conditional(%p, %a, %a), true_computation=%dear, false_computation=%free"
    )
    assert moved(program(body, before=before)) == 2 * KB
    assert moved(program(body, before=before), costly=lambda one: False) == 0
    indexed = body.replace(
        "true_computation=%dear, false_computation=%free", "branch_computations={%free, %dear}"
    )
    assert moved(program(indexed, before=before)) == 2 * KB


KERNEL = A + (
    "  %p = f32[100,256]{1,0} parameter(1)\n"
    "  ROOT %k = (f32[256]{0}, f32[100,256]{1,0}) custom-call(%a, %p), "
    'custom_call_target="tpu_custom_call", output_to_operand_aliasing={{1}: (1, {})}, '
    'metadata={op_name="jit(f)/decode_attention/pallas_call"}, '
    'backend_config={"custom_call_config": {"cost_estimate": {"bytes_accessed": 7}}}'
)


def test_a_kernel_is_counted_by_who_knows_it() -> None:
    assert moved(program(KERNEL), kernel=lambda call: 5 * KB) == 5 * KB
    assert moved(program(KERNEL)) == KB + 100 * KB + KB  # its pool is read whole, and taken over
    [call] = hlo.Module(program(KERNEL)).kernel_calls()
    assert call.op_name == "jit(f)/decode_attention/pallas_call" and call.aliased_outputs == {1}


def test_scratch_memory_of_a_library_does_not_count() -> None:
    body = A + (
        "  ROOT %m = (f32[256]{0}, s8[33554432]{0}) custom-call(%a, %a), "
        'custom_call_target="__cublas$gemm", backend_config={}'
    )
    assert moved(program(body)) == 3 * KB


def test_whole_writes() -> None:
    def names(body: str, before: str = "") -> list[str]:
        module = hlo.Module(program(body, before=before))
        return [one.name for one, _ in module.whole_writes(lambda shape: shape.elements == 25600)]

    pool = "  %p = f32[100,256]{1,0} parameter(0)\n  %i = s32[] constant(0)\n"
    assert names(pool + "  ROOT %c = f32[100,256]{1,0} copy(%p)") == ["c"]
    assert names(pool + "  ROOT %t = f32[256,100]{0,1} transpose(%p), dimensions={1,0}") == ["t"]
    assert names(pool + "  ROOT %t = bf16[25600]{0} convert(%p)") == ["t"]
    assert names(pool + "  ROOT %t = f32[100,256]{1,0:S(1)} copy(%p)") == []
    update = (
        "  %u = f32[1,256]{1,0} parameter(1)\n  ROOT %d = f32[100,256] dynamic-update-slice(%p, %u, %i, %i)"
    )
    assert names(pool + update) == []
    # as many updates as there are rows: a scatter may leave any of them where it was, a whole slice none
    rows = "  %u = f32[100,256]{1,0} parameter(1)\n"
    put = (
        "%put (x: f32[], y: f32[]) -> f32[] {\n  %x = f32[] parameter(0)\n  ROOT %y = f32[] parameter(1)\n}\n"
    )
    scatter = rows + (
        "  %at = s32[100,1]{1,0} parameter(2)\n"
        "  ROOT %s = f32[100,256]{1,0} scatter(%p, %at, %u), update_window_dims={1}, to_apply=%put"
    )
    assert names(pool + scatter, before=put) == []
    whole = rows + "  ROOT %d = f32[100,256]{1,0} dynamic-update-slice(%p, %u, %i, %i)"
    assert names(pool + whole) == ["d"]
    assert names(KERNEL) == []
    inside = "%fused (p: f32[100,256]) -> f32[] {\n  %p = f32[100,256]{1,0} parameter(0)\n  %c = f32[100,256]{1,0} copy(%p)\n  ROOT %r = f32[] reduce(%c)\n}\n"  # noqa: E501
    assert names(pool + "  ROOT %f = f32[] fusion(%p), kind=kLoop, calls=%fused", before=inside) == []


WEIGHT = "  %w = bf16[64,256]{1,0} parameter(0)\n"


@pytest.mark.parametrize(
    ("body", "names"),
    [
        ("  ROOT %c = f32[64,256]{1,0} convert(%w)", ["c"]),
        ("  ROOT %t = bf16[256,64]{1,0} transpose(%w), dimensions={1,0}", ["t"]),
        ("  %b = bf16[64,256]{1,0} bitcast(%w)\n  ROOT %c = bf16[64,256]{0,1} copy(%b)", ["c"]),
        (
            "  %t = (s32[], bf16[64,256]{1,0}) tuple(%i, %w)\n"
            "  %o = bf16[64,256]{1,0} get-tuple-element(%t), index=1\n  ROOT %c = f32[64,256] convert(%o)",
            ["c"],
        ),
        ("  ROOT %c = bf16[64,256]{1,0:S(1)} copy(%w)", []),  # fetched, not written
        ("  %x = bf16[64,256]{1,0} parameter(1)\n  ROOT %c = f32[64,256]{1,0} convert(%x)", ["c"]),
        ("  %x = s8[64,256]{1,0} parameter(1)\n  ROOT %c = f32[64,256]{1,0} convert(%x)", []),
        ("  %x = s8[64,64]{1,0} parameter(1)\n  ROOT %d = f32[64,256]{1,0} dot(%x, %w)", []),
    ],
)
def test_remade_arguments(body: str, names: list[str]) -> None:
    """Written once more: wider, turned, or as it was; a product with it is no such thing."""
    module = hlo.Module(program(WEIGHT + "  %i = s32[] parameter(2)\n" + body))
    found = module.remade(lambda shape: shape.dtype == "bf16", lambda shape: shape.elements == 64 * 256)
    assert [one.name for one, _ in found] == names


def test_remade_in_a_loop() -> None:
    """A layer cut out of stacked weights in each round."""
    before = """
%body (t: (s32[], bf16[8,64,256])) -> (s32[], bf16[8,64,256]) {
  %t = (s32[], bf16[8,64,256]{2,1,0}) parameter(0)
  %i = s32[] get-tuple-element(%t), index=0
  %w = bf16[8,64,256]{2,1,0} get-tuple-element(%t), index=1
  %cut = bf16[1,64,256]{2,1,0} dynamic-slice(%w, %i, %i, %i), dynamic_slice_sizes={1,64,256}
  ROOT %r = (s32[], bf16[8,64,256]{2,1,0}) tuple(%i, %w)
}
%condition (t: (s32[], bf16[8,64,256])) -> pred[] {
  %t = (s32[], bf16[8,64,256]{2,1,0}) parameter(0)
  ROOT %p = pred[] constant(true)
}
"""
    body = (
        "  %w = bf16[8,64,256]{2,1,0} parameter(0)\n  %i = s32[] parameter(1)\n"
        "  %t = (s32[], bf16[8,64,256]{2,1,0}) tuple(%i, %w)\n"
        "  ROOT %l = (s32[], bf16[8,64,256]{2,1,0}) while(%t), condition=%condition, body=%body"
    )
    module = hlo.Module(program(body, before=before))
    found = module.remade(lambda shape: len(shape.dims) == 3, lambda shape: shape.elements == 64 * 256)
    assert [one.name for one, _ in found] == ["cut"]


# -- compiled ----------------------------------------------------------------------------------------------


def compiled(function: Callable[..., Any], *arguments: Any, **options: Any) -> hlo.Module:
    return hlo.Module(jax.jit(function, **options).lower(*arguments).compile().as_text())


def abstract(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def test_a_compiled_sum() -> None:
    assert hlo.total(compiled(lambda x, y: x * y + 1.0, abstract(256), abstract(256)).bytes_moved()) == 3 * KB


def test_a_compiled_loop_over_stacked_weights() -> None:
    """The weights once, whatever the loop is made of; nothing near weights times trips."""

    def f(x: jax.Array, weights: jax.Array) -> jax.Array:
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, weights)[0]

    rows = compiled(f, abstract(2, 128), abstract(8, 128, 128)).bytes_moved()
    weights = 8 * 128 * 128 * 4
    assert weights < hlo.total(rows) < 4 * weights  # the CPU's products read a copied slice
    assert {row.times for row in rows} >= {8}


def test_a_donated_pool_is_updated_in_place() -> None:
    def write(pool: jax.Array, rows: jax.Array, at: jax.Array) -> jax.Array:
        return pool.at[at].set(rows)

    pool, rows, at = abstract(1000, 64), abstract(3, 64), jax.ShapeDtypeStruct((3,), jnp.int32)
    given = compiled(write, pool, rows, at, donate_argnums=0)
    assert given.aliases == {0: 0}
    assert not given.whole_writes(lambda shape: shape.elements == 64000)
    assert hlo.total(given.bytes_moved(trips=lambda loop: 3)) < 10 * KB
    kept = compiled(write, pool, rows, at)
    assert kept.aliases == {}
    assert kept.whole_writes(lambda shape: shape.elements == 64000)
    assert hlo.total(kept.bytes_moved(trips=lambda loop: 3)) > 2 * 64000 * 4


@pytest.mark.parametrize("trips", [1, 5])
def test_a_compiled_loop_whose_count_is_data(trips: int) -> None:
    module = compiled(
        lambda x, n: jax.lax.fori_loop(0, n, lambda i, x: jnp.sin(x), x),
        abstract(256),
        jax.ShapeDtypeStruct((), jnp.int32),
    )
    with pytest.raises(ValueError, match="how often"):
        module.bytes_moved()
    count = functools.partial(module.bytes_moved, trips=lambda loop: trips)
    assert trips * 2 * KB <= hlo.total(count()) < trips * 2 * KB + 3 * KB
