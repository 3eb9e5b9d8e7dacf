"""Compiles the decode step for chips that are not here, and reads what the compiler made of it.

Prints, per layout of the layers (scan or unrolled): seconds to lower and to compile, bytes of arguments and
temporaries on one device, whether the pool is aliased from input to output, and how many instructions copy
something as large as the pool.

    python benchmarks/aot_layout.py --chip v5e-8 --model 70b --slots 64 --pages 2048

The plugins spoil an ordinary start of jax, so they belong in an environment of their own: `libtpu` for the
TPUs; `jax-cuda13-plugin` and `jax-cuda13-pjrt` at jax's version, installed with `--no-deps`, for the H100.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import sys
import time

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["TPU_SKIP_MDS_QUERY"] = "1"
os.environ["JAX_SKIP_CUDA_CONSTRAINTS_CHECK"] = "1"

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies

from jaxserve import models
from jaxserve.engine.buckets import decode_buckets, prefill_buckets, register_programs
from jaxserve.engine.state import StateShape
from jaxserve.engine.step import Steps
from jaxserve.models.decoder import Decoder
from jaxserve.weights import abstract_params
from sharding.mesh import AXES

H100 = """
gpu_device_info { threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
  shared_memory_per_core: 233472 threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000 l2_cache_size: 52428800 clock_rate_ghz: 1.98
  device_memory_size: 85028765696 shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 minor: 0 feature_extension: ACCELERATED_FEATURES }
  registers_per_core_limit: 65536 registers_per_block_limit: 65536 }
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 }
runtime_version { major: 13 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""

# Llama 3.1's published shapes: (hidden, MLP, layers, query heads, key/value heads)
SHAPES = {"8b": (4096, 14336, 32, 32, 8), "70b": (8192, 28672, 80, 64, 8)}


def devices(chip: str) -> list[jax.Device]:
    kind, _, count = chip.partition("-")
    if kind == "h100":
        import jaxlib.xla_client as xla_client
        from jax._src import xla_bridge

        xla_bridge.discover_pjrt_plugins()
        client = xla_client._xla.get_default_c_api_topology(
            "cuda", "", {"target_config": H100, "topology": f"1x{count}x1"}
        )
        return list(topologies.TopologyDescription(client._make_compile_only_devices()).devices)
    grid = {"1": "1x1", "4": "2x2", "8": "2x4"}[count]
    return list(topologies.get_topology_desc(platform="tpu", topology_name=f"{kind}:{grid}").devices)


def config(model: str) -> dict:
    hidden, mlp, layers, heads, kv_heads = SHAPES[model]
    return {
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": mlp,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": 128256,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "torch_dtype": "bfloat16",
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--chip", default="v5e-8")
    parser.add_argument("--model", default="70b", choices=SHAPES)
    parser.add_argument("--slots", type=int, default=64)
    parser.add_argument("--pages", type=int, default=2048)
    parser.add_argument("--page-size", type=int, default=64)
    parser.add_argument("--context", type=int, default=2048)
    parser.add_argument("--kind", default="decode", choices=("decode", "prefill"))
    parser.add_argument("--layouts", default="scan,unrolled")
    args = parser.parse_args()
    chips = devices(args.chip)
    mesh = jax.sharding.Mesh(
        np.array(chips).reshape(1, len(chips), 1), AXES, axis_types=(jax.sharding.AxisType.Auto,) * 3
    )
    decoder = Decoder(models.config_from_hf(config(args.model)), jnp.bfloat16)
    pages_per_slot = -(-args.context // args.page_size)
    shape = StateShape(args.slots, args.pages, args.page_size, pages_per_slot)
    for layout in args.layouts.split(","):
        steps = Steps(decoder, mesh, pages_per_slot)
        params = abstract_params(decoder, mesh, layout)
        programs = register_programs(
            steps, params, shape, prefill_buckets(512, args.slots), decode_buckets(args.slots)
        )
        key = (args.kind, programs.buckets(args.kind)[-1])
        program = programs._registered[key]
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            start = time.perf_counter()
            lowered = jax.jit(
                program.function, donate_argnums=program.donate, out_shardings=program.out_shardings
            ).lower(*program.arguments)
            lowered_at = time.perf_counter()
        compiled = lowered.compile()
        seconds = time.perf_counter() - lowered_at
        text, memory = compiled.as_text(), compiled.memory_analysis()
        pool = program.arguments[1].pool
        size = math.prod(pool.sharding.shard_shape(pool.shape))
        copies = [
            m[0]
            for m in re.finditer(r"= \w+\[([\d,]+)\]\S* (copy|copy-start|transpose|all-gather)\(", text)
            if math.prod(map(int, m[1].split(","))) >= size
        ]
        row = {
            "chip": args.chip,
            "program": f"{args.kind} {key[1]}",
            "model": args.model,
            "layout": layout,
            "lower_s": round(lowered_at - start, 2),
            "compile_s": round(seconds, 2),
            "argument_bytes": memory.argument_size_in_bytes,
            "temporary_bytes": memory.temp_size_in_bytes,
            "pool_bytes": size * 2,
            "aliased_bytes": memory.alias_size_in_bytes,
            "copies_as_large_as_the_pool": len(copies),
            "jax": jax.__version__,
        }
        print(json.dumps(row), flush=True)
        for line in copies[:3]:
            print("  ", line, file=sys.stderr)


if __name__ == "__main__":
    main()
