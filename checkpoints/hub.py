"""From what the user wrote for MODEL to a folder on this machine. It does not know what a folder holds."""

import os
import re
from pathlib import Path
from typing import Final

from checkpoints.files import CheckpointError, quote

# huggingface_hub's `validate_repo_id`: at most 96 characters, neither ".." nor "--".
_HUB_ID: Final = re.compile(r"(?!.*(?:\.\.|--))(?=.{1,96}\Z)(?:\w[\w.-]*/)?\w[\w.-]*", re.ASCII)
_SMALL_FILES: Final = ["*.json", "*.jinja", "tokenizer.model"]
# Some repositories hold the weights twice: in subfolders (onnx/, original/), or as consolidated*.safetensors.
_NOT_DOWNLOADED: Final = ["*/*", "consolidated*"]


def resolve_model(model: str, *, revision: str | None = None, weights: bool = True) -> Path:
    """The folder of `model`: a local folder, or a hub id, downloaded or found in the hub's cache.

    `revision` is a branch, tag or commit, for hub ids only. `weights=False` fetches config and tokenizer
    alone. HF_HUB_OFFLINE, HF_HOME and HF_TOKEN act as huggingface_hub documents. Raises CheckpointError.
    """
    # os.path, unlike Path, answers False for whatever can be no path (too long, "~nobody", a NUL byte).
    folder = Path(os.path.expanduser(model))
    if model and os.path.isdir(folder):
        if revision is not None:
            raise CheckpointError(f"{folder}: is a local folder, so a revision ({revision}) cannot be chosen")
        return folder
    if model and os.path.lexists(folder):
        raise CheckpointError(f"{folder}: is not a folder; give the folder that holds config.json")
    if not _HUB_ID.fullmatch(model):
        raise CheckpointError(f"{quote(model)}: there is no such folder, and it is not a hub id (owner/name)")
    return _download(model, revision, [*_SMALL_FILES, "*.safetensors"] if weights else _SMALL_FILES)


def _download(model: str, revision: str | None, patterns: list[str]) -> Path:
    import huggingface_hub  # here, since it takes a quarter of a second that a local folder need not wait for
    from huggingface_hub import errors

    at = f" at revision {revision}" if revision else ""
    try:
        return Path(
            huggingface_hub.snapshot_download(
                model, revision=revision, allow_patterns=patterns, ignore_patterns=_NOT_DOWNLOADED
            )
        )
    except errors.HFValidationError as error:
        raise CheckpointError(f"{model}: there is no such folder, and it is not a hub id: {error}") from error
    except errors.GatedRepoError as error:
        raise CheckpointError(
            f"{model}: is gated; accept its terms at https://huggingface.co/{model} and set HF_TOKEN"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise CheckpointError(
            f"{model}: there is no such folder, nor such a model on the hub; check the name, or set HF_TOKEN "
            "if it is private"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise CheckpointError(f"{model}: the hub has no revision {revision}") from error
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled) as error:
        offline = huggingface_hub.constants.HF_HUB_OFFLINE
        why = "HF_HUB_OFFLINE is set" if offline else "the hub cannot be reached"
        raise CheckpointError(
            f"{model}{at}: there is no such folder, it is not (wholly) in the hub's cache, and {why}; "
            f"run `hf download {model}` with a connection, or give a local folder"
        ) from error
    except Exception as error:  # also the errors of its HTTP library, which is another in each major version
        raise CheckpointError(f"{model}{at}: download failed: {type(error).__name__}: {error}") from error
