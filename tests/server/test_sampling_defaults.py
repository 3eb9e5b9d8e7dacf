"""The model's own sampling defaults hold for what a request leaves out, and for nothing else."""

from __future__ import annotations

from typing import Any

from jaxserve.scheduler.types import SamplingParams
from jaxserve.server.api.fields import SamplingFields

DEFAULTS = {"temperature": 0.2, "top_p": 0.9, "top_k": 5, "min_p": 0.1, "repetition_penalty": 1.1}


def sampled(**given: Any) -> SamplingParams:
    fields = SamplingFields(model="m", **given)
    return fields.sampling(DEFAULTS, max_tokens=4, logprobs=None, prompt_logprobs=None)


def test_what_is_left_out_comes_from_the_model() -> None:
    params = sampled()
    assert {name: getattr(params, name) for name in DEFAULTS} == DEFAULTS


def test_what_is_given_wins_even_where_it_is_the_fields_own_default() -> None:
    params = sampled(temperature=1.0, top_p=1.0, top_k=0, min_p=0.0, repetition_penalty=1.0)
    assert params == SamplingParams(max_tokens=4)
