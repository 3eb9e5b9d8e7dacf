"""Host time per step beside device time per step, with every slot decoding; prints one JSON line.

    python -m benchmarks.host_time [MODEL] [--slots 32] [--steps 30] [--quick]

MODEL: a local folder; without one, random weights of SmolLM-135M's shape in bf16. Two parts, alternating:
`apart`: `Engine.step_apart()`, plan and dispatch, then wait for the device, then commit; nothing overlaps, so
host and device seconds are clean. `overlapped`: `Engine.step()` as it serves; the wall time of a step, and of
it what the host worked and what it waited for the device.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

from benchmarks.peers import machine
from benchmarks.peers.weights import SMOLLM_135M, TINY, write_model
from jaxserve.build import build_engine
from jaxserve.config import EngineOptions
from jaxserve.engine.engine import Engine
from jaxserve.scheduler.types import SamplingParams, check_request

ROOT = Path(__file__).resolve().parent.parent
PROMPT = 128


def fill(engine: Engine, prompt_len: int, new_tokens: int) -> None:
    """Starts a request in every slot and steps until all of them have a token."""
    rng = np.random.default_rng(0)
    params = SamplingParams(temperature=0.0, max_tokens=new_tokens, ignore_eos=True)
    slots = engine.stats()["slots"]
    begun: set[str] = set()
    for i in range(slots):
        prompt = rng.integers(engine.limits.vocab_size, size=prompt_len)
        request = check_request(str(i), prompt, params, engine.limits, time.monotonic())
        engine.submit((request, lambda output: begun.add(output.request_id)))
    while len(begun) < slots:
        engine.step()


def apart(engine: Engine, steps: int) -> dict[str, list[float]]:
    host, device = zip(*(engine.step_apart() for _ in range(steps)), strict=True)
    return {"host": list(host), "device": list(device)}


def overlapped(engine: Engine, steps: int) -> dict[str, float]:
    """Seconds per step."""
    engine.step()  # from here on one step is always in flight
    before, begin = engine.stats(), time.perf_counter()
    for _ in range(steps):
        engine.step()
    wall, after = time.perf_counter() - begin, engine.stats()
    taken = after["steps"] - before["steps"]
    return {
        "wall": wall / taken,
        "host": (after["host_seconds"] - before["host_seconds"]) / taken,
        "wait": (after["device_wait_seconds"] - before["device_wait_seconds"]) / taken,
    }


def micros(seconds: list[float]) -> dict[str, float]:
    ordered = sorted(1e6 * each for each in seconds)
    return {
        "median": round(statistics.median(ordered), 1),
        "min": round(ordered[0], 1),
        "p99": round(ordered[int(0.99 * len(ordered))], 1),
    }


def measure(engine: Engine, prompt_len: int, steps: int, rounds: int) -> dict[str, Any]:
    fill(engine, prompt_len, engine.limits.max_model_len - prompt_len)
    host: list[float] = []
    device: list[float] = []
    flowing: list[dict[str, float]] = []
    for _ in range(rounds):
        parts = apart(engine, steps)
        host += parts["host"]
        device += parts["device"]
        flowing.append(overlapped(engine, steps))
    running, slots = engine.stats()["running"], engine.stats()["slots"]
    if running != slots:
        raise RuntimeError(f"only {running} of {slots} slots were still busy: lower --steps")
    wall = statistics.median(each["wall"] for each in flowing)
    return {
        "apart_us": {"host": micros(host), "device": micros(device)},
        "overlapped_us": {key: micros([each[key] for each in flowing]) for key in ("wall", "host", "wait")},
        # what a step takes beyond its device time, as it serves
        "added_by_host": round(wall / statistics.median(device) - 1.0, 4),
        "tokens_per_second": round(slots / wall, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", nargs="?", default=None)
    parser.add_argument("--slots", type=int, default=32)
    parser.add_argument("--steps", type=int, default=30, help="per part and round")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--quick", action="store_true", help="a tiny model, to try the script")
    options = parser.parse_args()
    before = machine.idle_check()
    slots, steps = (4, 5) if options.quick else (options.slots, options.steps)
    with tempfile.TemporaryDirectory(prefix="host_time-") as temporary:
        folder = options.model
        if folder is None:
            folder = temporary
            write_model(Path(temporary), TINY if options.quick else SMOLLM_135M)
        engine = build_engine(
            folder,
            EngineOptions(max_slots=slots, tuned=False),
            progress=lambda line: print(line, file=sys.stderr),
        )
        needed = (2 * steps + 1) * options.rounds + 2 * slots
        prompt_len = min(PROMPT, engine.limits.max_model_len // 4)
        if prompt_len + needed > engine.limits.max_model_len:
            parser.error(f"{needed} more tokens a slot exceed the context: lower --steps or --rounds")
        result = measure(engine, prompt_len, steps, options.rounds)
        report = {
            "benchmark": "host_time",
            "model": options.model or ("tiny" if options.quick else "smollm-135m shape"),
            "slots": slots,
            "steps": steps,
            "rounds": options.rounds,
            **result,
            "dtype": engine.stats()["dtype"],
            "device": jax.devices()[0].device_kind,
            "jax": jax.__version__,
            "commit": machine.commit(ROOT),
            "machine": machine.describe() | {"before": before},
        }
        engine.close()
    host, device = result["apart_us"]["host"]["median"], result["apart_us"]["device"]["median"]
    wall = result["overlapped_us"]["wall"]["median"]
    print(
        f"{slots} slots: host {host:.0f} us, device {device:.0f} us a step apart; {wall:.0f} us overlapped,"
        f" {result['added_by_host']:+.1%} over the device, {result['tokens_per_second']} tok/s",
        file=sys.stderr,
    )
    print(json.dumps(report))


if __name__ == "__main__":
    main()
