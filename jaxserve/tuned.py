"""What `jaxserve tune` found, kept in the user's cache folder: one JSON file for each model and machine.

A file's name is a digest of all that its figures hold for, and the file says the same in words, so that one
from elsewhere is not mistaken for this machine's. Knows nothing of jax: `build.py` says what is measured for.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import platform
import re
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from jaxserve.config import EngineOptions

VERSION = 1
VALUES = ("max_slots", "page_size", "prefill_chunk")

Facts = Mapping[str, Any]  # all that a measurement holds for


@dataclasses.dataclass(frozen=True, slots=True)
class Tuned:
    """values: of the options in VALUES. date: when they were measured."""

    file: Path
    values: dict[str, int]
    date: str


def folder() -> Path:
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "jaxserve" / "tuned"


def digest(value: Any) -> str:
    """Of a JSON value, whatever the order of its keys."""
    return hashlib.blake2b(json.dumps(value, sort_keys=True).encode(), digest_size=16).hexdigest()


def tuned_file(facts: Facts) -> Path:
    """Where the figures for these facts lie, or would."""
    return folder() / f"{digest(dict(facts))}.json"


def processor() -> str:
    """This machine's, with the number of its cores that may be used; jax calls all of them "cpu"."""
    name = ""
    with contextlib.suppress(OSError):
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
        name = found[1] if found else ""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{name or platform.processor() or platform.machine()}, {cores} core(s)"


def read(facts: Facts, objective: str, warn: Callable[[str], None]) -> Tuned | None:
    """What was saved for the objective, if anything was. A file that is damaged, or that says it is for
    something else, is named to `warn` and not used."""
    file = tuned_file(facts)
    try:
        saved = _load(file, facts)
        return None if saved is None or objective not in saved["found"] else _tuned(file, saved, objective)
    except _Unusable as error:
        warn(f"warning: {file} is ignored: {error}; `jaxserve tune` writes it anew")
        return None


def save(model: str, facts: Facts, objective: str, found: Mapping[str, Any]) -> Path:
    """Writes the file anew, whole or not at all, and keeps what it holds for the other objective.

    model: its name, for people. found: `values`, `date`, and whatever else was measured, in JSON.
    Raises OSError.
    """
    file = tuned_file(facts)
    try:
        before = _load(file, facts)
    except _Unusable:
        before = None
    others = {} if before is None else before["found"]
    content = {
        "version": VERSION,
        "model": model,
        "valid_for": dict(facts),
        "found": {**others, objective: dict(found)},
    }
    file.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=file.parent, prefix=".write-")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as opened:
            opened.write(json.dumps(content, indent=1) + "\n")
        os.replace(temporary, file)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    return file


class _Unusable(ValueError):
    """The message says what is wrong with the file."""


def _load(file: Path, facts: Facts) -> dict[str, Any] | None:
    """The file's object; None where there is no file. Raises _Unusable."""
    try:
        content = json.loads(file.read_bytes())
    except FileNotFoundError:
        return None
    except OSError as error:
        raise _Unusable(f"it cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError) as error:
        raise _Unusable(f"it is no JSON ({error})") from None
    if not isinstance(content, dict) or content.get("version") != VERSION:
        raise _Unusable("it is not a file of this version of jaxserve")
    if content.get("valid_for") != json.loads(json.dumps(dict(facts))):
        raise _Unusable("it was measured for another model, machine or version")
    if not isinstance(content.get("found"), dict):
        raise _Unusable("`found` is missing")
    return content


def _tuned(file: Path, saved: Mapping[str, Any], objective: str) -> Tuned:
    found = saved["found"][objective]
    values = found.get("values") if isinstance(found, dict) else None
    if not isinstance(values, dict) or set(values) != set(VALUES) or None in values.values():
        raise _Unusable(f"{objective} has not the values of {', '.join(VALUES)}")
    try:
        EngineOptions(**values)
    except ValueError as error:
        raise _Unusable(f"{objective}: {error}") from None
    return Tuned(file, values, str(found.get("date")))
