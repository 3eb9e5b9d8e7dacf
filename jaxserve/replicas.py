"""Several engines over parts of one mesh, behind one queue: the `data` axis.

Each replica is an `Engine` with its own devices, pool and thread, and the same model. A request goes to one
of them (`jaxserve.scheduler.placement`) and stays there. It is not given away before it can run there soon: a
replica gets as many sequences as it has slots and `AHEAD` more, online work beside batch work that gives way
to it; the rest wait here, in the order in which a scheduler would take them, so that no replica idles while
another's queue is long.

If one engine fails, this has failed: requests on the others go on, no new ones are taken.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

from jaxserve.engine.outputs import EngineBusy, Output, Sink
from jaxserve.engine.rate import Rate
from jaxserve.protocols import EngineLike, TokenizerLike
from jaxserve.scheduler.heap import RemovableHeap
from jaxserve.scheduler.placement import Placement
from jaxserve.scheduler.preemption import promoted, rank_of
from jaxserve.scheduler.types import Finish, Limits, Request, SlotView, StructuredOutputs, Tier

MOST_SECONDS = 3600.0  # that the thread for deadlines waits at a time
AHEAD = 2  # sequences that a replica has waiting, so that a slot that becomes free is filled at once
AGING_SECONDS, BATCH_PATIENCE = 10.0, 600.0  # as the scheduler's
# of several engines' stats these are everybody's own, not a sum
SAME = frozenset(
    {
        *("page_size", "page_bytes", "prefill_chunk", "max_model_len", "embedding_size"),
        *("startup_seconds", "chunk_seconds", "step_seconds"),
    }
)


class Replicas:
    """An `EngineLike` over engines that are alike. Takes them over: `close` closes them.

    max_queued, max_queued_tokens: when so many sequences wait, here and there, or tokens of their prompts,
    requests are refused.
    """

    def __init__(
        self,
        engines: Sequence[EngineLike],
        *,
        max_queued: int = 1024,
        max_queued_tokens: int = 2**31,
        prefix_aware: bool = True,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        first = engines[0]
        self.engines = list(engines)
        self.facts = {**first.facts, "replicas": len(engines)}
        summed = [n for n in ("slots", "pages_total", "warmup_tokens_per_second") if n in first.facts]
        self.facts |= {name: sum(e.facts[name] for e in engines) for name in summed}
        self._slots = int(first.facts["slots"])
        self._max_queued, self._max_queued_tokens = max_queued, max_queued_tokens
        self._clock = clock
        self._lock = threading.RLock()  # an engine's sink may be called while it is held, at `close`
        self._wake = threading.Condition(self._lock)  # of the thread that waits for the next deadline
        self._timer: threading.Thread | None = None
        self._placement = Placement(
            len(engines),
            pages=int(first.facts["pages_total"]),
            page_size=int(first.facts["page_size"]),
            prefix_aware=prefix_aware,
        )
        self._online = [0] * len(engines)  # sequences that each was given as online work
        self._as_online: set[str] = set()  # requests that were
        self._held: dict[str, tuple[Request, Sink]] = {}  # by request id: not given to any yet
        self._waiting: dict[Tier, RemovableHeap[str]] = {tier: RemovableHeap() for tier in Tier}
        self._deadlines: RemovableHeap[str] = RemovableHeap()
        self._since: RemovableHeap[str] = RemovableHeap()  # of batch: by arrival
        self._promoted: str | None = None  # the batch request that counts as online
        self._came = 0
        self._rejected = 0
        self._rate = Rate()
        self._busy = 0.0  # seconds with work, up to `_began`
        self._began: float | None = None  # since when there has been work without a pause
        self._closing = False

    @property
    def limits(self) -> Limits:
        return self.engines[0].limits

    @property
    def tokenizer(self) -> TokenizerLike | None:
        return self.engines[0].tokenizer

    @property
    def healthy(self) -> bool:
        return all(engine.healthy for engine in self.engines)

    @property
    def failure(self) -> BaseException | None:
        return next((engine.failure for engine in self.engines if engine.failure is not None), None)

    @property
    def stuck(self) -> str | None:
        """What is stuck, and in which replica."""
        for i, engine in enumerate(self.engines):
            if (stuck := engine.stuck) is not None:
                return f"replica {i}: {stuck}"
        return None

    # -- from any thread -------------------------------------------------------------------------------

    def compile_grammar(self, wanted: StructuredOutputs) -> Any:
        """By the first engine; all of them take it."""
        return self.engines[0].compile_grammar(wanted)

    def slots(self) -> list[SlotView]:
        """The first replica's, then the second's: they are numbered on."""
        return [
            dataclasses.replace(view, slot=view.slot + number * self._slots)
            for number, engine in enumerate(self.engines)
            for view in engine.slots()
        ]

    def submit(self, *requests: tuple[Request, Sink]) -> None:
        """As the engine's, all or none: EngineBusy when the queue is full, RuntimeError after a failure."""
        with self._lock:
            if not self.healthy or self._closing:
                raise RuntimeError(f"the engine does not run: {self.failure or 'it was closed'}")
            stats = self.stats()
            if all(request.tier is Tier.ONLINE for request, _ in requests):
                waiting, tokens = stats["waiting_online"], stats["waiting_tokens_online"]
            else:
                waiting, tokens = stats["waiting"], stats["waiting_tokens"]
            new = sum(len(request.prompt_token_ids) for request, _ in requests)
            if waiting >= self._max_queued or (waiting and tokens + new > self._max_queued_tokens):
                self._rejected += len(requests)
                raise EngineBusy(self._rate.seconds_for(waiting))
            for request, sink in requests:
                self._hold(request, sink)
            self._give()

    def abort(self, request_id: str) -> None:
        """Ends a request wherever it is; unknown ones are ignored."""
        with self._lock:
            replica = self._placement.replica_of(request_id)
            if replica is not None:
                self.engines[replica].abort(request_id)
            elif request_id in self._held:
                self._end(request_id, Finish.ABORT)

    def stats(self) -> dict[str, Any]:
        """As an engine's: sums over the replicas, with what waits here; `replica_requests` of each."""
        each = [engine.stats() for engine in self.engines]
        sums = {
            name: sum(stats[name] for stats in each)
            for name, value in each[0].items()
            if isinstance(value, int | float) and name not in SAME
        }
        stats = each[0] | sums | self.facts
        with self._lock:
            stats["rejected_total"] += self._rejected
            for request, _ in self._held.values():
                stats["waiting"] += request.params.sequences
                stats[f"waiting_{request.tier}"] += request.params.sequences
                stats["waiting_tokens"] += len(request.prompt_token_ids)
                if request.tier is Tier.ONLINE:
                    stats["waiting_tokens_online"] += len(request.prompt_token_ids)
        stats["replica_requests"] = [stats["requests_total"] for stats in each]
        return stats

    def start(self) -> None:
        for engine in self.engines:
            engine.start()
        if self._timer is None:
            self._timer = threading.Thread(target=self._watch, name="jaxserve-replicas", daemon=True)
            self._timer.start()

    def close(self) -> None:
        with self._lock:
            self._closing = True
            self._end_held(Finish.ABORT)
            self._wake.notify()
        for engine in self.engines:
            engine.close()
        if self._timer is not None and self._timer is not threading.current_thread():
            self._timer.join()

    def _watch(self) -> None:
        """What time alone brings: deadlines of requests that wait here, and batch work whose patience is
        over. The rest comes with requests and their ends."""
        with self._lock:
            while not self._closing:
                times = [entry[0] for entry in [self._deadlines.first()] if entry is not None]
                if self._promoted is None and (entry := self._since.first()) is not None:
                    times.append(entry[0] + BATCH_PATIENCE)
                left = min(times) - self._clock() if times else None
                if left is None or left > 0:
                    self._wake.wait(None if left is None else min(left, MOST_SECONDS))
                else:
                    self._give()

    # -- under the lock --------------------------------------------------------------------------------

    def _hold(self, request: Request, sink: Sink) -> None:
        self._came += 1
        if self._began is None:
            self._began = self._clock()
        self._held[request.request_id] = request, sink
        self._waiting[request.tier].push(rank_of(request, self._came, AGING_SECONDS), request.request_id)
        if request.tier is Tier.BATCH:
            self._since.push(request.arrival_time, request.request_id)
        if request.deadline is not None:
            self._deadlines.push(request.deadline, request.request_id)
        self._wake.notify()

    def _take(self, request_id: str) -> tuple[Request, Sink]:
        for heap in (*self._waiting.values(), self._since, self._deadlines):
            heap.remove(request_id)
        return self._held.pop(request_id)

    def _end(self, request_id: str, finish: Finish, error: str | None = None) -> None:
        """Ends a request that no replica has."""
        request, sink = self._take(request_id)
        for index in range(request.params.sequences):
            with contextlib.suppress(Exception):  # a sink that raises must not silence the next one
                sink(Output(request_id, index, finish_reason=finish, error=error))

    def _end_held(self, finish: Finish, error: str | None = None) -> None:
        for request_id in list(self._held):
            self._end(request_id, finish, error)

    def _give(self) -> None:
        """Gives replicas that have room what comes next."""
        now = self._clock()
        while (late := self._deadlines.first()) is not None and late[0] <= now:
            self._end(late[1], Finish.TIMEOUT)
        self._promote(now)
        for tier in Tier:  # online first
            while (entry := self._waiting[tier].first()) is not None:
                request, _ = self._held[entry[1]]
                free = [i for i in range(len(self.engines)) if self._has_room(i, request, tier)]
                if not free:
                    break
                request, sink = self._take(request.request_id)
                replica = self._placement.place(request, free)
                if tier is Tier.ONLINE:
                    self._online[replica] += request.params.sequences
                    self._as_online.add(request.request_id)
                try:
                    self.engines[replica].submit((request, functools.partial(self._heard, request, sink)))
                except RuntimeError as refusal:  # it has failed since, and so has this
                    self._hold(request, sink)
                    self._end_held(Finish.ABORT, str(refusal))
                    for _ in range(request.params.sequences):
                        self._ended(request)

    def _promote(self, now: float) -> None:
        """The batch request that came first counts as online once its patience is over; then the next."""
        before = self._promoted
        if before in self._held or (before and self._placement.replica_of(before) is not None):
            return
        self._promoted = None
        if (entry := self._since.first()) is not None and entry[0] + BATCH_PATIENCE <= now:
            self._promoted = entry[1]
            request, _ = self._held[entry[1]]
            self._since.remove(entry[1])
            self._waiting[Tier.BATCH].remove(entry[1])
            self._waiting[Tier.ONLINE].push(promoted(rank_of(request, 0, AGING_SECONDS)), entry[1])

    def _has_room(self, replica: int, request: Request, tier: Tier) -> bool:
        """tier: as which it counts. Batch work gives way to online work in the replica, so it is not in its
        way here."""
        given = self._online[replica] if tier is Tier.ONLINE else self._placement.sequences(replica)
        return given == 0 or given + request.params.sequences <= self._slots + AHEAD

    # -- on the engines' threads -----------------------------------------------------------------------

    def _heard(self, request: Request, sink: Sink, output: Output) -> None:
        try:
            sink(output)
        finally:
            if output.finish_reason is not None:
                with self._lock:
                    self._ended(request)

    def _ended(self, request: Request) -> None:
        """One of its sequences ended."""
        replica = self._placement.replica_of(request.request_id)
        if replica is None:
            return
        self._placement.ended(request.request_id)
        self._online[replica] -= request.request_id in self._as_online
        if self._placement.replica_of(request.request_id) is None:
            self._as_online.discard(request.request_id)
        now = self._clock()
        if self._began is not None:
            self._rate.ended(self._busy + now - self._began)
        if self.healthy and not self._closing:
            self._give()
        else:
            self._end_held(Finish.ABORT, None if self._closing else f"the engine failed: {self.failure}")
        idle = not self._held and not any(self._placement.sequences(i) for i in range(len(self.engines)))
        if self._began is not None and idle:
            self._busy, self._began = self._busy + now - self._began, None
