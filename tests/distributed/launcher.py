"""A launcher of one replica in several processes on this machine. It does what LeaderWorkerSet does: when
one of them ends, it waits for the others to end and starts all of them again."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import httpx

START_SECONDS = 600  # compiling in several processes on a busy machine
END_SECONDS = 30  # for the other processes to notice and to end


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@dataclasses.dataclass
class Round:
    """One life of the group: its processes, and their exit codes once all have ended by themselves."""

    processes: list[subprocess.Popen[bytes]]
    codes: list[int] | None = None


class Launcher:
    """devices: fake ones in each process. arguments: of `serve`, and of single processes beside them."""

    def __init__(
        self,
        folder: Path,
        arguments: Sequence[str],
        *,
        processes: int,
        devices: int = 1,
        own: dict[int, Sequence[str]] | None = None,
        restarts: bool = True,
    ) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.rounds: list[Round] = []
        self._folder = folder
        self._arguments = arguments
        self._processes = processes
        self._devices = devices
        self._own = own or {}
        self._restarts = restarts
        self._stopping = threading.Event()
        self._start()
        self._supervisor = threading.Thread(target=self._supervise, daemon=True)
        self._supervisor.start()

    def _start(self) -> None:
        coordinator = f"127.0.0.1:{free_port()}"
        number = len(self.rounds)
        processes = []
        for i in range(self._processes):
            group = [
                "--coordinator",
                coordinator,
                "--processes",
                str(self._processes),
                "--process-id",
                str(i),
            ]
            with open(self._folder / f"log-{number}-{i}", "wb") as log:
                processes.append(
                    subprocess.Popen(
                        [
                            *(sys.executable, "-m", "jaxserve", "serve", "--port", str(self.port)),
                            *(*self._arguments, *self._own.get(i, ()), *group),
                        ],
                        stderr=log,
                        stdin=subprocess.DEVNULL,
                        env={
                            **os.environ,
                            "XLA_FLAGS": f"--xla_force_host_platform_device_count={self._devices}",
                        },
                    )
                )
        self.rounds.append(Round(processes))

    def _supervise(self) -> None:
        while not self._stopping.is_set():
            now = self.rounds[-1]
            if any(process.poll() is not None for process in now.processes):
                with contextlib.suppress(subprocess.TimeoutExpired):
                    deadline = time.monotonic() + END_SECONDS
                    codes = [p.wait(max(0.0, deadline - time.monotonic())) for p in now.processes]
                    now.codes = codes
                self._kill(now)
                if not self._restarts:
                    return
                self._start()
            time.sleep(0.05)

    def _kill(self, now: Round) -> None:
        for process in now.processes:
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(signal.SIGKILL)
            process.wait()

    def stop(self) -> None:
        self._stopping.set()
        self._supervisor.join()
        self._kill(self.rounds[-1])

    def printed(self) -> str:
        logs = sorted(self._folder.glob("log-*"))
        return "\n".join(f"--- {log.name}\n{log.read_text(errors='replace')}" for log in logs)

    def wait_until_ready(self) -> None:
        """Of the present round, or of the next one if this ends."""
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            with contextlib.suppress(httpx.TransportError):
                if httpx.get(f"{self.url}/ready").status_code == 200:
                    return
            assert self._restarts or self.rounds[-1].codes is None, self.printed()
            assert len(self.rounds) < 8, self.printed()
            time.sleep(0.1)
        raise AssertionError(f"not ready after {START_SECONDS} s:\n{self.printed()}")

    def wait_for_codes(self, number: int) -> list[int]:
        """Exit codes of a round whose processes ended by themselves."""
        deadline = time.monotonic() + END_SECONDS + 10
        while time.monotonic() < deadline:
            if (codes := self.rounds[number].codes) is not None:
                return codes
            time.sleep(0.05)
        raise AssertionError(f"not all ended:\n{self.printed()}")


@contextlib.contextmanager
def launched(folder: Path, arguments: Sequence[str], **how: object) -> Iterator[Launcher]:
    folder.mkdir(parents=True, exist_ok=True)
    launcher = Launcher(folder, arguments, **how)  # type: ignore[arg-type]
    try:
        yield launcher
    finally:
        launcher.stop()
