"""What `/v1/messages` answers: the message's blocks, and the events that stream them.

Source of the form: Anthropic's API reference, "Messages" and "Streaming messages".
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from jaxserve.engine.outputs import Output
from jaxserve.server.api import results
from jaxserve.server.api.conversation import as_object
from jaxserve.server.api.messages.request import MessagesRequest
from jaxserve.server.api.turn import CallArguments, CallBegin, End, Event, Reasoning, Text, Turn
from jaxserve.server.errors import ApiError, anthropic_error_body, engine_failed

Chunk = dict[str, Any]
STOP_REASONS = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use"}


class MessageJob:
    """A valid request: what to ask of the engine, and how to say what it answers."""

    def __init__(self, fields: MessagesRequest, turn: Turn) -> None:
        self.fields = fields
        self.turn = turn
        self.requests = [turn.request]
        self.usage = turn.usage
        self.stream = fields.stream
        self._blocks = 0  # begun
        self._open: str | None = None  # the type of the last one, until it ends
        self._end: End | None = None

    # --- as a whole ---

    def answer(self, answers: Sequence[results.Answer]) -> dict[str, Any]:
        """The whole reply at once."""
        [answer] = answers
        [choice] = answer.choices
        read = self.turn.read(0, choice)
        reason, sequence = _stop(read.finish_reason, read.stop_reason)
        return self._message(_content(read.events), reason, sequence, self._usage())

    # --- as events ---

    def opening(self) -> Iterable[Chunk]:
        """Before the first token: how much of the prompt was cached is known, and said, at the end."""
        message = self._message([], None, None, self._usage())
        yield {"type": "message_start", "message": message}
        yield {"type": "ping"}

    def chunks(self, prompt: int, output: Output) -> Iterator[Chunk]:
        for event in self.turn.events(output):
            yield from self._translated(event)

    def closing(self) -> Iterable[Chunk]:
        assert self._end is not None  # a call ends with its last increment
        reason, sequence = _stop(self._end.finish_reason, self._end.stop_reason)
        usage = self._usage()
        del usage["service_tier"]
        yield {
            "type": "message_delta",
            "delta": {"stop_reason": reason, "stop_sequence": sequence},
            "usage": usage,
        }
        yield {"type": "message_stop"}

    def failed(self, error: ApiError) -> Iterable[Chunk]:
        yield anthropic_error_body(error)

    def _translated(self, event: Event) -> Iterator[Chunk]:
        match event:
            case Reasoning():
                yield from self._begin("thinking", {"type": "thinking", "thinking": "", "signature": ""})
                yield self._delta({"type": "thinking_delta", "thinking": event.text})
            case Text(text=""):
                pass  # a part of a character
            case Text():
                yield from self._begin("text", {"type": "text", "text": ""})
                yield self._delta({"type": "text_delta", "text": event.text})
            case CallBegin():
                yield from self._close()
                block = {"type": "tool_use", "id": event.id, "name": event.name, "input": {}}
                yield from self._begin("tool_use", block)
            case CallArguments():
                yield self._delta({"type": "input_json_delta", "partial_json": event.delta})
            case End():
                self._end = event
                yield from self._close()

    def _begin(self, kind: str, block: Chunk) -> Iterator[Chunk]:
        """A new block, unless one of its kind is open."""
        if self._open == kind:
            return
        yield from self._close()
        self._open = kind
        self._blocks += 1
        yield {"type": "content_block_start", "index": self._blocks - 1, "content_block": block}

    def _delta(self, delta: Chunk) -> Chunk:
        return {"type": "content_block_delta", "index": self._blocks - 1, "delta": delta}

    def _close(self) -> Iterator[Chunk]:
        if self._open is not None:
            self._open = None
            yield {"type": "content_block_stop", "index": self._blocks - 1}

    # --- the message ---

    def _message(
        self, content: list[Chunk], reason: str | None, sequence: str | None, usage: Chunk
    ) -> dict[str, Any]:
        return {
            "id": self.turn.id,
            "type": "message",
            "role": "assistant",
            "model": self.fields.model,
            "content": content,
            "stop_reason": reason,
            "stop_sequence": sequence,
            "usage": usage,
        }

    def _usage(self) -> dict[str, Any]:
        usage = self.usage.body()
        cached = usage["prompt_tokens_details"]["cached_tokens"]
        return {
            "input_tokens": usage["prompt_tokens"] - cached,
            "cache_read_input_tokens": cached,
            "cache_creation_input_tokens": 0,  # that are charged apart: none are
            "output_tokens": usage["completion_tokens"],
            "service_tier": "batch" if self.turn.service_tier == "flex" else "standard",
        }


def _stop(finish_reason: str, stop_reason: str | int | None) -> tuple[str, str | None]:
    """stop_reason and stop_sequence."""
    if finish_reason == "stop" and isinstance(stop_reason, str):
        return "stop_sequence", stop_reason
    if finish_reason not in STOP_REASONS:  # Anthropic has no word for a reply that was given up
        raise engine_failed(f"the reply ended early: {finish_reason}")
    return STOP_REASONS[finish_reason], None


def _content(events: Iterable[Event]) -> list[Chunk]:
    """The blocks that `_translated` would stream."""
    content: list[Chunk] = []
    arguments: dict[int, str] = {}  # by the block of the call
    for event in events:
        kind = content[-1]["type"] if content else None
        match event:
            case Reasoning():
                if kind != "thinking":
                    content.append({"type": "thinking", "thinking": "", "signature": ""})
                content[-1]["thinking"] += event.text
            case Text(text=text) if text:
                if kind != "text":
                    content.append({"type": "text", "text": ""})
                content[-1]["text"] += text
            case CallBegin():
                arguments[len(content)] = ""
                content.append({"type": "tool_use", "id": event.id, "name": event.name, "input": {}})
            case CallArguments():
                arguments[len(content) - 1] += event.delta
    for place, text in arguments.items():
        content[place]["input"] = as_object(text)
    return content
