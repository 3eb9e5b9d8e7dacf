"""The parts of a reply, in the order in which they come, and what takes text apart into them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Protocol


@dataclasses.dataclass(frozen=True, slots=True)
class Said:
    """Text for the reader."""

    text: str


@dataclasses.dataclass(frozen=True, slots=True)
class Thought:
    """Text of the reasoning that comes before the answer."""

    text: str


@dataclasses.dataclass(frozen=True, slots=True)
class Called:
    """A call begins. `Argued` that follow are its arguments, until the next part of another kind."""

    name: str


@dataclasses.dataclass(frozen=True, slots=True)
class Argued:
    """More of a call's arguments: all of them together are JSON, if the model wrote JSON."""

    delta: str


Part = Said | Thought | Called | Argued


class Reader(Protocol):
    """Takes a reply apart. What it gives does not depend on how the text was cut, once neighbours of a kind
    are joined (`joined`). The work is linear in the text."""

    def push(self, text: str) -> list[Part]: ...

    def finish(self) -> list[Part]:
        """What was held back, now that no more text comes."""


class Plain:
    """A reply without tools."""

    def push(self, text: str) -> list[Part]:
        return [Said(text)] if text else []

    def finish(self) -> list[Part]:
        return []


def joined(parts: Iterable[Part]) -> list[Part]:
    """Neighbours of one kind as one part, empty ones left out."""
    found: list[Part] = []
    for part in parts:
        before = found[-1] if found else None
        if isinstance(part, Said) and isinstance(before, Said):
            found[-1] = Said(before.text + part.text)
        elif isinstance(part, Thought) and isinstance(before, Thought):
            found[-1] = Thought(before.text + part.text)
        elif isinstance(part, Argued) and isinstance(before, Argued):
            found[-1] = Argued(before.delta + part.delta)
        elif isinstance(part, Called) or (part.delta if isinstance(part, Argued) else part.text):
            found.append(part)
    return found
