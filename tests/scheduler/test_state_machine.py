"""The same loop as in `test_simulation`, driven by Hypothesis, which shrinks what fails to a short story."""

from __future__ import annotations

import random

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    precondition,
    rule,
    run_state_machine_as_test,
)

from tests.scheduler.test_simulation import Trace


class Machine(RuleBasedStateMachine):
    """Clients and the engine take turns in any order; in the end all is read back and accounted for."""

    trace: Trace

    @initialize(rng=st.randoms(use_true_random=False))
    def start(self, rng: random.Random) -> None:
        self.trace = Trace(rng)

    @rule()
    def arrive(self) -> None:
        self.trace.arrive()

    @rule(turns=st.integers(1, 6))
    def turn(self, turns: int) -> None:
        for _ in range(turns):
            self.trace.turn()

    @precondition(lambda self: self.trace.in_flight)
    @rule()
    def read_back(self) -> None:
        self.trace.read_back()

    @precondition(lambda self: self.trace.sequences)
    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        self.trace.leave(data.draw(st.sampled_from(self.trace.sequences)).request.request_id)

    @rule(seconds=st.floats(0, 100))
    def wait(self, seconds: float) -> None:
        self.trace.now += seconds
        self.trace.expire()

    @rule(tokens=st.integers(1, 24))
    def resize(self, tokens: int) -> None:
        self.trace.scheduler.prefill_chunk = tokens

    def teardown(self) -> None:
        if hasattr(self, "trace"):
            while self.trace.scheduler.has_work:
                self.trace.turn()
            self.trace.check_end()


def test_any_story_ends_well() -> None:
    run_state_machine_as_test(
        Machine,
        settings=settings(
            max_examples=60,
            stateful_step_count=25,
            deadline=None,
            derandomize=True,
            database=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
