"""What the scheduler and the cache are worth, each claim beside its alternative in one run.

    python -m benchmarks.serving SCENARIO [MODEL] [--slots 16] [--seconds 60]

MODEL: a local folder; without one the embedded model. A line per row to stderr, one JSON line to stdout.

prefix: 128 requests over a shared prefix of 1,000 tokens, with the prefix cache and without.
mixed: interactive requests at set times, alone and with batch work in all that they leave; batch work alone.
overload: ten times the capacity offered: what is refused, what admitted requests wait, what is left behind.
reproducible: tokens per second at 1, 4, 16 and all slots, with `--reproducible` and without, alternating.
objective: the same traffic under `--objective latency` and `throughput`.
grammars: the intervals between tokens of half the slots, alone and while schemas are compiled in turn (20,000
    values to choose from, deeply nested objects); and beside replies that follow a schema, against as many
    that follow none. MODEL needs a tokenizer.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
import psutil

from benchmarks import load
from benchmarks.load import Record
from benchmarks.peers import machine
from jaxserve.build import build_engine
from jaxserve.config import EngineOptions
from jaxserve.engine.engine import Engine
from jaxserve.scheduler.types import SamplingParams, StructuredOutputs, Tier

ROOT = Path(__file__).resolve().parent.parent
rng = np.random.default_rng(0)


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def prompt(engine: Engine, length: int) -> list[int]:
    return rng.integers(engine.limits.vocab_size, size=length).tolist()


def greedy(tokens: int) -> SamplingParams:
    return SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True)


def run_all(
    engine: Engine, prompts: list[list[int]], tokens: int, most: int = 2**31
) -> tuple[list[Record], float]:
    """At most `most` at a time, to the end: (records, seconds)."""
    begin = time.perf_counter()
    records: list[Record] = []
    for each in prompts:
        while sum(record.finish is None for record in records[-2 * most :]) >= most:
            time.sleep(0.001)
        records.append(load.submit(engine, each, greedy(tokens)))
    load.wait(records)
    return records, time.perf_counter() - begin


def prefix(options: Options) -> dict[str, Any]:
    rows = {}
    for name, cached in (("with", True), ("without", False)):
        engine = options.engine(prefix_cache=cached)
        shared = prompt(engine, 1000)
        prompts = [shared + prompt(engine, 8) for _ in range(128)]
        records, seconds = run_all(engine, prompts, 8)
        asked = sum(map(len, prompts))
        computed = asked - sum(record.cached for record in records)
        rows[name] = load.summary(records, seconds) | {"prompt_tokens": asked, "computed_tokens": computed}
        engine.close()
        say(f"prefix cache {name:8} computed {computed} of {asked} prompt tokens, {rows[name]['ttft_ms']}")
    return rows | {"computed_share": rows["with"]["computed_tokens"] / rows["without"]["computed_tokens"]}


def step_seconds(engine: Engine, slots: int, chunk: int) -> tuple[float, float]:
    """(a decode step with every slot full, a prefill of one chunk), before the engine's thread starts."""
    records = [load.submit(engine, prompt(engine, 16), greedy(64)) for _ in range(slots)]
    while any(not record.tokens for record in records):
        engine.step_apart()
    decode = statistics.median(sum(engine.step_apart()) for _ in range(20))
    while engine.step():
        pass
    length = min(chunk, engine.limits.max_model_len - 1)
    chunks = []
    for _ in range(7):
        load.submit(engine, prompt(engine, length), greedy(1))
        chunks.append(sum(engine.step_apart()))
        while engine.step():
            pass
    return decode, statistics.median(chunks)


def mixed(options: Options) -> dict[str, Any]:
    engine = options.engine(start=False)
    decode, chunk = step_seconds(engine, options.slots, engine.scheduler.prefill_chunk)
    engine.start()

    def online(seconds: float) -> list[load.Arrival]:
        """Every 0.5 s on average, 48 tokens in and 32 out."""
        times = np.cumsum(np.random.default_rng(1).exponential(0.5, int(seconds / 0.5)))
        prompts = [prompt(engine, 48) for _ in times]
        return [
            (float(at), partial(load.submit, engine, text, greedy(32)))
            for at, text in zip(times, prompts, strict=True)
        ]

    def batch() -> load.Closed:
        def start(on_end: Callable[[Record], None]) -> Record:
            return load.submit(engine, prompt(engine, 128), greedy(128), tier=Tier.BATCH, on_end=on_end)

        return load.Closed(2 * options.slots, start)

    def timed(work: Callable[[], list[Record]]) -> tuple[list[Record], float]:
        begin = time.perf_counter()
        return work(), time.perf_counter() - begin

    alone, alone_s = timed(lambda: load.play(online(options.seconds)))

    begin = time.perf_counter()
    background = batch()
    time.sleep(options.seconds)
    batch_alone = background.stop()
    batch_s = time.perf_counter() - begin

    begin = time.perf_counter()
    background = batch()
    time.sleep(1.0)
    together = load.play(online(options.seconds))
    behind = background.stop()
    mixed_s = time.perf_counter() - begin

    rows = {
        "step_ms": round(1e3 * decode, 2),
        "chunk_ms": round(1e3 * chunk, 2),
        "online_alone": load.summary(alone, alone_s),
        "batch_alone": load.summary(batch_alone, batch_s),
        "online_mixed": load.summary(together, mixed_s),
        "batch_mixed": load.summary(behind, mixed_s),
        "preemptions": engine.stats()["preemptions"],
        "batch_tokens_lost": sum(128 - len(record.tokens) for record in behind),
    }
    rows["itl_p99_over_step_and_chunk"] = rows["online_mixed"]["itl_ms"]["p99"] / (1e3 * (decode + chunk))
    rows["ttft_p99_over_alone_and_chunk"] = rows["online_mixed"]["ttft_ms"]["p99"] / (
        rows["online_alone"]["ttft_ms"]["p99"] + 1e3 * chunk
    )
    total = rows["online_mixed"]["tokens_per_second"] + rows["batch_mixed"]["tokens_per_second"]
    rows["throughput_over_batch_alone"] = total / rows["batch_alone"]["tokens_per_second"]
    for name, row in rows.items():
        say(f"{name}: {row}")
    engine.close()
    return rows


def overload(options: Options) -> dict[str, Any]:
    queued = 2 * options.slots
    engine = options.engine(max_queued=queued)

    def rated() -> float:
        """Requests per second; the median of five waves."""
        waves = [[prompt(engine, 64) for _ in range(4 * options.slots)] for _ in range(5)]
        return statistics.median(len(wave) / run_all(engine, wave, 32, most=queued)[1] for wave in waves)

    capacity = rated()
    process = psutil.Process()
    # queue and service of one that is let in last, at the rated capacity, and half as much again
    bound = 1.5 * (queued + options.slots) / capacity
    rate = 10 * capacity
    count = int(rate * options.seconds)
    prompts = [prompt(engine, 64) for _ in range(4096)]  # by the time that one comes again it is evicted
    # what is kept of a request is a row made beforehand: the growth below is the engine's alone
    first, last = np.full(count, np.nan), np.full(count, np.nan)
    refused, waits, unexpected = 0, set(), 0
    memory: list[int] = []
    files = process.num_fds()
    begin = time.perf_counter()

    def ended(i: int, record: Record) -> None:
        nonlocal unexpected
        first[i], last[i] = record.first, record.times[-1] - record.submitted
        unexpected += record.error is not None or len(record.tokens) != 32

    for i in range(count):
        time.sleep(max(0.0, begin + i / rate - time.perf_counter()))
        record = load.submit(engine, prompts[i % len(prompts)], greedy(32), on_end=partial(ended, i))
        if record.retry_after is not None:
            refused += 1
            waits.add(record.retry_after)
        if i % (count // 40) == 0:
            memory.append(process.memory_info().rss)
    while int(np.isfinite(last).sum()) < count - refused:
        time.sleep(0.01)
    taken = time.perf_counter() - begin
    stats = engine.stats()
    done = count - refused
    growth = statistics.median(memory[-10:]) - statistics.median(memory[10:20])
    row = {
        "offered": count,
        "done": done,
        "refused": refused,
        "failed": unexpected,
        "capacity_per_second": round(capacity, 1),
        "offered_per_second": round(rate, 1),
        "done_per_second": round(done / taken, 1),
        "retry_after": sorted(waits),
        "ttft_ms": load.percentiles(first[np.isfinite(first)]),
        "whole_ms": load.percentiles(last[np.isfinite(last)]),
        "bound_ms": round(1e3 * bound, 1),
        "prefix_hit_tokens": engine.stats()["prefix_hit_tokens"],
        "memory_growth_mb": round(growth / 1e6, 1),
        "files_more": process.num_fds() - files,
        "left": {name: stats[name] for name in ("running", "waiting", "pages_used")},
    }
    say(f"overload: {row}")
    row["capacity_after"] = round(rated(), 1)
    say(f"capacity before {row['capacity_per_second']}, after {row['capacity_after']} requests a second")
    engine.close()
    return row


def reproducible(options: Options) -> dict[str, Any]:
    engines = {name: options.engine(reproducible=flag) for name, flag in (("with", True), ("without", False))}
    counts = sorted({1, 4, 16, 32, options.slots})
    if options.slots < counts[-1]:
        raise SystemExit(f"--slots must be at least {counts[-1]}: the table goes so far")
    rates: dict[str, dict[int, list[float]]] = {name: {n: [] for n in counts} for name in engines}
    for _ in range(5):
        for count in counts:
            for name, engine in engines.items():
                # long replies: that few of the steps are those while the first ones come in
                records, seconds = run_all(engine, [prompt(engine, 64) for _ in range(count)], 256)
                rates[name][count].append(sum(len(r.tokens) for r in records) / seconds)
    rows = {}
    for count in counts:
        row = {name: round(statistics.median(rates[name][count]), 1) for name in engines}
        rows[str(count)] = row | {"share": round(row["with"] / row["without"], 3)}
        say(f"{count:3} active slots: {rows[str(count)]}")
    for engine in engines.values():
        engine.close()
    return rows


def grammars(options: Options) -> dict[str, Any]:
    engine = options.engine()
    half, rounds = options.slots // 2, 5
    numbers = itertools.count()

    def enum() -> str:
        return json.dumps({"enum": [f"value {next(numbers)}" for _ in range(20_000)]})

    def nested() -> str:
        schema: dict[str, Any] = {"type": "string", "maxLength": next(numbers) % 1000 + 1}
        for depth in range(40):
            schema = {"type": "object", "properties": {f"a{depth}": schema}, "required": [f"a{depth}"]}
        return json.dumps(schema)

    def readers() -> load.Closed:
        return load.Closed(
            half, lambda on_end: load.submit(engine, prompt(engine, 64), greedy(128), on_end=on_end)
        )

    def beside(wanted: StructuredOutputs | None) -> load.Closed:
        """As many more, each of 64 tokens."""
        params = SamplingParams(max_tokens=64, structured_outputs=wanted, ignore_eos=wanted is None)
        grammar = None if wanted is None else engine.compile_grammar(wanted)

        def start(on_end: Callable[[Record], None]) -> Record:
            return load.submit(engine, prompt(engine, 64), params, on_end=on_end, grammar=grammar)

        return load.Closed(half, start)

    compiled: list[float] = []

    def compile_until(end: float) -> None:
        while time.perf_counter() < end:
            for text in (enum(), nested()):
                begin = time.perf_counter()
                engine.compile_grammar(StructuredOutputs(json=text))
                compiled.append(time.perf_counter() - begin)

    free = StructuredOutputs(json={"type": "array", "items": {"type": "string"}, "minItems": 500})
    modes: dict[str, Callable[[float], Any]] = {
        "alone": lambda seconds: time.sleep(seconds),
        "compiling": lambda seconds: compile_until(time.perf_counter() + seconds),
        "beside_plain": lambda seconds: _during(beside(None), seconds),
        "beside_structured": lambda seconds: _during(beside(free), seconds),
    }
    engine.compile_grammar(free)
    gaps: dict[str, list[float]] = {mode: [] for mode in modes}
    for _ in range(rounds):
        for mode, work in modes.items():
            reading = readers()
            time.sleep(1.0)
            begin = time.perf_counter()
            work(options.seconds / rounds)
            end = time.perf_counter()
            for record in reading.stop():
                times = [at for at in record.times if begin <= at <= end]
                gaps[mode] += np.diff(times).tolist()
    rows: dict[str, Any] = {mode: load.percentiles(each) for mode, each in gaps.items()}
    rows["grammars_compiled"] = len(compiled)
    rows["compile_seconds"] = load.percentiles([seconds / 1e3 for seconds in compiled])
    rows["itl_p99_compiling_over_alone"] = rows["compiling"]["p99"] / rows["alone"]["p99"]
    rows["itl_p99_structured_over_plain"] = rows["beside_structured"]["p99"] / rows["beside_plain"]["p99"]
    for name, row in rows.items():
        say(f"{name}: {row}")
    engine.close()
    return rows


def _during(work: load.Closed, seconds: float) -> None:
    time.sleep(seconds)
    work.stop()


def objective(options: Options) -> dict[str, Any]:
    rows = {}
    for name in ("latency", "throughput"):
        engine = options.engine(objective=name)
        # long prompts among short ones: what a chunk makes the others wait
        arrivals: list[load.Arrival] = []
        for i in range(int(options.seconds / 0.1)):
            text = prompt(engine, 900 if i % 5 == 0 else 32)
            arrivals.append((0.1 * i, partial(load.submit, engine, text, greedy(32))))
        begin = time.perf_counter()
        records = load.play(arrivals)
        rows[name] = load.summary(records, time.perf_counter() - begin)
        engine.close()
        say(f"objective {name}: {rows[name]}")
    return rows


SCENARIOS = {each.__name__: each for each in (prefix, mixed, overload, reproducible, objective, grammars)}


@dataclasses.dataclass(frozen=True)
class Options:
    model: str | None
    slots: int
    seconds: float

    def engine(self, *, start: bool = True, **options: Any) -> Engine:
        chosen = EngineOptions(max_slots=self.slots, tuned=False, **options)
        engine = build_engine(self.model, chosen, progress=say)
        if start:
            engine.start()
        return engine


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("scenario", choices=SCENARIOS)
    parser.add_argument("model", nargs="?", default=None)
    parser.add_argument("--slots", type=int, default=16)
    parser.add_argument("--seconds", type=float, default=60.0)
    given = parser.parse_args()
    before = machine.idle_check()
    options = Options(given.model, given.slots, given.seconds)
    result = SCENARIOS[given.scenario](options)
    report = {
        "benchmark": f"serving {given.scenario}",
        **dataclasses.asdict(options),
        "result": result,
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "commit": machine.commit(ROOT),
        "machine": machine.describe() | {"before": before},
    }
    print(json.dumps(report))


if __name__ == "__main__":
    main()
