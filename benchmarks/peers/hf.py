"""transformers' `generate`: one batch of prompts of equal length. No end token: the config names none."""

from __future__ import annotations

import time
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, GenerationConfig, StoppingCriteria, StoppingCriteriaList

from benchmarks.peers import EnginePeer, Run, Settings

PREFILL_GROUP = 4  # prompts per forward pass in the variant that keeps activations in cache


def load_model(settings: Settings) -> Any:
    torch.set_num_threads(settings.threads)
    torch.set_grad_enabled(False)
    model = AutoModelForCausalLM.from_pretrained(
        settings.folder, dtype=getattr(torch, settings.dtype), attn_implementation="sdpa"
    )
    return model.eval()


def versions() -> dict[str, str]:
    return {"transformers": transformers.__version__, "torch": torch.__version__}


class _Clock(StoppingCriteria):
    """Never stops; notes when each token was there."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **_: object) -> torch.Tensor:
        self.times.append(time.perf_counter())
        return torch.zeros(input_ids.shape[0], dtype=torch.bool)


class Peer(EnginePeer):
    def __init__(self, settings: Settings) -> None:
        self.versions = versions()
        self._compile = settings.compile
        self._model = load_model(settings)

    def variants(self, kind: str) -> list[str]:
        names = ["dynamic cache", "static cache"]
        if kind == "prefill":
            return [*names, f"dynamic cache, {PREFILL_GROUP} prompts at a time"]
        return [*names, "static cache, compiled"] if self._compile else names

    def run(self, prompts: list[list[int]], new_tokens: int, variant: str) -> Run:
        size = PREFILL_GROUP if variant.endswith("at a time") else len(prompts)
        options: dict[str, Any] = {}
        if variant.startswith("static"):
            options["cache_implementation"] = "static"
        if variant.endswith("compiled"):
            options["compile_config"] = transformers.CompileConfig(mode="default", fullgraph=False)
            options["compile_config"]._compile_all_devices = True
        begin = time.perf_counter()
        run = Run(begin, [], [])
        for start in range(0, len(prompts), size):
            ids = torch.tensor(prompts[start : start + size])
            clock = _Clock()
            out = self._model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                generation_config=GenerationConfig(
                    do_sample=False, max_new_tokens=new_tokens, pad_token_id=0, **options
                ),
                stopping_criteria=StoppingCriteriaList([clock]),
            )
            run.times += [clock.times] * len(ids)
            run.tokens += out[:, ids.shape[1] :].tolist()
        return run

    def probe(self) -> dict[str, float]:
        """Large products in torch (oneDNN or MKL), GFLOP/s."""
        rates: dict[str, float] = {}
        for name, dtype in (("bf16", torch.bfloat16), ("f32", torch.float32)):
            a, b = torch.randn(2048, 2048).to(dtype), torch.randn(2048, 2048).to(dtype)
            best = float("inf")
            for _ in range(8):
                begin = time.perf_counter()
                torch.nn.functional.linear(a, b)
                best = min(best, time.perf_counter() - begin)
            rates[f"torch_{name}_gflops"] = 2 * 2048**3 / best / 1e9
        return rates
