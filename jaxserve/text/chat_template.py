"""A model's chat template: messages in, the prompt's text out, as `transformers` renders it.

Templates come with model folders and are not trusted: `renderers.py` has them rendered.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jinja2
import jinja2.nodes

from jaxserve.text.renderers import RenderError, Renderers, shared
from jaxserve.text.template_process import environment

NOW = "strftime_now"  # the one function of templates whose result depends on when it is called


class ChatTemplateError(ValueError):
    """The template, the messages, or both together make no prompt; the message says why."""


class ChatTemplate:
    """A template. Raises `ChatTemplateError` if it cannot be compiled.

    variables: what it may call by name besides the messages, such as `bos_token`. renderers: for tests.
    """

    def __init__(
        self,
        source: str,
        *,
        variables: Mapping[str, str] | None = None,
        renderers: Renderers | None = None,
    ) -> None:
        self.source = source
        self.variables = dict(variables or {})
        self._renderers = renderers or shared()
        try:
            _check(source)
        except jinja2.TemplateSyntaxError as error:
            raise ChatTemplateError(
                f"the chat template is wrong in line {error.lineno}: {error.message}"
            ) from error
        except RecursionError:
            raise ChatTemplateError("the chat template is nested too deeply") from None

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """The prompt's text. A message's content is a string, None, or text parts, joined by newlines.

        continue_final_message: ends where the last message's content does. variables: more names for the
        template; they win over the tokenizer's. NOW among them is the time, in seconds since 1970, for the
        function of that name. Raises `ChatTemplateError`, with the template's own words where it raises.
        """
        names = {**self.variables, "documents": None, **(variables or {})}
        now = names.pop(NOW, None)
        reserved = {"messages", "add_generation_prompt", "tools"} & names.keys()
        if reserved:
            raise ChatTemplateError(f"chat template variable {min(reserved)!r} cannot be set")
        plain = [_plain_message(i, message) for i, message in enumerate(messages)]
        names |= {"messages": plain, "add_generation_prompt": add_generation_prompt, "tools": tools}
        try:
            text = self._renderers.render(self.source, names, now=now)
        except RenderError as error:
            raise ChatTemplateError(str(error)) from error
        return _cut(text, plain[-1] if plain else {}) if continue_final_message else text


@functools.lru_cache(maxsize=16)
def names_read(source: str) -> frozenset[str]:
    """The variables that a template may read of those that it is given: all names in it, but for those that
    only its loops set. Found by parsing alone: jinja2's own search compiles, which computes what is constant.
    """
    tree = environment().parse(source)
    read = {name.name for name in tree.find_all(jinja2.nodes.Name) if name.ctx == "load"}
    looped = {
        name.name
        for loop in tree.find_all(jinja2.nodes.For)
        for name in (loop.target, *loop.target.find_all(jinja2.nodes.Name))
        if isinstance(name, jinja2.nodes.Name)
    }
    return frozenset(read - looped)


def _check(source: str) -> None:
    """Raises TemplateSyntaxError. Parses only: compiling already computes what is constant."""
    made = environment()
    tree = made.parse(source)
    for kind, known in ((jinja2.nodes.Filter, made.filters), (jinja2.nodes.Test, made.tests)):
        for node in tree.find_all(kind):
            if node.name not in known:
                word = kind.__name__.lower()
                raise jinja2.TemplateSyntaxError(f"there is no {word} {node.name!r}", node.lineno)


def _cut(text: str, message: Mapping[str, Any]) -> str:
    """The text up to the end of the message's content, white space at its end as the template has it: as
    transformers does it."""
    content = message.get("content")
    if not isinstance(content, str) or not content.strip():
        raise ChatTemplateError("continue_final_message needs a last message with content")
    start = text.rfind(content.strip())
    if start < 0:
        raise ChatTemplateError("the chat template does not write the last message's content as it is")
    whole = content.lstrip()
    return text[: start + len(whole if text.startswith(whole, start) else content.strip())]


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
