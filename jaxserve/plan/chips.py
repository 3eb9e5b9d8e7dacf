"""What is known of each chip: `chips.json`, in which every number names its source."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

FILE = Path(__file__).with_name("chips.json")
# of a GPU's memory, what jax takes at the start; the second is the older name
SHARE_VARIABLES = ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION")


@dataclasses.dataclass(frozen=True, slots=True)
class Chip:
    """memory: bytes. runtime_share: of those, what jax takes. bandwidth: of its own memory, bytes/s.
    matrix_rate: dtype -> operations/s. link_bandwidth: bytes/s of one link, one way. hop_seconds: from one
    chip to the next. collective_seconds: to begin a collective."""

    name: str
    memory: int
    runtime_share: float
    bandwidth: float
    matrix_rate: Mapping[str, float]
    network: Literal["torus", "switch"]
    links: int
    link_bandwidth: float
    hop_seconds: float
    collective_seconds: float

    def rate(self, dtype: str) -> float:
        """Operations/s. Raises ValueError for a dtype that the chip has no known rate in."""
        if dtype not in self.matrix_rate:
            known = ", ".join(self.matrix_rate)
            raise ValueError(f"--dtype={dtype}: the rate of {self.name} is known in {known}")
        return self.matrix_rate[dtype]

    def usable(self, environ: Mapping[str, str] = os.environ) -> int:
        """Bytes that jax takes of the chip's memory. Raises ValueError for a share that is no number."""
        share = self.runtime_share
        if share < 1.0:
            for variable in SHARE_VARIABLES:
                if environ.get(variable):
                    share = _share(variable, environ[variable])
                    break
        return int(self.memory * share)

    def all_reduce(self, size: int, devices: int) -> float:
        """Seconds for the sum of `size` bytes over so many devices, at least: as a ring.

        Each device sends and gets 2·(n - 1)/n of them, on a torus along both directions of a ring, behind a
        switch over all its links. A sum goes to the far end and back; NCCL's ring goes round twice.
        """
        if devices == 1:
            return 0.0
        if self.network == "torus":
            rate = self.link_bandwidth * min(2, devices - 1)
            hops = 2 * (devices // 2)
        else:
            rate = self.link_bandwidth * self.links
            hops = 2 * (devices - 1)
        moved = 2 * (devices - 1) / devices * size / rate
        return moved + hops * self.hop_seconds + self.collective_seconds


def _share(variable: str, text: str) -> float:
    try:
        share = float(text)
    except ValueError:
        share = 0.0
    if not 0.0 < share <= 1.0:
        raise ValueError(f"{variable}={text!r} must be a number in (0, 1]")
    return share


@functools.cache
def chips() -> dict[str, Chip]:
    read: dict[str, Any] = json.loads(FILE.read_text(encoding="utf-8"))
    names = {field.name for field in dataclasses.fields(Chip)}
    return {
        name: Chip(name=name, **{key: value for key, value in row.items() if key in names})
        for name, row in read.items()
        if not name.startswith("_")
    }
