"""One replica in several real processes on this machine: it answers as one does, and it ends whole."""

from __future__ import annotations

import json
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from checkpoints.embedded import MODEL_DIR
from tests import tiny
from tests.distributed.launcher import Launcher, launched
from tests.serving import started

pytestmark = pytest.mark.slow

ERROR_SECONDS = 10  # from a death to the client's error
ROOT = Path(__file__).resolve().parent.parent.parent
NAME = "tiny"
ARGUMENTS = [
    *("--max-slots", "2", "--prefill-chunk", "32", "--page-size", "16", "--max-model-len", "2048"),
    *("--multi-step", "1", "--memory-fraction", "0.3"),
]
PROMPT = "def add(a, b):\n    "
# each kind of program runs in them: prompt logprobs, edited slots, several sequences at once
BODIES: list[dict[str, Any]] = [
    {"prompt": PROMPT, "max_tokens": 24, "temperature": 0, "logprobs": 2},
    {"prompt": PROMPT * 6, "max_tokens": 4, "temperature": 0, "logprobs": 1, "echo": True},
    {"prompt": "import os", "max_tokens": 24, "temperature": 0.8, "seed": 7, "n": 2},
    {
        "prompt": "class A:",
        "max_tokens": 24,
        "temperature": 0,
        "frequency_penalty": 1.5,
        "logit_bias": {"70": 3},
        "logprobs": 1,
    },
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / NAME
    tiny.write_model(folder, num_key_value_heads=4, vocab_size=4096, max_position_embeddings=2048)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(MODEL_DIR / name, folder)
    return folder


def answers(url: str) -> list[dict[str, Any]]:
    """To all bodies at once."""
    with ThreadPoolExecutor(len(BODIES)) as threads:
        return list(threads.map(lambda body: ask(url, **body), BODIES))


def ask(url: str, **body: Any) -> dict[str, Any]:
    reply = httpx.post(f"{url}/v1/completions", json={"model": NAME, **body}, timeout=600)
    assert reply.status_code == 200, reply.text
    return reply.json()


def same(got: list[dict[str, Any]], expected: list[dict[str, Any]]) -> None:
    for one, other in zip(got, expected, strict=True):
        for choice, wanted in zip(one["choices"], other["choices"], strict=True):
            assert choice["text"] == wanted["text"]
            if wanted["logprobs"] is not None:
                assert choice["logprobs"]["token_logprobs"] == pytest.approx(
                    wanted["logprobs"]["token_logprobs"], abs=1e-4
                )


@pytest.fixture(scope="module")
def expected(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """One process with one device."""
    with started(tmp_path_factory.mktemp("one"), [str(folder), *ARGUMENTS]) as server:
        return answers(server.url)


# (processes, fake devices in each)
SIZES = [(2, 1), (2, 2), (4, 1)]


@pytest.fixture(scope="module", params=SIZES, ids=lambda size: "x".join(map(str, size)))
def group(
    request: pytest.FixtureRequest, folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Launcher]:
    processes, devices = request.param
    log = tmp_path_factory.mktemp("group")
    with launched(log, [str(folder), *ARGUMENTS], processes=processes, devices=devices) as launcher:
        yield launcher


class Client:
    """A long answer, read on a thread, in parts or at once. chunks: parts so far. error: what ended it early.
    ended: when."""

    def __init__(self, url: str, *, streams: bool = True) -> None:
        self.chunks = 0
        self.error: str | None = None
        self.ended: float | None = None
        self._url = f"{url}/v1/completions"
        self._body = {
            "model": NAME,
            "prompt": PROMPT,
            "max_tokens": 1900,
            "ignore_eos": True,
            "stream": streams,
        }
        self._thread = threading.Thread(target=self._ask, daemon=True)
        self._thread.start()

    def _ask(self) -> None:
        try:
            with httpx.stream("POST", self._url, json=self._body, timeout=600) as reply:
                if reply.status_code != 200:
                    self.error = f"{reply.status_code}: {reply.read().decode()}"
                for line in reply.iter_lines() if self.error is None else ():
                    if not line.startswith("data: {"):
                        continue
                    chunk = json.loads(line.removeprefix("data: "))
                    if "error" in chunk:
                        self.error = chunk["error"]["message"]
                    self.chunks += 1
        except httpx.TransportError as error:
            self.error = f"{type(error).__name__}: {error}"
        self.ended = time.monotonic()

    def hears_within(self, seconds: float, since: float) -> str:
        """The error, which must have come in time."""
        self._thread.join(120)
        assert not self._thread.is_alive(), "the client hangs"
        assert self.error is not None and self.ended is not None, "an answer came"
        assert self.ended - since < seconds, (self.error, self.ended - since)
        return self.error


def mid_stream(url: str) -> list[Client]:
    """Four clients: one that reads parts and another one are served, the other two wait for a slot."""
    clients = [Client(url)]
    _until(lambda: clients[0].chunks >= 5, clients)
    clients += [Client(url), Client(url, streams=False), Client(url, streams=False)]
    _until(lambda: _requests(url) == {"running": 2, "waiting": 2}, clients)
    return clients


def _until(condition: Callable[[], bool], clients: list[Client]) -> None:
    while not condition():
        assert all(client.ended is None for client in clients), [client.error for client in clients]
        time.sleep(0.005)


def _requests(url: str) -> dict[str, float]:
    lines = httpx.get(f"{url}/metrics").text.splitlines()
    return {
        state: sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(name))
        for state, name in (
            ("running", "vllm:num_requests_running"),
            ("waiting", "vllm:num_requests_waiting"),
        )
    }


def test_the_same_answers_as_one_process(group: Launcher, expected: list[dict[str, Any]]) -> None:
    group.wait_until_ready()
    same(answers(group.url), expected)
    assert len(group.rounds) == 1, group.printed()


@pytest.mark.parametrize("victim", ["last", "first"])
def test_a_killed_process_ends_the_replica_and_the_next_one_serves(
    group: Launcher, expected: list[dict[str, Any]], victim: str
) -> None:
    group.wait_until_ready()
    number = len(group.rounds) - 1
    clients = mid_stream(group.url)
    processes = group.rounds[number].processes
    killed = time.monotonic()
    processes[-1 if victim == "last" else 0].kill()
    for client in clients:
        error = client.hears_within(ERROR_SECONDS, killed)
        if victim == "last":
            assert f"process {len(processes) - 1} of {len(processes)}" in error
    codes = group.wait_for_codes(number)
    assert sorted(codes) == [-signal.SIGKILL, *(len(codes) - 1) * [1]], group.printed()
    group.wait_until_ready()
    assert len(group.rounds) == number + 2, group.printed()
    same(answers(group.url), expected)


def test_a_process_that_hangs_is_as_good_as_dead(
    folder: Path, tmp_path: Path, expected: list[dict[str, Any]]
) -> None:
    """It keeps its connections, and says nothing."""
    with launched(tmp_path, [str(folder), *ARGUMENTS], processes=2) as group:
        group.wait_until_ready()
        clients = mid_stream(group.url)
        hung = time.monotonic()
        group.rounds[0].processes[1].send_signal(signal.SIGSTOP)
        for client in clients:
            assert "nothing heard from it" in client.hears_within(ERROR_SECONDS, hung)
        assert group.rounds[0].processes[0].wait(20) == 1
        group.rounds[0].processes[1].kill()


@pytest.mark.parametrize("which", [0, 1])
def test_a_stop_anywhere_ends_all_in_good_order(folder: Path, tmp_path: Path, which: int) -> None:
    with launched(tmp_path, [str(folder), *ARGUMENTS], processes=2, restarts=False) as group:
        group.wait_until_ready()
        group.rounds[0].processes[which].terminate()
        assert group.wait_for_codes(0) == [0, 0], group.printed()


def test_processes_must_be_started_alike(folder: Path, tmp_path: Path) -> None:
    own = {1: ["--page-size", "32"]}
    with launched(tmp_path, [str(folder), *ARGUMENTS], processes=2, own=own, restarts=False) as group:
        deadline = time.monotonic() + 300
        while group.rounds[0].codes is None:
            assert time.monotonic() < deadline, group.printed()
            time.sleep(0.1)
        assert group.rounds[0].codes == [1, 1]
        assert "--page-size is 16 on process 0 and 32 on process 1" in group.printed()
