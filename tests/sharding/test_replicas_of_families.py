"""Every family as two replicas on two fake devices each: the greedy tokens and the logprobs of one device."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from jaxserve import build
from jaxserve.engine.engine import Engine
from jaxserve.replicas import Replicas
from tests.sharding.running import write_model
from tests.sharding.test_families import CONFIGS
from tests.test_parts import Client, engines, idle, options, same_answers

pytestmark = pytest.mark.slow

RNG = np.random.default_rng(0)
PROMPTS = [RNG.integers(0, 512, length) for length in (1, 40, 150, 64, 100, 200)]
MESHES = [(name, "data=2,tensor=2") for name in CONFIGS]
MESHES += [(name, "data=2,expert=2") for name in CONFIGS if "num_experts_per_tok" in CONFIGS[name]]


@pytest.mark.parametrize(("name", "mesh"), MESHES)
def test_replicas_answer_as_one_device(tmp_path: Path, name: str, mesh: str) -> None:
    folder = str(write_model(CONFIGS[name], tmp_path))
    one = build.build_serving(folder, options(dtype="float32", max_slots=2, prefill_chunk=32))
    two = build.build_serving(folder, options(dtype="float32", max_slots=2, prefill_chunk=32, mesh=mesh))
    assert isinstance(one, Engine) and isinstance(two, Replicas)
    try:
        places = [engine._runner._state.pool.devices() for engine in engines(two)]
        assert [len(place) for place in places] == [2, 2] and not places[0] & places[1]
        one.start()
        two.start()
        tokens = same_answers(Client(two), Client(one), PROMPTS)
        assert len(np.unique(tokens)) > 8
        assert min(two.stats()["replica_requests"]) > 0
        idle(two)
    finally:
        one.close()
        two.close()
