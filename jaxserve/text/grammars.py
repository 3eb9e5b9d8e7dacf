"""Structured output: what a reply must look like, as a mask over the vocabulary for each of its tokens.

llguidance compiles the grammar and finds the masks. What a client sends is first given to a process of its
own (`grammar_judge.py`), since the library may die of it; what passes there is compiled here, on a thread.
Grammars are kept for the next request that wants the same one.

Knows nothing of slots and steps; the engine asks `Masks` for the next mask and is told when it is there.
"""

from __future__ import annotations

import collections
import concurrent.futures
import contextlib
import hashlib
import json
import os
import re
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import llguidance
import numpy as np
import orjson
from numpy.typing import NDArray

from jaxserve.text.grammar_judge import Judge, JudgeError, TooSlow
from jaxserve.text.json_schemas import SchemaError, compiled_form
from jaxserve.text.judge_process import limits
from jaxserve.text.tokenizer import Tokenizer

MAX_TEXT = 2**20  # bytes of a grammar
QUICK_SECONDS, COMPILE_SECONDS = 1.0, 5.0  # that most grammars may take, and the few that take longer
MAX_COMPILING, MAX_SLOW = 16, 4  # grammars that wait to be compiled, and of these those that take longer
KEPT, KEPT_BYTES = 256, 16 * 2**20  # grammars, and bytes of their texts, that are remembered
STACK_BYTES = 512 * 2**20  # of address space: only what is used takes memory
MASK_THREADS = min(4, os.cpu_count() or 1)


class GrammarError(ValueError):
    """A grammar that cannot be compiled, or not within the limits."""


class TooManyGrammars(RuntimeError):
    """So many grammars wait to be compiled that one more is refused."""


def _json(schema: str) -> str:
    try:
        read = orjson.loads(schema)
        if not isinstance(read, dict | bool):
            raise SchemaError("a JSON schema is an object")
        return llguidance.LLMatcher.grammar_from_json_schema(compiled_form(read))
    except SchemaError as error:
        raise GrammarError(str(error)) from None
    except ValueError as error:
        raise GrammarError(f"this is not a JSON schema: {_short(error)}") from None


def _escape(text: str) -> str:
    """For Rust's regular expressions: every character that may mean something else, by its number."""
    return "".join(c if c.isalnum() else f"\\x{{{ord(c):x}}}" for c in text)


# what a grammar is given as -> its text for llguidance
KINDS: Mapping[str, Callable[[str], str]] = {
    "json": _json,  # a schema
    "regex": llguidance.LLMatcher.grammar_from_regex,
    "choice": lambda choices: llguidance.LLMatcher.grammar_from_regex(
        "|".join(map(_escape, json.loads(choices)))
    ),
    "grammar": llguidance.LLMatcher.grammar_from_lark,
}


class Grammar:
    """A compiled grammar. Each sequence gets a matcher of its own.

    mask: i32[W], bit t of the words is set where token t may come first. size: of its text, in bytes.
    vocab_size: llguidance's, perhaps more than W words hold.
    """

    def __init__(
        self, size: int, matcher: llguidance.LLMatcher, mask: NDArray[np.int32], vocab_size: int
    ) -> None:
        self.size = size
        self.mask = mask
        self._vocab_size = vocab_size
        self._matcher = matcher
        self._lock = threading.Lock()

    def start(self) -> Matcher:
        with self._lock:
            return Matcher(self._matcher.deep_copy(), self.mask, self._vocab_size)


class Matcher:
    """Where one reply stands in its grammar.

    mask: i32[W], of the next token. complete: nothing but an end token can follow. error: why no mask could
    be found.
    """

    def __init__(self, matcher: llguidance.LLMatcher, mask: NDArray[np.int32], vocab_size: int) -> None:
        self.mask = mask
        self._vocab_size = vocab_size
        self.complete = False
        self.error: str | None = None
        self._matcher = matcher

    def advance(self, token: int) -> None:
        """Takes in a token that the mask allowed, and finds the next mask."""
        if self._matcher.consume_token(token):
            self.complete = self._matcher.is_stopped()
            if not self.complete:
                self.mask = _mask(self._matcher, self._vocab_size)[: len(self.mask)]
        if self._matcher.is_error():
            self.error = f"the grammar cannot be followed: {_short(self._matcher.get_error())}"
        elif not self.complete and not self.mask.any():
            self.error = "the grammar allows no further token"


def _mask(matcher: llguidance.LLMatcher, vocab_size: int) -> NDArray[np.int32]:
    mask = np.zeros(-(-vocab_size // 32), np.int32)
    matcher.unsafe_compute_mask_ptr(mask.ctypes.data, mask.nbytes)
    return mask


class Grammars:
    """Compiles grammars over a tokenizer's vocabulary. Any thread may ask.

    vocab_size: the model's, which may be padded beyond the tokenizer's. Raises ValueError for a tokenizer
    that llguidance does not understand.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, end_tokens: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._source = ""  # the tokenizer's JSON, once somebody wants a grammar
        self._vocab_size = max(vocab_size, tokenizer.vocab_size)
        self._words = -(-vocab_size // 32)
        self._end_tokens = [token for token in end_tokens if token < self._vocab_size]
        self._kept: collections.OrderedDict[tuple[str, bytes], Grammar] = collections.OrderedDict()
        self._kept_bytes = 0
        self._lock = threading.Lock()
        self._made: llguidance.LLTokenizer | None = None
        self._lanes: list[_Lane] = []  # quick, slow
        self._closed = False

    def compile(self, kind: str, text: str) -> Grammar:
        """The grammar of a text: see KINDS.

        Blocks while it is compiled. Raises GrammarError, and TooManyGrammars.
        """
        try:
            data = text.encode()
        except UnicodeEncodeError as error:
            raise GrammarError(f"it is not Unicode: {error.reason}") from None
        if len(data) > MAX_TEXT:
            raise GrammarError(f"it has {len(data)} bytes; at most {MAX_TEXT}")
        key = kind, hashlib.blake2b(data, digest_size=32).digest()
        with self._lock:
            if (found := self._kept.get(key)) is not None:
                self._kept.move_to_end(key)
                return found
            if self._closed:
                raise GrammarError("the engine is closed")
            if not self._lanes:
                self._start()
            quick, slow = self._lanes
        try:
            made = quick.compile(kind, text, len(data))
        except TooSlow:
            try:
                made = slow.compile(kind, text, len(data))
            except TooSlow as error:
                raise GrammarError(str(error)) from None
        with self._lock:
            if key not in self._kept:
                self._kept[key] = made
                self._kept_bytes += made.size
            while len(self._kept) > KEPT or self._kept_bytes > KEPT_BYTES:
                _, old = self._kept.popitem(last=False)
                self._kept_bytes -= old.size
        return made

    def close(self) -> None:
        with self._lock:
            self._closed = True
            lanes, self._lanes = self._lanes, []
        for lane in lanes:
            lane.close()

    def _start(self) -> None:
        self._source = self._tokenizer.backend.to_str()
        self._lanes = [
            _Lane(self, Judge(self._source, self._vocab_size, self._end_tokens), seconds, most)
            for seconds, most in ((QUICK_SECONDS, MAX_COMPILING), (COMPILE_SECONDS, MAX_SLOW))
        ]

    def finish(self, text: str, size: int) -> Grammar:
        """The grammar of a text that passed its judge."""
        matcher = llguidance.LLMatcher(self._tokens(), text, log_level=0, limits=limits())
        mask = None if matcher.is_error() else _mask(matcher, self._vocab_size)[: self._words]
        if matcher.is_error():
            raise GrammarError(_short(matcher.get_error()))
        if mask is None or not mask.any():
            raise GrammarError("no text can follow it")
        return Grammar(size, matcher, mask, self._vocab_size)

    def _tokens(self) -> llguidance.LLTokenizer:
        with self._lock:
            if self._made is None:
                self._made = llguidance.LLTokenizer(
                    self._source, n_vocab=self._vocab_size, eos_token=self._end_tokens or None
                )
            return self._made


class _Lane:
    """One thread that compiles, with a judge of its own: who needs seconds holds up only others who do."""

    def __init__(self, grammars: Grammars, judge: Judge, seconds: float, most: int) -> None:
        self._grammars, self._judge, self._seconds, self._most = grammars, judge, seconds, most
        self._waiting = 0
        self._lock = threading.Lock()
        with big_stacks():
            self._thread = concurrent.futures.ThreadPoolExecutor(1, "jaxserve-grammar", _give_way)
            self._thread.submit(lambda: None)  # threads are made by what is submitted

    def compile(self, kind: str, text: str, size: int) -> Grammar:
        with self._lock:
            if self._waiting >= self._most:
                raise TooManyGrammars(f"{self._waiting} grammars wait to be compiled")
            self._waiting += 1
        try:
            try:
                compiling = self._thread.submit(self._compile, kind, text, size)
            except RuntimeError:
                raise GrammarError("the engine is closed") from None
            return compiling.result()
        except concurrent.futures.CancelledError:
            raise GrammarError("the engine is closed") from None
        finally:
            with self._lock:
                self._waiting -= 1

    def close(self) -> None:
        self._thread.shutdown(wait=False, cancel_futures=True)
        self._judge.close()

    def _compile(self, kind: str, given: str, size: int) -> Grammar:
        text = KINDS[kind](given)
        try:
            self._judge.check(text, self._seconds)
        except TooSlow:
            raise
        except JudgeError as error:
            raise GrammarError(_short(error)) from None
        return self._grammars.finish(text, size)


class Masks:
    """Finds the masks of replies on threads of its own, beside the device's step.

    ready: called on such a thread with (whose, matcher) once the matcher has taken its token in.
    """

    def __init__(self, ready: Callable[[Any, Matcher], None]) -> None:
        self._ready = ready
        self._jobs: collections.deque[tuple[Any, Matcher, int]] = collections.deque()
        self._wake = threading.Semaphore(0)
        self._threads: list[threading.Thread] = []
        self._closing = False

    def advance(self, whose: Any, matcher: Matcher, token: int) -> None:
        if not self._threads:
            self._start()
        self._jobs.append((whose, matcher, token))
        self._wake.release()

    def close(self) -> None:
        self._closing = True
        for _ in self._threads:
            self._wake.release()

    def _start(self) -> None:
        with big_stacks():
            for number in range(MASK_THREADS):
                thread = threading.Thread(target=self._run, name=f"jaxserve-masks-{number}", daemon=True)
                thread.start()
                self._threads.append(thread)

    def _run(self) -> None:
        while True:
            self._wake.acquire()
            if self._closing:
                return
            whose, matcher, token = self._jobs.popleft()
            try:
                matcher.advance(token)
            except BaseException as error:  # the library's panics are no Exceptions; the thread goes on
                matcher.error = f"the grammar cannot be followed: {_short(error)}"
            self._ready(whose, matcher)


@contextlib.contextmanager
def big_stacks() -> Iterator[None]:
    """Threads that start in here can recurse as deeply as a grammar that passed its judge needs."""
    before = threading.stack_size(STACK_BYTES)
    try:
        yield
    finally:
        threading.stack_size(before)


def _give_way() -> None:
    """This thread runs when nobody else wants the processor: a step is worth more than a new grammar."""
    with contextlib.suppress(OSError, AttributeError):
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 10)


def _short(error: object) -> str:
    """llguidance's message without the lines of the grammar that it repeats, the mark below them, and its
    advice to set an option that nobody can."""
    unsaid = r"(?m)^ *[0-9]+ \|.*$|^ *\^ *$| Enable 'coerce_one_of' option.*$"
    text = " ".join(re.sub(unsaid, "", str(error)).split())
    return text if len(text) <= 300 else text[:297] + "..."
