"""From tokens to what is sent, without an engine."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from jaxserve.engine.outputs import Output
from jaxserve.engine.streams import Stream
from jaxserve.scheduler.types import Limits, SamplingParams, Sequence, check_request
from jaxserve.text.tokenizer import Tokenizer
from tests.text.backends import byte_level_backend


@pytest.mark.parametrize(
    ("min_tokens", "text"),
    [(0, ""), (1, "ab"), (2, "ab"), (3, "abab"), (4, "abab"), (5, "ababab")],
)
def test_stop_strings_are_not_looked_for_before_min_tokens(min_tokens: int, text: str) -> None:
    """Of the tokens a, b, a, b ..: the text of the first `min_tokens` is sent unsearched."""
    tokenizer = Tokenizer(byte_level_backend())
    params = SamplingParams(stop=("ab",), min_tokens=min_tokens)
    limits = Limits(vocab_size=400, max_model_len=64, pool_tokens=64)
    sent: list[Output] = []
    stream = Stream(Sequence(check_request("r", [5], params, limits, 0.0), 0, 0), sent.append, tokenizer)
    results: Any = np.empty(0)  # read only where log-probabilities are asked for
    tokens = [tokenizer.backend.token_to_id(letter) for letter in "ab" * 4]
    stopped_after = next(n for n, token in enumerate(tokens, 1) if stream.push(token, None, results, 0))
    assert stopped_after > min_tokens
    assert "".join(output.text for output in sent) == text
    assert sent[-1].stop_reason == "ab"
