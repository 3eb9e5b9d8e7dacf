"""Writes a model folder in Orbax layout, whole or not at all. It does not know about models.

    OUT/
      jaxserve.json          format version, source, dtypes, and the sizes of the files in weights/
      weights/               the Orbax checkpoint, one array per layer (`orbax_io`)
      config.json, …         what serving needs beside the weights, as it was

Everything is written to `.OUT.partial` beside OUT, which gets its name when it is complete. A conversion that
was killed leaves that folder; the next one takes it over.
"""

import contextlib
import fcntl
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from checkpoints import orbax_io
from checkpoints.files import CheckpointError, open_regular
from checkpoints.orbax_io import Leaf

_KEPT: Final = ("*.json", "*.jinja", "*.txt", "tokenizer.model", "LICENSE*", "NOTICE*", "USE_POLICY*")
_NOT_KEPT: Final = ("*.index.json", orbax_io.ABOUT)


def check_out(out: Path, *, overwrite: bool = False) -> None:
    """Raises CheckpointError where `out` must not be written: before an hour of converting, not after it."""
    if not os.path.lexists(out):
        return
    if not overwrite:
        raise CheckpointError(
            f"{out}: exists; give another folder, or --overwrite to replace a converted model"
        )
    if out.is_symlink() or not (out / orbax_io.ABOUT).is_file():
        raise CheckpointError(
            f"{out}: is no converted model (it has no {orbax_io.ABOUT}), so it is not replaced; "
            "remove it first"
        )


def convert(
    source: Path,
    out: Path,
    leaves: Iterable[Leaf],
    *,
    config: Mapping[str, Any] | None = None,
    facts: Mapping[str, object],
    overwrite: bool = False,
    wrote: Callable[[Leaf], None] = lambda leaf: None,
) -> None:
    """Writes `leaves` and the small files of `source` to `out`; `facts` go into jaxserve.json.

    `config`, where given, is written as config.json in place of the source's. `wrote` is called after each
    array. Holds one array at a time. Raises CheckpointError as `check_out`, where `out` and `source` lie in
    each other, and where another process is converting to `out`.
    """
    out = Path(os.path.abspath(out))
    one, other = out.resolve(), source.resolve()
    if one.is_relative_to(other) or other.is_relative_to(one):
        raise CheckpointError(f"{out}: holds the model that is converted or lies in it; give another folder")
    check_out(out, overwrite=overwrite)
    out.parent.mkdir(parents=True, exist_ok=True)
    with _partial(out) as partial:
        orbax_io.save(partial / orbax_io.WEIGHTS, leaves, wrote=wrote)
        for file in small_files(source):
            with open_regular(file) as opened, open(partial / file.name, "wb") as copy:
                shutil.copyfileobj(opened, copy)
                os.fsync(copy.fileno())
        if config is not None:
            with open(partial / "config.json", "w", encoding="utf-8") as text:
                text.write(json.dumps(config, indent=2, ensure_ascii=False) + "\n")
                os.fsync(text.fileno())
        orbax_io.write_about(partial, **facts)
        _replace(partial, out)


def small_files(folder: Path) -> list[Path]:
    """Configuration, tokenizer, chat template, licence: all that is no weight and no index of weights."""
    kept = {file for pattern in _KEPT for file in folder.glob(pattern)}
    left = {file for pattern in _NOT_KEPT for file in folder.glob(pattern)}
    return sorted(file for file in kept - left if file.is_file())


@contextlib.contextmanager
def _partial(out: Path) -> Iterator[Path]:
    """An empty folder beside `out`, locked while it is used, removed if what writes to it fails."""
    partial = out.with_name(f".{out.name}.partial")
    partial.mkdir(exist_ok=True)
    lock = os.open(partial, os.O_RDONLY)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise CheckpointError(f"{partial}: another process is converting to {out}") from error
        for left in partial.iterdir():  # by a conversion that was killed
            shutil.rmtree(left) if left.is_dir() else left.unlink()
        try:
            yield partial
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
    finally:
        os.close(lock)


def _replace(partial: Path, out: Path) -> None:
    old = out.with_name(f".{out.name}.old")
    if os.path.lexists(out):
        shutil.rmtree(old, ignore_errors=True)
        out.rename(old)
    partial.rename(out)
    parent = os.open(out.parent, os.O_RDONLY)
    try:
        os.fsync(parent)
    finally:
        os.close(parent)
    shutil.rmtree(old, ignore_errors=True)
