"""One tiny engine for all tests of this folder: compiled once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import pytest

from jaxserve.build import build_engine
from jaxserve.config import EngineOptions
from jaxserve.engine.engine import Engine
from jaxserve.engine.outputs import Output
from jaxserve.scheduler.types import SamplingParams, check_request
from tests import tiny

OPTIONS = EngineOptions(max_slots=16, page_size=16, prefill_chunk=64, memory_fraction=0.5)


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory):
    return tiny.write_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def shared_engine(tiny_folder) -> Iterator[Engine]:
    engine = build_engine(str(tiny_folder), OPTIONS)
    yield engine
    engine.close()


@pytest.fixture
def engine(shared_engine: Engine) -> Iterator[Engine]:
    """The shared engine, idle before and after: every slot and page is back."""
    assert shared_engine.scheduler.pages_used == 0
    yield shared_engine
    while shared_engine.step():
        pass
    shared_engine.scheduler.check_invariants()
    assert shared_engine.scheduler.pages_used == 0
    assert shared_engine.scheduler.num_running == shared_engine.scheduler.num_waiting == 0


class Reply:
    """What one request got, all its increments together."""

    def __init__(self) -> None:
        self.outputs: list[Output] = []

    def __call__(self, output: Output) -> None:
        self.outputs.append(output)

    def tokens(self, index: int = 0) -> list[int]:
        return [token for output in self.outputs if output.index == index for token in output.token_ids]

    def logprobs(self, index: int = 0) -> list[Any]:
        return [entry for output in self.outputs if output.index == index for entry in output.logprobs or ()]

    @property
    def finishes(self) -> list[Any]:
        return [output.finish_reason for output in self.outputs if output.finish_reason is not None]


@pytest.fixture
def ask(engine: Engine) -> Callable[..., Reply]:
    """ask(prompt, **params) queues a request and returns the reply that `engine.step()` fills."""
    count = iter(range(10**9))

    def ask(prompt: Iterable[int], **params: Any) -> Reply:
        reply = Reply()
        params = {"temperature": 0.0, "max_tokens": 16} | params
        reply.request = check_request(  # type: ignore[attr-defined]
            f"request-{next(count)}", np.asarray(prompt), SamplingParams(**params), engine.limits, 0.0
        )
        engine.submit((reply.request, reply))  # type: ignore[attr-defined]
        return reply

    return ask


@pytest.fixture
def run(engine: Engine, ask: Callable[..., Reply]) -> Callable[..., Reply]:
    """As `ask`, alone in the engine and to the end."""

    def run(prompt: Iterable[int], **params: Any) -> Reply:
        reply = ask(prompt, **params)
        while engine.step():
            pass
        return reply

    return run
