"""The names of special tokens in a message are text, not those tokens.

A chat template writes a turn's beginning and end as special tokens; whoever can write such a token into a
message can write a turn of another role. Within what a client sends, a character that stands in no text
(MARK) is put into each such name before the template is rendered, so that the tokenizer does not find it; a
copy of the tokenizer knows the character as a token of its own, which is then left out.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import tokenizers

MARK = "\ufdd0"  # a noncharacter: Unicode, section 23.7, leaves it to a program's own use


LONG = 2000  # characters


def encoded(backend: tokenizers.Tokenizer, text: str, *, add_special_tokens: bool) -> list[int]:
    """Token ids. The library encodes one text under the interpreter's lock, a batch without it: a megabyte
    took 1.6 s, all threads waiting, and 0.5 s as a batch without offsets."""
    if len(text) <= LONG:
        return backend.encode(text, add_special_tokens=add_special_tokens).ids
    [one] = backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)
    return one.ids


class SpecialText:
    """For one tokenizer. Any thread may use it."""

    def __init__(self, backend: tokenizers.Tokenizer) -> None:
        added = backend.get_added_tokens_decoder().values()
        # of a name of one character no other part is left to keep apart
        self._special = sorted({one.content for one in added if one.special and len(one.content) > 1})
        self._all = sorted({one.content for one in added if len(one.content) > 1})
        self._backend = backend
        self._lock = threading.Lock()
        self._copy: tokenizers.Tokenizer | None = None
        self._mark: int | None = None

    def shield(
        self, messages: Sequence[Any], variables: Mapping[str, Any]
    ) -> tuple[list[Any], dict[str, Any], bool]:
        """(messages, variables, whether any name was found in them), the names broken by MARK.

        In what an assistant said, only special tokens are: a template may look for others, `</think>` say.
        Raises ValueError where MARK itself stands beside such a name.
        """
        shielded = [self._message(message) for message in messages]
        others = {name: _map(value, self._all) for name, value in variables.items()}
        if shielded == list(messages) and others == variables:
            return list(messages), dict(variables), False
        if any(MARK in text for text in _texts([*messages, variables])):
            raise ValueError("the noncharacter U+FDD0 beside the name of a special token")
        return shielded, others, True

    def encode(self, text: str) -> list[int]:
        """The token ids of a rendered template with broken names in it."""
        with self._lock:
            if self._copy is None:
                self._copy = tokenizers.Tokenizer.from_str(self._backend.to_str())
                mark = tokenizers.AddedToken(MARK, special=True, normalized=False)
                self._copy.add_special_tokens([mark])
                self._mark = self._copy.token_to_id(MARK)
        ids = encoded(self._copy, text, add_special_tokens=False)
        return [token for token in ids if token != self._mark]

    def _message(self, message: Any) -> Any:
        if not isinstance(message, Mapping):
            return message
        names = self._special if message.get("role") == "assistant" else self._all
        return {key: value if key == "role" else _map(value, names) for key, value in message.items()}


def _map(value: Any, names: Sequence[str]) -> Any:
    """`value` with the names broken in each text of it, its keys included."""
    if isinstance(value, str):
        for name in names:
            if name in value:
                value = value.replace(name, f"{name[0]}{MARK}{name[1:]}")
        return value
    if isinstance(value, Mapping):
        return {_map(key, names): _map(part, names) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_map(part, names) for part in value]
    return value


def _texts(value: Any) -> Iterable[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, part in value.items():
            yield from _texts(key)
            yield from _texts(part)
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _texts(part)
