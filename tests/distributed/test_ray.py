"""deploy/ray/serve_ray.py on a Ray of its own here: two or four processes behind Ray Serve, which restarts
them."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil
import pytest

from tests.distributed.launcher import free_port
from tests.distributed.test_group import (
    ARGUMENTS,
    BODIES,
    ERROR_SECONDS,
    ROOT,
    answers,
    expected,
    folder,
    mid_stream,
    same,
)

pytestmark = pytest.mark.slow
__all__ = ["expected", "folder"]  # fixtures

START_SECONDS = 900


class Cluster:
    """The script's process, and below it Ray's."""

    def __init__(self, folder: Path, log: Path, hosts: int) -> None:
        self.hosts = hosts
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.log = log
        with open(log, "wb") as output:
            self.script = subprocess.Popen(
                [
                    *(sys.executable, str(ROOT / "deploy" / "ray" / "serve_ray.py"), str(folder)),
                    *("--address", "local", "--hosts", str(hosts), "--strategy", "STRICT_PACK"),
                    *("--port", str(self.port), "--", *ARGUMENTS),
                ],
                stdout=output,
                stderr=subprocess.STDOUT,
                cwd=log.parent,
                env={
                    **os.environ,
                    "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
                    "XLA_FLAGS": "--xla_force_host_platform_device_count=1",
                    "RAY_USAGE_STATS_ENABLED": "0",
                },
            )

    def printed(self) -> str:
        return self.log.read_text(errors="replace")[-8000:]

    def wait_until_ready(self) -> None:
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            assert self.script.poll() is None, self.printed()
            try:
                if httpx.get(f"{self.url}/ready", timeout=START_SECONDS).status_code == 200:
                    return
            except httpx.TransportError:
                pass
            time.sleep(0.2)
        raise AssertionError(self.printed())

    def workers(self) -> list[psutil.Process]:
        """The replica's processes, 0 first: it alone listens for the others and for HTTP as well."""
        found = []
        for process in psutil.Process(self.script.pid).children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                if any("ray::Host.run" in part for part in process.cmdline()):
                    found.append((_listening(process), process))
        found.sort(key=lambda entry: entry[0], reverse=True)
        assert len({ports for ports, _ in found[:2]}) == len(found[:2]), found
        return [process for _, process in found]

    def stop(self) -> None:
        children = psutil.Process(self.script.pid).children(recursive=True)
        self.script.terminate()
        try:
            self.script.wait(30)
        except subprocess.TimeoutExpired:
            self.script.kill()
            self.script.wait()
        for child in children:
            with contextlib.suppress(psutil.NoSuchProcess):
                child.kill()


def _listening(process: psutil.Process) -> int:
    return sum(one.status == psutil.CONN_LISTEN for one in process.net_connections("tcp"))


@pytest.fixture(scope="module", params=[2, 4])
def cluster(
    request: pytest.FixtureRequest, folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Cluster]:
    cluster = Cluster(folder, tmp_path_factory.mktemp("ray") / "log", request.param)
    try:
        yield cluster
    finally:
        cluster.stop()


def test_the_same_answers_as_one_process(cluster: Cluster, expected: list[dict[str, object]]) -> None:
    cluster.wait_until_ready()
    assert len(cluster.workers()) == cluster.hosts
    same(answers(cluster.url), expected)


@pytest.mark.parametrize("victim", ["last", "first"])
def test_ray_restarts_a_replica_that_lost_a_process(
    cluster: Cluster, expected: list[dict[str, object]], victim: str
) -> None:
    cluster.wait_until_ready()
    workers = cluster.workers()
    before = {process.pid for process in workers}
    assert len(before) == cluster.hosts
    clients = mid_stream(cluster.url)
    killed = time.monotonic()
    workers[-1 if victim == "last" else 0].kill()
    for client in clients:
        client.hears_within(ERROR_SECONDS, killed)
    deadline = time.monotonic() + START_SECONDS
    # the next request waits for the new replica, or is told that there is none yet
    body = {"model": "tiny", **BODIES[0]}
    while True:
        reply = httpx.post(f"{cluster.url}/v1/completions", json=body, timeout=START_SECONDS)
        if reply.status_code == 200:
            break
        assert reply.status_code in (500, 502, 503) and time.monotonic() < deadline, reply.text
        time.sleep(0.5)
    same([reply.json()], expected[:1])
    after = {process.pid for process in cluster.workers()}
    assert len(after) == cluster.hosts and not before & after
