"""How much memory there is on one device."""

from __future__ import annotations

from pathlib import Path

import jax
import psutil
from jax.sharding import Mesh


def memory_limit(mesh: Mesh, fraction: float, processes_here: int = 1) -> int:
    """Bytes on each of this process's devices in the mesh that weights, pages and programs may take together:
    a fraction of what the device has; on CPU, where devices share the host's memory, of what is free. So do
    the processes of a group that run on this host."""
    device: jax.Device = mesh.local_devices[0]
    stats = device.memory_stats()
    if stats and "bytes_limit" in stats:
        return int(stats["bytes_limit"] * fraction)
    return int(_host_memory() * fraction) // (len(mesh.local_devices) * processes_here)


def _host_memory() -> int:
    """Bytes free on this host, within the container's bound."""
    free = psutil.virtual_memory().available
    try:
        bound = Path("/sys/fs/cgroup/memory.max").read_text().strip()
        used = int(Path("/sys/fs/cgroup/memory.current").read_text())
    except (OSError, ValueError):
        return free
    return min(free, int(bound) - used) if bound.isdecimal() else free
