"""A model's chat template: messages in, the prompt's text out, as `transformers` renders it.

Templates come with model folders and are not trusted: they run in jinja2's immutable sandbox, with the names
that `transformers.utils.chat_template_utils` gives them and no others.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jinja2
import jinja2.exceptions
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox
import jinja2.utils


class ChatTemplateError(ValueError):
    """The template, the messages, or both together make no prompt; the message says why."""


class ChatTemplate:
    """A compiled template. Raises `ChatTemplateError` if it cannot be compiled.

    variables: what it may call by name besides the messages, such as `bos_token`.
    """

    def __init__(self, source: str, *, variables: Mapping[str, str] | None = None) -> None:
        self.source = source
        self.variables = dict(variables or {})
        try:
            self._template = _environment().from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise ChatTemplateError(
                f"the chat template is wrong in line {error.lineno}: {error.message}"
            ) from error

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """The prompt's text. A message's content is a string, None, or text parts, joined by newlines.

        variables: more names for the template; they win over the tokenizer's.
        Raises `ChatTemplateError`, with the template's own words where it raises.
        """
        names = {**self.variables, "documents": None, **(variables or {})}
        reserved = {"messages", "add_generation_prompt", "tools"} & names.keys()
        if reserved:
            raise ChatTemplateError(f"chat template variable {min(reserved)!r} cannot be set")
        try:
            return self._template.render(
                messages=[_plain_message(i, message) for i, message in enumerate(messages)],
                add_generation_prompt=add_generation_prompt,
                tools=tools,
                **names,
            )
        except (ChatTemplateError, jinja2.TemplateError) as error:
            raise ChatTemplateError(str(error)) from error
        except Exception as error:  # a template is a program: any operator or filter of it may fail
            raise ChatTemplateError(f"{type(error).__name__} in the chat template: {error}") from error


def _plain_message(index: int, message: object) -> dict[str, Any]:
    """The message with its text parts joined: many templates concatenate `content` to a string."""
    if not isinstance(message, Mapping):
        raise ChatTemplateError(f"messages[{index}] must be an object with role and content")
    if not isinstance(message.get("role"), str):
        raise ChatTemplateError(f"messages[{index}].role must be a string")
    content = message.get("content")
    if content is None or isinstance(content, str):
        return dict(message)
    if isinstance(content, Mapping) or not isinstance(content, Iterable):
        raise ChatTemplateError(f"messages[{index}].content must be a string or a list of text parts")
    texts = [_part_text(f"messages[{index}].content[{i}]", part) for i, part in enumerate(content)]
    return {**message, "content": "\n".join(texts)}


def _part_text(where: str, part: object) -> str:
    kind = part.get("type") if isinstance(part, Mapping) else None
    if not isinstance(part, Mapping) or kind != "text":
        raise ChatTemplateError(f"{where} is of type {kind!r}; only 'text' parts are understood")
    text = part.get("text")
    if not isinstance(text, str):
        raise ChatTemplateError(f"{where}.text must be a string")
    return text


class _Generation(jinja2.ext.Extension):
    """`{% generation %}` marks the assistant's words for training; here its body is simply rendered."""

    tags = {"generation"}  # noqa: RUF012 (jinja2's own declaration)

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_render"), [], [], body).set_lineno(line)

    def _render(self, caller: Any) -> Any:
        return caller()


class _Dict:
    """`dict` for templates: the two calls that they make, without the class and what hangs on it."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


class _Namespace(jinja2.utils.Namespace):
    """`namespace` for templates, without names that Python itself looks up on objects."""

    def __init__(*args: Any, **kwargs: Any) -> None:  # so that `namespace(self=1)` works, as in jinja2
        names = dict(*args[1:], **kwargs)
        for name in names:
            _check_name(name)
        jinja2.utils.Namespace.__init__(args[0], names)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"a namespace cannot hold {name!r}")


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # jinja2's own escapes HTML
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _strftime_now(format: str) -> str:
    return datetime.datetime.now().strftime(format)


def _environment() -> jinja2.Environment:
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals |= {
        "raise_exception": _raise_exception,
        "strftime_now": _strftime_now,
        "dict": _Dict(),
        "namespace": _Namespace,
    }
    return environment
