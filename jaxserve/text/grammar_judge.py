"""Whether a grammar can be compiled, found out in a process that may die of it.

llguidance overflows its stack over some texts of a few hundred kilobytes, and works for minutes over others.
Where no answer comes in time, or the process is gone, the grammar is refused and the next one gets a new
process.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence

from jaxserve.text import child_process, judge_process

START_SECONDS = 60.0


class JudgeError(ValueError):
    """Why a grammar is refused."""


class TooSlow(JudgeError):
    """It may compile, given more time."""


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
        try:
            answer = child_process.ask(self._process, json.dumps(grammar).encode(), seconds)
        except TimeoutError:
            self.close()
            raise TooSlow(f"it takes longer than {seconds:g} s to compile") from None
        except (OSError, EOFError):
            self.close()
            raise JudgeError("the compiler fails over it: it is too large or too deep") from None
        if (error := json.loads(answer)) is not None:
            raise JudgeError(error)

    def close(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            child_process.end(process)

    def _spawn(self) -> subprocess.Popen[bytes]:
        process = subprocess.Popen(
            [sys.executable, "-I", judge_process.__file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,  # Ctrl-C is the parent's matter
        )
        try:
            child_process.ask(process, self._start.encode(), START_SECONDS)
        except (TimeoutError, EOFError, OSError):
            child_process.end(process)
            raise JudgeError("llguidance does not read this model's tokenizer") from None
        return process
