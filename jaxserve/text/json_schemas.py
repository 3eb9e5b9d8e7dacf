"""A JSON schema made such that what llguidance lets through validates.

Its grammar is a little wider than some schemas (version 1.9): a whole number at an exclusive bound passes as
a `number`, and keys that come twice count twice for `minProperties`. The first are rewritten, so that a
hair's breadth beside the bound is lost; the second refused. Source of the keywords: JSON Schema, draft
2020-12.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

MAPS = frozenset({"properties", "patternProperties", "$defs", "definitions", "dependentSchemas"})
LISTS = frozenset({"allOf", "anyOf", "oneOf", "prefixItems"})
SINGLE = frozenset({"items", "additionalProperties", "additionalItems", "contains", "propertyNames"})
HAIR = 1e-9
OPTIONS = "x-guidance"  # the member of a schema in which llguidance looks for its options
OURS: Mapping[str, Any] = {
    # between JSON's tokens: no reply is filled with blanks
    "whitespace_pattern": r"\x20|\x0A\x20{0,32}|\x0A\x09{0,16}",
    "lenient": False,  # what it does not know is refused
    # no \u: a key that is written another way would not be known for itself
    "json_allowed_escapes": 'nrbtf\\"',
}


class SchemaError(ValueError):
    """A schema that cannot be kept to."""


def compiled_form(schema: Mapping[str, Any] | bool) -> str:
    """The JSON text of `kept` for llguidance, its options included. Raises SchemaError."""
    if schema is False:
        raise SchemaError("the schema false allows nothing")
    try:
        return json.dumps({**kept({} if schema is True else dict(schema)), OPTIONS: OURS})
    except RecursionError:
        raise SchemaError("the schema is too deep") from None


def kept(schema: Any) -> Any:
    """The schema, rewritten where it must be, and without options of the sender's. Raises SchemaError naming
    the keyword."""
    if not isinstance(schema, dict):
        return schema
    made: dict[str, Any] = {}
    for key, value in schema.items():
        if key in MAPS and isinstance(value, dict):
            made[key] = {name: kept(part) for name, part in value.items()}
        elif key in LISTS and isinstance(value, list):
            made[key] = [kept(part) for part in value]
        elif key in SINGLE:
            made[key] = [kept(part) for part in value] if isinstance(value, list) else kept(value)
        elif key != OPTIONS:
            made[key] = value
    reference = schema.get("$ref", "#")
    if isinstance(reference, str) and not _known(reference):
        raise SchemaError(f"$ref: {reference[:64]!r} points to where no schema is looked for")
    _bound(made, "exclusiveMinimum", "minimum", 1)
    _bound(made, "exclusiveMaximum", "maximum", -1)
    least = made.get("minProperties", 0)
    if isinstance(least, int | float) and least > 1 and made.get("additionalProperties") is not False:
        raise SchemaError("minProperties of more than 1 needs additionalProperties: false")
    return made


def _bound(schema: dict[str, Any], exclusive: str, inclusive: str, sign: int) -> None:
    value = schema.get(exclusive)
    kinds = schema.get("type", "number")
    if isinstance(value, bool) or not isinstance(value, int | float):
        return
    if "number" not in (kinds if isinstance(kinds, list) else [kinds]):
        return  # integers are told apart
    inside = value + sign * max(HAIR, HAIR * abs(value))
    if not math.isfinite(inside):
        raise SchemaError(f"{exclusive}: {value} is too large")
    del schema[exclusive]
    other = schema.get(inclusive, inside)
    if isinstance(other, int | float):
        schema[inclusive] = max(inside, other) if sign > 0 else min(inside, other)


def _known(reference: str) -> bool:
    """Whether it points within what is rewritten: its path is one of keywords, each to a schema. Without a
    path it is the whole, or a name or another document, which the compiler finds or refuses itself."""
    steps = iter(reference.partition("#")[2].split("/")[1:])
    before = ""
    for step in steps:
        if step in MAPS | LISTS:
            if next(steps, None) is None:
                return False
        elif step not in SINGLE and not (before in SINGLE and step.isdecimal()):  # one of a list of `items`
            return False
        before = step
    return True
