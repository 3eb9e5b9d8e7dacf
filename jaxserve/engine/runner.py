"""What programs run on: parameters, the state that they take and give back, and their executables.

The engine packs a plan into one array per program and has it run here, so that a plan can be run elsewhere
too: `follower.py` runs the same arrays, in the same order, in the other processes of a group.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from numpy.typing import NDArray

from jaxserve.engine.buckets import PAGES_MOVED
from jaxserve.engine.programs import Key, Programs
from jaxserve.engine.state import EngineState
from jaxserve.models.decoder import Params

OF_PREFILL = ("prompt_logprobs", "embed")  # what reads the hidden states of the prefill just before


class Runner:
    """programs: compiled. params, state: on the devices; the state is given away."""

    def __init__(self, programs: Programs, params: Params, state: EngineState) -> None:
        self.programs = programs
        self._params = params
        self._state = state
        self._place = state.pool.sharding
        self._hidden: jax.Array | None = None  # of the prefill that ran last, until something else runs

    def run(self, key: Key, packed: NDArray[np.int32]) -> jax.Array | None:
        """Dispatches a program on `packed` (see `batch`). Its results, i32[.., RESULT_WIDTH] or those of
        `Steps.embed`, if it has any.

        Raises KeyError for a program that is not there, and what the device raises.
        """
        program, hidden = self.programs[key], self._hidden
        if key[0] not in OF_PREFILL:
            self._hidden = None
        results: jax.Array | None = None
        match key[0]:
            case "edit_slot" | "mask_slots":
                self._state = program(self._state, packed)
            case "prefill":
                self._state, results, self._hidden = program(self._params, self._state, packed)
            case "prompt_logprobs":
                results = program(self._params, hidden, packed)
            case "embed":
                results = program(hidden, packed)
            case "decode":
                self._state, results = program(self._params, self._state, packed)
            case kind:
                raise KeyError(f"nobody has said what the program {kind!r} takes and gives")
        return results

    @property
    def params(self) -> Params:
        return self._params

    def copy_pages(self, pages: Sequence[int]) -> jax.Array:
        """Dispatches a copy of at most PAGES_MOVED pages: [L, PAGES_MOVED, page, 2KH], like the pool in all
        but the number of pages. What follows the last one is any page's."""
        ids = np.zeros(PAGES_MOVED, np.int32)
        ids[: len(pages)] = pages
        return self.programs["copy_pages", PAGES_MOVED](self._state, ids)

    def place_pages(self, pages: Sequence[int], block: jax.Array) -> None:
        """Dispatches the writing of a block, its entry i to pages[i]; nowhere where that is -1 or lacks."""
        ids = np.full(PAGES_MOVED, -1, np.int32)
        ids[: len(pages)] = pages
        self._state = self.programs["place_pages", PAGES_MOVED](self._state, ids, block)

    def bring(self, block: jax.Array) -> jax.Array:
        """A block of another pool's pages, on this one's devices."""
        return jax.device_put(block, self._place)

    def read(self, results: jax.Array) -> NDArray[Any]:
        """Waits for results."""
        return np.asarray(results)

    def settle(self) -> None:
        """Waits for all that was dispatched."""
        jax.block_until_ready(self._state)
