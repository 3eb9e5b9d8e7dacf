"""Compiles every kernel and case for chips that are not here; a row each.

    python -m pallas_kernels.aot [--chips v5e,v6e,v5p,h100] [--kernel NAME] [--jobs N] [--json FILE] [--bytes]

The compilers live in `.venv-aot-tpu` and `.venv-aot-cuda`, which `make aot` builds; this calls into them, one
process for each kernel on each chip. Where a chip's own kernel says that it cannot run a case, the row says
`refused` and why, and what runs in its place is compiled. Rows of kernel `engine` are the engine's whole
programs. `--bytes` compiles its decode steps alone, and prints what they move.

Exit codes: 0 all compiled, 1 something did not, 2 an environment is missing or the arguments are wrong.
"""

from __future__ import annotations

import argparse
import collections
import concurrent.futures
import contextlib
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import jax

from pallas_kernels.aot_compile import COPIED, KERNELS, ROW, Row
from pallas_kernels.targets import TARGETS

ROOT = Path(__file__).resolve().parent.parent
CHIPS = ("v5e", "v6e", "v5p", "h100")
ENGINE = ROOT / "benchmarks" / "aot_layout.py"  # a checkout's; an installed package has none


def python_for(chip: str) -> Path:
    return ROOT / f".venv-aot-{TARGETS[chip].environment}" / "bin" / "python"


def missing(chips: list[str]) -> list[str]:
    """What keeps the chips from being compiled for, a line each."""
    lines = {}
    for chip in chips:
        python = python_for(chip)
        if not python.exists():
            lines[python] = f"there is no {python.parent.parent}: make aot"
        elif (have := _version(python)) != jax.__version__:
            lines[python] = f"{python.parent.parent} holds jax {have}, this is {jax.__version__}: make aot"
    return list(lines.values())


def _version(python: Path) -> str:
    """Of the jax in an environment, without importing it."""
    code = "import importlib.metadata; print(importlib.metadata.version('jax'))"
    done = subprocess.run([python, "-c", code], capture_output=True, text=True, check=False)
    return done.stdout.strip() or "that does not start"


def compile_part(chip: str, kernel: str, options: list[str], show: Callable[[Row], None]) -> list[Row]:
    """Every row of one kernel on one chip. One at which the compiler ended its process has failed; the next
    goes on."""
    rows: list[Row] = []
    worker = ["-m", "pallas_kernels.aot_compile", chip, f"--kernel={kernel}"]
    command = [str(python_for(chip)), *worker, *options]
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    while True:
        begun: Row | None = None
        with tempfile.TemporaryFile("w+") as log:
            with subprocess.Popen(
                [*command, "--skip", str(len(rows))],
                stdout=subprocess.PIPE, stderr=log, text=True, env=environment,
            ) as process:  # fmt: skip
                assert process.stdout is not None
                for line in process.stdout:
                    if not line.startswith(ROW):
                        continue
                    row = Row(**json.loads(line.removeprefix(ROW)))
                    begun = row if row.status == "begun" else None
                    if begun is None:
                        rows.append(row)
                        show(row)
                code = process.wait()
            if not code:
                return rows
            log.seek(0)
            said = " | ".join(log.read().strip().splitlines()[-5:])
        row = begun or Row(kernel, "start", chip)
        row = dataclasses.replace(row, status="failed", detail=f"the compiler exited with {code}: {said}")
        rows.append(row)
        show(row)
        if begun is None:  # it did not get as far as a row
            return rows


def line(row: Row) -> str:
    memory = "" if row.memory is None else f"{row.memory / 1024:.0f} KiB"
    detail = row.detail if isinstance(row.detail, str) else ""
    if row.status == "refused":
        detail = f"refused: {detail}"
    first = detail.strip().splitlines()[0][:300] if detail else ""
    return (
        f"{row.kernel:18} {row.case:52} {row.chip:7} {row.status:9} {row.implementation:11} "
        f"{row.seconds:6.2f} s  {memory:>9}  {first}"
    ).rstrip()


def summary(rows: list[Row]) -> list[str]:
    lines = []
    for chip in dict.fromkeys(row.chip for row in rows):
        for kernel in dict.fromkeys(row.kernel for row in rows if row.chip == chip):
            own = [row for row in rows if (row.chip, row.kernel) == (chip, kernel)]
            count = collections.Counter(row.status for row in own)
            copied = sum(str(row.detail).startswith(COPIED) for row in own if row.status == "compiled")
            memory = max((row.memory or 0 for row in own), default=0)
            lines.append(
                f"{chip:7} {kernel:18} {count['compiled']:3} compiled, {count['refused']:2} refused, "
                f"{count['failed']:2} failed, {copied} copy the pool, at most {memory / 1024:.0f} KiB "
                f"on the chip, {sum(row.seconds for row in own):.0f} s"
            )
    return lines


def bytes_lines(rows: list[Row]) -> list[str]:
    lines = []
    for row in rows:
        if not isinstance(row.detail, dict):
            continue
        for figures in row.detail["bytes"]:
            kinds = "; ".join(
                f"{kind} {moved / 1e9:.3f} GB, {figures['ratio'][kind]:.4f} times"
                for kind, moved in figures["moved"].items()
            )
            lines.append(
                f"{row.case} on {row.chip}, context {figures['context']}: each device's weights + KV are"
                f" {figures['ideal'] / 1e9:.3f} GB; a step moves: {kinds}. The first in parts:"
            )
            for name, times, size in figures["top"]:
                lines.append(f"    {size / 1e9:9.4f} GB in {times:4} of {name}")
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m pallas_kernels.aot", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--chips", default=",".join(CHIPS), help=f"of {', '.join(TARGETS)}")
    parser.add_argument("--kernel", choices=[*KERNELS, "engine"], help="that one alone")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="compilers at a time")
    parser.add_argument("--json", type=Path, help="writes the rows there")
    parser.add_argument(
        "--programs", type=Path, default=ENGINE if ENGINE.exists() else None,
        help="a Python file whose PROGRAMS are whole programs that ought to hold a kernel",
    )  # fmt: skip
    parser.add_argument("--bytes", action="store_true", help="counts what the engine's decode moves")
    args = parser.parse_args()
    chips = args.chips.split(",")
    if unknown := [chip for chip in chips if chip not in TARGETS]:
        parser.error(f"--chips: {', '.join(unknown)} is not one of {', '.join(TARGETS)}")
    if args.programs is None and (args.bytes or args.kernel == "engine"):
        parser.error(
            "--programs: the engine's are in a checkout's benchmarks/aot_layout.py, and this is none"
        )
    if lines := missing(chips):
        print("\n".join(lines), file=sys.stderr)
        return 2

    kernel = "engine" if args.bytes else args.kernel
    kernels = [*KERNELS, *(["engine"] if args.programs else [])]
    options = [f"--programs={args.programs}"] if args.programs else []
    options += ["--bytes"] if args.bytes else []
    start, lock = time.perf_counter(), threading.Lock()

    def show(row: Row) -> None:
        with lock:
            print(line(row), flush=True)

    chips.sort(key=lambda chip: not TARGETS[chip].card)  # GPUs first: they take longest
    parts = [(chip, each) for chip in chips for each in ([kernel] if kernel else kernels)]
    with concurrent.futures.ThreadPoolExecutor(args.jobs) as pool:
        done = pool.map(lambda part: compile_part(part[0], part[1], options, show), parts)
        rows = [row for part in done for row in part]
    failed = [row for row in rows if row.status == "failed"]
    print()
    with contextlib.suppress(BrokenPipeError):
        print("\n".join([*summary(rows), *(bytes_lines(rows) if args.bytes else [])]))
    for row in failed:
        print(f"FAILED {line(row)}\n{row.detail}", file=sys.stderr)
    print(
        f"{len(rows)} rows, {len(failed)} failed, {time.perf_counter() - start:.0f} s, jax {jax.__version__}"
    )
    if args.json:
        args.json.write_text(
            json.dumps({"jax": jax.__version__, "rows": [dataclasses.asdict(row) for row in rows]}, indent=1)
        )
    return 1 if failed or not rows else 0


if __name__ == "__main__":
    sys.exit(main())
