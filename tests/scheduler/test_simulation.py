"""The scheduler against a device that keeps score, over thousands of seeded traces.

`Device` is a model of the hardware, not of the scheduler: it runs plans in the order they come, keeps the KV
pool as a dictionary from place to what was written there, and draws each token from a hash of *everything it
reads back through the page table*. A page given to two sequences, a position skipped, a chunk lost, a stale
table: each changes some token, and `alone()` says what every sequence should have got with nobody else there.
"""

from __future__ import annotations

import collections
import dataclasses
import pickle
import random
from typing import Any

import numpy as np
import pytest

from jaxserve.scheduler.scheduler import NO_TOKEN, Event, Scheduler
from jaxserve.scheduler.types import (
    Finish,
    Limits,
    PrefillRow,
    Request,
    SamplingParams,
    Sequence,
    Status,
    StepPlan,
    check_request,
)

VOCAB = 50


def draw(tokens: list[int], seed: int, drawn: int, stop: tuple[int, ...], min_tokens: int) -> int:
    """The token after `tokens`: a hash, moved on while it is a stop token that may not be drawn yet."""
    token = hash((seed, *tokens)) % VOCAB
    while drawn < min_tokens and token in stop:
        token = (token + 1) % VOCAB
    return token


def alone(request: Request, seed: int) -> tuple[list[int], Finish]:
    """What a sequence generates by itself, and why it ends."""
    tokens = request.prompt_token_ids.tolist()
    output: list[int] = []
    while len(tokens) < request.max_total_tokens:
        token = draw(tokens, seed, len(output), request.stop_token_ids, request.params.min_tokens)
        tokens.append(token)
        output.append(token)
        if token in request.stop_token_ids:
            return output, Finish.STOP
    return output, Finish.LENGTH


@dataclasses.dataclass
class Row:
    """A slot's state on the device."""

    tag: int  # unlike any other sequence that ever ran
    prefill: PrefillRow  # the first one: it says all about the sequence
    length: int = 0  # positions written
    drawn: int = 0
    last: int = NO_TOKEN
    done: bool = False
    targets: list[int] = dataclasses.field(default_factory=list)


class Device:
    def __init__(self, page_size: int) -> None:
        self.page_size = page_size
        self.kv: dict[int, tuple[int, int, int]] = {}  # place -> (tag, position, token)
        self.rows: dict[int, Row] = {}
        self.targets: dict[int, list[int]] = {}  # seed -> what follows each prompt token
        self.tags = 0

    def run(self, plan: StepPlan) -> tuple[np.ndarray, np.ndarray, list[int]]:
        """Tokens of the prefill rows and of the decode rows, and the seed of each row's sequence."""
        prefill = [self.prefill(row) for row in plan.prefill]
        seeds = [row.seed for row in plan.prefill]
        decode = []
        if plan.decode is not None:
            rows = plan.decode
            assert rows.slots.tolist() == sorted(set(rows.slots.tolist()))
            for slot, position, table in zip(rows.slots, rows.positions, rows.tables, strict=True):
                decode.append(self.decode(self.rows[slot], position, table))
                seeds.append(self.rows[slot].prefill.seed)
        return np.asarray(prefill, np.int32), np.asarray(decode, np.int32), seeds

    def prefill(self, row: PrefillRow) -> int:
        if row.first:
            self.tags += 1
            self.rows[row.slot] = Row(self.tags, row)
        state = self.rows[row.slot]
        assert row.seed == state.prefill.seed and row.start == state.length and len(row.tokens)
        for token in row.tokens.tolist():
            self.write(state, row.table, token)
        if row.targets is not None:
            assert len(row.targets) == len(row.tokens)
            self.targets.setdefault(row.seed, []).extend(row.targets.tolist())
        assert row.last == (state.length == row.prompt_len)
        return (
            self.sample(state, row.table) if row.last and row.max_total_tokens > row.prompt_len else NO_TOKEN
        )

    def decode(self, state: Row, position: int, table: np.ndarray) -> int:
        if state.done:  # ended on the device: the worst it can do is to write rubbish where the plan says
            self.kv[self.place(table, position)] = (-1, -1, -1)
            return NO_TOKEN
        assert position == state.length
        self.write(state, table, state.last)
        return self.sample(state, table)

    def write(self, state: Row, table: np.ndarray, token: int) -> None:
        self.kv[self.place(table, state.length)] = (state.tag, state.length, token)
        state.length += 1

    def sample(self, state: Row, table: np.ndarray) -> int:
        used = -(-state.length // self.page_size)
        assert (table[:used] >= 0).all() and (table[used:] == -1).all()
        read = [self.kv[self.place(table, position)] for position in range(state.length)]
        assert [entry[:2] for entry in read] == [(state.tag, position) for position in range(state.length)]
        first = state.prefill
        tokens = [token for _, _, token in read]
        state.last = draw(tokens, first.seed, state.drawn, first.stop_token_ids, first.params.min_tokens)
        state.drawn += 1
        total = state.length + 1  # the token just drawn has no place yet
        state.done = state.last in first.stop_token_ids or total == first.max_total_tokens
        return state.last

    def place(self, table: np.ndarray, position: int) -> int:
        page, offset = divmod(int(position), self.page_size)
        assert table[page] >= 0
        return int(table[page]) * self.page_size + offset


class Trace:
    """One run: an engine's loop whose clients come, leave and stop at random."""

    def __init__(self, seed: int) -> None:
        rng = self.rng = random.Random(seed)
        self.page_size = rng.choice([1, 2, 3, 4, 8])
        context = rng.randint(4, 40)
        self.num_pages = rng.randint(-(-context // self.page_size), 40)
        self.max_slots = rng.randint(1, 5)
        self.chunk, self.max_rows = rng.randint(1, 24), rng.randint(1, 4)
        self.lag = rng.choice([0, 1, 1, 1, 2])  # plans dispatched before the oldest is read back
        self.scheduler = Scheduler(
            max_slots=self.max_slots,
            num_pages=self.num_pages,
            page_size=self.page_size,
            pages_per_slot=-(-context // self.page_size),
            prefill_chunk=self.chunk,
            max_prefill_rows=self.max_rows,
        )
        self.limits = Limits(
            vocab_size=VOCAB,
            max_model_len=context,
            pool_tokens=self.num_pages * self.page_size,
            eos_token_ids=tuple(range(rng.randint(0, 3))),
        )
        self.to_come = rng.randint(1, 8)
        self.p_abort, self.p_stop = rng.choice([0, 0, 0.1, 0.3]), rng.choice([0, 0, 0.05])
        self.device = Device(self.page_size)
        self.in_flight: collections.deque[tuple[StepPlan, bytes, Any]] = collections.deque()
        self.sequences: list[Sequence] = []  # all, in order of arrival
        self.received: dict[Sequence, list[int]] = {}
        self.reasons: dict[Sequence, Finish] = {}
        self.first_tokens: list[Sequence] = []

    def run(self) -> None:
        for _ in range(2000):
            if self.to_come and self.rng.random() < 0.4:
                self.to_come -= 1
                self.arrive()
            if self.rng.random() < self.p_abort and self.sequences:
                self.leave(self.rng.choice(self.sequences).request.request_id)
            plan = self.scheduler.plan()
            self.scheduler.check_invariants()
            if not plan.empty:
                self.check_plan(plan)
                self.in_flight.append((plan, pickle.dumps(plan), self.device.run(plan)))
            if self.in_flight and (plan.empty or len(self.in_flight) > self.lag):
                self.read_back()
            if not self.to_come and not self.scheduler.has_work:
                break
        self.check_end()

    def arrive(self) -> None:
        rng, room = self.rng, self.limits.max_model_len
        length = rng.randint(1, room - 1)
        max_tokens = rng.choice([None, 0, 1, 2, rng.randint(0, room - length)])
        if max_tokens is not None:
            max_tokens = min(max_tokens, room - length)
        params = SamplingParams(
            n=rng.choice([1, 1, 1, 2, 3]),
            max_tokens=max_tokens,
            min_tokens=rng.randint(0, min(3, max_tokens or 0)),
            prompt_logprobs=0 if max_tokens == 0 or rng.random() < 0.3 else None,
            repetition_penalty=rng.choice([1.0, 1.5]),
            stop_token_ids=tuple(rng.sample(range(VOCAB), rng.randint(0, 3))),
        )
        prompt = [rng.randrange(VOCAB) for _ in range(length)]
        name = f"request-{len(self.sequences)}"
        request = check_request(name, prompt, params, self.limits, 0.0)
        seeds = [1000 + len(self.sequences) + i for i in range(params.n)]
        fresh = self.scheduler.add(request, seeds)
        assert [(s.index, s.seed) for s in fresh] == list(enumerate(seeds))
        self.sequences += fresh
        self.received |= {sequence: [] for sequence in fresh}
        self.scheduler.check_invariants()

    def leave(self, request_id: str) -> None:
        expected = [
            sequence
            for sequence in self.sequences
            if sequence.request.request_id == request_id and sequence not in self.reasons
        ]
        ended = self.scheduler.abort(request_id)
        assert ended == expected and all(sequence.finish is Finish.ABORT for sequence in ended)
        self.reasons |= dict.fromkeys(ended, Finish.ABORT)
        self.scheduler.check_invariants()

    def read_back(self) -> None:
        plan, as_planned, (prefill, decode, seeds) = self.in_flight.popleft()
        assert pickle.dumps(plan) == as_planned  # nothing in it is a view of the scheduler's own state
        ended_before = set(self.reasons)
        events = self.scheduler.commit(plan, prefill, decode)
        self.scheduler.check_invariants()
        rows = [event[2] for event in events]
        assert rows == sorted(set(rows))
        for event in events:
            sequence, token, row, _ = event
            assert sequence not in ended_before and sequence.seed == seeds[row]
            assert token == (np.concatenate([prefill, decode])[row])
            self.take_in(event)

    def take_in(self, event: Event) -> None:
        sequence, token, _, finish = event
        if sequence in self.reasons:  # stopped by the engine within this very commit
            return
        received = self.received[sequence]
        if token != NO_TOKEN:
            if not received:
                self.first_tokens.append(sequence)
            received.append(token)
        if finish is not None:
            assert sequence.finish is finish and sequence.output == received
            self.reasons[sequence] = finish
        elif token != NO_TOKEN and self.rng.random() < self.p_stop:
            self.scheduler.finish(sequence, Finish.STOP)
            self.scheduler.check_invariants()
            self.reasons[sequence] = Finish.ABORT  # it got a prefix, as after an abort

    def pages_of(self, sequence: Sequence) -> int:
        """By counting: the pages of the positions that a sequence can write."""
        total, prompt = sequence.request.max_total_tokens, sequence.prompt_len
        written = range(prompt) if total == prompt else range(total - 1)
        return len({position // self.page_size for position in written})

    def check_plan(self, plan: StepPlan) -> None:
        """Within the budget, and nobody waits for what is there."""
        running = [s for s in self.sequences if s.status in (Status.PREFILL, Status.DECODE)]
        waiting = [s for s in self.sequences if s.status is Status.WAITING]
        assert (len(running), len(waiting)) == (self.scheduler.num_running, self.scheduler.num_waiting)
        promised = sum(map(self.pages_of, running))
        assert promised <= self.num_pages and len(running) <= self.max_slots
        if waiting and len(running) < self.max_slots:
            assert promised + self.pages_of(waiting[0]) > self.num_pages
        tokens = sum(len(row.tokens) for row in plan.prefill)
        assert tokens <= self.chunk and len(plan.prefill) <= self.max_rows
        if tokens < self.chunk and len(plan.prefill) < self.max_rows:
            assert all(s.computed == s.prompt_len for s in running)
        for row in plan.prefill:
            wanted = row.first and row.params.repetition_penalty != 1.0
            assert (row.prompt is not None) == wanted
            assert row.prompt is None or len(row.prompt) == row.prompt_len
        decoded = set() if plan.decode is None else set(plan.decode.slots.tolist())
        for sequence in running:  # all that can be decoded was: its output is entirely dispatched
            if sequence.computed == sequence.prompt_len and sequence.slot not in decoded:
                assert sequence.sampled == sequence.max_new_tokens

    def check_end(self) -> None:
        scheduler = self.scheduler
        assert not self.in_flight and not scheduler.has_work
        assert (scheduler.num_running, scheduler.num_waiting, scheduler.plans_in_flight) == (0, 0, 0)
        assert (scheduler.pages_used, scheduler.pages_free) == (0, self.num_pages)
        scheduler.check_invariants()
        assert set(self.reasons) == set(self.sequences)
        for sequence in self.sequences:
            request, received = sequence.request, self.received[sequence]
            expected, reason = alone(request, sequence.seed)
            if self.reasons[sequence] is Finish.ABORT:
                assert received == expected[: len(received)]
                continue
            assert (received, self.reasons[sequence]) == (expected, reason)
            targets = self.device.targets.get(sequence.seed)
            if request.params.prompt_logprobs is not None and sequence.index == 0:
                assert targets == [*request.prompt_token_ids[1:].tolist(), -1]
            else:
                assert targets is None
        order = {sequence: i for i, sequence in enumerate(self.sequences)}
        came = [order[sequence] for sequence in self.first_tokens]
        assert came == sorted(came)


@pytest.mark.parametrize(
    "block", [*range(6), *(pytest.param(b, marks=pytest.mark.slow) for b in range(6, 30))]
)
def test_random_traces(block: int) -> None:
    for seed in range(block * 200, (block + 1) * 200):
        try:
            Trace(seed).run()
        except Exception as error:
            error.add_note(f"trace {seed}")
            raise
