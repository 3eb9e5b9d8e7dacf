"""How long a step takes at least, on one device of a replica. Pure arithmetic; knows no jax.

A step waits for its memory or its matrix unit, whichever is later, and then for the links: in a layer the
sums over devices stand between products that need them, so nothing hides them. Counted are the chip's rated
numbers, with nothing for launches, the host, activations or padding. Experts: tokens are taken to choose
them evenly and independently.
"""

from __future__ import annotations

import dataclasses
import functools
import operator
from collections.abc import Sequence
from typing import Literal

from jaxserve.plan.chips import Chip

Bound = Literal["weights", "KV", "arithmetic", "interconnect"]


@dataclasses.dataclass(frozen=True, slots=True)
class Part:
    """One device's part of a model, and of its replica.

    layers, head, experts: bytes of weights: all of the layers but experts, the output head, all experts.
    kv: bytes of one position in one layer, key and value. query: size of one token's queries, q heads x head.
    hidden: size of a token between layers. itemsize: bytes of a weight, and of what is added up over devices.
    windows: per layer, positions that a query sees; None is all. devices: of the replica.
    """

    layers: int
    head: int
    experts: int
    kv: int
    query: int
    hidden: int
    itemsize: int
    dtype: str
    windows: tuple[int | None, ...]
    devices: int = 1
    num_experts: int = 0
    experts_per_token: int = 0


@dataclasses.dataclass(frozen=True, slots=True)
class Time:
    """Seconds that a step's parts take each if nothing else is waited for."""

    weights: float
    kv: float
    arithmetic: float
    interconnect: float

    @property
    def seconds(self) -> float:
        return max(self.weights + self.kv, self.arithmetic) + self.interconnect

    @property
    def bound(self) -> Bound:
        """What the step waits for longest."""
        memory = self.weights + self.kv
        if self.interconnect > max(memory, self.arithmetic):
            return "interconnect"
        if self.arithmetic > memory:
            return "arithmetic"
        return "weights" if self.weights >= self.kv else "KV"

    def __add__(self, other: Time) -> Time:
        """One after the other. `seconds` of a sum is a little less than the sum of both."""
        return Time(
            self.weights + other.weights,
            self.kv + other.kv,
            self.arithmetic + other.arithmetic,
            self.interconnect + other.interconnect,
        )


def decode(part: Part, chip: Chip, rows: int, context: float) -> Time:
    """One token for each of `rows` sequences, which see `context` positions each."""
    seen = rows * _seen(part.windows, context)
    return _step(part, chip, tokens=rows, rows=rows, read=seen, pairs=seen)


def prefill(part: Part, chip: Chip, tokens: int, chunk: int) -> list[Time]:
    """A prompt of so many tokens in chunks, one after the other."""
    times = []
    for start in range(0, tokens, chunk):
        size = min(chunk, tokens - start)
        pairs = sum(_pairs(start, size, window) for window in part.windows)
        # keys and values of each layer are read once at least, from the first that a query sees
        read = sum(start + size - (max(0, start - w + 1) if w else 0) for w in part.windows)
        times.append(_step(part, chip, tokens=size, rows=1, read=read, pairs=pairs))
    return times


def packed(part: Part, chip: Chip, tokens: int, chunk: int) -> Time:
    """A prompt's share where many wait, so that every chunk is full."""
    whole = _step(part, chip, tokens=chunk, rows=1, read=0, pairs=0)
    own = functools.reduce(operator.add, prefill(part, chip, tokens, chunk))
    share = tokens / chunk
    return Time(whole.weights * share, own.kv, own.arithmetic, whole.interconnect * share)


def _seen(windows: Sequence[int | None], context: float) -> float:
    """Positions, all layers together."""
    return sum(context if window is None else min(window, context) for window in windows)


def _pairs(start: int, size: int, window: int | None) -> int:
    """(query, key) pairs of one layer: the query at position p sees p + 1 keys, or its window."""
    if window is None:
        return size * start + size * (size + 1) // 2
    growing = min(max(window - start, 0), size)  # queries that do not fill their window yet
    return growing * start + growing * (growing + 1) // 2 + (size - growing) * window


def _step(part: Part, chip: Chip, *, tokens: int, rows: int, read: float, pairs: float) -> Time:
    """rows: that the output head takes. read: positions of layers whose key and value are read. pairs: of a
    query and a key."""
    touched, chosen = 1.0, 0.0
    if part.num_experts:
        chosen = part.experts_per_token / part.num_experts
        touched = 1.0 - (1.0 - chosen) ** tokens
    products = 2 * (tokens * (part.layers + chosen * part.experts) + rows * part.head) / part.itemsize
    attention = 4 * part.query * pairs
    # in each layer after attention and after the MLP, and once after the embedding
    sums = 2 * len(part.windows) + 1
    exchanged = sums * chip.all_reduce(tokens * part.hidden * part.itemsize, part.devices)
    return Time(
        weights=(part.layers + part.head + touched * part.experts) / chip.bandwidth,
        kv=read * part.kv / chip.bandwidth,
        arithmetic=(products + attention) / chip.rate(part.dtype),
        interconnect=exchanged,
    )
