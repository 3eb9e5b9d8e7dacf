"""Chat templates render as in transformers; what is wrong with a template or with messages is said."""

from __future__ import annotations

import datetime
from typing import Any

import pytest

from jaxserve.text.chat_template import ChatTemplate, ChatTemplateError

LLAMA3 = """\
{{- bos_token }}
{%- if custom_tools is defined %}
    {%- set tools = custom_tools %}
{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\n" }}
{%- if tools is not none %}
    {%- for t in tools %}
        {{- t | tojson(indent=4) }}
        {{- "\\n\\n" }}
    {%- endfor %}
{%- endif %}
{{- system_message }}
{{- "<|eot_id|>" }}
{%- for message in messages %}
    {%- if not (message.role == 'ipython' or message.role == 'tool' or 'tool_calls' in message) %}
        {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}
        {{- message['content'] | trim + '<|eot_id|>' }}
    {%- elif 'tool_calls' in message %}
        {{- '{"name": "' + message.tool_calls[0].function.name + '", "parameters": ' }}
        {{- message.tool_calls[0].function.arguments | tojson }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""

CHATML = """\
{% for message in messages %}
{% if loop.first and message['role'] != 'system' %}
<|im_start|>system
You are a helpful assistant.<|im_end|>
{% endif %}
{{'<|im_start|>' + message['role'] + '\\n'}}
{% generation %}
{{message['content'] + '<|im_end|>' + '\\n'}}
{% endgeneration %}
{% endfor %}
{% if add_generation_prompt %}
<|im_start|>assistant
{% if enable_thinking is defined and enable_thinking is false %}
<think>

</think>
{% endif %}
{% endif %}
"""

MISTRAL = """\
{{ bos_token }}{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}\
{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}\
{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}\
{% elif message['role'] == 'assistant' %}{{ message['content'] + eos_token}}\
{% else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}"""

LOOPS = """\
{%- set ns = namespace(found=false, last='') %}
{%- for message in messages[::-1] %}
    {%- if message.role == 'assistant' %}{% continue %}{% endif %}
    {%- set ns.found = true %}
    {%- set ns.last = message.content.split('</think>')[-1].lstrip('\\n') %}
    {%- break %}
{%- endfor %}
{{- ns.found ~ ns.last }}{{ dict(a=1, b='<é&>') | tojson }}
{{- {'b': 1, 'a': [1.5, none, true]} | tojson(sort_keys=true) }}
{{- dict.fromkeys(['x'], 1) | tojson(separators=(',', ':')) }}{{ documents is none }}{{ undefined_name }}
"""

CHATS: list[list[dict[str, Any]]] = [
    [{"role": "user", "content": "Hello"}],
    [
        {"role": "user", "content": "  Hi\n"},
        {"role": "assistant", "content": "Grüße <b>&amp;</b> 🎉"},
        {"role": "user", "content": "and\n\nnow?"},
    ],
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "{{ 1 + 1 }} {% raw %}"}],
]
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"x": "<é>"}}}]
VARIABLES = {"bos_token": "<s>", "eos_token": "</s>"}


def reference(source: str, messages: list[dict[str, Any]], **names: Any) -> str:
    from transformers.utils.chat_template_utils import render_jinja_template

    done: Any = render_jinja_template(conversations=[messages], chat_template=source, **names)
    return str(done[0][0])


@pytest.mark.parametrize(
    "source", [LLAMA3, CHATML, MISTRAL, LOOPS], ids=["llama3", "chatml", "mistral", "loops"]
)
@pytest.mark.parametrize("messages", CHATS)
@pytest.mark.parametrize("add_generation_prompt", [True, False])
@pytest.mark.parametrize("more", [{}, {"tools": TOOLS}, {"enable_thinking": False, "bos_token": "<other>"}])
def test_equal_to_transformers(
    source: str, messages: list[dict[str, Any]], add_generation_prompt: bool, more: dict[str, Any]
) -> None:
    names = {**VARIABLES, **more}
    try:
        expected = reference(source, messages, add_generation_prompt=add_generation_prompt, **names)
    except Exception as error:
        expected = f"error: {error}"
    template = ChatTemplate(source, variables=VARIABLES)
    variables = dict(more)
    tools = variables.pop("tools", None)
    try:
        text = template.render(
            messages, add_generation_prompt=add_generation_prompt, tools=tools, variables=variables
        )
    except ChatTemplateError as error:
        text = f"error: {error}"
    assert text == expected


def test_tool_calls_equal_transformers() -> None:
    call = {"function": {"name": "f", "arguments": {"q": "<é>", "n": [1, 2]}}}
    messages = [CHATS[0][0], {"role": "assistant", "content": None, "tool_calls": [call]}]
    template = ChatTemplate(LLAMA3, variables=VARIABLES)
    assert template.render(messages, add_generation_prompt=False) == reference(LLAMA3, messages, **VARIABLES)


def test_text_parts_are_joined() -> None:
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    template = ChatTemplate("{% for m in messages %}{{ m.content + '|' + m.name }}{% endfor %}")
    assert template.render([{"role": "user", "content": parts, "name": "n"}]) == "one\ntwo|n"
    assert template.render([{"role": "user", "content": [], "name": "n"}]) == "|n"


@pytest.mark.parametrize(
    ("message", "words"),
    [
        ("hello", "messages[1] must be an object with role and content"),
        ({"content": "x"}, "messages[1].role must be a string"),
        ({"role": "user", "content": 5}, "messages[1].content must be a string or a list of text parts"),
        ({"role": "user", "content": {}}, "messages[1].content must be a string or a list of text parts"),
        (
            {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "image_url"}]},
            "messages[1].content[1] is of type 'image_url'; only 'text' parts are understood",
        ),
        (
            {"role": "user", "content": ["a"]},
            "messages[1].content[0] is of type None; only 'text' parts are understood",
        ),
        (
            {"role": "user", "content": [{"type": "text", "text": 1}]},
            "messages[1].content[0].text must be a string",
        ),
    ],
)
def test_messages_that_make_no_prompt(message: Any, words: str) -> None:
    with pytest.raises(ChatTemplateError) as caught:
        ChatTemplate(CHATML).render([{"role": "user", "content": "x"}, message])
    assert str(caught.value) == words


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("{{ raise_exception('No system role!') }}", "No system role!"),
        ("{{ messages[0]['content'] + none }}", "TypeError in the chat template: can only concatenate str"),
        ("{{ messages[0].nothing.at_all }}", "has no attribute 'nothing'"),
        ("{{ 1 / 0 }}", "ZeroDivisionError in the chat template: division by zero"),
        ("{{ messages.append(1) }}", "access to attribute 'append' of 'list' object is unsafe"),
        ("{{ namespace(__call__=1) }}", "a namespace cannot hold '__call__'"),
        ("{% set ns = namespace() %}{% set ns._x = 1 %}", "a namespace cannot hold '_x'"),
        ("{{ ''.__class__.__mro__ }}", "access to attribute '__class__'"),
        ("{{ dict.__class__.__base__ }}", "access to attribute '__class__'"),
        ("{% for i in range(999999999) %}{% endfor %}", "Range too big"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError in the chat template"),
    ],
)
def test_templates_that_fail(source: str, words: str) -> None:
    with pytest.raises(ChatTemplateError) as caught:
        ChatTemplate(source).render([{"role": "user", "content": "x"}])
    assert words in str(caught.value)


def test_a_template_that_cannot_be_compiled() -> None:
    with pytest.raises(
        ChatTemplateError, match="the chat template is wrong in line 2: Encountered unknown tag"
    ):
        ChatTemplate("x\n{% nothing %}")


def test_what_a_caller_may_not_set() -> None:
    with pytest.raises(ChatTemplateError, match="chat template variable 'messages' cannot be set"):
        ChatTemplate("{{ messages }}").render([], variables={"messages": []})


def test_the_date() -> None:
    text = ChatTemplate("{{ strftime_now('%Y-%m-%d') }}").render([])
    assert text in {str(datetime.date.today()), str(datetime.date.today() - datetime.timedelta(days=1))}


def test_the_date_that_it_is_told() -> None:
    source = "{% macro year() %}{{ strftime_now('%Y') }}{% endmacro %}{{ year() }}"
    assert ChatTemplate(source).render([], variables={"strftime_now": 86400 * 200}) == "1970"
    assert ChatTemplate(source).render([]) >= "2025"  # the next one is not told


def test_messages_are_left_as_they_were() -> None:
    message = {"role": "user", "content": [{"type": "text", "text": "a"}]}
    ChatTemplate("{{ messages }}").render([message])
    assert message == {"role": "user", "content": [{"type": "text", "text": "a"}]}
