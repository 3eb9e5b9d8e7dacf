"""A process that compiles a grammar to see whether that can be done, and may die of it.

Its parent writes a line of JSON for each grammar and reads one; where no line comes in time, or the process
is gone, the grammar is refused and the next one gets a new process. It has less stack than the parent's
threads, less memory and less of the processor.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import select
import subprocess
import sys
import threading
import time
from collections.abc import Sequence

import llguidance
import numpy as np

STACK_BYTES = 128 * 2**20
MEMORY_BYTES = 2 * 2**30  # of data, beyond what it holds when it begins
START_SECONDS = 60.0


class JudgeError(ValueError):
    """Why a grammar is refused."""


def limits() -> llguidance.LLParserLimits:
    """Of one grammar's size and of the work for one mask: some 20 ms at most."""
    return llguidance.LLParserLimits(verbose_errors=False)


class Judge:
    """The parent's end. One thread at a time."""

    def __init__(self, tokenizer: str, vocab_size: int, end_tokens: Sequence[int]) -> None:
        self._start = json.dumps(
            {"tokenizer": tokenizer, "vocab_size": vocab_size, "end_tokens": list(end_tokens)}
        )
        self._process: subprocess.Popen[bytes] | None = None

    def check(self, grammar: str, seconds: float) -> None:
        """Raises JudgeError for a grammar that does not compile, or not within so many seconds."""
        if self._process is None or self._process.poll() is not None:
            self._process = self._spawn()
        process = self._process
        assert process.stdin is not None and process.stdout is not None
        try:
            process.stdin.write(json.dumps(grammar).encode() + b"\n")
            process.stdin.flush()
            answer = _line(process, seconds)
        except TimeoutError:
            self.close()
            raise JudgeError(f"it takes longer than {seconds:g} s to compile") from None
        except (OSError, EOFError):
            self.close()
            raise JudgeError("the compiler fails over it: it is too large or too deep") from None
        if (error := json.loads(answer)) is not None:
            raise JudgeError(error)

    def close(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            for pipe in (process.stdin, process.stdout):
                with contextlib.suppress(OSError):
                    pipe and pipe.close()
            process.wait()

    def _spawn(self) -> subprocess.Popen[bytes]:
        process = subprocess.Popen(
            [sys.executable, "-I", __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,  # Ctrl-C is the parent's matter
        )
        assert process.stdin is not None
        process.stdin.write(self._start.encode() + b"\n")
        process.stdin.flush()
        try:
            _line(process, START_SECONDS)
        except (TimeoutError, EOFError):
            process.kill()
            raise JudgeError("llguidance does not read this model's tokenizer") from None
        return process


def _line(process: subprocess.Popen[bytes], seconds: float) -> bytes:
    """Raises TimeoutError, and EOFError where the process ended."""
    assert process.stdout is not None
    end = time.monotonic() + seconds
    line = b""
    while not line.endswith(b"\n"):
        ready, _, _ = select.select([process.stdout], [], [], max(0.0, end - time.monotonic()))
        if not ready:
            raise TimeoutError
        part = os.read(process.stdout.fileno(), 2**16)
        if not part:
            raise EOFError
        line += part
    return line


# --- the process -----------------------------------------------------------------------------------------


def main() -> None:
    with contextlib.suppress(OSError):
        os.nice(10)
    start = json.loads(sys.stdin.readline())
    tokenizer = llguidance.LLTokenizer(
        start["tokenizer"], n_vocab=start["vocab_size"], eos_token=start["end_tokens"] or None
    )
    mask = np.zeros(-(-start["vocab_size"] // 32), np.int32)
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    resource.setrlimit(resource.RLIMIT_DATA, (used + MEMORY_BYTES,) * 2)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    print("null", flush=True)
    for line in sys.stdin:
        matcher = llguidance.LLMatcher(tokenizer, json.loads(line), log_level=0, limits=limits())
        if not matcher.is_error():
            matcher.unsafe_compute_mask_ptr(mask.ctypes.data, mask.nbytes)
        print(json.dumps(matcher.get_error()[:1000] if matcher.is_error() else None), flush=True)
        del matcher


if __name__ == "__main__":
    threading.stack_size(STACK_BYTES)
    thread = threading.Thread(target=main)
    thread.start()
    thread.join()
