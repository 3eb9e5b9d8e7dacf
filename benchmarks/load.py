"""The load generator of every serving benchmark: requests at set times or so many at once, timed per token.

It drives an engine in this process through `Engine.submit`, as the server does: it times the engine alone.
Open load (`play`) submits at its own times whatever the engine does; closed load (`Closed`)
keeps a number of requests in flight and starts another when one ends.
"""

from __future__ import annotations

import dataclasses
import itertools
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from jaxserve.engine.engine import Engine
from jaxserve.engine.outputs import EngineBusy, Output
from jaxserve.scheduler.types import Finish, SamplingParams, Tier, check_request

_numbers = itertools.count()


@dataclasses.dataclass(slots=True)
class Record:
    """What became of one request. Times are `time.perf_counter()` seconds, one per token."""

    submitted: float
    tier: Tier
    times: list[float] = dataclasses.field(default_factory=list)
    tokens: list[int] = dataclasses.field(default_factory=list)
    logprobs: list[float] = dataclasses.field(default_factory=list)
    cached: int = 0
    finish: Finish | None = None
    error: str | None = None
    retry_after: int | None = None  # refused: the queue was full

    @property
    def first(self) -> float:
        """Seconds to the first token."""
        return self.times[0] - self.submitted

    @property
    def gaps(self) -> list[float]:
        """Seconds between tokens."""
        return np.diff(self.times).tolist()


def submit(
    engine: Engine,
    prompt: Sequence[int],
    params: SamplingParams,
    *,
    tier: Tier = Tier.ONLINE,
    on_end: Callable[[Record], None] = lambda record: None,
    **fields: Any,
) -> Record:
    """One request of one sequence; `on_end` is called on the engine's thread."""
    request = check_request(
        f"load-{next(_numbers)}",
        np.asarray(prompt, np.int32),
        params,
        engine.limits,
        time.monotonic(),
        tier=tier,
        **fields,
    )
    record = Record(time.perf_counter(), tier)

    def sink(output: Output) -> None:
        now = time.perf_counter()
        record.times += [now] * len(output.token_ids)
        record.tokens += output.token_ids
        record.logprobs += [entry.logprob for entry in output.logprobs or ()]
        record.cached += output.cached_tokens
        record.error = output.error or record.error
        if output.finish_reason is not None:
            record.finish = output.finish_reason
            on_end(record)

    try:
        engine.submit((request, sink))
    except EngineBusy as busy:
        record.retry_after = busy.retry_after
    return record


Arrival = tuple[float, Callable[[], Record]]  # seconds from the start, and what submits it


def play(arrivals: Iterable[Arrival]) -> list[Record]:
    """Submits each at its time and waits until all have ended or were refused."""
    begin = time.perf_counter()
    records = []
    for at, start in arrivals:
        time.sleep(max(0.0, begin + at - time.perf_counter()))
        records.append(start())
    wait(records)
    return records


def wait(records: Sequence[Record]) -> None:
    for record in records:
        while record.finish is None and record.retry_after is None:
            time.sleep(0.002)


class Closed:
    """Keeps `count` requests in flight until `stop()`, each made by `start(on_end)`."""

    def __init__(self, count: int, start: Callable[[Callable[[Record], None]], Record]) -> None:
        self._count, self._start = count, start
        self._ended = threading.Semaphore(0)
        self._stopping = False
        self.records: list[Record] = []
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        for _ in range(self._count):
            self.records.append(self._start(lambda record: self._ended.release()))
        while True:
            self._ended.acquire()
            if self._stopping:
                return
            self.records.append(self._start(lambda record: self._ended.release()))

    def stop(self) -> list[Record]:
        """Starts no more, waits for those in flight, and returns all."""
        self._stopping = True
        self._ended.release()
        self._thread.join()
        wait(self.records)
        return self.records


def summary(records: Sequence[Record], seconds: float) -> dict[str, Any]:
    """Counts, tokens per second over `seconds`, and percentiles in milliseconds."""
    done = [record for record in records if record.finish in (Finish.STOP, Finish.LENGTH)]
    gaps = [gap for record in done for gap in record.gaps]
    return {
        "requests": len(records),
        "done": len(done),
        "refused": sum(record.retry_after is not None for record in records),
        "failed": sum(record.error is not None for record in records),
        "tokens": sum(len(record.tokens) for record in done),
        "tokens_per_second": round(sum(len(record.tokens) for record in done) / seconds, 1),
        "ttft_ms": percentiles([record.first for record in done]),
        "itl_ms": percentiles(gaps),
    }


def percentiles(seconds: Sequence[float]) -> dict[str, float]:
    if not len(seconds):
        return {}
    values = np.percentile(np.asarray(seconds) * 1e3, (50, 90, 99, 100))
    return dict(zip(("p50", "p90", "p99", "max"), (round(float(v), 2) for v in values), strict=True))
