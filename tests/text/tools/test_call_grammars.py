"""Grammars of calls: llguidance takes what the families write and nothing else, and readers read it back."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import llguidance
import pytest
import tokenizers

from jaxserve.text.json_schemas import SchemaError
from jaxserve.text.tools.call_grammars import (
    Function,
    Grammars,
    choice_body,
    in_words,
    json_body,
    regex_body,
)
from jaxserve.text.tools.formats import Format, detect
from jaxserve.text.tools.hidden import Hidden
from jaxserve.text.tools.parts import Argued, Called, joined

MODEL = Path(__file__).parents[3] / "checkpoints/embedded/model/tokenizer.json"
MARKERS = ("<think>", "</think>", "<tool_call>", "</tool_call>", "[TOOL_CALLS]", "[ARGS]", "<|python_tag|>")


def vocabulary(added: Sequence[str] = (), *, special: bool = False) -> tokenizers.Tokenizer:
    made = tokenizers.Tokenizer.from_file(str(MODEL))
    made.add_tokens([tokenizers.AddedToken(text, special=special) for text in added])
    return made


# markers as text, as added tokens, and as special tokens
VOCABULARIES = {
    "text": vocabulary(),
    "added": vocabulary(MARKERS),
    "special": vocabulary(MARKERS, special=True),
}
COMPILED = {name: llguidance.LLTokenizer(made.to_str()) for name, made in VOCABULARIES.items()}


def grammars(kind: str, format: Format, *, opened: bool = False) -> Grammars:
    made = VOCABULARIES[kind]
    ids = {marker: made.token_to_id(marker) for marker in MARKERS}
    return Grammars(format, {m: i for m, i in ids.items() if i is not None}, opened=opened)


def allows(kind: str, lark: str, text: str) -> bool:
    """Whether the grammar takes this text as a whole reply."""
    grammar = llguidance.LLMatcher.grammar_from_lark(lark)
    matcher = llguidance.LLMatcher(COMPILED[kind], grammar, log_level=0)
    assert not matcher.is_error(), matcher.get_error()
    ids = VOCABULARIES[kind].encode(text, add_special_tokens=False).ids
    return matcher.validate_tokens(ids) == len(ids) and matcher.consume_tokens(ids) and matcher.is_accepting()


SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"x": {"$ref": "#/$defs/number"}},
    "required": ["x"],
    "additionalProperties": False,
    "$defs": {"number": {"type": "integer"}},
}
TOOLS = [Function("f", SCHEMA, strict=True), Function("g-2", {"type": "object", "properties": {}})]

WRITTEN = {  # family -> one call, another, a call that breaks the schema
    "hermes": (
        '<tool_call>\n{"name": "f", "arguments": {"x": 1}}\n</tool_call>',
        '<tool_call>\n{"name": "g-2", "arguments": {"y": [null]}}\n</tool_call>',
        '<tool_call>\n{"name": "f", "arguments": {"x": "one"}}\n</tool_call>',
    ),
    "mistral": (
        '[TOOL_CALLS]f[ARGS]{"x": 1}',
        '[TOOL_CALLS]g-2[ARGS]{"y": [null]}',
        '[TOOL_CALLS]f[ARGS]{"x": "one"}',
    ),
    "mistral-list": (
        '[TOOL_CALLS] [{"name": "f", "arguments": {"x": 1}}]',
        '[TOOL_CALLS] [{"name": "g-2", "arguments": {"y": [null]}}]',
        '[TOOL_CALLS] [{"name": "f", "arguments": {"x": "one"}}]',
    ),
    "llama3": (
        '{"name": "f", "parameters": {"x": 1}}',
        '{"name": "g-2", "parameters": {"y": [null]}}',
        '{"name": "f", "parameters": {"x": "one"}}',
    ),
}
BOTH = {
    "hermes": "\n".join(WRITTEN["hermes"][:2]),
    "mistral": "".join(WRITTEN["mistral"][:2]),
    "mistral-list": '[TOOL_CALLS] [{"name": "f", "arguments": {"x": 1}}, {"name": "g-2", "arguments": {}}]',
}
FAMILIES = [*itertools.product(WRITTEN, VOCABULARIES)]


@pytest.mark.parametrize(("family", "kind"), FAMILIES)
@pytest.mark.parametrize("reasoning", ["none", "may", "opened"])
def test_required(family: Any, kind: str, reasoning: str) -> None:
    format = Format(family, None if reasoning == "none" else "think")
    made = grammars(kind, format, opened=reasoning == "opened")
    one, other, wrong = WRITTEN[family]
    for before in {"none": [""], "may": ["", "<think>a {b</think>\n\n"], "opened": ["a\n</think>\n\n"]}[
        reasoning
    ]:
        several = made.calls(TOOLS, parallel=True)
        assert allows(kind, several, before + one)
        assert allows(kind, several, before + other)
        assert not allows(kind, several, before + wrong)
        assert not allows(kind, several, before)
        assert not allows(kind, several, before + "Hello")
        assert not allows(kind, several, before + one + " Hello")
        single = made.calls(TOOLS[:1], parallel=False)
        assert allows(kind, single, before + one)
        assert not allows(kind, single, before + other)
        if family in BOTH:
            assert allows(kind, several, before + BOTH[family])
            assert not allows(kind, made.calls(TOOLS, parallel=False), before + BOTH[family])
        reader = format.reader(tools=[tool.name for tool in TOOLS], opened=reasoning == "opened")
        parts = joined([*reader.push(before + one), *reader.finish()])
        assert parts[-2:] == [Called("f"), Argued('{"x": 1}')]


@pytest.mark.parametrize(("family", "kind"), FAMILIES)
def test_strict_tools_that_need_not_be_called(family: Any, kind: str) -> None:
    made = grammars(kind, Format(family))
    one, other, wrong = WRITTEN[family]
    several, single = made.free(TOOLS, parallel=True), made.free(TOOLS, parallel=False)
    loose = [TOOLS[1], Function("f", SCHEMA)]  # whose schema nothing holds unless it must be called
    assert allows(kind, made.free(loose, parallel=False), wrong)
    assert not allows(kind, made.calls(loose, parallel=False), wrong)
    for lark in (several, single):
        assert allows(kind, lark, "")
        assert allows(kind, lark, "Hello { there")
        assert allows(kind, lark, one)
        assert not allows(kind, lark, wrong)
    if family != "llama3":
        assert allows(kind, several, f"Hello\n{one}")
        assert allows(kind, several, f"{one}\n{other}\nBye" if family == "hermes" else one + other + "Bye")
        assert not allows(kind, several, f"Hello {wrong}")
        assert allows(kind, single, f"Hello {one}")
        assert not allows(kind, single, one + other)


@pytest.mark.parametrize("kind", VOCABULARIES)
def test_no_reasoning_where_it_is_over(kind: str) -> None:
    ids = {marker: VOCABULARIES[kind].token_to_id(marker) for marker in MARKERS}
    tokens = {marker: id for marker, id in ids.items() if id is not None}
    one = WRITTEN["hermes"][0]
    for closed in (False, True):
        made = Grammars(Format("hermes", "think"), tokens, opened=False, closed=closed)
        lark = made.calls(TOOLS, parallel=True)
        assert allows(kind, lark, one)
        assert allows(kind, lark, f"<think>Hm</think>{one}") == (not closed)


@pytest.mark.parametrize(("family", "kind"), [one for one in FAMILIES if one[0] != "llama3"])
def test_an_answer_in_a_form_or_a_call(family: Any, kind: str) -> None:
    made = grammars(kind, Format(family, "think"))
    one, _, wrong = WRITTEN[family]
    lark = made.answer(json_body({"type": "object", "required": ["a"]}), TOOLS, parallel=True)
    assert allows(kind, lark, '{"a": 1}')
    assert allows(kind, lark, '<think>Hm</think>\n{"a": 1}')
    assert allows(kind, lark, one)
    assert not allows(kind, lark, wrong)
    assert not allows(kind, lark, "Hello")


@pytest.mark.parametrize("kind", VOCABULARIES)
@pytest.mark.parametrize(
    ("body", "right", "wrong"),
    [
        (regex_body(r"a/b\/c\n(x|\\)" + "\n"), "a/b/c\nx\n", "a/b/c\ny\n"),
        (choice_body(['ye"s', "no\n"]), 'ye"s', "yes"),
        (json_body({"enum": ["é", 1]}), '"é"', "2"),
        (json_body(True), "[1]", "x"),
    ],
)
def test_forms_after_reasoning(kind: str, body: str, right: str, wrong: str) -> None:
    lark = grammars(kind, Format(None, "think"), opened=True).answer(body)
    assert allows(kind, lark, f"Hm, a < b.\n</think>\n\n{right}")
    assert not allows(kind, lark, f"Hm</think>{wrong}")
    assert not allows(kind, lark, right)


def test_white_space_in_json_is_bounded() -> None:
    lark = grammars("text", Format()).answer(json_body({"type": "object"}))
    assert allows("text", lark, '{"a": 1}')
    assert not allows("text", lark, '{"a":' + " " * 40 + "1}")


def test_what_is_wrong_is_said_of_the_schema() -> None:
    """Not of the lines of a grammar that nobody sent."""
    functions = [TOOLS[0], Function("bad one", {"not": {}})]
    lark = grammars("text", Format("hermes", "think")).calls(functions, parallel=True)
    place = 1 + next(i for i, line in enumerate(lark.split("\n")) if line.startswith("arguments_1:"))
    error = f"the grammar cannot be followed: at {place}(14): failed to compile JSON schema: no `not`"
    assert in_words(error, lark, functions) == "the parameters of 'bad one' cannot be followed: no `not`"
    form = grammars("text", Format("hermes", "think")).answer(json_body({"not": {}}), [])
    place = 1 + form.count("\n")
    assert in_words(f"at {place}(1): no", form, []) == "the form cannot be followed: no"
    assert in_words("it takes longer than 5 s", form, []) == "it takes longer than 5 s"


def test_a_functions_schema_that_cannot_be_kept_to_is_named() -> None:
    loose = Function("f", {"type": "object", "minProperties": 2})
    with pytest.raises(SchemaError, match="parameters of 'f': minProperties"):
        grammars("text", Format("hermes")).calls([loose], parallel=False)


def test_schemas_cannot_leave_their_place() -> None:
    """A name, a description or a pattern that looks like the grammar's own language stays what it is."""
    schema = {
        "type": "object",
        "properties": {'a"}\nstart: /x/\n': {"enum": ['"\n start: "x"', "%json {}", "// no"]}},
        "description": '}\nstart: "y"',
        "x-guidance": {"lenient": True},
    }
    lark = grammars("text", Format("llama3")).calls([Function("f", schema)], parallel=False)
    arguments = json.dumps({'a"}\nstart: /x/\n': "// no"})
    assert allows("text", lark, f'{{"name": "f", "parameters": {arguments}}}')
    assert not allows("text", lark, "x")
    assert not allows("text", lark, "y")


QWEN = "{% if tools %}...<tool_call>\n{{ tool_call.arguments | tojson }}\n</tool_call>{% endif %}"


@pytest.mark.parametrize(
    ("template", "format"),
    [
        ("", Format()),
        ("{{ messages }}", Format()),
        (QWEN, Format("hermes")),
        (QWEN + "{% if '</think>' in content %}", Format("hermes", "think")),
        (QWEN + "<function=example>", Format()),
        ("{{ '[TOOL_CALLS] [' }}", Format("mistral-list")),
        ("{{ '[TOOL_CALLS]' + name + '[ARGS]' }}", Format("mistral")),
        ('<|start_header_id|> {"name": function name, "parameters": dictionary}', Format("llama3")),
        ("<|start_header_id|>", Format()),
        ("{{ '<think>\n' }}", Format(None, "think")),
    ],
)
def test_the_format_is_told_by_the_template(template: str, format: Format) -> None:
    assert detect(template) == format


def test_flags_decide() -> None:
    assert detect(QWEN, tool_parser="none") == Format()
    assert detect("", tool_parser="llama3", reasoning_parser="think") == Format("llama3", "think")
    assert detect(QWEN + "</think>", reasoning_parser="none") == Format("hermes")
    assert detect("", tool_parser="mistral") == Format("mistral-list")


def test_names_of_special_tokens_are_taken_out() -> None:
    names = ["<|im_end|>", "<|im_start|>", "[INST]", "<|im"]
    text = "a<|im_end|>b<[INST<|im_start|><|im_stop[INST]|<|im_st"
    for size in range(1, len(text)):
        hidden = Hidden(names)
        out = "".join(hidden.push(text[i : i + size]) for i in range(0, len(text), size)) + hidden.flush()
        assert out == "ab<[INST_stop|_st", size
    assert Hidden([]).push("<|im_end|>") == "<|im_end|>"
