"""Which implementation runs: by chip, dtype and shape; told once; never another than the one asked for."""

from __future__ import annotations

import logging
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import chips, decode_attention, prefill_attention
from pallas_kernels.chips import Chip, pick
from pallas_kernels.decode_attention import implementation_for as for_decode
from pallas_kernels.prefill_attention import implementation_for as for_prefill

CPU, V5E, H100, B200 = Chip("cpu", "cpu"), Chip("tpu", "v5e"), Chip("gpu", "h100"), Chip("gpu", "b200")


def shapes(
    *, dtype: Any = jnp.bfloat16, page: int = 64, rows: int = 4, width: int = 16
) -> tuple[jax.ShapeDtypeStruct, ...]:
    return (
        jax.ShapeDtypeStruct((rows, 8, 128), dtype),
        jax.ShapeDtypeStruct((1, 9, page, 512), dtype),
        jax.ShapeDtypeStruct((rows, width), jnp.int32),
    )


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    chips._say.cache_clear()
    caplog.set_level(logging.INFO, "pallas_kernels.chips")
    return caplog


@pytest.mark.parametrize("implementation_for", [for_decode, for_prefill])
@pytest.mark.parametrize(
    ("chip", "changes", "expected"),
    [
        (CPU, {}, "xla"),
        (V5E, {}, "tpu"),
        (V5E, {"dtype": jnp.float32}, "tpu"),
        (V5E, {"dtype": jnp.float16}, "xla"),
        (V5E, {"page": 24}, "xla"),
        (V5E, {"rows": 64, "width": 8192}, "xla"),  # 2 MiB of page table
        (H100, {}, "mosaic_gpu"),
        (H100, {"rows": 64, "width": 8192}, "mosaic_gpu"),
        (H100, {"page": 12}, "xla"),
        (B200, {}, "xla"),
        (Chip("gpu", "NVIDIA A100-SXM4-40GB"), {}, "xla"),
    ],
)
def test_what_a_chip_takes(
    implementation_for: Any, chip: Chip, changes: dict[str, Any], expected: str
) -> None:
    assert implementation_for(chip, *shapes(**changes)) == expected


@pytest.mark.parametrize("implementation_for", [for_decode, for_prefill])
@pytest.mark.parametrize(
    ("chip", "asked", "changes", "reason"),
    [
        (CPU, "tpu", {}, "'tpu' cannot run on cpu: it is written for TPUs"),
        (CPU, "mosaic_gpu", {}, "'mosaic_gpu' cannot run on cpu: for NVIDIA GPUs only"),
        (B200, "mosaic_gpu", {}, "'mosaic_gpu' cannot run on b200: wgmma is Hopper's"),
        (V5E, "tpu", {"rows": 64, "width": 8192}, "page table of 2097152 bytes"),
        (V5E, "triton", {}, "'triton' of .* is not one of"),
    ],
)
def test_what_cannot_run_is_an_error(
    implementation_for: Any, chip: Chip, asked: str, changes: dict[str, Any], reason: str
) -> None:
    with pytest.raises(ValueError, match=reason):
        implementation_for(chip, *shapes(**changes), asked)


@pytest.mark.parametrize("asked", ["tpu", "mosaic_gpu"])
def test_the_public_functions_do_not_change_it_silently(asked: str) -> None:
    q, pool, table = (jnp.zeros(shape.shape, shape.dtype) for shape in shapes())
    kv, one, rows = jnp.zeros((4, 512), q.dtype), jnp.int32(0), jnp.zeros(4, jnp.int32)
    with pytest.raises(ValueError, match="cannot run on"):
        decode_attention(q, kv, pool, one, table, rows, one, scale=1.0, implementation=asked, chip=CPU)
    with pytest.raises(ValueError, match="cannot run on"):
        prefill_attention(
            q, kv, pool, one, table, rows, rows, rows, one, scale=1.0, implementation=asked, chip=CPU
        )


@pytest.mark.parametrize(("tokens", "rows"), [(0, 0), (0, 3)])
def test_nothing_to_do_is_refused(tokens: int, rows: int) -> None:
    q, kv = jnp.zeros((tokens, 8, 128)), jnp.zeros((tokens, 512))
    pool, table, of_row = (
        jnp.zeros((1, 9, 64, 512)),
        jnp.zeros((rows, 4), jnp.int32),
        jnp.zeros(rows, jnp.int32),
    )
    one = jnp.int32(0)
    with pytest.raises(ValueError, match="there must be a token and a row"):
        prefill_attention(q, kv, pool, one, table, of_row, of_row, of_row, one, scale=1.0)
    if not rows:
        with pytest.raises(ValueError, match="there must be a token and a row"):
            decode_attention(q, kv, pool, one, table, of_row, one, scale=1.0)


def test_what_was_picked_is_told_once(said: pytest.LogCaptureFixture) -> None:
    for _ in range(3):
        for_decode(H100, *shapes())
    for_decode(CPU, *shapes())
    lines = [record.getMessage() for record in said.records]
    assert len(lines) == 2
    assert lines[0].startswith("decode attention on h100: mosaic_gpu (not tpu: it is written for TPUs")
    assert lines[1].startswith("decode attention on cpu: xla (not tpu: ")


def test_the_first_that_can_run(said: pytest.LogCaptureFixture) -> None:
    reasons = {"best": "too large", "second": None, "third": None}
    assert pick("k", None, CPU, reasons) == "second"
    assert pick("k", "third", CPU, reasons) == "third"
    with pytest.raises(ValueError, match="k: 'best' cannot run on cpu: too large"):
        pick("k", "best", CPU, reasons)
