"""From an ordinary environment into one that holds the chip's compiler, and back."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import tempfile
from collections.abc import Callable, Mapping
from typing import Any

from jaxserve.plan.options import PlanOptions
from pallas_kernels import aot
from pallas_kernels.targets import TARGETS
from sharding.topology import KINDS, Slice

Report = dict[str, Any]
MOST_PASSED_OVER = 3  # meshes that a compiler may die over before the plan is given up


class CompilerMissing(Exception):
    """The environment that compiles for the chip is not there, or holds another jax; the message says what
    makes it."""


class CompilerFailed(Exception):
    """The compiler, or the process that runs it, ended without a report; the message says how. mesh: that it
    compiled for, if it came so far."""

    def __init__(self, message: str, mesh: str | None = None) -> None:
        super().__init__(message)
        self.mesh = mesh


def check_slice(where: Slice) -> None:
    """Raises ValueError for a slice that no compiler here makes programs for."""
    layouts = TARGETS[where.chip].layout
    forms = [KINDS[where.chip].sizes[count] for count in layouts if count in KINDS[where.chip].sizes]
    if where.shape not in forms:
        known = ", ".join(str(Slice(where.chip, shape)) for shape in forms)
        raise ValueError(f"--chips {where}: plans are made for {known}")


def plan(
    config: Mapping[str, Any],
    name: str,
    where: Slice,
    options: PlanOptions,
    progress: Callable[[str], None] = lambda line: None,
) -> Report:
    """The report of `jaxserve.plan.examine`, from a process of its own. config: config.json's object.

    Where the compiler itself dies over the best mesh, the next best is taken, if no mesh was asked for:
    `serve` could not use the former. It and the compiler's words are under `passed_over`.
    Raises CompilerMissing, CompilerFailed, and ValueError for what cannot be planned.
    """
    check_slice(where)
    if lines := aot.missing([where.chip]):
        raise CompilerMissing("; ".join(lines))
    passed_over: list[dict[str, str]] = []
    while True:
        request = {
            "config": dict(config),
            "name": name,
            "chips": str(where),
            "options": dataclasses.asdict(options),
            "avoid": [one["mesh"] for one in passed_over],
        }
        try:
            report = _ask(request, where, progress)
        except CompilerFailed as failure:
            if failure.mesh is None or options.mesh is not None or len(passed_over) == MOST_PASSED_OVER:
                raise
            passed_over.append({"mesh": failure.mesh, "why": str(failure)})
            progress(f"{name} on {where}: mesh {failure.mesh} is passed over: {failure}")
        else:
            return report | {"passed_over": passed_over}


def _ask(request: Report, where: Slice, progress: Callable[[str], None]) -> Report:
    """One process's report. Raises CompilerFailed where it ends without one, ValueError with what it says."""
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(aot.ROOT)}
    environment.pop("XLA_FLAGS", None)  # of the host's backend, which computes nothing here
    report: Report | None = None
    error: str | None = None
    mesh: str | None = None
    with tempfile.TemporaryFile("w+") as log, tempfile.TemporaryFile("w+") as asked:
        json.dump(request, asked)
        asked.seek(0)
        command = [str(aot.python_for(where.chip)), "-m", "jaxserve.plan.worker"]
        with subprocess.Popen(
            command, stdin=asked, stdout=subprocess.PIPE, stderr=log, text=True, env=environment
        ) as process:
            assert process.stdout is not None
            for line in process.stdout:
                try:
                    said = json.loads(line)
                except ValueError:  # a compiler's chatter
                    continue
                if isinstance(said, dict) and "progress" in said:
                    progress(said["progress"])
                elif isinstance(said, dict):
                    report, error = said.get("report", report), said.get("error", error)
                    mesh = said.get("begun", mesh)
            code = process.wait()
        if code or (report is None and error is None):
            log.seek(0)
            raise CompilerFailed(
                f"the compiler's process for {where} exited with {code}: {_last_words(log.read())}", mesh
            )
    if error is not None:
        raise ValueError(error)
    assert report is not None
    return report


def _last_words(log: str) -> str:
    """What a process died of: the failed check of a compiler written in C++, else its last lines."""
    lines = log.strip().splitlines()
    checks = [line.partition("] ")[2] for line in lines if "Check failed:" in line]
    return checks[0] if checks else " | ".join(lines[-5:])
