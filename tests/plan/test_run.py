"""A compiler that dies over a mesh: the next best is planned for, and the report says so."""

from __future__ import annotations

from typing import Any

import pytest

from jaxserve.plan import report as shown
from jaxserve.plan import run
from jaxserve.plan.options import PlanOptions
from jaxserve.plan.run import CompilerFailed, plan
from sharding.topology import parse_slice
from tests.plan.test_examine import made

WHERE = parse_slice("v6e-8")


class Compilers:
    """Dies over some meshes. asked: the meshes to avoid, each time."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, dies_over: list[str | None]) -> None:
        self.asked: list[list[str]] = []
        self._dies_over = dies_over
        monkeypatch.setattr(run.aot, "missing", lambda chips: [])
        monkeypatch.setattr(run, "_ask", self.ask)

    def ask(self, request: dict[str, Any], where: Any, progress: Any) -> dict[str, Any]:
        self.asked.append(request["avoid"])
        if len(self.asked) <= len(self._dies_over):
            raise CompilerFailed("the compiler's process died", self._dies_over[len(self.asked) - 1])
        return made("Llama-3.1-8B", "v6e-8")


def test_the_next_best_mesh_is_taken_and_said(monkeypatch: pytest.MonkeyPatch) -> None:
    compilers = Compilers(monkeypatch, ["data=4,tensor=2,expert=1", "data=2,tensor=4,expert=1"])
    lines: list[str] = []
    report = plan({}, "Llama-3.1-8B", WHERE, PlanOptions(), lines.append)
    first, second = "data=4,tensor=2,expert=1", "data=2,tensor=4,expert=1"
    assert compilers.asked == [[], [first], [first, second]]
    assert [one["mesh"] for one in report["passed_over"]] == [first, second]
    assert "is passed over: the compiler's process died" in lines[0]
    assert f"(not with {first}: the compiler's process died)" in shown.text(report)


def test_a_mesh_that_was_asked_for_is_not_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    compilers = Compilers(monkeypatch, ["data=1,tensor=8,expert=1"])
    with pytest.raises(CompilerFailed, match="died"):
        plan({}, "Llama-3.1-8B", WHERE, PlanOptions(mesh="tensor=8"))
    assert len(compilers.asked) == 1


@pytest.mark.parametrize("dies_over", [[None], ["a", "b", "c", "d"]])
def test_it_is_given_up_in_the_end(monkeypatch: pytest.MonkeyPatch, dies_over: list[str | None]) -> None:
    """Where it died before it compiled anything, and after some meshes."""
    compilers = Compilers(monkeypatch, dies_over)
    with pytest.raises(CompilerFailed, match="died"):
        plan({}, "Llama-3.1-8B", WHERE, PlanOptions())
    assert len(compilers.asked) == len(dies_over)


def test_meshes_to_avoid_are_not_chosen() -> None:
    best = made("Llama-3.1-8B", "v6e-8")["mesh"]
    text = ",".join(f"{axis}={size}" for axis, size in best.items())
    other = made("Llama-3.1-8B", "v6e-8", avoid=[text])
    assert other["fits"] and other["mesh"] != best
    with pytest.raises(ValueError, match="no mesh is left beside"):
        made("Llama-3.1-8B", "v6e-8", mesh="tensor=8", avoid=["data=1,tensor=8,expert=1"])


def test_last_words() -> None:
    log = "chatter\nF1121 21:39:33 1 fusion_util.cc:5151] Check failed: a == b it is not.\n*** trace\n@ 0x1"
    assert run._last_words(log) == "Check failed: a == b it is not."
    assert run._last_words("one\ntwo\n") == "one | two"
