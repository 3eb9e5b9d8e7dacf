"""Host cost of one scheduling step, plan and commit, with every slot decoding; the pool must not matter.

    python -m benchmarks.scheduler_cost [--slots 256] [--steps 2000]

Two loads, each with a pool of 1,000 and of 1,000,000 pages. `decode`: every slot decodes, nobody comes or
goes. `turnover`: sequences of 128 prompt and 64 new tokens, so that each step also ends, admits and prefills
slots / 64 of them. Prints one JSON line, in microseconds per step: median and 99th percentile.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time

import numpy as np

from jaxserve.scheduler.scheduler import Scheduler
from jaxserve.scheduler.types import Limits, SamplingParams, StepPlan, check_request

CONTEXT, PROMPT = 4096, 128


def step_costs(slots: int, num_pages: int, steps: int, page_size: int, new_tokens: int) -> list[float]:
    """Seconds of plan() and commit() together, for each of `steps` steps with all slots (all but those
    that prefill) decoding."""
    pool_tokens = num_pages * page_size
    limits = Limits(vocab_size=32000, max_model_len=CONTEXT, pool_tokens=pool_tokens, eos_token_ids=(2,))
    scheduler = Scheduler(
        max_slots=slots,
        num_pages=num_pages,
        page_size=page_size,
        pages_per_slot=-(-CONTEXT // page_size),
        prefill_chunk=8 * PROMPT,
        max_prefill_rows=8,
    )
    params = SamplingParams(max_tokens=new_tokens)
    prompt = np.arange(PROMPT) + 3
    added, costs = 0, list[float]()
    behind: StepPlan | None = None
    while len(costs) < steps:
        while scheduler.num_waiting < 8:
            scheduler.add(check_request(f"request-{added}", prompt, params, limits, 0.0), [added])
            added += 1
        begin = time.perf_counter()
        plan = scheduler.plan()
        cost = time.perf_counter() - begin
        if behind is not None:
            rows = 0 if behind.decode is None else len(behind.decode.slots)
            prefill, decode = np.full(len(behind.prefill), 7, np.int32), np.full(rows, 7, np.int32)
            begin = time.perf_counter()
            scheduler.commit(behind, prefill, decode)
            cost += time.perf_counter() - begin
            if rows >= slots - 8:
                costs.append(cost)
        behind = plan
    return costs


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--slots", type=int, default=256)
    parser.add_argument("--steps", type=int, default=2000)
    options = parser.parse_args()
    slots, steps = options.slots, options.steps
    result: dict[str, object] = {"benchmark": "scheduler_cost", "slots": slots, "steps": steps}
    # 1,000 pages hold three of 64 tokens a slot at 256 slots; pages of 1,024 leave room to decode for long
    for load, page_size, new_tokens in (("decode", 1024, steps + 200), ("turnover", 64, 64)):
        for num_pages in (1_000, 1_000_000):
            seconds = step_costs(slots, num_pages, steps, page_size, new_tokens)
            micros = sorted(1e6 * cost for cost in seconds)
            result[f"{load}_us_median_{num_pages}_pages"] = round(statistics.median(micros), 1)
            result[f"{load}_us_p99_{num_pages}_pages"] = round(micros[int(0.99 * len(micros))], 1)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
