"""Chat templates in the manner of the families whose calls are read, and a tokenizer that renders them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from jaxserve.text.chat_template import ChatTemplate
from tests.fakes import FakeTokenizer
from tests.server.fakes import FakeEngine

PLAIN = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
HERMES = """\
{%- for tool in tools or [] %}{{ tool | tojson }}
{% endfor %}
{%- for m in messages %}<|{{ m.role }}|>{{ m.content or '' }}
{%- for call in m.tool_calls or [] %}
<tool_call>
{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}
</tool_call>
{%- endfor %}{% endfor %}
{%- if add_generation_prompt %}<|assistant|>{% endif %}"""
THINKING = HERMES.replace(
    "<|assistant|>{% endif %}",
    "<|assistant|>{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n"
    "{% endif %}{% endif %}",
)
OPENED = HERMES.replace("<|assistant|>{% endif %}", "<|assistant|><think>\n{% endif %}")
MISTRAL = """\
{%- if tools %}[AVAILABLE_TOOLS]{{ tools | tojson }}[/AVAILABLE_TOOLS]{% endif %}
{%- for m in messages %}[{{ m.role }}]{{ m.content or '' }}
{%- for call in m.tool_calls or [] %}
{%- if call.id | length != 9 %}{{ raise_exception('Tool call IDs must have length 9') }}{% endif %}
{{- '[TOOL_CALLS]' + call.function.name + '[ARGS]' + call.function.arguments | tojson }}
{%- endfor %}{% endfor %}"""
LLAMA3 = """\
{%- for tool in tools or [] %}{{ tool | tojson }}{% endfor %}
{%- for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>{{ m.content }}{% endfor %}
{#- calls are {"name": "f", "parameters": {}} -#}"""


class TemplateTokenizer(FakeTokenizer):
    """Renders a real template. It speaks for the user: the answer follows from the prompt's last letter."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.template = ChatTemplate(source)
        self.chat_template_source = source

    def apply_chat_template(
        self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = True, **kwargs: Any
    ) -> list[int]:
        tools = kwargs.pop("tools", None)
        continued = kwargs.pop("continue_final_message", False)
        text = self.template.render(
            messages,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continued,
            tools=tools,
            variables=kwargs,
        )
        return self.encode(text)


def engine(source: str, script: str | None = None, **options: Any) -> FakeEngine:
    """With this template, and this answer to everything."""
    return FakeEngine(
        tokenizer=TemplateTokenizer(source),
        script=script,
        **{"max_model_len": 8192, "pages": 4096, **options},
    )


def prompt(served: Any) -> str:
    """The text of the last prompt that the engine was given."""
    return bytes(served.engine.requests[-1].prompt_token_ids.tolist()).decode()
