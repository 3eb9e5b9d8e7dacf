"""The layers: imports point right only. Read from the source, so that a lazy import counts too.

cli, server, llm, plan -> build -> engine -> {scheduler, models, text};   models -> {pallas_kernels, sharding}
build -> weights -> {models, checkpoints}
"""

from __future__ import annotations

import ast
import graphlib
import itertools
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("jaxserve", "sharding", "pallas_kernels", "checkpoints")

# what each layer may import directly beside what those may import in turn
RIGHT_OF = {
    "jaxserve": {"jaxserve.llm", "jaxserve.scheduler"},  # the lazy LLM and SamplingParams
    "jaxserve.__main__": {"jaxserve.cli"},
    "jaxserve.cli": {
        "jaxserve.llm",
        "jaxserve.server",
        "jaxserve.plan",
        "jaxserve.tune",
        "jaxserve.build",
        "jaxserve.prompts",
    },
    "jaxserve.llm": {"jaxserve.build", "jaxserve.prompts"},
    "jaxserve.server": {"jaxserve.build", "jaxserve.prompts"},
    "jaxserve.plan": {"jaxserve.build"},
    "jaxserve.tune": {"jaxserve.build"},
    "jaxserve.prompts": {"jaxserve.protocols"},
    "jaxserve.protocols": {"jaxserve.engine"},
    "jaxserve.response_cache": {"jaxserve.protocols"},
    "jaxserve.tuned": {"jaxserve.config"},
    "jaxserve.replicas": {"jaxserve.protocols"},
    "jaxserve.disaggregated": {"jaxserve.protocols"},
    "jaxserve.build": {
        "jaxserve.disaggregated",
        "jaxserve.replicas",
        "jaxserve.response_cache",
        "jaxserve.tuned",
        "jaxserve.generation_defaults",
        "jaxserve.pooling",
        "jaxserve.engine",
        "jaxserve.warm_up",
        "jaxserve.weights",
        "jaxserve.memory",
        "jaxserve.config",
        "jaxserve._leaves",
    },
    "jaxserve.generation_defaults": {"checkpoints"},
    "jaxserve.pooling": {"jaxserve.scheduler"},
    "jaxserve.warm_up": {"jaxserve.engine"},
    "jaxserve.weights": {"jaxserve.orbax_weights", "jaxserve.models", "checkpoints"},
    "jaxserve.orbax_weights": {"jaxserve.models", "checkpoints"},
    "jaxserve.memory": set(),
    "jaxserve.engine": {"jaxserve.scheduler", "jaxserve.models", "jaxserve.text"},
    "jaxserve.models": {"pallas_kernels", "sharding"},
    "jaxserve.config": {"sharding"},  # how a mesh is spelled, without jax
    "jaxserve._leaves": set(),
    "jaxserve.scheduler": set(),
    "jaxserve.text": set(),
    "pallas_kernels": set(),
    "sharding": set(),
    "checkpoints": set(),
}
# read by everyone, and reading nothing: the version
EVERYWHERE = {"jaxserve"}


def layer(module: str) -> str:
    """The layer of `jaxserve.engine.step` is `jaxserve.engine`, that of `sharding.mesh` is `sharding`."""
    return ".".join(module.split(".")[: 2 if module.startswith("jaxserve.") else 1])


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def modules() -> dict[str, Path]:
    return {module_name(path): path for package in PACKAGES for path in (ROOT / package).rglob("*.py")}


def imports(path: Path, known: set[str]) -> Iterator[tuple[int, str]]:
    """(line, module) for each import of ours in the file, whatever it stands in."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: a relative import"
            base = node.module or ""
            # `from jaxserve import llm` imports a module, `from jaxserve import __version__` does not
            found = [name if (name := f"{base}.{alias.name}") in known else base for alias in node.names]
        else:
            continue
        yield from ((node.lineno, name) for name in found if name.split(".")[0] in PACKAGES)


def allowed(name: str) -> set[str]:
    reached, todo = set(EVERYWHERE), [name]
    while todo:
        one = todo.pop()
        if one not in reached or one == name:
            reached.add(one)
            todo += RIGHT_OF[one]
    return reached


def test_the_layers_have_no_circle() -> None:
    order = list(graphlib.TopologicalSorter(RIGHT_OF).static_order())
    assert set(order) == set(RIGHT_OF)


def test_every_module_has_a_layer() -> None:
    assert {layer(name) for name in modules()} == set(RIGHT_OF)


def test_imports_point_right() -> None:
    known = set(modules())
    wrong = [
        f"{path.relative_to(ROOT)}:{line}: {layer(name)} imports {target}"
        for name, path in modules().items()
        for line, target in imports(path, known)
        if layer(target) not in allowed(layer(name))
    ]
    assert not wrong, "\n".join(wrong)


def test_the_rule_sees_what_it_should(tmp_path: Path) -> None:
    file = tmp_path / "x.py"
    file.write_text(
        "import sharding.mesh\n"
        "def f():\n    from jaxserve import llm, __version__\n    import numpy.sharding\n"
    )
    assert list(imports(file, set(modules()))) == [(1, "sharding.mesh"), (3, "jaxserve.llm"), (3, "jaxserve")]
    assert "jaxserve.engine" not in allowed("jaxserve.models")
    assert "sharding" in allowed("jaxserve.cli")
    assert allowed("checkpoints") == {"checkpoints", *EVERYWHERE}


# -- what importing loads; for the scheduler see tests/scheduler/test_no_jax.py ---------------------------

LIGHT = {
    # module: what must not come with it
    "jaxserve": ("jax", "numpy", "tokenizers", "starlette"),
    "jaxserve.cli.main": ("jax", "numpy", "tokenizers", "starlette"),
    "jaxserve.text.tokenizer": ("jax", "starlette"),
    "sharding.mesh": ("jax",),
}


@pytest.mark.parametrize(("module", "heavy"), LIGHT.items(), ids=list(LIGHT))
def test_importing_stays_light(module: str, heavy: tuple[str, ...]) -> None:
    program = f"import sys, {module}; print(*sorted(set({heavy}) & set(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == []


def test_packages_are_packages() -> None:
    """A folder without `__init__.py` would import here and be missed by tools."""
    folders = {parent for path in modules().values() for parent in itertools.islice(path.parents, 1)}
    assert [str(folder) for folder in folders if not (folder / "__init__.py").is_file()] == []
