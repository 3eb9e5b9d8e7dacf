"""One parser for all commands: a dataclass in, the same dataclass filled.

A command's dataclass holds its own fields and, as fields that are dataclasses themselves, the options it
shares with others (`EngineOptions`); those are flattened, so that the flag is `--max-slots`. A field's help
is its line in its class's docstring (`name: text`). Precedence: flag, then environment variable
`JAXSERVE_<FLAG>`, then default.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
import sys
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, NoReturn

from jaxserve.cli.main import WRONG_USE

TRUE, FALSE = ("1", "true", "yes", "on"), ("0", "false", "no", "off")


def parse[T](kind: type[T], command: str, text: str, args: Sequence[str], environ: Mapping[str, str]) -> T:
    """The arguments as `kind`. Prints to stderr and exits with 2 where they are wrong; `--help` exits 0.

    command: as the user types it, `jaxserve serve`. text: what it does, for `--help`.
    """
    import tyro

    flat = _flatten(kind)
    from_environment, variables = _environment(flat, environ)
    annotated = dataclasses.make_dataclass(
        "Arguments",
        [(field.name, _annotation(field), dataclasses.field(default=field.default)) for field in flat],
    )
    try:
        # the last of two equal flags counts: the command line comes after the environment
        parsed: Any = tyro.cli(annotated, prog=command, description=text, args=[*from_environment, *args])
    except SystemExit as stop:
        if stop.code == WRONG_USE and variables:
            print(f"from the environment: {', '.join(variables)}", file=sys.stderr)
        raise
    values = {field.name: getattr(parsed, field.name) for field in flat}
    try:
        assembled: T = _assemble(kind, values)
    except ValueError as error:
        wrong_use(str(error))
    return assembled


def wrong_use(message: str) -> NoReturn:
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(WRONG_USE)


def field_docs(kind: type) -> dict[str, str]:
    """Field name -> its text in the class's docstring, the `name: text` lines with what continues them."""
    docs: dict[str, str] = {}
    name = None
    for line in inspect.cleandoc(kind.__doc__ or "").splitlines():
        start = re.match(r"([a-z_]+): (.+)", line)
        if start:
            name = start[1]
            docs[name] = start[2]
        elif name is not None and line.startswith(" "):
            docs[name] += " " + line.strip()
        else:
            name = None
    return docs


@dataclasses.dataclass(frozen=True, slots=True)
class _Field:
    name: str
    type: Any
    default: Any
    text: str
    positional: bool


def _flatten(kind: type) -> list[_Field]:
    hints = typing.get_type_hints(kind)
    docs = field_docs(kind)
    flat = []
    for field in dataclasses.fields(kind):
        if dataclasses.is_dataclass(hints[field.name]):
            flat += _flatten(hints[field.name])
        else:
            flat.append(
                _Field(
                    name=field.name,
                    type=hints[field.name],
                    default=field.default,
                    text=docs.get(field.name, ""),
                    positional=bool(field.metadata.get("positional")),
                )
            )
    return flat


def _assemble(kind: type, values: Mapping[str, Any]) -> Any:
    hints = typing.get_type_hints(kind)
    return kind(
        **{
            field.name: _assemble(hints[field.name], values)
            if dataclasses.is_dataclass(hints[field.name])
            else values[field.name]
            for field in dataclasses.fields(kind)
        }
    )


def _annotation(field: _Field) -> Any:
    import tyro

    repeated = typing.get_origin(field.type) is tuple
    kinds = [one for one in _alternatives(field.type) if one is not type(None)]
    metavar = None
    if field.positional:
        metavar = f"[{field.name.upper()}]"
    elif not repeated and kinds[0] in (int, float, str):
        metavar = {int: "INT", float: "FLOAT", str: "TEXT"}[kinds[0]]
    marks = [tyro.conf.arg(help=field.text, metavar=metavar)]
    if field.positional:
        marks.append(tyro.conf.Positional)
    if repeated:
        marks.append(tyro.conf.UseAppendAction)
    return Annotated[field.type, *marks]


def _alternatives(kind: Any) -> tuple[Any, ...]:
    return typing.get_args(kind) if typing.get_origin(kind) in (typing.Union, types.UnionType) else (kind,)


def _environment(flat: Sequence[_Field], environ: Mapping[str, str]) -> tuple[list[str], list[str]]:
    """The environment's part of the command line, and the variables it came from. An empty one is unset."""
    args, variables = [], []
    for field in flat:
        variable = f"JAXSERVE_{field.name.upper()}"
        value = environ.get(variable, "")
        if field.positional or not value:
            continue
        flag = field.name.replace("_", "-")
        if field.type is bool:
            if value.lower() not in TRUE + FALSE:
                wrong_use(f"{variable}={value!r} must be 1 or 0")
            args.append(f"--{flag}" if value.lower() in TRUE else f"--no-{flag}")
        else:
            args.append(f"--{flag}={value}")
        variables.append(variable)
    return args, variables
