"""What the shape's weight products alone reach in JAX: no attention, norm, rotary embedding or sampling.

Every weight product of every layer and the head, in one program, as `jaxserve.models.layers.project` has
them: bf16 weights [out, in], accumulated in f32, rounded to bf16. Prefill: a chunk of CHUNK rows, the head on
the rows that end a prompt. It also measures the machine: memory and large products.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from benchmarks.peers import Settings
from benchmarks.peers.weights import Shape

CHUNK = 512
SECONDS = 1.0  # per measurement
MEMORY_BYTES = 512 * 2**20  # per array; far beyond any cache


def project(x: Array, w: Array) -> Array:
    """bf16[rows, in], bf16[out, in] -> bf16[rows, out]."""
    product = jax.lax.dot_general(x, w, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)
    return product.astype(x.dtype)


def layer(x: Array, w: dict[str, Array]) -> tuple[Array, Array]:
    """Products chained so that none can be left out, with sums where the model has its other arithmetic.
    The keys and values come out, as they would go to the pool."""
    x = x + project(project(x, w["q"]), w["o"])
    kv = jnp.concatenate([project(x, w["k"]), project(x, w["v"])], axis=1)
    return x + project(project(x, w["gate"]) + project(x, w["up"]), w["down"]), kv


def scanned(x: Array, layers: dict[str, Array], head: Array, ends: Array) -> tuple[Array, Array]:
    x, kv = jax.lax.scan(layer, x, layers)
    return project(x[ends], head), kv


def unrolled(x: Array, layers: list[dict[str, Array]], head: Array, ends: Array) -> tuple[Array, list[Array]]:
    kvs = []
    for w in layers:
        x, kv = layer(x, w)
        kvs.append(kv)
    return project(x[ends], head), kvs


class Peer:
    def __init__(self, settings: Settings) -> None:
        self.versions = {"jax": jax.__version__}
        shape = Shape.from_folder(settings.path)
        self._dtype = jnp.dtype(settings.dtype)
        self._shape = shape
        sizes = {
            "q": (shape.q, shape.hidden),
            "k": (shape.kv, shape.hidden),
            "v": (shape.kv, shape.hidden),
            "o": (shape.hidden, shape.q),
            "gate": (shape.mlp, shape.hidden),
            "up": (shape.mlp, shape.hidden),
            "down": (shape.hidden, shape.mlp),
        }
        keys = dict(zip(sizes, jax.random.split(jax.random.key(0), len(sizes)), strict=True))
        stacked = {
            name: (0.02 * jax.random.normal(keys[name], (shape.layers, *size))).astype(self._dtype)
            for name, size in sizes.items()
        }
        self._head = jnp.full((shape.vocab, shape.hidden), 0.02, self._dtype)
        apart = [{name: jnp.array(w[i]) for name, w in stacked.items()} for i in range(shape.layers)]
        self._ways: dict[str, tuple[Callable[..., Any], Any]] = {
            "scan": (jax.jit(scanned), stacked),
            "unrolled": (jax.jit(unrolled), apart),
        }

    def variants(self, kind: str) -> list[str]:
        return list(self._ways)

    def facts(self) -> dict[str, Any]:
        return {}

    def measure(
        self, kind: str, prompts: list[list[int]], new_tokens: int, variant: str
    ) -> tuple[float, list[list[int]]]:
        function, layers = self._ways[variant]
        if kind == "prefill":
            rows = min(CHUNK, sum(map(len, prompts)))
            useful, ends = rows, np.arange(len(prompts[0]) - 1, rows, len(prompts[0]))
        else:
            # one row of bf16 misses XLA's fast product
            rows, useful = max(len(prompts), 2 if self._dtype.itemsize == 2 else 1), len(prompts)
            ends = np.arange(rows)
        x = jnp.ones((rows, self._shape.hidden), self._dtype)
        at = jnp.asarray(ends, jnp.int32)
        for _ in range(2):
            jax.block_until_ready(function(x, layers, self._head, at))
        calls, begin, end = 0, time.perf_counter(), 0.0
        while end - begin < SECONDS:
            jax.block_until_ready(function(x, layers, self._head, at))
            calls, end = calls + 1, time.perf_counter()
        return useful * calls / (end - begin), []

    def probe(self) -> dict[str, float]:
        """GB/s and GFLOP/s that the machine reaches."""
        rates: dict[str, float] = {}
        for name, dtype in (("bf16", jnp.bfloat16), ("f32", jnp.float32)):
            a = jnp.ones((2048, 2048), dtype)
            product = jax.jit(project)
            seconds = best(lambda: jax.block_until_ready(product(a, a)), 8)  # noqa: B023
            rates[f"jax_{name}_gflops"] = 2 * 2048**3 / seconds / 1e9
        return rates | memory_rates()


def best(call: Callable[[], object], times: int) -> float:
    """Seconds of the fastest of `times` calls, after one that does not count."""
    call()
    seconds = []
    for _ in range(times):
        begin = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - begin)
    return min(seconds)


def memory_rates() -> dict[str, float]:
    """Large arrays by numpy, a thread a core, and by JAX. Bytes counted as STREAM does: those that the
    program reads and writes, not the line that a store fetches first."""
    count = len(os.sched_getaffinity(0))
    part = MEMORY_BYTES // 4 // count
    a, b = np.ones((count, part), np.float32), np.ones((count, part), np.float32)

    def together(call: Callable[[int], object]) -> Callable[[], None]:
        def run() -> None:
            threads = [threading.Thread(target=call, args=(i,)) for i in range(count)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()

        return run

    size = a.nbytes
    read = best(together(lambda i: a[i].max()), 5)
    copied = best(together(lambda i: np.copyto(b[i], a[i])), 5)
    del a, b
    y, z = jnp.ones(size // 4, jnp.float32), jnp.ones(size // 4, jnp.float32)
    total = jax.jit(jnp.sum)
    read = min(read, best(lambda: total(y).block_until_ready(), 5))
    # in place: new pages would cost more than the sum
    triad = jax.jit(lambda y, z: y + 3.0 * z, donate_argnums=0)

    def step() -> None:
        nonlocal y
        y = triad(y, z).block_until_ready()

    return {
        "read_gbs": size / read / 1e9,
        "copy_gbs": 2 * size / copied / 1e9,
        "triad_gbs": 3 * size / best(step, 5) / 1e9,
    }
