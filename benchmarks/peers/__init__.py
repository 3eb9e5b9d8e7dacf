"""One engine a file, each behind `Peer` and in its own process, so that none's idle threads slow another.

A peer's package is imported in its worker only: that it is missing is then one line of the report.
Knows nothing of rounds, tables or limits.
"""

from __future__ import annotations

import dataclasses
import importlib
from pathlib import Path
from typing import Any, Protocol

NAMES = {
    "jaxserve": "benchmarks.peers.ours",
    "transformers": "benchmarks.peers.hf",
    "transformers-cb": "benchmarks.peers.hf_batching",
    "llama.cpp": "benchmarks.peers.llama_cpp",
    "matmuls": "benchmarks.peers.matmuls",
}


@dataclasses.dataclass(frozen=True, slots=True)
class Settings:
    """What every peer is told.

    folder: the model in Hugging Face layout; gguf: where llama.cpp's copy of the same weights goes.
    sequences: the most that run together; context: tokens of the longest, prompt and generated.
    compile: also try what takes minutes to compile.
    """

    folder: str
    gguf: str
    dtype: str
    threads: int
    sequences: int
    context: int
    compile: bool

    @property
    def path(self) -> Path:
        return Path(self.folder)


@dataclasses.dataclass(slots=True)
class Run:
    """begin: `perf_counter()` when the prompts were handed over; times[i][j]: when token j of sequence i was
    there; tokens[i][j]: which."""

    begin: float
    times: list[list[float]]
    tokens: list[list[int]]

    def prefill_rate(self, prompt_tokens: int) -> float:
        """Prompt tokens per second until every prompt has its first token."""
        return prompt_tokens / (max(times[0] for times in self.times) - self.begin)

    def decode_rate(self) -> float:
        """Tokens per second while all sequences decode: from the moment when the last of them has its first
        token until the first of them has its last one."""
        begin, end = max(times[0] for times in self.times), min(times[-1] for times in self.times)
        if end <= begin:
            raise ValueError("too few new tokens: one sequence ended before another had begun")
        return sum(begin < at <= end for times in self.times for at in times) / (end - begin)


class Peer(Protocol):
    """A module's `Peer(settings)` loads and compiles. It may also have `probe() -> dict[str, float]`: rates
    of the machine itself, as its library reaches them."""

    versions: dict[str, str]

    def variants(self, kind: str) -> list[str]:
        """Ways to run `prefill` or `decode`. Each is tried before the rounds; the fastest is kept."""

    def measure(
        self, kind: str, prompts: list[list[int]], new_tokens: int, variant: str
    ) -> tuple[float, list[list[int]]]:
        """(tokens per second, the tokens drawn). Greedy, `new_tokens` for each prompt, whatever they are."""

    def facts(self) -> dict[str, Any]:
        """What else is worth keeping, after the last round."""


class EnginePeer:
    """A peer that generates; it only has to say when each token was there."""

    versions: dict[str, str]

    def variants(self, kind: str) -> list[str]:
        return ["default"]

    def facts(self) -> dict[str, Any]:
        return {}

    def run(self, prompts: list[list[int]], new_tokens: int, variant: str) -> Run:
        raise NotImplementedError

    def measure(
        self, kind: str, prompts: list[list[int]], new_tokens: int, variant: str
    ) -> tuple[float, list[list[int]]]:
        run = self.run(prompts, new_tokens, variant)
        counts = {len(times) for times in run.times} | {len(tokens) for tokens in run.tokens}
        if len(run.times) != len(prompts) or counts != {new_tokens}:
            raise ValueError(f"{len(prompts)} x {new_tokens} tokens wanted, got {len(run.times)} x {counts}")
        rate = run.prefill_rate(sum(map(len, prompts))) if kind == "prefill" else run.decode_rate()
        return rate, run.tokens


def load(name: str, settings: Settings) -> Peer:
    peer: Peer = importlib.import_module(NAMES[name]).Peer(settings)
    return peer
