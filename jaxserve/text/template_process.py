"""A process that renders chat templates, and may hang or die of it.

A template is a program that came with a model, and even a good one may take long over what a client sends.
Its loops could be counted; one operation that runs for minutes, or a list that holds itself twice sixty times
over, could not. So the parent writes a line of JSON and reads one; where none comes in time, or the process
is gone, the render is refused and the next one gets a new process.

Inside, templates run in jinja2's immutable sandbox, with the names that
`transformers.utils.chat_template_utils` gives them and no others. Imports nothing of ours: it runs as a file.
"""

from __future__ import annotations

import contextlib
import datetime
import functools
import json
import os
import resource
import select
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Mapping
from typing import Any

import jinja2
import jinja2.exceptions
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox
import jinja2.utils

RENDER_SECONDS = 2.0
START_SECONDS = 60.0
MEMORY_BYTES = 2**30  # of data, beyond what the process holds when it begins
MAX_CHARACTERS = 32 * 2**20  # of a rendered prompt
PROCESSES = 4


class RenderError(ValueError):
    """Why there is no prompt: the template's own words, or that it took too much."""


class Renderers:
    """The parent's end: a few processes, made when they are needed. Any thread may ask."""

    def __init__(self, limit: int = PROCESSES, *, seconds: float = RENDER_SECONDS) -> None:
        self.seconds = seconds
        self._places = threading.Semaphore(limit)
        self._free: list[subprocess.Popen[bytes]] = []
        self._lock = threading.Lock()
        self._finalizer = weakref.finalize(self, _end_all, self._free)

    def render(self, source: str, names: Mapping[str, Any]) -> str:
        """The text that the template makes of these variables, which JSON must be able to hold.

        Blocks, at most for `seconds` once it has a process. Raises RenderError.
        """
        try:
            job = json.dumps([source, names]).encode() + b"\n"
        except (TypeError, ValueError, RecursionError) as error:
            raise RenderError(f"the chat template can only be given plain data: {error}") from None
        with self._places:
            with self._lock:
                process = self._free.pop() if self._free else None
            if process is not None and process.poll() is not None:
                _end(process)
                process = None
            if process is None:
                process = _spawn()
            try:
                answer = self._ask(process, job)
            except BaseException:
                _end(process)
                raise
            with self._lock:
                self._free.append(process)
        text, refusal = json.loads(answer)
        if refusal is not None:
            raise RenderError(refusal)
        assert isinstance(text, str)
        return text

    def close(self) -> None:
        self._finalizer()

    def _ask(self, process: subprocess.Popen[bytes], job: bytes) -> bytes:
        assert process.stdin is not None
        try:
            process.stdin.write(job)
            process.stdin.flush()
            return _line(process, self.seconds)
        except TimeoutError:
            raise RenderError(f"the chat template takes longer than {self.seconds:g} s") from None
        except (OSError, EOFError):
            raise RenderError("the chat template fails: it takes too much memory, or is too deep") from None


@functools.cache
def shared() -> Renderers:
    """This program's."""
    return Renderers()


def _spawn() -> subprocess.Popen[bytes]:
    # -S: what may be imported is what the parent may import, without looking for it again
    process = subprocess.Popen(
        [sys.executable, "-P", "-S", __file__],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        start_new_session=True,  # Ctrl-C is the parent's matter
    )
    try:
        _line(process, START_SECONDS)
    except (TimeoutError, EOFError):
        _end(process)
        raise RenderError("the process that renders chat templates does not start") from None
    return process


def _line(process: subprocess.Popen[bytes], seconds: float) -> bytes:
    """Raises TimeoutError, and EOFError where the process ended."""
    assert process.stdout is not None
    descriptor = process.stdout.fileno()
    poll = select.poll()  # select() takes no descriptor beyond 1,024, which a server's may be
    poll.register(descriptor, select.POLLIN)
    end = time.monotonic() + seconds
    parts: list[bytes] = []
    while not (parts and parts[-1].endswith(b"\n")):
        if not poll.poll(max(0.0, end - time.monotonic()) * 1000):
            raise TimeoutError
        part = os.read(descriptor, 2**20)
        if not part:
            raise EOFError
        parts.append(part)
    return b"".join(parts)


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    for pipe in (process.stdin, process.stdout):
        with contextlib.suppress(OSError):
            pipe and pipe.close()
    process.wait()


def _end_all(processes: list[subprocess.Popen[bytes]]) -> None:
    while processes:
        _end(processes.pop())


# --- what templates see ----------------------------------------------------------------------------------


class _Generation(jinja2.ext.Extension):
    """`{% generation %}` marks the assistant's words for training; here its body is simply rendered."""

    tags = {"generation"}  # noqa: RUF012 (jinja2's own declaration)

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_render"), [], [], body).set_lineno(line)

    def _render(self, caller: Any) -> Any:
        return caller()


class _Dict:
    """`dict` for templates: the two calls that they make, without the class and what hangs on it."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


class _Namespace(jinja2.utils.Namespace):
    """`namespace` for templates, without names that Python itself looks up on objects."""

    def __init__(*args: Any, **kwargs: Any) -> None:  # so that `namespace(self=1)` works, as in jinja2
        names = dict(*args[1:], **kwargs)
        for name in names:
            _check_name(name)
        jinja2.utils.Namespace.__init__(args[0], names)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"a namespace cannot hold {name!r}")


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # jinja2's own escapes HTML
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _strftime_now(format: str) -> str:
    return datetime.datetime.now().strftime(format)


def environment() -> jinja2.Environment:
    """To be used for rendering in the process only: elsewhere for parsing."""
    made = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    made.filters["tojson"] = _tojson
    made.globals |= {
        "raise_exception": _raise_exception,
        "strftime_now": _strftime_now,
        "dict": _Dict(),
        "namespace": _Namespace,
    }
    return made


# --- the process -----------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=8)
def _compiled(source: str) -> jinja2.Template:
    return environment().from_string(source)


def _render(source: str, names: Mapping[str, Any]) -> list[str | None]:
    """[text, None], or [None, why there is none]."""
    try:
        text = _compiled(source).render(names)
    except jinja2.TemplateSyntaxError as error:
        return [None, f"the chat template is wrong in line {error.lineno}: {error.message}"]
    except jinja2.TemplateError as error:
        return [None, str(error)[:1000]]
    except Exception as error:  # a template is a program: any operator or filter of it may fail
        return [None, f"{type(error).__name__} in the chat template: {str(error)[:1000]}"]
    if len(text) > MAX_CHARACTERS:
        return [None, f"the chat template makes a prompt of {len(text)} characters; at most {MAX_CHARACTERS}"]
    return [text, None]


def main() -> None:
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    with contextlib.suppress(OSError, ValueError):  # a limit that is lower already stays
        resource.setrlimit(resource.RLIMIT_DATA, (used + MEMORY_BYTES,) * 2)
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    print(flush=True)
    for line in sys.stdin.buffer:
        source, names = json.loads(line)
        print(json.dumps(_render(source, names)), flush=True)


if __name__ == "__main__":
    main()
