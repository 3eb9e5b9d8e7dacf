"""The scheduler against a device that keeps score, over thousands of seeded traces of an engine's loop."""

from __future__ import annotations

import collections
import pickle
import random
from typing import Any

import pytest

from jaxserve.scheduler.prefix_cache import prompt_digests
from jaxserve.scheduler.scheduler import NO_TOKEN, Event, Scheduler
from jaxserve.scheduler.types import (
    Finish,
    Limits,
    Request,
    SamplingParams,
    Sequence,
    Status,
    StepPlan,
    Tier,
    check_request,
)
from tests.scheduler.fake_device import VOCAB, Device, alone, penalised

COUNTERS = ("prefix_queries_tokens", "prefix_hit_tokens", "preemptions", "evictions")


class Trace:
    """One run: an engine's loop whose clients come, leave, stop and run out of time at random."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.page_size = rng.choice([1, 2, 3, 4, 8])
        context = rng.randint(4, 40)
        least = -(-context // self.page_size)
        self.num_pages = rng.randint(least, max(least, rng.choice([16, 40])))
        self.max_slots = rng.randint(1, 6)
        self.max_rows = rng.randint(1, 4)
        self.lag = rng.choice([0, 1, 1, 1, 2])  # plans dispatched before the oldest is read back
        self.multi_step = rng.choice([1, 1, 2, 4, 8])
        self.prefix_cache, self.replay = rng.random() < 0.8, rng.random() < 0.4
        self.simulate, self.overcommit = rng.random() < 0.8, rng.choice([1.0, 1.0, 1.5, 4.0])
        self.patience = rng.choice([5.0, 50.0, 1000.0])
        self.scheduler = Scheduler(
            max_slots=self.max_slots,
            num_pages=self.num_pages,
            page_size=self.page_size,
            pages_per_slot=-(-context // self.page_size),
            prefill_chunk=rng.randint(1, 24),
            max_prefill_rows=self.max_rows,
            prefix_cache=self.prefix_cache,
            # what decode made is not what prefill makes, to the bit
            cache_generated=not self.replay and rng.random() < 0.8,
            replay=self.replay,
            multi_step=self.multi_step,
            simulate=self.simulate,
            overcommit=self.overcommit,
            aging_seconds=rng.choice([1.0, 10.0]),
            batch_patience=self.patience,
        )
        self.limits = Limits(
            vocab_size=VOCAB,
            max_model_len=context,
            pool_tokens=self.num_pages * self.page_size,
            eos_token_ids=tuple(range(rng.randint(0, 3))),
        )
        self.to_come = rng.randint(1, 8)
        self.p_abort, self.p_stop = rng.choice([0, 0, 0.1, 0.3]), rng.choice([0, 0, 0.05])
        self.p_batch, self.p_deadline = rng.choice([0, 0.3, 0.7]), rng.choice([0, 0, 0.3])
        self.p_deposit = rng.choice([0, 0, 0.7])
        self.p_resize = rng.choice([0, 0.1])
        self.p_masked, self.p_follow = rng.choice([0, 0, 0.4]), rng.choice([0.1, 0.5, 1.0])
        self.beginnings = [[rng.randrange(VOCAB) for _ in range(context)] for _ in range(rng.randint(1, 3))]
        self.now = 1000.0
        self.device = Device(self.page_size, replay=self.replay)
        self.in_flight: collections.deque[tuple[StepPlan, bytes, Any]] = collections.deque()
        self.sequences: list[Sequence] = []  # all, in order of arrival
        self.received: dict[Sequence, list[int]] = {}
        self.targets: dict[Sequence, list[int]] = {}
        self.reasons: dict[Sequence, Finish] = {}
        self.to_follow: list[Sequence] = []  # with a grammar, that drew a token which was not followed yet
        self.stats = self.scheduler.stats()

    def run(self) -> None:
        for _ in range(3000):
            self.now += self.rng.random()
            if self.to_come and self.rng.random() < 0.4:
                self.to_come -= 1
                self.arrive()
            if self.rng.random() < self.p_abort and self.sequences:
                self.leave(self.rng.choice(self.sequences).request.request_id)
            if self.rng.random() < self.p_resize:
                self.scheduler.prefill_chunk = self.rng.randint(1, 24)
            self.expire()
            self.turn()
            if not self.to_come and not self.scheduler.has_work:
                break
        self.check_end()

    def turn(self) -> None:
        """One turn of an engine's loop."""
        self.follow(self.p_follow)
        preempted = self.stats["preemptions"]
        plan = self.scheduler.plan(self.now)
        self.check()
        if not plan.empty:
            self.check_plan(plan, preempted != self.stats["preemptions"])
            self.in_flight.append((plan, pickle.dumps(plan), self.device.run(plan)))
        else:
            going_on = self.in_flight or self.to_follow
            assert going_on or not self.scheduler.has_work, "nothing goes on"
            if not self.in_flight:
                self.follow(1.0)
        if self.in_flight and (plan.empty or len(self.in_flight) > self.lag):
            self.read_back()

    def follow(self, share: float) -> None:
        """Grammars take in what was drawn, in any order."""
        left = []
        for sequence in self.to_follow:
            if sequence in self.reasons:
                continue
            if self.rng.random() < share:
                self.device.followed[sequence.seed] += 1
                self.scheduler.allow(sequence)
                self.check()
            else:
                left.append(sequence)
        self.to_follow = left

    def check(self) -> None:
        self.scheduler.check_invariants()
        stats, before = self.scheduler.stats(), self.stats
        assert all(stats[name] >= before[name] for name in COUNTERS)
        assert stats["pages_free"] + stats["pages_cached"] + stats["pages_used"] == self.num_pages
        self.stats = stats

    def arrive(self) -> None:
        rng, room = self.rng, self.limits.max_model_len
        length = rng.randint(1, room - 1)
        max_tokens = rng.choice([None, 0, 1, 2, rng.randint(0, room - length)])
        if max_tokens is not None:
            max_tokens = min(max_tokens, room - length)
        n = rng.choice([1, 1, 1, 2, 3])
        params = SamplingParams(
            n=n,
            best_of=rng.choice([None, None, n + 1]),
            max_tokens=max_tokens,
            min_tokens=rng.randint(0, min(3, max_tokens or 0)),
            prompt_logprobs=0 if max_tokens == 0 or rng.random() < 0.2 else None,
            repetition_penalty=rng.choice([1.0, 1.0, 1.5]),
            presence_penalty=rng.choice([0.0, 0.0, 1.0]),
            stop=rng.choice([(), (), ("end",)]),
            stop_token_ids=tuple(rng.sample(range(VOCAB), rng.randint(0, 3))),
        )
        prompt = [rng.randrange(VOCAB) for _ in range(length)]
        shared = rng.choice([0, rng.randint(0, length), length])
        prompt[:shared] = rng.choice(self.beginnings)[:shared]
        if self.received and rng.random() < 0.2:  # a conversation that goes on
            before = rng.choice(list(self.received))
            turn = before.request.prompt_token_ids.tolist() + self.received[before]
            prompt[: len(turn)] = turn[:length]
        name = f"request-{len(self.sequences)}"
        request = check_request(
            name,
            prompt,
            params,
            self.limits,
            self.now - rng.choice([0, 0, 3]),
            tier=Tier.BATCH if rng.random() < self.p_batch else Tier.ONLINE,
            priority=rng.choice([0, 0, 0, -3, 5]),
            deadline=self.now + rng.uniform(0, 30) if rng.random() < self.p_deadline else None,
            salt=rng.choice([b"", b"", b"another"]),
            grammar=object() if rng.random() < self.p_masked else None,
        )
        seeds = [1000 + len(self.sequences) + i for i in range(params.sequences)]
        for one in seeds:
            namespace = request.salt if self.prefix_cache else name
            if request.grammar is not None:
                self.device.followed[one] = 0
            self.device.prompts[one] = request.prompt_token_ids.tolist(), namespace
        if self.prefix_cache and rng.random() < self.p_deposit:
            self.deposit(request)
        fresh = self.scheduler.add(request, seeds)
        assert [(s.index, s.seed) for s in fresh] == list(enumerate(seeds))
        self.sequences += fresh
        self.received |= {sequence: [] for sequence in fresh}
        self.targets |= {sequence: [] for sequence in fresh}
        self.device.outputs |= {sequence.seed: sequence.output for sequence in fresh}
        self.check()

    def deposit(self, request: Request) -> None:
        """Pages of its prompt were computed elsewhere and come in pieces, one of which may get lost."""
        digests, step = prompt_digests(request, self.page_size), self.rng.randint(1, 4)
        for first in range(0, len(digests), step):
            if self.rng.random() < 0.1:
                continue
            part = digests[: first + step]
            adopted = self.scheduler.adopt(part, first)
            assert all(first <= i < len(part) for i, _ in adopted)
            for i, page in adopted:
                prompt = request.prompt_token_ids.tolist()
                self.device.place_page(page, i, prompt, request.salt)
            self.check()

    def leave(self, request_id: str) -> None:
        expected = [
            sequence
            for sequence in self.sequences
            if sequence.request.request_id == request_id and sequence not in self.reasons
        ]
        ended = self.scheduler.abort(request_id)
        assert ended == expected and all(sequence.finish is Finish.ABORT for sequence in ended)
        self.reasons |= dict.fromkeys(ended, Finish.ABORT)
        self.check()

    def expire(self) -> None:
        due = {
            sequence
            for sequence in self.sequences
            if sequence not in self.reasons
            and sequence.request.deadline is not None
            and sequence.request.deadline <= self.now
        }
        ended = self.scheduler.expire(self.now)
        assert set(ended) == due and all(sequence.finish is Finish.TIMEOUT for sequence in ended)
        self.reasons |= dict.fromkeys(ended, Finish.ABORT)  # it got a prefix, as after an abort
        self.check()

    def read_back(self) -> None:
        plan, as_planned, (prefill, decode, seeds) = self.in_flight.popleft()
        assert pickle.dumps(plan) == as_planned  # nothing in it is a view of the scheduler's own state
        ended_before = set(self.reasons)
        if decode.shape[0] == 1 and self.rng.random() < 0.5:
            decode = decode[0]
        events = self.scheduler.commit(plan, prefill, decode)
        self.check()
        rows = [event[2] for event in events]
        assert rows == sorted(set(rows))
        drawn = [*prefill.tolist(), *decode.ravel().tolist()]
        for event in events:
            sequence, token, row, _ = event
            assert sequence not in ended_before and sequence.seed == seeds[row]
            replayed = row < len(plan.prefill) and plan.prefill[row].forced != NO_TOKEN
            assert token == (NO_TOKEN if replayed else drawn[row])
            if row < len(plan.prefill) and plan.prefill[row].targets is not None:
                targets = plan.prefill[row].targets.tolist()
                assert len(targets) == len(plan.prefill[row].tokens)
                if plan.prefill[row].first:  # what was read back before a preemption comes again
                    assert plan.prefill[row].start == 0 and not self.received[sequence]
                    self.targets[sequence].clear()
                self.targets[sequence] += [target for target in targets if target >= 0]
            self.take_in(event)

    def take_in(self, event: Event) -> None:
        sequence, token, _, finish = event
        if sequence in self.reasons:  # stopped by the engine within this very commit
            return
        received = self.received[sequence]
        if token != NO_TOKEN:
            received.append(token)
        if finish is not None:
            assert sequence.finish is finish and sequence.output == received
            self.reasons[sequence] = finish
        elif token != NO_TOKEN and sequence.request.params.stop and self.rng.random() < self.p_stop:
            self.scheduler.finish(sequence, Finish.STOP)
            self.check()
            self.reasons[sequence] = Finish.ABORT  # it got a prefix, as after an abort
        elif token != NO_TOKEN and sequence.request.grammar is not None:
            self.to_follow.append(sequence)

    def pages_of(self, sequence: Sequence) -> int:
        """By counting: the pages of the positions that a sequence can write."""
        total, prompt = sequence.request.max_total_tokens, sequence.prompt_len
        written = range(prompt) if total == prompt else range(total - 1)
        return len({position // self.page_size for position in written})

    def check_plan(self, plan: StepPlan, preempted: bool) -> None:
        """Within the budget, and nobody waits for what is there."""
        running = [s for s in self.sequences if s.status in (Status.PREFILL, Status.DECODE)]
        waiting = [s for s in self.sequences if s.status in (Status.WAITING, Status.PREEMPTED)]
        assert (len(running), len(waiting)) == (self.scheduler.num_running, self.scheduler.num_waiting)
        if not preempted:  # pages may have run out after the admission
            self.check_admission(plan, running, waiting)
        tokens = sum(len(row.tokens) for row in plan.prefill)
        assert tokens <= self.scheduler.prefill_chunk and len(plan.prefill) <= self.max_rows
        decoded = set() if plan.decode is None else set(plan.decode.slots.tolist())
        for sequence in running:  # all that can be decoded was: its output is entirely dispatched
            if sequence.status is Status.DECODE and sequence.slot not in decoded:
                if sequence.request.grammar is not None:  # what it drew last is in flight, or not followed
                    continue
                assert sequence.sampled == sequence.max_new_tokens or not self.scheduler.pages_free
        if plan.decode is not None and plan.decode.steps > 1:
            assert plan.decode.steps == self.multi_step and not plan.prefill
            assert all(s.status is Status.DECODE for s in running)
            apart = (s.request.params.stop or s.request.grammar for s in running if s.slot in decoded)
            assert not any(apart)

    def check_admission(self, plan: StepPlan, running: list[Sequence], waiting: list[Sequence]) -> None:
        def promised(sequences: list[Sequence]) -> int:
            return sum(map(self.pages_of, sequences))

        assert len(running) <= self.max_slots
        online = [s for s in running if not s.rank[0]]
        for batch in (False, True):
            queue = sorted((s for s in waiting if s.rank[0] is batch), key=lambda s: s.rank)
            if not queue:
                continue
            if len(running) < self.max_slots:
                due = any(not s.rank[0] for s in waiting) and batch
                assert due or promised([*running, queue[0]]) > self.num_pages
            elif not batch and len(online) < self.max_slots:  # a batch sequence has its slot
                prompts = plan.prefill or any(s.status is Status.PREFILL for s in online)
                assert prompts or promised([*online, queue[0]]) > self.num_pages

    def check_end(self) -> None:
        scheduler = self.scheduler
        assert not self.in_flight and not scheduler.has_work
        assert (scheduler.num_running, scheduler.num_waiting, scheduler.plans_in_flight) == (0, 0, 0)
        assert (scheduler.pages_used, scheduler.pages_free) == (0, self.num_pages)
        stats = scheduler.stats()
        names = ("running", "waiting", "preempted")
        gauges = [*names, *(f"{name}_{tier}" for name in names for tier in Tier), "waiting_tokens"]
        assert not any(stats[name] for name in gauges)
        assert self.prefix_cache or not stats["pages_cached"]
        assert set(self.reasons) == set(self.sequences)
        for sequence in self.sequences:
            request, received = sequence.request, self.received[sequence]
            assert sequence.cached % self.page_size == 0 and sequence.cached < sequence.prompt_len
            expected, reason = alone(request, sequence.seed)
            if self.reasons[sequence] is Finish.ABORT:
                assert received == expected[: len(received)]
                continue
            assert (received, self.reasons[sequence]) == (expected, reason)
            scored = request.params.prompt_logprobs is not None and sequence.index == 0
            assert self.targets[sequence] == (request.prompt_token_ids[1:].tolist() if scored else [])


def test_the_fake_models_penalties_matter() -> None:
    assert penalised(SamplingParams(presence_penalty=1.0)) and not penalised(SamplingParams())


@pytest.mark.parametrize(
    "block", [*range(8), *(pytest.param(b, marks=pytest.mark.slow) for b in range(8, 40))]
)
def test_random_traces(block: int) -> None:
    for seed in range(block * 200, (block + 1) * 200):
        try:
            Trace(random.Random(seed)).run()
        except Exception as error:
            error.add_note(f"trace {seed}")
            raise
