"""What programs run on: parameters, the state that they take and give back, and their executables.

The engine packs a plan into one array per program and has it run here, so that a plan can be run elsewhere
too: `follower.py` runs the same arrays, in the same order, in the other processes of a group.
"""

from __future__ import annotations

import jax
import numpy as np
from numpy.typing import NDArray

from jaxserve.engine.programs import Key, Programs
from jaxserve.engine.state import EngineState
from jaxserve.models.decoder import Params


class Runner:
    """programs: compiled. params, state: on the devices; the state is given away."""

    def __init__(self, programs: Programs, params: Params, state: EngineState) -> None:
        self.programs = programs
        self._params = params
        self._state = state
        self._hidden: jax.Array | None = None  # of the prefill that ran last, until something else runs

    def run(self, key: Key, packed: NDArray[np.int32]) -> jax.Array | None:
        """Dispatches a program on `packed` (see `batch`). Its results, i32[.., RESULT_WIDTH], if it has any.

        Raises KeyError for a program that is not there, and what the device raises.
        """
        program, hidden, self._hidden = self.programs[key], self._hidden, None
        results: jax.Array | None = None
        match key[0]:
            case "edit_slot":
                self._state = program(self._state, packed)
            case "prefill":
                self._state, results, self._hidden = program(self._params, self._state, packed)
            case "prompt_logprobs":  # of the prefill just before
                results = program(self._params, hidden, packed)
            case "decode":
                self._state, results = program(self._params, self._state, packed)
            case kind:
                raise KeyError(f"nobody has said what the program {kind!r} takes and gives")
        return results

    def read(self, results: jax.Array) -> NDArray[np.int32]:
        """Waits for results."""
        return np.asarray(results)

    def settle(self) -> None:
        """Waits for all that was dispatched."""
        jax.block_until_ready(self._state)
