"""What is measured, and the least time that the machine's own rates allow for it."""

from __future__ import annotations

import dataclasses
import random

from benchmarks.peers.weights import Shape


@dataclasses.dataclass(frozen=True, slots=True)
class Figure:
    kind: str  # prefill | decode
    sequences: int
    prompt: int
    new_tokens: int

    @property
    def name(self) -> str:
        return "prefill" if self.kind == "prefill" else f"decode-{self.sequences}"

    def prompts(self, vocab: int, round_: int) -> list[list[int]]:
        """The same for every peer, others in every round."""
        rng = random.Random(f"{self.name} {round_}")
        return [[rng.randrange(vocab) for _ in range(self.prompt)] for _ in range(self.sequences)]


@dataclasses.dataclass(frozen=True, slots=True)
class Bound:
    """The least time for what a figure asks, by the machine's own measured rates."""

    name: str  # bandwidth | arithmetic
    rate: float  # tokens per second that it allows


def bound(figure: Figure, shape: Shape, gbs: float, gflops: float, *, attention: bool) -> Bound:
    """Decode moves every weight and every cached key and value once a step; prefill every weight once.
    Arithmetic: two operations a weight and token, the head only where a token is drawn, and attention's."""
    moved: float
    flops: float
    layers, head, n = shape.layers * shape.layer_weights, shape.head_weights, figure.sequences
    if figure.kind == "prefill":
        tokens = n * figure.prompt
        moved = 2 * (layers + head)
        flops = 2 * tokens * layers + 2 * n * head
        # half of it is masked
        flops += 2 * shape.layers * shape.q * tokens * figure.prompt if attention else 0
    else:
        tokens, cached = n, figure.prompt + figure.new_tokens / 2
        moved = 2 * (layers + head) + (4 * n * cached * shape.layers * shape.kv if attention else 0)
        flops = 2 * n * (layers + head) + (4 * n * cached * shape.layers * shape.q if attention else 0)
    by_memory, by_arithmetic = moved / gbs / 1e9, flops / gflops / 1e9
    name = "bandwidth" if by_memory > by_arithmetic else "arithmetic"
    return Bound(name, tokens / max(by_memory, by_arithmetic))
