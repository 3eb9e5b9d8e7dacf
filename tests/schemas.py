"""JSON schemas of growing size, with what real ones have and what odd ones have. Deterministic."""

from __future__ import annotations

import random
from typing import Any

FORMATS = ("date", "date-time", "time", "email", "uuid", "ipv4", "hostname")
PATTERNS = ("^[A-Z]{2,4}-[0-9]{3}$", "^(ab|cd)*$", "[a-f]+", "^\\d{1,3}(\\.\\d{2})?$", '^[^"\\\\]{1,8}$')
WORDS = ("name", "größe", "a b", 'quote"d', "back\\slash", "名前", "", "$ref", "x/y", "new\nline", "emoji😀")


def schemas(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """The i-th is the larger, the greater i is."""
    rng = random.Random(seed)
    return [_top(rng, i, 2 + i * 20 // max(count, 1)) for i in range(count)]


def _top(rng: random.Random, number: int, size: int) -> dict[str, Any]:
    """Replies must be able to end: objects at the top, everything bounded."""
    match number % 10:
        case 0:
            return {"enum": [_value(rng, 2) for _ in range(size)]}
        case 1:
            return {"anyOf": [_object(rng, size, 2), {"type": "null"}, {"const": _value(rng, 2)}]}
        case 2:  # a tree of bounded width, by reference
            node = {
                "type": "object",
                "properties": {
                    "value": {"type": "integer", "minimum": 0, "maximum": 9},
                    "children": {"type": "array", "items": {"$ref": "#/$defs/node"}, "maxItems": 1},
                },
                "required": ["value", "children"],
                "additionalProperties": False,
            }
            return {"$defs": {"node": node}, "$ref": "#/$defs/node"}
        case 3:
            return {
                "type": "array",
                "prefixItems": [_leaf(rng) for _ in range(min(size, 6))],
                "items": False,
                "minItems": min(size, 6),
            }
        case 4:
            return {"allOf": [_object(rng, 2, 1), {"type": "object", "required": ["p0"]}]}
        case _:
            return _object(rng, size, 1 + number % 4)


def _object(rng: random.Random, size: int, depth: int) -> dict[str, Any]:
    names = [f"p{i}" if rng.random() < 0.7 else f"{rng.choice(WORDS)}{i}" for i in range(size)]
    names[0] = "p0"
    properties = {name: _any(rng, depth) for name in names}
    required = [name for name in names if rng.random() < 0.7]
    return {
        "type": "object",
        "properties": properties,
        "required": required,
        "additionalProperties": False,
    }


def _any(rng: random.Random, depth: int) -> dict[str, Any]:
    if depth <= 0 or rng.random() < 0.6:
        return _leaf(rng)
    match rng.randrange(3):
        case 0:
            return _object(rng, 2, depth - 1)
        case 1:
            low = rng.randrange(2)
            return {
                "type": "array",
                "items": _any(rng, depth - 1),
                "minItems": low,
                "maxItems": low + rng.randrange(3),
            }
        case _:
            return {"anyOf": [_any(rng, depth - 1), _leaf(rng)]}


def _leaf(rng: random.Random) -> dict[str, Any]:
    match rng.randrange(9):
        case 0:
            return {"type": "string", "maxLength": rng.randrange(1, 9)}
        case 1:
            low = rng.randrange(-200, 200)
            return {"type": "integer", "minimum": low, "maximum": low + rng.randrange(300)}
        case 2:
            low = rng.choice([-1.5, 0, 1, -10.25, 0.001])
            high = low + rng.choice([0.5, 1, 2])
            least, most = (
                rng.choice(["minimum", "exclusiveMinimum"]),
                rng.choice(["maximum", "exclusiveMaximum"]),
            )
            return {"type": "number", least: low, most: high}
        case 3:
            return {"type": ["boolean", "null"]}
        case 4:
            return {"enum": [_value(rng, 1) for _ in range(rng.randrange(1, 6))]}
        case 5:
            return {"const": _value(rng, 1)}
        case 6:
            return {"type": "string", "pattern": rng.choice(PATTERNS), "maxLength": 12}
        case 7:
            return {"type": "string", "format": rng.choice(FORMATS)}
        case _:
            return {"type": "integer", "multipleOf": rng.choice((1, 5)), "minimum": 0, "maximum": 100}


def _value(rng: random.Random, depth: int) -> Any:
    match rng.randrange(6 if depth else 4):
        case 0:
            return rng.choice(WORDS)
        case 1:
            return rng.randrange(-1000, 1000)
        case 2:
            return rng.choice([True, False, None])
        case 3:
            return round(rng.uniform(-5, 5), 2)
        case 4:
            return [_value(rng, depth - 1) for _ in range(rng.randrange(3))]
        case _:
            return {rng.choice(WORDS): _value(rng, depth - 1) for _ in range(rng.randrange(3))}
