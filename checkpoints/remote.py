"""Model folders behind an fsspec URL: brought to this machine whole, once, before anything is read.

`file://` is the folder itself. Any other protocol that fsspec knows, and whose package is installed, is
copied to `~/.cache/jaxserve/models` (under XDG_CACHE_HOME, where that is set), in a folder named after the
URL and what the storage says of its files: a model that changes there is copied anew. It does not know what
a folder holds.
"""

import fcntl
import hashlib
import os
import re
import shutil
from pathlib import Path
from typing import Any, Final

from checkpoints.files import CheckpointError, quote

_URL: Final = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*(?:://|::)")
# of a folder without weights: what `huggingface.resolve_model(weights=False)` fetches from the hub
_SMALL: Final = re.compile(r"[^/]*\.(?:json|jinja)|tokenizer\.model")


def is_url(model: str) -> bool:
    return _URL.match(model) is not None


def fetch(url: str, *, weights: bool = True) -> Path:
    """The folder behind `url`, on this machine. `weights=False` copies the small files at its top alone.

    Credentials are found as fsspec's packages document. Raises CheckpointError: an unknown protocol or one
    whose package is missing (naming it), nothing there, no access, a copy that fails.
    """
    import fsspec  # type: ignore[import-untyped]

    shown = _without_password(url)
    try:
        files, root = fsspec.core.url_to_fs(url)
        if "file" in _protocols(files):
            return _local(Path(root), shown)
        found = files.find(root, detail=True)
    except CheckpointError:
        raise
    except ImportError as error:  # "Install gcsfs to access Google Storage"
        raise CheckpointError(f"{shown}: {error}; or copy the folder here and give its path") from error
    except Exception as error:  # each protocol has errors of its own
        raise CheckpointError(f"{shown}: cannot be read: {type(error).__name__}: {error}") from error
    names = {name: _relative(name, root, shown) for name in sorted(found)}
    if not weights:
        names = {name: relative for name, relative in names.items() if _SMALL.fullmatch(relative)}
    if not names:
        raise CheckpointError(f"{shown}: there is no such folder, or it is empty")
    digest = hashlib.blake2b(repr((url, weights)).encode(), digest_size=12)
    for name, relative in names.items():
        digest.update(repr((relative, found[name].get("size"), files.ukey(name))).encode())
    place = _cache() / digest.hexdigest() / (root.rstrip("/").rpartition("/")[2] or "model")
    _copy(files, names, place, shown)
    return place


def _copy(files: Any, names: dict[str, str], place: Path, shown: str) -> None:
    """Whole or not at all: beside `place`, then renamed. A second process waits for the first."""
    place.parent.mkdir(parents=True, exist_ok=True)
    with open(place.parent / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if place.is_dir():
            return
        partial = place.with_name(f".{place.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        try:
            for name, relative in names.items():
                target = partial / relative
                target.parent.mkdir(parents=True, exist_ok=True)
                files.get_file(name, os.fspath(target))
            partial.rename(place)
        except Exception as error:
            raise CheckpointError(f"{shown}: copying failed: {type(error).__name__}: {error}") from error
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def _local(folder: Path, shown: str) -> Path:
    if not folder.is_dir():
        raise CheckpointError(f"{shown}: there is no such folder")
    return folder


def _protocols(files: Any) -> tuple[str, ...]:
    protocol = files.protocol
    return (protocol,) if isinstance(protocol, str) else tuple(protocol)


def _relative(name: str, root: str, shown: str) -> str:
    relative = name.removeprefix(root).strip("/") if name.startswith(root) else ""
    # the storage's listing must not make us write elsewhere
    if not relative or "\0" in relative or ".." in relative.split("/") or os.path.isabs(relative):
        raise CheckpointError(f"{shown}: the listing names {quote(name)}, which is not inside the folder")
    return relative


def _without_password(url: str) -> str:
    return re.sub(r"://[^/@]*@", "://…@", url)


def _cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "jaxserve" / "models"
