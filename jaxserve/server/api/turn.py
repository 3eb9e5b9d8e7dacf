"""One assistant's turn: what chat completions, responses and messages have in common.

A conversation becomes a prompt through the model's chat template; the reply is taken apart into text,
reasoning and calls of tools. Knows nothing of how any of the three APIs spells them. What is asked for,
`TurnRequest`, is in `turn_prompt.py`.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from typing import Literal

import orjson

from jaxserve.engine.outputs import Output, TokenLogprob
from jaxserve.protocols import EngineLike
from jaxserve.scheduler.types import Finish, RequestError, check_request
from jaxserve.server.api import results
from jaxserve.server.api.fields import Caller, service_tier
from jaxserve.server.api.structured import compiled
from jaxserve.server.api.turn_prompt import Prompt, Reading, TurnRequest
from jaxserve.server.bridge import Call
from jaxserve.server.errors import from_request_error
from jaxserve.text.tools.hidden import Hidden
from jaxserve.text.tools.parts import Argued, Called, Part, Said, Thought

__all__ = [
    "CallArguments",
    "CallBegin",
    "End",
    "Event",
    "Reasoning",
    "Text",
    "ToolCall",
    "Turn",
    "TurnChoice",
    "TurnRequest",
    "collect_turn",
]

# --- what comes of it ------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, slots=True)
class Text:
    """More of a choice's text; `logprobs` of all tokens of the increment, whatever they were part of."""

    index: int
    text: str
    logprobs: Sequence[TokenLogprob] = ()


@dataclasses.dataclass(frozen=True, slots=True)
class Reasoning:
    index: int
    text: str


@dataclasses.dataclass(frozen=True, slots=True)
class CallBegin:
    """`call` counts a choice's calls from 0."""

    index: int
    call: int
    id: str
    name: str


@dataclasses.dataclass(frozen=True, slots=True)
class CallArguments:
    index: int
    call: int
    delta: str


@dataclasses.dataclass(frozen=True, slots=True)
class End:
    """Last of a choice. stop_reason: the stop string or stop token, None for the model's own end.

    finish_reason: "tool_calls" where the reply called tools, but for one that was stopped within a call.
    """

    index: int
    finish_reason: Literal["stop", "length", "tool_calls", "abort"]
    stop_reason: str | int | None = None


Event = Text | Reasoning | CallBegin | CallArguments | End


@dataclasses.dataclass(slots=True)
class ToolCall:
    id: str
    name: str
    arguments: str = ""


@dataclasses.dataclass(slots=True)
class TurnChoice:
    """One choice's whole answer: its events in their order, and joined by their kind, as chat has them.

    `text` is None where there are calls and no text.
    """

    events: list[Event]
    text: str | None
    reasoning: str | None
    calls: list[ToolCall]
    finish_reason: str
    stop_reason: str | int | None
    logprobs: list[TokenLogprob]
    token_ids: list[int]


class Turn:
    """A valid turn: `request` is what the engine runs, `events` what each of its increments says.

    Made off the event loop: templates, tokenizing and grammars may take long. Raises ApiError that names the
    field.
    """

    def __init__(self, asked: TurnRequest, engine: EngineLike, caller: Caller, *, prefix: str) -> None:
        self.asked = asked
        self.id = caller.new_id(prefix)
        self.created = caller.now()
        self.tokenizer = engine.tokenizer
        try:
            self._prepare(engine, caller)
        except RequestError as error:
            raise from_request_error(error, asked.names) from None
        self.usage = results.Usage([self.request])
        self._channels: dict[int, _Channel] = {}

    def _prepare(self, engine: EngineLike, caller: Caller) -> None:
        asked = self.asked
        now = time.monotonic()
        place = asked.sampling.place(caller, now)
        self.service_tier = service_tier(place["tier"])
        prompt = Prompt(asked, engine.tokenizer, caller, context=engine.limits.max_model_len)
        self.reading = prompt.reading
        wanted = prompt.constraint()
        # what is wrong with its ranges is cheap to find, a grammar is not to make
        params = asked.sampling.sampling(
            engine.limits.sampling_defaults,
            max_tokens=asked.max_tokens,
            logprobs=asked.logprobs,
            prompt_logprobs=asked.prompt_logprobs,
            structured=None if wanted is None else wanted.outputs,
        )
        if self.reading.hidden is not None and params.skip_special_tokens:
            params = dataclasses.replace(params, skip_special_tokens=False)
        grammar = None
        if wanted is not None:
            grammar = compiled(engine, wanted.outputs, wanted.param, in_words=wanted.in_words)
        self.request = check_request(
            self.id, prompt.ids, params, engine.limits, now, grammar=grammar, **place
        )

    def events(self, output: Output) -> list[Event]:
        """What an increment adds. To be called with each in turn; `usage` counts them."""
        self.usage.add(0, output)
        channel = self._channels.get(output.index)
        if channel is None:
            channel = self._channels[output.index] = self._channel(output.index)
        return channel.push(output.text, output.logprobs or (), output.finish_reason, output.stop_reason)

    def read(self, index: int, choice: results.Choice) -> TurnChoice:
        """A choice that came whole."""
        events = self._channel(index).push(
            choice.text, choice.logprobs, choice.finish_reason or Finish.ABORT, choice.stop_reason
        )
        text, reasoning, calls = "", "", list[ToolCall]()
        for event in events:
            match event:
                case Text():
                    text += event.text
                case Reasoning():
                    reasoning += event.text
                case CallBegin():
                    calls.append(ToolCall(event.id, event.name))
                case CallArguments():
                    calls[-1].arguments += event.delta
                case End():
                    finish = event.finish_reason
        return TurnChoice(
            events=events,
            text=text if text or not calls else None,
            reasoning=reasoning or None,
            calls=calls,
            finish_reason=finish,
            stop_reason=choice.stop_reason,
            logprobs=choice.logprobs,
            token_ids=choice.token_ids,
        )

    def _channel(self, index: int) -> _Channel:
        shows_stop = self.asked.sampling.include_stop_str_in_output
        hides = self.asked.sampling.skip_special_tokens
        return _Channel(index, self.reading, shows_stop=shows_stop, hides=hides)


class _Channel:
    """One choice's way from text to events."""

    def __init__(self, index: int, reading: Reading, *, shows_stop: bool, hides: bool) -> None:
        self._index = index
        self._reading = reading
        self._reader = reading.reader()
        self._hidden = Hidden(reading.hidden) if hides and reading.hidden is not None else None
        self._shows_stop = shows_stop
        self._calls = 0
        self._arguments: list[str] = []  # of the last call, as they came

    def push(
        self,
        text: str,
        logprobs: Sequence[TokenLogprob],
        finish: Finish | None,
        stop_reason: str | int | None,
    ) -> list[Event]:
        if self._hidden is not None:
            text = self._hidden.push(text)
            if finish is not None:
                text += self._hidden.flush()
        if self._shows_stop and isinstance(stop_reason, str):
            text += stop_reason
        parts = self._reader.push(text)
        if finish is not None:
            rest = self._reader.finish()
            # of a reply that may only call, text is a call that was cut off before it could be told
            parts += [part for part in rest if not (self._reading.forced and isinstance(part, Said))]
        events = [self._event(part) for part in parts]
        if logprobs:
            events = _with_logprobs(self._index, events, logprobs)
        if finish is not None:
            calls = finish is Finish.STOP and self._calls and not (stop_reason is not None and self._is_cut())
            reason = "tool_calls" if calls else str(finish)
            # never "timeout": the bridge ends the whole call with an error then
            events.append(End(self._index, reason, stop_reason))  # type: ignore[arg-type]
        return events

    def _event(self, part: Part) -> Event:
        match part:
            case Said():
                return Text(self._index, part.text)
            case Thought():
                return Reasoning(self._index, part.text)
            case Called():
                self._calls += 1
                self._arguments.clear()
                name = self._reading.call_id(self._index, self._calls - 1)
                return CallBegin(self._index, self._calls - 1, name, part.name)
            case Argued():
                self._arguments.append(part.delta)
                return CallArguments(self._index, self._calls - 1, part.delta)

    def _is_cut(self) -> bool:
        """Whether the last call's arguments break off."""
        try:
            orjson.loads("".join(self._arguments))
        except orjson.JSONDecodeError:
            return True
        return False


def _with_logprobs(index: int, events: list[Event], logprobs: Sequence[TokenLogprob]) -> list[Event]:
    """Hangs them on the first text, or on one without text where there is none."""
    for place, event in enumerate(events):
        if isinstance(event, Text):
            return [*events[:place], dataclasses.replace(event, logprobs=logprobs), *events[place + 1 :]]
    return [Text(index, "", logprobs), *events]


async def collect_turn(call: Call, turn: Turn) -> list[TurnChoice]:
    """The whole turn: its `n` choices. Aborts the call when cancelled."""
    [answer] = await results.collect(call, [turn.request], turn.usage)
    return [turn.read(index, choice) for index, choice in enumerate(answer.choices)]
