"""The check that compiles ahead of time: what it runs, prints and returns. The compilers themselves live in
environments that `make aot` builds: what needs one is slow, and skipped where it is not there."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import aot, aot_compile, bench, hlo, targets, traffic

ROOT = Path(__file__).resolve().parents[2]

# Stands in for an environment's Python: rows 0 and 2 compile, row 1 is what WORKER_ROW says.
WORKER = f"""#!{sys.executable}
import importlib.metadata, json, os, sys
if sys.argv[1] == "-c":
    print(os.environ.get("WORKER_JAX", importlib.metadata.version("jax")))
    sys.exit()
chip, skip = sys.argv[3], int(sys.argv[sys.argv.index("--skip") + 1])
for i in range(skip, 3):
    row = dict(kernel="k", case=f"case {{i}}", chip=chip, status="begun", implementation="", seconds=0.0,
               memory=None, detail="")
    print("row " + json.dumps(row), flush=True)
    print("a compiler's chatter")
    how = os.environ.get("WORKER_ROW", "compiled") if i == 1 else "compiled"
    if how == "crash":
        print("out of luck", file=sys.stderr)
        os._exit(139)
    row |= dict(status=how, implementation="tpu", seconds=1.5, memory=2048)
    row["detail"] = "" if how == "compiled" else "why"
    print("row " + json.dumps(row), flush=True)
"""


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a stand-in for the TPU environment."""
    python = tmp_path / ".venv-aot-tpu" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(WORKER)
    python.chmod(python.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setattr(aot, "ROOT", tmp_path)
    monkeypatch.setattr(aot, "ENGINE", tmp_path / "none")
    return tmp_path


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["aot", *arguments])
    return aot.main()


def test_all_compiled(
    checkout: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "--chips", "v5e,v6e", "--json", str(checkout / "rows.json")) == 0
    out = capsys.readouterr().out
    assert out.count("compiled  tpu") == 12 and "chatter" not in out  # two kernels, two chips
    assert (
        "v6e     k                    6 compiled,  0 refused,  0 failed, 0 copy the pool, at most 2 KiB"
        in out
    )
    assert "12 rows, 0 failed" in out
    rows = json.loads((checkout / "rows.json").read_text())
    assert rows["jax"] == jax.__version__
    assert [row["chip"] for row in rows["rows"]] == ["v5e"] * 6 + ["v6e"] * 6


@pytest.mark.parametrize(
    ("how", "code", "said"),
    [
        ("failed", 1, "failed    tpu           1.50 s      2 KiB  why"),
        ("refused", 0, "refused   tpu           1.50 s      2 KiB  refused: why"),
        ("crash", 1, "the compiler exited with 139: out of luck"),
    ],
)
def test_a_row_that_does_not_compile(
    how: str,
    code: int,
    said: str,
    checkout: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A crash is its row's alone: the next row is compiled all the same."""
    monkeypatch.setenv("WORKER_ROW", how)
    assert run(monkeypatch, "--chips", "v5e") == code
    printed = capsys.readouterr()
    assert said in printed.out and "case 2" in printed.out
    assert ("FAILED" in printed.err) == (code == 1)


def test_a_worker_that_does_not_start_is_no_success(
    checkout: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    python = checkout / ".venv-aot-tpu" / "bin" / "python"
    python.write_text(WORKER.replace("chip, skip =", "raise SystemExit(3); chip, skip ="))
    assert run(monkeypatch, "--chips", "v5e") == 1
    assert "exited with 3" in capsys.readouterr().out


def test_a_missing_environment(
    checkout: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "--chips", "v5e,h100") == 2
    err = capsys.readouterr().err
    assert ".venv-aot-cuda: make aot" in err and ".venv-aot-tpu" not in err


def test_an_environment_with_another_jax(
    checkout: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORKER_JAX", "0.1.2")
    assert run(monkeypatch, "--chips", "v5e") == 2
    assert f"holds jax 0.1.2, this is {jax.__version__}: make aot" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["--chips", "v3"], ["--kernel", "softmax"], ["--bytes"]])
def test_wrong_use(arguments: list[str], checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SystemExit) as ended:
        run(monkeypatch, "--chips", "v5e", *arguments)
    assert ended.value.code == 2


# -- what one chip's process does --------------------------------------------------------------------------


def test_every_case_is_a_row() -> None:
    rows = [row for row, _ in aot_compile.tasks("v5e", None, None)]
    for name, kernel in aot_compile.KERNELS.items():
        own = [row.case for row in rows if row.kernel == name]
        assert {*map(str, kernel.cases), *map(str, kernel.models)} == set(own)
        assert len(set(own)) == len(own)
    assert [row for row, _ in aot_compile.tasks("v5e", None, None)] == rows
    assert {row.kernel for row, _ in aot_compile.tasks("v5e", "decode_attention", None)} == {
        "decode_attention"
    }


def test_shapes_of_models() -> None:
    """Llama 3.1 8B, 64 rows of 1,024: 16 pages a row, and 32 query heads over 8."""
    arguments, options = aot_compile.ModelShape("8b", (8, 4), 128, 64, 1024).shapes()
    assert arguments[0].shape == (64, 32, 128) and arguments[2].shape == (1, 1024, 64, 2048)
    assert arguments[4].shape == (64, 16) and len(arguments) == 8 and options["scale"] == 128**-0.5
    arguments, _ = aot_compile.ModelShape("8b", (8, 4), 128, 16, 8192, 512).shapes()
    assert arguments[0].shape == (512, 32, 128) and len(arguments) == 10


KERNEL = """HloModule test

ENTRY %main (q: bf16[64,128], w: bf16[1024,1024]) -> bf16[64,128] {
  %q = bf16[64,128]{1,0} parameter(0)
  %p = bf16[2,16,64,256]{3,2,1,0} parameter(1)
  %w = bf16[1024,1024]{1,0} parameter(2)
  %k = (bf16[64,128]{1,0}, bf16[2,16,64,256]{3,2,1,0}) custom-call(%q, %p), custom_call_target="tpu_custom_call", output_to_operand_aliasing={{1}: (1, {})}, metadata={op_name="jit(f)/decode_attention/x"}, backend_config={"used_scoped_memory_configs":[{"memory_space":"1","offset":"0","size":"4096"}]}
  %g = bf16[64,128]{1,0} get-tuple-element(%k), index=0
  ROOT %n = bf16[64,128]{1,0} negate(%g)
}
"""  # noqa: E501
POOL = jax.ShapeDtypeStruct((2, 16, 64, 256), jnp.bfloat16)
WEIGHTS = [jax.ShapeDtypeStruct((1024, 1024), jnp.bfloat16)]


def whole(**changes: Any) -> aot_compile.Program:
    fields: dict[str, Any] = {
        "name": "step", "chip": "v5e", "devices": 1, "kernel": "decode_attention",
        "lower": lambda found: None, "pool": POOL, "weights": WEIGHTS, "ideal": {100: 10_000},
        "traffic": {100: 5_000},
    }  # fmt: skip
    return aot_compile.Program(**fields | changes)


def test_bytes_of_a_program_with_a_kernel() -> None:
    """The call: its query, its output and what it takes of the pool; then what follows it."""
    rows = 64 * 128 * 2
    figures = aot_compile.bytes_of(hlo.Module(KERNEL), whole(), 100)
    assert figures["kernels"] == 2 * rows + 5_000
    assert figures["moved"] == {"every option": 4 * rows + 5_000}
    assert figures["ratio"] == {"every option": round((4 * rows + 5_000) / 10_000, 4)}


class Compiled:
    """What a compiler would give."""

    def __init__(self, text: str, temporary: int = 0) -> None:
        self.text, self.temp_size_in_bytes = text, temporary

    def compile(self, compiler_options: dict[str, Any] | None) -> Compiled:
        return self

    def as_text(self) -> str:
        return self.text

    def memory_analysis(self) -> Compiled:
        return self


# a copy of one layer of the pool, and a weight in another type, beside the kernel
COPIES_A_LAYER = KERNEL.replace(
    "  ROOT %n =",
    "  %c = bf16[1,16,64,256]{3,2,1,0} slice(%p), slice={[0:1], [0:16], [0:64], [0:256]}\n  ROOT %n =",
)
REMAKES_A_WEIGHT = KERNEL.replace("  ROOT %n =", "  %u = f32[1024,1024]{1,0} convert(%w)\n  ROOT %n =")


@pytest.mark.parametrize(
    ("text", "changes", "said"),
    [
        (KERNEL, {}, None),
        (KERNEL, {"limit": ("every option", 10.0)}, None),
        (KERNEL, {"limit": ("every option", 1.15)}, "moves 7.0536 times weights and KV, more than 1.15"),
        (KERNEL, {"kernel": "prefill_attention"}, "no prefill_attention kernel is in it"),
        (COPIES_A_LAYER, {}, "copies a layer's pool: c"),
        (REMAKES_A_WEIGHT, {}, "writes a weight once more: u: f32[1024, 1024]"),
    ],
)
def test_faults_of_a_program(
    text: str, changes: dict[str, Any], said: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(aot_compile, "devices", lambda chip, count: [])
    program = whole(lower=lambda found: Compiled(text), **changes)
    row = aot_compile.compile_program(program, aot_compile.Row("engine", "step", "v5e"))
    assert row.status == ("compiled" if said is None else "failed")
    if said is not None:
        assert said in row.detail


def test_a_program_with_room_for_a_second_pool(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(aot_compile, "devices", lambda chip, count: [])
    program = whole(lower=lambda found: Compiled(KERNEL, 2**20))
    row = aot_compile.compile_program(program, aot_compile.Row("engine", "step", "v5e"))
    assert row.status == "failed" and "room for a second pool" in row.detail


def test_copies_of_the_pool_and_of_weights() -> None:
    module = hlo.Module(KERNEL)
    assert aot_compile.pool_copies(module, POOL.shape) == []
    assert aot_compile.remade_weights(module, WEIGHTS) == []
    copied = KERNEL.replace("custom-call(%q, %p)", "custom-call(%q, %c)").replace(
        "  %k =",
        "  %c = bf16[32,64,256]{2,1,0} copy(%p)\n  %u = f32[1024,1024]{1,0} convert(%w)\n  %k =",
    )
    module = hlo.Module(copied)
    assert aot_compile.pool_copies(module, POOL.shape) == ["c"]
    assert aot_compile.remade_weights(module, WEIGHTS) == ["u: f32[1024, 1024]"]


def test_memory_on_the_chip_is_the_compilers_own_figure() -> None:
    lowered: Any = None  # is looked at for GPUs alone
    calls = hlo.Module(KERNEL).kernel_calls()
    assert aot_compile.on_chip_bytes(lowered, calls) == 4096
    assert aot_compile.on_chip_bytes(lowered, []) is None


def test_programs_come_from_a_file(tmp_path: Path) -> None:
    file = tmp_path / "programs.py"
    file.write_text("PROGRAMS = [1, 2]\nBYTES = [3]\n")
    assert aot_compile.load_programs(file, "PROGRAMS") == [1, 2]
    assert aot_compile.load_programs(file, "BYTES") == [3]


def test_an_unknown_chip_or_count() -> None:
    with pytest.raises(ValueError, match="chip='v3' is not one of"):
        targets.devices("v3")
    with pytest.raises(ValueError, match="count=3 of v5e must be one of 1, 4, 8"):
        targets.devices("v5e", 3)


def test_bytes_of_the_pool() -> None:
    """bf16 on TPU comes in tiles of 16 rows; one is written for a new token."""
    count = {"page": 64, "width": 256, "itemsize": 2}
    assert traffic.decode_bytes("tpu", [0, 0], 2**30, **count) == 0
    assert traffic.decode_bytes("tpu", [1], 2**30, **count) == (16 + 16) * 512
    assert traffic.decode_bytes("tpu", [64, 65], 2**30, **count) == (64 + 16 + 80 + 16) * 512
    assert traffic.decode_bytes("tpu", [1000], 40, **count) == (48 + 16) * 512  # 960 to 999: 3 tiles
    with pytest.raises(ValueError, match="'xla' fetches is not known"):
        traffic.decode_bytes("xla", [1], 2**30, **count)


# -- the bench ---------------------------------------------------------------------------------------------


def test_what_a_workload_must_do() -> None:
    decode = bench.Workload("", 64, 1024)
    assert decode.bytes == 64 * 1024 * 2048 * 2 + 2 * 64 * 32 * 128 * 2
    assert decode.operations == 4 * 64 * 1024 * 32 * 128
    prefill = bench.Workload("", 1, 4, 4)  # 1 + 2 + 3 + 4 keys
    assert prefill.operations == 4 * 10 * 32 * 128
    assert bench.Workload("", 1, 6, 2).operations == 4 * (5 + 6) * 32 * 128


@pytest.mark.slow
def test_the_bench_runs_here_and_says_that_it_means_nothing(tmp_path: Path) -> None:
    file = tmp_path / "bench.json"
    command = [sys.executable, "-m", "pallas_kernels.bench", "--repeats", "1", "--json", str(file)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "figures that mean nothing" in done.stdout
    result = json.loads(file.read_text())
    assert result["device"] and result["jax"] == jax.__version__ and set(result) >= {"commit", "limits"}
    assert {row["workload"] for row in result["rows"]} == {work.name for work in bench.TINY}
    assert all(row["correct"] and row["seconds"] > 0 for row in result["rows"])


# -- the compilers -----------------------------------------------------------------------------------------


def in_environment(chip: str, *arguments: str) -> list[dict[str, Any]]:
    """Rows that one chip's process ends; skips where its environment is not built."""
    python = aot.python_for(chip)
    if lines := aot.missing([chip]):
        pytest.skip(lines[0])
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [str(python), "-m", "pallas_kernels.aot_compile", chip, *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    rows = [json.loads(line.removeprefix("row ")) for line in done.stdout.splitlines() if line[:4] == "row "]
    return [row for row in rows if row["status"] != "begun"]


@pytest.mark.slow
@pytest.mark.parametrize("chip", ["v5e", "h100"])
def test_the_engines_programs_hold_the_kernels_and_copy_no_pool(chip: str) -> None:
    """Decode of Llama 3.1 8B's shape, all layers: the kernels' calls, no second pool nor one layer of it, no
    weight made twice, and at most 1.15 times its weights and cached keys and values moved. Anything else is
    a row that failed; `make aot` has the other programs."""
    programs = [
        "--programs",
        str(ROOT / "benchmarks/aot_layout.py"),
        "--match",
        "decode 64 x 1024, 32 layers",
    ]
    row, *more = in_environment(chip, "--kernel", "engine", *programs)
    assert row["status"] == "compiled", row
    assert row["detail"]["kernel_calls"] >= 1 and row["memory"] > 0
    [figures] = row["detail"]["bytes"]
    assert figures["context"] == 1024
    assert 1.0 < figures["ratio"]["greedy"] <= figures["ratio"]["temperature"] <= 1.15
    assert figures["ratio"]["temperature"] <= figures["ratio"]["top-k and top-p"]
    assert all("tokens at a time" in each["case"] for each in more)
