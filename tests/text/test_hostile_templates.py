"""Templates that take too long or too much are refused, and the next render is as if nothing had happened."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest

from jaxserve.text.chat_template import ChatTemplate, ChatTemplateError, names_read
from jaxserve.text.renderers import RenderError, Renderers

MESSAGES = [{"role": "user", "content": "x"}]
SECONDS = 0.3


@pytest.fixture(scope="module")
def renderers() -> Iterator[Renderers]:
    made = Renderers(2, seconds=SECONDS)
    assert made.render("{{ 1 }}", {}) == "1"  # the process is there
    yield made
    made.close()


DOUBLING = "{% set ns = namespace(x='ab') %}{% for i in range(60) %}{% set ns.x = "
HOSTILE = {
    "nested loops": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "recursive macros": "{% macro f(n) %}{% if n %}{{ f(n-1) }}{{ f(n-1) }}{% endif %}{% endmacro %}"
    "{{ f(60) }}",
    "a long string": "{{ 'a' * 10**9 }}",
    "a longer string": "{{ ('a' * 10**15)|length }}",
    "a large number": "{{ 10**(10**9) }}",
    "a shifted number": "{% set x = 3**99999 %}{{ x**99999 }}",
    "doubling by ~": DOUBLING + "ns.x ~ ns.x %}{% endfor %}{{ ns.x }}",
    "doubling by +": DOUBLING + "ns.x + ns.x %}{% endfor %}{{ ns.x }}",
    "doubling by format": DOUBLING + "'%s%s'|format(ns.x, ns.x) %}{% endfor %}{{ ns.x }}",
    "doubling by replace": DOUBLING + "ns.x.replace('b', 'bb' * 99999) %}{% endfor %}{{ ns.x }}",
    "doubling a list": DOUBLING + "[ns.x, ns.x] %}{% endfor %}{{ ns.x }}",
    "comparing doubled lists": DOUBLING + "[ns.x, ns.x] %}{% endfor %}{% set y = namespace(x='ab') %}"
    "{% for i in range(60) %}{% set y.x = [y.x, y.x] %}{% endfor %}{{ ns.x == y.x }}",
    "hashing doubled tuples": DOUBLING + "(ns.x, ns.x) %}{% endfor %}{{ {ns.x: 1} }}",
    "a wide format": "{{ '%1000000000d'|format(1) }}",
    "a wide str.format": "{{ '{:>1000000000}'.format(1) }}",
    "a wide center": "{{ 'a'|center(1000000000) }}",
    "a wide ljust": "{{ 'a'.ljust(1000000000) * 9 }}",
    "a wide indent": "{{ ('a\\n' * 99999)|indent(99999) }}",
    "a wide tojson": "{{ [[[1]]]|tojson(indent=400000000) }}",
    "a large join": "{{ (['a' * 99999] * 99999)|join('b' * 99999) }}",
    "a large list": "{{ ([1] * 10**9)|length }}",
    "colliding keys": "{{ dict.fromkeys(range(0, 99999 * (2**61 - 1), 2**61 - 1))|length }}"
    "{% for i in range(99) %}"
    "{{ dict.fromkeys(range(0, 99999 * (2**61 - 1), 2**61 - 1))|length }}{% endfor %}",
    "lorem ipsum": "{{ lipsum(n=10**7) }}",
    "a long prompt": "{{ 'a' * 40000000 }}",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_is_refused(renderers: Renderers, name: str) -> None:
    start = time.monotonic()
    template = ChatTemplate(HOSTILE[name], renderers=renderers)
    assert time.monotonic() - start < 1  # nothing of it is computed before it is rendered
    with pytest.raises(ChatTemplateError) as caught:
        template.render(MESSAGES)
    assert time.monotonic() - start < SECONDS + 5
    words = ("takes longer than 0.3 s", "too much memory", "Error in", "at most")
    assert any(word in str(caught.value) for word in words), str(caught.value)
    assert ChatTemplate("{{ messages[0].content }}", renderers=renderers).render(MESSAGES) == "x"


def test_others_go_on_meanwhile(renderers: Renderers) -> None:
    """A template that holds Python's lock in its process holds up neither threads here nor other renders."""
    slow = ChatTemplate("{{ 10**(10**9) }}", renderers=renderers)
    refused: list[str] = []

    def render() -> None:
        with pytest.raises(ChatTemplateError) as caught:
            slow.render(MESSAGES)
        refused.append(str(caught.value))

    thread = threading.Thread(target=render)
    thread.start()
    turns = 0
    longest = 0.0
    quick = ChatTemplate("{{ messages|length }}", renderers=renderers)
    while thread.is_alive():
        before = time.monotonic()
        assert quick.render(MESSAGES) == "1"
        longest = max(longest, time.monotonic() - before)
        turns += 1
    thread.join()
    assert refused == ["the chat template takes longer than 0.3 s"]
    assert turns > 3


def test_deeply_nested_sources_are_refused() -> None:
    with pytest.raises(ChatTemplateError, match="nested too deeply"):
        ChatTemplate("{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}")


def test_an_unknown_filter_shows_when_the_model_is_loaded() -> None:
    with pytest.raises(ChatTemplateError, match="line 2: there is no filter 'nothing'"):
        ChatTemplate("\n{{ 1|nothing }}")
    with pytest.raises(ChatTemplateError, match="line 1: there is no test 'nothing'"):
        ChatTemplate("{{ 1 is nothing }}")


def test_what_is_not_plain_data(renderers: Renderers) -> None:
    with pytest.raises(RenderError, match="plain data"):
        renderers.render("{{ x }}", {"x": object()})


def test_a_process_that_is_gone_is_replaced(renderers: Renderers) -> None:
    for process in renderers._free:
        process.kill()
        process.wait()
    assert renderers.render("{{ 2 }}", {}) == "2"


@pytest.mark.parametrize(
    ("source", "last", "text"),
    [
        ("{% for m in messages %}<{{ m.content }}>{% endfor %}", "Once upon", "<x><Once upon"),
        ("{% for m in messages %}<{{ m.content }}>{% endfor %}", "Once ", "<x><Once "),
        ("{% for m in messages %}<{{ m.content|trim }}>{% endfor %}", " Once ", "<x><Once"),
        ("{% for m in messages %}<{{ m.content }}>{% endfor %}", "x", "<x><x"),
    ],
)
def test_a_message_is_continued(source: str, last: str, text: str) -> None:
    messages = [*MESSAGES, {"role": "assistant", "content": last}]
    made = ChatTemplate(source).render(messages, add_generation_prompt=False, continue_final_message=True)
    assert made == text


@pytest.mark.parametrize(("source", "last"), [("{{ messages|length }}", "abc"), ("{{ messages }}", "  ")])
def test_a_message_that_cannot_be_continued(source: str, last: str) -> None:
    with pytest.raises(ChatTemplateError, match="last message"):
        ChatTemplate(source).render([{"role": "assistant", "content": last}], continue_final_message=True)


def test_names_that_a_template_reads() -> None:
    source = "{% set x = enable %}{% for m, n in messages %}{{ m.tools }}{{ n }}{% endfor %}"
    assert names_read(source) == {"messages", "enable"}
    source = "{% set tools = tools or none %}{{ 10**(10**9) }}{{ 'a'|center(10**10) }}{{ tools }}"
    assert names_read(source) == {"tools"}  # and nothing was computed
