"""--coordinator, --processes and --process-id: together or not at all."""

from __future__ import annotations

from pathlib import Path

import pytest

from jaxserve.cli.main import main
from jaxserve.config import GroupOptions
from sharding.distributed import Group, GroupError, Place


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--processes", "2"], "--coordinator, --processes and --process-id go together"),
        (["--coordinator", "a:1", "--processes", "2"], "go together"),
        (
            ["--coordinator", "a", "--processes", "2", "--process-id", "0"],
            "--coordinator='a' must be HOST:PORT",
        ),
        (["--coordinator", "a:0", "--processes", "2", "--process-id", "0"], "must be HOST:PORT"),
        (["--coordinator", ":1", "--processes", "2", "--process-id", "0"], "must be HOST:PORT"),
        (
            ["--coordinator", "a:1", "--processes", "0", "--process-id", "0"],
            "--processes=0 must be at least 1",
        ),
        (
            ["--coordinator", "a:1", "--processes", "2", "--process-id", "2"],
            "--process-id=2 must lie in [0, 1]",
        ),
        (
            ["--coordinator", "a:1", "--processes", "2", "--process-id", "-1"],
            "--process-id=-1 must lie in [0, 1]",
        ),
        (
            ["--dry-run", "--coordinator", "a:1", "--processes", "2", "--process-id", "1"],
            "--dry-run says what one process would do",
        ),
    ],
)
def test_wrong_use(flags: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["serve", *flags], {})
    assert stop.value.code == 2
    assert words in capsys.readouterr().err


def test_the_environment_says_it_too(capsys: pytest.CaptureFixture[str]) -> None:
    environ = {"JAXSERVE_COORDINATOR": "a:1", "JAXSERVE_PROCESSES": "2", "JAXSERVE_PROCESS_ID": "7"}
    with pytest.raises(SystemExit):
        main(["serve"], environ)
    assert "--process-id=7 must lie in [0, 1]" in capsys.readouterr().err


def test_places() -> None:
    assert GroupOptions().place() is None
    assert GroupOptions("a:1", 1, 0).place() is None  # alone: no group is needed
    place = GroupOptions("[::1]:8476", 2, 1).place()
    assert place == Place("[::1]:8476", 2, 1)
    assert place.host == "::1" and not place.leads and Place("a:1", 2, 0).leads


def test_all_must_be_started_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    said = [{"jax": "1", "--seed": 0}, {"jax": "1", "--seed": 0}, {"jax": "1", "--seed": 5}]
    group = Group(Place("a:1", 3, 1))
    monkeypatch.setattr(group, "exchange", lambda value: said)
    with pytest.raises(GroupError, match="--seed is 0 on process 0 and 5 on process 2"):
        group.agree(said[1])
    said.pop()
    group.agree(said[1])


def test_manifests_name_flags_that_exist() -> None:
    """What the manifests and the images pass on the command line, `serve` takes."""
    from jaxserve.cli.arguments import _flatten
    from jaxserve.cli.serve import ServeArguments

    known = {f"--{field.name.replace('_', '-')}" for field in _flatten(ServeArguments)}
    deploy = Path(__file__).resolve().parent.parent.parent / "deploy"
    passed = set()
    for file in (deploy / "kubernetes").glob("leaderworkerset-*.yaml"):
        lines = (line.strip() for line in file.read_text().splitlines())
        passed |= {line[2:].partition("=")[0] for line in lines if line.startswith("- --")}
    for file in (deploy / "docker").iterdir():
        entry = next(line for line in file.read_text().splitlines() if line.startswith("ENTRYPOINT"))
        passed |= {part.strip(' "[]') for part in entry.split(",") if '"--' in part}
    assert {"--coordinator", "--processes", "--process-id", "--host", "--port"} <= passed <= known
