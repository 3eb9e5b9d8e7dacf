"""For tests that follow plans by hand: a small scheduler, requests of counted tokens, plans as lists."""

from __future__ import annotations

from typing import Any

import numpy as np

from jaxserve.scheduler.scheduler import Event, Scheduler
from jaxserve.scheduler.types import Limits, Request, SamplingParams, StepPlan, Tier, check_request

STOP = 9


def scheduler(**options: Any) -> Scheduler:
    """Four slots, 16 pages of four tokens, chunks of eight tokens."""
    defaults = {
        "max_slots": 4,
        "num_pages": 16,
        "page_size": 4,
        "pages_per_slot": 8,
        "prefill_chunk": 8,
        "max_prefill_rows": 4,
    }
    return Scheduler(**(defaults | options))


def request(
    name: str,
    prompt: int | list[int],
    max_tokens: int = 4,
    *,
    first_token: int = 10,
    arrival: float = 0.0,
    tier: Tier = Tier.ONLINE,
    priority: int = 0,
    deadline: float | None = None,
    salt: bytes = b"",
    **params: Any,
) -> Request:
    """prompt: its tokens, or how many; these count up from `first_token`."""
    limits = Limits(vocab_size=100, max_model_len=32, pool_tokens=64, eos_token_ids=(STOP,))
    tokens = prompt if isinstance(prompt, list) else list(range(first_token, first_token + prompt))
    sampling = SamplingParams(max_tokens=max_tokens, **params)
    return check_request(
        name, tokens, sampling, limits, arrival, tier=tier, priority=priority, deadline=deadline, salt=salt
    )


def commit(it: Scheduler, plan: StepPlan, token: int = 50) -> list[Event]:
    """Commits the plan with the same token in every row that draws, and what is forced in the others."""
    prefill = [token if row.forced < 0 else row.forced for row in plan.prefill]
    decode = np.zeros((0, 0), np.int32)
    if (rows := plan.decode) is not None:
        decode = np.full((rows.steps, len(rows.slots)), token, np.int32)
        if rows.forced is not None:
            decode[0] = np.where(rows.forced < 0, token, rows.forced)
    events = it.commit(plan, np.asarray(prefill, np.int32), decode)
    it.check_invariants()
    return events


def run(it: Scheduler, token: int = 50, now: float = 0.0) -> list[Event]:
    """Plans and commits until nothing is left to do."""
    events = []
    while it.has_work:
        plan = it.plan(now)
        it.check_invariants()
        events += commit(it, plan, token)
    return events


def prefilled(plan: StepPlan) -> list[tuple[int, int, int, bool]]:
    """(slot, start, tokens, last) of each prefill row."""
    return [(row.slot, row.start, len(row.tokens), row.last) for row in plan.prefill]


def decoded(plan: StepPlan) -> list[tuple[int, int]]:
    """(slot, position) of each decode row."""
    rows = plan.decode
    return [] if rows is None else list(zip(rows.slots.tolist(), rows.positions.tolist(), strict=True))
