"""Opening and parsing files that a stranger wrote: one error class, regular files only, strict JSON.

It does not know what the files mean. Everything raises `CheckpointError`, never by `assert`, so the checks
hold under `python -O`.
"""

import json
import os
import stat
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, BinaryIO

_LISTED = 5  # keys named in one message
_KEY_CHARS = 120  # a hostile key may be megabytes long


class CheckpointError(ValueError):
    """A model folder or file that cannot be used; the message names the file and key and says what to do."""


def quote(key: str) -> str:
    """`key` for a message: printable (control characters and lone surrogates escaped), of bounded length."""
    return repr(key) if len(key) <= _KEY_CHARS else f"{key[:_KEY_CHARS]!r}… ({len(key)} characters)"


def listing(keys: Collection[str], noun: str = "key") -> str:
    """The count and the first five of `keys`, sorted: "7 keys: 'a', 'b', 'c', 'd', 'e' and 2 more"."""
    named = ", ".join(quote(key) for key in sorted(keys)[:_LISTED])
    more = f" and {len(keys) - _LISTED} more" if len(keys) > _LISTED else ""
    return f"{len(keys)} {noun}{'' if len(keys) == 1 else 's'}: {named}{more}"


def open_regular(path: Path) -> BinaryIO:
    """Opens a regular file (through symlinks, as in the hub's cache) for reading.

    Raises CheckpointError for a missing file, a folder, a device or a pipe (opening a pipe would hang).
    """
    try:
        mode = os.stat(path).st_mode
        if not stat.S_ISREG(mode):
            kind = "a folder" if stat.S_ISDIR(mode) else "a device or pipe"
            raise CheckpointError(f"{path}: is {kind}, expected a file")
        return open(path, "rb")
    except OSError as error:
        broken = os.path.islink(path) and not os.path.exists(path)
        reason = "a broken link" if broken else error.strerror or str(error)
        raise CheckpointError(
            f"{path}: cannot be read ({reason}); download or copy the folder again"
        ) from error


def read_object(path: Path, *, limit: int, unique_keys: bool) -> dict[str, Any]:
    """The JSON object in the file at `path`, of at most `limit` bytes. Errors as `parse_object`."""
    with open_regular(path) as file:
        raw = file.read(limit + 1)
    if len(raw) > limit:
        raise CheckpointError(f"{path}: is larger than {limit >> 20} MiB, which no such file should be")
    return parse_object(raw, str(path), unique_keys=unique_keys)


def parse_object(raw: bytes, where: str, *, unique_keys: bool) -> dict[str, Any]:
    """The JSON object in `raw`; `where` begins each message.

    Raises CheckpointError: not UTF-8, not JSON, nested too deep, not an object, or, with `unique_keys`, the
    same key twice in any object (Python's json would silently keep the last).
    """
    hook = _unique_pairs(where) if unique_keys else None
    try:
        value = json.loads(raw.decode("utf-8"), object_pairs_hook=hook)
    except CheckpointError:
        raise
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{where}: is not UTF-8 (byte {error.start})") from None
    except RecursionError:
        raise CheckpointError(f"{where}: is JSON nested too deeply") from None
    except ValueError as error:  # JSONDecodeError, or an integer of more than 4300 digits
        raise CheckpointError(f"{where}: is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{where}: holds a JSON {type(value).__name__}, expected an object {{…}}")
    return value


def _unique_pairs(where: str) -> Callable[[list[tuple[str, Any]]], dict[str, Any]]:
    def hook(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result: dict[str, Any] = {}
        for key, value in pairs:
            if key in result:
                raise CheckpointError(f"{where}: key {quote(key)} is there twice; write the file again")
            result[key] = value
        return result

    return hook
