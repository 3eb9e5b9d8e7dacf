"""The fields that say what a reply must look like, in OpenAI's words and in vLLM's.

Source of the forms: OpenAI's API reference, "Structured Outputs", and vLLM's documentation, "Structured
Outputs" and the `guided_*` fields that came before it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, Literal, NamedTuple

import pydantic

from jaxserve.engine.outputs import EngineBusy
from jaxserve.protocols import EngineLike
from jaxserve.scheduler.types import RequestError, StructuredOutputs
from jaxserve.server.body import AtMost, Strict
from jaxserve.server.errors import queue_full

MAX_CHOICES = 2**15
NAME = r"^[a-zA-Z0-9_-]{1,64}$"  # OpenAI's, of schemas and tools


class JsonSchema(Strict):
    """`strict` changes nothing: a schema is always kept to."""

    name: Annotated[str, pydantic.Field(pattern=NAME)]
    description: str | None = None
    schema_: Annotated[dict[str, Any] | bool, pydantic.Field(alias="schema")]
    strict: bool | None = None


class ResponseFormat(Strict):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class StructuredOutputsField(Strict):
    """vLLM's. `json` is the schema, as an object or as its text."""

    json_: Annotated[dict[str, Any] | str | None, pydantic.Field(alias="json")] = None
    json_object: bool | None = None
    regex: str | None = None
    choice: Annotated[list[str], AtMost(MAX_CHOICES)] | None = None
    grammar: str | None = None


class Wanted(NamedTuple):
    """param: the field that asked for it."""

    outputs: StructuredOutputs
    param: str


class StructuredFields(Strict):
    """Of completions and chat completions."""

    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputsField | None = None
    guided_json: dict[str, Any] | str | None = None
    guided_regex: str | None = None
    guided_choice: Annotated[list[str], AtMost(MAX_CHOICES)] | None = None
    guided_grammar: str | None = None

    def wanted(self) -> Wanted | None:
        """What was asked for, None if nothing. Raises RequestError if it was asked for twice."""
        found = [*self._from_response_format(), *self._from_structured_outputs(), *self._from_guided()]
        if len(found) > 1:
            names = [one.param for one in found]
            raise RequestError(f"{' and '.join(names)} contradict each other: give one", param=names[1])
        return found[0] if found else None

    def _from_response_format(self) -> list[Wanted]:
        asked = self.response_format
        if asked is None:
            return []
        if asked.type != "json_schema" and asked.json_schema is not None:
            raise RequestError(
                f"json_schema needs the type 'json_schema', not {asked.type!r}",
                param="response_format.json_schema",
            )
        if asked.type == "json_object":
            return [Wanted(StructuredOutputs(json_object=True), "response_format")]
        if asked.type == "text":
            return []
        if asked.json_schema is None:
            raise RequestError(
                "response_format.json_schema is required with the type 'json_schema'",
                param="response_format.json_schema",
                code="missing_required_parameter",
            )
        schema = asked.json_schema.schema_
        if isinstance(schema, bool):  # JSON Schema's shortest: anything, or nothing
            schema = {} if schema else {"not": {}}
        return [Wanted(StructuredOutputs(json=schema), "response_format")]

    def _from_structured_outputs(self) -> list[Wanted]:
        asked = self.structured_outputs
        if asked is None:
            return []
        given: dict[str, Any] = {
            "json": asked.json_,
            "json_object": bool(asked.json_object),
            "regex": asked.regex,
            "choice": asked.choice,
            "grammar": asked.grammar,
        }
        return [Wanted(StructuredOutputs(**given), "structured_outputs")]

    def _from_guided(self) -> list[Wanted]:
        found = []
        for name in ("json", "regex", "choice", "grammar"):
            value = getattr(self, f"guided_{name}")
            if value is not None:
                found.append(_guided(name, value))
        return found


def _guided(name: str, value: Any) -> Wanted:
    param = f"guided_{name}"
    try:
        return Wanted(StructuredOutputs(**{name: value}), param)
    except RequestError as error:
        raise RequestError(f"{param}: {error}", param=param) from error


def compiled(
    engine: EngineLike, outputs: StructuredOutputs, param: str, *, in_words: Callable[[str], str] = str
) -> Any:
    """The grammar, for `check_request`. Raises RequestError that names `param`, whichever field it was that
    the engine found at fault; and ApiError 429 where too many others wait for theirs.

    in_words: from what the compiler says is wrong to what the client is told.
    """
    try:
        return engine.compile_grammar(outputs)
    except EngineBusy as error:
        raise queue_full(error) from error
    except RequestError as error:
        raise RequestError(in_words(str(error)), param=param, code=error.code) from error
