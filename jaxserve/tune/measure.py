"""What one setting reaches, measured with the engine that would serve with it.

Two figures. The gap: seconds of one step in which every slot but those that are needed decodes, and a whole
chunk of prompts is computed for these. The rate: tokens generated per second in a closed loop, where every
request that ends is followed by another one, and as many wait as run. The loop begins as if it had run for
long: its first requests are of every age, and most of their prompts comes from the prefix cache, so that not
all of them end at once, nor fill the slots for seconds before anything can be counted.
"""

from __future__ import annotations

import dataclasses
import gc
import itertools
import time
from collections.abc import Callable

import jax
import numpy as np
from numpy.typing import NDArray

from jaxserve.build import Loaded, Part, build_engine, read_model, tuned_for
from jaxserve.config import MOST_QUEUED, MOST_QUEUED_TOKENS, EngineOptions
from jaxserve.engine.engine import Engine
from jaxserve.engine.outputs import Output
from jaxserve.engine.programs import device_bytes
from jaxserve.scheduler.types import SamplingParams, check_request
from jaxserve.tune.search import Measured, Objective, Settings, Unfit

REPEATS = 5
SEGMENT_SECONDS = 1.0  # of the closed loop, for each repeat; at least a quarter of the slots end in it
DECODED = 32  # tokens that those who decode during the gap may draw


@dataclasses.dataclass(frozen=True, slots=True)
class Load:
    """Tokens of each request: of its prompt, and generated."""

    input_tokens: int
    output_tokens: int

    def within(self, context: int) -> Load:
        """Cut to a context of so many tokens: generated ones to half of it, prompts to the rest."""
        output = min(self.output_tokens, max(1, context // 2))
        return Load(min(self.input_tokens, context - output), output)


class Bench:
    """Measures one setting after the other; the weights stay on the devices in between.

    options: everything but the sizes that are measured. repeats, seconds: of the loop.
    Raises as `read_model` where there is no such model, and ValueError for a context below DECODED.
    """

    def __init__(
        self,
        model: str | None,
        options: EngineOptions,
        load: Load,
        *,
        repeats: int = REPEATS,
        seconds: float = SEGMENT_SECONDS,
        say: Callable[[str], None] = lambda line: None,
    ) -> None:
        self.loaded: Loaded = read_model(model, options)
        if self.loaded.max_model_len < DECODED:
            raise ValueError(f"a context of {self.loaded.max_model_len} tokens is too short to measure with")
        self.load = load.within(self.loaded.max_model_len)
        self._model = model
        self._options = dataclasses.replace(
            options, tuned=False, max_queued=MOST_QUEUED, max_queued_tokens=MOST_QUEUED_TOKENS
        )
        self._repeats = repeats
        self._seconds = seconds
        self._say = say
        self._said: set[str] = set()
        self._part = Part(full_only=True)

    def measure(self, objective: Objective, settings: Settings) -> Measured:
        """Raises Unfit where the engine cannot be built or run with these sizes."""
        gc.collect()  # the last engine's pool goes before this one's comes
        begin = time.perf_counter()
        options = dataclasses.replace(self._options, objective=objective, **dataclasses.asdict(settings))
        try:
            engine = build_engine(self._model, options, progress=self._tell, part=self._part)
        except (ValueError, MemoryError, jax.errors.JaxRuntimeError) as error:
            raise Unfit(_first_line(error)) from error
        self._keep(engine)
        started = time.perf_counter()
        try:
            gaps = gaps_of(engine, self.load, self._repeats)
            rates = rates_of(engine, self.load, self._repeats, self._seconds)
        except (MemoryError, jax.errors.JaxRuntimeError) as error:
            raise Unfit(_first_line(error)) from error
        finally:
            engine.close()
        return Measured(rates, gaps, started - begin, time.perf_counter() - started)

    def facts(self) -> dict[str, object]:
        """What the figures hold for. After something was measured."""
        return tuned_for(self.loaded, jax.tree.leaves(self._part.params)[0].sharding.mesh)

    def _keep(self, engine: Engine) -> None:
        if self._part.params is None:
            own = device_bytes(engine.params) if jax.default_backend() == "cpu" else 0
            self._part = dataclasses.replace(self._part, params=engine.params, held=own)

    def _tell(self, line: str) -> None:
        """All of what the first engine says, then warnings that are new."""
        if self._part.params is None or (line.startswith("warning") and line not in self._said):
            self._say(line)
        self._said.add(line)


class _Clients:
    """Those who ask. begun: requests that have a token; ended: how many have all."""

    def __init__(self, engine: Engine) -> None:
        self.begun: set[str] = set()
        self.ended = 0
        self._engine = engine
        self._rng = np.random.default_rng(0)
        self._numbers = itertools.count()

    def prompt(self, tokens: int) -> NDArray[np.int64]:
        """i64[tokens], of which the prefix cache knows nothing."""
        return self._rng.integers(self._engine.limits.vocab_size, size=tokens)

    def ask(self, prompt: NDArray[np.int64], new_tokens: int) -> str:
        name = f"tune-{next(self._numbers)}"
        params = SamplingParams(temperature=0.0, max_tokens=new_tokens, ignore_eos=True)
        request = check_request(name, prompt, params, self._engine.limits, time.monotonic())
        self._engine.submit((request, self._take))
        return name

    def _take(self, output: Output) -> None:
        self.begun.add(output.request_id)
        self.ended += output.finish_reason is not None


def gaps_of(engine: Engine, load: Load, repeats: int) -> tuple[float, ...]:
    """Seconds of a step of all slots, in which a whole chunk of prompts comes in; host and device apart, so
    nothing of the one hides behind the other."""
    clients = _Clients(engine)
    slots, chunk, length = engine.facts["slots"], engine.facts["prefill_chunk"], engine.limits.max_model_len
    prompts = min(-(-chunk // (length - 1)), max(1, slots - 1))
    seen = clients.prompt(min(load.input_tokens, max(1, length - DECODED)))
    drawn = min(length - len(seen), DECODED + slots // 2)  # the first of them wait for the last
    decoding = [clients.ask(seen, drawn) for _ in range(slots - prompts)]
    while len(clients.begun) < len(decoding):
        engine.step()
    gaps = []
    for _ in range(1 + repeats):  # the first may still touch new memory
        before = len(clients.begun)
        for _ in range(prompts):
            clients.ask(clients.prompt(min(length - 1, chunk // prompts)), 1)
        steps = []
        while len(clients.begun) < before + prompts:
            steps.append(sum(engine.step_apart()))
        gaps.append(max(steps))
    for name in decoding:
        engine.abort(name)
    while engine.step():
        pass
    return tuple(gaps[1:])


def rates_of(engine: Engine, load: Load, repeats: int, seconds: float) -> tuple[float, ...]:
    """Tokens a second of a closed loop, for each repeat: between ends of requests, so that as many prompts
    are computed as replies are drawn."""
    clients = _Clients(engine)
    slots = engine.facts["slots"]

    def turn() -> bool:
        """One step; whether a request ended in it."""
        before = clients.ended
        engine.step()
        for _ in range(clients.ended - before):
            clients.ask(clients.prompt(load.input_tokens), load.output_tokens)
        return clients.ended > before

    seen = clients.prompt(load.input_tokens + load.output_tokens)
    for i in reversed(range(slots)):
        age = i * load.output_tokens // slots  # tokens that it would have drawn by now
        clients.ask(seen[: load.input_tokens + age], load.output_tokens - age)
        while not clients.begun:  # the oldest leaves its pages to the others
            turn()
    for _ in range(slots):
        clients.ask(clients.prompt(load.input_tokens), load.output_tokens)
    while len(clients.begun) < slots:
        turn()
    while not turn():
        pass
    rates: list[float] = []
    begin, already = time.perf_counter(), clients.ended
    while len(rates) < repeats:
        if not turn():
            continue
        now, ended = time.perf_counter(), clients.ended - already
        if now - begin >= seconds and 4 * ended >= slots:
            rates.append(ended * load.output_tokens / (now - begin))
            begin, already = now, clients.ended
    return tuple(rates)


def _first_line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
