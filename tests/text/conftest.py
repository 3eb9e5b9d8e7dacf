"""The tokenizers of `backends.py` as fixtures."""

from __future__ import annotations

import pytest

from jaxserve.text.tokenizer import Tokenizer
from tests.text.backends import BACKENDS, byte_level_backend, sentencepiece_backend


@pytest.fixture(scope="session", params=BACKENDS)
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    """One tokenizer of each family in turn."""
    return Tokenizer(BACKENDS[request.param]())


@pytest.fixture(scope="session")
def byte_level() -> Tokenizer:
    return Tokenizer(byte_level_backend())


@pytest.fixture(scope="session")
def llama2() -> Tokenizer:
    return Tokenizer(sentencepiece_backend())
