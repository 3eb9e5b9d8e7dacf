"""When do devices that only compute prompts pay?

    python -m benchmarks.disaggregation simulate [--devices 4] [--gap 0.02] [--seconds 30] [--seed 0]
    python -m benchmarks.disaggregation measure [--seconds 30]

`simulate`: the highest rate of requests (from one a second and device, in steps of `STEP`) at which 99 of 100
first tokens come within `FIRST` seconds and 99 of 100 gaps between tokens stay within `--gap`, on the same
devices divided in every way: all of them draw (with the best chunk size for it out of `CHUNKS`), or some only
compute prompts.
Schedulers, caches, queue, placement and the moving of pages are jaxserve's own code; devices and links are
the formulas of `benchmarks.fleet`, NVLink its data sheet times `SHARE`. Prompts have nothing in common.

`measure`: the real engine on two of JAX's fake CPU devices, which share this machine's cores: a random model
of SmolLM-135M's shape, `READERS` streams that never end and long prompts in between; both halves of the
division one after the other, in turns. No device is idle that another could not use, so this shows gaps, not
what a second device would bring.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import os
import sys
import tempfile
import threading
import time
from collections import deque
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.fleet import (
    CONTEXT,
    KV_BYTES,
    LIMITS,
    PAGE,
    SHARE,
    VOCAB,
    Replica,
    World,
    step_seconds,
)
from jaxserve.disaggregated import Disaggregated, PromptReplicas
from jaxserve.engine.engine import PromptPages
from jaxserve.engine.outputs import Output, Sink
from jaxserve.replicas import Replicas
from jaxserve.scheduler.types import Finish, Request, SamplingParams, check_request

FIRST, GAP = 1.0, 0.020  # seconds
STEP = 1.15  # from one rate to the next
NVLINK = 450e9  # bytes per second, each way
CHUNKS = (128, 256, 512, 1024, 2048)
# tokens of the prompt and of the reply, in the mean; exponential, the prompt at most the context
WORKLOADS = {
    "chat": (500, 250),
    "long prompts": (4_000, 250),
    "documents": (8_000, 100),
    "long replies": (500, 1_000),
}
LEAST_PREFILL = 128
READERS, LONG = 6, 1_500


# -- simulated ---------------------------------------------------------------------------------------------


class Device(Replica):
    """A simulated engine with what `Disaggregated` needs of one."""

    least_prefill = LEAST_PREFILL

    def __init__(self, world: World, chunk: int) -> None:
        super().__init__(world)
        self.scheduler.prefill_chunk = chunk
        self._inbox: deque[tuple[Request, Sink] | PromptPages] = deque()
        self._link = 0.0  # when the last page on its way here arrives

    def submit(self, *requests: tuple[Request, Sink]) -> None:
        self._inbox.extend(requests)
        self._wake()

    def copy_pages(self, pages: list[int]) -> int:
        return len(pages)

    def bring(self, block: int) -> Any:
        self._link = max(self._link, self.world.now) + block * PAGE * KV_BYTES / (NVLINK * SHARE)
        return _Arrived()

    def deposit(self, pages: PromptPages) -> None:
        self._inbox.append(pages)
        pages.placed()
        self._wake()

    def _wake(self) -> None:
        if not self._running:
            self._running = True
            self.world.after(0.0, self._step)

    def _step(self) -> None:
        begin = self.world.now
        while self._inbox:
            item = self._inbox.popleft()
            if isinstance(item, PromptPages):
                self.scheduler.adopt(item.digests, item.first)
                begin = max(begin, self._link)  # the step that reads them waits for them
                continue
            for sequence in self.scheduler.add(item[0], [0]):
                self._sinks[sequence] = item[1]
        if not self.scheduler.has_work:
            self._running = False
            return
        plan = self.scheduler.plan(self.world.now)
        self.world.after(begin - self.world.now + step_seconds(plan), functools.partial(self._done, plan))


class _Arrived:
    """A block of pages that `Disaggregated` may wait for."""

    def block_until_ready(self) -> None:
        pass


def simulate(
    workload: str, drawing: int, prompting: int, chunk: int, rate: float, seconds: float, seed: int
) -> dict[str, float]:
    """rate: requests per second, for all devices together."""
    world = World()
    devices = [Device(world, chunk) for _ in range(drawing)]
    engines: list[Any] = list(devices)
    if prompting:
        prompts = PromptReplicas([Device(world, max(CHUNKS)) for _ in range(prompting)])  # type: ignore[misc]
        engines = [Disaggregated(device, prompts) for device in devices]  # type: ignore[arg-type]
    replicas = Replicas(engines, max_queued=10**9, max_queued_tokens=10**12, clock=lambda: world.now)
    rng = np.random.default_rng(seed)
    waits: list[float] = []
    gaps: list[float] = []

    def ask(number: int, prompt: int, reply: int) -> None:
        ids = np.random.default_rng([seed, number]).integers(VOCAB, size=prompt)
        params = SamplingParams(max_tokens=reply, ignore_eos=True)
        request = check_request(str(number), ids, params, LIMITS, world.now)
        last = sent = world.now
        drawn = 0

        def sink(output: Output) -> None:
            nonlocal last, drawn
            if output.token_ids:
                (gaps if drawn else waits).append(world.now - (last if drawn else sent))
                last, drawn = world.now, drawn + 1

        replicas.submit((request, sink))

    mean_prompt, mean_reply = WORKLOADS[workload]
    begin, number = 0.0, 0
    while (begin := begin + rng.exponential(1 / rate)) < seconds:
        reply = 2 + int(min(rng.exponential(mean_reply), 4 * mean_reply))
        prompt = 1 + int(min(rng.exponential(mean_prompt), CONTEXT - reply - 2))
        world.after(begin, functools.partial(ask, number, prompt, reply))
        number += 1
    world.run()
    return {
        "first_p50": float(np.percentile(waits, 50)),
        "first_p99": float(np.percentile(waits, 99)),
        "gap_p50": float(np.percentile(gaps, 50)),
        "gap_p99": float(np.percentile(gaps, 99)),
    }


def highest(workload: str, drawing: int, prompting: int, chunk: int, args: Any) -> dict[str, Any]:
    """The highest rate within both bounds, and the figures there."""
    good, bad, best = -1, None, None  # powers of STEP
    power = 0
    while bad is None or bad - good > 1:
        rate = args.devices * STEP**power
        found = simulate(workload, drawing, prompting, chunk, rate, args.seconds, args.seed)
        if found["first_p99"] > FIRST or found["gap_p99"] > args.gap:
            bad = power
        else:
            good = power
            best = {"rate": round(rate, 2), **{name: round(1e3 * value, 2) for name, value in found.items()}}
        power = good + 4 if bad is None else (good + bad) // 2
    return {"workload": workload, "draw": drawing, "compute_prompts": prompting, "chunk": chunk} | (
        best or {"rate": 0.0}
    )


def simulated(args: Any) -> dict[str, Any]:
    rows = []
    for workload in WORKLOADS:
        for prompting in range(args.devices):
            tried = [
                highest(workload, args.devices - prompting, prompting, chunk, args)
                for chunk in (CHUNKS if not prompting else (LEAST_PREFILL,))
            ]
            row = max(tried, key=lambda one: one["rate"])
            rows.append(row)
            print(row, file=sys.stderr, flush=True)
    bounds = {"first_s": FIRST, "gap_s": args.gap, "devices": args.devices}
    run = {"seconds": args.seconds, "seed": args.seed, "rows": rows}
    return {"benchmark": "disaggregation (simulated)", **bounds, **run}


# -- measured ----------------------------------------------------------------------------------------------

SMOLLM = {
    "model_type": "llama", "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
    "num_attention_heads": 9, "num_key_value_heads": 3, "vocab_size": 49152, "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "tie_word_embeddings": True, "torch_dtype": "bfloat16",
}  # fmt: skip


def measured(args: Any) -> dict[str, Any]:
    os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=2")
    from jaxserve import LLM

    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        (Path(folder) / "config.json").write_text(json.dumps(SMOLLM))
        divisions: dict[str, dict[str, Any]] = {
            "both draw": {"mesh": "data=2"},
            "one computes prompts": {"prefill_replicas": 1},
        }
        engines = {
            name: stack.enter_context(
                LLM(folder, load_format="dummy", max_slots=8, tuned=False, **options)
            ).engine
            for name, options in divisions.items()
        }
        for round_number in range(2):
            for name, engine in engines.items():
                row = {"division": name, "round": round_number} | drive(engine, args.seconds, round_number)
                rows.append(row)
                print(row, file=sys.stderr, flush=True)
    return {"benchmark": "disaggregation (measured)", "rows": rows}


def drive(engine: Any, seconds: float, seed: int) -> dict[str, Any]:
    """READERS streams without end, and a long prompt for one token after the other."""
    rng, lock = np.random.default_rng(seed), threading.Lock()
    gaps: list[float] = []
    waits: list[float] = []
    begin = time.monotonic()
    end = begin + seconds
    numbers = iter(range(10**9))
    left = threading.Semaphore(0)

    def ask(length: int, reply: int, reader: bool) -> None:
        ids = rng.integers(49152, size=length)
        params = SamplingParams(max_tokens=reply, ignore_eos=True, temperature=0.0)
        request = check_request(f"{seed}-{next(numbers)}", ids, params, engine.limits, time.monotonic())
        last = sent = time.monotonic()
        begun = False

        def sink(output: Output) -> None:
            nonlocal last, begun
            now = time.monotonic()
            with lock:
                if reader and begun:
                    gaps.append(now - last)
                elif not reader and output.token_ids:
                    waits.append(now - sent)
            last, begun = now, True
            if output.finish_reason is Finish.LENGTH:
                if now < end:
                    ask(length, reply, reader)
                else:
                    left.release()

        engine.submit((request, sink))

    for _ in range(READERS):
        ask(32, 256, True)
    ask(LONG, 1, False)
    for _ in range(READERS + 1):
        left.acquire()
    return {
        "gap_ms": {p: round(1e3 * float(np.percentile(gaps, p)), 1) for p in (50, 99)},
        "first_token_of_long_prompts_ms": {
            p: round(1e3 * float(np.percentile(waits, p)), 0) for p in (50, 99)
        },
        "long_prompts": len(waits),
        "readers_tokens_per_second": round(len(gaps) / (time.monotonic() - begin), 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("simulate", "measure"))
    parser.add_argument("--devices", type=int, default=4)
    parser.add_argument("--seconds", type=float, default=30.0)
    parser.add_argument("--gap", type=float, default=GAP, help="bound on gaps, in seconds")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    print(json.dumps(simulated(args) if args.what == "simulate" else measured(args)))


if __name__ == "__main__":
    main()
