"""What each token id adds to the text, as bytes: so that a stream need not be decoded again and again.

Nearly every model has a decoder that writes text as a plain concatenation of bytes:

- ByteLevel (GPT-2, Llama 3, Qwen): each character of a token's name stands for one byte.
- SentencePiece (Llama 2, Mistral, Gemma): names are text with U+2581 for a space, `<0xE4>` is a byte, and the
  very first space of the text may be dropped.
- Metaspace (T5): the same without bytes.

Source: the decoders of the `tokenizers` library (`byte_level.rs`, `byte_fallback.rs`, `metaspace.rs`,
`strip.rs`). Any other decoder gives no `Pieces`; the detokeniser then asks the library at each token.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Callable
from typing import Any

import tokenizers

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def _replace_each_byte(error: UnicodeError) -> tuple[str, int]:
    assert isinstance(error, UnicodeDecodeError)
    return REPLACEMENT * (error.end - error.start), error.end


codecs.register_error("jaxserve.replace_each_byte", _replace_each_byte)


class Pieces:
    """The bytes of each token of one tokenizer; made by `pieces_of`.

    errors: the codec's error handler that replaces invalid UTF-8 as the library does: ByteLevel writes one
        U+FFFD for each truncated character, byte tokens one for each byte.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        to_bytes: Callable[[str], bytes],
        first_to_bytes: Callable[[str], bytes],
        errors: str = "replace",
    ) -> None:
        self.errors = errors
        self._backend = backend
        self._to_bytes = to_bytes
        self._first_to_bytes = first_to_bytes
        self._cache: dict[int, bytes] = {}

    def __getitem__(self, token_id: int) -> bytes:
        """The token's bytes anywhere but at the start of the text; none for an id without a token."""
        piece = self._cache.get(token_id)
        if piece is None:
            piece = self._cache[token_id] = self._to_bytes(self._backend.id_to_token(token_id) or "")
        return piece

    def first(self, token_id: int) -> bytes:
        """The token's bytes if it is the first of the text."""
        return self._first_to_bytes(self._backend.id_to_token(token_id) or "")


def pieces_of(backend: tokenizers.Tokenizer) -> Pieces | None:
    """The tokenizer's pieces, or None if its decoder is not one of those above."""
    if backend.decoder is None:
        return None
    decoder: dict[str, Any] = json.loads(backend.decoder.__getstate__())
    steps: list[dict[str, Any]] = decoder["decoders"] if decoder["type"] == "Sequence" else [decoder]
    kinds = [step["type"] for step in steps]
    if kinds == ["ByteLevel"]:
        return Pieces(backend, _byte_level, _byte_level)
    if kinds == ["Metaspace"]:
        mark = steps[0]["replacement"]
        first_mark = "" if steps[0].get("prepend_scheme", "always") != "never" else " "
        return Pieces(
            backend,
            lambda name: name.replace(mark, " ").encode(),
            lambda name: name.replace(mark, first_mark).encode(),
        )
    if kinds[:3] == ["Replace", "ByteFallback", "Fuse"] and kinds[3:] in ([], ["Strip"]):
        mark, space = steps[0]["pattern"].get("String"), steps[0]["content"]
        strip = steps[3] if len(steps) == 4 else {"content": " ", "start": 0, "stop": 0}
        if mark and (strip["content"], strip["stop"]) == (" ", 0) and strip["start"] in (0, 1):
            dropped = b" " if strip["start"] else b""

            def to_bytes(name: str) -> bytes:
                return _byte_fallback(name.replace(mark, space))

            def first_to_bytes(name: str) -> bytes:
                return to_bytes(name).removeprefix(dropped)

            return Pieces(backend, to_bytes, first_to_bytes, "jaxserve.replace_each_byte")
    return None


def _byte_level_alphabet() -> dict[str, int]:
    """GPT-2's character for each byte: printable ones stand for themselves, the others follow from U+0100."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(0x100) if byte not in printable]
    return {chr(b): b for b in printable} | {chr(0x100 + i): b for i, b in enumerate(others)}


_BYTE_OF = _byte_level_alphabet()


def _byte_level(name: str) -> bytes:
    try:
        return bytes([_BYTE_OF[character] for character in name])
    except KeyError:  # an added token, which holds characters of its own
        return name.encode()


def _byte_fallback(name: str) -> bytes:
    match = _BYTE_TOKEN.fullmatch(name)
    return bytes([int(match[1], 16)]) if match else name.encode()
