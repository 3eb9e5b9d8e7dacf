"""Which sequences run, on which slot and pages, and what the device does next.

The engine's loop is: `plan()`, dispatch it, and only then read back the plan before it and `commit()` its
tokens. A plan therefore never depends on tokens that are not read back: it counts what was *dispatched*, and
a sequence that turns out to have ended earlier leaves rows behind that `commit` ignores. Such a row may still
write K and V into pages that were released meanwhile; their next owner's writes come in a later plan, and the
device runs plans in order, so nobody reads them.

The scheduler does not know about devices, tokenizers or time. One thread calls it.
"""

from __future__ import annotations

import collections
from collections.abc import Sequence as Seq

import numpy as np
from numpy.typing import NDArray

from jaxserve.scheduler.pages import PageAllocator, require
from jaxserve.scheduler.slots import Slots
from jaxserve.scheduler.types import (
    DecodeRows,
    Finish,
    PrefillRow,
    Request,
    Sequence,
    Status,
    StepPlan,
)

NO_TOKEN = -1

# What became of one row of a plan: (sequence, token, row, finish).
# token: the one drawn, already in `sequence.output`; NO_TOKEN where a prefill row draws none.
# row: index into the plan's prefill rows followed by its decode rows.
# finish: set in the sequence's last event, else None. A plain tuple, because a step makes up to max_slots.
Event = tuple[Sequence, int, int, Finish | None]

_Ordered = collections.OrderedDict[Sequence, None]  # a queue that also removes from its middle in O(1)


class Scheduler:
    """First come, first served over a fixed number of slots and pages.

    max_slots: sequences that hold pages at the same time.
    num_pages, page_size: the pool, in pages and in tokens per page.
    pages_per_slot: width of a page table, ceil(max_model_len / page_size).
    prefill_chunk: prompt tokens per plan.
    max_prefill_rows: sequences whose prompts may be packed into one plan.
    """

    def __init__(
        self,
        *,
        max_slots: int,
        num_pages: int,
        page_size: int,
        pages_per_slot: int,
        prefill_chunk: int,
        max_prefill_rows: int,
    ) -> None:
        sizes = (max_slots, num_pages, page_size, pages_per_slot, prefill_chunk, max_prefill_rows)
        if min(sizes) < 1:
            raise ValueError(
                f"{max_slots=} {num_pages=} {page_size=} {pages_per_slot=} {prefill_chunk=}"
                f" {max_prefill_rows=} must all be at least 1"
            )
        self.page_size = page_size
        self.pages_per_slot = pages_per_slot
        self.prefill_chunk = prefill_chunk
        self.max_prefill_rows = max_prefill_rows
        self.pages = PageAllocator(num_pages)
        self._slots = Slots(max_slots, pages_per_slot)
        self._waiting: _Ordered = collections.OrderedDict()  # not admitted yet, in order of arrival
        self._prefilling: _Ordered = collections.OrderedDict()  # prompt not all dispatched, by admission
        self._live: dict[str, list[Sequence]] = {}  # request id -> its unfinished sequences
        self._promised = 0  # pages that the admitted sequences may come to hold, at most num_pages
        self._steps = 0
        # (step, epoch of each prefill row's slot, of each decode row's slot) of the plans not committed yet
        self._in_flight: collections.deque[tuple[int, list[int], NDArray[np.int64] | None]] = (
            collections.deque()
        )

    # -- what there is ---------------------------------------------------------------------------------

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        """Sequences that hold a slot."""
        return self._slots.held

    @property
    def pages_used(self) -> int:
        return self.pages.used

    @property
    def pages_free(self) -> int:
        return self.pages.free

    @property
    def plans_in_flight(self) -> int:
        """Plans made and not committed yet."""
        return len(self._in_flight)

    @property
    def has_work(self) -> bool:
        """False when nothing waits, runs or is in flight."""
        return bool(self._live or self._in_flight)

    def promise(self, request: Request) -> int:
        """Pages that a sequence of this request may come to hold.

        Keys and values are written when a token *enters* the model. The last token drawn never enters, so the
        positions written are 0 .. max_total_tokens-2; with nothing to draw, the prompt's: 0 .. prompt_len-1.
        16 prompt and 49 new tokens fit one page of 64.
        """
        positions = max(len(request.prompt_token_ids), request.max_total_tokens - 1)
        return -(-positions // self.page_size)

    # -- what comes and goes ---------------------------------------------------------------------------

    def add(self, request: Request, seeds: Seq[int]) -> list[Sequence]:
        """Queues the request's `n` sequences, one per seed, and returns them.

        Raises ValueError if they could never run, or if a live request has the same id.
        """
        if request.request_id in self._live:
            raise ValueError(f"request_id={request.request_id!r} is in use")
        if len(seeds) != request.params.n:
            raise ValueError(f"{len(seeds)} seeds for n={request.params.n}")
        promise, most = self.promise(request), min(self.pages.num_pages, self.pages_per_slot)
        if promise > most:  # it would block the queue for ever
            raise ValueError(f"the request needs {promise} pages; a sequence can have {most}")
        sequences = [Sequence(request, index, seed) for index, seed in enumerate(seeds)]
        self._live[request.request_id] = list(sequences)
        self._waiting.update(dict.fromkeys(sequences))
        return sequences

    def abort(self, request_id: str) -> list[Sequence]:
        """Ends the request's unfinished sequences, in whatever state, and returns them: `finish` is ABORT and
        their slots and pages are free at once. An unknown or finished request has none."""
        sequences = list(self._live.get(request_id, ()))
        for sequence in sequences:
            self.finish(sequence, Finish.ABORT)
        return sequences

    def abort_all(self) -> list[Sequence]:
        """Aborts every request and forgets the plans in flight: for an engine that cannot go on."""
        sequences = [sequence for request_id in list(self._live) for sequence in self.abort(request_id)]
        self._in_flight.clear()
        return sequences

    def finish(self, sequence: Sequence, reason: Finish) -> None:
        """Ends one sequence and frees its slot and pages at once; its rows in flight are ignored.

        The engine calls it for a stop string. A sequence that has ended keeps its first reason.
        """
        if sequence.finish is not None:
            return
        if sequence.status is Status.WAITING:
            del self._waiting[sequence]
        else:
            self._prefilling.pop(sequence, None)
            self._promised -= self.promise(sequence.request)
            self.pages.release(sequence.pages)
            sequence.pages = []
            self._slots.release(sequence)
        sequence.status = Status.FINISHED
        sequence.finish = reason
        siblings = self._live[sequence.request.request_id]
        siblings.remove(sequence)
        if not siblings:
            del self._live[sequence.request.request_id]

    # -- what the device does next ---------------------------------------------------------------------

    def plan(self) -> StepPlan:
        """The next step, which counts as dispatched from now on: admit, prefill, then decode.

        Its arrays are copies, never views of what the next plan changes. A plan that is not empty must be
        committed, in order of `step`.
        """
        self._admit()
        prefill = self._plan_prefill()
        decode = self._plan_decode()
        plan = StepPlan(self._steps, prefill, decode)
        if not plan.empty:
            self._steps += 1
            epoch = self._slots.epoch
            decode_epochs = None if decode is None else epoch[decode.slots]
            self._in_flight.append((plan.step, [int(epoch[row.slot]) for row in prefill], decode_epochs))
        return plan

    def _admit(self) -> None:
        """Moves waiting sequences into free slots, strictly in order, while the pages promised fit the pool.

        Pages themselves are taken when positions are reached; the promise is what makes sure of them.
        """
        while self._waiting and self._slots.free:
            sequence = next(iter(self._waiting))
            promise = self.promise(sequence.request)
            if self._promised + promise > self.pages.num_pages:
                return
            self._waiting.popitem(last=False)
            self._promised += promise
            self._slots.take(sequence)
            sequence.status = Status.PREFILL
            self._prefilling[sequence] = None

    def _plan_prefill(self) -> tuple[PrefillRow, ...]:
        rows: list[PrefillRow] = []
        budget = self.prefill_chunk
        while self._prefilling and budget and len(rows) < self.max_prefill_rows:
            sequence = next(iter(self._prefilling))
            row = self._prefill_row(sequence, budget)
            rows.append(row)
            budget -= len(row.tokens)
            if row.last:
                del self._prefilling[sequence]
                self._start_decoding(sequence)
        return tuple(rows)

    def _prefill_row(self, sequence: Sequence, budget: int) -> PrefillRow:
        request, params = sequence.request, sequence.request.params
        start = sequence.computed
        end = min(start + budget, sequence.prompt_len)
        held = len(sequence.pages)
        fresh = self.pages.allocate(-(-end // self.page_size) - held)
        sequence.pages += fresh
        sequence.computed = end
        table = self._slots.tables[sequence.slot]
        table[held : len(sequence.pages)] = fresh
        prompt = request.prompt_token_ids
        targets = None
        if params.prompt_logprobs is not None and sequence.index == 0:  # its siblings' would be the same
            targets = np.full(end - start, NO_TOKEN, np.int32)
            following = prompt[start + 1 : end + 1]
            targets[: len(following)] = following
        return PrefillRow(
            slot=sequence.slot,
            start=start,
            tokens=prompt[start:end].copy(),
            table=table.copy(),
            first=start == 0,
            last=end == sequence.prompt_len,
            params=params,
            stop_token_ids=request.stop_token_ids,
            seed=sequence.seed,
            prompt_len=sequence.prompt_len,
            max_total_tokens=request.max_total_tokens,
            targets=targets,
            # presence and frequency penalties look at generated tokens only
            prompt=prompt.copy() if start == 0 and params.repetition_penalty != 1.0 else None,
        )

    def _start_decoding(self, sequence: Sequence) -> None:
        """The row with the prompt's end draws the first token, if the request wants any at all."""
        sequence.status = Status.DECODE
        if sequence.max_new_tokens:
            sequence.sampled = 1
            self._slots.position[sequence.slot] = sequence.prompt_len
            self._slots.to_sample[sequence.slot] = sequence.max_new_tokens - 1

    def _plan_decode(self) -> DecodeRows | None:
        state = self._slots
        slots = np.flatnonzero(state.to_sample)
        if not len(slots):
            return None
        positions = state.position[slots]
        sequences: list[Sequence] = state.sequences[slots].tolist()
        turning = np.flatnonzero(positions % self.page_size == 0)  # these enter the first place of a page
        if len(turning):
            pages = self.pages.allocate(len(turning))
            state.tables[slots[turning], positions[turning] // self.page_size] = pages
            for i, page in zip(turning.tolist(), pages, strict=True):
                sequences[i].pages.append(page)
        state.position[slots] += 1
        state.to_sample[slots] -= 1
        for sequence in sequences:
            sequence.sampled += 1
        return DecodeRows(slots.astype(np.int32), positions, state.tables.take(slots, axis=0))

    # -- what the device did ---------------------------------------------------------------------------

    def commit(
        self, plan: StepPlan, prefill_tokens: NDArray[np.int32], decode_tokens: NDArray[np.int32]
    ) -> list[Event]:
        """Takes in the tokens of the oldest plan in flight: one event per row whose sequence still lives.

        prefill_tokens: i32[len(plan.prefill)], read where a row has `last`.
        decode_tokens: i32[len(plan.decode.slots)], or empty. NO_TOKEN: the device had ended that sequence.

        Sequences end with STOP at a stop token (the device cannot draw one before `min_tokens`) and with
        LENGTH at the limit; their slots and pages are free when this returns. A sequence whose prompt ended
        in this plan can have two events, prefill then decode; if the engine ends it at the first (a stop
        string), it drops the second.

        Raises ValueError for plans out of order or arrays of a wrong length, and RuntimeError if the device
        ended a sequence that lives here: the two would wait for each other for ever.
        """
        if plan.empty:
            return []
        if not self._in_flight or self._in_flight[0][0] != plan.step:
            oldest = self._in_flight[0][0] if self._in_flight else None
            raise ValueError(f"plan {plan.step} was committed out of turn; the oldest in flight is {oldest}")
        rows = (len(plan.prefill), 0 if plan.decode is None else len(plan.decode.slots))
        if (len(prefill_tokens), len(decode_tokens)) != rows:
            raise ValueError(f"{len(prefill_tokens)=} {len(decode_tokens)=} for a plan with {rows} rows")
        _, prefill_epochs, decode_epochs = self._in_flight.popleft()
        events: list[Event] = []
        for i, (row, epoch) in enumerate(zip(plan.prefill, prefill_epochs, strict=True)):
            if self._slots.epoch[row.slot] == epoch:
                events.append(self._commit_prefill(i, row, int(prefill_tokens[i])))
        if plan.decode is not None and decode_epochs is not None:
            self._commit_decode(events, plan, decode_epochs, decode_tokens)
        return events

    def _commit_prefill(self, i: int, row: PrefillRow, token: int) -> Event:
        sequence: Sequence = self._slots.sequences[row.slot]
        finish: Finish | None = None
        if not row.last:
            token = NO_TOKEN
        elif not sequence.max_new_tokens:
            token, finish = NO_TOKEN, Finish.LENGTH
        else:
            self._check_drawn(token)
            sequence.output.append(token)
            self._slots.to_read[row.slot] -= 1
            if token in sequence.request.stop_token_ids:
                finish = Finish.STOP
            elif not self._slots.to_read[row.slot]:
                finish = Finish.LENGTH
        if finish is not None:
            self.finish(sequence, finish)
        return sequence, token, i, finish

    def _commit_decode(
        self, events: list[Event], plan: StepPlan, epochs: NDArray[np.int64], drawn: NDArray[np.int32]
    ) -> None:
        assert plan.decode is not None
        state, slots = self._slots, plan.decode.slots.astype(np.intp)
        alive = state.epoch.take(slots) == epochs
        rows: Seq[int] = range(len(plan.prefill), len(plan.prefill) + len(slots))
        if not alive.all():
            rows = (np.flatnonzero(alive) + len(plan.prefill)).tolist()
            slots, drawn = slots[alive], drawn[alive]
        if not len(slots):
            return
        self._check_drawn(int(drawn.min()))
        to_read = state.to_read.take(slots) - 1
        state.to_read[slots] = to_read
        stopped = state.stopped_by(slots, drawn)
        sequences: list[Sequence] = state.sequences.take(slots).tolist()
        tokens: list[int] = drawn.tolist()
        for sequence, token in zip(sequences, tokens, strict=True):
            sequence.output.append(token)
        finishes: list[Finish | None] = [None] * len(sequences)
        for i in np.flatnonzero(stopped | (to_read == 0)).tolist():
            finishes[i] = reason = Finish.STOP if stopped[i] else Finish.LENGTH
            self.finish(sequences[i], reason)
        events.extend(zip(sequences, tokens, rows, finishes, strict=True))

    def _check_drawn(self, token: int) -> None:
        if token < 0:
            raise RuntimeError("the device ended a sequence that still lives in the scheduler")

    # -- tests -----------------------------------------------------------------------------------------

    def check_invariants(self) -> None:
        """Raises AssertionError unless slots, pages, promises, tables and queues agree. For tests: slow."""
        self.pages.check_invariants()
        self._slots.check_invariants()
        held = [sequence for sequence in self._slots.sequences if sequence is not None]
        owned = [page for sequence in held for page in sequence.pages]
        require(len(set(owned)) == len(owned), "a page has two owners")
        require(len(owned) == self.pages.used, "a page is used by nobody")
        promised = sum(self.promise(sequence.request) for sequence in held)
        require(promised == self._promised, f"{self._promised} pages are promised, not {promised}")
        require(promised <= self.pages.num_pages, "more pages are promised than there are")
        for sequence in held:
            require(
                sequence.status in (Status.PREFILL, Status.DECODE), "a held slot's sequence is not running"
            )
            prefilling = sequence.computed < sequence.prompt_len
            require(prefilling == (sequence in self._prefilling), "the prefill queue is wrong")
            written = sequence.computed + max(sequence.sampled - 1, 0)
            require(len(sequence.pages) == -(-written // self.page_size), "pages do not fit the positions")
            require(len(sequence.pages) <= self.promise(sequence.request), "more pages than promised")
            require(
                len(sequence.output) <= sequence.sampled <= sequence.max_new_tokens, "counts out of order"
            )
        for sequence in self._waiting:
            require(sequence.status is Status.WAITING and not sequence.pages, "a waiting sequence has pages")
        live = {sequence for siblings in self._live.values() for sequence in siblings}
        require(live == {*held, *self._waiting}, "live sequences are not those that wait and run")
        require(all(sequence.finish is None for sequence in live), "a finished sequence is live")
