"""What a model asks of sampling and does not get is found by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import GenerationConfig

from checkpoints.embedded import MODEL_DIR
from checkpoints.huggingface import CheckpointError
from jaxserve.generation_defaults import NOT_APPLIED, unused_sampling_fields


def unused(folder: Path, config: dict[str, Any]) -> list[str]:
    (folder / "generation_config.json").write_text(json.dumps(config))
    return unused_sampling_fields(folder)


def test_what_is_set_and_not_applied_is_named(tmp_path: Path) -> None:
    applied = {"temperature": 0.6, "top_p": 0.9, "top_k": 20, "min_p": 0.1, "repetition_penalty": 1.1}
    other = {"eos_token_id": [1, 2], "pad_token_id": 0, "do_sample": True, "max_length": 4096}
    ignored = {
        "forced_bos_token_id": 7,
        "guidance_scale": 1.5,
        "no_repeat_ngram_size": 3,
        "presence_penalty": 1,
        "stop_strings": "x",
        "suppress_tokens": [5],
        "typical_p": 0.9,
    }
    assert unused(tmp_path, {**applied, **other}) == []
    assert unused(tmp_path, {**other, **ignored, **applied}) == list(ignored)


def test_token_zero_is_a_token(tmp_path: Path) -> None:
    assert unused(tmp_path, {"forced_eos_token_id": 0}) == ["forced_eos_token_id"]


def test_what_changes_nothing_is_not(tmp_path: Path) -> None:
    assert unused_sampling_fields(tmp_path) == []  # no such file
    assert unused(tmp_path, {}) == []
    assert unused(tmp_path, NOT_APPLIED) == []
    assert unused(tmp_path, {"suppress_tokens": [], "typical_p": 1, "sequence_bias": {}}) == []
    # what transformers itself takes where a model says nothing
    assert unused(tmp_path, GenerationConfig._get_default_generation_params()) == []
    assert unused_sampling_fields(MODEL_DIR) == []


def test_a_file_that_cannot_be_read_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text("[")
    with pytest.raises(CheckpointError, match=r"generation_config\.json"):
        unused_sampling_fields(tmp_path)


def test_the_names_are_those_of_transformers() -> None:
    """A name that is misspelt here would never be found."""
    assert set(NOT_APPLIED) - {"frequency_penalty", "presence_penalty"} <= set(vars(GenerationConfig()))
