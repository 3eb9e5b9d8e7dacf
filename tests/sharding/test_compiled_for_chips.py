"""Decode of real models' widths, two layers deep, compiled for slices that are not here: what its devices
exchange, and that no weight, no expert and no page is copied. Needs what `make aot` builds."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
SLOTS, LAYERS = 64, 2
VOCABULARY = {"70b": 128256, "mixtral-8x7b": 32000, "qwen3-30b-a3b": 151936}


def compiled(chip: str, model: str) -> dict[str, Any]:
    name, layout = ("cuda", "unrolled") if chip.startswith("h100") else ("tpu", "scan")
    python = ROOT / f".venv-aot-{name}" / "bin" / "python"
    if not python.exists():
        pytest.skip(f"{python} is not there; `make aot` builds it")
    flags = {"--chip": chip, "--model": model, "--layers": LAYERS, "--layouts": layout, "--slots": SLOTS}
    command = [
        python,
        ROOT / "benchmarks" / "aot_layout.py",
        *(str(x) for pair in flags.items() for x in pair),
    ]
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("JAX_", "XLA_"))}
    done = subprocess.run(
        list(map(str, command)),
        env=kept | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(next(line for line in done.stdout.splitlines() if line.startswith("{")))


@pytest.mark.slow
@pytest.mark.parametrize("chip", ["v6e-8", "h100-8"])
@pytest.mark.parametrize("model", VOCABULARY)
def test_decode(chip: str, model: str) -> None:
    row = compiled(chip, model)
    assert row["kernel_calls"] > 0
    assert row["all_reduces_per_layer"] == 2 and row["all_reduce_dtypes"] == ["bf16"]
    assert row["pool_aliased"] and row["copies_as_large_as_the_pool"] == 0
    assert row["temporary_bytes"] < row["pool_bytes"]
    copied = row["remade_weights"]
    if chip.startswith("h100") and model != "70b":  # of each expert that a token chose; docs/kernels.md
        assert all("dynamic_slice" in each for each in copied)
    else:
        assert copied == []
    # candidates for logprobs, 20 of each device; nothing near a row of the vocabulary for each slot
    assert row["largest_other"][1] <= SLOTS * 2 * 160 < SLOTS * VOCABULARY[model] // 8
