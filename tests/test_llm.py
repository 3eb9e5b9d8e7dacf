"""`LLM` over the fake engine: results in order, defaults, errors, threads."""

from __future__ import annotations

import math
import sys
import threading
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from jaxserve import LLM, SamplingParams
from jaxserve.config import EngineOptions
from jaxserve.response_cache import CachingEngine, ResponseCache
from jaxserve.scheduler.types import RequestError, Tier
from tests.server.fakes import FakeEngine

LN2 = math.log(2)


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str | None, EngineOptions]]:
    """What was asked of `build_serving`, which hands out fakes."""
    calls: list[tuple[str | None, EngineOptions]] = []

    def build_serving(
        model: str | None, options: EngineOptions, *, progress: Callable[[str], None]
    ) -> FakeEngine:
        calls.append((model, options))
        progress("built")
        return FakeEngine(slots=options.slots)

    fake = types.ModuleType("jaxserve.build")
    vars(fake)["build_serving"] = build_serving
    monkeypatch.setitem(sys.modules, "jaxserve.build", fake)
    return calls


@pytest.fixture
def llm(built: object) -> Iterator[LLM]:
    with LLM() as one:
        yield one


def test_options_reach_the_engine(built: list[tuple[str | None, EngineOptions]]) -> None:
    said: list[str] = []
    with LLM("folder", max_slots=3, progress=said.append) as llm:
        assert llm.stats()["slots"] == 3
    assert built == [("folder", EngineOptions(max_slots=3))]
    assert said == ["built"]


def test_unknown_options_are_named(built: list[object]) -> None:
    with pytest.raises(TypeError, match=r"no option max_slot, port; there are: dtype, max_model_len"):
        LLM(max_slot=3, port=1)
    with pytest.raises(ValueError, match="max-slots=0"):
        LLM(max_slots=0)
    assert built == []


def test_generate(llm: LLM) -> None:
    prompts: list[str | list[int]] = ["xa", "0", [ord("X")]]
    results = llm.generate(prompts, SamplingParams(max_tokens=3))
    assert [result.outputs[0].text for result in results] == ["bcd", "123", "YZ"]
    assert [result.prompt for result in results] == ["xa", "0", None]
    assert [result.prompt_token_ids for result in results] == [[120, 97], [48], [88]]
    assert [result.outputs[0].finish_reason for result in results] == ["length", "length", "stop"]
    assert results[2].outputs[0].token_ids == [ord("Y"), ord("Z"), 257]
    assert results[0].prompt_logprobs is None
    assert results[0].outputs[0].logprobs is None


@pytest.mark.parametrize("prompts", ["a", [97], ["a"], [[97]]])
def test_forms_of_one_prompt(llm: LLM, prompts: str | list[int]) -> None:
    [result] = llm.generate(prompts)
    assert result.outputs[0].text == "bcdefghijklmnopq"


@pytest.mark.parametrize("prompts", [5, None, b"a", {"prompt": "a"}])
def test_what_is_no_prompt_is_named(llm: LLM, prompts: Any) -> None:
    kind = type(prompts).__name__
    with pytest.raises(
        RequestError, match=f"prompts must be a text, token ids, or a list of either, not {kind}"
    ):
        llm.generate(prompts)


def test_params_for_each(llm: LLM) -> None:
    params = [SamplingParams(max_tokens=tokens, n=tokens) for tokens in (1, 2)]
    results = llm.generate(["a", "a"], params)
    assert [[output.text for output in result.outputs] for result in results] == [["b"], ["bc", "bc"]]
    assert [output.index for output in results[1].outputs] == [0, 1]
    with pytest.raises(RequestError, match="2 SamplingParams for 1 prompts"):
        llm.generate("a", params)


def test_logprobs(llm: LLM) -> None:
    [result] = llm.generate("ac", SamplingParams(max_tokens=2, logprobs=1, prompt_logprobs=1))
    assert result.prompt_logprobs == [None, pytest.approx({ord("b"): -LN2, ord("c"): -2 * LN2})]
    logprobs = result.outputs[0].logprobs
    assert logprobs is not None
    assert logprobs[0] == pytest.approx({ord("d"): -LN2})
    assert logprobs[1] == pytest.approx({ord("e"): -LN2})
    [result] = llm.generate("ac", SamplingParams(max_tokens=0, prompt_logprobs=0))
    assert result.prompt_logprobs == [None, pytest.approx({ord("c"): -2 * LN2})]
    assert result.outputs[0].token_ids == []


def test_stop_reason(llm: LLM) -> None:
    [result] = llm.generate("a", SamplingParams(stop=("de",), max_tokens=20))
    assert (result.outputs[0].text, result.outputs[0].stop_reason) == ("bc", "de")
    assert result.outputs[0].finish_reason == "stop"


def test_chat(llm: LLM) -> None:
    turns = [{"role": "user", "content": "a"}]
    [result] = llm.chat(turns, SamplingParams(max_tokens=2))
    assert result.outputs[0].text == "bc"
    results = llm.chat([turns, [{"role": "user", "content": "X"}]])
    assert [len(result.outputs[0].token_ids) for result in results] == [253, 3]  # the context is 256
    assert results[1].outputs[0].text == "YZ"


def test_nothing_runs_if_one_prompt_is_wrong(llm: LLM) -> None:
    with pytest.raises(RequestError, match="the prompt is empty"):
        llm.generate(["a", ""])
    with pytest.raises(RequestError, match="token id 999"):
        llm.generate([[97], [999]])
    with pytest.raises(RequestError, match="conversation roles must alternate"):
        llm.chat([{"role": "user", "content": "a"}] * 2)
    assert llm.stats()["requests_total"] == 0
    assert llm.generate([]) == []


def test_many_prompts_and_threads(llm: LLM) -> None:
    texts: dict[int, list[str]] = {}

    def ask(number: int) -> None:
        prompts = [chr(ord("a") + (number + step) % 20) for step in range(30)]
        texts[number] = [one.outputs[0].text for one in llm.generate(prompts, SamplingParams(max_tokens=1))]

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number in range(4):
        assert texts[number] == [chr(ord("a") + (number + step) % 20 + 1) for step in range(30)]


@pytest.mark.parametrize("silent", [False, True])
def test_a_failing_engine_is_an_exception(llm: LLM, silent: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jaxserve.llm.WATCH_SECONDS", 0.05)
    engine = llm.engine
    assert isinstance(engine, FakeEngine)
    engine.silent_failure = silent
    engine.fail_next = RuntimeError("out of memory")
    with pytest.raises(RuntimeError, match=r"the engine failed: .*out of memory"):
        llm.generate("a")


def test_close_is_idempotent(built: object) -> None:
    llm = LLM()
    llm.close()
    llm.close()
    with pytest.raises(RuntimeError, match="closed"):
        llm.generate("a")


def fake(llm: LLM) -> FakeEngine:
    assert isinstance(llm.engine, FakeEngine)
    return llm.engine


def test_tier_and_priority(llm: LLM) -> None:
    turns = [{"role": "user", "content": "a"}]
    llm.generate("a")
    llm.generate(["a", "b"], service_tier="flex", priority=-2)
    llm.chat(turns, SamplingParams(max_tokens=1), service_tier="flex", priority=3)
    assert [(request.tier, request.priority) for request in fake(llm).requests] == [
        (Tier.ONLINE, 0),
        (Tier.BATCH, -2),
        (Tier.BATCH, -2),
        (Tier.BATCH, 3),
    ]
    with pytest.raises(RequestError, match="service_tier='fast' must be one of auto, default, flex"):
        llm.generate("a", service_tier="fast")
    with pytest.raises(RequestError, match="priority=4294967296 must lie in"):
        llm.generate("a", priority=2**32)
    assert len(fake(llm).requests) == 4


def test_more_prompts_than_the_queue_holds(llm: LLM) -> None:
    engine = fake(llm)
    engine._max_queued = 3
    prompts = [chr(ord("a") + number % 20) for number in range(200)]
    results = llm.generate(prompts, SamplingParams(max_tokens=1))
    assert [one.outputs[0].text for one in results] == [chr(ord(prompt) + 1) for prompt in prompts]
    assert engine.rejected > 0
    assert len(engine.requests) == 200


def test_a_queue_that_others_have_filled(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of its own runs that could wake it: it looks again by itself."""
    monkeypatch.setattr("jaxserve.llm.WATCH_SECONDS", 0.02)
    fake(llm).busy = 3
    assert llm.generate("a", SamplingParams(max_tokens=1))[0].outputs[0].text == "b"
    assert fake(llm).rejected == 3


def test_an_engine_that_fails_while_prompts_are_left(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jaxserve.llm.WATCH_SECONDS", 0.02)
    fake(llm)._max_queued = 2
    fake(llm).fail_next = RuntimeError("out of memory")
    with pytest.raises(RuntimeError, match="out of memory"):
        llm.generate(["a"] * 20)


def test_best_of(llm: LLM) -> None:
    fake(llm).likelihoods = (-9.0, -1.0, -6.0, -2.0)
    params = SamplingParams(n=2, best_of=4, max_tokens=2)
    [result] = llm.generate("a", params)
    assert [(one.index, one.text) for one in result.outputs] == [(0, "cd"), (1, "ef")]
    assert [one.cumulative_logprob for one in result.outputs] == [-1.0, -2.0]
    fake(llm).likelihoods = ()
    [result] = llm.generate("a", SamplingParams(n=2, max_tokens=2))
    assert [one.cumulative_logprob for one in result.outputs] == [None, None]


def test_the_response_cache_before_the_engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def build_serving(*args: object, **options: object) -> CachingEngine:
        return CachingEngine(FakeEngine(), ResponseCache(tmp_path / "responses.sqlite", 2**20, pytest.fail))

    module = types.ModuleType("jaxserve.build")
    vars(module)["build_serving"] = build_serving
    monkeypatch.setitem(sys.modules, "jaxserve.build", module)
    params = [SamplingParams(temperature=0, max_tokens=3), SamplingParams(max_tokens=3)]
    for turn in range(2):
        with LLM(response_cache=1) as llm:
            results = llm.generate(["a", "b"], params)
            assert [one.outputs[0].text for one in results] == ["bcd", "cde"]
            assert llm.stats()["response_cache_hits"] == turn
