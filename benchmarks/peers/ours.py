"""This engine, built from the folder as `jaxserve serve` builds it; the loop is driven from here."""

from __future__ import annotations

import time
from typing import Any

import jax
import jaxlib.version
import numpy as np

from benchmarks.peers import EnginePeer, Run, Settings
from jaxserve.build import build_engine
from jaxserve.config import EngineOptions
from jaxserve.engine.engine import Engine
from jaxserve.engine.outputs import Output
from jaxserve.scheduler.types import SamplingParams, check_request


def generate(engine: Engine, prompts: list[list[int]], new_tokens: int) -> Run:
    params = SamplingParams(temperature=0.0, max_tokens=new_tokens, ignore_eos=True)
    times: list[list[float]] = [[] for _ in prompts]
    tokens: list[list[int]] = [[] for _ in prompts]

    def sink(output: Output) -> None:
        if output.error is not None:
            raise RuntimeError(output.error)
        row, now = int(output.request_id), time.perf_counter()
        times[row] += [now] * len(output.token_ids)
        tokens[row] += output.token_ids

    begin = time.perf_counter()
    for i, prompt in enumerate(prompts):
        ids = np.asarray(prompt, np.int32)
        engine.submit((check_request(str(i), ids, params, engine.limits, time.monotonic()), sink))
    while engine.step():
        pass
    return Run(begin, times, tokens)


class Peer(EnginePeer):
    def __init__(self, settings: Settings) -> None:
        self.versions = {"jax": jax.__version__, "jaxlib": jaxlib.version.__version__}
        options = EngineOptions(
            dtype=settings.dtype,  # type: ignore[arg-type]
            max_slots=settings.sequences,
            tuned=False,  # figures of different days are of the same sizes
        )
        self._engine = build_engine(settings.folder, options, progress=print)

    def run(self, prompts: list[list[int]], new_tokens: int, variant: str) -> Run:
        return generate(self._engine, prompts, new_tokens)

    def facts(self) -> dict[str, Any]:
        return {"devices": [device.device_kind for device in jax.devices()], **self._engine.stats()}
