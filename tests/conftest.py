"""What every test runs under. Imports no jax, so that the tests without it stay quick.

Settings go through the environment: they hold in the processes that tests start, too. What is set outside
wins where that makes sense (`JAX_PLATFORMS=cuda make test`).
"""

from __future__ import annotations

import gc
import os
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FAKE_DEVICES = (
    8  # CPU devices for the sharded tests; they cost an unsharded test nothing that can be measured
)


def settings(environ: dict[str, str]) -> dict[str, str]:
    flags = environ.get("XLA_FLAGS", "")
    if "--xla_force_host_platform_device_count" not in flags:
        flags = f"{flags} --xla_force_host_platform_device_count={FAKE_DEVICES}".strip()
    defaults = {
        "JAX_PLATFORMS": "cpu",
        # compiled once, in any run of the tests: a program is keyed by its code, the jax and the machine
        "JAX_COMPILATION_CACHE_DIR": str(ROOT / ".pytest_cache" / "xla"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "-1",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        # torch beside jax: no more threads than there are cores
        "OMP_NUM_THREADS": str(min(2, os.cpu_count() or 1)),
        "TOKENIZERS_PARALLELISM": "false",
    }
    return {
        **{name: environ.get(name, value) for name, value in defaults.items()},
        "XLA_FLAGS": flags,
        # what a developer's own `jaxserve tune` or response cache holds is none of the tests' business
        "XDG_CACHE_HOME": str(ROOT / ".pytest_cache" / "home"),
        "XDG_STATE_HOME": str(ROOT / ".pytest_cache" / "state"),
        "JAX_NUMPY_DTYPE_PROMOTION": "strict",
        "JAX_NUMPY_RANK_PROMOTION": "raise",
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
    }


os.environ.update(settings(dict(os.environ)))


def pytest_collection_finish() -> None:
    """What is imported by now stays. A full collection over it took seconds on a busy machine, and a request
    that it happened to fall into was late."""
    gc.collect()
    gc.freeze()
