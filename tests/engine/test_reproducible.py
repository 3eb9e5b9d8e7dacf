"""`--reproducible`: a request gets the same bytes, tokens and logprobs, whatever happens around it."""

from __future__ import annotations

import dataclasses
import hashlib
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from jaxserve.build import build_engine
from jaxserve.config import EngineOptions
from jaxserve.engine.engine import Engine
from jaxserve.scheduler.types import SamplingParams, Tier, check_request
from tests import tiny
from tests.engine.conftest import Reply

# few slots and pages: online work must take them from batch work
OPTIONS = EngineOptions(
    max_slots=8, page_size=16, kv_pages=48, memory_fraction=0.5, prefill_chunk=64, reproducible=True
)
COUNT, MIXES = 50, 20
ROOT = Path(__file__).resolve().parents[2]


@dataclasses.dataclass(frozen=True)
class Asked:
    prompt: np.ndarray
    params: SamplingParams


def asked() -> list[Asked]:
    """Half of the prompts begin alike; every way of drawing is there."""
    rng = np.random.default_rng(11)
    beginnings = [rng.integers(0, tiny.VOCAB, 48) for _ in range(3)]
    ways = [
        {"temperature": 0.0},
        {"temperature": 1.0},
        {"temperature": 0.8, "top_p": 0.9, "top_k": 20},
        {"temperature": 1.0, "frequency_penalty": 0.5, "repetition_penalty": 1.2},
        {"temperature": 0.0, "presence_penalty": 1.0, "logit_bias": {5: 3.0}},
    ]
    result = []
    for i in range(COUNT):
        own = rng.integers(0, tiny.VOCAB, rng.integers(1, 100))
        prompt = np.concatenate([beginnings[i % 3], own]) if i % 2 else own
        params = SamplingParams(
            max_tokens=int(rng.integers(1, 60)),
            seed=i,
            logprobs=2,
            ignore_eos=True,
            **ways[i % len(ways)],  # type: ignore[arg-type]
        )
        result.append(Asked(prompt, params))
    return result


def submit(engine: Engine, name: str, one: Asked, tier: Tier = Tier.ONLINE) -> Reply:
    reply = Reply()
    now = time.monotonic()
    engine.submit((check_request(name, one.prompt, one.params, engine.limits, now, tier=tier), reply))
    return reply


def answer(reply: Reply) -> bytes:
    """Everything that the client is told, to the last bit."""
    parts = [struct.pack(f"<{len(reply.tokens())}q", *reply.tokens())]
    for entry in reply.logprobs():
        parts.append(struct.pack("<dq", entry.logprob, entry.rank))
        parts += [struct.pack("<qd", token, value) for token, value in entry.top]
    return b"".join(parts)


def alone(engine: Engine, name: str, one: Asked) -> bytes:
    reply = submit(engine, name, one)
    while engine.step():
        pass
    return answer(reply)


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    return tiny.write_model(tmp_path_factory.mktemp("models") / "tiny"), request.param


def start(model: tuple[Path, str]) -> Engine:
    return build_engine(str(model[0]), dataclasses.replace(OPTIONS, dtype=model[1]))  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def engine(model: tuple[Path, str]) -> Iterator[Engine]:
    engine = start(model)
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def expected(engine: Engine) -> list[bytes]:
    """Each request alone; prefixes that earlier ones left may serve later ones already."""
    return [alone(engine, f"alone-{i}", one) for i, one in enumerate(asked())]


def test_in_any_mix_with_preemption_prefix_hits_and_other_chunks(
    engine: Engine, expected: list[bytes]
) -> None:
    requests, chunk = asked(), engine.scheduler.prefill_chunk
    before = engine.stats()
    for mix in range(MIXES):
        rng = np.random.default_rng(mix)
        engine.scheduler.prefill_chunk = int(rng.choice([16, 23, 40, chunk]))
        replies: dict[int, Reply] = {}
        for i in rng.permutation(COUNT).tolist():
            tier = Tier.BATCH if rng.random() < 0.5 else Tier.ONLINE
            replies[i] = submit(engine, f"mix-{mix}-{i}", requests[i], tier)
            for _ in range(int(rng.integers(0, 6))):
                engine.step()
        while engine.step():
            pass
        engine.scheduler.check_invariants()
        different = [i for i in range(COUNT) if answer(replies[i]) != expected[i]]
        assert not different, f"mix {mix}: requests {different} changed"
    engine.scheduler.prefill_chunk = chunk
    after = engine.stats()
    assert after["preemptions"] > before["preemptions"]
    assert after["prefix_hit_tokens"] > before["prefix_hit_tokens"]


AFTER_A_RESTART = """
import hashlib, sys
import numpy as np
from pathlib import Path
from tests.engine import test_reproducible as it
engine = it.start((Path(sys.argv[1]), sys.argv[2]))
requests, replies = it.asked(), {}
rng = np.random.default_rng(99)
for i in rng.permutation(it.COUNT).tolist():
    replies[i] = it.submit(engine, f"again-{i}", requests[i], it.Tier.BATCH if i % 3 else it.Tier.ONLINE)
    for _ in range(int(rng.integers(0, 6))):
        engine.step()
while engine.step():
    pass
for i in range(it.COUNT):
    print(hashlib.sha256(it.answer(replies[i])).hexdigest())
"""


def test_after_a_restart(model: tuple[Path, str], expected: list[bytes]) -> None:
    """Another process, with all requests in another mix."""
    command = [sys.executable, "-c", AFTER_A_RESTART, str(model[0]), model[1]]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == [hashlib.sha256(answer).hexdigest() for answer in expected]


def test_a_preempted_request_is_sent_nothing_twice(engine: Engine, expected: list[bytes]) -> None:
    requests = asked()
    longest = sorted(range(COUNT), key=lambda i: -(requests[i].params.max_tokens or 0))[:8]
    behind = {i: submit(engine, f"behind-{i}", requests[i], Tier.BATCH) for i in longest}
    for _ in range(6):
        engine.step()
    before = engine.stats()["preemptions"]
    for i in range(8):
        submit(engine, f"ahead-{i}", requests[i])
    for _ in range(3):  # online work comes in as fast as its prompts are computed
        engine.step()
    assert engine.stats()["preemptions"] > before
    while engine.step():
        pass
    for i, reply in behind.items():
        assert answer(reply) == expected[i]
        assert len(reply.finishes) == 1
