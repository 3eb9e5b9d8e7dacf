"""Slices by their names."""

from __future__ import annotations

import pytest

from sharding.topology import KINDS, Slice, parse_slice


@pytest.mark.parametrize(
    ("text", "chip", "shape"),
    [
        ("v5e-8", "v5e", (2, 4)),
        ("v5litepod-8", "v5e", (2, 4)),
        ("v5e:4x4", "v5e", (4, 4)),
        ("v6e-1", "v6e", (1, 1)),
        (" V6E-8 ", "v6e", (2, 4)),
        ("v5p:2x2x1", "v5p", (2, 2, 1)),
        ("v5p-8", "v5p", (2, 2, 1)),  # 8 cores, 4 chips
        ("v5p-16", "v5p", (2, 2, 2)),
        ("h100-1", "h100", (1,)),
        ("h100-8", "h100", (8,)),
    ],
)
def test_parse(text: str, chip: str, shape: tuple[int, ...]) -> None:
    assert parse_slice(text) == Slice(chip, shape)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "must be CHIP-N or CHIP:AxB"),
        ("v5e", "must be CHIP-N or CHIP:AxB"),
        ("v5e-", "must be CHIP-N or CHIP:AxB"),
        ("v5e-8x", "must be CHIP-N or CHIP:AxB"),
        ("v5e-²", "must be CHIP-N or CHIP:AxB"),
        ("v5e:2x", "must be CHIP-N or CHIP:AxB"),
        ("a100-8", "'a100' is not a known chip; there are v5e, v5p, v6e, h100"),
        ("v5e-3", "there are v5e-1, v5e-4, v5e-8"),
        ("v5p-4", "there are v5p-2, v5p-8, v5p-16, v5p-32, v5p-64, v5p-128 (2 cores a chip are counted)"),
        ("v5p-7", "2 cores a chip"),
        ("h100-3", "there are h100-1, h100-2, h100-4, h100-8"),
        ("v5e:2x2x1", "a slice of v5e has 2 axis(es) of at least one chip each, such as v5e:2x2"),
        ("v5p:8", "a slice of v5p has 3 axis(es)"),
        ("v5e:0x4", "at least one chip"),
    ],
)
def test_parse_errors(text: str, message: str) -> None:
    with pytest.raises(ValueError, match="--chips") as error:
        parse_slice(text)
    assert message in str(error.value)


def test_a_slice_is_written_as_it_is_read() -> None:
    for chip, kind in KINDS.items():
        for count, shape in kind.sizes.items():
            where = Slice(chip, shape)
            assert where.chips == count
            assert parse_slice(str(where)) == where
    assert str(parse_slice("v5p-8")) == "v5p:2x2x1"
    assert str(parse_slice("v5e-8")) == "v5e-8"
    assert str(Slice("v5e", (1, 8))) == "v5e:1x8"
