"""What the kernels are said to fetch, against the copies that they make when interpreted."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import traffic
from pallas_kernels.chips import Chip
from pallas_kernels.decode_attention import mosaic_gpu, tpu

KV_HEADS, SIZE = 2, 128
WIDTH = 2 * KV_HEADS * SIZE
LENGTHS = [0, 1, 64, 65, 0, 100, 250]  # empty rows, a token, a page, one more


def arguments(lengths: list[int], page: int, window: int) -> tuple[Any, ...]:
    rng = np.random.default_rng(0)
    per_row = 256 // page
    table = rng.permutation(len(lengths) * per_row).reshape(len(lengths), per_row).astype(np.int32)

    def draw(*shape: int) -> Any:
        return jnp.asarray(rng.standard_normal(shape), jnp.bfloat16)

    return (
        draw(len(lengths), 2 * KV_HEADS, SIZE),
        draw(len(lengths), WIDTH),
        draw(1, table.size, page, WIDTH),
        jnp.int32(0),
        jnp.asarray(table),
        jnp.asarray(lengths, jnp.int32),
        jnp.int32(window),
    )


@pytest.fixture
def tpu_copies(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Bytes of each copy that a kernel starts between HBM and VMEM."""
    from jax._src.pallas.mosaic.interpret import interpret_pallas_call

    sizes: list[int] = []
    read = interpret_pallas_call.DMA.execute_read

    def counting(self: Any) -> None:
        first = self.data is None
        read(self)
        if first and self.data is not None:
            sizes.append(self.data_size)

    monkeypatch.setattr(interpret_pallas_call.DMA, "execute_read", counting)
    yield sizes
    pltpu.reset_tpu_interpret_mode_state()


@pytest.mark.parametrize(("page", "window"), [(64, 2**30), (16, 40)])
def test_tpu_decode(window: int, page: int, tpu_copies: list[int]) -> None:
    interpret = pltpu.InterpretParams(dma_execution_mode="on_wait")
    out, _ = tpu.decode_attention(
        *arguments(LENGTHS, page, window), scale=1.0, chip=Chip("tpu", "v5e"), interpret=interpret
    )
    out.block_until_ready()
    said = traffic.decode_bytes("tpu", LENGTHS, window, page=page, width=WIDTH, itemsize=2)
    assert sum(tpu_copies) == said


@pytest.fixture
def gpu_copies(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Shape of each copy that a kernel starts from global to shared memory."""
    from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks

    shapes: list[tuple[int, ...]] = []
    task = gpu_callbacks.AsyncCopyGmemToSmemTask
    read = task.post_read

    def counting(self: Any, *rest: Any) -> None:
        shapes.append(tuple(self.dst_access.shape))
        read(self, *rest)

    monkeypatch.setattr(task, "post_read", counting)
    return shapes


@pytest.mark.slow
@pytest.mark.parametrize(("page", "window"), [(64, 2**30), (16, 40)])
def test_gpu_decode(window: int, page: int, gpu_copies: list[tuple[int, ...]]) -> None:
    out, _ = mosaic_gpu.decode_attention(
        *arguments(LENGTHS, page, window),
        scale=1.0,
        chip=Chip("gpu", "h100"),
        interpret=plgpu.InterpretGPUParams(),
    )
    out.block_until_ready()
    said = traffic.decode_bytes("mosaic_gpu", LENGTHS, window, page=page, width=WIDTH, itemsize=2)
    assert gpu_copies, "nothing was counted"
    queries = [shape for shape in gpu_copies if shape[-2] != math.gcd(page, 64)]
    pages = [shape for shape in gpu_copies if shape[-2] == math.gcd(page, 64)]
    assert len(queries) < len(gpu_copies)
    assert sum(math.prod(shape) * 2 for shape in pages) == said
