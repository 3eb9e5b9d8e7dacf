"""The registry of compiled programs: (kind, bucket) -> executable.

Everything is registered with the shapes it takes, compiled ahead of time in a thread pool, and called with
those shapes alone: a compiled program cannot compile again, and asking for one that is not there is an error.
A new kind of program registers itself; nothing here knows what the kinds are.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import math
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax

Key = tuple[str, int]


@dataclasses.dataclass(frozen=True)
class Program:
    """kind: what it does; bucket: the size it takes (rows or tokens). arguments: abstract, with shardings.
    donate: positions of arguments whose buffers the outputs take over. lasting: of those that stay on the
    device between steps."""

    kind: str
    bucket: int
    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    donate: tuple[int, ...] = ()
    lasting: tuple[int, ...] = ()
    out_shardings: Any = None

    @property
    def key(self) -> Key:
        return self.kind, self.bucket

    def compile(self, options: Mapping[str, bool | int]) -> jax.stages.Compiled:
        jitted = jax.jit(self.function, donate_argnums=self.donate, out_shardings=self.out_shardings)
        return jitted.lower(*self.arguments).compile(compiler_options=dict(options))


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes on one device while a program runs. peak counts arguments, outputs and temporaries once each."""

    arguments: int
    outputs: int
    aliased: int
    temporary: int

    @property
    def peak(self) -> int:
        return self.arguments + self.outputs - self.aliased + self.temporary


class Programs:
    """compiler_options: XLA's, for each program that is not compiled yet."""

    def __init__(self) -> None:
        self.compiler_options: Mapping[str, bool | int] = {}
        self._registered: dict[Key, Program] = {}
        self._compiled: dict[Key, jax.stages.Compiled] = {}

    def register(self, program: Program) -> None:
        """Raises ValueError if its key is taken."""
        if program.key in self._registered:
            raise ValueError(f"program {program.key} is registered twice")
        self._registered[program.key] = program

    def keys(self) -> list[Key]:
        return list(self._registered)

    def buckets(self, kind: str) -> list[int]:
        """Smallest first."""
        return sorted(bucket for name, bucket in self._registered if name == kind)

    def compile(
        self,
        keys: Iterable[Key] | None = None,
        *,
        threads: int = 1,
        progress: Callable[[str], None] = lambda line: None,
    ) -> None:
        """Compiles what is not compiled yet, the slowest kinds first as registered; where one thread will
        do, in this one, with what is set for it."""
        wanted = [key for key in (self._registered if keys is None else keys) if key not in self._compiled]

        def one(key: Key) -> tuple[Key, jax.stages.Compiled, float]:
            start = time.perf_counter()
            compiled = self._registered[key].compile(self.compiler_options)
            return key, compiled, time.perf_counter() - start

        def keep(key: Key, compiled: jax.stages.Compiled, seconds: float) -> None:
            self._compiled[key] = compiled
            done, of = len(self._compiled), len(self._registered)
            progress(f"compiled program {done} of {of}: {key[0]} {key[1]} in {seconds:.1f} s")

        if threads == 1:
            for key in wanted:
                keep(*one(key))
            return
        with concurrent.futures.ThreadPoolExecutor(max_workers=threads) as pool:
            for future in concurrent.futures.as_completed([pool.submit(one, key) for key in wanted]):
                keep(*future.result())

    def __getitem__(self, key: Key) -> jax.stages.Compiled:
        """The executable. Raises KeyError, naming what there is, rather than compile."""
        try:
            return self._compiled[key]
        except KeyError:
            raise KeyError(f"program {key} was not compiled at start-up; there are {self.keys()}") from None

    def memory(self, key: Key) -> Memory:
        analysis: Any = self[key].memory_analysis()
        return Memory(
            arguments=analysis.argument_size_in_bytes,
            outputs=analysis.output_size_in_bytes,
            aliased=analysis.alias_size_in_bytes,
            temporary=analysis.temp_size_in_bytes,
        )

    def largest(self) -> list[Key]:
        """Of each kind the largest bucket: what memory has to suffice for."""
        kinds = dict.fromkeys(kind for kind, _ in self._registered)
        return [(kind, self.buckets(kind)[-1]) for kind in kinds]

    def needed(self) -> int:
        """Bytes on one device: what stays there between steps, the compiled program that takes most, and what
        the step before has not handed to the host yet."""
        lasting: dict[int, int] = {}
        working = 0
        left: dict[str, int] = {}
        for (kind, bucket), program in self._registered.items():
            if (kind, bucket) not in self._compiled:
                continue
            own = {id(program.arguments[i]): device_bytes(program.arguments[i]) for i in program.lasting}
            lasting |= own
            memory = self.memory((kind, bucket))
            working = max(working, memory.peak - sum(own.values()))
            left[kind] = max(left.get(kind, 0), memory.outputs - memory.aliased)
        return sum(lasting.values()) + working + sum(left.values())


def device_bytes(tree: Any) -> int:
    """Bytes of a tree of `jax.ShapeDtypeStruct`s with shardings, on one device."""
    leaves = jax.tree.leaves(tree)
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in leaves)


def bucket_for(buckets: list[int], size: int) -> int:
    """The smallest bucket that holds `size`. Raises ValueError if none does."""
    for bucket in buckets:
        if bucket >= size:
            return bucket
    raise ValueError(f"{size} is beyond the largest bucket {buckets[-1]}")
