"""Grammars over the embedded model's tokenizer: what ends is what was wanted, what is hostile is refused."""

from __future__ import annotations

import json
import random
import re
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import psutil
import pytest

from checkpoints.embedded import MODEL_DIR
from jaxserve.text import grammars as module
from jaxserve.text.grammars import Grammar, GrammarError, Grammars, Masks, Matcher, TooManyGrammars
from jaxserve.text.tokenizer import Tokenizer
from jaxserve.text.tools.call_grammars import Function, json_body
from jaxserve.text.tools.call_grammars import Grammars as CallGrammars
from jaxserve.text.tools.formats import Format
from tests.schemas import schemas

VOCAB = 4200  # padded beyond the tokenizer's


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_folder(Path(MODEL_DIR))


@pytest.fixture(scope="module")
def grammars(tokenizer: Tokenizer) -> Iterator[Grammars]:
    one = Grammars(tokenizer, VOCAB, tokenizer.eos_token_ids)
    yield one
    one.close()


def tokens_of(mask: Any) -> list[int]:
    return np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little")).tolist()


def walk(grammar: Grammar, tokenizer: Tokenizer, rng: random.Random, most: int = 400) -> str | None:
    """A reply drawn evenly from what is allowed; None where it has not ended after `most` tokens."""
    matcher, ids = grammar.start(), []  # type: ignore[var-annotated]
    for _ in range(most):
        allowed = tokens_of(matcher.mask)
        ends = [token for token in allowed if token in tokenizer.eos_token_ids]
        token = ends[0] if ends and rng.random() < 0.5 else rng.choice(allowed)
        assert token < tokenizer.vocab_size
        if token in tokenizer.eos_token_ids:
            return tokenizer.decode(ids)
        assert token not in tokenizer.special_ids
        ids.append(token)
        matcher.advance(token)
        assert matcher.error is None
        if matcher.complete:
            return tokenizer.decode(ids)
    return None


def test_every_finished_text_is_valid(grammars: Grammars, tokenizer: Tokenizer) -> None:
    rng, finished = random.Random(1), 0
    for i, schema in enumerate(schemas(60)):
        text = walk(grammars.compile("json", json.dumps(schema)), tokenizer, rng)
        if text is not None:
            jsonschema.validate(json.loads(text), schema, cls=jsonschema.Draft202012Validator)
            finished += 1
        assert i < 20 or finished > i // 2
    assert finished > 40


def allows(grammar: Grammar, tokenizer: Tokenizer, text: str) -> bool:
    """Whether a reply may be this text, token by token."""
    matcher = grammar.start()
    for token in tokenizer.encode(text, add_special_tokens=False):
        if matcher.complete or token not in tokens_of(matcher.mask):
            return False
        matcher.advance(token)
        assert matcher.error is None
    return matcher.complete or any(token in tokens_of(matcher.mask) for token in tokenizer.eos_token_ids)


@pytest.mark.parametrize(
    ("schema", "good", "bad"),
    [
        ({"type": "number", "exclusiveMinimum": 0, "exclusiveMaximum": 0.5}, ["0.25"], ["0", "0.0", "0.5"]),
        ({"type": "number", "exclusiveMinimum": 1, "maximum": 1.5}, ["1.5", "1.2"], ["1", "1.0"]),
        ({"type": ["number", "null"], "exclusiveMaximum": 3}, ["2.5", "null"], ["3"]),
        ({"exclusiveMinimum": -2, "type": "number", "minimum": -1}, ["-1"], ["-2", "-1.5"]),
        ({"type": "integer", "exclusiveMinimum": 0, "exclusiveMaximum": 9}, ["1", "8"], ["0", "9"]),
        ({"type": "number", "exclusiveMinimum": 1e12}, ["2000000000000"], ["1000000000000"]),
        (
            {"type": "object", "properties": {"a": {"const": 1}}},
            ['{"a": 1}', '{"b": 5}'],
            ['{"a": 5}', '{"\\u0061": 5}'],
        ),
        ({"type": "object", "properties": {"\n": {"const": 1}}}, ['{"\\n": 1}'], ['{"\\u000a": 5}']),
        (
            {
                "type": "object",
                "properties": {"a": {"enum": [1]}, "minProperties": {"enum": [2]}},
                "additionalProperties": False,
                "minProperties": 2,
                "required": ["a", "minProperties"],
            },
            ['{"a": 1, "minProperties": 2}'],
            ['{"a": 1}', '{"a": 1, "a": 1}'],
        ),
        ({"enum": [{"exclusiveMinimum": 1}]}, ['{"exclusiveMinimum":1}'], ['{"minimum":1}']),
        ({"$defs": {"p": {"exclusiveMinimum": 0, "type": "number"}}, "$ref": "#/$defs/p"}, ["1"], ["0"]),
        (
            {"type": "object", "properties": {"x-guidance": {"type": "integer"}}, "required": ["x-guidance"]},
            ['{"x-guidance": 1}'],
            ['{"x-guidance": "a"}', "{}"],
        ),
        ({"type": "string", "x-guidance": {"json_allowed_escapes": "u"}}, ['"a"'], ['"\\u0061"']),
    ],
)
def test_what_passes_validates(
    grammars: Grammars, tokenizer: Tokenizer, schema: dict[str, Any], good: list[str], bad: list[str]
) -> None:
    for text in good:
        jsonschema.validate(json.loads(text), schema, cls=jsonschema.Draft202012Validator)
    for name, (kind, source, around) in ways(schema).items():
        grammar = grammars.compile(kind, source)
        assert [text for text in good if not allows(grammar, tokenizer, around.format(text))] == [], name
        assert [text for text in bad if allows(grammar, tokenizer, around.format(text))] == [], name


def ways(schema: dict[str, Any]) -> dict[str, tuple[str, str, str]]:
    """How a schema comes to be followed -> (kind, source, the reply, its JSON to be put in)."""
    plain, thinking = Format("hermes"), Format("hermes", "think")
    calls = CallGrammars(plain, {}, opened=False).calls([Function("f", schema)], parallel=False)
    strict = Function("f", schema, strict=True)
    call = '<tool_call>\n{{"name": "f", "arguments": {}}}\n</tool_call>'
    return {
        "alone": ("json", json.dumps(schema), "{}"),
        "after reasoning": (
            "grammar",
            CallGrammars(thinking, {}, opened=False).answer(json_body(schema)),
            "<think>Hm</think>{}",
        ),
        "forced": ("grammar", calls, call),
        "strict": ("grammar", CallGrammars(plain, {}, opened=False).free([strict], parallel=False), call),
    }


def test_every_finished_call_is_valid(grammars: Grammars, tokenizer: Tokenizer) -> None:
    rng, finished = random.Random(5), 0
    for schema in schemas(24, seed=3):
        function = Function("f", schema)
        lark = CallGrammars(Format("llama3"), {}, opened=False).calls([function], parallel=False)
        text = walk(grammars.compile("grammar", lark), tokenizer, rng)
        if text is not None:
            arguments = json.loads(text)["parameters"]
            jsonschema.validate(arguments, schema, cls=jsonschema.Draft202012Validator)
            finished += 1
    assert finished > 12


def test_number_ranges_drawn_at_random(grammars: Grammars, tokenizer: Tokenizer) -> None:
    rng = random.Random(7)
    for _ in range(60):
        low = round(rng.choice([0, -1, 1, -0.001, 0.5, 10, rng.uniform(-3, 3)]), rng.randrange(4))
        schema = {
            "type": rng.choice(["number", "number", "integer"]),
            rng.choice(["minimum", "exclusiveMinimum"]): low,
            rng.choice(["maximum", "exclusiveMaximum"]): low + rng.choice([1, 2.5, 100]),
        }
        grammar = grammars.compile("json", json.dumps(schema))
        for _ in range(5):
            text = walk(grammar, tokenizer, rng, 25)
            if text is not None:
                jsonschema.validate(json.loads(text), schema)


@pytest.mark.parametrize(
    ("kind", "source", "form"),
    [
        ("regex", r"[a-c]{3}-\d{2}(x|yy)?", r"[a-c]{3}-\d{2}(x|yy)?"),
        ("choice", '["yes", "no way", "a.b|c", "größe\\n/"]', "yes|no way|a\\.b\\|c|größe\n/"),
        ("grammar", 'start: "a" b "c"\nb: "x" | "y" b', "ay*xc"),
    ],
)
def test_other_kinds(grammars: Grammars, tokenizer: Tokenizer, kind: str, source: str, form: str) -> None:
    rng = random.Random(2)
    texts = [walk(grammars.compile(kind, source), tokenizer, rng) for _ in range(20)]
    assert len({*texts}) > 1
    assert all(text is not None and re.fullmatch(form, text) for text in texts)


@pytest.mark.parametrize(
    ("kind", "source", "words"),
    [
        ("json", "[]", "object"),
        ("json", "{", "not a JSON schema"),
        ("json", '{"a":' * 5000 + "1" + "}" * 5000, "depth limit"),
        ("json", '{"type": "nothing"}', "."),
        ("json", '{"not": {"type": "string"}}', "not"),
        ("json", '{"type": "array", "uniqueItems": true}', "uniqueItems"),
        ("json", '{"type": "object", "minProperties": 2}', "minProperties"),
        ("json", '{"$ref": "#/x", "x": {"type": "string"}}', "looked for"),
        ("json", '{"$ref": "#/$defs/x/const", "$defs": {"x": {"const": {}}}}', "looked for"),
        ("json", '{"$id": "http://a/b", "$ref": "http://a/b#/x", "x": {}}', "looked for"),
        (
            "json",
            '{"oneOf": [{"type": "integer"}, {"type": "number"}], "x-guidance": {"coerce_one_of": true}}',
            r"not supported\.?$",
        ),
        (
            "json",
            json.dumps({"type": "object", "properties": {f"p{i}": {"type": "string"} for i in range(4000)}}),
            "items|longer",
        ),
        ("json", '{"$ref": "http://169.254.169.254/latest"}', "retriev"),
        ("json", '{"$ref": "file:///etc/passwd"}', "retriev"),
        ("json", '{"$ref": "#/$defs/none"}', "."),
        ("json", "false", "schema"),
        ("json", '{"type": "string", "pattern": "(?=a)b"}', "look"),
        ("json", '{"x-guidance": {"lenient": true}, "not": {}}', "."),
        ("regex", "((", "unclosed"),
        ("regex", r"(a)\1", "backreference"),
        ("regex", "(" * 10**5 + ")" * 10**5, "."),
        ("regex", "\ud800", "Unicode"),
        ("grammar", "start: nobody", "nobody"),
        ("grammar", "x" * (2**20 + 1), "at most"),
        ("json", json.dumps({"enum": ["x" * 2**20]}), "at most"),
    ],
)
def test_what_cannot_be_followed_is_refused(grammars: Grammars, kind: str, source: str, words: str) -> None:
    with pytest.raises(GrammarError, match=words) as error:
        grammars.compile(kind, source)
    assert len(str(error.value)) <= 400


def test_what_kills_the_compiler_kills_no_server(grammars: Grammars) -> None:
    """llguidance overflows its stack over the first, and over the second it works for minutes."""
    rules = "start: r0\n" + "\n".join(f"r{i}: r{i + 1}" for i in range(50_000)) + '\nr50000: "a"'
    with pytest.raises(GrammarError, match="too deep"):
        grammars.compile("grammar", rules)
    assert grammars.compile("regex", "after[0-9]").mask.any()


def test_what_takes_too_long_is_stopped(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "QUICK_SECONDS", 0.3)
    monkeypatch.setattr(module, "COMPILE_SECONDS", 2.5)
    grammars = Grammars(tokenizer, VOCAB, tokenizer.eos_token_ids)
    terms = "start: R0\n" + "\n".join(f'R{i}: R{i + 1} "x"' for i in range(12_000)) + '\nR12000: "a"'
    refused: list[GrammarError] = []

    def ask() -> None:
        with pytest.raises(GrammarError, match=r"2\.5 s") as error:
            grammars.compile("grammar", terms)
        refused.append(error.value)

    asking = threading.Thread(target=ask)
    asking.start()
    time.sleep(0.1)
    for i in range(5):  # others wait for its quick try at most, not for the long one
        assert grammars.compile("regex", f"later[0-9]{i}").mask.any()
    assert asking.is_alive()
    asking.join()
    assert refused
    assert grammars.compile("regex", "after").mask.any()
    grammars.close()
    assert not [child for child in psutil.Process().children() if child.status() == psutil.STATUS_ZOMBIE]


@pytest.mark.parametrize("bomb", ["((a{0,1000}){0,1000}){0,1000}", "(a|aa|aaa)*(b?){5000}c", "(.*a){500}"])
def test_explosive_expressions_are_followed_or_refused(
    grammars: Grammars, tokenizer: Tokenizer, bomb: str
) -> None:
    try:
        grammar = grammars.compile("regex", bomb)
    except GrammarError:
        return
    matcher, rng = grammar.start(), random.Random(3)
    for _ in range(50):
        if matcher.complete or matcher.error:
            break
        matcher.advance(rng.choice(tokens_of(matcher.mask)))


def test_the_same_grammar_is_compiled_once_and_few_are_kept(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "KEPT", 5)
    monkeypatch.setattr(module, "KEPT_BYTES", 200)
    grammars = Grammars(tokenizer, VOCAB, tokenizer.eos_token_ids)
    first = grammars.compile("regex", "a")
    assert grammars.compile("regex", "a") is first
    assert grammars.compile("choice", '["a"]') is not first
    for i in range(8):
        grammars.compile("regex", f"b{i}")
    assert len(grammars._kept) == 5
    grammars.compile("regex", "c" * 180)
    assert sum(one.size for one in grammars._kept.values()) == grammars._kept_bytes <= 200
    assert grammars.compile("regex", "a") is not first
    grammars.close()


def test_so_many_may_wait(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_COMPILING", 0)
    grammars = Grammars(tokenizer, VOCAB, tokenizer.eos_token_ids)
    with pytest.raises(TooManyGrammars):
        grammars.compile("regex", "one more")
    grammars.close()
    with pytest.raises(GrammarError, match="closed"):
        grammars.compile("regex", "one more")


def test_a_tokenizer_larger_than_the_models_vocabulary(tokenizer: Tokenizer) -> None:
    grammars = Grammars(tokenizer, 3000, tokenizer.eos_token_ids)
    text = walk(grammars.compile("regex", "[a-c]{5}"), tokenizer, random.Random(0))
    assert text is not None and re.fullmatch("[a-c]{5}", text)
    grammars.close()


def test_closing_ends_the_judges(tokenizer: Tokenizer) -> None:
    before = {child.pid for child in psutil.Process().children()}
    grammars = Grammars(tokenizer, VOCAB, tokenizer.eos_token_ids)
    grammars.compile("regex", "a")
    started = [child for child in psutil.Process().children() if child.pid not in before]
    assert started
    grammars.close()
    _, alive = psutil.wait_procs(started, timeout=10)
    assert not alive


def test_masks_are_found_on_their_own_threads(grammars: Grammars) -> None:
    found: list[tuple[str, Matcher]] = []
    done = threading.Semaphore(0)

    def ready(name: str, matcher: Matcher) -> None:
        found.append((name, matcher))
        assert threading.current_thread().name.startswith("jaxserve-masks")
        done.release()

    masks = Masks(ready)
    matchers = {name: grammars.compile("choice", f'["{name}!"]').start() for name in "abcdef"}
    wrong = grammars.compile("regex", "z").start()
    for name, matcher in matchers.items():
        masks.advance(name, matcher, tokens_of(matcher.mask)[0])
    masks.advance("wrong", wrong, 4000)
    for _ in range(len(matchers) + 1):
        assert done.acquire(timeout=10)
    masks.close()
    assert {name for name, _ in found} == {*matchers, "wrong"}
    assert wrong.error is not None and not any(matcher.error for matcher in matchers.values())


def test_a_panic_costs_one_reply(grammars: Grammars, monkeypatch: pytest.MonkeyPatch) -> None:
    class Panic(BaseException):
        pass

    def panic(self: Matcher, token: int) -> None:
        raise Panic("the library is beside itself")

    done = threading.Semaphore(0)
    masks = Masks(lambda whose, matcher: done.release())
    broken = [grammars.compile("regex", "a").start() for _ in range(8)]
    with monkeypatch.context() as patch:
        patch.setattr(Matcher, "advance", panic)
        for matcher in broken:
            masks.advance(None, matcher, 1)
        assert all(done.acquire(timeout=10) for _ in broken)
    assert all(matcher.error and "beside itself" in matcher.error for matcher in broken)
    good = grammars.compile("regex", "ab").start()
    masks.advance(None, good, tokens_of(good.mask)[0])
    assert done.acquire(timeout=10) and good.error is None
    masks.close()
