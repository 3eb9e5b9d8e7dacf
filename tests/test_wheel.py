"""A wheel built from the repository: what is in it, and that it works where the repository is not."""

from __future__ import annotations

import email
import os
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("jaxserve", "sharding", "pallas_kernels", "checkpoints")
LEAVES = PACKAGES[1:]
MODEL = ROOT / "checkpoints" / "embedded" / "model"
# `python -m` and scripts put their folder first on the path, which is where a decoy does harm
COMMAND = ("-m", "jaxserve", "generate", "--prompt", "def ", "--max-tokens", "4", "--temperature", "0")


def run(*command: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "JAXSERVE_"))}
    return subprocess.run(
        [*map(str, command)], cwd=cwd, env=kept, capture_output=True, text=True, check=False
    )


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-index", "--no-build-isolation"]
    done = run(*pip, "--wheel-dir", folder, ROOT, cwd=folder)
    assert done.returncode == 0, done.stderr
    (built,) = folder.glob("jaxserve-*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The `bin` of an environment with the wheel, and with this one's dependencies but not the repository."""
    folder = tmp_path_factory.mktemp("venv")
    done = run(sys.executable, "-m", "venv", "--without-pip", folder, cwd=folder)
    assert done.returncode == 0, done.stderr
    paths = sysconfig.get_paths(vars={"base": str(folder), "platbase": str(folder)})
    # the .pth files that lie in these folders, such as an editable install's, are not followed
    theirs = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    (Path(paths["purelib"]) / "dependencies.pth").write_text("\n".join(theirs) + "\n")
    python = folder / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps", "--no-index"]
    done = run(*pip, wheel, cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder / "bin"


def test_holds_the_four_packages_and_the_model_and_nothing_else(wheel: Path) -> None:
    names = [name for name in zipfile.ZipFile(wheel).namelist() if not name.endswith("/")]
    inside = {name for name in names if ".dist-info/" not in name}
    on_disk = {
        str(path.relative_to(ROOT))
        for package in PACKAGES
        for path in (ROOT / package).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert inside == on_disk
    assert {f"checkpoints/embedded/model/{name}" for name in ("config.json", "tokenizer.json")} <= inside
    assert any(
        name.startswith("checkpoints/embedded/model/") and name.endswith(".safetensors") for name in inside
    )
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)


def test_the_model_is_small() -> None:
    assert sum(path.stat().st_size for path in MODEL.iterdir()) <= 16 * 2**20


def test_says_what_it_needs(wheel: Path) -> None:
    archive = zipfile.ZipFile(wheel)
    (name,) = (one for one in archive.namelist() if one.endswith(".dist-info/METADATA"))
    metadata = email.message_from_bytes(archive.read(name))
    needs = metadata.get_all("Requires-Dist") or []
    assert metadata["Requires-Python"] == ">=3.12"
    assert "jax<0.13,>=0.11.2" in needs
    assert "jax[cuda13]; extra == 'cuda'" in needs
    assert "jax[tpu]; extra == 'tpu'" in needs
    assert {"cuda", "tpu", "ray", "otel", "test", "bench"} == set(metadata.get_all("Provides-Extra") or [])


def test_imports_from_another_folder(installed: Path, tmp_path: Path) -> None:
    program = "\n".join(
        [
            f"import jaxserve, {', '.join(LEAVES)}",
            "from checkpoints.embedded import MODEL_DIR",
            f"for package in (jaxserve, {', '.join(LEAVES)}): print(package.__file__)",
            "print(MODEL_DIR / 'model.safetensors', (MODEL_DIR / 'tokenizer.json').is_file())",
        ]
    )
    done = run(installed / "python", "-c", program, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    *files, model = done.stdout.splitlines()
    assert len(files) == len(PACKAGES)
    assert all(file.startswith(f"{installed.parent}{os.sep}") for file in [*files, model])
    assert model.endswith("model.safetensors True")


def test_the_command_is_there(installed: Path, tmp_path: Path) -> None:
    done = run(installed / "jaxserve", "--help", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("usage: jaxserve COMMAND")


@pytest.mark.parametrize("leaf", LEAVES)
@pytest.mark.parametrize("form", ["module", "package"])
def test_a_decoy_that_shadows_a_package_of_ours_is_named(
    leaf: str, form: str, installed: Path, tmp_path: Path
) -> None:
    decoy = tmp_path / (f"{leaf}.py" if form == "module" else f"{leaf}/__init__.py")
    decoy.parent.mkdir(exist_ok=True)
    decoy.write_text("raise AssertionError('the decoy was imported')\n")
    done = run(installed / "python", *COMMAND, cwd=tmp_path)
    assert done.returncode == 1, done.stderr
    assert done.stdout == ""
    shown = decoy if form == "module" else decoy.parent
    assert f"error: {leaf!r} was found at {shown}, but jaxserve needs its own" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_script_beside_a_decoy_is_told(installed: Path, tmp_path: Path) -> None:
    (tmp_path / "sharding.py").write_text("raise AssertionError('the decoy was imported')\n")
    script = tmp_path / "script.py"
    script.write_text("from jaxserve import LLM\nLLM()\n")
    done = run(installed / "python", script, cwd=ROOT)
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    assert last.startswith(f"ImportError: 'sharding' was found at {tmp_path / 'sharding.py'}")


def harmless(folder: Path) -> None:
    """A data folder with a package's name, which shadows nothing."""
    (folder / "checkpoints").mkdir()
    (folder / "checkpoints" / "step_100.bin").touch()


def test_a_data_folder_of_that_name_shadows_nothing(installed: Path, tmp_path: Path) -> None:
    harmless(tmp_path)
    program = "from jaxserve._leaves import check_leaves; check_leaves(); import checkpoints.embedded"
    done = run(installed / "python", "-c", program, cwd=tmp_path)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_generates_from_another_folder(installed: Path, tmp_path: Path) -> None:
    """The console script's path begins with its own folder, so that here even a decoy is harmless."""
    harmless(tmp_path)
    module = run(installed / "python", *COMMAND, cwd=tmp_path)
    assert module.returncode == 0, module.stderr
    (tmp_path / "sharding.py").write_text("raise AssertionError('the decoy was imported')\n")
    script = run(installed / "jaxserve", *COMMAND[2:], cwd=tmp_path)
    assert script.returncode == 0, script.stderr
    assert script.stdout == module.stdout
    assert script.stdout.strip("\n")
