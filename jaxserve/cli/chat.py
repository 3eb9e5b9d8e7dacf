"""`jaxserve chat`: a conversation in the terminal.

A line in, a reply streamed out. Ctrl-C stops a reply (what was said of it stays in the conversation),
Ctrl-D ends. Works with piped input too: replies go to stdout, everything else to stderr.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Mapping, Sequence

from jaxserve.cli.arguments import parse
from jaxserve.cli.main import DONE, FAILED
from jaxserve.cli.terminal import LoadError, SamplingArguments, load, say, stream, write
from jaxserve.config import EngineOptions
from jaxserve.llm import LLM
from jaxserve.prompts import encode_chat
from jaxserve.scheduler.types import RequestError, SamplingParams


@dataclasses.dataclass(frozen=True, slots=True)
class ChatArguments:
    """The command line.

    model: a local folder (Hugging Face layout) or a hub id; none means the embedded model.
    system: the conversation's first message, which says how to answer.
    """

    model: str | None = dataclasses.field(default=None, metadata={"positional": True})
    system: str | None = None
    sampling: SamplingArguments = dataclasses.field(default_factory=SamplingArguments)
    engine: EngineOptions = dataclasses.field(default_factory=EngineOptions)


def run(args: Sequence[str], environ: Mapping[str, str]) -> int:
    text = "Talk with a model in the terminal."
    arguments = parse(ChatArguments, "jaxserve chat", text, args, environ)
    try:
        with load(arguments.model, arguments.engine) as llm:
            if llm.tokenizer is None or not llm.tokenizer.has_chat_template:
                say("error: this model has no chat template: use `jaxserve generate`")
                return FAILED
            return converse(
                llm, arguments.system, arguments.sampling.params(llm.engine.limits.sampling_defaults)
            )
    except (LoadError, RuntimeError) as error:
        say(f"error: {error}")
        return FAILED


def converse(llm: LLM, system: str | None, params: SamplingParams) -> int:
    """Reads and answers until the input ends. 1 if a message of piped input could not be answered."""
    interactive = sys.stdin.isatty()
    history = [] if system is None else [{"role": "system", "content": system}]
    code = DONE
    if interactive:
        say("Ctrl-C stops a reply, Ctrl-D ends.")
    while (line := read(interactive)) is not None:
        if not line:
            continue
        history.append({"role": "user", "content": line})
        try:
            reply = answer(llm, history, params)
        except RequestError as error:  # such as a conversation longer than the context
            say(f"error: {error}")
            history.pop()
            code = code if interactive else FAILED
            continue
        history.append({"role": "assistant", "content": reply})
    return code


def read(interactive: bool) -> str | None:
    """The next line, None at the end of the input. Ctrl-C gives up the line that is being typed."""
    while True:
        if interactive:
            sys.stderr.write("> ")
            sys.stderr.flush()
        try:
            line = sys.stdin.readline()
        except KeyboardInterrupt:
            if not interactive:
                raise
            say("")
            continue
        return line.strip() if line else None


def answer(llm: LLM, history: Sequence[Mapping[str, str]], params: SamplingParams) -> str:
    """Streams the reply and returns what was shown of it."""
    said = []
    pieces = stream(llm, encode_chat(llm.tokenizer, history), params)
    try:
        for piece in pieces:
            said.append(piece)
            write(piece)
    except KeyboardInterrupt:
        pieces.close()  # aborts the request
    write("\n")
    return "".join(said)
