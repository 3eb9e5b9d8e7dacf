"""`jaxserve serve`: a model behind OpenAI's HTTP API."""

from __future__ import annotations

import dataclasses
import signal
from collections.abc import Mapping, Sequence
from typing import NoReturn

from jaxserve.cli.arguments import parse, wrong_use
from jaxserve.cli.main import DONE, FAILED
from jaxserve.config import EngineOptions, GroupOptions, ServerOptions
from jaxserve.protocols import EngineLike
from sharding.distributed import Group, Place


@dataclasses.dataclass(frozen=True, slots=True)
class ServeArguments:
    """The command line.

    model: a local folder (Hugging Face layout) or a hub id; none means the embedded model.
    dry_run: print the programs, the page pool and what fits, and stop.
    """

    model: str | None = dataclasses.field(default=None, metadata={"positional": True})
    engine: EngineOptions = dataclasses.field(default_factory=EngineOptions)
    server: ServerOptions = dataclasses.field(default_factory=ServerOptions)
    group: GroupOptions = dataclasses.field(default_factory=GroupOptions)
    dry_run: bool = False


def run(args: Sequence[str], environ: Mapping[str, str]) -> int:
    arguments = parse(
        ServeArguments, "jaxserve serve", "Serve a model over OpenAI's HTTP API.", args, environ
    )
    from jaxserve.server import auth
    from jaxserve.server.run import Say, serve, stderr

    place = arguments.group.place()
    if arguments.dry_run:
        if place is not None:
            wrong_use("--dry-run says what one process would do, and these flags start one of several")
        return dry_run(arguments)
    try:
        auth.load_keys(arguments.server)
    except ValueError as error:
        wrong_use(str(error))

    if place is not None and not place.leads:
        follow(arguments, place)
    group = None if place is None else Group(place)

    def build(say: Say) -> tuple[EngineLike, str]:
        from jaxserve.build import build_serving, model_name  # imports jax: after the port is bound

        name = arguments.server.served_model_name or model_name(arguments.model)
        if group is None:
            return build_serving(arguments.model, arguments.engine, progress=say), name
        try:
            group.start()
            return build_serving(arguments.model, arguments.engine, progress=say, group=group), name
        except BaseException as error:
            group.abandon(f"{error or type(error).__name__}")
            raise

    return serve(arguments.server, build, stderr, group)


def follow(arguments: ServeArguments, place: Place) -> NoReturn:
    """Any process but the first: no HTTP. Ends with process 0, or with 1 when the group has failed.

    SIGTERM and SIGINT ask process 0 to stop, so that requests may end; the second one ends this process.
    """
    from jaxserve.server.run import ENDS, exit_now, stderr

    def say(line: str) -> None:
        stderr(f"process {place.process}: {line}")

    def lost(reason: str) -> None:
        say(f"error: {reason}; {ENDS}")
        exit_now(FAILED)

    group = Group(place, lost)

    def stop(number: int, frame: object) -> None:
        signal.signal(number, signal.SIG_DFL)
        say("asking process 0 to stop; once more ends this process at once")
        group.request_stop()

    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Python's own handler would wait until the group is whole
    try:
        from jaxserve.build import run_follower

        say(f"joining {place.coordinator}; process 0 answers HTTP")
        group.start()
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, stop)
        run_follower(arguments.model, arguments.engine, group, progress=say)
        group.close()
    except (OSError, ValueError, RuntimeError, MemoryError, ImportError) as error:
        group.abandon(f"{error or type(error).__name__}")
        say(f"error: {error}")
        exit_now(FAILED)
    say("process 0 has closed the group")
    exit_now(DONE)


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
