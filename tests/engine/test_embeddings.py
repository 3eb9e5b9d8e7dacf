"""Hidden states as vectors, against transformers, whatever they are packed with."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from numpy.typing import NDArray

from jaxserve.engine.engine import Engine
from jaxserve.scheduler.types import Pooling, RequestError, SamplingParams, check_request
from tests.engine.conftest import Reply
from tests.tiny import VOCAB


def submit(engine: Engine, name: str, prompt: Any, pooling: Pooling | None, **params: Any) -> Reply:
    reply = Reply()
    made = SamplingParams(max_tokens=0 if pooling else 8, temperature=0.0, **params)
    request = check_request(name, np.asarray(prompt), made, engine.limits, time.monotonic(), pooling=pooling)
    engine.submit((request, reply))
    return reply


@pytest.fixture(scope="module")
def reference(tiny_folder: Any) -> Any:
    return transformers.AutoModel.from_pretrained(tiny_folder, dtype=torch.float32).eval()


def expected(reference: Any, prompt: NDArray[np.int64], pooling: Pooling) -> NDArray[np.float32]:
    with torch.no_grad():
        states = reference(torch.tensor(prompt)[None]).last_hidden_state[0]
    return (states[-1] if pooling is Pooling.LAST else states.mean(0)).numpy()


def test_they_are_transformers_whatever_runs_beside_them(engine: Engine, reference: Any) -> None:
    """Prompts longer than a chunk, prompts that the prefix cache knows, replies in between."""
    rng = np.random.default_rng(3)
    beginning = rng.integers(0, VOCAB, 80)
    asked = []
    for i in range(20):
        own = rng.integers(0, VOCAB, rng.integers(1, 120))
        prompt = np.concatenate([beginning, own]) if i % 3 == 0 else own
        asked.append((prompt, list(Pooling)[i % 2]))
    replies = []
    for i, (prompt, pooling) in enumerate(asked):
        replies.append(submit(engine, f"embed-{i}", prompt, pooling))
        submit(engine, f"reply-{i}", prompt, None, prompt_logprobs=1 if i % 4 else None)
    while engine.step():
        pass
    for (prompt, pooling), reply in zip(asked, replies, strict=True):
        [vector] = [output.embedding for output in reply.outputs if output.embedding is not None]
        want = expected(reference, prompt, pooling)
        assert vector.shape == want.shape and vector.dtype == np.float32
        assert np.abs(vector - want).max() <= 1e-4 * np.abs(want).max()
        assert reply.tokens() == [] and reply.finishes == ["length"]
    hits = [reply.outputs[0].cached_tokens for reply in replies]
    assert max(hits[::6]) >= 64  # the last token's vector needs no more than that
    assert set(hits[3::6]) == {0}  # their mean needs all of them


@pytest.mark.parametrize(
    "params", [{"max_tokens": 1}, {"max_tokens": 0, "n": 2}, {"max_tokens": 0, "prompt_logprobs": 0}]
)
def test_a_vector_is_of_a_prompt_alone(engine: Engine, params: dict[str, Any]) -> None:
    with pytest.raises(RequestError, match="max_tokens"):
        check_request("x", [1], SamplingParams(**params), engine.limits, 0.0, pooling=Pooling.LAST)
