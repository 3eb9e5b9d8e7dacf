"""llama.cpp through llama-cpp-python's low-level API: one `llama_decode` a step for all sequences, logits
only where a token is drawn, greedy by numpy's argmax over the returned rows.
"""

from __future__ import annotations

import ctypes
import json
import sys
import time
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np

from benchmarks.peers import EnginePeer, Run, Settings
from benchmarks.peers.gguf_file import write_gguf
from benchmarks.peers.weights import Shape

FLASH = {"flash": 1, "no flash": 0}  # LLAMA_FLASH_ATTN_TYPE_ENABLED, _DISABLED
WARNING = 3  # GGML_LOG_LEVEL_WARN


@llama_cpp.llama_log_callback  # type: ignore[untyped-decorator]
def log(level: int, text: bytes, user_data: object) -> None:
    if level >= WARNING:
        print(text.decode(errors="replace"), end="", file=sys.stderr)


class Peer(EnginePeer):
    def __init__(self, settings: Settings) -> None:
        self.versions = {"llama-cpp-python": llama_cpp.__version__}
        if settings.dtype != "bfloat16":
            raise ValueError(f"only bfloat16 is written to GGUF, not {settings.dtype}")
        self._settings = settings
        path = Path(settings.gguf)
        if not path.exists():
            config = json.loads((settings.path / "config.json").read_text())
            partial = path.with_suffix(".part")
            shape = Shape.from_folder(settings.path)
            write_gguf(settings.path, partial, shape, config["rms_norm_eps"], config["rope_theta"])
            partial.rename(path)
        llama_cpp.llama_log_set(log, ctypes.c_void_p(0))
        llama_cpp.llama_backend_init()
        self._model = llama_cpp.llama_model_load_from_file(
            str(path).encode(), llama_cpp.llama_model_default_params()
        )
        if not self._model:
            raise RuntimeError(f"llama.cpp cannot load {path}")
        self._vocab = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self._model))

    def variants(self, kind: str) -> list[str]:
        names = [f"{flash}, {kv} KV" for flash in FLASH for kv in ("unified", "split")]
        return [*names, "flash, unified KV, ubatch 128"] if kind == "prefill" else names

    def facts(self) -> dict[str, Any]:
        return {"system": llama_cpp.llama_print_system_info().decode()}

    def run(self, prompts: list[list[int]], new_tokens: int, variant: str) -> Run:
        longest = max(map(len, prompts))
        params = llama_cpp.llama_context_default_params()
        params.n_seq_max = len(prompts)
        params.n_ctx = len(prompts) * (-(-(longest + new_tokens) // 256) * 256)
        params.n_batch = max(sum(map(len, prompts)), len(prompts))
        params.n_ubatch = 128 if variant.endswith("ubatch 128") else 512
        params.n_threads = params.n_threads_batch = self._settings.threads
        params.flash_attn_type = FLASH[variant.split(",")[0]]
        params.kv_unified = "unified" in variant
        params.no_perf = True
        context = llama_cpp.llama_init_from_model(self._model, params)
        if not context:
            raise RuntimeError(f"llama.cpp makes no context for {len(prompts)} sequences ({variant})")
        batch = llama_cpp.llama_batch_init(params.n_batch, 0, 1)
        try:
            return self._generate(context, batch, prompts, new_tokens)
        finally:
            llama_cpp.llama_batch_free(batch)
            llama_cpp.llama_free(context)

    def _generate(self, context: Any, batch: Any, prompts: list[list[int]], new_tokens: int) -> Run:
        rows = range(len(prompts))
        times: list[list[float]] = [[] for _ in rows]
        tokens: list[list[int]] = [[] for _ in rows]
        begin = time.perf_counter()
        at = 0
        for row, prompt in enumerate(prompts):
            for position, token in enumerate(prompt):
                put(batch, at, token, position, row, position == len(prompt) - 1)
                at += 1
        batch.n_tokens = at
        for step in range(new_tokens):
            if step:
                for row in rows:
                    put(batch, row, tokens[row][-1], len(prompts[row]) + step - 1, row, True)
                batch.n_tokens = len(prompts)
            status = llama_cpp.llama_decode(context, batch)
            if status:
                raise RuntimeError(f"llama_decode returned {status}")
            drawn = self._logits(context, len(prompts)).argmax(axis=1)
            now = time.perf_counter()
            for row in rows:
                tokens[row].append(int(drawn[row]))
                times[row].append(now)
        return Run(begin, times, tokens)

    def _logits(self, context: Any, count: int) -> np.ndarray:
        """f32[count, vocabulary], in the order in which the batch asked for them."""
        pointer = llama_cpp.llama_get_logits(context)
        array = ctypes.cast(pointer, ctypes.POINTER(ctypes.c_float * (count * self._vocab))).contents
        return np.frombuffer(array, np.float32).reshape(count, self._vocab)


def put(batch: Any, at: int, token: int, position: int, sequence: int, logits: bool) -> None:
    batch.token[at] = token
    batch.pos[at] = position
    batch.n_seq_id[at] = 1
    batch.seq_id[at][0] = sequence
    batch.logits[at] = logits
