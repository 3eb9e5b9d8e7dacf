"""A process that renders chat templates, and may hang or die of it: see `renderers.py`.

Templates run in jinja2's immutable sandbox, with the names that
`transformers.utils.chat_template_utils` gives them and no others. Imports nothing of ours: it runs as a file.
"""

from __future__ import annotations

import contextlib
import datetime
import functools
import json
import resource
import sys
from collections.abc import Mapping
from typing import Any

import jinja2
import jinja2.exceptions
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox
import jinja2.utils

MEMORY_BYTES = 2**30  # of data, beyond what the process holds when it begins
MAX_CHARACTERS = 32 * 2**20  # of a rendered prompt


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


def _strftime_now(format: str, *, now: float | None = None) -> str:
    time = datetime.datetime.now() if now is None else datetime.datetime.fromtimestamp(now)
    return time.strftime(format)


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


def _render(source: str, names: Mapping[str, Any], now: float | None) -> list[str | None]:
    """[text, None], or [None, why there is none]. now: the time, where it is to be another than it is."""
    if now is not None:
        names = {**names, "strftime_now": functools.partial(_strftime_now, now=now)}
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
        print(json.dumps(_render(*json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
