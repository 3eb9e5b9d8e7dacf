"""Host cost of one scheduling step, plan and commit, with every slot decoding; the pool must not matter.

    python -m benchmarks.scheduler_cost [--slots 256] [--steps 2000]

Each load runs with a small and with a large pool. `decode`: every slot decodes, nobody comes or goes.
`waiting`: the same, and 5,000 requests wait. `turnover`: sequences of 128 prompt and 64 new tokens, so that
each step also ends, admits and prefills slots / 64 of them. Microseconds, median and 99th percentile.

`lookup`: milliseconds of the plan that takes a 32,768-token prompt from the prefix cache (digests, look-up,
references, and a chunk of what is left), with pages of 16 tokens. Prints one JSON line.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time

import numpy as np

from jaxserve.scheduler.scheduler import Scheduler
from jaxserve.scheduler.types import Limits, Request, SamplingParams, StepPlan, check_request

CONTEXT, PROMPT = 4096, 128
LONG_PROMPT, LONG_PAGE = 32_768, 16


def step_costs(
    slots: int, num_pages: int, steps: int, page_size: int, new_tokens: int, waiting: int
) -> list[float]:
    """Seconds of plan() and commit() together, for each of `steps` steps with all slots (all but those
    that prefill) decoding."""
    pool_tokens = num_pages * page_size
    limits = Limits(vocab_size=1 << 30, max_model_len=CONTEXT, pool_tokens=pool_tokens, eos_token_ids=(2,))
    scheduler = Scheduler(
        max_slots=slots,
        num_pages=num_pages,
        page_size=page_size,
        pages_per_slot=-(-CONTEXT // page_size),
        prefill_chunk=8 * PROMPT,
        max_prefill_rows=8,
    )
    params = SamplingParams(max_tokens=new_tokens)
    added, costs = 0, list[float]()
    behind: StepPlan | None = None
    while len(costs) < steps:
        while scheduler.num_waiting < waiting:
            prompt = np.arange(PROMPT) + 3 + PROMPT * added  # no two alike: nothing comes from the cache
            scheduler.add(check_request(f"request-{added}", prompt, params, limits, float(added)), [added])
            added += 1
        begin = time.perf_counter()
        plan = scheduler.plan(0.0)
        cost = time.perf_counter() - begin
        if behind is not None:
            rows = 0 if behind.decode is None else len(behind.decode.slots)
            prefill, decode = np.full(len(behind.prefill), 7, np.int32), np.full((1, rows), 7, np.int32)
            begin = time.perf_counter()
            scheduler.commit(behind, prefill, decode)
            cost += time.perf_counter() - begin
            if rows >= slots - 8:
                costs.append(cost)
        behind = plan
    return costs


def lookup_costs(num_pages: int, repeats: int) -> list[float]:
    """Seconds of the plan that finds all of a long prompt but its end in the prefix cache."""
    limits = Limits(
        vocab_size=1 << 30, max_model_len=2 * LONG_PROMPT, pool_tokens=num_pages * LONG_PAGE, eos_token_ids=()
    )
    scheduler = Scheduler(
        max_slots=4,
        num_pages=num_pages,
        page_size=LONG_PAGE,
        pages_per_slot=2 * LONG_PROMPT // LONG_PAGE,
        prefill_chunk=LONG_PROMPT,
        max_prefill_rows=4,
    )
    prompt, params = np.arange(LONG_PROMPT), SamplingParams(max_tokens=1)

    def request(name: int) -> Request:
        return check_request(str(name), prompt, params, limits, 0.0)

    costs = []
    for repeat in range(repeats + 1):
        (sequence,) = scheduler.add(request(repeat), [0])
        begin = time.perf_counter()
        plan = scheduler.plan(0.0)
        costs.append(time.perf_counter() - begin)
        scheduler.commit(plan, np.asarray([7], np.int32), np.zeros((0, 0), np.int32))
        if repeat and sequence.cached != LONG_PROMPT - LONG_PAGE:
            raise RuntimeError(f"{sequence.cached} tokens of {LONG_PROMPT} came from the cache")
    return costs[1:]


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
    for load, page_size, new_tokens, waiting in (
        ("decode", 1024, min(steps + 200, CONTEXT - PROMPT), 8),
        ("waiting", 1024, min(steps + 200, CONTEXT - PROMPT), 5_000),
        ("turnover", 64, 64, 8),
    ):
        for num_pages in (1_000, 1_000_000):
            seconds = step_costs(slots, num_pages, steps, page_size, new_tokens, waiting)
            micros = sorted(1e6 * cost for cost in seconds)
            result[f"{load}_us_median_{num_pages}_pages"] = round(statistics.median(micros), 1)
            result[f"{load}_us_p99_{num_pages}_pages"] = round(micros[int(0.99 * len(micros))], 1)
    for num_pages in (10_000, 1_000_000):
        millis = [1e3 * cost for cost in lookup_costs(num_pages, 20)]
        result[f"lookup_ms_median_{num_pages}_pages"] = round(statistics.median(millis), 2)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
