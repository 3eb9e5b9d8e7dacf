"""`tests.fakes.FakeEngine` with the rest of the engine's form: a bounded queue, deadlines, a step that can be
stuck, several sequences to choose from, and a prefix cache of sorts.
"""

from __future__ import annotations

import time
from typing import Any

from jaxserve.engine.outputs import EngineBusy, Output, Sink
from jaxserve.scheduler.types import Finish, Request, Tier
from tests import fakes
from tests.fakes import successor


class FakeEngine(fakes.FakeEngine):
    """max_queued: requests that may wait; one more is refused with `retry_after`.

    requests: all that were taken. busy: refuse this many requests, whatever waits. stuck: as the engine's.
    A prompt that was seen under the same salt is cached up to its last token. Of several sequences to choose
    from, index i starts i letters later and has the log-probability likelihoods[i], or -i per token.
    """

    def __init__(
        self,
        *,
        max_queued: int = 1024,
        retry_after: int = 7,
        likelihoods: tuple[float, ...] = (),
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self.likelihoods = likelihoods
        self.facts["fingerprint"] = "fake"
        self.stuck: str | None = None
        self.requests: list[Request] = []
        self.busy = 0
        self.rejected = 0
        self._max_queued, self._retry_after = max_queued, retry_after
        self._seen: dict[tuple[bytes, bytes], bool] = {}
        self._cached: dict[str, int] = {}

    def submit(self, *requests: tuple[Request, Sink]) -> None:
        with self._changed:
            if self.busy or len(self._waiting) >= self._max_queued:
                self.busy = max(0, self.busy - 1)
                self.rejected += len(requests)
                raise EngineBusy(self._retry_after)
            for request, sink in requests:
                self._take(request, sink)

    def _take(self, request: Request, sink: Sink) -> None:
        super().submit((request, sink))
        self.requests.append(request)
        last = int(request.prompt_token_ids[-1])
        for index in range(request.params.n, request.params.sequences):
            self._waiting.append(fakes._Sequence(request, sink, index, last))
        if request.params.sequences > request.params.n:
            for sequence in self._waiting:
                if sequence.request is request:
                    for _ in range(sequence.index):
                        sequence.last = successor(sequence.last)
        seen = self._seen.setdefault((request.salt, request.prompt_token_ids.tobytes()), False)
        self._cached[request.request_id] = len(request.prompt_token_ids) - 1 if seen else 0

    def step(self) -> bool:
        with self._changed:
            for sequence in [*self._running, *self._waiting]:
                deadline = sequence.request.deadline
                if deadline is not None and time.monotonic() >= deadline:
                    (self._running if sequence in self._running else self._waiting).remove(sequence)
                    name = sequence.request.request_id
                    sequence.sink(Output(name, sequence.index, finish_reason=Finish.TIMEOUT))
        return super().step()

    def _advance(self, sequence: fakes._Sequence) -> Output:
        request, first = sequence.request, not sequence.started
        output = super()._advance(sequence)
        if first:
            output.cached_tokens = self._cached[request.request_id]
            self._seen[request.salt, request.prompt_token_ids.tobytes()] = True
        if request.params.sequences > request.params.n and output.finish_reason is not None:
            per_token = -float(sequence.index * sequence.tokens)
            output.cumulative_logprob = self.likelihoods[sequence.index] if self.likelihoods else per_token
        return output

    def stats(self) -> dict[str, Any]:
        with self._changed:
            running, waiting = list(self._running), list(self._waiting)

        def by_tier(state: str, sequences: list[fakes._Sequence]) -> dict[str, int]:
            return {f"{state}_{tier}": sum(one.request.tier is tier for one in sequences) for tier in Tier}

        return {
            **super().stats(),
            **by_tier("running", running),
            **by_tier("waiting", waiting),
            **by_tier("preempted", []),
            "pages_cached": 3,
            "waiting_tokens": sum(len(one.request.prompt_token_ids) for one in waiting if not one.index),
            "waiting_tokens_online": 0,
            "rejected_total": self.rejected,
            "prefix_queries_tokens": sum(len(one.prompt_token_ids) for one in self.requests),
            "prefix_hit_tokens": sum(self._cached.values()),
            "evictions": 5,
            "decode_steps_of_1": 2,
            "decode_steps_of_2": 3,
            "decode_rows": 8,
            "preemptions": 6,
        }
