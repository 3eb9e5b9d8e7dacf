"""Which chip a kernel is traced for, by the names that people use: v5e, v6e, v5p, h100, …"""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Mapping

import jax

logger = logging.getLogger(__name__)
ShapeDtype = jax.Array | jax.ShapeDtypeStruct

# what jax calls a device -> its short name; the first that occurs in the device's kind decides
_NAMES = {
    "TPU v5 lite": "v5e",
    "TPU v5e": "v5e",
    "TPU v6 lite": "v6e",
    "TPU v6e": "v6e",
    "TPU v5": "v5p",
    "TPU v4": "v4",
    "TPU7x": "v7x",
    "H100": "h100",
    "H200": "h200",
    "B200": "b200",
}


@dataclasses.dataclass(frozen=True)
class Chip:
    """platform: cpu, tpu or gpu. name: short, or jax's own `device_kind` where there is no short one."""

    platform: str
    name: str

    def __str__(self) -> str:
        return self.name


def chip_of(device: jax.Device) -> Chip:
    """Of a device that is here, or of a topology that is only compiled for."""
    platform = {"cuda": "gpu", "rocm": "gpu"}.get(device.platform, device.platform)
    kind = device.device_kind
    return Chip(platform, next((name for word, name in _NAMES.items() if word in kind), kind))


def this_chip() -> Chip:
    return chip_of(jax.devices()[0])


def pick(kernel: str, implementation: str | None, chip: Chip, reasons: Mapping[str, str | None]) -> str:
    """The implementation that runs: the one asked for, or the first that can.

    reasons: implementation -> why it cannot run here, None if it can; the best comes first.
    Raises ValueError if the one asked for is unknown or cannot run.
    """
    if implementation is None:
        implementation = next(name for name, reason in reasons.items() if reason is None)
    elif implementation not in reasons:
        raise ValueError(f"{implementation=} of {kernel} is not one of {tuple(reasons)}")
    elif (reason := reasons[implementation]) is not None:
        raise ValueError(f"{kernel}: {implementation!r} cannot run on {chip}: {reason}")
    others = "; ".join(f"not {name}: {reason}" for name, reason in reasons.items() if reason is not None)
    _say(f"{kernel} on {chip}: {implementation}" + (f" ({others})" if others else ""))
    return implementation


@functools.cache
def _say(line: str) -> None:
    """Once each."""
    logger.info(line)
