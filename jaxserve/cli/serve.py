"""`jaxserve serve`: a model behind OpenAI's HTTP API."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from jaxserve.cli.arguments import parse, wrong_use
from jaxserve.cli.main import DONE, FAILED
from jaxserve.config import EngineOptions, ServerOptions
from jaxserve.protocols import EngineLike


@dataclasses.dataclass(frozen=True, slots=True)
class ServeArguments:
    """The command line.

    model: a local folder (Hugging Face layout) or a hub id; none means the embedded model.
    dry_run: print the programs, the page pool and what fits, and stop.
    """

    model: str | None = dataclasses.field(default=None, metadata={"positional": True})
    engine: EngineOptions = dataclasses.field(default_factory=EngineOptions)
    server: ServerOptions = dataclasses.field(default_factory=ServerOptions)
    dry_run: bool = False


def run(args: Sequence[str], environ: Mapping[str, str]) -> int:
    arguments = parse(
        ServeArguments, "jaxserve serve", "Serve a model over OpenAI's HTTP API.", args, environ
    )
    from jaxserve.server import auth
    from jaxserve.server.run import Say, serve, stderr

    if arguments.dry_run:
        return dry_run(arguments)
    try:
        auth.load_keys(arguments.server)
    except ValueError as error:
        wrong_use(str(error))

    def build(say: Say) -> tuple[EngineLike, str]:
        from jaxserve.build import build_serving, model_name  # imports jax: after the port is bound

        name = arguments.server.served_model_name or model_name(arguments.model)
        return build_serving(arguments.model, arguments.engine, progress=say), name

    return serve(arguments.server, build, stderr)


def dry_run(arguments: ServeArguments) -> int:
    """What would run, on stdout."""
    from jaxserve.build import dry_run
    from jaxserve.server.run import stderr

    try:
        print(dry_run(arguments.model, arguments.engine, stderr))
    except (OSError, ValueError, RuntimeError, MemoryError) as error:
        stderr(f"error: {error}")
        return FAILED
    return DONE
