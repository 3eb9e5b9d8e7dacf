"""transformers' continuous batching: its manager, with requests that it schedules itself."""

from __future__ import annotations

import time
from typing import Any

from transformers import GenerationConfig
from transformers.generation.configuration_utils import ContinuousBatchingConfig
from transformers.generation.continuous_batching.utils import WorkloadHints

from benchmarks.peers import EnginePeer, Run, Settings
from benchmarks.peers.hf import load_model, versions

PAGE = 256
BATCH_TOKENS = (512, 128)  # of packed prompts; its mask is over all of them together, so less can be faster
PATIENCE_S = 600.0


class Peer(EnginePeer):
    def __init__(self, settings: Settings) -> None:
        self.versions = versions()
        self._settings = settings
        self._model = load_model(settings)
        self._managers: dict[str, Any] = {}

    def variants(self, kind: str) -> list[str]:
        names = [f"{tokens} tokens a batch" for tokens in BATCH_TOKENS]
        return names if kind == "prefill" else names[:1]

    def run(self, prompts: list[list[int]], new_tokens: int, variant: str) -> Run:
        if variant not in self._managers:
            self._managers[variant] = self._start(int(variant.split()[0]))
        manager = self._managers[variant]
        begin = time.perf_counter()
        ids = manager.add_requests(prompts, max_new_tokens=new_tokens, record_timestamps=True)
        results: dict[str, Any] = {}
        while len(results) < len(ids):
            result = manager.get_result(timeout=1.0)
            if result is not None:
                if result.error is not None:
                    raise RuntimeError(result.error)
                results[result.request_id] = result
            elif not manager.is_running() or time.perf_counter() - begin > PATIENCE_S:
                raise RuntimeError(f"{len(ids) - len(results)} requests unanswered")
        done = [results[request_id] for request_id in ids]
        times = [list(result.timestamps) for result in done]
        return Run(begin, times, [list(result.generated_tokens) for result in done])

    def _start(self, batch_tokens: int) -> Any:
        # left alone, it takes 60 % of the memory for its cache
        longest = -(-self._settings.context // PAGE) + 1
        manager = self._model.init_continuous_batching(
            generation_config=GenerationConfig(do_sample=False, eos_token_id=-1, pad_token_id=0),
            continuous_batching_config=ContinuousBatchingConfig(
                page_size=PAGE,
                num_blocks=longest * self._settings.sequences,
                max_batch_tokens=batch_tokens,
                allow_block_sharing=False,
            ),
            workload_hints=WorkloadHints(num_requests=self._settings.sequences),
        )
        manager.start()
        return manager
