"""What the device is told of a chunk, from a sequence to a `PrefillRow`: plain functions, no state."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from jaxserve.scheduler.sharing import wants_scores
from jaxserve.scheduler.types import PrefillRow, SamplingParams, Sequence


def prefill_row(
    sequence: Sequence, end: int, table: NDArray[np.int32], *, first: bool, replay: bool
) -> PrefillRow:
    """The sequence's tokens from `computed` to `end`. first, replay: see `PrefillRow` and `Scheduler`."""
    request, params = sequence.request, sequence.request.params
    prompt, last = request.prompt_token_ids, end == sequence.prefill_len
    generated = None
    if first and sequence.resumed and _counts_generated(params):
        generated = np.asarray(sequence.output, np.int32)
    return PrefillRow(
        slot=sequence.slot,
        start=sequence.computed,
        tokens=sequence.tokens(sequence.computed, end),
        table=table.copy(),
        first=first,
        last=last,
        params=params,
        stop_token_ids=request.stop_token_ids,
        seed=sequence.seed,
        prompt_len=sequence.prompt_len,
        max_total_tokens=request.max_total_tokens,
        targets=_targets(sequence, end) if wants_scores(sequence) else None,
        # presence and frequency penalties look at generated tokens only
        prompt=prompt.copy() if first and params.repetition_penalty != 1.0 else None,
        forced=sequence.output[0] if last and replay and sequence.output else -1,
        generated=generated,
        pooling=request.pooling,
    )


def _targets(sequence: Sequence, end: int) -> NDArray[np.int32]:
    """i32[end - computed], what follows each prompt token; -1 after the last."""
    targets = np.full(end - sequence.computed, -1, np.int32)
    following = sequence.request.prompt_token_ids[sequence.computed + 1 : end + 1]
    targets[: len(following)] = following
    return targets


def _counts_generated(params: SamplingParams) -> bool:
    """Whether a penalty looks at the tokens generated before."""
    return bool(params.presence_penalty or params.frequency_penalty or params.repetition_penalty != 1.0)
