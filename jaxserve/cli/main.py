"""`jaxserve COMMAND`: finds the command and hands it the rest of the line.

Commands are imported when they are called, and they import jax when they need it, so that `--help` is
quick. Exit codes: 0 done, 1 failed, 2 wrong use, 3 finished with failed rows.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Mapping, Sequence

import jaxserve
from jaxserve._leaves import check_leaves

DONE, FAILED, WRONG_USE = 0, 1, 2

COMMANDS = {
    "serve": "Serve a model over OpenAI's HTTP API.",
    "generate": "Continue a prompt, streamed to the terminal.",
    "chat": "Talk with a model in the terminal.",
    "convert": "Write a Hugging Face model as an Orbax checkpoint.",
    "plan": "Say what fits on chips that are not here, and how fast it can be.",
    "tune": "Measure which slots, chunk and page sizes suit a model on this machine, and keep them.",
}
# named in the contract, built later: refused by name rather than as unknown
LATER_COMMANDS = ("batch", "score", "embed", "bench")
LATER_FLAGS: tuple[str, ...] = ()


def main(argv: Sequence[str] | None = None, environ: Mapping[str, str] | None = None) -> int:
    """Runs one command and returns the exit code; the command raises SystemExit for `--help`."""
    args = list(sys.argv[1:] if argv is None else argv)
    environ = os.environ if environ is None else environ
    if not args or args[0] in ("-h", "--help"):
        print(usage(), file=sys.stdout if args else sys.stderr)
        return DONE if args else WRONG_USE
    if args[0] == "--version":
        print(jaxserve.__version__)
        return DONE
    command, rest = args[0], args[1:]
    refusal = refuse(command)
    if refusal is not None:
        print(f"error: {refusal}", file=sys.stderr)
        return WRONG_USE
    try:
        check_leaves()
        code: int = importlib.import_module(f"jaxserve.cli.{command}").run(rest, environ)
    except ImportError as error:
        print(f"error: {error}", file=sys.stderr)
        return FAILED
    except KeyboardInterrupt:
        return FAILED
    except BrokenPipeError:  # `jaxserve generate | head`: stdout is gone, which is no error of ours
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    return code


def refuse(command: str) -> str | None:
    """Why there is no such command here."""
    if command in LATER_COMMANDS:
        return f"the command {command!r} is not available yet"
    if command not in COMMANDS:
        return f"there is no command {command!r}; there are: {', '.join(COMMANDS)}"
    return None


def usage() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {text}" for name, text in COMMANDS.items()]
    return "\n".join(
        [
            "usage: jaxserve COMMAND [MODEL] [--flags]",
            "",
            *lines,
            "",
            "MODEL is a local folder (Hugging Face or Orbax layout), an fsspec URL or a hub id;",
            "none means the embedded model.",
            "Flags can be set in the environment too: --max-slots is JAXSERVE_MAX_SLOTS.",
            "`jaxserve COMMAND --help` lists a command's flags; `jaxserve --version` says which this is.",
        ]
    )
