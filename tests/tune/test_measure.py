"""The measurement and the whole command, on a real engine with a tiny model."""

from __future__ import annotations

import dataclasses
import functools
import gc
import json
import statistics
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import jax
import pytest

from jaxserve import LLM, build
from jaxserve.cli.main import main
from jaxserve.config import EngineOptions
from jaxserve.engine.engine import Engine
from jaxserve.tune import measure, run
from jaxserve.tune.measure import Bench, Load, gaps_of, rates_of
from jaxserve.tune.options import TuneOptions
from jaxserve.tune.search import Objective, Search, Settings, Unfit
from tests import tiny
from tests.cli.harness import ROOT, environment

SMALL = Settings(max_slots=4, prefill_chunk=32, page_size=16)
OPTIONS = EngineOptions(memory_fraction=0.5, tuned=False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def engine(folder: Path) -> Engine:
    return build.build_engine(
        str(folder), dataclasses.replace(OPTIONS, multi_step=1, **dataclasses.asdict(SMALL))
    )


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "jaxserve" / "tuned"


def test_a_load_is_cut_to_the_context() -> None:
    assert Load(512, 128).within(1024) == Load(512, 128)
    assert Load(512, 128).within(256) == Load(128, 128)
    assert Load(9, 9).within(2) == Load(1, 1)


class Watched:
    """What an engine's steps held, while it is measured: (prompt tokens, rows decoding) of each plan."""

    def __init__(self, engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
        self.plans: list[tuple[int, int]] = []
        plan = engine.scheduler.plan

        def watched(*args: Any) -> Any:
            made = plan(*args)
            rows = 0 if made.decode is None else len(made.decode.slots)
            self.plans.append((sum(len(row.tokens) for row in made.prefill), rows))
            return made

        monkeypatch.setattr(engine.scheduler, "plan", watched)


def test_the_gap_is_a_step_of_all_slots_with_a_whole_chunk(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    watched = Watched(engine, monkeypatch)
    gaps = gaps_of(engine, Load(100, 20), 3)
    assert len(gaps) == 3 and min(gaps) > 0
    whole = [plan for plan in watched.plans if plan[0] == SMALL.prefill_chunk and plan[1] == 3]
    assert len(whole) >= 4  # each repeat, and the one before them that does not count
    assert engine.scheduler.stats()["running"] == engine.scheduler.stats()["waiting"] == 0


def test_the_loop_keeps_every_slot_busy_with_as_many_prompts_as_replies(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a clock that goes 10 ms a step."""
    load = Load(64, 16)
    watched = Watched(engine, monkeypatch)
    clock = types.SimpleNamespace(
        perf_counter=lambda: 0.01 * len(watched.plans), monotonic=lambda: 0.01 * len(watched.plans)
    )
    monkeypatch.setattr(measure, "time", clock)
    rates = rates_of(engine, load, 3, 0.5)
    stats = engine.stats()
    assert stats["running"] >= SMALL.max_slots - 1  # one has just ended
    assert stats["running"] + stats["waiting"] == 2 * SMALL.max_slots
    counted = watched.plans[-150:]
    prompts, drawn = (sum(plan[i] for plan in counted) for i in (0, 1))
    # 64 tokens of prompt for each 15 that decoding draws: the first one comes of the prompt
    assert prompts / drawn == pytest.approx(64 / 15, rel=0.1)
    assert len(rates) == 3
    assert statistics.mean(rates) == pytest.approx(drawn * 16 / 15 / 1.5, rel=0.1)
    assert all(rows > 1 for _, rows in counted)  # they do not all end at once
    engine.scheduler.abort_all()


def test_the_weights_are_read_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loads = []
    real = build.load_params
    monkeypatch.setattr(build, "load_params", lambda *args: loads.append(args) or real(*args))
    said: list[str] = []
    bench = Bench(str(folder), OPTIONS, Load(30, 8), seconds=0.05, say=said.append)
    first = bench.measure("throughput", SMALL)
    lines, arrays = len(said), on_devices()
    second = bench.measure("latency", dataclasses.replace(SMALL, page_size=32))
    assert on_devices() == arrays  # the pool that was measured first has gone
    assert len(loads) == 1 and lines > 3 and len(said) == lines
    for one in (first, second):
        assert (
            len(one.rates) == len(one.gaps) == measure.REPEATS and one.rate > 0 and 0 < one.gap < one.seconds
        )


def on_devices() -> int:
    gc.collect()
    return sum(array.nbytes for array in jax.live_arrays())


def test_a_context_too_short_to_measure_with(folder: Path) -> None:
    with pytest.raises(ValueError, match="a context of 31 tokens is too short"):
        Bench(str(folder), dataclasses.replace(OPTIONS, max_model_len=31), Load(30, 8))


def test_memory_that_does_not_suffice_is_a_reason(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "memory_limit", lambda mesh, fraction, here: 10**5)
    with pytest.raises(Unfit, match=r"100000 bytes may be used\. Lower --max-model-len"):
        Bench(str(folder), OPTIONS, Load(30, 8)).measure("throughput", SMALL)


def test_weights_that_are_there_do_not_count_twice(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is free on a CPU lacks the weights already: room for them once must do for the second setting."""
    bench = Bench(str(folder), OPTIONS, Load(30, 8), seconds=0.01)
    bench.measure("throughput", SMALL)
    weights = bench._part.held
    assert weights == sum(leaf.nbytes for leaf in jax.tree.leaves(bench._part.params))
    plan = build.plan_engine(
        str(folder), dataclasses.replace(OPTIONS, **dataclasses.asdict(SMALL)), lambda line: None
    )
    just = plan.programs.needed() - int(0.5 * weights)
    monkeypatch.setattr(build, "memory_limit", lambda mesh, fraction, here: just)
    bench.measure("throughput", SMALL)
    monkeypatch.setattr(build, "memory_limit", lambda mesh, fraction, here: just // 2)
    with pytest.raises(Unfit, match="bytes may be used"):
        bench.measure("throughput", SMALL)


# -- the command ---------------------------------------------------------------------------------------------


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two settings, neither of them the engine's default, in a second each."""
    grid = {"max_slots": [4], "prefill_chunk": [32], "page_size": [16, 32]}
    monkeypatch.setattr(run, "defaults", lambda objective: SMALL)
    monkeypatch.setattr(run, "Search", lambda *args, **named: Search(*args, **named, grid=grid))
    monkeypatch.setattr(run, "Bench", functools.partial(Bench, seconds=0.1))


def test_what_is_tuned_is_used_and_a_flag_wins(
    short: None, folder: Path, cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = [str(folder), "--objective", "throughput", "--input-tokens", "60", "--output-tokens", "16"]
    assert main(["tune", *line, "--memory-fraction", "0.5"], {"JAXSERVE_SECONDS": "60"}) == 0
    printed = capsys.readouterr()
    [file] = cache.iterdir()
    assert f"throughput: saved in {file}" in printed.out and "warm after" in printed.err
    found = json.loads(file.read_text())["found"]["throughput"]
    values = found["values"]
    assert values in [dataclasses.asdict(dataclasses.replace(SMALL, page_size=size)) for size in (16, 32)]
    assert {one["page_size"] for one in found["tried"]} == {16, 32} and not found["not_tried"]
    assert found["load"] == {"input_tokens": 60, "output_tokens": 16}

    said: list[str] = []
    with LLM(str(folder), memory_fraction=0.5, progress=said.append) as llm:
        stats = llm.stats()
        [result] = llm.generate([[1, 2, 3]])
    names = {"max_slots": "slots", "page_size": "page_size", "prefill_chunk": "prefill_chunk"}
    assert {name: stats[fact] for name, fact in names.items()} == values
    assert len(result.outputs[0].token_ids) > 0
    assert any(str(file) in line and "--max-slots 4" in line for line in said)

    given = EngineOptions(memory_fraction=0.5, max_slots=2, page_size=64)
    own = build.build_engine(str(folder), given)
    assert (own.facts["slots"], own.facts["page_size"], own.facts["prefill_chunk"]) == (2, 64, 32)


def test_no_setting_is_quick_enough(
    short: None, folder: Path, cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = [str(folder), "--objective=latency", "--max-gap-ms=0.001", "--input-tokens=8", "--output-tokens=4"]
    assert main(["tune", *line], {}) == 1
    printed = capsys.readouterr()
    assert "no setting that was tried has gaps of at most 0.001 ms" in printed.out
    assert not cache.exists()


def test_a_model_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    assert main(["tune", str(tmp_path / "empty")], {}) == 1
    printed = capsys.readouterr()
    assert "has no config.json" in printed.err and not printed.out


@pytest.mark.parametrize(
    ("args", "text"),
    [
        (["--objective", "speed"], "--objective"),
        (["--seconds", "0"], "--seconds=0.0 must lie in"),
        (["--input-tokens", "0"], "--input-tokens=0 must lie in"),
        (["--max-gap-ms", "-1"], "--max-gap-ms=-1.0 must be more than 0"),
        (["--mesh", "data=2"], "--mesh data=2: one replica is measured"),
        (["--memory-fraction", "2"], "--memory-fraction=2.0 must lie in"),
        (["--max-slots", "3"], "--max-slots"),
    ],
)
def test_wrong_use(args: list[str], text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["tune", *args], {})
    assert stop.value.code == 2
    assert text in capsys.readouterr().err


def test_help_imports_no_jax() -> None:
    program = (
        "import sys\n"
        "from jaxserve.cli.main import main\n"
        "try:\n    main(['tune', '--help'])\nexcept SystemExit as stop:\n    assert not stop.code\n"
        "assert 'jax' not in sys.modules\n"
    )
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert "--max-gap-ms" in done.stdout and "--no-tuned" in done.stdout


@pytest.mark.parametrize("objective", ["throughput", "latency"])
def test_the_search_begins_with_the_engines_defaults(objective: Objective) -> None:
    chunk = {"throughput": 512, "latency": 128}[objective]
    assert run.defaults(objective) == Settings(max_slots=16, prefill_chunk=chunk, page_size=64)
    assert TuneOptions(objective=objective).objectives == (objective,)
    assert TuneOptions().objectives == ("throughput", "latency")
