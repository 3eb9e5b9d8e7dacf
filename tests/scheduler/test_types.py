"""Requests that cannot be served are refused with a sentence that names the field and what to do."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from jaxserve.scheduler.types import Limits, Request, RequestError, SamplingParams, Tier, check_request

LIMITS = Limits(vocab_size=100, max_model_len=32, pool_tokens=64, eos_token_ids=(2, 3))


def check(prompt: Any = (1, 5, 7), limits: Limits = LIMITS, **params: Any) -> Request:
    return check_request("r", prompt, SamplingParams(**params), limits, 0.0)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("temperature", float("nan"), "temperature=nan must be a finite number"),
        ("temperature", float("inf"), "temperature=inf must be a finite number"),
        ("temperature", -0.1, "temperature=-0.1 must lie in [0, 100]"),
        ("temperature", True, "temperature=True must be a finite number"),
        ("temperature", "1", "temperature='1' must be a finite number"),
        ("temperature", None, "temperature=None must be a finite number"),
        ("temperature", 10**400, f"temperature={10**400} must lie in [0, 100]"),
        ("top_p", 0.0, "top_p=0.0 must lie in (0, 1]"),
        ("top_p", 1.01, "top_p=1.01 must lie in (0, 1]"),
        ("min_p", 2, "min_p=2 must lie in [0, 1]"),
        ("presence_penalty", 2.5, "presence_penalty=2.5 must lie in [-2, 2]"),
        ("frequency_penalty", -3, "frequency_penalty=-3 must lie in [-2, 2]"),
        ("repetition_penalty", 0, "repetition_penalty=0 must lie in (0, 100]"),
        ("top_k", -2, "top_k=-2 must lie in [-1, 2147483647]"),
        ("top_k", 1.0, "top_k=1.0 must be an integer"),
        ("n", 0, "n=0 must lie in [1, 128]"),
        ("n", True, "n=True must be an integer"),
        ("best_of", 0, "best_of=0 must lie in [1, 128]"),
        ("best_of", 129, "best_of=129 must lie in [1, 128]"),
        ("best_of", 2.0, "best_of=2.0 must be an integer"),
        ("seed", -1, "seed=-1 must lie in [0, 9223372036854775807]"),
        ("seed", 2**63, "seed=9223372036854775808 must lie in [0, 9223372036854775807]"),
        ("max_tokens", -1, "max_tokens=-1 must lie in [0, 2147483647]"),
        ("max_tokens", 10**18, "max_tokens=1000000000000000000 must lie in [0, 2147483647]"),
        ("max_tokens", 1e18, "max_tokens=1e+18 must be an integer"),
        ("max_tokens", True, "max_tokens=True must be an integer"),
        ("min_tokens", 17, "min_tokens=17 is more than max_tokens=16"),
        ("logprobs", 21, "logprobs=21 must lie in [0, 20]"),
        ("prompt_logprobs", -1, "prompt_logprobs=-1 must lie in [0, 20]"),
        ("stop", [""], "stop must hold non-empty strings"),
        ("stop", [5], "stop must hold non-empty strings"),
        ("stop", 5, "stop=5 must be a list"),
        ("stop", ["x"] * 17, "stop has 17 strings; at most 16"),
        ("stop_token_ids", [-1], "stop_token_ids: -1 is not a token id"),
        ("stop_token_ids", [True], "stop_token_ids: True is not a token id"),
        ("stop_token_ids", 7, "stop_token_ids=7 must be a list"),
        ("stop_token_ids", list(range(9)), "stop_token_ids has 9 entries; at most 8"),
        ("allowed_token_ids", [], "allowed_token_ids is empty: nothing can be drawn"),
        ("allowed_token_ids", [1.5], "allowed_token_ids: 1.5 is not a token id"),
        ("logit_bias", {-1: 0.0}, "logit_bias: -1 is not a token id"),
        ("logit_bias", {1: 101}, "logit_bias of token 1 is 101; it must lie in [-100, 100]"),
        ("logit_bias", {1: float("nan")}, "logit_bias of token 1 is nan; it must lie in [-100, 100]"),
        ("logit_bias", [1], "logit_bias must map token ids to numbers"),
        ("logit_bias", dict.fromkeys(range(301), 0), "logit_bias has 301 entries; at most 300"),
    ],
)
def test_sampling_params_name_the_field(field: str, value: Any, message: str) -> None:
    with pytest.raises(RequestError) as caught:
        SamplingParams(**{field: value})
    assert str(caught.value) == message
    assert caught.value.param == field


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ([], "the prompt is empty: it must hold at least one token"),
        ([[]], "the prompt is empty: it must hold at least one token"),
        ([1, -4], "the prompt holds token id -4; ids lie in [0, 99]"),
        ([1, 100], "the prompt holds token id 100; ids lie in [0, 99]"),
        ([2**31], "the prompt holds token id 2147483648; ids lie in [0, 99]"),
        ([-(2**63)], "the prompt holds token id -9223372036854775808; ids lie in [0, 99]"),
        ([2**70], "the prompt must be a list of token ids"),
        ([1, 2**64], "the prompt must be a list of token ids"),
        ([1.0, 2.0], "the prompt must be a list of token ids"),
        ([1, None], "the prompt must be a list of token ids"),
        ([True, False], "the prompt must be a list of token ids"),
        ([5, True], "the prompt must be a list of token ids"),
        ([[1, 2]], "the prompt must be a list of token ids"),
        ([[1], [1, 2]], "the prompt must be a list of token ids"),
        ("text", "the prompt must be a list of token ids"),
        (5, "the prompt must be a list of token ids"),
        (None, "the prompt must be a list of token ids"),
    ],
)
def test_prompt_is_refused(prompt: Any, message: str) -> None:
    with pytest.raises(RequestError) as caught:
        check(prompt)
    assert str(caught.value) == message
    assert caught.value.param == "prompt"


@pytest.mark.parametrize("length", [32, 33, 500])
def test_prompt_longer_than_the_context(length: int) -> None:
    with pytest.raises(RequestError) as caught:
        check([1] * length)
    assert str(caught.value) == (
        f"the prompt has {length} tokens; the context is 32 tokens"
        " and must hold the prompt and at least one more"
    )
    assert (caught.value.param, caught.value.code) == ("prompt", "context_length_exceeded")


def test_a_prompt_that_fills_the_context_can_only_be_scored() -> None:
    request = check([1] * 32, max_tokens=0, prompt_logprobs=0)
    assert request.max_total_tokens == 32
    with pytest.raises(RequestError, match="must hold the prompt and at least one more"):
        check([1] * 32, max_tokens=None)


@pytest.mark.parametrize(
    ("limits", "params", "param", "code", "message"),
    [
        (
            LIMITS,
            {"max_tokens": 30},
            "max_tokens",
            "context_length_exceeded",
            "max_tokens=30 and a prompt of 3 tokens exceed the context of 32 tokens",
        ),
        (LIMITS, {"max_tokens": 0}, "max_tokens", None, "max_tokens=0 needs echo or prompt_logprobs"),
        (
            Limits(vocab_size=100, max_model_len=32, pool_tokens=16),
            {"max_tokens": 20},
            "max_tokens",
            "context_length_exceeded",
            "3 prompt tokens and max_tokens=20 need more than the whole page pool of 16 tokens;"
            " lower max_tokens, or start the server with more --kv-pages",
        ),
        (
            LIMITS,
            {"stop_token_ids": [100]},
            "stop_token_ids",
            None,
            "stop_token_ids: token 100 is not in the vocabulary of 100",
        ),
        (
            LIMITS,
            {"logit_bias": {10**30: 1}},
            "logit_bias",
            None,
            f"logit_bias: token {10**30} is not in the vocabulary of 100",
        ),
        (
            LIMITS,
            {"allowed_token_ids": [5, 101]},
            "allowed_token_ids",
            None,
            "allowed_token_ids: token 101 is not in the vocabulary of 100",
        ),
        (
            Limits(vocab_size=100, max_model_len=32, pool_tokens=64, eos_token_ids=tuple(range(10))),
            {"stop_token_ids": tuple(range(20, 27))},
            "stop_token_ids",
            None,
            "17 stop tokens, the model's own 10 included; at most 16",
        ),
    ],
)
def test_request_is_refused(
    limits: Limits, params: dict[str, Any], param: str, code: str | None, message: str
) -> None:
    with pytest.raises(RequestError) as caught:
        check(limits=limits, **params)
    assert str(caught.value) == message
    assert (caught.value.param, caught.value.code) == (param, code)


def test_what_a_request_holds() -> None:
    request = check(np.asarray([1, 5, 7], np.uint8), stop_token_ids=[3, 9], max_tokens=4)
    assert request.prompt_token_ids.dtype == np.int32
    assert request.prompt_token_ids.tolist() == [1, 5, 7]
    assert request.stop_token_ids == (3, 9, 2)  # its own first, the model's after, each once
    assert request.max_total_tokens == 7
    assert check(max_tokens=None).max_total_tokens == 32
    assert check(ignore_eos=True, stop_token_ids=[3]).stop_token_ids == (3,)


def test_params_are_normalised_and_the_callers_own() -> None:
    bias = {1: 2.0}
    lists: dict[str, Any] = {"stop": "end", "stop_token_ids": [4]}
    params = SamplingParams(logit_bias=bias, **lists)
    bias[2] = 1000.0
    assert (params.stop, params.stop_token_ids, params.logit_bias) == (("end",), (4,), {1: 2.0})
    assert SamplingParams(temperature=0).greedy and not SamplingParams(temperature=0.1).greedy


def test_numpy_scalars_become_python_numbers() -> None:
    values: dict[str, Any] = {"temperature": 0.5, "top_k": 3, "seed": 7, "max_tokens": 4, "ignore_eos": True}
    scalars = [np.float32(0.5), np.int64(3), np.uint64(7), np.int32(4), np.bool_(True)]
    ids = {"stop_token_ids": (5, 6), "allowed_token_ids": (1, 2), "logit_bias": {1: 2.0}}
    arrays: dict[str, Any] = {
        "stop_token_ids": np.array([5, 6]),
        "allowed_token_ids": np.array([1, 2], np.int32),
        "logit_bias": {np.int64(1): np.float32(2.0)},
    }
    params = SamplingParams(**dict(zip(values, scalars, strict=True)), **arrays)
    assert params == SamplingParams(**values, **ids)
    assert repr(params) == repr(SamplingParams(**values, **ids))  # np.int64(3) == 3, but is not written so
    for field, value in {
        "temperature": np.float32("nan"),
        "n": np.bool_(True),
        "top_k": np.float64(3),
    }.items():
        with pytest.raises(RequestError, match=field):
            SamplingParams(**{field: value})  # type: ignore[arg-type]


def test_the_callers_array_is_copied() -> None:
    prompt = np.asarray([1, 2, 3], np.int32)
    request = check(prompt)
    prompt[:] = 50
    assert request.prompt_token_ids.tolist() == [1, 2, 3]


def test_tokens_that_can_never_be_drawn_are_refused() -> None:
    with pytest.raises(RequestError, match="no token could be drawn") as caught:
        check(allowed_token_ids=(3, 4), stop_token_ids=(3, 4, 5), min_tokens=1, max_tokens=4)
    assert caught.value.param == "allowed_token_ids"
    check(allowed_token_ids=(3, 4), stop_token_ids=(3,), min_tokens=1, max_tokens=4)
    check(allowed_token_ids=(3, 4), stop_token_ids=(3, 4), max_tokens=4)


def test_best_of() -> None:
    assert (SamplingParams().sequences, SamplingParams(n=3).sequences) == (1, 3)
    assert SamplingParams(n=2, best_of=5).sequences == 5
    assert SamplingParams(best_of=1, temperature=0).sequences == 1
    with pytest.raises(RequestError, match="best_of=2 is less than n=3") as caught:
        SamplingParams(n=3, best_of=2)
    assert caught.value.param == "best_of"
    with pytest.raises(RequestError, match="best_of=2 needs a temperature above 0"):
        SamplingParams(best_of=2, temperature=0)


def test_where_a_request_stands() -> None:
    params = SamplingParams()
    plain = check_request("r", [1], params, LIMITS, 0.0)
    assert (plain.tier, plain.priority, plain.deadline, plain.salt) == (Tier.ONLINE, 0, None, b"")
    request = check_request(
        "r", [1], params, LIMITS, 1.0, tier=Tier.BATCH, priority=-5, deadline=2.5, salt=b"tenant"
    )
    assert (request.tier, request.priority, request.deadline) == (Tier.BATCH, -5, 2.5)
    assert request.salt == b"tenant"


@pytest.mark.parametrize(
    ("place", "param", "message"),
    [
        ({"tier": "batch"}, "service_tier", "tier='batch' must be one of ['online', 'batch']"),
        ({"priority": True}, "priority", "priority=True must be an integer"),
        ({"priority": 1.0}, "priority", "priority=1.0 must be an integer"),
        ({"priority": 2**31}, "priority", "priority=2147483648 must lie in [-2147483647, 2147483647]"),
        ({"priority": -(2**31)}, "priority", "priority=-2147483648 must lie in [-2147483647, 2147483647]"),
        ({"deadline": float("nan")}, "timeout", "deadline=nan must be a finite number"),
        ({"deadline": float("inf")}, "timeout", "deadline=inf must be a finite number"),
        ({"deadline": "1"}, "timeout", "deadline='1' must be a finite number"),
        ({"salt": "tenant"}, "cache_salt", "salt='tenant' must be bytes"),
        ({"salt": b"x" * 1025}, "cache_salt", "the salt has 1025 bytes; at most 1024"),
    ],
)
def test_a_place_that_is_none_is_refused(place: dict[str, Any], param: str, message: str) -> None:
    with pytest.raises(RequestError) as caught:
        check_request("r", [1], SamplingParams(), LIMITS, 0.0, **place)
    assert (str(caught.value), caught.value.param) == (message, param)
