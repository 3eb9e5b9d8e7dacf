"""Which sequences run, on which slot and pages, and what the device does next.

The engine's loop is: `plan()`, dispatch it, and only then read back the plan before it and `commit()` its
tokens. A plan therefore never depends on tokens that are not read back: it counts what was *dispatched*, and
a sequence that turns out to have ended earlier leaves rows behind that `commit` ignores. Such a row may still
write K and V into pages that were released meanwhile; their next owner's writes come in a later plan, and the
device runs plans in order, so nobody reads them. It never writes into a page that the prefix cache knows: a
page becomes known when all of it was dispatched by prefill, or read back, and what is in flight lies behind.

    WAITING -> PREFILL -> DECODE -> FINISHED         preempted: PREFILL, DECODE -> PREEMPTED -> PREFILL
                                                     (WAITING again, if it has no output yet)

The scheduler does not know about devices, tokenizers or clocks: time comes in. One thread calls it.
"""

from __future__ import annotations

import bisect
import collections
from collections.abc import Sequence as Seq
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from jaxserve.scheduler.admission import Room, WaitingQueue
from jaxserve.scheduler.heap import RemovableHeap
from jaxserve.scheduler.pages import PageAllocator, require
from jaxserve.scheduler.preemption import Rank, lowest, rank_of, victims
from jaxserve.scheduler.prefix_cache import PrefixCache
from jaxserve.scheduler.rows import prefill_row
from jaxserve.scheduler.sharing import Sharing
from jaxserve.scheduler.slots import Slots
from jaxserve.scheduler.types import (
    DecodeRows,
    Finish,
    PrefillRow,
    Request,
    Sequence,
    SlotView,
    Status,
    StepPlan,
    Tier,
)

NO_TOKEN = -1

# What became of one row of a plan: (sequence, token, row, finish).
# token: the one drawn, already in `sequence.output`; NO_TOKEN where a prefill row draws none, or replays one.
# row: index into the plan's prefill rows followed by its decode rows of each step:
#     len(prefill) + step * len(decode.slots) + i.
# finish: set in the sequence's last event, else None. A plain tuple, because a step makes up to max_slots.
Event = tuple[Sequence, int, int, Finish | None]


class _InFlight(NamedTuple):
    """A plan that is not committed yet: whom its rows were for. A slot has another epoch with each owner."""

    step: int
    prefill_epochs: list[int]
    decode_epochs: NDArray[np.int64] | None


class Scheduler:
    """Runs sequences on a fixed number of slots and pages, in the order of `preemption.rank_of`.

    max_slots: sequences that hold pages at the same time.
    num_pages, page_size: the pool, in pages and in tokens per page.
    pages_per_slot: width of a page table, ceil(max_model_len / page_size).
    prefill_chunk: prompt tokens per plan; may be changed between plans.
    max_prefill_rows: sequences whose prompts may be packed into one plan.
    prefix_cache: requests share the pages of equal beginnings. (Siblings of one request always do.)
    cache_generated: so do pages with generated tokens, once these are read back.
    replay: a preempted sequence is computed again as it was the first time, prompt by prefill and output by
        decode; otherwise both go through prefill, which is faster and may round differently.
    multi_step: decode steps per plan where nothing is lost by it.
    simulate: admit by the simulated peak of pages; False: by the sum of what everybody may come to hold.
    overcommit: let that peak be so many times the pool, at least 1.
    aging_seconds: waiting so long raises a sequence's priority by one.
    batch_patience: seconds after its arrival a batch sequence that waits counts as online, one at a time.
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
        prefix_cache: bool = True,
        cache_generated: bool = True,
        replay: bool = False,
        multi_step: int = 1,
        simulate: bool = True,
        overcommit: float = 1.0,
        aging_seconds: float = 10.0,
        batch_patience: float = 600.0,
    ) -> None:
        sizes = (max_slots, num_pages, page_size, pages_per_slot, prefill_chunk, max_prefill_rows, multi_step)
        if min(sizes) < 1:
            raise ValueError(
                f"{max_slots=} {num_pages=} {page_size=} {pages_per_slot=} {prefill_chunk=}"
                f" {max_prefill_rows=} {multi_step=} must all be at least 1"
            )
        if overcommit < 1:
            raise ValueError(f"{overcommit=} must be at least 1: one sequence may need the whole pool")
        if aging_seconds <= 0 or batch_patience < 0:
            raise ValueError(f"{aging_seconds=} must be more than 0 and {batch_patience=} not negative")
        self.page_size = page_size
        self.pages_per_slot = pages_per_slot
        self.prefill_chunk = prefill_chunk
        self.max_prefill_rows = max_prefill_rows
        self.multi_step = multi_step
        self.pages = PageAllocator(num_pages, owners=max_slots)
        self._cache_generated = cache_generated
        self._replay = replay
        self._aging_seconds = aging_seconds
        self._cache = PrefixCache(self.pages)
        self._sharing = Sharing(
            self._cache, page_size=page_size, prefix_cache=prefix_cache, cache_generated=cache_generated
        )
        self._slots = Slots(max_slots, pages_per_slot)
        self._room = Room(
            self._slots,
            self.pages,
            page_size=page_size,
            simulate=simulate,
            overcommit=overcommit,
            lag=2 * multi_step,  # a plan that draws the last token, and one until that is read back
        )
        self._waiting = WaitingQueue(batch_patience)
        self._prefilling: list[tuple[Rank, Sequence]] = []  # prompt not all dispatched, by rank
        self._live: dict[str, list[Sequence]] = {}  # request id -> its unfinished sequences
        self._deadlines: RemovableHeap[str] = RemovableHeap()  # request ids
        self._added = 0  # sequences that ever came
        self._admitted = 0
        self._steps = 0
        self._now = 0.0
        self._changes = 0  # raised by whatever may turn a refusal into an admission
        self._refused: dict[Tier, tuple[Sequence, int]] = {}  # the first in its queue, and `_changes` then
        self._no_page: list[int] = []  # slots that cannot decode in the plan being made
        self._in_flight: collections.deque[_InFlight] = collections.deque()
        self._counts = {f"{what}_{tier}": 0 for what in ("running", "waiting", "preempted") for tier in Tier}
        self._waiting_tokens = dict.fromkeys(Tier, 0)
        self._totals = dict.fromkeys(("prefix_queries_tokens", "prefix_hit_tokens", "preemptions"), 0)

    # -- what there is ---------------------------------------------------------------------------------

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def waiting_tokens(self) -> int:
        """Prompt tokens that wait, a request's counted once however many sequences it has."""
        return sum(self._waiting_tokens.values())

    def waiting_before(self, tier: Tier) -> tuple[int, int]:
        """(sequences, prompt tokens) that wait of this tier and those that go first. Any thread may ask."""
        tiers = list(Tier)[: list(Tier).index(tier) + 1]
        sequences = sum(self._counts[f"waiting_{t}"] + self._counts[f"preempted_{t}"] for t in tiers)
        return sequences, sum(self._waiting_tokens[t] for t in tiers)

    @property
    def num_running(self) -> int:
        """Sequences that hold a slot."""
        return self._slots.held

    @property
    def pages_used(self) -> int:
        return self.pages.used

    @property
    def pages_free(self) -> int:
        """Those that hold a prefix which nobody uses now included."""
        return self.pages.free

    @property
    def plans_in_flight(self) -> int:
        """Plans made and not committed yet."""
        return len(self._in_flight)

    @property
    def has_work(self) -> bool:
        """False when nothing waits, runs or is in flight."""
        return bool(self._live or self._in_flight)

    def reset_counters(self) -> None:
        """Counts of prefix look-ups, preemptions and evictions begin at 0."""
        self._totals = dict.fromkeys(self._totals, 0)
        self.pages.evictions = 0

    def stats(self) -> dict[str, int]:
        """Sizes now, and counters that only grow. Any thread may ask.

        running, waiting, preempted: sequences; preempted ones wait with output, and do not count as waiting.
            Also of each tier, as `running_online` and so on, by the tier that was asked for.
        waiting_tokens: prompt tokens that wait, a request's counted once; waiting_tokens_online: of the tier.
        pages_free: that hold nothing; pages_cached: that nobody holds, but the prefix cache knows;
            pages_used: the others.
        prefix_queries_tokens: that were looked up; prefix_hit_tokens: of these, found.
        preemptions; evictions: of pages from the prefix cache.
        """
        sums = {
            what: sum(self._counts[f"{what}_{tier}"] for tier in Tier)
            for what in ("running", "waiting", "preempted")
        }
        cached, free = self.pages.idle, self.pages.free
        return {
            **sums,
            **self._counts,
            "waiting_tokens": self.waiting_tokens,
            "waiting_tokens_online": self._waiting_tokens[Tier.ONLINE],
            "pages_free": free - cached,
            "pages_cached": cached,
            "pages_used": self.pages.num_pages - free,
            **self._totals,
            "evictions": self.pages.evictions,
        }

    def promise(self, request: Request) -> int:
        """Pages that a sequence of this request may come to hold.

        Keys and values are written when a token *enters* the model. The last token drawn never enters, so the
        positions written are 0 .. max_total_tokens-2; with nothing to draw, the prompt's: 0 .. prompt_len-1.
        16 prompt and 49 new tokens fit one page of 64.
        """
        positions = max(len(request.prompt_token_ids), request.max_total_tokens - 1)
        return -(-positions // self.page_size)

    def holder(self, slot: int) -> Sequence | None:
        """The sequence that holds a slot."""
        sequence: Sequence | None = self._slots.sequences[slot]
        return sequence

    def masked(self, slots: NDArray[np.int32]) -> list[int]:
        """Those of the slots whose holder has a grammar."""
        return slots[self._slots.masked[slots]].tolist()

    def allow(self, sequence: Sequence) -> None:
        """A sequence with a grammar may draw again: what it drew last was followed."""
        sequence.waits = False
        if sequence.slot >= 0:
            self._slots.waits[sequence.slot] = False

    def view(self) -> list[SlotView]:
        """Who holds the slots, in order. Any thread may ask; what changes meanwhile may be missed."""
        views = []
        for slot, sequence in enumerate(self._slots.sequences.tolist()):
            if sequence is None:
                continue
            pages = list(sequence.pages)
            views.append(
                SlotView(
                    slot=slot,
                    request_id=sequence.request.request_id,
                    index=sequence.index,
                    tier=sequence.request.tier,
                    status=sequence.status,
                    prompt=sequence.prompt_len,
                    computed=min(sequence.computed, sequence.prompt_len),
                    cached=sequence.cached,
                    generated=len(sequence.output),
                    pages=len(pages),
                    shared=int(np.count_nonzero(self.pages.references(pages) > 1)) if pages else 0,
                )
            )
        return views

    # -- pages that come from elsewhere ----------------------------------------------------------------

    def known(self, digests: Seq[bytes]) -> int:
        """How many of a beginning's first pages the prefix cache has. Any thread may ask."""
        return len(self._cache.match(digests, len(digests)))

    def adopt(self, digests: Seq[bytes], first: int) -> list[tuple[int, int]]:
        """See `PrefixCache.adopt`: pages that whoever calls fills before the next plan is dispatched."""
        return self._cache.adopt(digests, first)

    # -- what comes and goes ---------------------------------------------------------------------------

    def add(self, request: Request, seeds: Seq[int]) -> list[Sequence]:
        """Queues the request's sequences, `params.sequences` of them, one per seed, and returns them.

        Raises ValueError if they could never run, or if a live request has the same id.
        """
        if request.request_id in self._live:
            raise ValueError(f"request_id={request.request_id!r} is in use")
        if len(seeds) != request.params.sequences:
            raise ValueError(f"{len(seeds)} seeds for n={request.params.n}, best_of={request.params.best_of}")
        promise, most = self.promise(request), min(self.pages.num_pages, self.pages_per_slot)
        if promise > most:  # it would block the queue for ever
            raise ValueError(f"the request needs {promise} pages; a sequence can have {most}")
        sequences = [Sequence(request, index, seed) for index, seed in enumerate(seeds)]
        self._live[request.request_id] = list(sequences)
        self._sharing.enter(request, self._added)
        if request.deadline is not None:
            self._deadlines.push(request.deadline, request.request_id)
        for sequence in sequences:
            sequence.rank = rank_of(request, self._added, self._aging_seconds)
            self._added += 1
            self._queue(sequence)
        return sequences

    def abort(self, request_id: str) -> list[Sequence]:
        """Ends the request's unfinished sequences, in whatever state, and returns them: `finish` is ABORT and
        their slots and pages are free at once. An unknown or finished request has none."""
        return self._end(request_id, Finish.ABORT)

    def abort_all(self) -> list[Sequence]:
        """Aborts every request and forgets the plans in flight: for an engine that cannot go on."""
        sequences = [sequence for request_id in list(self._live) for sequence in self.abort(request_id)]
        self._in_flight.clear()
        return sequences

    def expire(self, now: float) -> list[Sequence]:
        """Ends, in whatever state, the sequences whose deadline has come, with TIMEOUT, and returns them."""
        ended: list[Sequence] = []
        while (entry := self._deadlines.first()) is not None and entry[0] <= now:
            ended += self._end(entry[1], Finish.TIMEOUT)
        return ended

    def _end(self, request_id: str, reason: Finish) -> list[Sequence]:
        sequences = list(self._live.get(request_id, ()))
        for sequence in sequences:
            self.finish(sequence, reason)
        return sequences

    def finish(self, sequence: Sequence, reason: Finish) -> None:
        """Ends one sequence and frees its slot and pages at once; its rows in flight are ignored.

        The engine calls it for a stop string. A sequence that has ended keeps its first reason.
        """
        if sequence.finish is not None:
            return
        if sequence.status in (Status.WAITING, Status.PREEMPTED):
            self._unqueue(sequence)
        else:
            self._release(sequence)
        sequence.status = Status.FINISHED
        sequence.finish = reason
        request_id = sequence.request.request_id
        siblings = self._live[request_id]
        siblings.remove(sequence)
        if not siblings:
            del self._live[request_id]
            self._deadlines.remove(request_id)
            self._sharing.leave(request_id)

    def _queue(self, sequence: Sequence) -> None:
        sequence.status = Status.PREEMPTED if sequence.output else Status.WAITING
        self._waiting.push(sequence)
        self._counts[f"{sequence.status}_{sequence.request.tier}"] += 1
        self._waiting_tokens[sequence.request.tier] += 0 if sequence.index else sequence.prompt_len

    def _unqueue(self, sequence: Sequence) -> None:
        self._waiting.remove(sequence)
        self._counts[f"{sequence.status}_{sequence.request.tier}"] -= 1
        self._waiting_tokens[sequence.request.tier] -= 0 if sequence.index else sequence.prompt_len

    def _release(self, sequence: Sequence) -> None:
        """Takes a running sequence's slot and pages away. Its last pages go first when others are needed: the
        first ones may be the beginning of more prompts, and without them the last ones cannot be found."""
        if sequence.computed < sequence.prefill_len:
            del self._prefilling[bisect.bisect_left(self._prefilling, (sequence.rank,))]
        self._room.leave(sequence.slot)
        self.pages.release(sequence.pages[::-1], sequence.slot)
        sequence.pages = []
        self._slots.release(sequence)
        self._counts[f"running_{sequence.request.tier}"] -= 1
        self._changes += 1

    def _preempt(self, sequence: Sequence) -> None:
        """Takes a running sequence's slot and pages away and queues it again, with the output read back."""
        self._release(sequence)
        sequence.matched = -1
        sequence.known = sequence.computed = 0
        sequence.resumed = sequence.sampled = 0 if self._replay else len(sequence.output)
        self._queue(sequence)
        self._totals["preemptions"] += 1

    # -- what the device does next ---------------------------------------------------------------------

    def plan(self, now: float = 0.0) -> StepPlan:
        """The next step, which counts as dispatched from now on: admit, prefill, then decode.

        Its arrays are copies, never views of what the next plan changes. A plan that is not empty must be
        committed, in order of `step`.

        now: the time, on the clock of `Request.arrival_time`.
        """
        self._now = now
        self._admit()
        # before the prompts: who must give its pages to a row that decodes has no row in this plan yet
        steps = self._find_pages_to_decode()
        prefill = self._plan_prefill()
        decode = self._plan_decode(steps)
        plan = StepPlan(self._steps, prefill, decode)
        if not plan.empty:
            self._steps += 1
            epoch = self._slots.epoch
            decode_epochs = None if decode is None else epoch[decode.slots]
            prefill_epochs = [int(epoch[row.slot]) for row in prefill]
            self._in_flight.append(_InFlight(plan.step, prefill_epochs, decode_epochs))
        return plan

    # -- admission

    def _admit(self) -> None:
        """Moves waiting sequences into slots, each tier strictly in order: online work while there is room or
        batch work can give way, then batch work while there is room."""
        self._waiting.promote(self._now)
        for tier in Tier:
            while (sequence := self._waiting.first(tier)) is not None:
                refusal = (sequence, self._changes)
                if self._refused.get(tier) == refusal:
                    break
                if self._find_room(sequence, tier):
                    self._start(sequence)
                elif tier is Tier.ONLINE and self._refused.get(tier) != refusal:
                    return  # it takes batch work's place soon: none should start now
                else:
                    break

    def _find_room(self, sequence: Sequence, tier: Tier) -> bool:
        """Whether there is a slot and pages for it, after preempting as many batch sequences as an online one
        needs, if it can then start in this very plan. Remembers a refusal that only a change can turn."""
        hoped = 0 if self._room.is_sure(self.promise(sequence.request)) else self._hoped(sequence)
        if self._slots.free and self._has_pages(sequence, hoped):
            return True
        yielding: list[Sequence] = []
        if tier is Tier.ONLINE and self._counts["running_batch"]:
            if not self._starts_now(sequence):
                return False
            yielding = victims(self._slots.holders())
        if not yielding or not self._has_pages(sequence, hoped, yielding):
            self._refused[tier] = (sequence, self._changes)
            return False
        few, enough = 0 if self._slots.free else 1, len(yielding)
        while few < enough:  # the least number that suffices
            middle = (few + enough) // 2
            if self._has_pages(sequence, hoped, yielding[:middle]):
                enough = middle
            else:
                few = middle + 1
        for victim in yielding[:enough]:
            self._preempt(victim)
        return True

    def _has_pages(self, sequence: Sequence, hoped: int, without: Seq[Sequence] = ()) -> bool:
        """See `Room.fits`. What it may share with those who give way is as good as gone."""
        hoped = 0 if without else hoped
        left = sequence.prefill_len + sum(s.prefill_len - s.computed for _, s in self._prefilling)
        delay = 2 + len(self._prefilling) // self.max_prefill_rows + left // self.prefill_chunk
        promise = self.promise(sequence.request)
        return self._room.fits(sequence, promise, hoped, delay=delay, without=without)

    def _hoped(self, sequence: Sequence) -> int:
        """Pages that others hold and that a waiting sequence will probably share."""
        if any(sibling.slot >= 0 for sibling in self._live[sequence.request.request_id]):
            return min(self._sharing.matchable(sequence), sequence.prompt_len // self.page_size)
        return int(np.count_nonzero(self.pages.references(self._sharing.match(sequence))))

    def _starts_now(self, sequence: Sequence) -> bool:
        """Whether the prompts that come first leave something of the chunk, as far as can be told."""
        ahead = [other for rank, other in self._prefilling if rank < sequence.rank]
        if len(ahead) >= self.max_prefill_rows:
            return False
        tokens = 0
        for other in ahead:
            done = other.computed if other.matched >= 0 else len(self._sharing.match(other)) * self.page_size
            tokens += other.prefill_len - done
        return tokens < self.prefill_chunk

    def _start(self, sequence: Sequence) -> None:
        promise = self.promise(sequence.request)
        hoped = 0 if self._room.is_sure(promise) else self._hoped(sequence)
        self._unqueue(sequence)
        self._slots.take(sequence)
        self._room.enter(sequence, promise, hoped)
        sequence.status = Status.PREFILL
        sequence.admitted = self._admitted
        if sequence.admitted_at is None:
            sequence.admitted_at = self._now
        self._admitted += 1
        bisect.insort(self._prefilling, (sequence.rank, sequence))
        self._counts[f"running_{sequence.request.tier}"] += 1

    # -- pages

    def _take_pages(self, sequence: Sequence, count: int) -> None:
        self._slots.add_pages(sequence, self.pages.allocate(count, sequence.slot))

    def _find_pages_to_decode(self) -> int:
        """Gives every sequence that decodes the pages that it writes in this plan, taking them from the
        lowest-ranked sequences if need be. Returns the plan's decode steps."""
        state = self._slots
        while True:
            slots = state.decodable()
            if not len(slots):
                return 1
            steps = self._choose_steps(slots)
            missing = self._missing_pages(slots, steps)
            if steps > 1 and missing.sum() > self.pages.free:
                steps, missing = 1, self._missing_pages(slots, 1)
            if missing.sum() <= self.pages.free:
                break
            self._preempt(lowest(state.holders()))
        short = np.flatnonzero(missing)
        if len(short):
            slots, missing = slots[short], missing[short]
            fresh = self.pages.allocate(int(missing.sum()), np.repeat(slots, missing))
            for sequence, count in zip(state.sequences[slots].tolist(), missing.tolist(), strict=True):
                state.add_pages(sequence, fresh[:count])
                fresh = fresh[count:]
        return steps

    def _missing_pages(self, slots: NDArray[np.intp], steps: int) -> NDArray[np.int32]:
        """i32[slots], how many pages each lacks for its next steps."""
        state = self._slots
        last = state.position[slots]
        if steps > 1:
            last = last + np.minimum(state.to_sample[slots], steps) - 1
        return last // self.page_size + 1 - state.pages[slots]

    def _choose_steps(self, slots: NDArray[np.intp]) -> int:
        """`multi_step` where no prompt, replay, stop string or end that is near wants a plan of its own."""
        state = self._slots
        if self.multi_step == 1 or self._prefilling or state.one_step[slots].any():
            return 1
        if state.to_force[slots].any() or state.to_sample[slots].min() < 2:
            return 1
        return self.multi_step

    # -- prompts

    def _plan_prefill(self) -> tuple[PrefillRow, ...]:
        """One chunk of the prompts, by rank. A sequence whose pages another one computes here lets those
        behind it go first; one that finds no page keeps what it has and waits."""
        rows: list[PrefillRow] = []
        planned: list[Sequence] = []
        budget = self.prefill_chunk
        self._no_page = []
        self._sharing.new_plan()
        for _, sequence in list(self._prefilling):
            if not budget or len(rows) == self.max_prefill_rows:
                break
            # it gave its pages to one that came before it here, or may not draw what would follow
            if sequence.slot < 0 or self._slots.waits[sequence.slot]:
                continue
            if sequence.matched < 0:
                if self._sharing.should_wait(sequence):
                    continue
                self._begin(sequence)
            end = self._find_pages_to_prefill(sequence, budget)
            if end == sequence.computed:
                break
            self._sharing.will_compute(sequence, end)
            first = sequence.computed == sequence.matched * self.page_size
            table = self._slots.tables[sequence.slot]
            row = prefill_row(sequence, end, table, first=first, replay=self._replay)
            sequence.computed = end
            rows.append(row)
            planned.append(sequence)
            budget -= len(row.tokens)
            if row.last:
                del self._prefilling[bisect.bisect_left(self._prefilling, (sequence.rank,))]
                self._start_decoding(sequence)
        for sequence in planned:  # for the next plan: who reads them must come after who writes them
            self._sharing.register(sequence, sequence.computed)
            self._changes += 1
        return tuple(rows)

    def _begin(self, sequence: Sequence) -> None:
        """Gives a sequence the pages that the cache has for it, before its first chunk in this slot."""
        pages = self._sharing.match(sequence)
        self.pages.share(pages, sequence.slot)
        self._slots.add_pages(sequence, pages)
        self._room.matched(sequence.slot)
        hit = len(pages) * self.page_size
        if not sequence.begun:
            sequence.begun, sequence.cached = True, min(hit, sequence.prompt_len)
        sequence.computed, sequence.matched, sequence.known = hit, len(pages), len(pages)
        if sequence.digests is not None:
            self._totals["prefix_queries_tokens"] += sequence.prefill_len
            self._totals["prefix_hit_tokens"] += hit

    def _find_pages_to_prefill(self, sequence: Sequence, budget: int) -> int:
        """The end of its next chunk, for which it now has pages: at most `budget` tokens further. Pages are
        taken from sequences of a lower rank if need be, which have no row in this plan yet."""
        end = min(sequence.computed + budget, sequence.prefill_len)
        needed = -(-end // self.page_size) - len(sequence.pages)
        while needed > self.pages.free:
            victim = lowest(self._slots.holders())
            if victim.rank <= sequence.rank:
                needed = self.pages.free
                end = min(end, (len(sequence.pages) + needed) * self.page_size)
                break
            self._preempt(victim)
        if needed:
            self._take_pages(sequence, needed)
        return end

    def _start_decoding(self, sequence: Sequence) -> None:
        """The row with the prompt's end draws the first token, if the request wants any at all, and the
        plan's decode step the second."""
        sequence.status = Status.DECODE
        self._room.decodes(sequence.slot)
        if not sequence.max_new_tokens:
            return
        sequence.sampled += 1
        self._slots.start_decoding(sequence)
        if self._slots.masked[sequence.slot] and not (self._replay and sequence.output):
            self._slots.waits[sequence.slot] = True
            return
        full = sequence.prefill_len == len(sequence.pages) * self.page_size
        if full and sequence.sampled < sequence.max_new_tokens:
            if self.pages.free:
                self._take_pages(sequence, 1)
            else:
                self._no_page.append(sequence.slot)

    # -- decode

    def _plan_decode(self, steps: int) -> DecodeRows | None:
        state = self._slots
        slots = state.decodable()
        if self._no_page:
            slots = np.setdiff1d(slots, self._no_page)
        if not len(slots):
            return None
        positions = state.position[slots]
        sequences: list[Sequence] = state.sequences[slots].tolist()
        forced = self._forced(slots, sequences) if self._replay else None
        masked = state.masked[slots]
        if masked.any():  # who draws has to be followed before it draws again; who replays was
            state.waits[slots[masked if forced is None else masked & (forced == NO_TOKEN)]] = True
        if steps == 1:
            state.position[slots] += 1
            state.to_sample[slots] -= 1
            for sequence in sequences:
                sequence.sampled += 1
        else:
            advance = np.minimum(state.to_sample[slots], steps)
            state.position[slots] += advance
            state.to_sample[slots] -= advance
            for sequence, count in zip(sequences, advance.tolist(), strict=True):
                sequence.sampled += count
        tables = state.tables.take(slots, axis=0)
        return DecodeRows(slots.astype(np.int32), positions, tables, forced, steps)

    def _forced(self, slots: NDArray[np.intp], sequences: list[Sequence]) -> NDArray[np.int32] | None:
        """i32[slots], the tokens that rows must yield because they had them before a preemption."""
        replaying = np.flatnonzero(self._slots.to_force[slots])
        if not len(replaying):
            return None
        forced = np.full(len(slots), NO_TOKEN, np.int32)
        for i in replaying.tolist():
            forced[i] = sequences[i].output[sequences[i].sampled]
        self._slots.to_force[slots[replaying]] -= 1
        return forced

    # -- what the device did ---------------------------------------------------------------------------

    def commit(
        self, plan: StepPlan, prefill_tokens: NDArray[np.int32], decode_tokens: NDArray[np.int32]
    ) -> list[Event]:
        """`commit_prefill`, then `commit_decode`."""
        if plan.empty:
            return []
        return self.commit_prefill(plan, prefill_tokens) + self.commit_decode(plan, decode_tokens)

    def commit_prefill(self, plan: StepPlan, tokens: NDArray[np.int32]) -> list[Event]:
        """Takes in what the prefill of the oldest plan in flight drew: one event per row whose sequence still
        lives. `commit_decode` must follow; what is cancelled or ends in between has no event there.

        tokens: i32[len(plan.prefill)], read where a row has `last`.

        Sequences end with STOP at a stop token (the device cannot draw one before `min_tokens`) and with
        LENGTH at the limit; their slots and pages are free when this returns.

        Raises ValueError for plans out of order or an array of a wrong length, and RuntimeError if the device
        ended a sequence that lives here (the two would wait for each other for ever) or yielded another token
        than it was made to.
        """
        flight = self._oldest(plan)
        if len(tokens) != len(plan.prefill):
            raise ValueError(f"{len(tokens)} tokens for a plan with {len(plan.prefill)} prefill rows")
        events: list[Event] = []
        for i, (row, epoch) in enumerate(zip(plan.prefill, flight.prefill_epochs, strict=True)):
            if self._slots.epoch[row.slot] == epoch:
                events.append(self._commit_prefill(i, row, int(tokens[i])))
        return events

    def commit_decode(self, plan: StepPlan, tokens: NDArray[np.int32]) -> list[Event]:
        """Likewise what its decode drew, and the plan is done: one event for each row and step of a sequence
        that still lives, but none where it replays.

        tokens: i32[plan.decode.steps, len(plan.decode.slots)]; i32[slots] will do for one step, and anything
            empty where there are no rows. NO_TOKEN: the device had ended that sequence.
        """
        flight = self._oldest(plan)
        steps, slots = (0, 0) if plan.decode is None else (plan.decode.steps, len(plan.decode.slots))
        shapes = {(steps, slots), (slots,)} if steps == 1 else {(steps, slots)}
        if tokens.shape not in shapes if slots else tokens.size:
            raise ValueError(f"{tokens.shape=} for a plan with {steps} steps of {slots} decode rows")
        self._in_flight.popleft()
        events: list[Event] = []
        if flight.decode_epochs is not None:
            for step, drawn in enumerate(tokens.reshape(steps, slots)):
                self._commit_decode(events, plan, step, flight.decode_epochs, drawn)
        return events

    def _oldest(self, plan: StepPlan) -> _InFlight:
        if not self._in_flight or self._in_flight[0].step != plan.step:
            oldest = self._in_flight[0].step if self._in_flight else None
            raise ValueError(f"plan {plan.step} was committed out of turn; the oldest in flight is {oldest}")
        return self._in_flight[0]

    def _commit_prefill(self, i: int, row: PrefillRow, token: int) -> Event:
        sequence: Sequence = self._slots.sequences[row.slot]
        if not row.last:
            return sequence, NO_TOKEN, i, None
        sequence.scored = sequence.scored or row.targets is not None
        finish: Finish | None = None
        if not sequence.max_new_tokens:
            token, finish = NO_TOKEN, Finish.LENGTH
        elif self._slots.to_skip[row.slot]:
            self._check_forced(token, row.forced)
            self._slots.to_skip[row.slot] -= 1
            token = NO_TOKEN
        else:
            self._check_drawn(token)
            sequence.output.append(token)
            sequence.waits = bool(self._slots.masked[row.slot])
            self._slots.to_read[row.slot] -= 1
            if token in sequence.request.stop_token_ids:
                finish = Finish.STOP
            elif not self._slots.to_read[row.slot]:
                finish = Finish.LENGTH
        if finish is not None:
            self.finish(sequence, finish)
        return sequence, token, i, finish

    def _commit_decode(
        self,
        events: list[Event],
        plan: StepPlan,
        step: int,
        epochs: NDArray[np.int64],
        drawn: NDArray[np.int32],
    ) -> None:
        """One step's tokens. A sequence that ends has another epoch at the next step."""
        assert plan.decode is not None
        state, slots = self._slots, plan.decode.slots.astype(np.intp)
        alive = state.epoch.take(slots) == epochs
        first = len(plan.prefill) + step * len(slots)
        rows: Seq[int] = range(first, first + len(slots))
        if plan.decode.forced is not None:
            skipped = alive & (state.to_skip.take(slots) > 0)
            for i in np.flatnonzero(skipped).tolist():
                self._check_forced(int(drawn[i]), int(plan.decode.forced[i]))
            state.to_skip[slots[skipped]] -= 1
            alive &= ~skipped
        if not alive.all():
            rows = (np.flatnonzero(alive) + first).tolist()
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
        for i in np.flatnonzero(state.masked.take(slots)).tolist():
            sequences[i].waits = True
        if self._cache_generated:
            # all but the token just drawn have entered; where they fill a page, it becomes known
            entered = state.length_limit.take(slots) - to_read - 1
            for i in np.flatnonzero(entered % self.page_size == 0).tolist():
                self._sharing.register(sequences[i], int(entered[i]))
        finishes: list[Finish | None] = [None] * len(sequences)
        for i in np.flatnonzero(stopped | (to_read == 0)).tolist():
            finishes[i] = reason = Finish.STOP if stopped[i] else Finish.LENGTH
            self.finish(sequences[i], reason)
        events.extend(zip(sequences, tokens, rows, finishes, strict=True))

    def _check_drawn(self, token: int) -> None:
        if token < 0:
            raise RuntimeError("the device ended a sequence that still lives in the scheduler")

    def _check_forced(self, token: int, forced: int) -> None:
        if token != forced:
            raise RuntimeError(f"the device yielded token {token} where it was made to yield {forced}")

    # -- tests -----------------------------------------------------------------------------------------

    def check_invariants(self) -> None:
        """Raises AssertionError unless slots, pages, promises, tables and queues agree. For tests: slow."""
        self.pages.check_invariants()
        self._cache.check_invariants()
        self._slots.check_invariants()
        held = self._slots.holders()
        owners = collections.Counter(page for sequence in held for page in sequence.pages)
        require(len(owners) == self.pages.used, "a page is used by nobody")
        references = self.pages.references(list(owners))
        require(references.tolist() == list(owners.values()), "a page's owners are miscounted")
        promised = sum(self.promise(sequence.request) for sequence in held)
        require(promised == self._room.promised == self._room.promise.sum(), "promises are miscounted")
        for sequence in held:
            self._check_running(sequence)
        require(self._prefilling == sorted(self._prefilling), "the prefill queue is out of order")
        waiting = self._waiting.all()
        for sequence in waiting:
            status = Status.PREEMPTED if sequence.output else Status.WAITING
            require(sequence.status is status and not sequence.pages, "a waiting sequence has pages")
        live = {sequence for siblings in self._live.values() for sequence in siblings}
        require(live == {*held, *waiting}, "live sequences are not those that wait and run")
        require(len(live) == len(held) + len(waiting), "a sequence waits twice")
        require(all(sequence.finish is None for sequence in live), "a finished sequence is live")
        counts = collections.Counter(
            f"{'running' if s.slot >= 0 else str(s.status)}_{s.request.tier}" for s in live
        )
        require({k: v for k, v in self._counts.items() if v} == counts, "states are miscounted")
        for tier in Tier:
            own = [sequence for sequence in waiting if sequence.request.tier is tier and not sequence.index]
            tokens = sum(sequence.prompt_len for sequence in own)
            require(tokens == self._waiting_tokens[tier], "waiting tokens are miscounted")

    def _check_running(self, sequence: Sequence) -> None:
        require(sequence.status in (Status.PREFILL, Status.DECODE), "a held slot's sequence is not running")
        prefilling = sequence.computed < sequence.prefill_len
        require(
            prefilling == ((sequence.rank, sequence) in self._prefilling)
            and prefilling == (sequence.status is Status.PREFILL),
            "the prefill queue is wrong",
        )
        decoded = max(sequence.sampled - sequence.resumed - 1, 0)
        written = -(-(sequence.computed + decoded) // self.page_size)
        require(len(sequence.pages) == written, "pages do not fit the positions")
        require(len(sequence.pages) <= self.promise(sequence.request), "more pages than promised")
        if not self._replay:
            require(len(sequence.output) <= sequence.sampled, "more tokens read than sampled")
        require(sequence.sampled <= sequence.max_new_tokens, "more tokens sampled than asked for")
