"""`jaxserve serve` in a process of its own, for tests that need all of it."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import IO

import httpx

START_SECONDS = 240  # compiling on a busy machine; a test that fails says what the server printed


class Server:
    def __init__(
        self,
        log: IO[str],
        arguments: Sequence[str],
        env: Mapping[str, str],
        program: Sequence[str] = ("-m", "jaxserve"),
    ) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.log = log
        self.process = subprocess.Popen(
            [sys.executable, *program, "serve", "--port", str(self.port), *arguments],
            stderr=log,
            stdin=subprocess.DEVNULL,
            env={**os.environ, "XLA_FLAGS": "", **env},
        )

    def printed(self) -> str:
        self.log.seek(0)
        return self.log.read()

    def wait_until_ready(self) -> None:
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            assert self.process.poll() is None, self.printed()
            try:
                if httpx.get(f"{self.url}/ready").status_code == 200:
                    return
            except httpx.ConnectError:
                pass
            time.sleep(0.1)
        raise AssertionError(f"not ready after {START_SECONDS} s:\n{self.printed()}")

    def metric(self, name: str) -> float:
        lines = httpx.get(f"{self.url}/metrics").text.splitlines()
        return next(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(name))

    def settle(self) -> None:
        """Waits until nothing runs or waits and every page is back."""
        deadline = time.monotonic() + 30
        names = ("vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc")
        while any(self.metric(name) for name in names):
            assert time.monotonic() < deadline, [self.metric(name) for name in names]
            time.sleep(0.02)


@contextlib.contextmanager
def started(
    folder: Path,
    arguments: Sequence[str],
    env: Mapping[str, str] = MappingProxyType({}),
    program: Sequence[str] = ("-m", "jaxserve"),
) -> Iterator[Server]:
    """A server that is ready, with its messages in a file of `folder`; killed in the end.

    program: what Python runs in place of the command, with the same arguments.
    """
    with open(folder / "stderr", "w+") as log:
        server = Server(log, arguments, env, program)
        try:
            server.wait_until_ready()
            yield server
        finally:
            server.process.kill()
            server.process.wait()
