"""What `pallas_kernels.aot` runs in an environment that holds a chip's compiler: one chip, row after row.

    python -m pallas_kernels.aot_compile v5e [--kernel NAME] [--programs FILE [--bytes]] [--skip N]

Prints, behind "row ", a JSON object for each row: once as it begins and once as it ends. Whoever reads them
knows at which row the compiler ended the process, and goes on behind it with --skip.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import importlib.util
import json
import re
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import decode_attention, hlo, prefill_attention
from pallas_kernels.chips import chip_of
from pallas_kernels.decode_attention import cases as decode_cases
from pallas_kernels.decode_attention import mosaic_gpu as decode_mosaic_gpu
from pallas_kernels.decode_attention import tpu as decode_tpu
from pallas_kernels.prefill_attention import cases as prefill_cases
from pallas_kernels.prefill_attention import mosaic_gpu as prefill_mosaic_gpu
from pallas_kernels.prefill_attention import tpu as prefill_tpu
from pallas_kernels.targets import TARGETS, devices

COPIED = "copies the pool"  # begins what a compiled row says where XLA lays it out otherwise than the kernel
ROW = "row "  # stands before each row on the output


@dataclasses.dataclass(frozen=True)
class ModelShape:
    """Attention of a model's one layer. rows: sequences of `length` cached positions. tokens: of a prefill,
    all rows together; 0 is a decode."""

    name: str
    heads: tuple[int, int]  # (key/value heads, queries to each)
    head_size: int
    rows: int
    length: int
    tokens: int = 0
    page: int = 64

    def __str__(self) -> str:
        what = f"prefill {self.tokens}" if self.tokens else f"decode {self.rows}"
        return f"{self.name} {what} x {self.length}"

    def shapes(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """As a case's."""
        kv_heads, group = self.heads
        width = 2 * kv_heads * self.head_size
        pages_per_row = -(-self.length // self.page)

        def array(*shape: int, dtype: Any = jnp.int32) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct(shape, dtype)

        tokens = self.tokens or self.rows
        counts = 3 if self.tokens else 1  # starts, counts and offsets, or lengths
        arguments = (
            array(tokens, kv_heads * group, self.head_size, dtype=jnp.bfloat16),
            array(tokens, width, dtype=jnp.bfloat16),
            array(1, self.rows * pages_per_row, self.page, width, dtype=jnp.bfloat16),
            array(),
            array(self.rows, pages_per_row),
            *(array(self.rows) for _ in range(counts)),
            array(),
            None,
        )
        return arguments, {"scale": self.head_size**-0.5, "soft_cap": None}


LLAMA_8B = ((8, 4), 128)
LLAMA_70B_OF_8 = ((1, 8), 128)  # one device's part of eight
QWEN3_30B = ((4, 8), 128)


@dataclasses.dataclass(frozen=True)
class Kernel:
    """What is compiled of one kernel. makers: the implementations that are made for some chips."""

    function: Callable[..., Any]
    makers: dict[str, ModuleType]
    cases: Sequence[Any]
    models: Sequence[ModelShape]


KERNELS = {
    "decode_attention": Kernel(
        decode_attention,
        {"tpu": decode_tpu, "mosaic_gpu": decode_mosaic_gpu},
        decode_cases.CASES,
        (
            ModelShape("llama-3.1-8b", *LLAMA_8B, 64, 1024),
            ModelShape("llama-3.1-8b", *LLAMA_8B, 64, 32768),
            ModelShape("llama-3.1-8b", *LLAMA_8B, 4, 131072),
            ModelShape("llama-3.1-70b, 1 of 8", *LLAMA_70B_OF_8, 64, 8192),
            ModelShape("qwen3-30b-a3b", *QWEN3_30B, 64, 8192),
        ),
    ),
    "prefill_attention": Kernel(
        prefill_attention,
        {"tpu": prefill_tpu, "mosaic_gpu": prefill_mosaic_gpu},
        prefill_cases.CASES,
        (
            ModelShape("llama-3.1-8b", *LLAMA_8B, 16, 8192, 512),
            ModelShape("llama-3.1-8b", *LLAMA_8B, 1, 8192, 8192),
            ModelShape("llama-3.1-70b, 1 of 8", *LLAMA_70B_OF_8, 16, 8192, 512),
        ),
    ),
}
_SHARED = 10  # which kind of operand of MLIR's `gpu.launch` is its dynamic shared memory
POOL, TABLE = 2, 4  # which argument of every kernel is the pool, and donated, and which the page table


@dataclasses.dataclass(frozen=True)
class Program:
    """A whole program that ought to hold a kernel, and no copy of the pool.

    name: of what it is. devices: how many it is compiled for. lower: given those. pool, weights: shapes of
    what one device holds. ideal: context -> bytes that a step has to move on one device. traffic: context ->
    bytes of the pool that one call of the kernel moves there. kernel: whose call it ought to hold. options:
    XLA's, for this program. costly: name of a kind of step -> which of the program's conditionals take their
    costly arm in it. limit: a kind of step, and how many times `ideal` it may move at most.
    """

    name: str
    chip: str
    devices: int
    kernel: str
    lower: Callable[[list[jax.Device]], jax.stages.Lowered]
    pool: jax.ShapeDtypeStruct
    weights: Sequence[jax.ShapeDtypeStruct]
    ideal: dict[int, int] = dataclasses.field(default_factory=dict)
    traffic: dict[int, int] = dataclasses.field(default_factory=dict)
    options: dict[str, bool | int] = dataclasses.field(default_factory=dict)
    costly: dict[str, Callable[[hlo.Instruction], bool]] = dataclasses.field(
        default_factory=lambda: {"every option": lambda conditional: True}
    )
    limit: tuple[str, float] | None = None


@dataclasses.dataclass(frozen=True)
class Row:
    """status: begun, compiled, refused (another implementation was compiled in its place) or failed.
    implementation: what was compiled. memory: bytes on the chip that its kernels take (VMEM, or shared memory
    of one block). seconds: to trace, lower and compile. detail: a reason, an error, figures."""

    kernel: str
    case: str
    chip: str
    status: str = "begun"
    implementation: str = ""
    seconds: float = 0.0
    memory: int | None = None
    detail: Any = ""


Task = tuple[Row, Callable[[Row], Row]]


def tasks(chip: str, only: str | None, programs: Path | None, listed: str = "PROGRAMS") -> Iterator[Task]:
    """Every row of a chip, in an order that does not change, and what fills it. listed: name of the list of
    whole programs in the file."""
    for name, kernel in KERNELS.items():
        if only in (None, name):
            for case in (*kernel.models, *kernel.cases):
                yield Row(name, str(case), chip), functools.partial(compile_case, kernel, case)
    if programs is not None and only in (None, "engine"):
        for program in load_programs(programs, listed):
            if program.chip == chip:
                where = f"{chip}-{program.devices}"
                yield Row("engine", program.name, where), functools.partial(compile_program, program)


def load_programs(file: Path, listed: str) -> Sequence[Program]:
    """A list in a Python file. A file, because this package imports nothing of what is built on it."""
    spec = importlib.util.spec_from_file_location(file.stem, file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return getattr(module, listed)


def compile_case(kernel: Kernel, case: Any, row: Row) -> Row:
    [device] = devices(row.chip)
    mesh = jax.sharding.Mesh(np.array([device]), ("one",))
    place = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    arguments, options = case.shapes()
    arguments = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), arguments)
    wanted: str | None = TARGETS[row.chip].kernels
    reason = kernel.makers[str(wanted)].refusal(
        chip_of(device), arguments[0], arguments[POOL], arguments[TABLE]
    )
    if reason is not None:
        wanted = None
    call = functools.partial(kernel.function, chip=chip_of(device), implementation=wanted, **options)
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):  # Pallas asks it for the kind of GPU
        lowered = jax.jit(call, donate_argnums=POOL).lower(*arguments)
    compiled = lowered.compile()
    module = hlo.Module(str(compiled.as_text()))
    calls = module.kernel_calls()
    if wanted and not calls:
        return dataclasses.replace(row, status="failed", detail=f"{wanted} was asked for; no kernel is in it")
    copies = pool_copies(module, arguments[POOL].shape) if calls else []
    return dataclasses.replace(
        row,
        status="refused" if reason else "compiled",
        implementation=wanted or ("another kernel" if calls else "xla"),
        memory=on_chip_bytes(lowered, calls),
        detail=reason or (f"{COPIED}: {', '.join(copies)}" if copies else ""),
    )


def compile_program(program: Program, row: Row) -> Row:
    lowered = program.lower(devices(program.chip, program.devices))
    compiled = lowered.compile(compiler_options=program.options or None)
    module = hlo.Module(str(compiled.as_text()))
    calls = [call for call in module.kernel_calls() if program.kernel in call.op_name]
    memory: Any = compiled.memory_analysis()
    pool_bytes = program.pool.size * program.pool.dtype.itemsize
    faults = [f"copies the pool: {name}" for name in pool_copies(module, program.pool.shape)]
    faults += [f"copies a layer's pool: {name}" for name in pool_copies(module, program.pool.shape[1:])]
    if not calls:
        faults.append(f"no {program.kernel} kernel is in it")
    if memory.temp_size_in_bytes >= pool_bytes:
        faults.append(f"{memory.temp_size_in_bytes} temporary bytes: room for a second pool")
    remade = remade_weights(module, program.weights)
    faults += [f"writes a weight once more: {weight}" for weight in remade]
    counted = [bytes_of(module, program, context) for context in sorted(program.ideal)]
    if program.limit is not None:
        kind, most = program.limit
        faults += [
            f"{kind} moves {figures['ratio'][kind]} times weights and KV, more than {most}"
            for figures in counted
            if figures["ratio"][kind] > most
        ]
    figures = {
        "kernel_calls": len(calls),
        "temporary_bytes": memory.temp_size_in_bytes,
        "remade_weights": remade,
        "bytes": counted,
    }
    return dataclasses.replace(
        row,
        status="failed" if faults else "compiled",
        implementation=TARGETS[program.chip].kernels,
        memory=on_chip_bytes(lowered, calls),
        detail="; ".join(faults) if faults else figures,
    )


def pool_copies(module: hlo.Module, pool: tuple[int, ...]) -> list[str]:
    """Names of instructions that write an array as large as the pool, other than in place."""
    size = np.prod(pool)
    return [one.name for one, _ in module.whole_writes(lambda shape: shape.elements == size)]


def remade_weights(module: hlo.Module, weights: Sequence[jax.ShapeDtypeStruct]) -> list[str]:
    """Instructions that write a whole weight, or one layer of stacked ones, to memory once more: wider,
    transposed, cut out."""

    def key(dims: Sequence[int]) -> tuple[int, ...]:
        return tuple(sorted(size for size in dims if size > 1))

    large = [key(w.shape) for w in weights if w.size >= 2**20]
    layer = [key(w.shape[1:]) for w in weights if w.size >= 2**20 and len(w.shape) == 3]
    found = module.remade(
        lambda shape: key(shape.dims) in large, lambda shape: key(shape.dims) in large + layer
    )
    return [f"{one.name}: {shape.dtype}{list(shape.dims)}" for one, shape in found]


def bytes_of(module: hlo.Module, program: Program, context: int) -> dict[str, Any]:
    """Bytes that one step of each kind moves on one device; of the first kind, what moves the most.

    A kernel's call counts its arguments and results but for the pool, and what it takes of that.
    """
    size = program.pool.size

    def kernel(call: hlo.Instruction) -> int | None:
        operands = module.operands(call)
        if all(shape.elements != size for shape in operands):
            return None  # one that merges, say
        rest = sum(shape.bytes for shape in (*operands, *call.results) if shape.elements != size)
        return rest + program.traffic[context]

    moved = {
        kind: module.bytes_moved(kernel=kernel, costly=costly) for kind, costly in program.costly.items()
    }
    first = next(iter(moved.values()))
    by_name: dict[str, list[int]] = {}
    for row in first:
        name = row.instruction.op_name or row.instruction.opcode
        sums = by_name.setdefault(name.rpartition("jit(")[2], [0, 0])
        sums[0], sums[1] = sums[0] + row.times, sums[1] + row.bytes
    top = sorted(by_name.items(), key=lambda item: -item[1][1])[:12]
    return {
        "context": context,
        "ideal": program.ideal[context],
        "moved": {kind: hlo.total(rows) for kind, rows in moved.items()},
        "ratio": {kind: round(hlo.total(rows) / program.ideal[context], 4) for kind, rows in moved.items()},
        "kernels": sum(row.bytes for row in first if row.instruction.target in hlo.KERNEL_TARGETS),
        "top": [[name, times, size] for name, (times, size) in top],
    }


def on_chip_bytes(lowered: jax.stages.Lowered, calls: Sequence[hlo.Instruction]) -> int | None:
    """Of the kernel that takes most; None where there is none.

    VMEM: what the compiled call says that it uses. Shared memory: what the kernel asks for when launched.
    """
    sizes = [
        int(size)
        for call in calls
        for used in re.findall(r'"used_scoped_memory_configs":\[([^\]]*)\]', call.attributes)
        for size in re.findall(r'"memory_space":"1","offset":"\d+","size":"(\d+)"', used)
    ]
    if any(call.target != "tpu_custom_call" for call in calls):
        sizes += shared_memory(lowered)
    return max(sizes, default=None)


def shared_memory(lowered: jax.stages.Lowered) -> list[int]:
    """Bytes of each Mosaic GPU kernel of a program, read from the launch in its own module."""
    from jax.experimental.mosaic.gpu import dialect  # type: ignore[attr-defined]
    from jaxlib.mlir import ir

    def inside(operation: Any) -> Iterator[Any]:
        for region in operation.regions:
            for block in region:
                for one in block:
                    yield one.operation
                    yield from inside(one.operation)

    found = []
    stablehlo: Any = lowered.compiler_ir("stablehlo")
    for call in inside(stablehlo.operation):
        if call.name != "stablehlo.custom_call" or "mhlo.backend_config" not in call.attributes:
            continue
        with ir.Context() as context:
            context.allow_unregistered_dialects = True
            dialect.register_dialect(context)
            kernel = ir.Module.parse(call.attributes["mhlo.backend_config"]["module"].value_bytes)
            for launch in inside(kernel.operation):
                if launch.name.endswith("gpu.launch"):
                    sizes = list(launch.attributes["operandSegmentSizes"])
                    assert sizes[_SHARED] == 1, sizes
                    asked = launch.operands[sum(sizes[:_SHARED])].owner
                    found.append(int(asked.attributes["value"].value))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("chip", choices=TARGETS)
    parser.add_argument("--kernel")
    parser.add_argument("--programs", type=Path)
    parser.add_argument("--bytes", action="store_true", help="BYTES of the file, not PROGRAMS")
    parser.add_argument("--skip", type=int, default=0)
    parser.add_argument("--match", default="", help="only rows whose case holds this")
    args = parser.parse_args()
    listed = "BYTES" if args.bytes else "PROGRAMS"
    for i, (row, fill) in enumerate(tasks(args.chip, args.kernel, args.programs, listed)):
        if i < args.skip or args.match not in row.case:
            continue
        print(ROW + json.dumps(dataclasses.asdict(row)), flush=True)
        start = time.perf_counter()
        try:
            row = fill(row)
        except Exception as error:  # whatever the compiler or the kernel raises is this row's
            row = dataclasses.replace(row, status="failed", detail=f"{type(error).__name__}: {error}")
        row = dataclasses.replace(row, seconds=round(time.perf_counter() - start, 2))
        print(ROW + json.dumps(dataclasses.asdict(row)), flush=True)


if __name__ == "__main__":
    main()
