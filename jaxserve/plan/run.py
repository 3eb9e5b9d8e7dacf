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


class CompilerMissing(Exception):
    """The environment that compiles for the chip is not there, or holds another jax; the message says what
    makes it."""


class CompilerFailed(Exception):
    """The compiler, or the process that runs it, ended without a report; the message says how."""


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

    Raises CompilerMissing, CompilerFailed, and ValueError for what cannot be planned.
    """
    check_slice(where)
    if lines := aot.missing([where.chip]):
        raise CompilerMissing("; ".join(lines))
    request = {
        "config": dict(config),
        "name": name,
        "chips": str(where),
        "options": dataclasses.asdict(options),
    }
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(aot.ROOT)}
    environment.pop("XLA_FLAGS", None)  # of the host's backend, which computes nothing here
    report: Report | None = None
    error: str | None = None
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
            code = process.wait()
        if code or (report is None and error is None):
            log.seek(0)
            last = " | ".join(log.read().strip().splitlines()[-5:])
            raise CompilerFailed(f"the compiler's process for {where} exited with {code}: {last}")
    if error is not None:
        raise ValueError(error)
    assert report is not None
    return report
