"""Readers of replies: every family's forms, however the text is cut, and nothing lost that is no call."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxserve.text.tools.formats import Format
from jaxserve.text.tools.hermes import Hermes
from jaxserve.text.tools.llama3 import Llama3
from jaxserve.text.tools.mistral import Mistral
from jaxserve.text.tools.parts import Argued, Called, Part, Plain, Reader, Said, Thought, joined
from jaxserve.text.tools.think import Think

NAMES = ("f", "get_weather")
READERS: dict[str, Callable[[], Reader]] = {
    "hermes": Hermes,
    "mistral": Mistral,
    "llama3": lambda: Llama3(NAMES),
    "think": lambda: Think(Plain(), opened=False),
    "think, opened": lambda: Think(Plain(), opened=True),
    "think, then hermes": lambda: Think(Hermes(), opened=False),
    "plain": Plain,
}
ARGUMENTS = '{"city": "Zürich \\"{[<tool_call>\\\\", "n": [1, {"a": null}]}'


def read(reader: Reader, *pieces: str) -> list[Part]:
    parts = [part for piece in pieces for part in reader.push(piece)]
    return joined([*parts, *reader.finish()])


def call(name: str, arguments: str) -> list[Part]:
    return [Called(name), Argued(arguments)]


F = call("f", '{"x": 1}')
WEATHER = call("get_weather", ARGUMENTS)
HERMES: list[tuple[str, list[Part]]] = [
    ("", []),
    ("Hello <tool> world", [Said("Hello <tool> world")]),
    ('<tool_call>\n{"name": "f", "arguments": {"x": 1}}\n</tool_call>', F),
    ('<tool_call>{"arguments": {"x": 1}, "name": "f"}</tool_call>', F),
    ('<tool_call>{"name":"f","arguments":{"x": 1}}', F),
    ('<tool_call>\n{"name": "f", "arguments": {"x": 1}\n</tool_call>', F),  # the last brace forgotten
    (
        f'I look.\n\n<tool_call>\n{{"name": "get_weather", "arguments": {ARGUMENTS}}}\n</tool_call>\n',
        [Said("I look."), *WEATHER],
    ),
    (
        '<tool_call>{"name": "f", "arguments": {"x": 1}}</tool_call>\n'
        f'<tool_call>{{"name": "get_weather", "arguments": {ARGUMENTS}}}</tool_call>\nDone. ',
        [*F, *WEATHER, Said("Done. ")],
    ),
    ('<tool_call>{"name": "f"}</tool_call>', call("f", "{}")),
    ('<tool_call>{"name": "f", "arguments": null}</tool_call>', call("f", "{}")),
    ('<tool_call>{"name": "f", "arguments": "{\\"x\\": 1}"}</tool_call>', F),
    ('<tool_call>{"id": [1, "}"], "name": "f", "arguments": {"x": 1}, "more": 3 }</tool_call>', F),
    ("<tool_call>", [Said("<tool_call>")]),
    ("a <tool_call> b", [Said("a <tool_call> b")]),
    ('a <tool_call>{"name": 5}</tool_call>', [Said('a <tool_call>{"name": 5}</tool_call>')]),
    ('<tool_call>{"nam', [Said('<tool_call>{"nam')]),
    ('<tool_call>{"name": "f", "arguments": {"x": ', [Called("f"), Argued('{"x": ')]),  # cut by max_tokens
    ('<tool_call><tool_call>{"name": "f", "arguments": {"x": 1}}</tool_call>', [Said("<tool_call>"), *F]),
    ("<tool_call", [Said("<tool_call")]),
    ("a  \n ", [Said("a  \n ")]),
    ('<tool_call>{"name": "f", "arguments": {"x": 1}}</tool_ca', F),
]
MISTRAL: list[tuple[str, list[Part]]] = [
    ("Hello [TOOLS]", [Said("Hello [TOOLS]")]),
    ('[TOOL_CALLS][{"name": "f", "arguments": {"x": 1}}]', F),
    (
        f'[TOOL_CALLS] [{{"name": "f", "arguments": {{"x": 1}}, "id": "abcdefghi"}}, '
        f'{{"name": "get_weather", "arguments": {ARGUMENTS}}}]',
        [*F, *WEATHER],
    ),
    ('[TOOL_CALLS]f[ARGS]{"x": 1}', F),
    (
        f'Well. [TOOL_CALLS]f[ARGS]{{"x": 1}}[TOOL_CALLS]get_weather[ARGS]{ARGUMENTS}',
        [Said("Well."), *F, *WEATHER],
    ),
    ('[TOOL_CALLS]f[CALL_ID]aB3dE5gH7[ARGS]{"x": 1}', F),
    ('[TOOL_CALLS]f{"x": 1}', F),
    ('[TOOL_CALLS] {"name": "f", "arguments": {"x": 1}}', F),
    ("[TOOL_CALLS]", [Said("[TOOL_CALLS]")]),
    ("[TOOL_CALLS] are calls", [Said("[TOOL_CALLS] are calls")]),
    ("[TOOL_CALLS][ARGS]{}", [Said("[TOOL_CALLS][ARGS]{}")]),
    ("[TOOL_CALLS]f[ARGS] none", [Said("[TOOL_CALLS]f[ARGS] none")]),
    ("[TOOL_CALLS]f[CALL_ID]-[ARGS]{}", [Said("[TOOL_CALLS]f[CALL_ID]-[ARGS]{}")]),
    ("[TOOL_CALLS]f[AR", [Said("[TOOL_CALLS]f[AR")]),
    ("[TOOL_CALLS]" + "f" * 200, [Said("[TOOL_CALLS]" + "f" * 200)]),
    ('[TOOL_CALLS][{"name": "f", "arguments": {"x": 1}}, {"x": 2}', [*F, Said(' {"x": 2}')]),
    ('[TOOL_CALLS][{"name": "f", "arguments": {"x": 1}}]\nDone', [*F, Said("Done")]),
]
LLAMA3: list[tuple[str, list[Part]]] = [
    ("Hello", [Said("Hello")]),
    ('{"name": "f", "parameters": {"x": 1}}', F),
    ('<|python_tag|>{"name": "f", "parameters": {"x": 1}}', F),
    (' {"type": "function", "name": "f", "parameters": {"x": 1}}\n', F),
    (
        f'{{"name": "f", "parameters": {{"x": 1}}}}; {{"name": "get_weather", "parameters": {ARGUMENTS}}}',
        [*F, *WEATHER],
    ),
    ('{"name": "f", "parameters": {"x": 1}} That is it', [*F, Said("That is it")]),
    # data, not calls
    ('{"name": "Ann", "parameters": {"x": 1}}', [Said('{"name": "Ann", "parameters": {"x": 1}}')]),
    ('{"name": "f"}', [Said('{"name": "f"}')]),
    ('{"age": 3}', [Said('{"age": 3}')]),
    ("{}", [Said("{}")]),
    ('Use {"name": "f", "parameters": {"x": 1}}', [Said('Use {"name": "f", "parameters": {"x": 1}}')]),
    ("<|python_tag|>print(1)", [Said("<|python_tag|>print(1)")]),
    ("<|python", [Said("<|python")]),
    ("  \n", [Said("  \n")]),
    ('  {"nam', [Said('  {"nam')]),
    ('{"name": "f", "parameters": {"x"', [Called("f"), Argued('{"x"')]),
]
THINK: list[tuple[str, list[Part]]] = [
    ("<think>\nHm.\n</think>\n\nYes", [Thought("Hm."), Said("Yes")]),
    ("\n<think></think>Yes", [Said("Yes")]),
    ("<think>Hm. a < b", [Thought("Hm. a < b")]),
    ("<think>Hm</thin", [Thought("Hm</thin")]),
    ("Yes <think>no</think>", [Said("Yes <think>no</think>")]),
    ("<thin", [Said("<thin")]),
    ("  ", [Said("  ")]),
    ("<think> a </think> b </think> c ", [Thought("a"), Said("b </think> c ")]),
]
OPENED: list[tuple[str, list[Part]]] = [
    ("\nHm.\n</think>\n\nYes\n", [Thought("Hm."), Said("Yes\n")]),
    ("Hm", [Thought("Hm")]),
    ("</think>Yes", [Said("Yes")]),
    ("", []),
]
BOTH: list[tuple[str, list[Part]]] = [
    (
        '<think>a <tool_call> b</think>\n<tool_call>{"name": "f", "arguments": {"x": 1}}</tool_call>',
        [Thought("a <tool_call> b"), *F],
    ),
]
CASES = [
    (name, text, parts)
    for name, cases in (
        ("hermes", HERMES),
        ("mistral", MISTRAL),
        ("llama3", LLAMA3),
        ("think", THINK),
        ("think, opened", OPENED),
        ("think, then hermes", BOTH),
    )
    for text, parts in cases
]


@pytest.mark.parametrize(("name", "text", "parts"), CASES, ids=lambda value: repr(value)[:60])
def test_forms(name: str, text: str, parts: list[Part]) -> None:
    assert read(READERS[name](), text) == parts
    assert read(READERS[name](), *text) == parts  # a character at a time
    for cut in range(1, len(text)):
        assert read(READERS[name](), text[:cut], text[cut:]) == parts, text[:cut]


# what the readers look at, and what is easily mistaken for it
FRAGMENTS = st.sampled_from(
    [
        *("<tool_call>", "</tool_call>", "[TOOL_CALLS]", "[ARGS]", "[CALL_ID]", "<|python_tag|>"),
        *("<think>", "</think>", "<", "[", "{", "}", "]", '"', "\\", ",", ":", ";", " ", "\n", "f", "1", "é"),
        *('"name"', '"arguments"', '"parameters"', '{"x": 1}', '"f"', "null", "tru"),
        *('{"name": "f", "arguments": {"x": 1}}', '{"name": "f", "parameters": {}}', "get_weather"),
    ]
)
TEXTS = st.lists(FRAGMENTS, max_size=12).map("".join)


@pytest.mark.parametrize("name", READERS)
@given(text=TEXTS, cuts=st.lists(st.integers(0, 60), max_size=6))
def test_any_cut_gives_the_same(name: str, text: str, cuts: list[int]) -> None:
    places = sorted({0, len(text), *(min(cut, len(text)) for cut in cuts)})
    whole = read(READERS[name](), text)
    assert read(READERS[name](), *(text[a:b] for a, b in pairwise(places))) == whole
    assert read(READERS[name](), *text) == whole


def said(parts: list[Part]) -> str:
    return "".join(part.text for part in parts if isinstance(part, Said))


@pytest.mark.parametrize("name", READERS)
@given(text=TEXTS)
def test_without_calls_and_reasoning_nothing_is_lost(name: str, text: str) -> None:
    parts = read(READERS[name](), text)
    if all(isinstance(part, Said) for part in parts) and name not in ("think, opened", "think, then hermes"):
        if name == "think" and text.lstrip().startswith("<think>"):
            return  # an empty one
        assert said(parts) == text
    for part in parts:
        if isinstance(part, Said | Thought):
            assert part.text in text


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=8,
)
OBJECTS = st.dictionaries(st.text(max_size=6), JSON, max_size=4)


@settings(deadline=None)  # a busy machine takes what it takes
@given(
    arguments=st.lists(OBJECTS, min_size=1, max_size=3),
    ascii_=st.booleans(),
    before=st.text(alphabet="ab \n<[{", max_size=6),
)
def test_what_is_written_is_read(arguments: list[dict[str, object]], ascii_: bool, before: str) -> None:
    texts = [json.dumps(one, ensure_ascii=ascii_) for one in arguments]
    expected = [part for text in texts for part in call("f", text)]
    hermes = "\n".join(f'<tool_call>\n{{"name": "f", "arguments": {t}}}\n</tool_call>' for t in texts)
    marked = "".join(f"[TOOL_CALLS]f[ARGS]{t}" for t in texts)
    listed = ", ".join(f'{{"name": "f", "arguments": {t}}}' for t in texts)
    llama = "; ".join(f'{{"name": "f", "parameters": {t}}}' for t in texts)
    start: list[Part] = [Said(before.rstrip())] if before.strip() else []
    assert read(Hermes(), *(before + hermes)) == start + expected
    assert read(Mistral(), *(before + marked)) == start + expected
    assert read(Mistral(), *(before + f"[TOOL_CALLS] [{listed}]")) == start + expected
    assert read(Llama3(NAMES), *llama) == expected


@pytest.mark.parametrize("name", READERS)
@pytest.mark.parametrize(
    "unit",
    [
        "<tool_call>",
        "[TOOL_CALLS][",
        '{"a":',
        '<tool_call>{"name": "f", "arguments": {',
        " ",
        "\\",
        "<",
        "[[",
    ],
)
def test_linear_time(name: str, unit: str) -> None:
    """Twice the text takes about twice as long: far from four times, at sizes where that would show."""

    def seconds(size: int) -> float:
        reader = READERS[name]()
        text = unit * (size // len(unit))
        start = time.thread_time()
        for place in range(0, len(text), 4):
            reader.push(text[place : place + 4])
        reader.finish()
        return time.thread_time() - start

    seconds(1000)
    small = min(seconds(10_000) for _ in range(2))
    assert seconds(80_000) < 8 * 4 * small + 0.05


def test_arguments_are_streamed() -> None:
    reader = Hermes()
    reader.push('<tool_call>{"name": "f", "arguments": {"te')
    assert reader.push("xt") == [Argued("xt")]


def test_formats_read_what_they_are_for() -> None:
    hermes = Format("hermes", "think")
    assert read(hermes.reader(tools=["f"], opened=True), "a</think>b<tool_call>") == [
        Thought("a"),
        Said("b<tool_call>"),
    ]
    written = '<tool_call>{"name": "f", "arguments": {}}</tool_call>'
    assert read(hermes.reader(tools=[], opened=False), written) == [Said(written)]  # nothing may be called
