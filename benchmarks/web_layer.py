"""What HTTP costs: the same load through `LLM` and through streams, and where the web layer itself saturates.

    python -m benchmarks.web_layer [--quick] [--rounds 3] [--clients 64] [--requests 128] [--cores shared]

One process holds the engine (a random Llama of SmolLM-135M's shape) and the server over it; the clients are
one process more, with plain sockets, on a core of its own. `engine`: tokens per second of `--requests`
prompts, `--clients` at a time, by streams and by as many threads that call `LLM.generate`, alternating; who
begins changes from round to round. Beside them `LLM at once`: one call that has all the prompts, so that a
slot that is left has its next prompt in the same step, as it cannot be where somebody has to hear first that
the last one ended. `web`: an engine that computes nothing stands behind the server, and requests of one token
and streams of many come as fast as they are answered. A table to stderr, one JSON line to stdout.
"""

from __future__ import annotations

import argparse
import asyncio
import collections
import contextlib
import json
import os
import queue
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.peers import machine
from benchmarks.peers.weights import SMOLLM_135M, TINY, write_model
from jaxserve.engine.outputs import Output, Sink
from jaxserve.scheduler.types import Finish, Limits, Request, SlotView, StructuredOutputs

ROOT = Path(__file__).resolve().parent.parent
MODEL = "web-layer"
AIM = 0.95
WORD = " token"


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


# --- the clients, in a process of their own ---------------------------------------------------------------


async def one_request(port: int, path: str, body: bytes) -> tuple[int, float, float]:
    """(bytes of the reply, seconds to its first event, seconds to its end). Raises ValueError."""
    begin = time.perf_counter()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
        head += f"Content-Length: {len(body)}\r\n\r\n"
        writer.write(head.encode() + body)
        start = await reader.readuntil(b"\r\n\r\n")
        if not start.startswith(b"HTTP/1.1 200"):
            raise ValueError((start + await reader.read(500)).decode(errors="replace"))
        first, size, last = None, 0, b""
        while part := await reader.read(2**18):
            first = first or time.perf_counter() - begin
            size += len(part)
            last = (last + part)[-64:]
        if b"[DONE]" not in last and not last.endswith(b"}"):
            raise ValueError(f"the reply ended with {last!r}")
        return size, first or 0.0, time.perf_counter() - begin
    finally:
        writer.close()


async def load(task: dict[str, Any]) -> dict[str, Any]:
    """All bodies of `task`, `clients` at a time."""
    bodies = iter(task["bodies"])
    firsts, sizes = [], []

    async def client() -> None:
        for body in bodies:
            size, first, _ = await one_request(task["port"], task["path"], json.dumps(body).encode())
            firsts.append(first)
            sizes.append(size)

    begin, cpu = time.perf_counter(), time.process_time()
    await asyncio.gather(*(client() for _ in range(task["clients"])))
    seconds = time.perf_counter() - begin
    return {
        "seconds": seconds,
        "bytes": sum(sizes),
        "first_ms": round(statistics.median(firsts) * 1e3, 1),
        "client_cpu": round((time.process_time() - cpu) / seconds, 3),
    }


def client_process() -> None:
    """A task a line on stdin, a result a line on stdout."""
    for line in sys.stdin:
        try:
            print(json.dumps(asyncio.run(load(json.loads(line)))), flush=True)
        except (OSError, ValueError, asyncio.IncompleteReadError) as error:
            print(json.dumps({"error": f"{type(error).__name__}: {error}"}), flush=True)


class Clients:
    def __init__(self, cores: set[int] | None) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.web_layer", "--as-clients"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
        )
        if cores:
            os.sched_setaffinity(self._process.pid, cores)

    def run(self, port: int, path: str, clients: int, bodies: list[dict[str, Any]]) -> dict[str, Any]:
        assert self._process.stdin is not None and self._process.stdout is not None
        task = {"port": port, "path": path, "clients": clients, "bodies": bodies}
        self._process.stdin.write(json.dumps(task) + "\n")
        self._process.stdin.flush()
        result: dict[str, Any] = json.loads(self._process.stdout.readline())
        if "error" in result:
            raise RuntimeError(f"a client failed: {result['error']}")
        return result

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(10)


# --- an engine that computes nothing ----------------------------------------------------------------------


class Words:
    """A tokenizer to which every token is the same word."""

    vocab_size = 1000
    bos_token_id = None
    eos_token_ids = ()
    special_ids: frozenset[int] = frozenset()
    has_chat_template = True
    chat_template_source = "{{ messages }}"

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        return [1] * max(1, len(text) // 6)

    def decode(self, ids: Any, *, skip_special_tokens: bool = True) -> str:
        return WORD * len(ids)

    def token_text(self, token_id: int) -> str:
        return WORD

    def token_bytes(self, token_id: int) -> bytes:
        return WORD.encode()

    def token_id(self, text: str) -> int | None:
        return 1 if text == WORD else None

    def apply_chat_template(
        self, messages: Any, *, add_generation_prompt: bool = True, **more: Any
    ) -> list[int]:
        return [1] * 8


class Hollow:
    """The engine's form over nothing: a token for each sequence and step; `pace`: seconds between steps."""

    def __init__(self, pace: float) -> None:
        self.limits = Limits(vocab_size=1000, max_model_len=100_000, pool_tokens=10**9)
        self.tokenizer: Any = Words()
        self.facts: dict[str, Any] = {}
        self.healthy, self.failure, self.stuck = True, None, None
        self.pace = pace
        self._inbox: queue.SimpleQueue[tuple[Request, Sink] | None] = queue.SimpleQueue()
        self._gone: set[str] = set()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def compile_grammar(self, wanted: StructuredOutputs) -> Any:
        return None

    def slots(self) -> list[SlotView]:
        return []

    def submit(self, *requests: tuple[Request, Sink]) -> None:
        for one in requests:
            self._inbox.put(one)

    def abort(self, request_id: str) -> None:
        self._gone.add(request_id)

    def stats(self) -> dict[str, Any]:
        return {"pages_used": 0, "pages_total": 1}

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        self._inbox.put(None)
        self._thread.join(10)

    def _run(self) -> None:
        running: list[list[Any]] = []  # request, sink, tokens left
        while True:
            while not running or not self._inbox.empty():
                one = self._inbox.get()
                if one is None:
                    return
                running.append([*one, one[0].max_total_tokens - len(one[0].prompt_token_ids)])
            for row in running:
                request, sink, left = row
                row[2] = left - 1
                finish = Finish.LENGTH if left == 1 else None
                sink(Output(request.request_id, 0, [1], WORD, finish_reason=finish))
            running = [row for row in running if row[2] and row[0].request_id not in self._gone]
            if self.pace:
                time.sleep(self.pace)
            elif running:
                time.sleep(0)  # lets the event loop's thread have its turn


# --- both behind the server -------------------------------------------------------------------------------


class Served:
    """The server over an engine, on a thread of this process."""

    def __init__(self, engine: Any) -> None:
        from jaxserve.config import ServerOptions
        from jaxserve.server.holder import EngineHolder
        from jaxserve.server.run import Server, bind

        self._folder = tempfile.TemporaryDirectory(prefix="web_layer-")
        holder = EngineHolder()
        options = ServerOptions(data_dir=self._folder.name, log_level="info", port=0)
        self._server = Server(holder, (), options)
        listener = bind("127.0.0.1", 0)
        self.port: int = listener.getsockname()[1]
        self._thread = threading.Thread(
            target=lambda: asyncio.run(self._server.serve(sockets=[listener])), daemon=True
        )
        self._thread.start()
        while not self._server.started:
            time.sleep(0.01)
        holder.set_engine(engine, MODEL)

    def close(self) -> None:
        self._server.should_exit = True
        self._thread.join(20)
        self._folder.cleanup()


def completion(prompt: list[int] | str, tokens: int, *, stream: bool = True) -> dict[str, Any]:
    body = {"model": MODEL, "prompt": prompt, "max_tokens": tokens, "temperature": 0, "ignore_eos": True}
    return body | {"stream": stream}


def chat(tokens: int) -> dict[str, Any]:
    body = completion("", tokens) | {"messages": [{"role": "user", "content": "hello"}]}
    del body["prompt"]
    return body


def compare(options: argparse.Namespace, clients: Clients) -> dict[str, Any]:
    """The engine through `LLM` and through HTTP."""
    import jax

    from jaxserve import LLM, SamplingParams

    shape = TINY if options.quick else SMOLLM_135M
    with tempfile.TemporaryDirectory(prefix="web_layer-") as folder:
        write_model(Path(folder), shape)
        llm = LLM(folder, max_slots=options.clients, max_queued=4096, tuned=False, progress=say)
        served = Served(llm.engine)
        rng = np.random.default_rng(0)
        params = SamplingParams(temperature=0.0, max_tokens=options.new_tokens, ignore_eos=True)
        total = options.requests * options.new_tokens
        rates: dict[str, list[float]] = {"LLM": [], "HTTP": [], "LLM at once": []}
        streams: list[dict[str, Any]] = []

        def by_threads(prompts: list[list[int]]) -> float:
            left, counts = collections.deque(prompts), list[int]()

            def caller() -> None:
                with contextlib.suppress(IndexError):
                    while True:
                        [one] = llm.generate(left.popleft(), params)
                        counts.append(len(one.outputs[0].token_ids))

            threads = [threading.Thread(target=caller) for _ in range(options.clients)]
            begin = time.perf_counter()
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            seconds = time.perf_counter() - begin
            if sum(counts) != total:
                raise RuntimeError("LLM gave fewer tokens than were asked for")
            return seconds

        def at_once(prompts: list[list[int]]) -> float:
            begin = time.perf_counter()
            results = llm.generate(prompts, params)
            seconds = time.perf_counter() - begin
            if sum(len(one.outputs[0].token_ids) for one in results) != total:
                raise RuntimeError("LLM gave fewer tokens than were asked for")
            return seconds

        def by_http(prompts: list[list[int]]) -> float:
            before = llm.stats()["generation_tokens_total"]
            bodies = [completion(prompt, options.new_tokens) for prompt in prompts]
            result = clients.run(served.port, "/v1/completions", options.clients, bodies)
            if llm.stats()["generation_tokens_total"] - before != total:
                raise RuntimeError("HTTP gave fewer tokens than were asked for")
            streams.append(result)
            return float(result["seconds"])

        ways = {"LLM": by_threads, "HTTP": by_http, "LLM at once": at_once}
        for round_ in range(-1, options.rounds):  # the first warms both up
            for name in list(ways)[:: 1 if round_ % 2 else -1]:
                prompts = rng.integers(shape.vocab, size=(options.requests, options.prompt_tokens)).tolist()
                rate = total / ways[name](prompts)
                if round_ >= 0:
                    rates[name].append(round(rate, 1))
                say(f"round {round_ + 1} {name}: {rate:.1f} tok/s")
        served.close()
        device, dtype = jax.devices()[0].device_kind, llm.stats()["dtype"]
        llm.close()
    ratios = [http / llm for http, llm in zip(rates["HTTP"], rates["LLM"], strict=True)]
    return {
        "tokens_per_second": {name: {"median": statistics.median(v), "all": v} for name, v in rates.items()},
        "http_over_llm": {
            "median": round(statistics.median(ratios), 4),
            "all": [round(r, 4) for r in ratios],
        },
        "streams": streams[1:],
        "device": device,
        "dtype": dtype,
        "jax": jax.__version__,
    }


def saturate(options: argparse.Namespace, clients: Clients) -> list[dict[str, Any]]:
    """Rates at which the web layer itself is the limit, and its processor time per request or token."""
    scale = 1 if options.quick else 8
    requests, tokens = 250 * scale, 50 * scale
    rows = []
    cases: tuple[tuple[str, str, float, Callable[[], dict[str, Any]], int, int], ...] = (
        ("whole, 1 token", "completions", 0.0, lambda: completion("a", 1, stream=False), requests, 1),
        ("stream, 1 token", "completions", 0.0, lambda: completion("a", 1), requests, 1),
        ("chat stream, 1 token", "chat/completions", 0.0, lambda: chat(1), requests, 1),
        ("long streams", "completions", 0.0, lambda: completion("a", tokens), options.clients, tokens),
        ("long chat streams", "chat/completions", 0.0, lambda: chat(tokens), options.clients, tokens),
        ("paced streams", "completions", 0.05, lambda: completion("a", tokens), options.clients, tokens),
    )
    for name, path, pace, body, count, each in cases:
        engine = Hollow(pace)
        engine.start()
        served = Served(engine)
        bodies = [body() for _ in range(count)]
        clients.run(served.port, f"/v1/{path}", options.clients, bodies[: options.clients])  # warm
        cpu = time.process_time()
        result = clients.run(served.port, f"/v1/{path}", options.clients, bodies)
        cpu = time.process_time() - cpu
        served.close()
        engine.close()
        busy = {"server": cpu / result["seconds"], "clients": result["client_cpu"]}
        most = max(busy, key=busy.__getitem__)
        rows.append(
            {
                "case": name,
                "requests_per_second": round(count / result["seconds"], 1),
                "tokens_per_second": round(count * each / result["seconds"], 1),
                "server_cpu": round(busy["server"], 3),
                "server_cpu_us_per_token": round(cpu / (count * each) * 1e6, 1),
                "client_cpu": result["client_cpu"],
                "limit": most if busy[most] > 0.75 else "the pace" if pace else "neither",
                "bytes_per_token": round(result["bytes"] / (count * each)),
            }
        )
        say(str(rows[-1]))
    return rows


def print_table(report: dict[str, Any]) -> None:
    engine = report["engine"]
    rates = engine["tokens_per_second"]
    share = engine["http_over_llm"]["median"]
    say(f"{'':24}{'tok/s':>10}{'all':>30}")
    for name, rate in rates.items():
        say(f"{name:24}{rate['median']:>10.1f}{rate['all']!s:>30}")
    say(f"HTTP reaches {share:.1%} of LLM; aim {AIM:.0%}: {'held' if share >= AIM else 'MISSED'}")
    say(f"{'web layer alone':24}{'requests/s':>12}{'tok/s':>10}{'CPU us/tok':>12}  limit")
    for row in report["web"]:
        say(
            f"{row['case']:24}{row['requests_per_second']:>12}{row['tokens_per_second']:>10}"
            f"{row['server_cpu_us_per_token']:>12}  {row['limit']}"
        )
    say(f"limit: {report['limit']}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--clients", type=int, default=64, help="at a time; also the slots")
    parser.add_argument("--requests", type=int, default=None, help="default 128 (2 x clients with --quick)")
    parser.add_argument("--prompt-tokens", type=int, default=None, help="default 128 (16 with --quick)")
    parser.add_argument("--new-tokens", type=int, default=None, help="default 64 (16 with --quick)")
    parser.add_argument("--cores", choices=("apart", "shared"), default="apart")
    parser.add_argument("--quick", action="store_true", help="a tiny model, to try the script")
    parser.add_argument("--as-clients", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.as_clients:
        client_process()
        return
    options.requests = options.requests or (2 * options.clients if options.quick else 128)
    options.prompt_tokens = options.prompt_tokens or (16 if options.quick else 128)
    options.new_tokens = options.new_tokens or (16 if options.quick else 64)
    before = machine.idle_check()
    cores = sorted(os.sched_getaffinity(0))
    theirs = {cores[-1]} if options.cores == "apart" and len(cores) > 1 else None
    if theirs:
        os.sched_setaffinity(0, set(cores) - theirs)  # before jax counts the cores
    clients = Clients(theirs)
    try:
        web = saturate(options, clients)
        engine = compare(options, clients)
    finally:
        clients.close()
    report = {
        "benchmark": "web_layer",
        "quick": options.quick,
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "model": "tiny" if options.quick else "smollm-135m shape",
        "clients": options.clients,
        "requests": options.requests,
        "prompt_tokens": options.prompt_tokens,
        "new_tokens": options.new_tokens,
        "rounds": options.rounds,
        "cores": {
            "server": len(cores) - len(theirs or ()),
            "clients": len(theirs or cores),
            "apart": bool(theirs),
        },
        "aim": AIM,
        "engine": engine,
        "web": web,
        "limit": "the engine shares its interpreter with the event loop: one Python thread at a time"
        + (", and all of it has one core" if theirs and len(cores) == 2 else ""),
        "commit": machine.commit(ROOT),
        "machine": machine.describe() | {"before": before},
    }
    print_table(report)
    print(json.dumps(report))


if __name__ == "__main__":
    main()
