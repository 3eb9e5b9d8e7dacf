"""Chat templates, rendered in processes that may hang or die of one.

A template is a program that came with a model, and even a good one may take long over what a client sends.
Its loops could be counted; one operation that runs for minutes, or a list that holds itself twice sixty times
over, could not. Where no answer comes in time, or the process is gone, the render is refused and the next one
gets a new process.
"""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
import threading
import weakref
from collections.abc import Mapping
from typing import Any

from jaxserve.text import child_process, template_process

RENDER_SECONDS = 2.0
START_SECONDS = 60.0
PROCESSES = 4


class RenderError(ValueError):
    """Why there is no prompt: the template's own words, or that it took too much."""


class Renderers:
    """The parent's end: a few processes, made when they are needed. Any thread may ask."""

    def __init__(self, limit: int = PROCESSES, *, seconds: float = RENDER_SECONDS) -> None:
        self.seconds = seconds
        self._places = threading.Semaphore(limit)
        self._free: list[subprocess.Popen[bytes]] = []
        self._lock = threading.Lock()
        self._finalizer = weakref.finalize(self, _end_all, self._free)

    def render(self, source: str, names: Mapping[str, Any], *, now: float | None = None) -> str:
        """The text that the template makes of these variables, which JSON must be able to hold.

        now: what it is to take for the time, in seconds since 1970, if not the time.
        Blocks, at most for `seconds` once it has a process. Raises RenderError.
        """
        try:
            job = json.dumps([source, names, now]).encode()
        except (TypeError, ValueError, RecursionError) as error:
            raise RenderError(f"the chat template can only be given plain data: {error}") from None
        with self._places:
            with self._lock:
                process = self._free.pop() if self._free else None
            if process is not None and process.poll() is not None:
                child_process.end(process)
                process = None
            if process is None:
                process = _spawn()
            try:
                answer = self._ask(process, job)
            except BaseException:
                child_process.end(process)
                raise
            with self._lock:
                self._free.append(process)
        text, refusal = json.loads(answer)
        if refusal is not None:
            raise RenderError(refusal)
        assert isinstance(text, str)
        return text

    def close(self) -> None:
        self._finalizer()

    def _ask(self, process: subprocess.Popen[bytes], job: bytes) -> bytes:
        try:
            return child_process.ask(process, job, self.seconds)
        except TimeoutError:
            raise RenderError(f"the chat template takes longer than {self.seconds:g} s") from None
        except (OSError, EOFError):
            raise RenderError("the chat template fails: it takes too much memory, or is too deep") from None


@functools.cache
def shared() -> Renderers:
    """This program's."""
    return Renderers()


def _spawn() -> subprocess.Popen[bytes]:
    # -S: what may be imported is what the parent may import, without looking for it again
    process = subprocess.Popen(
        [sys.executable, "-P", "-S", template_process.__file__],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        start_new_session=True,  # Ctrl-C is the parent's matter
    )
    try:
        child_process.read_line(process, START_SECONDS)
    except (TimeoutError, EOFError):
        child_process.end(process)
        raise RenderError("the process that renders chat templates does not start") from None
    return process


def _end_all(processes: list[subprocess.Popen[bytes]]) -> None:
    while processes:
        child_process.end(processes.pop())
