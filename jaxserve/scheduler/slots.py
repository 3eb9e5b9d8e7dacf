"""The rows of the decode batch: who holds each, and what a step needs of all of them, as arrays by slot.

Arrays, because a step looks at every running sequence: 256 Python objects touched a dozen times are
milliseconds, the same dozen numpy calls are 20 µs. Knows nothing of queues, pages or policy.
"""

from __future__ import annotations

import heapq

import numpy as np
from numpy.typing import NDArray

from jaxserve.scheduler.pages import require
from jaxserve.scheduler.types import MAX_STOP_TOKENS, Sequence


class Slots:
    """Arrays that share their first axis, the slot. A free slot has no sequence and nothing to sample.

    sequences: object[max_slots], the holder or None.
    tables: i32[max_slots, pages_per_slot], the holder's pages in order, then -1.
    pages: i32[max_slots], how many these are.
    position: i32[max_slots], where the next decoded token enters.
    to_sample: i32[max_slots], decode steps still to dispatch; 0 until the whole prompt is dispatched.
    to_read: i32[max_slots], tokens still to be read back before the length limit.
    to_force: i32[max_slots], of the steps to dispatch, the first ones that replay the output.
    to_skip: i32[max_slots], of the tokens to come, the first ones that are a replay: nobody's news.
    length_limit: i32[max_slots], prompt and generated tokens together.
    stop_tokens: i32[max_slots, MAX_STOP_TOKENS], filled up with -1.
    one_step: bool[max_slots], its tokens are wanted one by one: it has stop strings or a grammar.
    masked: bool[max_slots], it has a grammar: what it may draw next follows from what it drew before.
    waits: bool[max_slots], of these: it draws nothing until `Scheduler.allow` says so.
    epoch: i64[max_slots], raised at every release: a row planned in an earlier epoch is void.
    """

    def __init__(self, max_slots: int, pages_per_slot: int) -> None:
        self.sequences: NDArray[np.object_] = np.full(max_slots, None, object)
        self.tables = np.full((max_slots, pages_per_slot), -1, np.int32)
        self.pages = np.zeros(max_slots, np.int32)
        self.position = np.zeros(max_slots, np.int32)
        self.to_sample = np.zeros(max_slots, np.int32)
        self.to_read = np.zeros(max_slots, np.int32)
        self.to_force = np.zeros(max_slots, np.int32)
        self.to_skip = np.zeros(max_slots, np.int32)
        self.length_limit = np.zeros(max_slots, np.int32)
        self.stop_tokens = np.full((max_slots, MAX_STOP_TOKENS), -1, np.int32)
        self.one_step = np.zeros(max_slots, np.bool_)
        self.masked = np.zeros(max_slots, np.bool_)
        self.waits = np.zeros(max_slots, np.bool_)
        self.epoch = np.zeros(max_slots, np.int64)
        self._stop_columns = 0  # the most stop tokens that any holder had: the columns worth comparing
        self._free = list(range(max_slots))  # a heap: the lowest slot goes first, so batches stay dense

    @property
    def free(self) -> int:
        return len(self._free)

    @property
    def held(self) -> int:
        return len(self.sequences) - len(self._free)

    def holders(self) -> list[Sequence]:
        """The sequences that run."""
        return [sequence for sequence in self.sequences if sequence is not None]

    def take(self, sequence: Sequence) -> None:
        """Gives the sequence the lowest free slot. Raises IndexError if there is none."""
        slot = heapq.heappop(self._free)
        self.sequences[slot] = sequence
        self.to_read[slot] = sequence.max_new_tokens - len(sequence.output)
        self.to_skip[slot] = len(sequence.output) - sequence.resumed
        self.length_limit[slot] = sequence.request.max_total_tokens
        stop = sequence.request.stop_token_ids
        self.stop_tokens[slot, : len(stop)] = stop
        self.masked[slot] = masked = sequence.request.grammar is not None
        self.waits[slot] = sequence.waits
        self.one_step[slot] = masked or bool(sequence.request.params.stop)
        self._stop_columns = max(self._stop_columns, len(stop))
        sequence.slot = slot

    def add_pages(self, sequence: Sequence, fresh: list[int]) -> None:
        """Appends to the holder's pages."""
        slot, held = sequence.slot, len(sequence.pages)
        sequence.pages += fresh
        self.tables[slot, held : held + len(fresh)] = fresh
        self.pages[slot] = held + len(fresh)

    def start_decoding(self, sequence: Sequence) -> None:
        """From now on the holder decodes: its prompt, and a first token after it, were dispatched."""
        slot = sequence.slot
        self.position[slot] = sequence.prefill_len
        self.to_sample[slot] = sequence.max_new_tokens - sequence.sampled
        self.to_force[slot] = max(len(sequence.output) - sequence.sampled, 0)

    def decodable(self) -> NDArray[np.intp]:
        """The slots that can draw in the next step."""
        return np.flatnonzero((self.to_sample > 0) & ~self.waits)

    def release(self, sequence: Sequence) -> None:
        """Voids the slot and every row that was planned for it."""
        slot = sequence.slot
        self.sequences[slot] = None
        self.tables[slot] = -1
        self.pages[slot] = 0
        self.to_sample[slot] = 0
        self.to_force[slot] = 0
        self.to_skip[slot] = 0
        self.stop_tokens[slot] = -1
        self.one_step[slot] = self.masked[slot] = self.waits[slot] = False
        self.epoch[slot] += 1
        heapq.heappush(self._free, slot)
        sequence.slot = -1

    def stopped_by(self, slots: NDArray[np.intp], tokens: NDArray[np.int32]) -> NDArray[np.bool_]:
        """bool[rows]: whether tokens[i], which is not negative, is a stop token of the holder of slots[i]."""
        stop_tokens = self.stop_tokens[:, : self._stop_columns].take(slots, axis=0)
        stopped: NDArray[np.bool_] = (stop_tokens == tokens[:, None]).any(axis=1)
        return stopped

    def check_invariants(self) -> None:
        """Raises AssertionError unless each slot is either free or held, and its row matches its holder."""
        free = set(self._free)
        require(len(free) == len(self._free), "a slot is free twice")
        for slot, sequence in enumerate(self.sequences):
            require((sequence is None) == (slot in free), f"slot {slot} is free and held, or neither")
            if sequence is None:
                ahead = (self.to_sample[slot], self.to_force[slot], self.to_skip[slot], self.pages[slot])
                require(not any(ahead), f"free slot {slot} would be decoded, or has pages")
                require(bool((self.tables[slot] == -1).all()), f"free slot {slot} has a table")
                require(not (self.masked[slot] or self.waits[slot]), f"free slot {slot} waits for a mask")
            else:
                require(sequence.slot == slot, f"slot {slot} is held by a sequence of slot {sequence.slot}")
                self._check_row(slot, sequence)

    def _check_row(self, slot: int, sequence: Sequence) -> None:
        pages, table = sequence.pages, self.tables[slot].tolist()
        require(self.masked[slot] == (sequence.request.grammar is not None), f"slot {slot}: masked is wrong")
        require(self.masked[slot] or not self.waits[slot], f"slot {slot} waits for no mask")
        require(self.waits[slot] or not sequence.waits, f"slot {slot} draws before its mask is known")
        require(table == pages + [-1] * (len(table) - len(pages)), f"slot {slot}: table is not its pages")
        require(self.pages[slot] == len(pages), f"slot {slot}: {self.pages[slot]} pages, not {len(pages)}")
        output = len(sequence.output)
        to_read = sequence.max_new_tokens - output
        require(self.to_read[slot] == to_read, f"slot {slot}: to_read={self.to_read[slot]}, not {to_read}")
        dispatched = sequence.sampled > sequence.resumed
        to_sample = sequence.max_new_tokens - sequence.sampled if dispatched else 0
        require(self.to_sample[slot] == to_sample, f"slot {slot}: to_sample is not {to_sample}")
        to_force = max(output - sequence.sampled, 0) if dispatched else 0
        require(self.to_force[slot] == to_force, f"slot {slot}: to_force is not {to_force}")
        require(0 <= self.to_skip[slot] <= output, f"slot {slot}: to_skip={self.to_skip[slot]}")
        if dispatched:
            position = sequence.prompt_len + sequence.sampled - 1
            require(self.position[slot] == position, f"slot {slot}: position is not {position}")
