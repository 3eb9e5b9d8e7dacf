"""The parent's end of a process that is asked in lines and answers in lines, and may hang or die of one.

Imports nothing of ours, so that such a process can be a plain file beside it.
"""

from __future__ import annotations

import contextlib
import os
import select
import subprocess
import time


def read_line(process: subprocess.Popen[bytes], seconds: float) -> bytes:
    """Its next line. Raises TimeoutError, and EOFError where the process ended."""
    assert process.stdout is not None
    descriptor = process.stdout.fileno()
    poll = select.poll()  # select() takes no descriptor beyond 1,024, which a server's may be
    poll.register(descriptor, select.POLLIN)
    end = time.monotonic() + seconds
    parts: list[bytes] = []
    while not (parts and parts[-1].endswith(b"\n")):
        if not poll.poll(max(0.0, end - time.monotonic()) * 1000):
            raise TimeoutError
        part = os.read(descriptor, 2**20)
        if not part:
            raise EOFError
        parts.append(part)
    return b"".join(parts)


def ask(process: subprocess.Popen[bytes], line: bytes, seconds: float) -> bytes:
    """Writes a line and reads one. Raises as `read_line`, and OSError where the process ended."""
    assert process.stdin is not None
    process.stdin.write(line + b"\n")
    process.stdin.flush()
    return read_line(process, seconds)


def end(process: subprocess.Popen[bytes]) -> None:
    """Kills it and takes it away."""
    process.kill()
    for pipe in (process.stdin, process.stdout):
        with contextlib.suppress(OSError):
            pipe and pipe.close()
    process.wait()
