"""`jaxserve plan`: what a model needs and can reach on chips that are not here, from its config alone."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from jaxserve.cli.arguments import parse, wrong_use
from jaxserve.cli.main import DONE, FAILED, WRONG_USE
from jaxserve.cli.terminal import say
from jaxserve.plan.options import PlanOptions

TEXT = (
    "Compile a model's prefill and decode for chips that are not here; say whether it fits, how much of it,"
    " and how fast it can be at most. Exits 0 where it does not fit, too: --json says which, under `fits`."
)


@dataclasses.dataclass(frozen=True, slots=True)
class PlanArguments:
    """The command line.

    model: a local folder (Hugging Face or Orbax layout; its config.json is all that is read), or a hub id.
    chips: the slice: v5e-8, v6e-8, v5p:2x2x1 (chips as AxBxC; a cloud's v5p-8 counts cores), h100-1, h100-8.
    json: a file to write the plan to, as JSON.
    plot: a file to draw the plan to, such as plan.png; needs matplotlib, which is in the extra `bench`.
    """

    model: str | None = dataclasses.field(default=None, metadata={"positional": True})
    chips: str | None = None
    options: PlanOptions = dataclasses.field(default_factory=PlanOptions)
    json: str | None = None
    plot: str | None = None


def run(args: Sequence[str], environ: Mapping[str, str]) -> int:
    arguments = parse(PlanArguments, "jaxserve plan", TEXT, args, environ)
    from sharding.topology import parse_slice

    if arguments.chips is None:
        wrong_use("--chips is needed: the slice to plan for, such as v5e-8 or h100-1")
    if arguments.plot is not None and importlib.util.find_spec("matplotlib") is None:
        wrong_use("--plot needs matplotlib: pip install 'jaxserve[bench]'")
    import jax

    jax.config.update("jax_platforms", "cpu")  # an accelerator is not needed, and may be serving
    from checkpoints import huggingface
    from jaxserve.build import read_model
    from jaxserve.plan import report
    from jaxserve.plan.run import CompilerFailed, CompilerMissing, check_slice, plan

    try:
        where = parse_slice(arguments.chips)
        check_slice(where)
    except ValueError as error:
        wrong_use(str(error))
    options = arguments.options
    try:
        loaded = read_model(arguments.model, options.engine())
        result = plan(huggingface.read_config(loaded.folder), loaded.name, where, options, say)
        if arguments.json is not None:
            Path(arguments.json).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        if arguments.plot is not None:
            report.plot(result, Path(arguments.plot))
    except CompilerMissing as error:
        say(f"error: {error}")
        return WRONG_USE
    except (OSError, ValueError, RuntimeError, MemoryError, CompilerFailed) as error:
        say(f"error: {error}")
        return FAILED
    print(report.text(result))
    return DONE
