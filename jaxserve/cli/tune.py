"""`jaxserve tune`: slots, chunk and page sizes for a model on this machine, measured and kept."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from jaxserve.cli.arguments import parse
from jaxserve.cli.main import DONE, FAILED
from jaxserve.cli.terminal import say
from jaxserve.tune.options import TuneOptions

TEXT = (
    "Measure with which --max-slots, --prefill-chunk and --page-size a model runs best on this machine, and"
    " keep them: `serve`, `generate`, `chat` and LLM then take them for this model, where no flag says"
    " otherwise and without --reproducible. --no-tuned leaves them out; deleting the file that is named"
    " undoes it."
)


@dataclasses.dataclass(frozen=True, slots=True)
class TuneArguments:
    """The command line.

    model: a local folder (Hugging Face or Orbax layout), an fsspec URL or a hub id; none means the embedded
        model.
    """

    model: str | None = dataclasses.field(default=None, metadata={"positional": True})
    options: TuneOptions = dataclasses.field(default_factory=TuneOptions)


def run(args: Sequence[str], environ: Mapping[str, str]) -> int:
    arguments = parse(TuneArguments, "jaxserve tune", TEXT, args, environ)
    from jaxserve.tune.run import text, tune

    try:
        found = tune(arguments.model, arguments.options, say)
    except (OSError, ValueError, RuntimeError, MemoryError) as error:
        say(f"error: {error}")
        return FAILED
    for objective, (record, file) in found.items():
        print(text(objective, record, file))
    return DONE if all(file is not None for _, file in found.values()) else FAILED
