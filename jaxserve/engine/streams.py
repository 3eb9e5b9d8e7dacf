"""A sequence's way out: tokens that were read back become text, stop strings are found, increments are sent.

Knows nothing of slots, pages or programs.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from jaxserve.engine.batch import Results, allowed_words
from jaxserve.engine.outputs import Output, Sink, TokenLogprob
from jaxserve.scheduler.types import Finish, Pooling, Sequence
from jaxserve.text.detokenizer import Detokenizer
from jaxserve.text.grammars import Matcher
from jaxserve.text.stop_strings import StopStrings
from jaxserve.text.tokenizer import Tokenizer


class Stream:
    """One sequence's outputs. Without a tokenizer there is no text, and stop strings never match."""

    def __init__(self, sequence: Sequence, sink: Sink, tokenizer: Tokenizer | None) -> None:
        request, params = sequence.request, sequence.request.params
        self._request_id = request.request_id
        self._index = sequence.index
        self._sink = sink
        self._detokenizer = None
        if tokenizer is not None:
            self._detokenizer = Detokenizer(
                tokenizer, request.prompt_token_ids.tolist(), skip_special_tokens=params.skip_special_tokens
            )
        self._stops = StopStrings(params.stop)
        self._unsearched = params.min_tokens  # tokens to come whose text may not hold a stop string
        self._logprobs = params.logprobs
        self._own_stops = frozenset(params.stop_token_ids)
        self._ranked = params.sequences > params.n  # the best n are chosen by this
        self._cumulative = 0.0
        self._sequence = sequence
        self.matcher: Matcher | None = None if request.grammar is None else request.grammar.start()
        self._allowed: NDArray[np.int32] | None = None  # `allowed_words`, once they are asked for
        self._embedding: NDArray[np.float32] | None = None
        self._started = False
        self._prompt_logprobs: list[TokenLogprob | None] | None = None
        self._prompt_top = params.prompt_logprobs or 0

    def begin_prompt_logprobs(self) -> None:
        """Its prompt is computed from the start: the first time, or again after it was preempted."""
        if not self._started:
            self._prompt_logprobs = [None]

    def prompt_logprobs(self, results: Results, first: int, count: int) -> None:
        """Takes in the prompt's log-probabilities at rows first .. first+count."""
        if self._prompt_logprobs is not None:
            rows = range(first, first + count)
            self._prompt_logprobs += [
                token_logprob(results, row, self._prompt_top) for row in rows if results.tokens[row] >= 0
            ]

    def mask(self, vocab_size: int) -> NDArray[np.int32]:
        """i32[W], the tokens that its grammar and `allowed_token_ids` both allow next."""
        assert self.matcher is not None
        params = self._sequence.request.params
        if params.allowed_token_ids is None:
            return self.matcher.mask
        if self._allowed is None:
            self._allowed = allowed_words(params, vocab_size)
        return self.matcher.mask & self._allowed

    def fault(self, vocab_size: int) -> tuple[str, str] | None:
        """Why its next token cannot be drawn, and the field at fault; None where it can be."""
        if self.matcher is None:
            return None
        if self.matcher.error is not None:
            return self.matcher.error, "structured_outputs"
        if not self.matcher.complete and not self.mask(vocab_size).any():
            return "allowed_token_ids holds no token that may come next", "allowed_token_ids"
        return None

    def add_states(self, states: NDArray[np.float32], *, first: bool) -> None:
        """Takes in the sum of a chunk's hidden states, f32[D]. first: of its prompt."""
        self._embedding = states if first or self._embedding is None else self._embedding + states

    def push(self, token: int, finish: Finish | None, results: Results, row: int) -> bool:
        """Sends what `token` (-1: none) completes. True if a stop string ended the sequence here."""
        output = Output(self._request_id, self._index, finish_reason=finish)
        output.prompt_logprobs, self._prompt_logprobs = self._prompt_logprobs, None
        if not self._started:
            self._started = True
            output.cached_tokens = self._sequence.cached
            output.admitted = self._sequence.admitted_at
        if token >= 0:
            output.token_ids.append(token)
            if self._logprobs is not None:
                output.logprobs = [token_logprob(results, row, self._logprobs)]
            if self._ranked:
                self._cumulative += float(results.logprobs[row])
        if finish is Finish.STOP:
            output.stop_reason = token if token in self._own_stops else None
        text, stopped = self._text(token, finish)
        output.text = text
        if stopped is not None:
            output.finish_reason, output.stop_reason = Finish.STOP, stopped
        if self._embedding is not None and finish is not None:
            mean = self._sequence.request.pooling is Pooling.MEAN
            output.embedding = self._embedding / np.float32(self._sequence.prompt_len if mean else 1)
        if self._ranked and output.finish_reason is not None:
            output.cumulative_logprob = self._cumulative
        self._sink(output)
        return stopped is not None and finish is None

    def _text(self, token: int, finish: Finish | None) -> tuple[str, str | None]:
        if self._detokenizer is None:
            return "", None
        text = ""
        if token >= 0 and finish is not Finish.STOP:  # a stop token is not part of the text
            text = self._detokenizer.push(token)
        if finish is not None:
            text += self._detokenizer.flush()
        if self._unsearched > 0:
            self._unsearched -= 1
            return text, None
        text, stopped = self._stops.push(text)
        if stopped is None and finish is not None:
            text += self._stops.flush()
        return text, stopped

    def end(
        self, finish: Finish = Finish.ABORT, *, error: str | None = None, param: str | None = None
    ) -> None:
        """Sends the last increment of a sequence that was aborted, too late or lost."""
        self._sink(Output(self._request_id, self._index, finish_reason=finish, error=error, param=param))


def token_logprob(results: Results, row: int, top: int) -> TokenLogprob:
    alternatives = zip(
        results.top_tokens[row, :top].tolist(), results.top_logprobs[row, :top].tolist(), strict=True
    )
    return TokenLogprob(
        token_id=int(results.tokens[row]),
        logprob=float(results.logprobs[row]),
        rank=int(results.ranks[row]),
        top=tuple((token, value) for token, value in alternatives if token >= 0),
    )
