"""The engine's loop: plan, dispatch, read back the step before, commit.

    step n+1 is planned and dispatched   ->   step n is read back   ->   its tokens become text and are sent

so the device always has the next step before the host looks at the last one. One thread runs the loop;
`submit` and `abort` may be called from any other. The engine does not know about HTTP, nor how a model is
loaded: `build.py` hands it what is ready.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import random
import threading
import time
from typing import Any

import jax
import numpy as np
from numpy.typing import NDArray

from jaxserve.engine import batch
from jaxserve.engine.outputs import Output, Sink
from jaxserve.engine.programs import Programs, bucket_for
from jaxserve.engine.state import EngineState
from jaxserve.engine.streams import Stream
from jaxserve.models.decoder import Params
from jaxserve.scheduler.scheduler import Scheduler
from jaxserve.scheduler.types import Finish, Limits, PrefillRow, Request, Sequence, StepPlan
from jaxserve.text.tokenizer import Tokenizer


@dataclasses.dataclass(slots=True)
class _Flight:
    """A dispatched plan, and the device arrays that will hold its results."""

    plan: StepPlan
    prefill: jax.Array | None = None
    decode: jax.Array | None = None
    prompt_logprobs: jax.Array | None = None


@dataclasses.dataclass(slots=True)
class StepTimes:
    """Seconds, summed over `steps`. host: planning, packing, dispatching, committing, text. wait: blocked
    on the device while reading back. Host time that overlaps the device costs nothing until wait is zero."""

    steps: int = 0
    host: float = 0.0
    wait: float = 0.0


class Engine:
    """Runs requests over a loaded model.

    programs: compiled; see `build.py` for the kinds. params, state: on the device; the state is given away.
    prefill_rows: rows of each prefill bucket.
    """

    def __init__(
        self,
        *,
        limits: Limits,
        tokenizer: Tokenizer | None,
        programs: Programs,
        params: Params,
        state: EngineState,
        scheduler: Scheduler,
        prefill_rows: dict[int, int],
        seed: int,
        facts: dict[str, Any],
    ) -> None:
        self.limits = limits
        self.tokenizer = tokenizer
        self.scheduler = scheduler
        self.facts = facts  # what stats() repeats: sizes, names, start-up figures
        self.failure: BaseException | None = None
        self.times = StepTimes()
        self._programs = programs
        self._params = params
        self._state = state
        self._prefill_rows = prefill_rows
        self._decode_buckets = programs.buckets("decode")
        self._random = random.Random(seed)
        self._streams: dict[Sequence, Stream] = {}
        self._flight: _Flight | None = None
        self._inbox: collections.deque[tuple[Request, Sink] | str] = collections.deque()
        self._wake = threading.Condition()
        self._thread: threading.Thread | None = None
        self._closing = False
        self._totals = {"prompt_tokens_total": 0, "generation_tokens_total": 0, "requests_total": 0}

    # -- from any thread -------------------------------------------------------------------------------

    @property
    def healthy(self) -> bool:
        """False once the engine has failed or was closed."""
        return self.failure is None and not self._closing

    def submit(self, request: Request, sink: Sink) -> None:
        """Queues a request and returns. `sink` is called on the engine's thread and must not block.

        Raises RuntimeError when the engine is dead or closed.
        """
        with self._wake:
            if not self.healthy:
                raise RuntimeError(f"the engine does not run: {self.failure or 'it was closed'}")
            self._inbox.append((request, sink))
            self._wake.notify()

    def abort(self, request_id: str) -> None:
        """Ends a request at the next step and frees its slots and pages; unknown ones are ignored."""
        with self._wake:
            self._inbox.append(request_id)
            self._wake.notify()

    def stats(self) -> dict[str, Any]:
        """Counters and sizes, for `/metrics` and for people. Times are seconds."""
        scheduler = self.scheduler
        return {
            **self.facts,
            **self._totals,
            "running": scheduler.num_running,
            "waiting": scheduler.num_waiting + sum(isinstance(item, tuple) for item in tuple(self._inbox)),
            "pages_used": scheduler.pages_used,
            "steps": self.times.steps,
            "host_seconds": self.times.host,
            "device_wait_seconds": self.times.wait,
        }

    def reset_counters(self) -> None:
        """After warm-up: what was run then was nobody's request."""
        self._totals = dict.fromkeys(self._totals, 0)
        self.times = StepTimes()

    def start(self) -> None:
        """Runs the loop on a thread of its own until `close()`."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="jaxserve-engine", daemon=True)
            self._thread.start()

    def close(self) -> None:
        """Stops the loop; requests that still run are aborted."""
        with self._wake:
            self._closing = True
            self._wake.notify()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()
        self._end_all(None)

    # -- the loop --------------------------------------------------------------------------------------

    def step(self) -> bool:
        """One turn: take in what came, plan, dispatch, read back and commit the step before.

        False when there was nothing to do. Raises what the device raises; the engine is then dead.
        """
        begin = time.perf_counter()
        waited = self.times.wait
        self._take_inbox()
        plan = self.scheduler.plan()
        flight, self._flight = self._flight, None if plan.empty else self._dispatch(plan)
        if flight is not None:
            self._commit(flight)
        if self._flight is None and flight is None:
            return False
        self.times.steps += 1
        self.times.host += time.perf_counter() - begin - (self.times.wait - waited)
        return True

    def step_apart(self) -> tuple[float, float]:
        """One turn without overlap: (host seconds, device seconds). For measuring; the work goes on."""
        self._settle()
        begin = time.perf_counter()
        self._take_inbox()
        plan = self.scheduler.plan()
        if plan.empty:
            return time.perf_counter() - begin, 0.0
        flight = self._dispatch(plan)
        dispatched = time.perf_counter()
        jax.block_until_ready((flight.prefill, flight.decode, flight.prompt_logprobs))
        done = time.perf_counter()
        self._commit(flight)
        return (dispatched - begin) + (time.perf_counter() - done), done - dispatched

    def _settle(self) -> None:
        if self._flight is not None:
            flight, self._flight = self._flight, None
            self._commit(flight)

    def _run(self) -> None:
        try:
            while True:
                with self._wake:
                    while not (self._inbox or self.scheduler.has_work or self._closing):
                        self._wake.wait()
                    if self._closing:
                        return
                self.step()
        except BaseException as error:  # the loop is the process's heart: say so to everyone, then end
            self.failure = error
            self._end_all(f"the engine failed: {type(error).__name__}: {error}")
            if not isinstance(error, Exception):
                raise

    def _end_all(self, error: str | None) -> None:
        """Every request is answered, failures included."""
        with self._wake:
            left = [item for item in self._inbox if isinstance(item, tuple)]
            self._inbox.clear()
        streams, self._streams = self._streams, {}
        self.scheduler.abort_all()
        self._flight = None
        for stream in streams.values():
            with contextlib.suppress(Exception):  # a sink that raises must not silence the next one
                stream.end(error=error)
        for request, sink in left:
            for index in range(request.params.n):
                with contextlib.suppress(Exception):
                    sink(Output(request.request_id, index, finish_reason=Finish.ABORT, error=error))

    def _take_inbox(self) -> None:
        while self._inbox:
            item = self._inbox.popleft()
            if isinstance(item, str):
                for sequence in self.scheduler.abort(item):
                    self._streams.pop(sequence).end()
                continue
            request, sink = item
            for sequence in self.scheduler.add(request, self._seeds(request)):
                self._streams[sequence] = Stream(sequence, sink, self.tokenizer)
            self._totals["requests_total"] += 1
            self._totals["prompt_tokens_total"] += len(request.prompt_token_ids)

    def _seeds(self, request: Request) -> list[int]:
        seed = request.params.seed
        first = self._random.getrandbits(63) if seed is None else seed
        # an odd step visits every residue, so that siblings never share a seed
        return [(first + index * 0x9E3779B97F4A7C15) % 2**63 for index in range(request.params.n)]

    def _dispatch(self, plan: StepPlan) -> _Flight:
        flight = _Flight(plan)
        with jax.no_tracing():  # after warm-up a compile is an error
            for row in plan.prefill:
                if row.first and batch.needs_edits(row.params):
                    self._edit(row)
            if plan.prefill:
                self._dispatch_prefill(flight)
            if plan.decode is not None:
                bucket = bucket_for(self._decode_buckets, len(plan.decode.slots))
                program = self._programs["decode", bucket]
                packed = batch.pack_decode(plan.decode, bucket=bucket)
                self._state, flight.decode = program(self._params, self._state, packed)
        return flight

    def _edit(self, row: PrefillRow) -> None:
        prompt = np.zeros(0, np.int32) if row.prompt is None else row.prompt
        packed = batch.pack_edits(row.slot, row.params, prompt, self.limits.vocab_size)
        self._state = self._programs["edit_slot", 1](self._state, packed)

    def _dispatch_prefill(self, flight: _Flight) -> None:
        rows = flight.plan.prefill
        total = sum(len(row.tokens) for row in rows)
        fitting = [tokens for tokens, held in self._prefill_rows.items() if held >= len(rows)]
        bucket = bucket_for(sorted(fitting), total)
        packed = batch.pack_prefill(
            rows,
            tokens=bucket,
            max_rows=self._prefill_rows[bucket],
            pages_per_slot=self.scheduler.pages_per_slot,
        )
        self._state, flight.prefill, hidden = self._programs["prefill", bucket](
            self._params, self._state, packed
        )
        if any(row.targets is not None for row in rows):
            targets = np.full(bucket, -1, np.int32)
            start = 0
            for row in rows:
                if row.targets is not None:
                    targets[start : start + len(row.tokens)] = row.targets
                start += len(row.tokens)
            flight.prompt_logprobs = self._programs["prompt_logprobs", bucket](self._params, hidden, targets)

    def _read(self, array: jax.Array | None) -> NDArray[np.int32]:
        if array is None:
            return np.zeros((0, batch.RESULT_WIDTH), np.int32)
        begin = time.perf_counter()
        host = np.asarray(array)
        self.times.wait += time.perf_counter() - begin
        return host

    def _commit(self, flight: _Flight) -> None:
        plan = flight.plan
        decode_rows = 0 if plan.decode is None else len(plan.decode.slots)
        rows = np.concatenate(
            [self._read(flight.prefill)[: len(plan.prefill)], self._read(flight.decode)[:decode_rows]]
        )
        prompt_results = batch.unpack_results(self._read(flight.prompt_logprobs))
        results = batch.unpack_results(rows)
        split = len(plan.prefill)
        events = self.scheduler.commit(plan, results.tokens[:split], results.tokens[split:])
        starts = np.cumsum([0, *(len(row.tokens) for row in plan.prefill)])
        for sequence, token, row, finish in events:
            stream = self._streams.get(sequence)
            if stream is None:  # a stop string ended it at an earlier event of this very step
                continue
            if row < split and plan.prefill[row].targets is not None:
                stream.prompt_logprobs(prompt_results, int(starts[row]), len(plan.prefill[row].tokens))
            if token < 0 and finish is None:
                continue
            self._totals["generation_tokens_total"] += token >= 0
            if stream.push(token, finish, results, row):
                self.scheduler.finish(sequence, Finish.STOP)
                finish = Finish.STOP
            if finish is not None:
                del self._streams[sequence]
