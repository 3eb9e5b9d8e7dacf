"""A peer's process as its parent sees it: a command, a JSON line each, and its answer. See `worker.py`."""

from __future__ import annotations

import dataclasses
import json
import os
import select
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.peers import Settings

ROOT = Path(__file__).resolve().parent.parent.parent
PATIENCE_S = 1800.0  # for one answer: a cold compile is in it


class Failed(Exception):
    """A peer that cannot be measured; the message is for the report."""


class Worker:
    """A peer's process."""

    def __init__(self, name: str, settings: Settings, logs: Path) -> None:
        self.name = name
        self._log = logs / f"{name}-{settings.dtype}.log"
        told = json.dumps(dataclasses.asdict(settings))
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.peers.worker", name, told],
            cwd=ROOT,
            env={**os.environ, "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log.open("w"),
            text=True,
        )

    def ready(self) -> Any:
        """Its versions. Raises Failed."""
        return self._answer()["versions"]

    def ask(self, do: str, **what: Any) -> dict[str, Any]:
        assert self._process.stdin is not None
        try:
            print(json.dumps({"do": do, **what}), file=self._process.stdin, flush=True)
        except BrokenPipeError as error:
            raise Failed(self._last_words()) from error
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        # a line is written at once, so that what select sees is whole
        if not select.select([self._process.stdout], [], [], PATIENCE_S)[0]:
            raise Failed(f"no answer for {PATIENCE_S:.0f} s")
        line = self._process.stdout.readline()
        if not line:
            raise Failed(self._last_words())
        value: dict[str, Any] = json.loads(line)
        if "error" in value:
            raise Failed(value["error"])
        return value

    def _last_words(self) -> str:
        lines = self._log.read_text(errors="replace").strip().splitlines()[-3:]
        return f"its process ended with {self._process.wait()}: {' | '.join(lines)}"

    def close(self) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.close()
            self._process.wait(10)
        except (OSError, subprocess.TimeoutExpired):
            self._process.kill()
            self._process.wait()
