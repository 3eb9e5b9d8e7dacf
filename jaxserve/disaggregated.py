"""Prefill/decode disaggregation: engines that only compute prompts, beside those that draw.

A prompt goes to an engine of its own first. As its chunks are computed there, their whole pages are copied
from device to device into the pool of the engine that will draw, whose prefix cache then knows them; at the
prompt's end the request follows them. It finds its beginning as if an earlier request had left it, computes
what is left of the last page, and draws. So no chunk of a long prompt ever stands between two tokens of
those who read already; the price is devices that draw nothing, and the way of the pages.

A page that finds no room, or was taken for another before the request came, is computed where it draws:
moving changes when an answer comes, not what it is. What is short goes there at once.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import threading
from collections.abc import Sequence
from typing import Any

from jaxserve.engine.buckets import PAGES_MOVED
from jaxserve.engine.engine import Engine, PromptPages
from jaxserve.engine.outputs import Output, Sink
from jaxserve.protocols import TokenizerLike
from jaxserve.scheduler.placement import Placement
from jaxserve.scheduler.prefix_cache import prompt_digests
from jaxserve.scheduler.types import (
    Finish,
    Limits,
    PrefillRow,
    Request,
    SamplingParams,
    SlotView,
    StructuredOutputs,
    Tier,
)
from jaxserve.scheduler.types import Sequence as Running

MOVES_AHEAD = 4  # blocks of pages that may be on their way to an engine; memory is set aside for them
LOOK_SECONDS = 0.1  # how often who waits for their arrival looks whether that engine still lives


@dataclasses.dataclass(slots=True)
class _Job:
    """A prompt that is computed for another engine. moved: pages that are there or on their way. cached:
    tokens that were not computed for it."""

    replica: Disaggregated
    digests: list[bytes]
    sink: Sink
    moved: int
    cached: int = 0


class PromptReplicas:
    """Engines that compute prompts, for all that draw. Takes them over: `close` closes them."""

    def __init__(self, engines: Sequence[Engine]) -> None:
        first = engines[0]
        self.engines = list(engines)
        self._page_size = int(first.facts["page_size"])
        self._lock = threading.Lock()
        self._placement = Placement(
            len(engines), pages=int(first.facts["pages_total"]), page_size=self._page_size
        )
        self._jobs: dict[str, _Job] = {}
        for engine in engines:
            engine.on_chunk = functools.partial(self._computed, engine)

    def compute(self, request: Request, digests: list[bytes], known: int, replica: Disaggregated) -> None:
        """Computes the pages of a request's prompt, digests[known:] of which `replica` lacks, and sends them
        there; `replica.arrived` hears of the end. Raises RuntimeError where the engine does not run."""
        length = len(digests) * self._page_size
        prompt = dataclasses.replace(
            request,
            prompt_token_ids=request.prompt_token_ids[:length],
            params=SamplingParams(),
            max_total_tokens=length,  # nothing to draw
            grammar=None,
        )
        with self._lock:
            number = self._placement.place(prompt)
            self._jobs[request.request_id] = job = _Job(replica, digests, replica.arrived, known)
        try:
            self.engines[number].submit((prompt, functools.partial(self._ended, job)))
        except RuntimeError:
            self._forget(request.request_id)
            raise

    def abort(self, request_id: str) -> None:
        for engine in self.engines:  # those that do not know it ignore it
            engine.abort(request_id)

    def start(self) -> None:
        for engine in self.engines:
            engine.start()

    def close(self) -> None:
        for engine in self.engines:
            engine.close()

    # -- on the engines' threads -----------------------------------------------------------------------

    def _computed(self, engine: Engine, sequence: Running, row: PrefillRow) -> None:
        """A chunk was computed: its whole pages go on their way, and those before it that this engine had."""
        job = self._jobs.get(sequence.request.request_id)
        if job is None:
            return
        job.cached = sequence.cached
        end = min((row.start + len(row.tokens)) // self._page_size, len(job.digests))
        job.moved = max(job.moved, min(end, job.replica.known(job.digests)))
        while job.moved < end:
            upto = min(end, job.moved + PAGES_MOVED)
            if not job.replica.wait_for_room():
                return
            block = engine.copy_pages(row.table[job.moved : upto].tolist())
            job.replica.take(job.digests[:upto], job.moved, block)
            job.moved = upto

    def _ended(self, job: _Job, output: Output) -> None:
        if output.finish_reason is not None:
            self._forget(output.request_id)
            output.cached_tokens = job.cached
            job.sink(output)

    def _forget(self, request_id: str) -> None:
        with self._lock:
            del self._jobs[request_id]
            self._placement.ended(request_id)


class Disaggregated:
    """An `EngineLike`: an engine that draws, and others that compute its prompts. `Replicas` stands before it
    and gives it one request at a time.

    prompts: shared with other replicas; closed with the first of them.
    """

    def __init__(self, engine: Engine, prompts: PromptReplicas) -> None:
        self.engine = engine
        self.facts = {**engine.facts, "prefill_replicas": len(prompts.engines)}
        self._prompts = prompts
        self._page_size = int(engine.facts["page_size"])
        self._room = threading.BoundedSemaphore(MOVES_AHEAD)
        self._lock = threading.Lock()
        self._computing: dict[str, tuple[Request, Sink]] = {}  # those whose prompt is computed elsewhere
        self._cancelled: set[str] = set()  # of these
        self._moved_pages = 0
        self._moved_tokens = 0  # that were found here, and had been computed elsewhere for the request
        self._arriving: dict[str, int] = {}  # of requests that came and drew nothing yet: so many at most
        self._hits = 0
        for other in prompts.engines:  # what copying from there to here takes is compiled now
            engine.bring(other.copy_pages([])).block_until_ready()

    @property
    def limits(self) -> Limits:
        return self.engine.limits

    @property
    def tokenizer(self) -> TokenizerLike | None:
        return self.engine.tokenizer

    @property
    def _all(self) -> list[Engine]:
        return [self.engine, *self._prompts.engines]

    @property
    def healthy(self) -> bool:
        return all(engine.healthy for engine in self._all)

    @property
    def failure(self) -> BaseException | None:
        return next((engine.failure for engine in self._all if engine.failure is not None), None)

    @property
    def stuck(self) -> str | None:
        return next((stuck for engine in self._all if (stuck := engine.stuck) is not None), None)

    def compile_grammar(self, wanted: StructuredOutputs) -> Any:
        return self.engine.compile_grammar(wanted)

    def slots(self) -> list[SlotView]:
        """Of the engine that draws."""
        return self.engine.slots()

    def submit(self, *requests: tuple[Request, Sink]) -> None:
        """As the engine's, one after the other."""
        for request, sink in requests:
            digests = prompt_digests(request, self._page_size)
            known = self.known(digests)
            if not self._is_worth_moving(request, known):
                self.engine.submit((request, sink))
                continue
            with self._lock:
                self._computing[request.request_id] = request, sink
            try:
                self._prompts.compute(request, digests, known, self)
            except RuntimeError:
                with self._lock:
                    del self._computing[request.request_id]
                raise

    def _is_worth_moving(self, request: Request, known: int) -> bool:
        """Not where one small step computes what is lacking, nor where the prompt's logprobs are wanted,
        or a vector made of it, which come of computing it."""
        lacking = len(request.prompt_token_ids) - known * self._page_size
        return (
            request.params.prompt_logprobs is None
            and request.pooling is None
            and lacking > self.engine.least_prefill + self._page_size
        )

    def abort(self, request_id: str) -> None:
        with self._lock:
            if request_id in self._computing:
                self._cancelled.add(request_id)
                self._prompts.abort(request_id)
            else:
                self.engine.abort(request_id)

    def stats(self) -> dict[str, Any]:
        """The engine's, with what waits or runs where prompts are computed. What was computed there for a
        request is no hit of the prefix cache when that request comes."""
        stats = self.engine.stats() | self.facts
        with self._lock:
            here = [request for request, _ in self._computing.values()]
            # between its look-up and its first token a request's pages from elsewhere still count as hits
            hits = stats["prefix_hit_tokens"] - self._moved_tokens - sum(self._arriving.values())
            stats["prefix_hit_tokens"] = self._hits = max(self._hits, hits)
        for request in here:
            stats["waiting"] += request.params.sequences
            stats[f"waiting_{request.tier}"] += request.params.sequences
            stats["waiting_tokens"] += len(request.prompt_token_ids)
            if request.tier is Tier.ONLINE:
                stats["waiting_tokens_online"] += len(request.prompt_token_ids)
        stats["moved_pages_total"] = self._moved_pages
        return stats

    def start(self) -> None:
        self._prompts.start()
        self.engine.start()

    def close(self) -> None:
        self._prompts.close()
        self.engine.close()

    # -- on the threads of those who compute prompts ---------------------------------------------------

    def known(self, digests: Sequence[bytes]) -> int:
        """Pages of a beginning that the engine has. Any thread may ask."""
        return self.engine.scheduler.known(digests)

    def wait_for_room(self) -> bool:
        """Waits until one more block may be on its way; False once the engine does not run."""
        while not self._room.acquire(timeout=LOOK_SECONDS):
            if not self.engine.healthy:
                return False
        return True

    def take(self, digests: list[bytes], first: int, block: Any) -> None:
        """Sends the engine a block with the pages of digests[first:]."""
        with self._lock:
            self._moved_pages += len(digests) - first
        self.engine.deposit(PromptPages(digests, first, self.engine.bring(block), self._room.release))

    def arrived(self, output: Output) -> None:
        """A prompt was computed and its pages are on their way; or it was given up."""
        name = output.request_id
        with self._lock:
            request, sink = self._computing.pop(name)
            cancelled = name in self._cancelled
            self._cancelled.discard(name)
            if not cancelled and output.finish_reason is Finish.LENGTH:
                cached = output.cached_tokens
                whole = (len(request.prompt_token_ids) - 1) // self._page_size * self._page_size
                self._arriving[name] = whole - cached
                try:
                    self.engine.submit((request, functools.partial(self._heard, sink, cached)))
                    return
                except RuntimeError as refusal:
                    del self._arriving[name]
                    output.error = str(refusal)
        reason = Finish.TIMEOUT if output.finish_reason is Finish.TIMEOUT else Finish.ABORT
        for index in range(request.params.sequences):
            with contextlib.suppress(Exception):  # a sink that raises must not silence the next one
                sink(Output(name, index, finish_reason=reason, error=output.error))

    # -- on the engine's thread ------------------------------------------------------------------------

    def _heard(self, sink: Sink, cached: int, output: Output) -> None:
        """What was computed for this very request elsewhere did not come from a cache; what its other
        sequences share did, as anywhere."""
        with self._lock:
            self._arriving.pop(output.request_id, None)
            if output.index == 0 and output.cached_tokens > cached:
                self._moved_tokens += output.cached_tokens - cached
                output.cached_tokens = cached
        sink(output)
