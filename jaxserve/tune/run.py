"""The search for each objective, what is saved of it, and how it reads."""

from __future__ import annotations

import dataclasses
import datetime
import functools
import os
import socket
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jaxserve import tuned
from jaxserve.config import EngineOptions
from jaxserve.tune.measure import Bench, Load
from jaxserve.tune.options import TuneOptions
from jaxserve.tune.search import Objective, Result, Search, Settings, Trial, Unfit

Found = dict[str, Any]  # of one objective, as it is saved


def tune(
    model: str | None, options: TuneOptions, say: Callable[[str], None] = lambda line: None
) -> dict[Objective, tuple[Found, Path | None]]:
    """What was found for each objective, and the file that it is saved in; None where no setting keeps within
    `--max-gap-ms`, which is not saved.

    Raises OSError and ValueError (Unfit's reason among them) for what cannot be measured or written.
    """
    begin = time.monotonic()
    busy = os.getloadavg()[0]
    if busy > 0.25 * (os.cpu_count() or 1):
        say(f"warning: other work runs on this machine (load average {busy:.1f}); it moves the figures")
    load = Load(options.input_tokens, options.output_tokens)
    bench = Bench(model, options.engine(), load, say=say)
    found: dict[Objective, tuple[Found, Path | None]] = {}
    for left, objective in zip((2, 1)[-len(options.objectives) :], options.objectives, strict=True):
        started = time.monotonic()
        search = Search(
            functools.partial(bench.measure, objective),
            objective,
            defaults(objective),
            seconds=(options.seconds - (started - begin)) / left,
            max_gap=None if options.max_gap_ms is None else options.max_gap_ms / 1e3,
            say=say,
        )
        try:
            result = search.run()
        except Unfit as reason:
            raise ValueError(str(reason)) from reason
        record = describe(result) | {
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "machine": socket.gethostname(),
            "load_average_before": round(busy, 2),
            "load": dataclasses.asdict(bench.load),
            "seconds": round(time.monotonic() - started, 1),
        }
        file = None
        if result.best is not None:
            file = tuned.save(bench.loaded.name, bench.facts(), objective, record)
        found[objective] = record, file
    return found


def defaults(objective: Objective) -> Settings:
    """What the engine takes where nobody said and nothing was measured."""
    options = EngineOptions(objective=objective)
    return Settings(options.slots, options.chunk_tokens, options.page_tokens)


def describe(result: Result) -> Found:
    """A result in JSON; `values` only where there is a best setting."""
    record: Found = {
        "max_gap_ms": None if result.max_gap is None else round(1e3 * result.max_gap, 3),
        "began_with": _figures(result, result.base),
        "confirmed": result.confirmed,
        "tried": [_trial(trial) for trial in result.trials],
        "not_tried": [dataclasses.asdict(settings) for settings in result.untried],
    }
    if result.best is not None:
        record = _figures(result, result.best) | record
    return record


def _figures(result: Result, settings: Settings) -> Found:
    """As measured last; only the setting itself where it does not run."""
    measured = result.last(settings)
    if measured is None:
        return {"values": dataclasses.asdict(settings)}
    return {
        "values": dataclasses.asdict(settings),
        "tokens_per_second": round(measured.rate, 1),
        "gap_ms": round(1e3 * measured.gap, 3),
    }


def _trial(trial: Trial) -> Found:
    if trial.measured is None:
        return {**dataclasses.asdict(trial.settings), "skipped": trial.skipped}
    return {
        **dataclasses.asdict(trial.settings),
        "tokens_per_second": [round(rate, 1) for rate in trial.measured.rates],
        "gap_ms": [round(1e3 * gap, 3) for gap in trial.measured.gaps],
        "start_seconds": round(trial.measured.start, 2),
        "seconds": round(trial.measured.seconds, 2),
    }


def text(objective: Objective, found: Found, file: Path | None) -> str:
    """A table of what was tried, and what became of it."""
    lines = [f"{'':<12}{'slots':>6}{'chunk':>7}{'page':>6}{'tokens/s':>12}{'least to most':>18}{'gap':>12}"]
    for one in found["tried"]:
        sizes = f"{objective:<12}{one['max_slots']:>6}{one['prefill_chunk']:>7}{one['page_size']:>6}"
        if "skipped" in one:
            lines.append(f"{sizes}  skipped: {one['skipped']}")
            continue
        rates, gaps = one["tokens_per_second"], one["gap_ms"]
        spread = f"{min(rates):,.0f} to {max(rates):,.0f}"
        lines.append(
            f"{sizes}{statistics.median(rates):>12,.0f}{spread:>18}{statistics.median(gaps):>9.1f} ms"
        )
    began = found["began_with"]
    if file is None:
        lines.append(
            f"{objective}: no setting that was tried has gaps of at most {found['max_gap_ms']:g} ms;"
            " nothing is saved. Raise --max-gap-ms"
        )
        return "\n".join(lines)
    best = Settings(**found["values"])
    bound = "" if found["max_gap_ms"] is None else f" (at most {found['max_gap_ms']:.1f})"
    figures = f"{found['tokens_per_second']:,.0f} tokens/s, gap {found['gap_ms']:.1f} ms{bound}"
    if found["values"] == began["values"]:
        lost = ", since what looked better was not when measured again" if found["confirmed"] is False else ""
        lines.append(f"{objective}: {best}, as it began{lost}: {figures}")
    else:
        gain = found["tokens_per_second"] / began["tokens_per_second"] - 1
        before = Settings(**began["values"])
        lines.append(f"{objective}: {best}: {figures}; {gain:+.0%} over {before}")
    if found["not_tried"]:
        others = "; ".join(str(Settings(**one)) for one in found["not_tried"])
        lines.append(f"{objective}: for lack of time not tried: {others}")
    lines.append(f"{objective}: saved in {file}")
    return "\n".join(lines)
