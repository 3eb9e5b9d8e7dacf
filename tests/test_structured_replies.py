"""What an engine answers when it must follow a grammar, from end to end, with the embedded model."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator

import jsonschema
import numpy as np
import pytest

from jaxserve import LLM, SamplingParams
from jaxserve.scheduler.types import Finish, RequestError, StructuredOutputs
from tests.schemas import schemas

PROMPT = "def options():\n    return "


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with LLM(max_slots=8, max_model_len=1024, dtype="float32", prefill_chunk=128) as one:
        yield one


def idle(llm: LLM) -> bool:
    stats = llm.stats()
    return stats["running"] == stats["waiting"] == stats["pages_used"] == 0


def check(llm: LLM, wanted: list[dict[str, object]]) -> int:
    """How many replies ended; each of them is valid."""
    params = [
        SamplingParams(
            temperature=1.0, seed=i, max_tokens=400, structured_outputs=StructuredOutputs(json=one)
        )
        for i, one in enumerate(wanted)
    ]
    ended = 0
    for schema, result in zip(wanted, llm.generate([PROMPT] * len(wanted), params), strict=True):
        [output] = result.outputs
        if output.finish_reason is Finish.STOP:
            jsonschema.validate(json.loads(output.text), schema, cls=jsonschema.Draft202012Validator)
            ended += 1
        else:
            assert output.finish_reason is Finish.LENGTH
    assert idle(llm)
    return ended


def test_replies_follow_their_schema(llm: LLM) -> None:
    assert check(llm, schemas(24, seed=1)) >= 20


@pytest.mark.slow
def test_300_schemas(llm: LLM) -> None:
    assert check(llm, schemas(300)) >= 250


def test_all_kinds_beside_free_replies(llm: LLM) -> None:
    kinds = [
        StructuredOutputs(choice=("yes", "no")),
        StructuredOutputs(regex="[0-9]{2}:[0-9]{2}"),
        StructuredOutputs(grammar='start: "[" NUMBER ("," NUMBER)* "]"\nNUMBER: /[0-9]{1,2}/'),
        StructuredOutputs(json_object=True),
        None,
    ]
    free = SamplingParams(temperature=0.0, max_tokens=30)
    [alone] = llm.generate(PROMPT, free)
    params = [
        free
        if kind is None
        else SamplingParams(temperature=1.0, seed=i, max_tokens=60, logprobs=1, structured_outputs=kind)
        for i, kind in enumerate(kinds * 3)
    ]
    results = [one.outputs[0] for one in llm.generate([PROMPT] * len(params), params)]
    forms = (r"yes|no", r"\d\d:\d\d", r"\[\d{1,2}(,\d{1,2})*\]", r"\s*\{.*\}\s*", None)
    for output, form in zip(results, forms * 3, strict=True):
        if form is None:
            assert output.text == alone.outputs[0].text
        elif output.finish_reason is Finish.STOP:
            assert re.fullmatch(form, output.text, re.DOTALL)
            assert len(output.logprobs or ()) == len(output.token_ids)
    assert all(output.finish_reason is Finish.STOP for output in results[::5] + results[1::5])
    assert idle(llm)


@pytest.mark.parametrize(
    ("wanted", "words"),
    [
        ({"regex": "(("}, "regex cannot be followed"),
        ({"json": '{"not": {}}'}, "json cannot be followed"),
        ({"choice": ()}, "list of texts"),
        ({"json": "{}", "regex": "a"}, "one of"),
        ({}, "one of"),
    ],
)
def test_what_cannot_be_followed_is_said_before_anything_runs(
    llm: LLM, wanted: dict[str, object], words: str
) -> None:
    with pytest.raises(RequestError, match=words) as error:
        llm.generate(PROMPT, SamplingParams(structured_outputs=StructuredOutputs(**wanted)))  # type: ignore[arg-type]
    assert (error.value.param or "").startswith("structured_outputs")


@pytest.mark.parametrize("other", [{"min_tokens": 2}, {"ignore_eos": True}])
def test_what_contradicts_a_grammar(other: dict[str, object]) -> None:
    with pytest.raises(RequestError, match="structured_outputs"):
        SamplingParams(structured_outputs=StructuredOutputs(regex="a"), **other)  # type: ignore[arg-type]


def test_embeddings_are_unit_vectors_in_order(llm: LLM) -> None:
    texts = ["def f(x):", "class A:", "import sys\n" * 60]
    last, mean = llm.embed(texts), llm.embed(texts, pooling="mean")
    assert last.shape == mean.shape == (3, llm.stats()["embedding_size"])
    assert last.dtype == np.float32
    assert np.allclose(np.linalg.norm(last, axis=1), 1, atol=1e-6)
    assert np.array_equal(llm.embed(texts[::-1])[::-1], last)
    assert not np.allclose(last, mean, atol=0.1)
    assert llm.embed([]).shape == (0, last.shape[1])
    with pytest.raises(RequestError, match="pooling"):
        llm.embed("x", pooling="max")
