"""Runs the command line as a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def environment(**variables: str) -> dict[str, str]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith("JAXSERVE_")}
    return {**clean, "PYTHONPATH": str(ROOT), **variables}


def command(*args: str) -> list[str]:
    return [sys.executable, "-m", "tests.cli", *args]


def jaxserve(*args: str, stdin: str = "", **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(*args),
        cwd=ROOT,
        env=environment(**variables),
        input=stdin,
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
