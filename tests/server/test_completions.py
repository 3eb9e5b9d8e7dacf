"""`/v1/completions` through the `openai` client, against answers computed by hand (see `tests/fakes.py`)."""

from __future__ import annotations

import math

import pytest

from jaxserve.engine.outputs import Sink
from jaxserve.scheduler.types import Request
from tests.fakes import EOS, FakeTokenizer
from tests.server.fakes import FakeEngine
from tests.server.harness import MODEL, Serve, Served

LN2 = math.log(2)


def test_text(served: Served) -> None:
    reply = served.openai.completions.create(model=MODEL, prompt="xa", max_tokens=4)
    assert reply.object == "text_completion"
    assert reply.model == MODEL
    assert reply.id.startswith("cmpl-")
    [choice] = reply.choices
    assert (choice.text, choice.finish_reason, choice.logprobs) == ("bcde", "length", None)
    assert reply.usage is not None
    assert reply.usage.model_dump(exclude_none=True) == {
        "prompt_tokens": 2,
        "completion_tokens": 4,
        "total_tokens": 6,
        "prompt_tokens_details": {"cached_tokens": 0},
    }


def test_sixteen_tokens_by_default(served: Served) -> None:
    reply = served.openai.completions.create(model=MODEL, prompt="0")
    assert reply.choices[0].text == "1234567890123456"


def test_end_token_stops(served: Served) -> None:
    reply = served.openai.completions.create(model=MODEL, prompt="X")
    assert (reply.choices[0].text, reply.choices[0].finish_reason) == ("YZ", "stop")
    assert reply.usage is not None
    assert reply.usage.completion_tokens == 3  # the end token was computed, and counts


@pytest.mark.parametrize("prompt", [[97], "a", ["a"], [[97]]])
def test_forms_of_one_prompt(served: Served, prompt: object) -> None:
    reply = served.completion(prompt=prompt, max_tokens=2)
    assert [choice["text"] for choice in reply.json()["choices"]] == ["bc"]


@pytest.mark.parametrize("prompts", [["a", "5", "X"], [[97], [53], [88]]])
def test_many_prompts_with_n(served: Served, prompts: object) -> None:
    reply = served.completion(prompt=prompts, n=2, max_tokens=3).json()
    assert [choice["index"] for choice in reply["choices"]] == [0, 1, 2, 3, 4, 5]
    assert [choice["text"] for choice in reply["choices"]] == ["bcd", "bcd", "678", "678", "YZ", "YZ"]
    usage = reply["usage"]
    assert (usage["prompt_tokens"], usage["completion_tokens"], usage["total_tokens"]) == (3, 18, 21)


def test_stop_string(served: Served) -> None:
    reply = served.openai.completions.create(model=MODEL, prompt="a", stop="ef", max_tokens=20)
    assert (reply.choices[0].text, reply.choices[0].finish_reason) == ("bcd", "stop")
    reply = served.openai.completions.create(model=MODEL, prompt="a", stop=["zz", "d"], max_tokens=20)
    assert reply.choices[0].text == "bc"


def test_vllm_fields_are_honoured(served: Served) -> None:
    reply = served.completion(stop_token_ids=[ord("d")], max_tokens=10).json()
    assert (reply["choices"][0]["text"], reply["choices"][0]["finish_reason"]) == ("bc", "stop")
    reply = served.completion(prompt="X", ignore_eos=True, max_tokens=4, skip_special_tokens=False).json()
    assert reply["choices"][0]["text"] == "YZ<end>a"
    fields = {"top_k": 5, "min_p": 0.1, "repetition_penalty": 1.1, "min_tokens": 1, "allowed_token_ids": [98]}
    assert served.completion(**fields).status_code == 200


def test_special_tokens_are_added_unless_told(serve: Serve) -> None:
    served = serve(FakeEngine(tokenizer=FakeTokenizer(bos=True)))
    assert served.completion().json()["usage"]["prompt_tokens"] == 2
    assert served.completion(add_special_tokens=False).json()["usage"]["prompt_tokens"] == 1


def test_logprobs(served: Served) -> None:
    reply = served.openai.completions.create(model=MODEL, prompt="a", max_tokens=2, logprobs=2)
    logprobs = reply.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.tokens == ["b", "c"]
    assert logprobs.token_logprobs == pytest.approx([-LN2, -LN2])
    assert logprobs.top_logprobs is not None
    first, second = logprobs.top_logprobs
    assert first == pytest.approx({"b": -LN2, "c": -2 * LN2})
    assert second == pytest.approx({"c": -LN2, "d": -2 * LN2})
    assert logprobs.text_offset == [0, 1]


def test_logprobs_zero_gives_the_token_alone(served: Served) -> None:
    reply = served.openai.completions.create(model=MODEL, prompt="a", max_tokens=1, logprobs=0)
    assert reply.choices[0].logprobs is not None
    assert reply.choices[0].logprobs.top_logprobs is not None
    [top] = reply.choices[0].logprobs.top_logprobs
    assert top == pytest.approx({"b": -LN2})


def test_echo(served: Served) -> None:
    reply = served.openai.completions.create(model=MODEL, prompt=["ab", "12"], echo=True, max_tokens=2)
    assert [choice.text for choice in reply.choices] == ["abcd", "1234"]
    assert served.completion(prompt=[97, 98], echo=True, max_tokens=2).json()["choices"][0]["text"] == "abcd"


@pytest.mark.parametrize("stream", [False, True])
def test_echo_alone(served: Served, stream: bool) -> None:
    request = {"model": MODEL, "prompt": "hello", "echo": True, "max_tokens": 0}
    if stream:
        chunks = list(served.openai.completions.create(**request, stream=True))  # type: ignore[call-overload]
        assert [chunk.choices[0].text for chunk in chunks] == ["hello"]
        assert chunks[0].choices[0].finish_reason == "length"
    else:
        reply = served.openai.completions.create(**request)  # type: ignore[call-overload]
        assert (reply.choices[0].text, reply.choices[0].finish_reason) == ("hello", "length")
        assert reply.usage.completion_tokens == 0


def test_echo_with_logprobs_scores_the_prompt(served: Served) -> None:
    """How evaluation harnesses score a text: max_tokens=0, echo, logprobs."""
    reply = served.completion(prompt="ac", echo=True, max_tokens=0, logprobs=1).json()
    assert reply["choices"][0]["text"] == "ac"
    assert reply["choices"][0]["logprobs"] == {
        "tokens": ["a", "c"],
        "token_logprobs": [None, pytest.approx(-2 * LN2)],  # "c" is second after "a"
        "top_logprobs": [None, pytest.approx({"b": -LN2, "c": -2 * LN2})],
        "text_offset": [0, 1],
    }


def test_echo_with_logprobs_covers_prompt_and_reply(served: Served) -> None:
    reply = served.completion(prompt="ab", echo=True, max_tokens=2, logprobs=0, n=2).json()
    for choice in reply["choices"]:
        assert choice["text"] == "abcd"
        assert choice["logprobs"]["tokens"] == list("abcd")
        assert choice["logprobs"]["text_offset"] == [0, 1, 2, 3]


def test_hidden_special_tokens_have_no_width(serve: Serve) -> None:
    served = serve(FakeEngine(tokenizer=FakeTokenizer(bos=True)))
    reply = served.completion(prompt="Z", echo=True, max_tokens=2, logprobs=0).json()["choices"][0]
    assert reply["text"] == "Z"
    assert reply["logprobs"]["tokens"] == ["<bos>", "Z", "<end>"]
    assert reply["logprobs"]["text_offset"] == [0, 0, 1]


def test_prompt_logprobs(served: Served) -> None:
    reply = served.completion(prompt="ac", max_tokens=0, prompt_logprobs=1).json()
    first, second = reply["choices"][0]["prompt_logprobs"]
    assert not first  # null on the wire
    assert second[str(ord("b"))] == {"logprob": pytest.approx(-LN2), "rank": 1, "decoded_token": "b"}
    assert second[str(ord("c"))] == {"logprob": pytest.approx(-2 * LN2), "rank": 2, "decoded_token": "c"}


def test_stream(served: Served) -> None:
    chunks = list(served.openai.completions.create(model=MODEL, prompt="a", max_tokens=4, stream=True))
    assert [chunk.choices[0].text for chunk in chunks] == ["b", "c", "d", "e"]
    assert [chunk.choices[0].finish_reason for chunk in chunks] == [None, None, None, "length"]
    assert len({chunk.id for chunk in chunks}) == 1
    assert all(chunk.usage is None for chunk in chunks)


def test_stream_usage(served: Served) -> None:
    chunks = list(
        served.openai.completions.create(
            model=MODEL,
            prompt=["a", "bb"],
            max_tokens=2,
            n=2,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    assert chunks[-1].choices == []
    usage = chunks[-1].usage
    assert usage is not None
    assert (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens) == (3, 8, 11)
    texts = dict.fromkeys(range(4), "")
    for chunk in chunks[:-1]:
        assert chunk.usage is None
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert texts == {0: "bc", 1: "bc", 2: "cd", 3: "cd"}


def test_stream_never_leaks_a_part_of_a_stop_string(served: Served) -> None:
    stream = served.openai.completions.create(
        model=MODEL, prompt="a", stop=["defgX", "efg"], max_tokens=30, stream=True
    )
    assert "".join(chunk.choices[0].text for chunk in stream) == "bcd"


def test_stream_with_echo_and_logprobs(serve: Serve) -> None:
    """With one slot, index 1 comes after index 0; with two, both wait for the prompt's logprobs."""
    for slots in (1, 2):
        served = serve(FakeEngine(slots=slots))
        stream = served.openai.completions.create(
            model=MODEL, prompt="ab", echo=True, logprobs=1, n=2, max_tokens=2, stream=True
        )
        texts, tokens, offsets = ["", ""], [[], []], [[], []]  # type: ignore[var-annotated]
        for chunk in stream:
            [choice] = chunk.choices
            texts[choice.index] += choice.text
            assert choice.logprobs is not None
            tokens[choice.index] += choice.logprobs.tokens or []
            offsets[choice.index] += choice.logprobs.text_offset or []
        assert texts == ["abcd", "abcd"]
        assert tokens == [list("abcd")] * 2
        assert offsets == [[0, 1, 2, 3]] * 2


def test_the_stream_as_bytes(served: Served) -> None:
    with served.http.stream(
        "POST", "/v1/completions", json={"model": MODEL, "prompt": "a", "max_tokens": 1, "stream": True}
    ) as reply:
        assert reply.headers["content-type"] == "text/event-stream; charset=utf-8"
        assert reply.headers["cache-control"] == "no-cache"
        text = reply.read().decode()
    events = text.split("\n\n")
    assert all(event.startswith("data: ") for event in events[:-1])
    assert events[-2:] == ["data: [DONE]", ""]


def test_seed_logit_bias_and_penalties_reach_the_engine(serve: Serve) -> None:
    served = serve(FakeEngine())
    seen = []
    submit = served.engine.submit

    def watched(*requests: tuple[Request, Sink]) -> None:
        seen.extend(request for request, _ in requests)
        submit(*requests)

    served.engine.submit = watched  # type: ignore[method-assign]
    fields = {"seed": 7, "temperature": 0.5, "top_p": 0.9, "presence_penalty": 1, "frequency_penalty": -0.5}
    assert served.completion(logit_bias={"97": 1.5}, user="me", **fields).status_code == 200
    params = seen[0].params
    assert (params.seed, params.temperature, params.top_p) == (7, 0.5, 0.9)
    assert (params.presence_penalty, params.frequency_penalty) == (1.0, -0.5)
    assert params.logit_bias == {97: 1.5}
    assert seen[0].stop_token_ids == (EOS,)


def test_a_model_without_a_tokenizer_takes_token_ids_alone(serve: Serve) -> None:
    served = serve(FakeEngine(with_tokenizer=False))
    reply = served.completion(prompt=[97], logprobs=0, max_tokens=1)
    assert reply.json()["choices"][0]["logprobs"]["tokens"] == ["token_id:98"]
    reply = served.completion()
    assert reply.status_code == 400
    assert "no tokenizer" in reply.json()["error"]["message"]


def test_long_prompts_leave_the_loop_free(serve: Serve) -> None:
    """Above `OFF_LOOP_BYTES` the work is done on a thread; the answer is the same."""
    served = serve(FakeEngine(max_model_len=40_000, pages=4096))
    reply = served.completion(prompt="x" * 30_000 + "a", max_tokens=2).json()
    assert reply["choices"][0]["text"] == "bc"
    assert reply["usage"]["prompt_tokens"] == 30_001
