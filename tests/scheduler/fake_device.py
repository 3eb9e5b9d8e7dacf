"""A device that keeps score, and a model that can be computed by hand.

`Device` is a model of the hardware, not of the scheduler: it runs plans in the order they come and keeps the
KV pool as a dictionary from place to what was written there. After each chunk and each step, *everything that
a row reads through its page table* is compared with what its own tokens should have left there: a page given
to two sequences, a position skipped, a wrong prefix, a page read before it was written or a stale table is
an error on the spot. `alone()` says what a sequence should get with nobody else there.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from jaxserve.scheduler.scheduler import NO_TOKEN
from jaxserve.scheduler.types import Finish, PrefillRow, Request, SamplingParams, StepPlan

VOCAB = 50


def penalised(params: SamplingParams) -> bool:
    return params.presence_penalty != 0 or params.frequency_penalty != 0 or params.repetition_penalty != 1


def draw(tokens: list[int], generated: list[int], seed: int, request: Request | PrefillRow) -> int:
    """The token after `tokens`: a hash, moved on while it is a stop token that may not be drawn yet.

    generated: those that a penalty would count.
    """
    counted = tuple(sorted(generated)) if penalised(request.params) else ()
    token = hash((seed, *tokens, counted)) % VOCAB
    prompt_len = request.prompt_len if isinstance(request, PrefillRow) else len(request.prompt_token_ids)
    while len(tokens) - prompt_len < request.params.min_tokens and token in request.stop_token_ids:
        token = (token + 1) % VOCAB
    return token


def alone(request: Request, seed: int) -> tuple[list[int], Finish]:
    """What a sequence generates by itself, and why it ends."""
    tokens = request.prompt_token_ids.tolist()
    output: list[int] = []
    while len(tokens) < request.max_total_tokens:
        token = draw(tokens, output, seed, request)
        tokens.append(token)
        output.append(token)
        if token in request.stop_token_ids:
            return output, Finish.STOP
    return output, Finish.LENGTH


@dataclasses.dataclass(frozen=True)
class Written:
    """What one place of the pool holds: keys and values depend on all tokens up to their position."""

    tokens: int  # a hash of all tokens up to here
    namespace: object  # of whom it may be read
    kind: str  # "prefill" or "decode"
    plan: int
    slot: int


@dataclasses.dataclass
class Row:
    """A slot's state on the device."""

    prefill: PrefillRow  # the first one: it says all about the sequence
    tokens: list[int]  # all that entered, cached ones included
    generated: list[int]  # what a penalty counts
    last: int = NO_TOKEN
    done: bool = False


class Device:
    """Runs plans.

    prompts: seed -> its sequence's prompt and who may read it: a row that starts behind a cached prefix never
        sees the tokens of that. outputs: seed -> what was read back, kept up to date by the caller.
    followed: seed -> how many of its tokens its grammar has taken in; it draws none before that.
    """

    def __init__(self, page_size: int, *, replay: bool = False) -> None:
        self.page_size = page_size
        self.replay = replay
        self.kv: dict[int, Written | None] = {}  # place -> what is there; None: rubbish
        self.rows: dict[int, Row] = {}
        self.prompts: dict[int, tuple[list[int], object]] = {}
        self.outputs: dict[int, list[int]] = {}
        self.followed: dict[int, int] = {}
        self.computed = 0  # prompt tokens
        self.plan = -1

    def run(self, plan: StepPlan) -> tuple[np.ndarray, np.ndarray, list[int]]:
        """Tokens i32[prefill rows], tokens i32[steps, decode rows], and the seed of each event's row."""
        assert plan.step == self.plan + 1
        self.plan = plan.step
        prefill = [self.prefill(row) for row in plan.prefill]
        seeds = [row.seed for row in plan.prefill]
        decode = np.zeros((0, 0), np.int32)
        if (rows := plan.decode) is not None:
            assert rows.slots.tolist() == sorted(set(rows.slots.tolist())) and rows.steps >= 1
            assert rows.forced is None or rows.steps == 1
            forced = [NO_TOKEN] * len(rows.slots) if rows.forced is None else rows.forced.tolist()
            states = [self.rows[slot] for slot in rows.slots.tolist()]
            steps = []
            for step in range(rows.steps):
                steps.append(
                    [
                        self.decode(state, int(position) + step, table, token, step)
                        for state, position, table, token in zip(
                            states, rows.positions, rows.tables, forced, strict=True
                        )
                    ]
                )
                seeds += [state.prefill.seed for state in states]
            decode = np.asarray(steps, np.int32)
        return np.asarray(prefill, np.int32), decode, seeds

    def prefill(self, row: PrefillRow) -> int:
        prompt, _ = self.prompts[row.seed]
        if row.first:
            before = (prompt + self.outputs[row.seed])[: row.start]  # it came from the cache
            assert row.start % self.page_size == 0 and len(before) == row.start
            generated = [] if row.generated is None else row.generated.tolist()
            counted = penalised(row.params) and not self.replay
            assert generated == (self.outputs[row.seed] if counted else [])
            self.rows[row.slot] = Row(row, before, generated)
            assert (row.prompt is not None) == (row.params.repetition_penalty != 1.0)
            assert row.prompt is None or row.prompt.tolist() == prompt
        else:
            assert row.prompt is None and row.generated is None
        state = self.rows[row.slot]
        assert row.seed == state.prefill.seed and row.start == len(state.tokens) and len(row.tokens)
        assert row.prompt_len == len(prompt)
        for token in row.tokens.tolist():
            self.write(state, row.table, token, "prefill")
        self.computed += len(row.tokens)
        assert state.tokens[: len(prompt)] == prompt[: len(state.tokens)]
        if not row.last:
            assert row.forced == NO_TOKEN
            self.check_reads(state, row.table)
            return NO_TOKEN
        if self.replay:
            assert len(state.tokens) == len(prompt)
        else:
            assert row.forced == NO_TOKEN
        if row.max_total_tokens == row.prompt_len:
            self.check_reads(state, row.table)
            state.done = True
            return NO_TOKEN
        return self.sample(state, row.table, row.forced)

    def decode(self, state: Row, position: int, table: np.ndarray, forced: int, step: int) -> int:
        if state.done:  # ended on the device: the worst it can do is to write rubbish where the plan says
            if step == 0:
                self.kv[self.place(table, position)] = None
            return NO_TOKEN
        assert position == len(state.tokens)
        self.write(state, table, state.last, "decode")
        return self.sample(state, table, forced)

    def write(self, state: Row, table: np.ndarray, token: int, kind: str) -> None:
        position = len(state.tokens)
        state.tokens.append(token)
        _, namespace = self.prompts[state.prefill.seed]
        self.kv[self.place(table, position)] = Written(
            hash(tuple(state.tokens)), namespace, kind, self.plan, state.prefill.slot
        )

    def place_page(self, page: int, index: int, prompt: list[int], namespace: object) -> None:
        """Fills a page with a prompt's page of that index, computed elsewhere by prefill."""
        for offset in range(self.page_size):
            end = index * self.page_size + offset + 1
            written = Written(hash(tuple(prompt[:end])), namespace, "prefill", self.plan, -1)
            self.kv[page * self.page_size + offset] = written

    def check_reads(self, state: Row, table: np.ndarray) -> None:
        used = -(-len(state.tokens) // self.page_size)
        assert (table[:used] >= 0).all()
        assert len(set(table[:used].tolist())) == used
        prompt, namespace = self.prompts[state.prefill.seed]
        for position in range(len(state.tokens)):
            there = self.kv[self.place(table, position)]
            assert there is not None and there.namespace == namespace
            assert there.tokens == hash(tuple(state.tokens[: position + 1])), position
            assert there.plan < self.plan or there.slot in (state.prefill.slot, -1)
            if self.replay:  # what prefill made is not decode's to make, and the other way round
                assert there.kind == ("prefill" if position < len(prompt) else "decode")

    def sample(self, state: Row, table: np.ndarray, forced: int) -> int:
        self.check_reads(state, table)
        first = state.prefill
        state.last = draw(state.tokens, state.generated, first.seed, first)
        if forced == NO_TOKEN and first.seed in self.followed:
            assert len(state.tokens) == first.prompt_len + self.followed[first.seed]
        if forced != NO_TOKEN:
            assert state.last == forced  # it was drawn here before, and must be drawn again
        state.generated.append(state.last)
        total = len(state.tokens) + 1  # the token just drawn has no place yet
        state.done = state.last in first.stop_token_ids or total == first.max_total_tokens
        return state.last

    def place(self, table: np.ndarray, position: int) -> int:
        page, offset = divmod(int(position), self.page_size)
        assert table[page] >= 0
        return int(table[page]) * self.page_size + offset
