"""`jaxserve generate`: continues one prompt, streamed to stdout."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from jaxserve.cli.arguments import parse, wrong_use
from jaxserve.cli.main import DONE, FAILED
from jaxserve.cli.terminal import LoadError, SamplingArguments, load, say, stream, write
from jaxserve.config import EngineOptions
from jaxserve.prompts import encode_text
from jaxserve.scheduler.types import RequestError


@dataclasses.dataclass(frozen=True, slots=True)
class GenerateArguments:
    """The command line.

    model: a local folder (Hugging Face layout) or a hub id; none means the embedded model.
    prompt: the text to continue.
    """

    model: str | None = dataclasses.field(default=None, metadata={"positional": True})
    prompt: str = ""
    sampling: SamplingArguments = dataclasses.field(default_factory=SamplingArguments)
    engine: EngineOptions = dataclasses.field(default_factory=EngineOptions)


def run(args: Sequence[str], environ: Mapping[str, str]) -> int:
    text = "Continue a prompt, streamed to the terminal."
    arguments = parse(GenerateArguments, "jaxserve generate", text, args, environ)
    if not arguments.prompt:
        wrong_use("--prompt is needed: the text to continue")
    try:
        with load(arguments.model, arguments.engine) as llm:
            ids = encode_text(llm.tokenizer, arguments.prompt)
            for piece in stream(llm, ids, arguments.sampling.params(llm.engine.limits.sampling_defaults)):
                write(piece)
            write("\n")
    except (LoadError, RequestError, RuntimeError) as error:
        say(f"error: {error}")
        return FAILED
    return DONE
