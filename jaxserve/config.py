"""What a user can choose: frozen dataclasses that the command line, the environment and `LLM` all fill.

A field's name is its flag (`max_model_len` is `--max-model-len`) and its environment variable
(`JAXSERVE_MAX_MODEL_LEN`). Each is complete when made; what depends on the model or the machine is
decided in `build.py`. Knows nothing of jax.
"""

from __future__ import annotations

import dataclasses
from typing import Literal


@dataclasses.dataclass(frozen=True, slots=True)
class EngineOptions:
    """How a model is loaded, laid out and run.

    dtype: of weights and KV pages; auto takes what the checkpoint says.
    max_model_len: longest context in tokens, prompt and generated together; None takes the model's own.
    max_slots: sequences that decode together.
    page_size: tokens per KV page.
    kv_pages: pages in the pool; None takes what memory holds, at most what all slots can use.
    memory_fraction: share of the device's (on CPU: the free) memory that weights, pool and programs may take.
    prefill_chunk: prompt tokens computed between two decode steps.
    mesh: devices per axis, e.g. data=1,tensor=4,expert=1.
    seed: draws the seeds of requests that bring none; with load_format dummy, the weights too.
    load_format: auto reads the checkpoint; dummy draws random weights from config.json alone.
    """

    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    max_model_len: int | None = None
    max_slots: int = 16
    page_size: int = 64
    kv_pages: int | None = None
    memory_fraction: float = 0.9
    prefill_chunk: int = 512
    mesh: str = "data=1,tensor=1,expert=1"
    seed: int = 0
    load_format: Literal["auto", "dummy"] = "auto"

    def __post_init__(self) -> None:
        for name, low, high in (
            ("max_slots", 1, 4096),
            ("page_size", 8, 1024),
            ("prefill_chunk", 16, 65536),
            ("seed", 0, 2**63 - 1),
        ):
            value = getattr(self, name)
            if not low <= value <= high:
                raise ValueError(f"--{name.replace('_', '-')}={value} must lie in [{low}, {high}]")
        if self.page_size & (self.page_size - 1):
            raise ValueError(f"--page-size={self.page_size} must be a power of two")
        for name in ("max_model_len", "kv_pages"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"--{name.replace('_', '-')}={value} must be at least 1")
        if not 0.0 < self.memory_fraction <= 1.0:
            raise ValueError(f"--memory-fraction={self.memory_fraction} must lie in (0, 1]")


@dataclasses.dataclass(frozen=True, slots=True)
class ServerOptions:
    """Where and for whom the server listens.

    host: the address to bind; beyond 127.0.0.1 give it a key.
    port: 0 takes a free one.
    api_key: clients must send it as `Authorization: Bearer KEY`.
    api_key_file: likewise, one key a line.
    served_model_name: the name that requests give; None takes the last part of the folder or hub id.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    api_key: str | None = None
    api_key_file: str | None = None
    served_model_name: str | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.port <= 65535:
            raise ValueError(f"--port={self.port} must lie in [0, 65535]")
