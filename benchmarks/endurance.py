"""Hours of mixed traffic with clients that leave: do memory and file handles stay where they are?

    python -m benchmarks.endurance [MODEL] [--seconds 3600] [--clients 24] [--every 60]

Starts `jaxserve serve` in a process of its own and sends it, from `--clients` connections at a time: streams
and whole replies, interactive and batch work, shared prefixes, several choices, requests with deadlines, bad
ones, and ones whose client leaves before, during or after the first token. One request in eight repeats, for
the response cache. What the process holds is read every `--every` seconds; a line per reading to stderr, one
JSON line to stdout. Exit code 1 if anything but what was asked for came back, or something grew.

Growth is the median of the last quarter of the readings less that of the second quarter: the first quarter is
for caches that fill up.
"""

from __future__ import annotations

import argparse
import asyncio
import collections
import contextlib
import json
import random
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil

from benchmarks.peers import machine

ROOT = Path(__file__).resolve().parent.parent
ARGUMENTS = ["--max-slots", "8", "--max-model-len", "1024", "--response-cache", "4", "--max-queued", "64"]
MOST_MEMORY = 32e6  # bytes that may come on top; what the allocator keeps is not ours to promise to the byte
GAUGES = ("jaxserve_requests_running", "jaxserve_requests_waiting", "jaxserve_kv_pages_used")


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


@contextlib.contextmanager
def server(model: str | None) -> Iterator[tuple[psutil.Process, str]]:
    """The process and its address, once it is ready."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with tempfile.TemporaryFile("w+") as log:
        command = [
            sys.executable,
            "-m",
            "jaxserve",
            "serve",
            *([model] if model else []),
            "--port",
            str(port),
        ]
        process = subprocess.Popen([*command, *ARGUMENTS], stdin=subprocess.DEVNULL, stderr=log, cwd=ROOT)
        url = f"http://127.0.0.1:{port}"
        try:
            while True:
                if process.poll() is not None:
                    log.seek(0)
                    raise SystemExit(f"the server ended:\n{log.read()}")
                with contextlib.suppress(httpx.ConnectError):
                    if httpx.get(f"{url}/ready").status_code == 200:
                        break
                time.sleep(0.2)
            yield psutil.Process(process.pid), url
        finally:
            process.terminate()
            process.wait(60)


class Clients:
    """Sends until `until`; counts what came back."""

    def __init__(self, url: str, seed: int) -> None:
        self._url = url
        self._random = random.Random(seed)
        self.counts: collections.Counter[str] = collections.Counter()
        self.unexpected: list[str] = []

    async def run(self, count: int, until: float) -> None:
        limits = httpx.Limits(max_connections=None)
        # longer than batch work may have to wait
        async with httpx.AsyncClient(base_url=self._url, timeout=1800, limits=limits) as http:
            model = (await http.get("/v1/models")).json()["data"][0]["id"]
            await asyncio.gather(*(self._client(http, model, until) for _ in range(count)))

    async def _client(self, http: httpx.AsyncClient, model: str, until: float) -> None:
        kinds: list[Callable[..., Any]] = [self._whole, self._stream, self._leave, self._bad]
        while time.monotonic() < until:
            kind = self._random.choices(kinds, (3, 4, 4, 1))[0]
            try:
                await kind(http, self._body(model))
            except (httpx.HTTPError, KeyError, ValueError) as error:
                self.unexpected.append(f"{kind.__name__}: {type(error).__name__}: {error}")

    def _body(self, model: str) -> dict[str, Any]:
        draw = self._random
        prompt = draw.choice(("import os\n", "class Page:\n", "def main():\n")) * draw.randint(1, 40)
        body: dict[str, Any] = {"model": model, "prompt": prompt + str(draw.random())}
        body["max_tokens"] = draw.randint(1, 100)
        body["service_tier"] = draw.choice(("default", "flex"))
        body |= draw.choice(({}, {}, {"n": 3}, {"logprobs": 3}, {"stop": ["\n\n"]}, {"timeout": 0.2}))
        if draw.random() < 1 / 8:  # one of a few that repeat: answered from the response cache
            body |= {"prompt": f"x = {draw.randint(0, 9)}", "temperature": 0, "max_tokens": 32}
            body.pop("timeout", None)
        return body

    async def _whole(self, http: httpx.AsyncClient, body: dict[str, Any]) -> None:
        reply = await http.post("/v1/completions", json=body)
        self._count(reply.status_code, body, reply.text)
        if reply.status_code == 200:
            usage = reply.json()["usage"]
            self.counts["tokens"] += usage["completion_tokens"]
            self.counts["response_cached"] += bool(usage.get("response_cached"))

    async def _stream(self, http: httpx.AsyncClient, body: dict[str, Any]) -> None:
        async with http.stream("POST", "/v1/completions", json=body | {"stream": True}) as reply:
            lines = [line async for line in reply.aiter_lines() if line]
        late = "timeout" in body and any("error" in json.loads(line[6:]) for line in lines[-2:-1])
        if reply.status_code == 200 and lines[-1] != "data: [DONE]" and not late:
            self.unexpected.append(f"a stream ended with {lines[-1:]}")
        self._count(reply.status_code, body, lines[-1])

    async def _leave(self, http: httpx.AsyncClient, body: dict[str, Any]) -> None:
        body |= {"max_tokens": 300, "ignore_eos": True, "stream": self._random.random() < 0.7}
        after = self._random.choice((0.0, 0.01, 0.1, 1.0))
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(after), http.stream("POST", "/v1/completions", json=body) as reply:
                async for _ in reply.aiter_raw():
                    pass
        self.counts["left"] += 1

    async def _bad(self, http: httpx.AsyncClient, body: dict[str, Any]) -> None:
        wrong = self._random.choice(({"max_tokens": -1}, {"prompt": [10**9]}, {"surprise": 1}, {"top_p": 7}))
        reply = await http.post("/v1/completions", json=body | wrong)
        if reply.status_code != 400:
            self.unexpected.append(f"{wrong} gave {reply.status_code}")
        self.counts["400"] += 1

    def _count(self, status: int, body: dict[str, Any], text: str) -> None:
        self.counts[str(status)] += 1
        allowed = (200, 429, 408) if "timeout" in body else (200, 429)
        if status not in allowed:
            self.unexpected.append(f"{status}: {text[:200]}")


def reading(process: psutil.Process, url: str, begin: float) -> dict[str, Any]:
    lines = httpx.get(f"{url}/metrics").text.splitlines()
    values = dict(line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
    return {
        "seconds": round(time.monotonic() - begin, 1),
        "memory_mb": round(process.memory_info().rss / 1e6, 1),
        "files": process.num_fds(),
        "threads": process.num_threads(),
        **{name: float(values[name]) for name in GAUGES},
        "tokens": float(values["jaxserve_generation_tokens_total"]),
    }


async def watch(process: psutil.Process, url: str, until: float, every: float) -> list[dict[str, Any]]:
    begin, readings = time.monotonic(), []
    while time.monotonic() + every <= until:
        await asyncio.sleep(every)
        readings.append(await asyncio.to_thread(reading, process, url, begin))
        say(str(readings[-1]))
    return readings


def growth(readings: list[dict[str, Any]], name: str) -> float:
    values, quarter = [row[name] for row in readings], len(readings) // 4
    return statistics.median(values[-quarter:]) - statistics.median(values[quarter : 2 * quarter])


async def measure(process: psutil.Process, url: str, options: argparse.Namespace) -> dict[str, Any]:
    clients, until = Clients(url, seed=0), time.monotonic() + options.seconds
    readings, _ = await asyncio.gather(
        watch(process, url, until, options.every), clients.run(options.clients, until)
    )
    deadline = time.monotonic() + 30
    while True:  # everything that was left behind is let go of
        last = await asyncio.to_thread(reading, process, url, until)
        if not any(last[name] for name in GAUGES) or time.monotonic() > deadline:
            break
        await asyncio.sleep(0.1)
    return {
        "counts": dict(clients.counts),
        "unexpected": clients.unexpected[:20],
        "unexpected_count": len(clients.unexpected),
        "memory_growth_mb": round(growth(readings, "memory_mb"), 1),
        "files_growth": growth(readings, "files"),
        "threads_growth": growth(readings, "threads"),
        "after": last,
        "readings": readings,
    }


def healthy(result: dict[str, Any]) -> bool:
    return (
        not result["unexpected_count"]
        and result["memory_growth_mb"] * 1e6 < MOST_MEMORY
        and result["threads_growth"] <= 0
        and not any(result["after"][name] for name in GAUGES)
        and result["after"]["files"] <= min(row["files"] for row in result["readings"])
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", nargs="?", default=None)
    parser.add_argument("--seconds", type=float, default=3600.0)
    parser.add_argument("--clients", type=int, default=24)
    parser.add_argument("--every", type=float, default=60.0)
    options = parser.parse_args()
    if options.seconds < 8 * options.every:
        parser.error("--seconds must be at least eight times --every")
    with server(options.model) as (process, url):
        result = asyncio.run(measure(process, url, options))
    report = {
        "benchmark": "endurance",
        **vars(options),
        "healthy": healthy(result),
        "result": result,
        "commit": machine.commit(ROOT),
        "machine": machine.describe(),
    }
    print(json.dumps(report))
    sys.exit(0 if report["healthy"] else 1)


if __name__ == "__main__":
    main()
