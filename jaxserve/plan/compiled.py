"""The largest decode and prefill of a mesh, compiled, and what their memory analysis says."""

from __future__ import annotations

import collections
import dataclasses
import time
from collections.abc import Callable, Sequence

import jax

from jaxserve.build import compiler_options, multi_step
from jaxserve.engine.buckets import decode_buckets, prefill_buckets, register_programs
from jaxserve.engine.programs import Memory
from jaxserve.engine.state import StateShape
from jaxserve.engine.step import Steps
from jaxserve.models.decoder import Decoder
from jaxserve.plan.choose import Candidate
from jaxserve.plan.options import PlanOptions
from jaxserve.weights import abstract_params, layout_for
from pallas_kernels import hlo
from sharding import MeshShape, make_mesh

KINDS = ("decode", "prefill")


@dataclasses.dataclass(frozen=True, slots=True)
class Compiled:
    """One program; bytes on one device.

    weights, pool: of these arguments, as the compiler lays them out. pages: of that pool. copies:
    instructions that write something as large as the pool. collectives: kind -> how many run in a step,
    with every optional part of sampling. seconds: to trace, lower and compile.
    """

    kind: str
    bucket: int
    memory: Memory
    weights: int
    pool: int
    pages: int
    copies: int
    kernel_calls: int
    collectives: dict[str, int]
    seconds: float


@dataclasses.dataclass(frozen=True, slots=True)
class Analysis:
    """needed: what both programs, weights and state take together on one device."""

    programs: tuple[Compiled, ...]
    needed: int
    kernels: dict[str, str]


def compile_for(
    model: Decoder,
    chosen: Candidate,
    devices: Sequence[jax.Device],
    options: PlanOptions,
    progress: Callable[[str], None] = lambda line: None,
) -> Analysis:
    """As the engine would compile them for one replica. Raises whatever the compiler or a kernel raises."""
    engine = options.engine()
    shape = MeshShape(tensor=chosen.mesh.tensor, expert=chosen.mesh.expert)
    mesh = make_mesh(shape, devices, kv_heads=model.config.num_kv_heads)
    platform = mesh.devices.flat[0].platform
    steps = Steps(model, mesh, chosen.pages_per_slot)
    params = abstract_params(model, mesh, layout_for(platform))
    prefill_rows = prefill_buckets(engine.chunk_tokens, chosen.slots)
    programs = register_programs(
        steps,
        params,
        StateShape(chosen.slots, chosen.pages, chosen.page_size, chosen.pages_per_slot),
        prefill_rows,
        decode_buckets(chosen.slots),
        multi_step(engine),
    )
    programs.compiler_options = compiler_options(platform, reproducible=False)
    weights = len(jax.tree.leaves(params))
    results = []
    for kind in KINDS:
        key = kind, programs.buckets(kind)[-1]
        start = time.perf_counter()
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):  # Pallas asks it for the kind of GPU
            programs.compile([key], progress=progress)
        seconds = time.perf_counter() - start
        module = hlo.Module(str(programs[key].as_text()))
        arguments = module.arguments
        pool = arguments[weights]  # the state's first array
        copies = module.whole_writes(lambda shape, size=pool.elements: shape.elements == size)  # type: ignore[misc]
        results.append(
            Compiled(
                kind=kind,
                bucket=key[1],
                memory=programs.memory(key),
                weights=sum(argument.bytes for argument in arguments[:weights]),
                pool=pool.bytes,
                pages=chosen.pages,
                copies=len(copies),
                kernel_calls=len(module.kernel_calls()),
                collectives=_collectives(module),
                seconds=seconds,
            )
        )
    kernels = steps.kernels(chosen.page_size, chosen.slots, max(prefill_rows.values()))
    return Analysis(tuple(results), programs.needed(), kernels)


def _collectives(module: hlo.Module) -> dict[str, int]:
    counts: collections.Counter[str] = collections.Counter()
    for one, times in module.collectives():
        counts[one.opcode] += times
    return dict(counts)
