"""The arithmetic of a step, against numbers worked out by hand."""

from __future__ import annotations

import dataclasses
import math

import pytest

from jaxserve.plan import roofline
from jaxserve.plan.chips import Chip, chips
from jaxserve.plan.roofline import Part, Time
from pallas_kernels.targets import TARGETS
from sharding.topology import KINDS

# 1 GB/s of memory, 1 Gop/s, links of 0.1 GB/s: a byte takes 1 ns, an operation 1 ns
CHIP = Chip(
    name="slow",
    memory=10**9,
    runtime_share=0.5,
    bandwidth=1e9,
    matrix_rate={"bfloat16": 1e9},
    network="torus",
    links=4,
    link_bandwidth=1e8,
    hop_seconds=0.0,
    collective_seconds=0.0,
)
# two layers, 1,000 bytes of weights in them and 100 in the head
PART = Part(
    layers=1000, head=100, experts=0, kv=8, query=16, hidden=10, itemsize=2, dtype="bfloat16",
    windows=(None, None),
)  # fmt: skip


def test_a_decode_step() -> None:
    """3 rows of 5 positions: weights 1,100 B; KV 3·5·2 layers·8 B; 2·3·(500 + 50) for the products and
    4·16·(3·5·2 pairs) for attention."""
    time = roofline.decode(PART, CHIP, 3, 5)
    assert time == Time(
        pytest.approx(1100e-9), pytest.approx(240e-9), pytest.approx((3300 + 1920) * 1e-9), 0.0
    )
    assert time.seconds == pytest.approx(5220e-9)
    assert time.bound == "arithmetic"
    assert roofline.decode(PART, CHIP, 3, 7.5).kv == pytest.approx(360e-9)


def test_a_window_bounds_what_is_read_and_multiplied() -> None:
    part = dataclasses.replace(PART, windows=(None, 4))
    time = roofline.decode(part, CHIP, 1, 10)
    assert time.kv == pytest.approx((10 + 4) * 8e-9)
    assert time.arithmetic == pytest.approx((2 * 550 + 4 * 16 * 14) * 1e-9)


@pytest.mark.parametrize("window", [None, 1, 3, 5, 8, 100])
@pytest.mark.parametrize("chunk", [1, 3, 4, 16])
def test_a_prompt_in_chunks_against_counting_each_pair(window: int | None, chunk: int) -> None:
    part = dataclasses.replace(PART, windows=(window,))
    times = roofline.prefill(part, CHIP, 10, chunk)
    assert len(times) == math.ceil(10 / chunk)
    for time, start in zip(times, range(0, 10, chunk), strict=True):
        queries = range(start, min(start + chunk, 10))
        seen = [[k for k in range(q + 1) if window is None or q - k < window] for q in queries]
        pairs, read = sum(map(len, seen)), len(set().union(*seen))
        products = 2 * (len(queries) * 500 + 50)
        assert time.arithmetic == pytest.approx((products + 4 * 16 * pairs) * 1e-9)
        assert time.kv == pytest.approx(read * 8e-9)
        assert time.weights == pytest.approx(1100e-9)


def test_full_chunks_share_the_weights() -> None:
    """A prompt of 5 tokens takes 5/20 of a chunk of 20; its own attention is its own."""
    time = roofline.packed(PART, CHIP, 5, 20)
    assert time.weights == pytest.approx(1100e-9 / 4)
    assert time.arithmetic == roofline.prefill(PART, CHIP, 5, 20)[0].arithmetic


def test_experts_are_read_as_far_as_they_are_chosen() -> None:
    """2 of 8 experts: one token touches a quarter; two touch 1 - (3/4)²."""
    part = dataclasses.replace(PART, experts=8000, num_experts=8, experts_per_token=2)
    one, two = (roofline.decode(part, CHIP, rows, 0) for rows in (1, 2))
    assert one.weights == pytest.approx((1100 + 2000) * 1e-9)
    assert two.weights == pytest.approx((1100 + 8000 * 7 / 16) * 1e-9)
    assert two.arithmetic == pytest.approx(2 * 2 * (550 + 1000) * 1e-9)


def test_sums_over_devices() -> None:
    """Four devices: 2·3/4 of the bytes go over two links of 0.1 GB/s. One row of 10 x 2 bytes is summed after
    the embedding and after both parts of two layers."""
    each = 2 * 3 / 4 * 20 / 0.2e9
    assert CHIP.all_reduce(20, 4) == pytest.approx(each)
    assert CHIP.all_reduce(20, 1) == 0
    assert CHIP.all_reduce(20, 2) == pytest.approx(20 / 0.1e9)  # two have one link between them
    part = dataclasses.replace(PART, devices=4)
    assert roofline.decode(part, CHIP, 1, 0).interconnect == pytest.approx(5 * each)


def test_latency_of_sums() -> None:
    torus = dataclasses.replace(CHIP, hop_seconds=1.0)
    assert torus.all_reduce(0, 8) == 8  # four away and back
    switch = dataclasses.replace(torus, network="switch", collective_seconds=0.5)
    assert switch.all_reduce(0, 8) == 14.5
    assert switch.all_reduce(80, 8) == pytest.approx(14.5 + 2 * 7 / 8 * 80 / 0.4e9)


@pytest.mark.parametrize(
    ("time", "bound"),
    [
        (Time(3, 2, 4, 1), "weights"),
        (Time(2, 3, 4, 1), "KV"),
        (Time(2, 2, 5, 1), "arithmetic"),
        (Time(2, 2, 3, 5), "interconnect"),
    ],
)
def test_what_bounds_a_step(time: Time, bound: str) -> None:
    assert time.bound == bound
    assert time.seconds == max(time.weights + time.kv, time.arithmetic) + time.interconnect


# -- the chips -----------------------------------------------------------------------------------------------


def test_every_chip_can_be_named_and_compiled_for() -> None:
    assert set(chips()) == set(KINDS) <= set(TARGETS)


def test_an_8b_alone_on_an_h100() -> None:
    """Llama 3.1 8B reads 15.0 GB a token (all but the embedding): 4.5 ms at 3.35 TB/s."""
    layers = 32 * (2 * 4096**2 + 2 * 1024 * 4096 + 3 * 4096 * 14336 + 2 * 4096) + 4096
    part = Part(
        layers=2 * layers, head=2 * 128256 * 4096, experts=0, kv=4096, query=4096, hidden=4096, itemsize=2,
        dtype="bfloat16", windows=(None,) * 32,
    )  # fmt: skip
    time = roofline.decode(part, chips()["h100"], 1, 1)
    assert time.seconds == pytest.approx(4.48e-3, rel=0.01)
    assert time.bound == "weights"


def test_the_runtimes_share_of_memory() -> None:
    assert CHIP.usable({}) == 5 * 10**8
    assert CHIP.usable({"XLA_PYTHON_CLIENT_MEM_FRACTION": ".9"}) == 9 * 10**8
    both = {"XLA_PYTHON_CLIENT_MEM_FRACTION": ".9", "XLA_CLIENT_MEM_FRACTION": "0.8"}
    assert CHIP.usable(both) == 8 * 10**8
    whole = dataclasses.replace(CHIP, runtime_share=1.0)
    assert whole.usable({"XLA_CLIENT_MEM_FRACTION": "0.8"}) == 10**9  # a TPU's runtime takes all
    for text in ("most", "0", "1.5"):
        with pytest.raises(ValueError, match="XLA_CLIENT_MEM_FRACTION"):
            CHIP.usable({"XLA_CLIENT_MEM_FRACTION": text})


def test_a_dtype_without_a_rate() -> None:
    with pytest.raises(ValueError, match="--dtype=float16: the rate of v5e is known in bfloat16, float32"):
        chips()["v5e"].rate("float16")
