"""Grammars' masks and embeddings where the vocabulary and the weights lie on several devices."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np

from jaxserve.build import build_engine
from jaxserve.config import EngineOptions
from jaxserve.scheduler.types import Pooling, SamplingParams, check_request
from tests import tiny
from tests.engine.conftest import Reply
from tests.engine.test_structured import Rule, finish, obeys, prompts, submit


def answers(folder: Path, mesh: str | None) -> tuple[list[list[int]], list[Any]]:
    engine = build_engine(
        str(folder),
        EngineOptions(max_slots=4, page_size=16, prefill_chunk=64, memory_fraction=0.5, mesh=mesh),
    )
    asked = prompts(4, seed=1)
    ruled = [submit(engine, f"{i}", prompt, Rule(length=12)) for i, prompt in enumerate(asked)]
    vectors = []
    for i, prompt in enumerate(asked):
        vectors.append(Reply())
        pooling = list(Pooling)[i % 2]
        request = check_request(
            f"v{i}", prompt, SamplingParams(max_tokens=0), engine.limits, time.monotonic(), pooling=pooling
        )
        engine.submit((request, vectors[-1]))
    finish(engine, ruled + vectors)
    engine.close()
    return [reply.tokens() for reply in ruled], [reply.outputs[-1].embedding for reply in vectors]


def test_they_are_those_of_one_device(tmp_path: Path) -> None:
    folder = tiny.write_model(tmp_path / "model")
    tokens, vectors = answers(folder, None)
    assert all(obeys(one) and len(one) == 12 for one in tokens)
    over_two = answers(folder, "tensor=2")
    assert over_two[0] == tokens
    for one, two in zip(vectors, over_two[1], strict=True):
        assert np.abs(one - two).max() <= 1e-4 * np.abs(one).max()
