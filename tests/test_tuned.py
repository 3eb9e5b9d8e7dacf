"""What `jaxserve tune` saved: the file, for what it is read again, and where it is not used."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import stat
from pathlib import Path
from typing import Any

import jax
import pytest

from jaxserve import build, tuned
from jaxserve.config import EngineOptions
from sharding import make_mesh, parse_mesh
from tests import tiny

FACTS = {"config.json": "abc", "devices": 1, "mesh": {"data": 1, "tensor": 2}, "max_model_len": 256}
VALUES = {"max_slots": 32, "page_size": 16, "prefill_chunk": 256}
FOUND = {"values": VALUES, "date": "2026-01-02T03:04:05+00:00", "tried": [{"max_slots": 32}]}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "jaxserve" / "tuned"


def nobody(line: str) -> None:
    raise AssertionError(f"nothing is wrong, but: {line}")


# -- the file ----------------------------------------------------------------------------------------------


def test_there_and_back(cache: Path) -> None:
    assert tuned.read(FACTS, "throughput", nobody) is None
    file = tuned.save("a model", FACTS, "throughput", FOUND)
    assert file.parent == cache
    assert tuned.read(FACTS, "throughput", nobody) == tuned.Tuned(file, VALUES, str(FOUND["date"]))
    content = json.loads(file.read_text())
    assert (content["model"], content["valid_for"]) == ("a model", FACTS)
    assert content["found"]["throughput"]["tried"] == [{"max_slots": 32}]
    assert [one.name for one in cache.iterdir()] == [file.name]  # nothing half written


def test_each_objective_has_its_own_and_leaves_the_other() -> None:
    tuned.save("m", FACTS, "throughput", FOUND)
    assert tuned.read(FACTS, "latency", nobody) is None
    other = FOUND | {"values": VALUES | {"max_slots": 8}}
    tuned.save("m", FACTS, "latency", other)
    for objective, slots in (("throughput", 32), ("latency", 8)):
        found = tuned.read(FACTS, objective, nobody)
        assert found is not None and found.values["max_slots"] == slots


def test_without_a_variable_it_lies_in_the_home_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/home/ann")
    assert tuned.folder() == Path("/home/ann/.cache/jaxserve/tuned")


@pytest.mark.parametrize("name", list(FACTS))
def test_whatever_it_holds_for_is_another_file(name: str) -> None:
    tuned.save("m", FACTS, "throughput", FOUND)
    assert tuned.read({**FACTS, name: "another"}, "throughput", nobody) is None


def test_the_order_of_facts_is_none_of_them() -> None:
    tuned.save("m", FACTS, "throughput", FOUND)
    assert tuned.read(dict(reversed(FACTS.items())), "throughput", nobody) is not None


def damaged(**changes: Any) -> str:
    whole = {"version": 1, "model": "m", "valid_for": FACTS, "found": {"throughput": FOUND}}
    return json.dumps(whole | changes)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "it is no JSON"),
        (damaged()[:-40], "it is no JSON"),
        ("\0\xff", "it is no JSON"),
        ("[" * 100_000, "it is no JSON"),
        ("[]", "not a file of this version"),
        (damaged(version=2), "not a file of this version"),
        (damaged(valid_for={**FACTS, "devices": 8}), "measured for another model, machine or version"),
        (damaged(found=[]), "`found` is missing"),
        (damaged(found={"throughput": 5}), "has not the values"),
        (damaged(found={"throughput": {"values": {"max_slots": 3}}}), "has not the values"),
        (damaged(found={"throughput": {"values": VALUES | {"more": 1}}}), "has not the values"),
        (damaged(found={"throughput": {"values": VALUES | {"max_slots": None}}}), "has not the values"),
        (damaged(found={"throughput": {"values": VALUES | {"max_slots": "9"}}}), "--max-slots='9' must be"),
        (damaged(found={"throughput": {"values": VALUES | {"page_size": 48}}}), "--page-size=48 must be a"),
    ],
)
def test_a_damaged_or_foreign_file_is_named_and_ignored(text: str, reason: str, cache: Path) -> None:
    file = tuned.tuned_file(FACTS)
    cache.mkdir(parents=True)
    file.write_text(text, encoding="latin-1")
    lines: list[str] = []
    assert tuned.read(FACTS, "throughput", lines.append) is None
    [line] = lines
    assert line.startswith(f"warning: {file} is ignored: ") and reason in line
    tuned.save("m", FACTS, "throughput", FOUND)  # and can be replaced
    assert tuned.read(FACTS, "throughput", nobody) is not None


def test_a_file_that_cannot_be_read_is_ignored_too(cache: Path) -> None:
    tuned.tuned_file(FACTS).mkdir(parents=True)
    lines: list[str] = []
    assert tuned.read(FACTS, "throughput", lines.append) is None
    assert "cannot be read (Is a directory)" in lines[0]


def test_what_fails_half_way_leaves_the_old_file(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tuned.save("m", FACTS, "throughput", FOUND)
    before = file.read_bytes()

    def fail(source: object, target: object) -> None:
        raise OSError(28, "no space left")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", fail)
        with pytest.raises(OSError, match="no space left"):
            tuned.save("m", FACTS, "throughput", FOUND | {"date": "later"})
    assert file.read_bytes() == before
    assert [one.name for one in cache.iterdir()] == [file.name]
    assert stat.S_IMODE(file.stat().st_mode) & 0o600 == 0o600


# -- what the engine is started with -----------------------------------------------------------------------


@pytest.fixture
def loaded(tmp_path: Path) -> build.Loaded:
    folder = tiny.write_model(tmp_path / "tiny")
    return build.read_model(str(folder), EngineOptions())


def sizes(
    loaded: build.Loaded, options: EngineOptions, *, mesh: str = "", alike: bool = True
) -> tuple[tuple[int | None, int | None, int | None], list[str]]:
    lines: list[str] = []
    made = make_mesh(parse_mesh(mesh))
    got = build.with_sizes(options, loaded, made, lines.append, measured_alike=alike)
    assert dataclasses.replace(got, max_slots=None, page_size=None, prefill_chunk=None) == (
        dataclasses.replace(options, max_slots=None, page_size=None, prefill_chunk=None)
    )
    return (got.max_slots, got.page_size, got.prefill_chunk), lines


def saved(loaded: build.Loaded, objective: str = "throughput", mesh: str = "", **values: int) -> Path:
    facts = build.tuned_for(loaded, make_mesh(parse_mesh(mesh)))
    return tuned.save(loaded.name, facts, objective, FOUND | {"values": VALUES | values})


def test_nothing_saved_means_the_defaults(loaded: build.Loaded) -> None:
    assert sizes(loaded, EngineOptions()) == ((16, 64, 512), [])
    assert sizes(loaded, EngineOptions(objective="latency")) == ((16, 64, 128), [])


def test_saved_sizes_are_used_and_named(loaded: build.Loaded) -> None:
    file = saved(loaded)
    got, [line] = sizes(loaded, EngineOptions())
    assert got == (32, 16, 256)
    assert line == (
        "--max-slots 32 --page-size 16 --prefill-chunk 256: from `jaxserve tune` of"
        f" 2026-01-02T03:04:05+00:00, {file}; --no-tuned leaves them out"
    )
    assert sizes(loaded, EngineOptions(objective="latency")) == ((16, 64, 128), [])
    saved(loaded, "latency", max_slots=4)
    assert sizes(loaded, EngineOptions(objective="latency"))[0] == (4, 16, 256)
    assert sizes(loaded, EngineOptions())[0] == (32, 16, 256)


def test_a_flag_wins(loaded: build.Loaded) -> None:
    saved(loaded)
    got, [line] = sizes(loaded, EngineOptions(max_slots=16))  # the default, but said
    assert got == (16, 16, 256) and "max-slots" not in line
    assert sizes(loaded, EngineOptions(max_slots=8, page_size=64, prefill_chunk=512)) == ((8, 64, 512), [])


def test_where_they_are_not_used(loaded: build.Loaded) -> None:
    file = saved(loaded)
    defaults = (16, 64, 512)
    assert sizes(loaded, EngineOptions(tuned=False)) == (defaults, [])
    # a group of processes, or beside prefill replicas: nobody measured that
    assert sizes(loaded, EngineOptions(), alike=False) == (defaults, [])
    assert sizes(loaded, EngineOptions(reproducible=True, tuned=False)) == (defaults, [])
    got, [line] = sizes(loaded, EngineOptions(reproducible=True))
    assert got == defaults
    assert line.startswith("--reproducible: --max-slots 32 --page-size 16") and str(file) in line
    got, [line] = sizes(loaded, EngineOptions(reproducible=True, page_size=32))
    assert got == (16, 32, 512) and "page-size" not in line


def test_pages_that_are_counted_keep_their_size(loaded: build.Loaded) -> None:
    saved(loaded)
    assert sizes(loaded, EngineOptions(kv_pages=99))[0] == (32, 64, 256)


def test_another_model_machine_or_context_has_its_own(
    loaded: build.Loaded, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved(loaded)
    defaults = ((16, 64, 512), [])
    assert sizes(loaded, EngineOptions(), mesh="tensor=2") == defaults
    for other in (EngineOptions(dtype="bfloat16"), EngineOptions(max_model_len=128)):
        assert sizes(build.read_model(str(loaded.folder), other), other) == defaults
    changed = build.read_model(str(tiny.write_model(tmp_path / "other", rope_theta=5.0)), EngineOptions())
    assert sizes(changed, EngineOptions()) == defaults
    for name, value in (("__version__", "9"), ("tuned.processor", lambda: "another, 2 core(s)")):
        with monkeypatch.context() as patch:
            patch.setattr(f"jaxserve.build.{name}", value)
            assert sizes(loaded, EngineOptions()) == defaults
    with monkeypatch.context() as patch:
        patch.setattr(jax, "__version__", "9.9")
        assert sizes(loaded, EngineOptions()) == defaults
    same = build.read_model(str(tiny.write_model(tmp_path / "again", seed=1)), EngineOptions())
    assert sizes(same, EngineOptions())[0] == (32, 16, 256)  # other weights of the same shape run alike


def test_a_damaged_file_is_a_warning_at_start(loaded: build.Loaded) -> None:
    file = saved(loaded)
    file.write_text("{")
    got, [line] = sizes(loaded, EngineOptions())
    assert got == (16, 64, 512) and line.startswith(f"warning: {file} is ignored")


def test_a_dry_run_shows_them(loaded: build.Loaded) -> None:
    saved(loaded, max_slots=2, prefill_chunk=32)
    said: list[str] = []
    text = build.dry_run(str(loaded.folder), EngineOptions(memory_fraction=0.5), said.append)
    assert "pages of 16 tokens" in text and "slots: 2;" in text and "prefill 32" in text
    assert any("jaxserve tune" in line for line in said)


# -- what follows from them --------------------------------------------------------------------------------


class Built:
    """In the place of an engine: what it was asked for, with sizes as saved."""

    params = None

    def __init__(self, options: EngineOptions, size: int) -> None:
        self.options = options
        self.facts = {
            "slots": 32 if options.max_slots is None else options.max_slots,
            "page_size": size if options.page_size is None else options.page_size,
            "prefill_chunk": 256 if options.prefill_chunk is None else options.prefill_chunk,
            "pages_total": 64,
            "dtype": "float32",
        }


def test_answers_are_kept_apart_by_the_sizes_that_ran(
    loaded: build.Loaded, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The response cache must not take one page size's answers for another's: bits may differ."""
    prints = []
    for size in (16, 64):
        made = Built(EngineOptions(), size)
        monkeypatch.setattr(build, "build_engine", lambda *args, made=made, **named: made)
        monkeypatch.setattr(build, "CachingEngine", lambda engine, cache: engine)
        build.build_serving(str(loaded.folder), EngineOptions(response_cache=1))
        prints.append(made.facts["fingerprint"])
    given = EngineOptions(max_slots=32, page_size=16, prefill_chunk=256)
    assert prints[0] == build.fingerprint(loaded.folder, given, "float32") != prints[1]


def test_replicas_all_take_the_first_ones_sizes(
    loaded: build.Loaded, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file that changes while they start must not make them differ."""
    came = iter([16, 64, 64])
    made: list[Built] = []

    def build_engine(model: str, options: EngineOptions, **named: Any) -> Built:
        made.append(Built(options, next(came)))
        return made[-1]

    monkeypatch.setattr(build, "build_engine", build_engine)
    build.build_serving(str(loaded.folder), EngineOptions(mesh="data=3"))
    assert [one.facts["page_size"] for one in made] == [16] * 3
    assert made[0].options.page_size is None


def test_the_processor_has_a_name_and_cores() -> None:
    assert re.fullmatch(r".+, \d+ core\(s\)", tuned.processor())
