"""`jaxserve convert` as a process: exit codes, and what goes where."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from jaxserve.cli.main import main
from tests import tiny
from tests.cli.harness import ROOT, environment


def convert(*args: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "jaxserve", "convert", *args],
        cwd=ROOT,
        env=environment(**variables),
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


def test_it_prints_where_it_wrote(tmp_path: Path) -> None:
    source = tiny.write_model(tmp_path / "tiny")
    done = convert(str(source), str(tmp_path / "new" / "out"))
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{tmp_path / 'new' / 'out'}\n"
    lines = done.stderr.splitlines()
    assert lines[0] == f"converting tiny: 21 arrays, {4 * parameters()} bytes"
    assert lines[-1] == "100 % written"
    assert not any("WARNING" in line for line in lines)
    again = convert(str(source), str(tmp_path / "new" / "out"))
    assert (again.returncode, again.stdout) == (1, "")
    assert "out: exists; give another folder, or --overwrite" in again.stderr
    half = convert(str(source), str(tmp_path / "new" / "out"), "--overwrite", JAXSERVE_DTYPE="bfloat16")
    assert half.returncode == 0, half.stderr
    assert json.loads((tmp_path / "new/out/jaxserve.json").read_text())["dtypes"] == ["bfloat16"]


def parameters() -> int:
    return sum(array.size for array in tiny.tensors(tiny.CONFIG).values())


def test_a_folder_that_is_no_model(tmp_path: Path) -> None:
    done = convert(str(tmp_path / "nowhere"), str(tmp_path / "out"))
    assert (done.returncode, done.stdout) == (1, "")
    assert "nowhere" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("args", [[], ["somewhere"]])
def test_both_places_are_needed(args: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["convert", *args], {})
    assert stop.value.code == 2
    assert "HF_DIR and OUT are needed" in capsys.readouterr().err


def test_help_is_quick_and_imports_no_jax() -> None:
    program = (
        "import sys\n"
        "from jaxserve.cli.main import main\n"
        "try:\n    main(['convert', '--help'])\n"
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
    assert "[HF_DIR] [OUT]" in done.stdout
    assert "--overwrite" in done.stdout
    assert done.stdout.endswith("False\n")
