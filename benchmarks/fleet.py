"""A simulated fleet: replicas behind a router, under conversations that share their beginnings.

    python -m benchmarks.fleet [--replicas 4] [--rates 1,2,3] [--seconds 120] [--seed 0]

Schedulers, prefix caches, the queue before them and the placement are the real ones; devices, clocks and
people are formulas. What is assumed:

- A replica is one device with Llama 3.1 8B in bf16. A step is a prefill and a decode program, one after the
  other where there are both; each takes the longer of bytes / bandwidth (weights once, keys and values of
  every position that is read) and operations / rate (2 for each parameter and token), and the step `HOST`
  beside them. Bandwidth and rate are an H100's data sheet times `SHARE`; not measured.
- A conversation belongs to one of `TENANTS`, whose system prompt all of its conversations begin with. Each
  turn sends everything said before and a new message; replies have a length drawn beforehand. People think
  between turns. Conversations begin at random times (Poisson), at the same times for every router.
- Network, tokenizing and the router's own time are nought. No replica fails.

Routers: `random`; `round robin`; `least work` and `prefix aware` are jaxserve's queue and placement, without
and with the prompt's beginning. One JSON line; a table on stderr.
"""

from __future__ import annotations

import argparse
import heapq
import itertools
import json
import random
import sys
from collections.abc import Callable
from typing import Any

import numpy as np

from jaxserve.engine.outputs import Output, Sink
from jaxserve.replicas import Replicas
from jaxserve.scheduler.scheduler import Scheduler
from jaxserve.scheduler.types import (
    Finish,
    Limits,
    Request,
    SamplingParams,
    Sequence,
    StepPlan,
    check_request,
)

PARAMETERS, KV_BYTES = 8.03e9, 131_072  # of Llama 3.1 8B; bytes of one position, all layers
BANDWIDTH, RATE, SHARE, HOST = 3.35e12, 989e12, 0.7, 3e-4  # bytes and operations per second; seconds
SLOTS, PAGES, PAGE, CHUNK, CONTEXT = 64, 6_000, 64, 2048, 16_384  # 384k positions: 50 GB of pages
TENANTS, SYSTEM, MESSAGE, REPLY, TURNS, THINK = 32, 3_000, 120, 250, 5, 15.0  # tokens; seconds
VOCAB = 100_000
ROUTERS = ("random", "round robin", "least work", "prefix aware")

LIMITS = Limits(vocab_size=VOCAB, max_model_len=CONTEXT, pool_tokens=PAGES * PAGE, eos_token_ids=())


class World:
    """Time, and what happens next."""

    def __init__(self) -> None:
        self.now = 0.0
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._number = itertools.count()

    def after(self, seconds: float, what: Callable[[], None]) -> None:
        heapq.heappush(self._events, (self.now + seconds, next(self._number), what))

    def run(self) -> None:
        while self._events:
            self.now, _, what = heapq.heappop(self._events)
            what()


def step_seconds(plan: StepPlan) -> float:
    """Of the prefill program and of the decode program, one after the other, as far as there are any."""

    def program(tokens: int, read: int) -> float:
        moved = (2 * PARAMETERS + KV_BYTES * read) / (BANDWIDTH * SHARE)
        return max(moved, 2 * PARAMETERS * tokens / (RATE * SHARE))

    seconds = HOST
    if plan.prefill:
        tokens = sum(len(row.tokens) for row in plan.prefill)
        seconds += program(tokens, sum(row.start + len(row.tokens) for row in plan.prefill))
    if plan.decode is not None:
        rows = len(plan.decode.slots)
        seconds += plan.decode.steps * program(rows, int(plan.decode.positions.sum()) + rows)
    return seconds


class Replica:
    """An engine whose device is `step_seconds`."""

    limits, tokenizer, failure, stuck, healthy = LIMITS, None, None, None, True

    def __init__(self, world: World) -> None:
        self.world = world
        self.facts: dict[str, Any] = {"slots": SLOTS, "pages_total": PAGES, "page_size": PAGE}
        self.scheduler = Scheduler(
            max_slots=SLOTS, num_pages=PAGES, page_size=PAGE, pages_per_slot=CONTEXT // PAGE,
            prefill_chunk=CHUNK, max_prefill_rows=16,
        )  # fmt: skip
        self.on_chunk: Any = None
        self._sinks: dict[Sequence, Sink] = {}
        self._running = False

    def submit(self, *requests: tuple[Request, Sink]) -> None:
        for request, sink in requests:
            for sequence in self.scheduler.add(request, [0]):
                self._sinks[sequence] = sink
        if not self._running:
            self._running = True
            self._step()

    def _step(self) -> None:
        if not self.scheduler.has_work:
            self._running = False
            return
        plan = self.scheduler.plan(self.world.now)
        self.world.after(step_seconds(plan), lambda: self._done(plan))

    def _done(self, plan: StepPlan) -> None:
        rows, steps = (0, 1) if plan.decode is None else (len(plan.decode.slots), plan.decode.steps)
        prefill, decode = np.full(len(plan.prefill), 7, np.int32), np.full((steps, rows), 7, np.int32)
        events = self.scheduler.commit(plan, prefill, decode)
        if self.on_chunk is not None:
            for sequence, _, i, _ in events:
                self.on_chunk(sequence, plan.prefill[i])
        for sequence, token, _, finish in events:
            if token >= 0 or finish is not None:
                tokens = [token] if token >= 0 else []
                self._sinks[sequence](Output(sequence.request.request_id, 0, tokens, finish_reason=finish))
            if finish is not None:
                del self._sinks[sequence]
        self._step()

    def abort(self, request_id: str) -> None:
        raise NotImplementedError("nobody leaves in this simulation")

    def stats(self) -> dict[str, Any]:
        own = {"rejected_total": 0, "requests_total": 0, "waiting": self.scheduler.num_waiting}
        return {**self.facts, **self.scheduler.stats(), **own}

    def start(self) -> None:
        pass

    def close(self) -> None:
        pass


def submitter(router: str, replicas: list[Replica], world: World, seed: int) -> Callable[..., None]:
    if router in ("least work", "prefix aware"):
        aware = router == "prefix aware"
        return Replicas(
            replicas, prefix_aware=aware, max_queued=10**9, max_queued_tokens=10**12, clock=lambda: world.now
        ).submit
    turns = itertools.count()
    draw = random.Random(seed)

    def submit(request: tuple[Request, Sink]) -> None:
        turn = next(turns) if router == "round robin" else draw.randrange(len(replicas))
        replicas[turn % len(replicas)].submit(request)

    return submit


def simulate(router: str, count: int, rate: float, seconds: float, seed: int) -> dict[str, Any]:
    """rate: conversations per second and replica."""
    world = World()
    replicas = [Replica(world) for _ in range(count)]
    submit = submitter(router, replicas, world, seed)
    rng = np.random.default_rng(seed)
    systems = [rng.integers(VOCAB, size=SYSTEM).tolist() for _ in range(TENANTS)]
    waits: list[float] = []  # seconds to the first token
    gaps: list[float] = []
    replies = [0]

    def turn(name: str, said: list[int], lengths: list[tuple[int, int, float]]) -> None:
        (message, reply, think), rest = lengths[0], lengths[1:]
        said = said + rng_of(name, len(rest)).integers(VOCAB, size=message).tolist()
        params = SamplingParams(max_tokens=reply, ignore_eos=True)
        request = check_request(f"{name}/{len(rest)}", said, params, LIMITS, world.now)
        sent = last = world.now
        drawn = 0

        def sink(output: Output) -> None:
            nonlocal last, drawn
            (gaps if drawn else waits).append(world.now - (last if drawn else sent))
            last, drawn = world.now, drawn + 1
            if output.finish_reason is Finish.LENGTH:
                replies[0] += drawn
                if rest and world.now < seconds:
                    world.after(think, lambda: turn(name, said + [7] * drawn, rest))

        submit((request, sink))

    def rng_of(name: str, number: int) -> np.random.Generator:
        return np.random.default_rng([seed, int(name), number])

    begin = 0.0
    for i in itertools.count():
        begin += rng.exponential(1 / (rate * count))
        if begin > seconds:
            break
        lengths = [
            (
                1 + int(rng.exponential(MESSAGE)),
                1 + int(min(rng.exponential(REPLY), 1000)),
                rng.exponential(THINK),
            )
            for _ in range(TURNS)
        ]
        system = systems[int(TENANTS * rng.random() ** 2)]  # a few tenants are most of the traffic
        world.after(begin, lambda i=i, s=system, n=lengths: turn(str(i), s, n))
    world.run()
    totals = [replica.scheduler.stats() for replica in replicas]
    asked, hit = (sum(t[f"prefix_{what}_tokens"] for t in totals) for what in ("queries", "hit"))
    return {
        "router": router,
        "replicas": count,
        "conversations_per_second_and_replica": rate,
        "requests": len(waits),
        "prompt_tokens_from_cache": round(hit / asked, 4),
        "first_token_ms": {p: round(1e3 * float(np.percentile(waits, p)), 1) for p in (50, 99)},
        "gap_ms": {p: round(1e3 * float(np.percentile(gaps, p)), 2) for p in (50, 99)},
        "tokens_per_second": round(replies[0] / world.now, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--replicas", type=int, default=4)
    parser.add_argument("--rates", default="1,2,3", help="conversations begun per second and replica")
    parser.add_argument("--seconds", type=float, default=120.0, help="of arrivals; what is there then ends")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    rows = []
    for rate in map(float, args.rates.split(",")):
        for router in ROUTERS:
            row = simulate(router, args.replicas, rate, args.seconds, args.seed)
            rows.append(row)
            print(
                f"{rate:5.1f} /s {router:13} {row['requests']:6} requests"
                f"  cached {row['prompt_tokens_from_cache']:6.1%}"
                f"  first token p50 {row['first_token_ms'][50]:8.1f} p99 {row['first_token_ms'][99]:9.1f} ms"
                f"  gap p50 {row['gap_ms'][50]:6.2f} p99 {row['gap_ms'][99]:7.2f} ms",
                file=sys.stderr,
                flush=True,
            )
    print(
        json.dumps(
            {"benchmark": "fleet (simulated)", "seconds": args.seconds, "seed": args.seed, "rows": rows}
        )
    )


if __name__ == "__main__":
    main()
