"""How many parts a JSON text has, told from its bytes before any of them is made.

Reading JSON holds the interpreter, and with it every stream: some 50 ns a value, 100 ns a list or an object
and 250 ns a member, which also take up to 40, 250 and 100 bytes. So 16 MiB of `[{"":0},...]` were 0.5 GB, and
a second and more in which nobody else was answered.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from jaxserve.server.errors import bad_request

# what -> the bytes that it has outside of strings, and how many of them there may be. Token ids are what has
# most: a batch of 2,048 prompts of 1,024. As for strings, a vocabulary's worth of choices is 2**15.
BOUNDS: dict[str, tuple[bytes, int]] = {
    "lists and objects": (b"[{", 2**17),
    "members of objects": (b":", 2**18),
    "quotation marks": (b'"', 2**20),
    "values": (b",", 2**21),
}
SLICE = 2**20  # bytes that are looked at without a turn for other threads


def check_parts(data: bytes) -> None:
    """Raises ApiError 400 where there are more parts than any request has."""
    suspects = {
        what: (marks, most)
        for what, (marks, most) in BOUNDS.items()
        if len(data) > most and sum(data.count(mark) for mark in marks) > most
    }
    if suspects:  # else what is in strings need not be told from the rest, which takes longer
        found = dict.fromkeys(suspects, 0)
        for what, count in _outside_strings(data, suspects):
            found[what] += count
            if found[what] > suspects[what][1]:
                raise bad_request(f"the body has more than {suspects[what][1]} {what}", code="too_many_parts")


def _outside_strings(data: bytes, wanted: dict[str, tuple[bytes, int]]) -> Iterator[tuple[str, int]]:
    """(what, how many) of each slice of a JSON text; of what is none, right up to its first error."""
    inside = False
    kept = b""  # backslashes whose run may go on
    for start in range(0, len(data), SLICE):
        piece = kept + data[start : start + SLICE]
        end = len(piece.rstrip(b"\\"))
        piece, kept = piece[:end], piece[end:]
        text = np.frombuffer(piece.replace(rb"\\", b"").replace(rb"\"", b""), np.uint8)  # u8[bytes]
        quotes = text == ord('"')
        outside = np.logical_xor.accumulate(quotes) == inside
        for what, (marks, _) in wanted.items():
            if marks == b'"':
                yield what, int(np.count_nonzero(quotes))
            else:
                yield what, sum(int(np.count_nonzero((text == mark) & outside)) for mark in marks)
        inside ^= bool(np.count_nonzero(quotes) & 1)
