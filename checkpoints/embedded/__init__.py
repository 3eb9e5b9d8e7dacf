"""The model that comes with the engine: a small Llama that completes Python. See README.md in this folder."""

from pathlib import Path

MODEL_DIR = Path(__file__).parent / "model"
"""The Hugging Face folder: config, weights, tokenizer, chat template, generation defaults."""
