"""Chips that are only compiled for: their devices, on a machine that has none of them.

A TPU's come from libtpu, an NVIDIA card's from jax's CUDA plugins. Either spoils an ordinary start of jax, so
each lives in an environment of its own (`make aot`), and this runs there.
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import os
import shutil
from typing import Any

import jax
from jax.experimental import topologies

# What XLA asks of a card, as `xla.gpu.GpuTargetConfigProto`: from NVIDIA's data sheets and CUDA's own tables.
_CARD = """
gpu_device_info {{ threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
  shared_memory_per_core: 233472 threads_per_core_limit: 2048 core_count: {cores} fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: {bandwidth} l2_cache_size: {l2} clock_rate_ghz: {clock}
  device_memory_size: {memory} shared_memory_per_block_optin: 232448
  cuda_compute_capability {{ major: {major} minor: 0 feature_extension: ACCELERATED_FEATURES }}
  registers_per_core_limit: 65536 registers_per_block_limit: 65536 }}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 }}
runtime_version {{ major: 13 }}
device_description_str: "{name}"
"""
_H100 = _CARD.format(
    name="NVIDIA H100 80GB HBM3", major=9, cores=132, clock=1.98,
    bandwidth=3_352_320_000_000, l2=52_428_800, memory=85_028_765_696,
)  # fmt: skip
_B200 = _CARD.format(
    name="NVIDIA B200", major=10, cores=148, clock=1.965,
    bandwidth=7_672_320_000_000, l2=132_644_864, memory=191_503_138_816,
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Target:
    """environment: the one that holds its compiler, `.venv-aot-<name>`. kernels: the implementation that is
    made for it. layout: number of devices -> the topology's name. card: of an NVIDIA one."""

    environment: str
    kernels: str
    layout: dict[int, str]
    compiler_name: str = ""
    card: str = ""


_FLAT = {1: "1x1", 4: "2x2", 8: "2x4"}
_CUBE = {1: "1x1x1", 4: "2x2x1", 8: "2x2x2"}
_CARDS = {count: f"1x{count}x1" for count in (1, 2, 4, 8)}

TARGETS = {
    "v4": Target("tpu", "tpu", {1: "2x2x1", 4: "2x2x1", 8: "2x2x2"}),
    "v5e": Target("tpu", "tpu", _FLAT),
    "v5p": Target("tpu", "tpu", _CUBE),
    "v6e": Target("tpu", "tpu", _FLAT),
    "v7x": Target("tpu", "tpu", {1: "1x1x1", 2: "1x1x1", 8: "2x2x1"}, compiler_name="tpu7x"),  # two a chip
    "h100": Target("cuda", "mosaic_gpu", _CARDS, card=_H100),
    "b200": Target("cuda", "mosaic_gpu", _CARDS, card=_B200),
}


def devices(chip: str, count: int = 1) -> list[jax.Device]:
    """`count` devices to compile for, which hold nothing and run nothing; call it before jax finds its own.

    Raises ValueError for a chip or a count that is not known, RuntimeError where the compiler is missing or
    refuses the chip.
    """
    if chip not in TARGETS:
        raise ValueError(f"{chip=} is not one of {', '.join(TARGETS)}")
    target = TARGETS[chip]
    if count not in target.layout:
        raise ValueError(f"{count=} of {chip} must be one of {', '.join(map(str, target.layout))}")
    jax.config.update("jax_platforms", "cpu")  # the host's; the chip is only compiled for
    if target.card:
        found = _cards(target.card, target.layout[count])
    else:
        os.environ["TPU_SKIP_MDS_QUERY"] = "1"  # there is no cloud to ask for its metadata
        os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"  # no chip is held, so several processes may compile
        name = f"{target.compiler_name or chip}:{target.layout[count]}"
        found = topologies.get_topology_desc(platform="tpu", topology_name=name).devices
    return list(found)[:count]


def _cards(description: str, layout: str) -> Any:
    """The one place that calls what is private to jaxlib."""
    os.environ["JAX_SKIP_CUDA_CONSTRAINTS_CHECK"] = "1"  # there is no cuDNN here to check
    if shutil.which("ptxas") is None and (found := importlib.util.find_spec("nvidia.cu13")) is not None:
        folders = [f"{folder}/bin" for folder in found.submodule_search_locations or ()]
        os.environ["PATH"] = os.pathsep.join([*folders, os.environ.get("PATH", "")])
    jax.devices()  # makes jax find its plugins
    xla_client: Any = importlib.import_module("jaxlib.xla_client")
    client = xla_client._xla.get_default_c_api_topology(
        "cuda", "", {"target_config": description, "topology": layout}
    )
    return topologies.TopologyDescription(client._make_compile_only_devices()).devices
