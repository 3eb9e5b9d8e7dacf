"""`jaxserve plan`: exit codes and what goes where, with a stand-in for the environment of a compiler; and the
compilers themselves, slow, where their environments are built."""

from __future__ import annotations

import json
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.plan_table import MODELS, SLICES, faults
from jaxserve.cli.main import main
from jaxserve.plan.options import PlanOptions
from jaxserve.plan.run import plan
from pallas_kernels import aot
from sharding.topology import parse_slice
from tests import tiny
from tests.cli.harness import ROOT, environment

# Stands in for an environment's Python. As a worker it plans over the host's devices and with what
# `tests.plan.test_examine` puts in the compiler's place, or does what WORKER says.
WORKER = f"""#!{sys.executable}
import importlib.metadata, json, os, sys
if sys.argv[1] == "-c":
    print(os.environ.get("WORKER_JAX", importlib.metadata.version("jax")))
    sys.exit()
assert sys.argv[1:] == ["-m", "jaxserve.plan.worker"], sys.argv
sys.path.insert(0, {str(ROOT)!r})
how = os.environ.get("WORKER", "")
print("a compiler's chatter")
if how == "crash":
    print("out of luck", file=sys.stderr)
    os._exit(139)
if how == "silent":
    sys.exit()
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
import jax
from jaxserve.plan import examine, worker
from tests.plan.test_examine import analysis
worker.targets.devices = lambda chip, count: jax.devices()[:count]
real = examine.examine
stand_in = lambda model, chosen: analysis(chosen)
examine.examine = lambda *given, **named: real(*given, **named, compile=stand_in)
worker.main()
"""


@pytest.fixture
def environments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with stand-ins for both."""
    for name in ("tpu", "cuda"):
        python = tmp_path / f".venv-aot-{name}" / "bin" / "python"
        python.parent.mkdir(parents=True)
        python.write_text(WORKER)
        python.chmod(python.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setattr(aot, "ROOT", tmp_path)
    return tmp_path


@pytest.fixture
def model(tmp_path: Path) -> str:
    """A folder with a config.json and nothing else."""
    return write(tmp_path / "a-model", tiny.CONFIG | {"torch_dtype": "bfloat16"})


def write(folder: Path, config: dict[str, Any]) -> str:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


def test_a_table_on_stdout_and_progress_on_stderr(
    environments: Path, model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "plan.json"
    line = [model, "--chips", "v5p-8", "--json", str(file), "--input-tokens", "100", "--output-tokens", "50"]
    assert main(["plan", *line], {"JAXSERVE_PRICE": "2"}) == 0
    printed = capsys.readouterr()
    assert printed.out.startswith(
        "a-model: llama of 0.00 B parameters in bfloat16, on v5p:2x2x1 (4 chip(s), 2x2x1)"
    )
    assert "fits, with --mesh" in printed.out and "per 1M drawn" in printed.out
    assert "compiling for mesh" in printed.err
    assert "chatter" not in printed.out + printed.err
    report = json.loads(file.read_text())
    assert report["fits"] is True and report["chips"]["count"] == 4


def test_what_does_not_fit_is_an_answer(
    environments: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write(tmp_path / "70b", MODELS["Llama-3.1-70B"])
    file = tmp_path / "plan.json"
    assert main(["plan", folder, "--chips=v5e-8", f"--json={file}"], {}) == 0
    printed = capsys.readouterr()
    report = json.loads(file.read_text())
    assert report["fits"] is False and report["compiled"] is None
    assert f"{report['missing_bytes']} are missing" in printed.out
    assert "compiling" not in printed.err


@pytest.mark.parametrize("chips", ["v5e-8", "h100-1"])
def test_a_missing_environment(
    chips: str,
    model: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(aot, "ROOT", tmp_path)
    assert main(["plan", model, "--chips", chips], {}) == 2
    printed = capsys.readouterr()
    name = "tpu" if chips == "v5e-8" else "cuda"
    assert f".venv-aot-{name}: make aot" in printed.err and not printed.out


def test_an_environment_with_another_jax(
    environments: Path, model: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORKER_JAX", "0.1.2")
    assert main(["plan", model, "--chips", "v5e-8"], {}) == 2
    assert "holds jax 0.1.2" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("how", "said"), [("crash", "exited with 139: out of luck"), ("silent", "exited with 0")]
)
def test_a_compiler_that_dies(
    how: str,
    said: str,
    environments: Path,
    model: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("WORKER", how)
    assert main(["plan", model, "--chips", "v5e-8"], {}) == 1
    printed = capsys.readouterr()
    assert said in printed.err and not printed.out


@pytest.mark.parametrize(
    ("args", "said"),
    [
        ([], "--chips is needed"),
        (["--chips", "v5e"], "must be CHIP-N"),
        (["--chips", "a100-8"], "not a known chip"),
        (["--chips", "v5e-256"], "plans are made for v5e-1, v5e-4, v5e-8"),
        (["--chips", "v5e:1x8"], "plans are made for"),
        (["--chips", "v5e-8", "--page-size", "3"], "--page-size"),
        (["--chips", "v5e-8", "--price", "-1"], "--price"),
    ],
)
def test_wrong_use(args: list[str], said: str, model: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["plan", model, *args], {})
    assert stop.value.code == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--mesh", "tensor=8,expert=2"], "is for 16 chips"),
        (["--max-model-len", "999"], "beyond the model's context"),
    ],
)
def test_what_does_not_go_with_the_model(
    args: list[str], said: str, environments: Path, model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    line = [model, "--chips", "v5e-8", "--input-tokens", "9", "--output-tokens", "9", *args]
    assert main(["plan", *line], {}) == 1
    assert said in capsys.readouterr().err


def test_a_folder_that_is_no_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(tmp_path / "nowhere"), "--chips", "v5e-8"], {}) == 1
    assert "nowhere" in capsys.readouterr().err


def test_a_plot_without_matplotlib(
    model: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setattr("jaxserve.cli.main.check_leaves", lambda: None)
    with pytest.raises(SystemExit) as stop:
        main(["plan", model, "--chips", "v5e-8", "--plot", "plan.png"], {})
    assert stop.value.code == 2
    assert "jaxserve[bench]" in capsys.readouterr().err


def test_help_is_quick_and_imports_no_jax() -> None:
    program = (
        "import sys\n"
        "from jaxserve.cli.main import main\n"
        "try:\n    main(['plan', '--help'])\n"
        "except SystemExit as stop:\n    assert not stop.code\n"
        "print('jax' in sys.modules)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert "--chips" in done.stdout and "--price" in done.stdout
    assert done.stdout.endswith("False\n")


# -- the compilers -------------------------------------------------------------------------------------------


def real_plan(name: str, where: str, **options: Any) -> dict[str, Any]:
    slice_ = parse_slice(where)
    if lines := aot.missing([slice_.chip]):
        pytest.skip(lines[0])
    return plan(MODELS[name], name, slice_, PlanOptions(**options))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "where"),
    [
        ("Llama-3.1-8B", "v5e-8"),
        ("Llama-3.1-70B", "v5e-8"),
        ("Llama-3.1-70B", "v6e-8"),
        ("Mixtral-8x7B", "v6e-8"),
        ("Qwen3-30B-A3B", "v5p:2x2x1"),
        ("Llama-3.1-70B", "h100-1"),
        ("Llama-3.1-8B", "h100-1"),
    ],
)
def test_the_compiler_agrees(name: str, where: str) -> None:
    """Weights and pool within 2 %, the pool copied nowhere, the 70B refused where it must be."""
    assert where in SLICES
    report = real_plan(name, where)
    assert faults(name, where, report) == []
    if report["fits"]:
        assert all(report["compiled"][kind]["kernel_calls"] for kind in ("decode", "prefill"))
