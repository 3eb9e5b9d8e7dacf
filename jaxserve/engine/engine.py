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
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Seq
from typing import Any

import jax
import numpy as np
from numpy.typing import NDArray

from jaxserve.engine import batch
from jaxserve.engine.outputs import EngineBusy, Output, Sink
from jaxserve.engine.programs import Key, bucket_for
from jaxserve.engine.rate import Rate
from jaxserve.engine.runner import Runner
from jaxserve.engine.streams import Stream
from jaxserve.models.decoder import Params
from jaxserve.scheduler.scheduler import Event, Scheduler
from jaxserve.scheduler.types import (
    Finish,
    Limits,
    Pooling,
    PrefillRow,
    Request,
    RequestError,
    Sequence,
    SlotView,
    StepPlan,
    StructuredOutputs,
    Tier,
)
from jaxserve.text.grammars import Grammar, GrammarError, Grammars, Masks, Matcher, TooManyGrammars
from jaxserve.text.tokenizer import Tokenizer

ROW_BOUNDS = tuple(2**power for power in range(11))  # by which `stats` counts the rows of decode steps
MASK_SECONDS = 0.05  # how often the engine looks up while it waits for a grammar's mask alone
NO_RESULTS = batch.unpack_results(np.zeros((0, batch.RESULT_WIDTH), np.int32))
LOOK_STEPS = 32  # how often the engine asks itself who waits for whom
HOST_BOUND = 0.8  # the host's time over a dispatch, as a share of the device's over a token
TOTALS = ("prompt_tokens_total", "generation_tokens_total", "requests_total", "rejected_total")


@dataclasses.dataclass(slots=True)
class _Flight:
    """A dispatched plan, the device arrays that will hold its results, and the programs that fill them."""

    plan: StepPlan
    prefill: jax.Array | None = None  # i32[rows, RESULT_WIDTH]
    decode: jax.Array | None = None  # i32[steps, rows, RESULT_WIDTH]
    prompt_logprobs: jax.Array | None = None  # i32[tokens, RESULT_WIDTH]
    embeddings: jax.Array | None = None  # f32[rows, D]
    programs: list[Key] = dataclasses.field(default_factory=list)


@dataclasses.dataclass(frozen=True, slots=True)
class PromptPages:
    """Pages of a prompt that were computed elsewhere.

    digests: of the prompt's pages up to the last of these. first: the index of the first of these. block: at
    most PAGES_MOVED of them, already on this pool's devices; see `Runner.copy_pages`. placed: called once the
    block's writing was dispatched.
    """

    digests: list[bytes]
    first: int
    block: jax.Array
    placed: Callable[[], None]


@dataclasses.dataclass(frozen=True, slots=True)
class _Followed:
    """What a sequence drew last was taken in by its grammar."""

    sequence: Sequence


@dataclasses.dataclass(slots=True)
class StepTimes:
    """Seconds, summed over `steps`. host: planning, packing, dispatching, committing, text. wait: blocked
    on the device while reading back. Host time that overlaps the device costs nothing until wait is zero."""

    steps: int = 0
    decoded: int = 0  # decode steps: several in one dispatch count as several
    rows: int = 0  # that were decoded, summed over those
    host: float = 0.0
    wait: float = 0.0


class Engine:
    """Runs requests over a loaded model.

    runner: compiled programs, and what they run on; see `build.py` for the kinds.
    prefill_rows: rows of each prefill bucket.
    max_queued, max_queued_tokens: when so many wait, or tokens of prompts, requests are refused; batch work
        that waits keeps no online request out.
    step_timeout: seconds after which a step that has not come back counts as stuck.
    choose_steps: draw several tokens per dispatch only while the device waits for the host, not always.
    """

    def __init__(
        self,
        *,
        limits: Limits,
        tokenizer: Tokenizer | None,
        runner: Runner,
        scheduler: Scheduler,
        prefill_rows: dict[int, int],
        seed: int,
        facts: dict[str, Any],
        max_queued: int = 1024,
        max_queued_tokens: int = 2**31,
        step_timeout: float = 120.0,
        choose_steps: bool = True,
    ) -> None:
        self.limits = limits
        self.tokenizer = tokenizer
        self.scheduler = scheduler
        self.facts = facts  # what stats() repeats: sizes, names, start-up figures
        self.failure: BaseException | None = None
        self.times = StepTimes()
        self._runner = runner
        self._prefill_rows = prefill_rows
        self._decode_buckets = runner.programs.buckets("decode")
        self._random = random.Random(seed)
        self._streams: dict[Sequence, Stream] = {}
        self._flight: _Flight | None = None
        self._inbox: collections.deque[tuple[Request, Sink] | str | PromptPages | _Followed]
        self._inbox = collections.deque()
        self._grammars = None
        if tokenizer is not None:
            self._grammars = Grammars(tokenizer, limits.vocab_size, limits.eos_token_ids)
        self._masks = Masks(self._followed)
        self._mask_buckets = runner.programs.buckets("mask_slots")
        self._wake = threading.Condition()
        self._thread: threading.Thread | None = None
        self._closing = False
        self._totals = dict.fromkeys(TOTALS, 0)
        self._max_queued, self._max_queued_tokens = max_queued, max_queued_tokens
        self._step_timeout = step_timeout
        self._waits_for: tuple[float, _Flight] | None = None  # since when, while the device has the word
        self._turn_begun: float | None = None  # when the loop began what it is at; None while it sleeps
        self._rate = Rate()
        self._busy = 0.0  # seconds spent in steps
        self._most_steps = scheduler.multi_step
        self._choose_steps = choose_steps
        self._looked_at = StepTimes()
        self._row_counts = dict.fromkeys(ROW_BOUNDS, 0)  # decode steps, by the least bound of their rows
        # called on this engine's thread with each chunk of a prompt that has been computed
        self.on_chunk: Callable[[Sequence, PrefillRow], None] | None = None

    # -- from any thread -------------------------------------------------------------------------------

    @property
    def decodes(self) -> bool:
        """Whether it draws more than a first token."""
        return bool(self._decode_buckets)

    @property
    def least_prefill(self) -> int:
        """Tokens that the smallest prefill program takes."""
        return min(self._prefill_rows)

    @property
    def params(self) -> Params:
        return self._runner.params

    @property
    def healthy(self) -> bool:
        """False once the engine has failed or was closed."""
        return self.failure is None and not self._closing

    @property
    def stuck(self) -> str | None:
        """What is stuck: a device step, or a turn of the engine's thread, for `step_timeout` seconds."""
        waits = self._waits_for
        if waits is None:
            return self._stuck_on_host()
        if (seconds := time.monotonic() - waits[0]) < self._step_timeout:
            return None
        programs = ", ".join(f"{kind} {bucket}" for kind, bucket in waits[1].programs)
        return f"the device has not finished step {waits[1].plan.step} ({programs}) for {seconds:.0f} s"

    def _stuck_on_host(self) -> str | None:
        begun = self._turn_begun
        if begun is None or (seconds := time.monotonic() - begun) < self._step_timeout:
            return None
        return f"the engine's thread has been in one turn for {seconds:.0f} s"

    def submit(self, *requests: tuple[Request, Sink]) -> None:
        """Queues requests, all or none. A sink is called on the engine's thread and must not block.

        Where nobody waits they are taken however many there are. Raises EngineBusy when the queue is full,
        RuntimeError when the engine is dead or closed.
        """
        with self._wake:
            if not self.healthy:
                raise RuntimeError(f"the engine does not run: {self.failure or 'it was closed'}")
            waiting, tokens = self._queued(max(requests, key=lambda one: one[0].tier is Tier.BATCH)[0].tier)
            new = sum(len(request.prompt_token_ids) for request, _ in requests)
            if waiting >= self._max_queued or (waiting and tokens + new > self._max_queued_tokens):
                self._totals["rejected_total"] += len(requests)
                raise EngineBusy(self._rate.seconds_for(waiting))
            self._inbox.extend(requests)
            self._wake.notify()

    def compile_grammar(self, wanted: StructuredOutputs) -> Grammar:
        """See `EngineLike`. Raises EngineBusy where too many others wait for the same."""
        if self._grammars is None:
            raise RequestError(
                "this model has no tokenizer: structured_outputs need one", param="structured_outputs"
            )
        kind, text = wanted.source()
        try:
            return self._grammars.compile(kind, text)
        except GrammarError as error:
            raise RequestError(
                f"the {kind} cannot be followed: {error}", param=f"structured_outputs.{kind}"
            ) from None
        except TooManyGrammars:
            raise EngineBusy(1) from None

    def _followed(self, sequence: Sequence, matcher: Matcher) -> None:
        with self._wake:
            self._inbox.append(_Followed(sequence))
            self._wake.notify()

    def deposit(self, pages: PromptPages) -> None:
        """Puts pages of a prompt into the prefix cache, as many as find room, before the next step."""
        with self._wake:
            self._inbox.append(pages)
            self._wake.notify()

    def abort(self, request_id: str) -> None:
        """Ends a request at the next step and frees its slots and pages; unknown ones are ignored."""
        with self._wake:
            self._inbox.append(request_id)
            self._wake.notify()

    def _queued(self, tier: Tier) -> tuple[int, int]:
        """(sequences that wait for a slot, tokens of their prompts): of this tier and those that go first."""
        came = [item[0] for item in tuple(self._inbox) if isinstance(item, tuple)]
        came = [request for request in came if tier is Tier.BATCH or request.tier is Tier.ONLINE]
        waiting = sum(request.params.sequences for request in came)
        tokens = sum(len(request.prompt_token_ids) for request in came)
        before = self.scheduler.waiting_before(tier)
        return before[0] + waiting, before[1] + tokens

    def stats(self) -> dict[str, Any]:
        """Counters and sizes, for `/metrics` and for people. Times are seconds."""
        waiting, tokens = self._queued(Tier.BATCH)
        return {
            **self.facts,
            **self._totals,
            **self.scheduler.stats(),
            "waiting": waiting,
            "waiting_tokens": tokens,
            "waiting_tokens_online": self._queued(Tier.ONLINE)[1],
            "steps": self.times.steps,
            "decode_steps": self.times.decoded,
            "decode_rows": self.times.rows,
            **{f"decode_steps_of_{bound}": count for bound, count in self._row_counts.items()},
            "host_seconds": self.times.host,
            "device_wait_seconds": self.times.wait,
        }

    def slots(self) -> list[SlotView]:
        return self.scheduler.view()

    def reset_counters(self) -> None:
        """After warm-up: what was run then was nobody's request."""
        self._totals = dict.fromkeys(self._totals, 0)
        self.scheduler.reset_counters()
        self.times, self._looked_at = StepTimes(), StepTimes()
        self._row_counts = dict.fromkeys(ROW_BOUNDS, 0)

    def start(self) -> None:
        """Runs the loop on a thread of its own until `close()`."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="jaxserve-engine", daemon=True)
            self._thread.start()

    def fail(self, error: BaseException) -> None:
        """Ends the engine from outside, even where its thread is stuck in a step that will not come back."""
        with self._wake:
            self.failure = self.failure or error
            self._wake.notify()

    def copy_pages(self, pages: list[int]) -> jax.Array:
        """See `Runner.copy_pages`; on the engine's own thread."""
        return self._runner.copy_pages(pages)

    def bring(self, block: jax.Array) -> jax.Array:
        """A block of pages from another engine's devices on this one's. Any thread may ask."""
        return self._runner.bring(block)

    def close(self) -> None:
        """Stops the loop; requests that still run are aborted."""
        with self._wake:
            self._closing = True
            self._wake.notify()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()
        self._end_all(None)
        self._masks.close()
        if self._grammars is not None:
            self._grammars.close()

    # -- the loop --------------------------------------------------------------------------------------

    def step(self) -> bool:
        """One turn: take in what came, plan, dispatch, read back and commit the step before.

        False when there was nothing to do. Raises what the device raises; the engine is then dead.
        """
        begin = time.perf_counter()
        waited = self.times.wait
        plan = self._plan()
        flight, self._flight = self._flight, None if plan.empty else self._dispatch(plan)
        if flight is not None:
            self._commit(flight)
        if self._flight is None and flight is None:
            return False
        self._busy += time.perf_counter() - begin
        self.times.steps += 1
        if plan.decode is not None:
            rows, steps = len(plan.decode.slots), plan.decode.steps
            self.times.decoded += steps
            self.times.rows += rows * steps
            self._row_counts[next((b for b in ROW_BOUNDS if b >= rows), ROW_BOUNDS[-1])] += steps
        self.times.host += time.perf_counter() - begin - (self.times.wait - waited)
        if self._choose_steps and self.times.steps % LOOK_STEPS == 0:
            self._look()
        return True

    def _look(self) -> None:
        """Several tokens per dispatch make a newcomer wait; they pay only where the host takes longer over a
        dispatch than the device over a token."""
        now, before = self.times, self._looked_at
        self._looked_at = dataclasses.replace(now)
        host, wall = now.host - before.host, now.host - before.host + now.wait - before.wait
        each = (now.decoded - before.decoded) / LOOK_STEPS  # tokens a dispatch
        self.scheduler.multi_step = self._most_steps if each * host > HOST_BOUND * wall else 1

    def step_apart(self) -> tuple[float, float]:
        """One turn without overlap: (host seconds, device seconds). For measuring; the work goes on."""
        self._settle()
        begin = time.perf_counter()
        plan = self._plan()
        if plan.empty:
            return time.perf_counter() - begin, 0.0
        flight = self._dispatch(plan)
        dispatched = time.perf_counter()
        jax.block_until_ready((flight.prefill, flight.decode, flight.prompt_logprobs))
        done = time.perf_counter()
        self._commit(flight)
        return (dispatched - begin) + (time.perf_counter() - done), done - dispatched

    def _plan(self) -> StepPlan:
        now = time.monotonic()
        self._take_inbox()
        for sequence in self.scheduler.expire(now):
            self._streams.pop(sequence).end(Finish.TIMEOUT)
        return self.scheduler.plan(now)

    def _settle(self) -> None:
        if self._flight is not None:
            flight, self._flight = self._flight, None
            self._commit(flight)

    def _run(self) -> None:
        try:
            while True:
                with self._wake:
                    self._turn_begun = None
                    while not (self._inbox or self.scheduler.has_work or self._closing or self.failure):
                        self._wake.wait()
                    self._turn_begun = time.monotonic()
                    if self.failure is not None:
                        raise self.failure
                    if self._closing:
                        return
                if not self.step():
                    with self._wake:  # everybody who runs waits for a mask
                        if not self._inbox:
                            self._wake.wait(MASK_SECONDS)
        except BaseException as error:  # the loop is the process's heart: say so to everyone, then end
            self.failure = error = self.failure or error
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
            for index in range(request.params.sequences):
                with contextlib.suppress(Exception):
                    sink(Output(request.request_id, index, finish_reason=Finish.ABORT, error=error))

    def _take_inbox(self) -> None:
        while self._inbox:
            item = self._inbox.popleft()
            if isinstance(item, str):
                for sequence in self.scheduler.abort(item):
                    self._streams.pop(sequence).end()
                continue
            if isinstance(item, PromptPages):
                self._place(item)
                continue
            if isinstance(item, _Followed):
                self._follow(item.sequence)
                continue
            request, sink = item
            for sequence in self.scheduler.add(request, self._seeds(request)):
                self._streams[sequence] = Stream(sequence, sink, self.tokenizer)
                self._end_at_fault(sequence)
            self._totals["requests_total"] += 1
            self._totals["prompt_tokens_total"] += len(request.prompt_token_ids)

    def _follow(self, sequence: Sequence) -> None:
        """It may draw again, or its grammar is at its end."""
        stream = self._streams.get(sequence)
        if stream is None or stream.matcher is None:
            return
        if self._end_at_fault(sequence):
            return
        if stream.matcher.complete:
            self.scheduler.finish(sequence, Finish.STOP)
            self._streams.pop(sequence).push(-1, Finish.STOP, NO_RESULTS, 0)
            self._rate.ended(self._busy)
        else:
            self.scheduler.allow(sequence)

    def _end_at_fault(self, sequence: Sequence) -> bool:
        """Whether no token of its can be drawn any more: then it has ended."""
        fault = self._streams[sequence].fault(self.limits.vocab_size)
        if fault is None:
            return False
        self.scheduler.finish(sequence, Finish.ABORT)
        error, param = fault
        self._streams.pop(sequence).end(error=error, param=param)
        return True

    def _place(self, pages: PromptPages) -> None:
        if adopted := dict(self.scheduler.adopt(pages.digests, pages.first)):
            targets = [adopted.get(i, -1) for i in range(pages.first, len(pages.digests))]
            self._runner.place_pages(targets, pages.block)
        pages.placed()

    def _seeds(self, request: Request) -> list[int]:
        seed = request.params.seed
        first = self._random.getrandbits(63) if seed is None else seed
        # an odd step visits every residue, so that siblings never share a seed
        return [(first + index * 0x9E3779B97F4A7C15) % 2**63 for index in range(request.params.sequences)]

    def _dispatch(self, plan: StepPlan) -> _Flight:
        flight = _Flight(plan)
        with jax.no_tracing(), self._watched(flight):  # after warm-up a compile is an error
            for row in plan.prefill:
                if row.first and batch.needs_edits(row.params):
                    self._edit(row)
            if plan.prefill:
                self._dispatch_prefill(flight)
            if plan.decode is not None:
                if masked := self.scheduler.masked(plan.decode.slots):
                    self._mask(masked)
                bucket = bucket_for(self._decode_buckets, len(plan.decode.slots))
                packed = batch.pack_decode(plan.decode, bucket=bucket)
                flight.programs.append(("decode", bucket))
                flight.decode = self._runner.run(("decode", bucket), packed)
        return flight

    def _edit(self, row: PrefillRow) -> None:
        none = np.zeros(0, np.int32)
        prompt = none if row.prompt is None else row.prompt
        generated = none if row.generated is None else row.generated
        matcher = self._stream_of(row.slot).matcher
        mask = None if matcher is None else matcher.mask
        packed = batch.pack_edits(row.slot, row.params, prompt, generated, self.limits.vocab_size, mask)
        self._runner.run(("edit_slot", 1), packed)

    def _mask(self, slots: list[int]) -> None:
        """Writes what the grammars of these slots allow next."""
        vocab = self.limits.vocab_size
        masks = [self._stream_of(slot).mask(vocab) for slot in slots]
        bucket = bucket_for(self._mask_buckets, len(slots))
        self._runner.run(("mask_slots", bucket), batch.pack_masks(slots, masks, bucket, vocab))

    def _stream_of(self, slot: int) -> Stream:
        sequence = self.scheduler.holder(slot)
        assert sequence is not None
        return self._streams[sequence]

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
        flight.programs.append(("prefill", bucket))
        flight.prefill = self._runner.run(("prefill", bucket), packed)
        if any(row.targets is not None for row in rows):
            targets = np.full(bucket, -1, np.int32)
            start = 0
            for row in rows:
                if row.targets is not None:
                    targets[start : start + len(row.tokens)] = row.targets
                start += len(row.tokens)
            flight.prompt_logprobs = self._runner.run(("prompt_logprobs", bucket), targets)
        if any(row.pooling is not None for row in rows):
            packed = batch.pack_spans(_spans(rows), self._prefill_rows[bucket])
            flight.embeddings = self._runner.run(("embed", bucket), packed)

    def _read(self, flight: _Flight, *arrays: jax.Array | None) -> list[NDArray[Any]]:
        """Waits for results; an empty i32[0, RESULT_WIDTH] for None."""
        begin = time.perf_counter()
        none = np.zeros((0, batch.RESULT_WIDTH), np.int32)
        with self._watched(flight):
            read = [none if array is None else self._runner.read(array) for array in arrays]
        self.times.wait += time.perf_counter() - begin
        return read

    @contextlib.contextmanager
    def _watched(self, flight: _Flight) -> Iterator[None]:
        """What takes too long in here is what `stuck` names: a dispatch, or the wait for its results."""
        self._waits_for = (time.monotonic(), flight)
        yield
        self._waits_for = None

    def _commit(self, flight: _Flight) -> None:
        """First tokens are read and sent while the step's decode still runs."""
        plan = flight.plan
        if plan.prefill:
            prefill, prompt, states = self._read(
                flight, flight.prefill, flight.prompt_logprobs, flight.embeddings
            )
            results = batch.unpack_results(prefill[: len(plan.prefill)])
            events = self.scheduler.commit_prefill(plan, results.tokens)
            if self.on_chunk is not None:
                for sequence, _, i, _ in events:
                    self.on_chunk(sequence, plan.prefill[i])
            prompt_results = batch.unpack_results(prompt)
            starts = np.cumsum([0, *(len(row.tokens) for row in plan.prefill)])
            for sequence, _, i, _ in events:
                if plan.prefill[i].targets is not None:
                    stream = self._streams[sequence]
                    if plan.prefill[i].first:
                        stream.begin_prompt_logprobs()
                    stream.prompt_logprobs(prompt_results, int(starts[i]), len(plan.prefill[i].tokens))
                if plan.prefill[i].pooling is not None:
                    self._streams[sequence].add_states(states[i], first=plan.prefill[i].first)
            self._send(events, results, 0)
        (decode,) = self._read(flight, flight.decode)
        if plan.decode is not None:
            decode = decode[: plan.decode.steps, : len(plan.decode.slots)]
        results = batch.unpack_results(decode.reshape(-1, batch.RESULT_WIDTH))
        drawn = results.tokens.reshape(decode.shape[:-1])
        self._send(self.scheduler.commit_decode(plan, drawn), results, len(plan.prefill))

    def _send(self, events: list[Event], results: batch.Results, first: int) -> None:
        """first: the row of the plan that comes first in `results`."""
        for sequence, token, row, finish in events:
            if token < 0 and finish is None:
                continue
            stream = self._streams.get(sequence)
            if stream is None:  # a stop string ended it at an earlier event of this very step
                continue
            self._totals["generation_tokens_total"] += token >= 0
            if stream.push(token, finish, results, row - first):
                self.scheduler.finish(sequence, Finish.STOP)
                finish = Finish.STOP
            if finish is not None:
                del self._streams[sequence]
                self._rate.ended(self._busy)
            elif stream.matcher is not None:
                self._masks.advance(sequence, stream.matcher, token)


def _spans(rows: Seq[PrefillRow]) -> list[tuple[int, int]]:
    """Of each row, the packed tokens whose hidden states are wanted."""
    spans, start = [], 0
    for row in rows:
        end = start + len(row.tokens)
        match row.pooling:
            case Pooling.MEAN:
                spans.append((start, end))
            case Pooling.LAST if row.last:
                spans.append((end - 1, end))
            case _:
                spans.append((0, 0))
        start = end
    return spans
