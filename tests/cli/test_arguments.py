"""The parser: flags, environment, help, and what is refused. In this process, without an engine."""

from __future__ import annotations

import dataclasses
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import jaxserve
from jaxserve.cli.arguments import field_docs, parse
from jaxserve.cli.generate import GenerateArguments
from jaxserve.cli.main import LATER_COMMANDS, main
from jaxserve.cli.serve import ServeArguments
from jaxserve.config import EngineOptions, ServerOptions
from tests.cli.harness import ROOT, environment


def serve(*args: str, **environ: str) -> ServeArguments:
    return parse(ServeArguments, "jaxserve serve", "", args, environ)


def test_defaults() -> None:
    assert serve() == ServeArguments()


def test_options_are_flat() -> None:
    arguments = serve("folder", "--max-slots", "3", "--port=0", "--mesh", "data=1,tensor=2", "--dry-run")
    assert arguments.model == "folder"
    assert arguments.engine == EngineOptions(max_slots=3, mesh="data=1,tensor=2")
    assert arguments.server.port == 0
    assert arguments.dry_run


def test_flag_then_environment_then_default() -> None:
    environ = {"JAXSERVE_MAX_SLOTS": "5", "JAXSERVE_API_KEY": "-odd=key", "JAXSERVE_DRY_RUN": "1"}
    arguments = serve(**environ)
    assert (arguments.engine.max_slots, arguments.server.api_key, arguments.dry_run) == (5, "-odd=key", True)
    arguments = serve("--max-slots", "7", "--no-dry-run", **environ)
    assert (arguments.engine.max_slots, arguments.dry_run) == (7, False)
    assert serve(JAXSERVE_MAX_SLOTS="").engine.max_slots is None


def test_scheduling_options() -> None:
    flags = (
        "--objective latency --reproducible --no-prefix-cache --multi-step 4 --overcommit 1.5 --max-queued 9"
    )
    more = "--max-queued-tokens 1000 --step-timeout 2.5 --response-cache 64 --service-tier flex"
    arguments = serve(*flags.split(), *more.split())
    assert arguments.engine == EngineOptions(
        objective="latency",
        reproducible=True,
        prefix_cache=False,
        multi_step=4,
        overcommit=1.5,
        max_queued=9,
        max_queued_tokens=1000,
        step_timeout=2.5,
        response_cache=64,
    )
    assert arguments.server.service_tier == "flex"
    environ = {"JAXSERVE_REPRODUCIBLE": "1", "JAXSERVE_PREFIX_CACHE": "0", "JAXSERVE_OBJECTIVE": "latency"}
    engine = serve(**environ).engine
    assert (engine.reproducible, engine.prefix_cache, engine.objective) == (True, False, "latency")
    assert not serve("--no-reproducible", **environ).engine.reproducible


def test_the_chunk_follows_the_objective_unless_it_is_given() -> None:
    assert serve().engine.chunk_tokens == 512
    assert serve("--objective", "latency").engine.chunk_tokens == 128
    assert serve("--objective", "latency", "--prefill-chunk", "64").engine.chunk_tokens == 64


def test_sizes_that_nobody_gave_have_defaults() -> None:
    """What `jaxserve tune` saved comes in between: see `build.with_sizes`."""
    nothing, given = serve().engine, serve("--max-slots", "3", "--page-size", "8", "--no-tuned").engine
    assert (nothing.max_slots, nothing.page_size, nothing.prefill_chunk) == (None, None, None)
    assert (nothing.slots, nothing.page_tokens, nothing.tuned) == (16, 64, True)
    assert (given.slots, given.page_tokens, given.tuned) == (3, 8, False)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("load_format", "dumy", "--load-format='dumy' must be one of auto, dummy"),
        ("dtype", "int3", "--dtype='int3' must be one of auto, bfloat16, float16, float32"),
        ("dtype", None, "--dtype=None must be one of"),
        ("objective", ["latency"], "--objective=['latency'] must be one of throughput, latency"),
        ("max_queued", None, "--max-queued=None must be an integer"),
        ("max_slots", True, "--max-slots=True must be an integer"),
        ("page_size", 64.0, "--page-size=64.0 must be an integer"),
        ("max_model_len", 1.5, "--max-model-len=1.5 must be an integer"),
        ("kv_pages", "9", "--kv-pages='9' must be an integer"),
        ("overcommit", True, "--overcommit=True must be a number"),
        ("memory_fraction", "half", "--memory-fraction='half' must be a number"),
        ("reproducible", "no", "--reproducible='no' must be true or false"),
        ("mesh", 2, "--mesh=2 must be a text"),
        ("mesh", "foo=2", "--mesh 'foo=2': 'foo' is not an axis"),
    ],
)
def test_options_of_a_wrong_type_or_choice_are_named(name: str, value: Any, message: str) -> None:
    """`LLM` has no parser before it, as the command line has."""
    with pytest.raises(ValueError, match=re.escape(message)):
        EngineOptions(**{name: value})
    EngineOptions(overcommit=2, max_model_len=None)


def test_server_options_likewise() -> None:
    with pytest.raises(ValueError, match="--service-tier='fast' must be one of default, flex"):
        ServerOptions(service_tier="fast")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"--port=8000\.0 must be an integer"):
        ServerOptions(port=8000.0)  # type: ignore[arg-type]


def test_stop_may_be_repeated() -> None:
    arguments = parse(GenerateArguments, "jaxserve generate", "", ["--stop", "a", "--stop", "b c"], {})
    assert arguments.sampling.stop == ("a", "b c")


@pytest.mark.parametrize(
    ("args", "environ", "text"),
    [
        (["--max-slots", "0"], {}, "--max-slots=0 must lie in [1, 4096]"),
        (["--max-slots", "x"], {}, "--max-slots"),
        (["--page-size", "48"], {}, "--page-size=48 must be a power of two"),
        (["--port", "70000"], {}, "--port=70000 must lie in"),
        (["--prefill-chunk", "8"], {}, "--prefill-chunk=8 must lie in [16, 65536]"),
        (["--objective", "both"], {}, "--objective"),
        (["--multi-step", "0"], {}, "--multi-step=0 must lie in [1, 64]"),
        (["--multi-step", "65"], {}, "--multi-step=65 must lie in"),
        (["--overcommit", "0.5"], {}, "--overcommit=0.5 must lie in [1.0, 16.0]"),
        (["--overcommit", "nan"], {}, "--overcommit=nan must lie in"),
        (["--max-queued", "0"], {}, "--max-queued=0 must lie in [1, 1048576]"),
        (["--max-queued-tokens", "-1"], {}, "--max-queued-tokens=-1 must lie in"),
        (["--step-timeout", "0"], {}, "--step-timeout=0.0 must lie in [0.1, 86400.0]"),
        (["--step-timeout", "inf"], {}, "--step-timeout=inf must lie in"),
        (["--response-cache", "-1"], {}, "--response-cache=-1 must lie in [0, 1048576]"),
        (["--service-tier", "scale"], {}, "--service-tier"),
        ([], {"JAXSERVE_REPRODUCIBLE": "perhaps"}, "JAXSERVE_REPRODUCIBLE='perhaps' must be 1 or 0"),
        (["--dtype", "int3"], {}, "--dtype"),
        (["--mesh", "foo=2"], {}, "--mesh 'foo=2': 'foo' is not an axis; they are data, tensor, expert"),
        (["--mesh", "tensor=0"], {}, "--mesh 'tensor=0': 'tensor=0' must be tensor=N with N at least 1"),
        ([], {"JAXSERVE_MESH": "2"}, "--mesh '2': '2' is not an axis"),
        (["--nonsense", "1"], {}, "--nonsense"),
        (["a", "b"], {}, "b"),
        ([], {"JAXSERVE_MAX_SLOTS": "x"}, "from the environment: JAXSERVE_MAX_SLOTS"),
        ([], {"JAXSERVE_DRY_RUN": "maybe"}, "JAXSERVE_DRY_RUN='maybe' must be 1 or 0"),
    ],
)
def test_wrong_use(
    args: list[str], environ: dict[str, str], text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        serve(*args, **environ)
    assert stop.value.code == 2
    captured = capsys.readouterr()
    assert text in captured.err
    assert captured.out == ""


def test_sampling_is_checked_before_the_model_is_loaded(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        parse(GenerateArguments, "jaxserve generate", "", ["--prompt", "a", "--top-p", "2"], {})
    assert stop.value.code == 2
    assert "top_p=2.0 must lie in (0, 1]" in capsys.readouterr().err


@pytest.mark.parametrize("name", LATER_COMMANDS)
def test_commands_that_come_later(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([name, "--help"], {}) == 2
    assert capsys.readouterr().err == f"error: the command {name!r} is not available yet\n"


def test_no_command_and_an_unknown_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([], {}) == 2
    assert "usage: jaxserve COMMAND" in capsys.readouterr().err
    assert main(["--help"], {}) == 0
    assert "usage: jaxserve COMMAND" in capsys.readouterr().out
    assert main(["--version"], {}) == 0
    assert capsys.readouterr().out == f"{jaxserve.__version__}\n"
    assert main(["dance"], {}) == 2
    assert "there is no command 'dance'; there are: serve, generate, chat" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["serve", "generate", "chat"])
def test_help_is_quick_and_imports_no_jax(name: str) -> None:
    program = (
        "import sys\n"
        "from jaxserve.cli.main import main\n"
        "try:\n"
        f"    main(['{name}', '--help'])\n"
        "except SystemExit as stop:\n"
        "    assert not stop.code\n"
        "assert 'jax' not in sys.modules and 'starlette' not in sys.modules\n"
    )
    before = os.times().children_user
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "--max-slots" in done.stdout
    assert "sequences that decode together" in done.stdout
    assert os.times().children_user - before < 3  # seconds of its processor, whatever runs beside it


def test_nothing_on_this_side_imports_jax() -> None:
    """The port is bound before jax, which takes seconds, is imported."""
    program = "import sys, jaxserve.llm, jaxserve.server.run; assert 'jax' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, env=environment(), timeout=30, check=True)


def test_every_engine_option_has_a_help_text() -> None:
    docs = field_docs(EngineOptions)
    assert list(docs) == [field.name for field in dataclasses.fields(EngineOptions)]
    assert docs["memory_fraction"].endswith("that weights, pool and programs may take.")


@pytest.mark.parametrize(
    "program",
    [
        "from jaxserve.cli.main import main; raise SystemExit(main(['serve']))",
        "import jaxserve; jaxserve.LLM(max_slots=3)",
    ],
)
def test_a_shadowed_leaf_is_named(program: str, tmp_path: Path) -> None:
    """A user's own `sharding.py` beside what runs is found before ours; we say so, and where it is."""
    (tmp_path / "sharding.py").write_text("raise RuntimeError('the wrong one')\n")
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert done.returncode == 1
    assert f"'sharding' was found at {tmp_path / 'sharding.py'}" in done.stderr
    assert f"jaxserve needs its own, at {ROOT / 'sharding'}" in done.stderr
