"""What a model's `generation_config.json` sets that is not applied, so that a start can say so.

The fields that are applied are `build.sampling_defaults`' matter, the end tokens the tokenizer's.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from checkpoints import huggingface

# field -> the value that changes nothing; an empty one never does.
# Source: GenerationConfig of transformers 5, its parameters that change which tokens are drawn. Left out is
# what acts only beside another field (length_penalty: num_beams), and the limits on length, which are the
# request's. The last two are vLLM's names, seen in some models' files.
NOT_APPLIED: dict[str, Any] = {
    "bad_words_ids": None,
    "begin_suppress_tokens": None,
    "constraints": None,
    "dola_layers": None,
    "encoder_no_repeat_ngram_size": 0,
    "encoder_repetition_penalty": 1.0,
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
    "exponential_decay_length_penalty": None,
    "force_words_ids": None,
    "forced_bos_token_id": None,
    "forced_eos_token_id": None,
    "guidance_scale": 1.0,
    "min_length": 0,
    "min_new_tokens": 0,
    "no_repeat_ngram_size": 0,
    "num_beams": 1,
    "penalty_alpha": 0.0,
    "sequence_bias": None,
    "stop_strings": None,
    "suppress_tokens": None,
    "token_healing": False,
    "top_h": None,
    "typical_p": 1.0,
    "watermarking_config": None,
    "frequency_penalty": 0.0,
    "presence_penalty": 0.0,
}


def unused_sampling_fields(folder: Path) -> list[str]:
    """Which fields of NOT_APPLIED the folder's `generation_config.json` sets; [] where it has no such file.

    Raises CheckpointError for one that cannot be read.
    """
    config = huggingface.read_json(folder, "generation_config.json", required=False)
    return sorted(
        name
        for name, neutral in NOT_APPLIED.items()
        if not _nothing(value := config.get(name)) and value != neutral
    )


def _nothing(value: Any) -> bool:
    """null, or an empty list, object or text; not 0, which for a token id is one."""
    return value is None or value in ([], {}, "")
