"""Grammars for replies that must call tools, or that reason before they answer in a given form.

In llguidance's dialect of Lark (its "Syntax" page). A marker that is one added token of the vocabulary is
named by its id there: the text of a grammar does not match such tokens.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from jaxserve.text.json_schemas import SchemaError, compiled_form
from jaxserve.text.tools import hermes, mistral, think
from jaxserve.text.tools.formats import Format

TEXT = r"/(.|\n)*/"
ANY: Mapping[str, Any] = {"type": "object"}


@dataclasses.dataclass(frozen=True, slots=True)
class Function:
    """A tool that may be called. parameters: its JSON schema. strict: kept to also where the model calls it
    unasked."""

    name: str
    parameters: Mapping[str, Any]
    strict: bool = False


class Grammars:
    """format: of the model. tokens: ids of the markers that are tokens, special or not. opened: the reply
    begins within its reasoning. closed: it begins after it, or has none."""

    def __init__(
        self, format: Format, tokens: Mapping[str, int], *, opened: bool, closed: bool = False
    ) -> None:
        self._format = format
        self._tokens = tokens
        self._opened = opened
        self._closed = closed

    def calls(self, functions: Sequence[Function], *, parallel: bool) -> str:
        """Nothing but calls, one at least; `parallel`: perhaps several."""
        return self._after_reasoning([*self._calls("start_answer", functions, parallel=parallel)])

    def answer(self, body: str, functions: Sequence[Function] = (), *, parallel: bool = False) -> str:
        """`body`, a rule's right side, or calls of the functions there are."""
        if not functions:
            return self._after_reasoning([f"start_answer: {body}"])
        return self._after_reasoning(
            [
                "start_answer: calls | body",
                f"body: {body}",
                *self._calls("calls", functions, parallel=parallel),
            ]
        )

    def free(self, functions: Sequence[Function], *, parallel: bool) -> str:
        """Any text with calls in it, one at most unless `parallel`; those of strict functions keep to their
        schemas."""
        functions = [one if one.strict else dataclasses.replace(one, parameters=ANY) for one in functions]
        calls = self._calls("calls", functions, parallel=parallel)
        if self._format.tools == "llama3":  # a reply is either
            return self._after_reasoning([r"start_answer: calls | /([^ \t\r\n{<](.|\n)*)?/", *calls])
        opening = hermes.OPEN if self._format.tools == "hermes" else mistral.OPEN
        if opening in self._tokens:  # which no text matches
            lead = [f"lead: plain {self._marker(opening)}", f"plain: {TEXT}"]
        else:
            mark = re.escape(opening)
            lead = [
                rf"lead[lazy]: /(.|\n)*{mark}/",
                "plain: PLAIN",
                rf"PLAIN: /(?s:.*)/ & ~/(?s:.*){mark}(?s:.*)/",
            ]
        form = "(lead call)* plain" if parallel else "lead call | plain"
        return self._after_reasoning(
            [f"start_answer: {form}", *lead, *self._call_rules(functions, marked=False)]
        )

    # --- reasoning ---

    def _after_reasoning(self, rules: list[str]) -> str:
        if self._format.reasoning is None or self._closed:
            return "\n".join(["start: start_answer", *rules])
        if think.CLOSE in self._tokens:
            thought = [f"thought: {TEXT} {self._marker(think.CLOSE)} GAP"]
        else:
            thought = ["thought: thinking GAP", r"thinking[lazy]: /(.|\n)*<\/think>/"]
        start = "thought" if self._opened else f"({self._marker(think.OPEN)} thought)?"
        return "\n".join([f"start: {start} start_answer", *thought, r"GAP: /[ \n]{0,4}/", *rules])

    # --- calls ---

    def _calls(self, rule: str, functions: Sequence[Function], *, parallel: bool) -> list[str]:
        match self._format.tools:
            case "hermes":
                form = r'call ("\n" call)*' if parallel else "call"
            case "mistral":
                form = "call+" if parallel else "call"
            case "mistral-list":
                more = r' (", " call)*' if parallel else ""
                form = f'{self._marker(mistral.OPEN)} " "? "[" call{more} "]"'
            case "llama3":
                form = "call"  # its templates know of one call in a reply
            case _:
                raise ValueError("this model has no format of calls")
        return [f"{rule}: {form}", *self._call_rules(functions, marked=True)]

    def _call_rules(self, functions: Sequence[Function], *, marked: bool) -> list[str]:
        numbers = range(len(functions))
        rules = [f"call: {' | '.join(f'call_{number}' for number in numbers)}"]
        for number, function in enumerate(functions):
            before, after = self._around(function.name, marked=marked)
            rules.append(f"call_{number}: {before} arguments_{number} {after}".rstrip())
            try:
                rules.append(f"arguments_{number}: {json_body(function.parameters)}")
            except SchemaError as error:
                raise SchemaError(f"the parameters of {function.name!r}: {error}") from None
        return rules

    def _around(self, name: str, *, marked: bool) -> tuple[str, str]:
        """What comes before a call's arguments and after them, as rules."""
        quoted = json.dumps(name)
        match self._format.tools:
            case "hermes":
                opening = f"{self._marker(hermes.OPEN)} " if marked else ""
                head = _quoted(f'\n{{"name": {quoted}, "arguments": ')
                return f"{opening}{head}", f"{_quoted('}' + chr(10))} {self._marker(hermes.CLOSE)}"
            case "mistral":
                opening = f"{self._marker(mistral.OPEN)} " if marked else ""
                return f"{opening}{_quoted(name)} {self._marker(mistral.ARGS)}", ""
            case "mistral-list":
                opening = "" if marked else '" "? "["'
                return f"{opening} {_quoted(f'''{{"name": {quoted}, "arguments": ''')}".lstrip(), _quoted(
                    "}" if marked else "}]"
                )
            case _:
                return _quoted(f'{{"name": {quoted}, "parameters": '), _quoted("}")

    def _marker(self, text: str) -> str:
        token = self._tokens.get(text)
        return _quoted(text) if token is None else f"<[{token}]>"


def _quoted(text: str) -> str:
    return json.dumps(text)


def regex_body(pattern: str) -> str:
    """A regular expression as Lark has it between slashes."""
    out, escaped = [], False
    for character in pattern:
        if character == "\n":
            out.append("n" if escaped else "\\n")
        elif character == "/" and not escaped:
            out.append("\\/")
        else:
            out.append(character)
        escaped = character == "\\" and not escaped
    return f"/{''.join(out)}/"


def choice_body(choices: Sequence[str]) -> str:
    return " | ".join(map(_quoted, choices))


def json_body(schema: Mapping[str, Any] | bool) -> str:
    """Raises SchemaError."""
    return f"%json {compiled_form(schema)}"


def in_words(error: str, lark: str, functions: Sequence[Function]) -> str:
    """What the compiler says of a grammar that was made here, for those who sent what is in it: not in which
    line the fault is but whose schema that line holds."""
    found = re.search(r"at ([0-9]+)\([0-9]+\): (?:failed to compile JSON schema: )?(.*)", error)
    if found is None:  # of the grammar as a whole
        return error
    rule = lark.split("\n")[int(found[1]) - 1].partition(":")[0]
    number = rule.removeprefix("arguments_")
    whose = f"the parameters of {functions[int(number)].name!r}" if number.isdecimal() else "the form"
    return f"{whose} cannot be followed: {found[2]}"
