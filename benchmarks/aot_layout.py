"""The engine's programs compiled for chips that are not here, and what the compiler made of them.

`PROGRAMS` is what `python -m pallas_kernels.aot` checks, decode and prefill of Llama 3.1 8B's shape, and
`BYTES` what it counts with `--bytes`. Run by itself, this prints for any shape, per layout of the layers
(scan or unrolled): seconds to lower and to compile, bytes of arguments and temporaries on one device, whether
the pool is aliased from input to output, how many instructions write something as large as the pool, which
write a weight once more, and what the devices exchange.

    .venv-aot-tpu/bin/python benchmarks/aot_layout.py --chip v5e-8 --model 70b --slots 64 --pages 2048
    .venv-aot-cuda/bin/python benchmarks/aot_layout.py --chip h100-8 --model 70b

`make aot` builds the two environments.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from jaxserve import models
from jaxserve.build import compiler_options
from jaxserve.engine.buckets import decode_buckets, prefill_buckets, register_moves, register_programs
from jaxserve.engine.programs import Program, device_bytes
from jaxserve.engine.state import EngineState, StateShape
from jaxserve.engine.step import Steps
from jaxserve.models.decoder import Decoder, Layout
from jaxserve.models.meshes import check_mesh, choose_mesh
from jaxserve.weights import abstract_params, layout_for
from pallas_kernels import aot_compile, hlo, targets, traffic
from sharding import MeshShape, make_mesh, parse_mesh

KINDS = ("decode", "prefill", "mask_slots", "edit_slot", "copy_pages", "place_pages")
SLOTS, PAGE, POOL_PAGES, CHUNK = 64, 64, 2048, 512
LLAMA: dict[str, Any] = {
    "model_type": "llama", "num_key_value_heads": 8, "vocab_size": 128256, "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5, "rope_theta": 500000.0, "torch_dtype": "bfloat16",
}  # fmt: skip
MODELS: dict[str, dict[str, Any]] = {  # published shapes
    "8b": {
        **LLAMA, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
        "num_attention_heads": 32,
    },
    "70b": {
        **LLAMA, "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80,
        "num_attention_heads": 64,
    },
    "mixtral-8x7b": {
        "model_type": "mixtral", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, "num_local_experts": 8, "num_experts_per_tok": 2,
        "vocab_size": 32000, "max_position_embeddings": 32768, "rms_norm_eps": 1e-5, "rope_theta": 1e6,
        "torch_dtype": "bfloat16",
    },
    "qwen3-30b-a3b": {
        "model_type": "qwen3_moe", "hidden_size": 2048, "moe_intermediate_size": 768, "num_hidden_layers": 48,
        "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128, "num_experts": 128,
        "num_experts_per_tok": 8, "norm_topk_prob": True, "vocab_size": 151936,
        "max_position_embeddings": 40960, "rms_norm_eps": 1e-6, "rope_theta": 1e6, "torch_dtype": "bfloat16",
    },
}  # fmt: skip


def config(model: str, layers: int | None = None) -> dict[str, Any]:
    """layers: fewer than the model's, if given."""
    whole = MODELS[model]
    return {**whole, "num_hidden_layers": layers or whole["num_hidden_layers"]}


def engine_program(
    devices: list[jax.Device],
    model: str,
    kind: str,
    *,
    layout: Layout,
    slots: int = SLOTS,
    pages: int = POOL_PAGES,
    page_size: int = PAGE,
    context: int,
    layers: int | None = None,
    shape: MeshShape | None = None,
    most_steps: int = 1,
) -> tuple[Program, jax.sharding.Mesh]:
    """The largest program of a kind, its arguments abstract.

    layers: fewer than the model's, if given. shape: of the mesh; by default what the engine chooses.
    most_steps: tokens that one dispatch may draw.
    """
    decoder = Decoder(models.config_from_hf(config(model, layers)), jnp.bfloat16)
    shape = choose_mesh(decoder.config, len(devices)) if shape is None else shape
    check_mesh(decoder.config, shape)
    mesh = make_mesh(shape, devices, kv_heads=decoder.config.num_kv_heads)
    pages_per_slot = -(-context // page_size)
    steps, state = Steps(decoder, mesh, pages_per_slot), StateShape(slots, pages, page_size, pages_per_slot)
    programs = register_programs(
        steps,
        abstract_params(decoder, mesh, layout),
        state,
        prefill_buckets(CHUNK, slots),
        decode_buckets(slots),
        most_steps,
    )
    register_moves(programs, steps, state)
    return programs._registered[kind, programs.buckets(kind)[-1]], mesh


def lower(program: Program, mesh: jax.sharding.Mesh) -> jax.stages.Lowered:
    jitted = jax.jit(program.function, donate_argnums=program.donate, out_shardings=program.out_shardings)
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):  # Pallas asks it for the kind of GPU
        return jitted.lower(*program.arguments)


def _draws(conditional: hlo.Instruction) -> bool:
    """Whether it is the one that draws a token: the other outermost ones of sampling change logits."""
    return conditional.op_name.endswith("/sample/cond") and conditional.results[0].dtype == "s32"


# what slots ask for -> which of the decode step's conditionals take their costly arm
STEPS: dict[str, Callable[[hlo.Instruction], bool]] = {
    "greedy": lambda conditional: False,
    "temperature": _draws,
    "top-k and top-p": lambda one: _draws(one) or "/sample/cond/" in one.op_name,
    "every option": lambda conditional: True,
}
ALL_LAYERS = 32
MOST_MOVED, HELD = 1.15, ("v5e", "h100")  # times weights and cached keys and values; on these chips


# -- what pallas_kernels.aot checks ------------------------------------------------------------------------


def checked(
    chip: str,
    devices: int,
    kind: str,
    context: int,
    layers: int = ALL_LAYERS,
    *,
    reproducible: bool = False,
    most_steps: int = 1,
) -> aot_compile.Program:
    """A program of the 8B's shape. v5e: one of 8 chips, since 16 GB of weights do not fit on one."""

    def lower_for(found: list[jax.Device]) -> jax.stages.Lowered:
        shape: dict[str, Any] = {"context": context, "layers": layers, "most_steps": most_steps}
        return lower(*engine_program(found, "8b", kind, layout=layout, **shape))

    platform = "gpu" if targets.TARGETS[chip].card else "tpu"
    layout = layout_for(platform)
    c = models.config_from_hf(config("8b"))
    hidden, mlp, heads, kv_heads, head = c.hidden_size, c.mlp_size, c.num_heads, c.num_kv_heads, c.head_dim
    local_kv = 2 * kv_heads * head // devices

    def weight(*shape: int) -> jax.ShapeDtypeStruct:
        """Of one layer, what lies on one device; in a scan all layers are one array."""
        return jax.ShapeDtypeStruct((layers, *shape) if layout == "scan" else shape, jnp.bfloat16)

    layer = [
        weight(heads * head // devices, hidden),
        weight(kv_heads * head // devices, hidden),
        weight(kv_heads * head // devices, hidden),
        weight(hidden, heads * head // devices),
        weight(mlp // devices, hidden),
        weight(mlp // devices, hidden),
        weight(hidden, mlp // devices),
    ]
    in_all = [*layer, jax.ShapeDtypeStruct((c.vocab_size // devices, hidden), jnp.bfloat16)]  # and the head
    weight_bytes = sum(w.size * 2 * (layers if w in layer and layout != "scan" else 1) for w in in_all)
    ideal, moved = {}, {}
    if kind == "decode" and most_steps == 1:
        ideal = {context: weight_bytes + layers * SLOTS * context * local_kv * 2}
        lengths = [context] * SLOTS
        count = functools.partial(traffic.decode_bytes, targets.TARGETS[chip].kernels, lengths, 2**30)
        moved = {context: count(page=PAGE, width=local_kv, itemsize=2)}
    what = f"{kind} {SLOTS if kind == 'decode' else CHUNK} x {context}, {layers} layers"
    return aot_compile.Program(
        name=f"llama-3.1-8b {what}"
        + (f", {most_steps} tokens at a time" if most_steps > 1 else "")
        + (", reproducible" if reproducible else ""),
        chip=chip,
        devices=devices,
        kernel=f"{kind}_attention",
        lower=lower_for,
        pool=jax.ShapeDtypeStruct((layers, POOL_PAGES, PAGE, local_kv), jnp.bfloat16),
        weights=in_all,
        ideal=ideal,
        traffic=moved,
        options=compiler_options(platform, reproducible=reproducible),
        costly=STEPS,
        limit=("temperature", MOST_MOVED) if ideal and layers == ALL_LAYERS and chip in HELD else None,
    )


# Unrolled, every layer is compiled by itself: where bytes are not counted a few of them show what there is to
# see. Several tokens to a dispatch are a loop, whose count nobody knows.
PROGRAMS = [
    checked("v5e", 8, "decode", 1024),
    checked("v5e", 8, "decode", 32768),
    checked("v5e", 8, "prefill", 32768),
    checked("v5p", 8, "decode", 1024),
    checked("v6e", 8, "decode", 1024),
    checked("v6e", 8, "decode", 1024, most_steps=4),
    checked("h100", 1, "decode", 1024),
    checked("h100", 1, "decode", 32768, 4),
    checked("h100", 1, "prefill", 32768, 4),
    checked("h100", 1, "decode", 1024, 4, reproducible=True, most_steps=4),
    checked("h100", 1, "prefill", 1024, 4, reproducible=True),
]
BYTES = [
    checked(chip, devices, "decode", context)
    for chip, devices in (("v5e", 8), ("h100", 1))
    for context in (1024, 32768)
]


# -- any shape ---------------------------------------------------------------------------------------------


def exchanges(module: hlo.Module, layers: int, elements: int) -> dict[str, Any]:
    """What devices send each other in a step: sums of the residual stream, of so many elements, and of the
    rest the largest."""
    found = [(one, times) for one, times in module.collectives()]
    stream = [
        (one, times)
        for one, times in found
        if one.opcode == "all-reduce" and [shape.elements for shape in one.results] == [elements]
    ]
    others = [(sum(shape.elements for shape in one.results), one) for one, _ in found]
    others = [(size, one) for size, one in others if one not in [each for each, _ in stream]]
    size, largest = max(others, key=lambda pair: pair[0], default=(0, None))
    return {
        "all_reduces_per_layer": (sum(times for _, times in stream) - 1) / layers,  # but the embedding's
        "all_reduce_dtypes": sorted({shape.dtype for one, _ in stream for shape in one.results}),
        "asynchronous": sum(one.starts for one, _ in stream),
        "largest_other": [largest.opcode, size] if largest is not None else None,
    }


def remade(module: hlo.Module, params: Any) -> list[str]:
    """Weights, or one layer of stacked ones, that are written to memory once more."""
    local = [
        jax.ShapeDtypeStruct(leaf.sharding.shard_shape(leaf.shape), leaf.dtype)
        for leaf in jax.tree.leaves(params)
    ]
    return aot_compile.remade_weights(module, local)


def weights_and_exchanges(module: hlo.Module, program: Program, config: dict[str, Any]) -> dict[str, Any]:
    elements = program.bucket * config["hidden_size"]
    return {
        "remade_weights": remade(module, program.arguments[0]),
        **exchanges(module, config["num_hidden_layers"], elements),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--chip", default="v5e-8")
    parser.add_argument("--model", default="70b", choices=MODELS)
    parser.add_argument("--mesh", help="as of jaxserve serve; chosen for the model if left out")
    parser.add_argument("--layers", type=int, help="fewer than the model's")
    parser.add_argument("--hlo", type=Path, help="the compiled program's text is written there")
    parser.add_argument("--option", action="append", default=[], help="NAME=VALUE, one of XLA's")
    parser.add_argument("--slots", type=int, default=64)
    parser.add_argument("--pages", type=int, default=2048)
    parser.add_argument("--page-size", type=int, default=64)
    parser.add_argument("--context", type=int, default=2048)
    parser.add_argument("--kind", default="decode", choices=KINDS)
    parser.add_argument("--layouts", default="scan,unrolled")
    args = parser.parse_args()
    pairs = (each.split("=", 1) for each in args.option)
    options = {name: {"true": True, "false": False}.get(value, value) for name, value in pairs}
    name, _, count = args.chip.partition("-")
    chips = targets.devices(name, int(count or 1))
    c = config(args.model, args.layers)
    for layout in args.layouts.split(","):
        start = time.perf_counter()
        program, mesh = engine_program(
            chips,
            args.model,
            args.kind,
            layout=layout,
            slots=args.slots,
            pages=args.pages,
            page_size=args.page_size,
            context=args.context,
            layers=args.layers,
            shape=parse_mesh(args.mesh) if args.mesh else None,
        )
        lowered = lower(program, mesh)
        lowered_at, busy = time.perf_counter(), time.process_time()
        compiled = lowered.compile(compiler_options=options or None)
        seconds, busy = time.perf_counter() - lowered_at, time.process_time() - busy
        memory = compiled.memory_analysis()
        text = compiled.as_text()
        if args.hlo:
            args.hlo.write_text(text)
        module = hlo.Module(text)
        (pool,) = (one.pool for one in program.arguments if isinstance(one, EngineState))
        local = pool.sharding.shard_shape(pool.shape)
        copies = aot_compile.pool_copies(module, local)
        taken_over = [module.arguments[argument] for argument in module.aliases.values()]
        row = {
            "chip": args.chip,
            "program": f"{args.kind} {program.bucket}",
            "model": args.model,
            "mesh": {axis: size for axis, size in mesh.shape.items() if size > 1},
            "layers": c["num_hidden_layers"],
            "layout": layout,
            "lower_s": round(lowered_at - start, 2),
            "compile_s": round(seconds, 2),
            "compile_processor_s": round(busy, 2),  # which other work on the machine hardly changes
            "argument_bytes": memory.argument_size_in_bytes,
            "temporary_bytes": memory.temp_size_in_bytes,
            "pool_bytes": device_bytes(pool),
            "pool_aliased": math.prod(local) in [shape.elements for shape in taken_over],
            "kernel_calls": len(module.kernel_calls()),
            "copies_as_large_as_the_pool": len(copies),
            **(weights_and_exchanges(module, program, c) if args.kind in ("decode", "prefill") else {}),
            "options": args.option,
            "jax": jax.__version__,
        }
        print(json.dumps(row), flush=True)
        for line in copies[:3]:
            print("  ", line, file=sys.stderr)


if __name__ == "__main__":
    main()
