"""A model that can be computed by hand, behind the engine's and the tokenizer's interfaces.

Tokens are bytes, and a few special ones. The next token follows from the last alone (`successor`):

    a -> b -> ... -> z -> a -> ...      forever
    A -> B -> ... -> Z -> end token     so "X" is answered by "YZ" and stops
    0 -> 1 -> ... -> 9 -> 0 -> ...      forever
    anything else -> a

The r-th likeliest token is r-1 ids beyond the successor (cyclically) and has probability 2**-r.
Temperatures and seeds are taken and change nothing. The engine runs on a thread, one token per running
sequence and step; `delay` is a step's length. With a script, or for a request with a `choice`, the answer is
that text (for a choice the first one) and the end token, each token as likely as a successor. An embedding
is EMBEDDING_SIZE counts: of the prompt's tokens by their remainder, summed or (last) the last one's alone.
It knows nothing of jax.
"""

from __future__ import annotations

import collections
import dataclasses
import itertools
import math
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from jaxserve.engine.outputs import Output, Sink, TokenLogprob
from jaxserve.scheduler.types import Finish, Limits, Pooling, Request, SlotView, Status, StructuredOutputs

BOS, EOS, USER, ASSISTANT, SYSTEM = 256, 257, 258, 259, 260
SPECIAL = {BOS: "<bos>", EOS: "<end>", USER: "<user>", ASSISTANT: "<assistant>", SYSTEM: "<system>"}
ROLES = {"user": USER, "assistant": ASSISTANT, "system": SYSTEM}
VOCABULARY = 261
CHAT_TEMPLATE = "{% for message in messages %}<{{ message.role }}>{{ message.content }}{% endfor %}"
EMBEDDING_SIZE = 8


def successor(token: int) -> int:
    if token == ord("Z"):
        return EOS
    for first, last in (("a", "z"), ("A", "Z"), ("0", "9")):
        if ord(first) <= token <= ord(last):
            return ord(first) + (token - ord(first) + 1) % (ord(last) - ord(first) + 1)
    return ord("a")


def logprob(last: int, token: int) -> float:
    """Of `token` after `last`."""
    return math.log(2.0) * -((token - successor(last)) % VOCABULARY + 1)


def entry(last: int, token: int, top: int) -> TokenLogprob:
    best = [(successor(last) + step) % VOCABULARY for step in range(top)]
    rank = (token - successor(last)) % VOCABULARY + 1
    return TokenLogprob(token, logprob(last, token), rank, tuple((one, logprob(last, one)) for one in best))


def embed(request: Request) -> NDArray[np.float32]:
    ids = request.prompt_token_ids
    if request.pooling is Pooling.LAST:
        ids = ids[-1:]
    return np.bincount(ids % EMBEDDING_SIZE, minlength=EMBEDDING_SIZE).astype(np.float32)


class FakeTokenizer:
    """Bytes and special tokens. Text never becomes a special token. Adds BOS if told to (`bos=True`)."""

    def __init__(self, *, bos: bool = False, has_chat_template: bool = True) -> None:
        self.vocab_size = VOCABULARY
        self.bos_token_id = BOS if bos else None
        self.eos_token_ids = (EOS,)
        self.special_ids = frozenset(SPECIAL)
        self.has_chat_template = has_chat_template
        self.chat_template_source = CHAT_TEMPLATE if has_chat_template else None

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        start = [self.bos_token_id] if add_special_tokens and self.bos_token_id is not None else []
        return start + list(text.encode())

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        return b"".join(
            b"" if token in SPECIAL and skip_special_tokens else self.token_bytes(token) for token in ids
        ).decode(errors="replace")

    def token_text(self, token_id: int) -> str:
        return self.token_bytes(token_id).decode(errors="replace")

    def token_bytes(self, token_id: int) -> bytes:
        return SPECIAL[token_id].encode() if token_id in SPECIAL else bytes([token_id])

    def token_id(self, text: str) -> int | None:
        return next((token for token in range(VOCABULARY) if self.token_bytes(token) == text.encode()), None)

    def apply_chat_template(
        self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = True, **kwargs: Any
    ) -> list[int]:
        """`<role>content` for each; two messages of one role in a row are refused, as many templates do."""
        ids: list[int] = []
        before = None
        for message in messages:
            if message["role"] == before:
                raise ValueError("conversation roles must alternate")
            before = message["role"]
            ids += [ROLES[message["role"]], *message["content"].encode()]
        # the last byte of the last message decides the answer, so the assistant's mark goes before it
        return [*ids[:-1], ASSISTANT, ids[-1]] if add_generation_prompt else ids


@dataclasses.dataclass(slots=True, eq=False)
class _Sequence:
    request: Request
    sink: Sink
    index: int
    last: int
    script: collections.deque[int] | None = None  # what is left of the answer, where that is given
    text: str = ""
    sent: int = 0  # characters of `text` that were handed out
    tokens: int = 0
    started: bool = False
    admitted: float | None = None


class FakeEngine:
    """Continuous batching over `slots`, with counters for what tests want to see.

    script: what every request is answered with. events: (step, what, request id), what being submit, admit,
    abort or free.
    """

    def __init__(
        self,
        *,
        slots: int = 4,
        max_model_len: int = 256,
        page_size: int = 16,
        pages: int = 256,
        delay: float = 0.0,
        tokenizer: FakeTokenizer | None = None,
        with_tokenizer: bool = True,
        script: str | None = None,
    ) -> None:
        self.script = script
        self.tokenizer = (tokenizer or FakeTokenizer()) if with_tokenizer else None
        self.limits = Limits(
            vocab_size=VOCABULARY,
            max_model_len=max_model_len,
            pool_tokens=page_size * pages,
            eos_token_ids=(EOS,),
        )
        self.facts: dict[str, Any] = {"embedding_size": EMBEDDING_SIZE, "embedding_pooling": "last"}
        self.delay = delay
        self.steps = 0
        self.events: list[tuple[int, str, str]] = []
        self.failure: BaseException | None = None
        self.silent_failure = False  # die without a word to those who wait
        self.fail_next: BaseException | None = None  # raised by the next step that has work
        self._slots, self._page_size, self._pages = slots, page_size, pages
        self._waiting: collections.deque[_Sequence] = collections.deque()
        self._running: list[_Sequence] = []
        self._aborted: set[str] = set()
        self._counts = collections.Counter[str]()
        self._changed = threading.Condition()
        self._closed = False
        self._thread: threading.Thread | None = None

    # --- the engine's interface ---

    @property
    def healthy(self) -> bool:
        return self.failure is None

    def submit(self, *requests: tuple[Request, Sink]) -> None:
        with self._changed:
            if self._closed:
                raise RuntimeError("the engine is closed")
            for request, sink in requests:
                self.events.append((self.steps, "submit", request.request_id))
                self._counts["requests_total"] += 1
                last = int(request.prompt_token_ids[-1])
                self._waiting.extend(
                    _Sequence(request, sink, index, last, self._script_for(request))
                    for index in range(request.params.n)
                )
            self._changed.notify()

    def compile_grammar(self, wanted: StructuredOutputs) -> Any:
        """What is wanted is taken and changes nothing, but for a `choice`: the first one is the answer."""
        return wanted

    def slots(self) -> list[SlotView]:
        with self._changed:
            return [
                SlotView(
                    slot=slot,
                    request_id=one.request.request_id,
                    index=one.index,
                    tier=one.request.tier,
                    status=Status.DECODE,
                    prompt=len(one.request.prompt_token_ids),
                    computed=len(one.request.prompt_token_ids),
                    cached=0,
                    generated=one.tokens,
                    pages=-(-one.request.max_total_tokens // self._page_size),
                    shared=0,
                )
                for slot, one in enumerate(self._running)
            ]

    def abort(self, request_id: str) -> None:
        with self._changed:
            self.events.append((self.steps, "abort", request_id))
            self._aborted.add(request_id)
            self._changed.notify()

    def step(self) -> bool:
        """False when there was nothing to do."""
        with self._changed:
            self._drop_aborted()
            while self._waiting and len(self._running) < self._slots:
                sequence = self._waiting.popleft()
                sequence.admitted = time.monotonic()
                self._counts["prompt_tokens_total"] += len(sequence.request.prompt_token_ids)
                self.events.append((self.steps, "admit", sequence.request.request_id))
                self._running.append(sequence)
            if not self._running:
                return False
            self.steps += 1
            if self.fail_next is not None:
                raise self.fail_next
            running = list(self._running)
        for sequence in running:
            output = self._advance(sequence)
            if output.finish_reason is not None:
                with self._changed:
                    self._running.remove(sequence)
                    self.events.append((self.steps, "free", sequence.request.request_id))
            sequence.sink(output)
        return True

    def start(self) -> None:
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="fake-engine", daemon=True)
            self._thread.start()

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify()
        if self._thread is not None:
            self._thread.join(10)

    def stats(self) -> dict[str, Any]:
        with self._changed:
            used = sum(-(-sequence.request.max_total_tokens // self._page_size) for sequence in self._running)
            return {
                "slots": self._slots,
                "running": len(self._running),
                "waiting": len(self._waiting),
                "pages_total": self._pages,
                "pages_used": used,
                "page_size": self._page_size,
                "warmup_tokens_per_second": 1000.0,
                "prompt_tokens_total": self._counts["prompt_tokens_total"],
                "generation_tokens_total": self._counts["generation_tokens_total"],
                "requests_total": self._counts["requests_total"],
            }

    # --- inside ---

    def _script_for(self, request: Request) -> collections.deque[int] | None:
        wanted = request.params.structured_outputs
        text = wanted.choice[0] if wanted is not None and wanted.choice else self.script
        return None if text is None else collections.deque([*text.encode(), EOS])

    def _run(self) -> None:
        try:
            while True:
                with self._changed:
                    while not (self._closed or self._waiting or self._running or self._aborted):
                        self._changed.wait()
                    if self._closed:
                        break
                self.step()
                if self.delay:
                    time.sleep(self.delay)
            self._end_all(None)
        except BaseException as error:  # as the engine thread does
            self.failure = error
            if not self.silent_failure:
                self._end_all(f"the engine failed: {type(error).__name__}: {error}")

    def _drop_aborted(self) -> None:
        for sequence in [*self._running, *self._waiting]:
            if sequence.request.request_id in self._aborted:
                (self._running if sequence in self._running else self._waiting).remove(sequence)
                self.events.append((self.steps, "free", sequence.request.request_id))
                sequence.sink(Output(sequence.request.request_id, sequence.index, finish_reason=Finish.ABORT))
        self._aborted.clear()

    def _end_all(self, error: str | None) -> None:
        for sequence in [*self._running, *self._waiting]:
            sequence.sink(
                Output(sequence.request.request_id, sequence.index, finish_reason=Finish.ABORT, error=error)
            )
        self._running.clear()
        self._waiting.clear()

    def _advance(self, sequence: _Sequence) -> Output:
        """The sequence's next token, or its end if it may have none."""
        request, params = sequence.request, sequence.request.params
        output = Output(request.request_id, sequence.index)
        if not sequence.started and sequence.index == 0 and params.prompt_logprobs is not None:
            ids = request.prompt_token_ids.tolist()
            output.prompt_logprobs = [None] + [
                entry(before, token, params.prompt_logprobs) for before, token in itertools.pairwise(ids)
            ]
        if not sequence.started:
            output.admitted = sequence.admitted
        sequence.started = True
        room = request.max_total_tokens - len(request.prompt_token_ids)
        if request.pooling is not None:
            output.embedding = embed(request)
        if sequence.tokens < room:
            token = successor(sequence.last) if sequence.script is None else sequence.script.popleft()
            output.token_ids = [token]
            if params.logprobs is not None:
                last = sequence.last if sequence.script is None else (token - 1) % VOCABULARY
                output.logprobs = [entry(last, token, params.logprobs)]
            sequence.last = token
            sequence.tokens += 1
            self._counts["generation_tokens_total"] += 1
            self._add_text(sequence, token, output)
        if output.finish_reason is None and sequence.tokens >= room:
            output.finish_reason = Finish.LENGTH
        if output.finish_reason is not None:
            output.text += sequence.text[sequence.sent :]
        return output

    def _add_text(self, sequence: _Sequence, token: int, output: Output) -> None:
        params = sequence.request.params
        if token in sequence.request.stop_token_ids and sequence.tokens >= params.min_tokens:
            output.finish_reason = Finish.STOP
            output.stop_reason = token if token in params.stop_token_ids else None
            return
        if self.tokenizer is None:
            return
        sequence.text += self.tokenizer.decode([token], skip_special_tokens=params.skip_special_tokens)
        for stop in params.stop:
            if stop in sequence.text[sequence.sent :]:
                sequence.text = sequence.text[: sequence.text.index(stop, sequence.sent)]
                output.finish_reason, output.stop_reason = Finish.STOP, stop
                return
        held = max((len(stop) - 1 for stop in params.stop), default=0)
        ready = max(sequence.sent, len(sequence.text) - held)
        output.text = sequence.text[sequence.sent : ready]
        sequence.sent = ready
