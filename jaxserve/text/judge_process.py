"""A process that compiles grammars to see whether that can be done, and may hang or die of one.

It has less stack than the threads of `grammars.py`, less memory and less of the processor. Imports nothing of
ours: it runs as a file.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import sys
import threading

import llguidance
import numpy as np
from numpy.typing import NDArray

STEPS = 8
STACK_BYTES = 128 * 2**20
MEMORY_BYTES = 2 * 2**30  # of data, beyond what it holds when it begins


def limits() -> llguidance.LLParserLimits:
    """Of one grammar's size and of the work for one mask: some 20 ms at most."""
    return llguidance.LLParserLimits(verbose_errors=False)


def _walk(matcher: llguidance.LLMatcher, mask: NDArray[np.int32], ends: frozenset[int], *, last: bool) -> str:
    """What goes wrong in the first tokens of a reply, "" if nothing does: some grammars compile and then
    cannot be followed. last: always the last token that is allowed, else the first."""
    for _ in range(STEPS):
        if matcher.is_stopped():
            break
        matcher.unsafe_compute_mask_ptr(mask.ctypes.data, mask.nbytes)
        allowed = np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little"))
        if matcher.is_error() or not len(allowed):
            break
        token = int(allowed[-1 if last else 0])
        if token in ends:
            break
        matcher.consume_token(token)
    return matcher.get_error()


def main() -> None:
    with contextlib.suppress(OSError):
        os.nice(10)
    line = sys.stdin.readline()
    if not line.endswith("\n"):  # whoever asks has gone
        return
    start = json.loads(line)
    tokenizer = llguidance.LLTokenizer(
        start["tokenizer"], n_vocab=start["vocab_size"], eos_token=start["end_tokens"] or None
    )
    mask = np.zeros(-(-start["vocab_size"] // 32), np.int32)
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    resource.setrlimit(resource.RLIMIT_DATA, (used + MEMORY_BYTES,) * 2)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    print("null", flush=True)
    ends = frozenset(start["end_tokens"])
    for line in sys.stdin:
        matcher = llguidance.LLMatcher(tokenizer, json.loads(line), log_level=0, limits=limits())
        error = matcher.get_error()
        for last in (False, True):
            if not error:
                error = _walk(matcher.deep_copy(), mask, ends, last=last)
        print(json.dumps(error[:1000] or None), flush=True)
        del matcher


if __name__ == "__main__":
    threading.stack_size(STACK_BYTES)
    thread = threading.Thread(target=main)
    thread.start()
    thread.join()
