"""What the figures were taken on, and whether anything else ran beside them. Linux's /proc alone."""

from __future__ import annotations

import os
import platform
import subprocess
import time
from pathlib import Path
from typing import Any

TOLD_FLAGS = [
    "avx2",
    "avx512f",
    "avx512_vnni",
    "avx512_bf16",
    "avx512_fp16",
    "amx_tile",
    "amx_bf16",
    "amx_int8",
]


def describe() -> dict[str, Any]:
    fields: dict[str, str] = {}
    for line in Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines():
        key, _, value = line.partition(":")
        fields[key.strip()] = value.strip()
    flags = fields.get("flags", fields.get("Features", "")).split()
    return {
        "cpu": fields.get("model name", platform.processor()),
        "family_model_stepping": [fields.get(key) for key in ("cpu family", "model", "stepping")],
        "flags": [flag for flag in TOLD_FLAGS if flag in flags],
        "cores": len(os.sched_getaffinity(0)),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
        "kernel": platform.release(),
        "python": platform.python_version(),
    }


def commit(root: Path) -> str:
    """The checkout's commit, `+` after it where tracked files differ from it."""

    def git(*arguments: str) -> str:
        command = ["git", *arguments]
        return subprocess.run(command, cwd=root, capture_output=True, text=True, check=True).stdout.strip()

    try:
        changed = "+" if git("status", "--short", "-uno") else ""
        return git("rev-parse", "--short=12", "HEAD") + changed
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


class Cpu:
    """Shares of all cores' time since `start`: busy with anything, and stolen by the hypervisor."""

    def __init__(self) -> None:
        self._start = self._read()

    @staticmethod
    def _read() -> tuple[int, int, int]:
        user, nice, system, idle, wait, irq, soft, steal = map(
            int, Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]
        )
        busy = user + nice + system + irq + soft
        return busy, steal, busy + idle + wait + steal

    def shares(self) -> dict[str, float]:
        busy, steal, total = (now - then for now, then in zip(self._read(), self._start, strict=True))
        return {"busy": round(busy / max(total, 1), 3), "stolen": round(steal / max(total, 1), 3)}


def idle_check(seconds: float = 2.0) -> dict[str, float]:
    """How busy the machine is while we do nothing."""
    cpu = Cpu()
    time.sleep(seconds)
    return cpu.shares()
