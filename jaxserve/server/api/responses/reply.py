"""What `/v1/responses` answers: the reply's items, and the events that stream them.

Source of the form: OpenAI's API reference, "Responses" and "Streaming events". A reply that is not streamed
is made of the same events, read to their end, so that the two cannot differ.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from jaxserve.engine.outputs import Output, TokenLogprob
from jaxserve.prompts import token_text
from jaxserve.server.api import results
from jaxserve.server.api.responses.request import ResponseRequest
from jaxserve.server.api.turn import (
    CallArguments,
    CallBegin,
    End,
    Event,
    Reasoning,
    Text,
    Turn,
)
from jaxserve.server.errors import ApiError

Chunk = dict[str, Any]


class ResponseJob:
    """A valid request: what to ask of the engine, and how to say what it answers.

    echo: of the request's body, the members that the reply repeats as they came. now: the time, in seconds
    since 1970.
    """

    def __init__(
        self, fields: ResponseRequest, turn: Turn, echo: dict[str, Any], now: Callable[[], int]
    ) -> None:
        self.fields = fields
        self.turn = turn
        self.requests = [turn.request]
        self.usage = turn.usage
        self.stream = fields.stream
        self._echo = echo
        self._now = now
        self._number = 0  # of the next event
        self._output: list[Chunk] = []  # items, the last one perhaps unfinished
        self._open = False  # whether it is
        self._held: list[TokenLogprob] = []  # of tokens before the text that they begin
        self._reasoning_bytes = 0
        self._reasoning_tokens = 0
        self._end: End | None = None

    # --- as a whole ---

    def answer(self, answers: Sequence[results.Answer]) -> dict[str, Any]:
        """The whole reply at once."""
        [answer] = answers
        [choice] = answer.choices
        read = self.turn.read(0, choice)
        for _ in self._translated(read.events, read.token_ids):
            pass
        return self._response(self._status)

    # --- as events ---

    def opening(self) -> Iterable[Chunk]:
        for kind in ("created", "in_progress"):
            yield self._event(f"response.{kind}", response=self._response("in_progress"))

    def chunks(self, prompt: int, output: Output) -> Iterable[Chunk]:
        return self._translated(self.turn.events(output), output.token_ids)

    def closing(self) -> Iterable[Chunk]:
        yield self._event(f"response.{self._status}", response=self._response(self._status))

    def failed(self, error: ApiError) -> Iterable[Chunk]:
        """An error that clients raise, and the response as it stands."""
        code = "rate_limit_exceeded" if error.status == 429 else "server_error"
        yield self._event("error", code=error.code, message=error.message, param=error.param)
        failure = {"code": code, "message": error.message}
        yield self._event("response.failed", response={**self._response("failed"), "error": failure})

    def _translated(self, events: Iterable[Event], token_ids: Sequence[int]) -> Iterator[Chunk]:
        for event in events:
            match event:
                case Reasoning():
                    self._held.clear()
                    yield from self._reasoning(event.text)
                case Text():
                    yield from self._text(event.text, event.logprobs)
                case CallBegin():
                    self._held.clear()
                    yield from self._call(event)
                case CallArguments():
                    yield from self._arguments(event.delta)
                case End():
                    self._end = event
                    yield from self._close()
        self._count(token_ids)

    def _event(self, kind: str, **members: Any) -> Chunk:
        self._number += 1
        return {"type": kind, "sequence_number": self._number - 1, **members}

    @property
    def _place(self) -> Chunk:
        """Where the open item is."""
        return {"output_index": len(self._output) - 1, "item_id": self._output[-1]["id"]}

    def _begin(self, kind: str, prefix: str, **members: Any) -> Iterator[Chunk]:
        """A new item, unless one of its kind is open."""
        yield from self._close()
        item = {"type": kind, "id": self._new_id(prefix), "status": "in_progress", **members}
        self._output.append(item)
        self._open = True
        shown = {**item, "content": []} if "content" in item else dict(item)
        yield self._event("response.output_item.added", output_index=len(self._output) - 1, item=shown)

    def _new_id(self, prefix: str) -> str:
        return f"{prefix}_{self.turn.id.partition('_')[2]}_{len(self._output)}"

    def _is_open(self, kind: str) -> bool:
        return self._open and self._output[-1]["type"] == kind

    def _reasoning(self, text: str) -> Iterator[Chunk]:
        if not self._is_open("reasoning"):
            part = {"type": "reasoning_text", "text": ""}
            yield from self._begin("reasoning", "rs", summary=[], content=[part])
            yield self._event("response.content_part.added", **self._place, content_index=0, part={**part})
        self._output[-1]["content"][0]["text"] += text
        self._reasoning_bytes += len(text.encode())
        yield self._event("response.reasoning_text.delta", **self._place, content_index=0, delta=text)

    def _text(self, text: str, logprobs: Sequence[TokenLogprob]) -> Iterator[Chunk]:
        if not self._is_open("message"):
            if not text:  # not yet sure that this is text
                self._held += logprobs
                return
            part: Chunk = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
            yield from self._begin("message", "msg", role="assistant", content=[part])
            yield self._event(
                "response.content_part.added", **self._place, content_index=0, part={**part, "logprobs": []}
            )
        part = self._output[-1]["content"][0]
        spelled = [self._logprob(entry) for entry in (*self._held, *logprobs)]
        self._held.clear()
        part["text"] += text
        part["logprobs"] += spelled
        if text or spelled:
            yield self._event(
                "response.output_text.delta", **self._place, content_index=0, delta=text, logprobs=spelled
            )

    def _call(self, event: CallBegin) -> Iterator[Chunk]:
        yield from self._begin("function_call", "fc", call_id=event.id, name=event.name, arguments="")

    def _arguments(self, delta: str) -> Iterator[Chunk]:
        self._output[-1]["arguments"] += delta
        yield self._event("response.function_call_arguments.delta", **self._place, delta=delta)

    def _close(self) -> Iterator[Chunk]:
        """The end of the open item."""
        if not self._open:
            return
        self._open = False
        item = self._output[-1]
        # a reply that ends with a call and not with "tool_calls" was stopped within it
        whole = ("tool_calls",) if item["type"] == "function_call" else ("stop", "tool_calls")
        cut = self._end is not None and self._end.finish_reason not in whole
        item["status"] = "incomplete" if cut else "completed"
        if item["type"] == "function_call":
            yield self._event(
                "response.function_call_arguments.done",
                **self._place,
                arguments=item["arguments"],
            )
        else:
            [part] = item["content"]
            kind = "output_text" if item["type"] == "message" else "reasoning_text"
            logprobs = {"logprobs": part["logprobs"]} if item["type"] == "message" else {}
            yield self._event(
                f"response.{kind}.done", **self._place, content_index=0, text=part["text"], **logprobs
            )
            yield self._event("response.content_part.done", **self._place, content_index=0, part=part)
        yield self._event("response.output_item.done", output_index=len(self._output) - 1, item=item)

    # --- the response ---

    @property
    def _status(self) -> str:
        if self._end is None:
            return "in_progress"
        return "completed" if self._end.finish_reason in ("stop", "tool_calls") else "incomplete"

    def _response(self, status: str) -> dict[str, Any]:
        fields = self.fields
        done = status in ("completed", "incomplete")
        choice = fields.tool_choice
        params = self.turn.request.params
        return {
            "id": self.turn.id,
            "object": "response",
            "created_at": self.turn.created,
            "completed_at": self._now() if status == "completed" else None,
            "status": status,
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "model": fields.model,
            "output": [] if status == "in_progress" else self._output,
            "usage": self._usage() if done else None,
            "service_tier": self.turn.service_tier,
            "background": False,
            "instructions": fields.instructions,
            "max_output_tokens": fields.max_output_tokens,
            "max_tool_calls": fields.max_tool_calls,
            "metadata": self._echo.get("metadata", {}),
            "parallel_tool_calls": fields.parallel_tool_calls,
            "previous_response_id": None,
            "reasoning": {"effort": None if fields.reasoning is None else fields.reasoning.effort},
            "safety_identifier": self._echo.get("safety_identifier"),
            "store": False,  # whatever was asked: nothing is kept
            "temperature": params.temperature,
            "text": {"format": self._echo.get("text", {}).get("format") or {"type": "text"}},
            "tool_choice": choice if isinstance(choice, str) else choice.model_dump(),
            "tools": self._echo.get("tools", []),
            "top_logprobs": fields.top_logprobs or 0,
            "top_p": params.top_p,
            "truncation": fields.truncation,
            "user": self._echo.get("user"),
        }

    def _usage(self) -> dict[str, Any]:
        usage = self.usage.body()
        return {
            "input_tokens": usage["prompt_tokens"],
            "input_tokens_details": {
                "cached_tokens": usage["prompt_tokens_details"]["cached_tokens"],
                "cache_write_tokens": 0,  # that are charged apart: none are
            },
            "output_tokens": usage["completion_tokens"],
            "output_tokens_details": {"reasoning_tokens": self._reasoning_tokens},
            "total_tokens": usage["total_tokens"],
        }

    def _count(self, token_ids: Sequence[int]) -> None:
        """Tokens, from the first on, as long as they go into the reasoning's text."""
        tokenizer = self.turn.tokenizer
        for token in token_ids:
            if tokenizer is None or self._reasoning_bytes <= 0:
                return
            self._reasoning_bytes -= len(tokenizer.token_bytes(token))
            self._reasoning_tokens += 1

    def _logprob(self, entry: TokenLogprob) -> dict[str, Any]:
        top = entry.top[: self.fields.top_logprobs or 0]
        return {
            **self._token(entry.token_id, entry.logprob),
            "top_logprobs": [self._token(token, logprob) for token, logprob in top],
        }

    def _token(self, token: int, logprob: float) -> dict[str, Any]:
        tokenizer = self.turn.tokenizer
        spelled = [] if tokenizer is None else list(tokenizer.token_bytes(token))
        return {"token": token_text(tokenizer, token), "bytes": spelled, "logprob": results.finite(logprob)}
