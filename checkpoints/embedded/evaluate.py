"""Bits per byte of the embedded model on the held-out modules, beside what `xz -9` makes of the same files.

Every byte of each file counts. A file is scored as `<|bos|>` and its tokens (the closing `<|end|>` is not
scored, as xz's figure has no such symbol either). Windows are `context` tokens long and move on by half of
that: the first is scored whole, of each later one only the tokens that no earlier window scored, so that a
token after the first window has between context / 2 and context tokens before it.
"""

import hashlib
import json
import lzma
import math
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tokenizers import Tokenizer

from checkpoints.embedded.model import ModelConfig, Params, token_losses

ROWS = 4  # windows scored at a time


def spans(length: int, context: int) -> Iterator[tuple[int, int, int]]:
    """(start, first scored, end) of each window over `length` tokens; the first, BOS, is never scored."""
    scored = 1
    while scored < length:
        start = 0 if scored == 1 else scored - context // 2
        end = min(start + context, length)
        yield start, scored, end
        scored = end


def make_scorer(config: ModelConfig) -> Callable[[Params, np.ndarray], np.ndarray]:
    """(weights, i32[ROWS, context]) to nats f32[ROWS, context - 1], computed in f32."""
    return jax.jit(partial(token_losses, config=config, dtype=jnp.float32))


def nats_of(params: Params, ids: list[int], context: int, scorer: Callable) -> float:
    """The sum over all tokens after the first."""
    windows = list(spans(len(ids), context))
    total = 0.0
    for i in range(0, len(windows), ROWS):
        batch = np.zeros((ROWS, context), np.int32)
        for row, (start, _, end) in enumerate(windows[i : i + ROWS]):
            batch[row, : end - start] = ids[start:end]
        losses = np.asarray(scorer(params, batch), np.float64)
        for row, (start, scored, end) in enumerate(windows[i : i + ROWS]):
            total += losses[row, scored - start - 1 : end - start - 1].sum()
    return total


def evaluate(params: Params, config: ModelConfig, tokenizer: Tokenizer, texts: dict[str, str]) -> dict:
    """Per file and together: bytes, tokens, bits per byte of the model and of xz, and their ratio."""
    scorer = make_scorer(config)
    files: dict[str, dict[str, Any]] = {}
    for path, text in sorted(texts.items()):
        size, ids = len(text.encode()), tokenizer.encode(text).ids
        bits = nats_of(params, ids, config.context, scorer) / math.log(2)
        xz_bits = 8 * len(lzma.compress(text.encode(), preset=9))
        digest = hashlib.sha256(text.encode()).hexdigest()
        files[path] = {
            "bytes": size,
            "tokens": len(ids) - 1,
            "model_bits": bits,
            "xz_bits": xz_bits,
            "sha256": digest,
        }
    total: dict[str, Any] = {
        key: sum(file[key] for file in files.values()) for key in ("bytes", "tokens", "model_bits", "xz_bits")
    }
    for row in (*files.values(), total):
        row["model_bits_per_byte"] = row.pop("model_bits") / row["bytes"]
        row["xz_bits_per_byte"] = row.pop("xz_bits") / row["bytes"]
        row["share_of_xz"] = row["model_bits_per_byte"] / row["xz_bits_per_byte"]
    return {"total": total, "files": files}


def write_evaluation(file: Path, evaluation: dict, **facts: object) -> None:
    """JSON, the facts first."""
    file.write_text(json.dumps(facts | evaluation, indent=1) + "\n")
