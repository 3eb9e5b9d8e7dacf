"""The first run of the programs, before anybody waits for them: it says what the machine does."""

from __future__ import annotations

import dataclasses
import itertools
import time

import numpy as np

from jaxserve.engine.engine import Engine
from jaxserve.engine.outputs import Sink
from jaxserve.scheduler.types import Request, SamplingParams, check_request


@dataclasses.dataclass(frozen=True)
class Speed:
    """Measured, in seconds: a decode step with every slot full, None where nothing is drawn, and a prefill of
    one whole chunk."""

    slots: int
    step: float | None
    chunk_tokens: int
    chunk: float

    def describe(self, objective: str) -> str:
        """What the objective trades: time to first token, time between tokens, throughput."""
        prompts = (
            f"{self.chunk_tokens} prompt tokens in {1e3 * self.chunk:.1f} ms"
            f" ({self.chunk_tokens / self.chunk:.0f} tokens/s)"
        )
        if self.step is None:
            return prompts
        return (
            f"objective {objective}: {prompts} are the least time to their first token;"
            f" tokens {1e3 * self.step:.1f} ms apart with {self.slots} slots full"
            f" ({self.slots / self.step:.0f} tokens/s),"
            f" at most {1e3 * (self.step + self.chunk):.1f} ms while prompts come in"
        )


def warm_up(engine: Engine) -> Speed:
    """Runs every slot for a few tokens, if the engine draws any, and a whole chunk of prompt; times them."""
    slots, length = engine.facts["slots"], engine.limits.max_model_len
    vocab, chunk = engine.limits.vocab_size, min(engine.scheduler.prefill_chunk, length - 1)
    numbers = itertools.count()

    def request(prompt_len: int, new_tokens: int) -> tuple[Request, Sink]:
        i = next(numbers)
        params = SamplingParams(temperature=0.0, max_tokens=new_tokens, ignore_eos=True)
        prompt = np.arange(i, i + prompt_len) % vocab
        made = check_request(f"warm-up-{i}", prompt, params, engine.limits, time.monotonic())
        return made, lambda output: None

    step = None
    if engine.decodes:
        new_tokens = min(16, length - 1)
        prompt_len = max(1, min(16, length - new_tokens))
        engine.submit(*(request(prompt_len, new_tokens) for _ in range(slots)))
        while engine.stats()["waiting"] or engine.stats()["generation_tokens_total"] < slots:
            engine.step()
        tokens, begin = engine.stats()["generation_tokens_total"], time.perf_counter()
        while engine.step():
            pass
        seconds = time.perf_counter() - begin
        step = slots * seconds / (engine.stats()["generation_tokens_total"] - tokens)
    for _ in range(2):  # the first may still touch new memory
        engine.submit(request(chunk, 1))
        seconds = sum(engine.step_apart())
    engine.reset_counters()
    return Speed(slots, step, chunk, seconds)
