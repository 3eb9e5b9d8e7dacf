"""What the server, the command line and `LLM` need of an engine, a tokenizer and a group, and no more.

The engine and the text package satisfy these by their form; the tests' fakes do too, which is why nothing
on this side imports jax.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from jaxserve.engine.outputs import Sink
from jaxserve.scheduler.types import Limits, Request, SlotView, StructuredOutputs


class TokenizerLike(Protocol):
    """Text to token ids and back; see `jaxserve.text`."""

    @property
    def vocab_size(self) -> int: ...

    @property
    def bos_token_id(self) -> int | None: ...

    @property
    def eos_token_ids(self) -> tuple[int, ...]: ...

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]: ...

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str: ...

    def token_text(self, token_id: int) -> str: ...

    def token_bytes(self, token_id: int) -> bytes: ...

    def token_id(self, text: str) -> int | None:
        """Of the one token that has this text, if there is one."""

    @property
    def special_ids(self) -> frozenset[int]: ...

    @property
    def has_chat_template(self) -> bool: ...

    @property
    def chat_template_source(self) -> str | None: ...

    def apply_chat_template(
        self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = True, **kwargs: Any
    ) -> list[int]: ...


class EngineLike(Protocol):
    """A running engine. `submit` and `abort` are safe from any thread and return at once.

    `submit` takes all of its requests or none: it raises `EngineBusy` when the queue is full and RuntimeError
    when the engine does not run.
    stuck: what is stuck, while a device step takes longer than it may.
    facts: what `stats` repeats; with a response cache, `fingerprint` says which weights and versions answer;
    `embedding_size` and `embedding_pooling`, what a request with `pooling` gets unless it says otherwise.
    """

    @property
    def limits(self) -> Limits: ...

    @property
    def tokenizer(self) -> TokenizerLike | None: ...

    @property
    def healthy(self) -> bool: ...

    @property
    def failure(self) -> BaseException | None: ...

    @property
    def stuck(self) -> str | None: ...

    @property
    def facts(self) -> dict[str, Any]: ...

    def compile_grammar(self, wanted: StructuredOutputs) -> Any:
        """What `check_request` takes as `grammar`. Takes up to seconds: not for an event loop. Raises
        RequestError for what cannot be compiled, or not within the limits."""

    def slots(self) -> list[SlotView]:
        """Who holds the slots, in order; from any thread, and perhaps a step old."""

    def submit(self, *requests: tuple[Request, Sink]) -> None: ...

    def abort(self, request_id: str) -> None: ...

    def stats(self) -> dict[str, Any]: ...

    def start(self) -> None: ...

    def close(self) -> None: ...


class GroupLike(Protocol):
    """The processes that serve together, as process 0 sees them.

    failure: why they cannot go on. stop_requested: one of them was asked to stop.
    """

    @property
    def failure(self) -> str | None: ...

    @property
    def stop_requested(self) -> bool: ...

    def abandon(self, reason: str) -> None:
        """Tells the others that this process ends, and why."""

    def close(self) -> None:
        """Lets the others go and waits for them."""
