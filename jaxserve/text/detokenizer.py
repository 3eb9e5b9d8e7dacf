"""Tokens to text, one token at a time.

What comes out, put together, is what decoding all tokens at once gives. A character whose bytes come in
several tokens appears with the last of them. One exception, on tokens that stand for no text: where a run of
byte tokens (`<0xE4>`) holds an invalid byte, the library replaces the whole run, complete characters too;
here those have come out by then, and stay. Waiting for the end of the run would hold up each newline of
Llama 2, which is a byte token.
"""

from __future__ import annotations

import codecs
import itertools
from collections.abc import Iterable, Sequence, Set
from typing import TYPE_CHECKING, Protocol

from jaxserve.text.pieces import REPLACEMENT, Pieces

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from jaxserve.text.tokenizer import Tokenizer

_CONTEXT = 6  # prompt tokens that a window starts with
_LONGEST = 8  # tokens that a character may take: more of them that end in U+FFFD are simply invalid


class Detokenizer:
    """The text of one sequence; a token costs about 1 µs, however long the text.

    prompt_ids: what the sequence continues. Its text does not come out, but a space that is dropped at the
        start of a text is kept after a prompt, and a character that the prompt leaves open is completed.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt_ids: Sequence[int] | NDArray[np.int32] = (),
        *,
        skip_special_tokens: bool = True,
    ) -> None:
        backwards = map(int, reversed(prompt_ids))
        skip = tokenizer.special_ids if skip_special_tokens else frozenset[int]()
        if tokenizer.pieces is not None:
            self._stream: _Stream = _Bytes(tokenizer.pieces, backwards, skip)
        else:
            self._stream = _Window(tokenizer, backwards, skip)

    def push(self, token_id: int) -> str:
        """The text that this token completes; "" within a character."""
        return self._stream.push(token_id)

    def flush(self) -> str:
        """What is left when no more tokens come: U+FFFD for an incomplete character."""
        return self._stream.flush()


class _Stream(Protocol):
    def push(self, token_id: int) -> str: ...

    def flush(self) -> str: ...


class _Bytes:
    """Decodes the concatenated `Pieces` as UTF-8."""

    def __init__(self, pieces: Pieces, prompt_backwards: Iterable[int], skip: Set[int]) -> None:
        self._pieces = pieces
        self._skip = skip
        self._open = b""  # the start of a character
        self._at_start = True  # no token has been part of the text yet
        # UTF-8 finds its step again at the next character, so the prompt's last few bytes say what is open
        tail = b""
        for token_id in prompt_backwards:
            if token_id not in skip and pieces[token_id]:
                self._at_start = False
                tail = pieces[token_id] + tail
            if len(tail) >= 4:
                break
        self._decode(tail)

    def push(self, token_id: int) -> str:
        if token_id in self._skip:
            return ""
        piece = self._pieces[token_id]
        if self._at_start and piece:
            piece = self._pieces.first(token_id)
            self._at_start = False
        return self._decode(piece)

    def flush(self) -> str:
        text, self._open = codecs.utf_8_decode(self._open, self._pieces.errors, True)[0], b""
        return text

    def _decode(self, piece: bytes) -> str:
        text, used = codecs.utf_8_decode(self._open + piece, self._pieces.errors, False)
        self._open = (self._open + piece)[used:]
        return text


class _Window:
    """Decodes a few tokens twice, without and with those that came last; the difference is new text.

    For decoders that look at a token's neighbours. The way of Hugging Face's text-generation-inference.
    """

    def __init__(self, tokenizer: Tokenizer, prompt_backwards: Iterable[int], skip: Set[int]) -> None:
        self._tokenizer = tokenizer
        self._skip = skip
        context = (token_id for token_id in prompt_backwards if token_id not in skip)
        self._known = list(itertools.islice(context, _CONTEXT))[::-1]
        self._fresh: list[int] = []  # tokens whose text has not come out

    def push(self, token_id: int) -> str:
        if token_id in self._skip:
            return ""
        self._fresh.append(token_id)
        return self._take(final=len(self._fresh) >= _LONGEST)

    def flush(self) -> str:
        return self._take(final=True)

    def _take(self, *, final: bool) -> str:
        before = self._tokenizer.decode(self._known, skip_special_tokens=False)
        after = self._tokenizer.decode(self._known + self._fresh, skip_special_tokens=False)
        if after.endswith(REPLACEMENT) and not final:
            return ""
        fresh = after[len(before) :]
        if fresh:  # an id without a token would leave the next one looking like the first of the text
            self._known = self._fresh
        self._fresh = []
        return fresh
