"""Who owns which page of the KV pool: a stack of free pages and a reference count for each.

Pages are plain numbers here; what they hold and where they live is the engine's business.
Every call costs what its own pages cost, whatever the size of the pool.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


class OutOfPages(RuntimeError):
    """More pages were asked for than are free. Admission promises pages, so this is an internal error."""


class PageAllocator:
    """Hands out pages 0 .. num_pages-1. A page returns to the pool with its last reference."""

    def __init__(self, num_pages: int) -> None:
        if num_pages < 1:
            raise ValueError(f"{num_pages=} must be at least 1")
        self.num_pages = num_pages
        # i32[num_pages], a stack: the entries below `free` are the free pages, its top is handed out next
        self._stack = np.arange(num_pages - 1, -1, -1, dtype=np.int32)
        self._references = np.zeros(num_pages, np.int32)  # i32[num_pages], 0 for a free page
        self._free = num_pages

    @property
    def free(self) -> int:
        return self._free

    @property
    def used(self) -> int:
        return self.num_pages - self._free

    def references(self, page: int) -> int:
        """How many owners the page has; 0 when it is free."""
        return int(self._references[page])

    def allocate(self, count: int) -> list[int]:
        """`count` distinct free pages, now with one reference each. Raises `OutOfPages`, taking none."""
        if count < 0:
            raise ValueError(f"{count=} must not be negative")
        if count > self._free:
            raise OutOfPages(f"{count} pages asked for, {self._free} of {self.num_pages} are free")
        taken = self._stack[self._free - count : self._free][::-1]
        self._references[taken] = 1
        self._free -= count
        pages: list[int] = taken.tolist()
        return pages

    def share(self, pages: Sequence[int]) -> None:
        """One more owner for each of these distinct pages, which must have one already."""
        self._references[self._owned(pages)] += 1

    def release(self, pages: Sequence[int]) -> None:
        """One owner less for each of these distinct pages; those without an owner are free again."""
        owned = self._owned(pages)
        left = self._references[owned] - 1
        self._references[owned] = left
        freed = owned[left == 0]
        self._stack[self._free : self._free + len(freed)] = freed
        self._free += len(freed)

    def _owned(self, pages: Sequence[int]) -> NDArray[np.int32]:
        """The pages as i32[pages]. Raises ValueError if one is repeated, unknown or without an owner."""
        if len(set(pages)) != len(pages):  # a repeated index would be counted once below
            raise ValueError(f"a page is named twice: {list(pages)}")
        if pages and (min(pages) < 0 or max(pages) >= self.num_pages):
            raise ValueError(f"pages lie in [0, {self.num_pages - 1}]: {list(pages)}")
        owned = np.asarray(pages, np.int32)
        if not (self._references[owned] > 0).all():
            raise ValueError(f"a page has no owner: {list(pages)}")
        return owned

    def check_invariants(self) -> None:
        """Raises AssertionError unless the free stack holds exactly the pages without an owner, once each."""
        free = self._stack[: self._free]
        require(len(np.unique(free)) == self._free, "the free stack holds a page twice")
        require(not self._references[free].any(), "a free page has an owner")
        require(bool((self._references >= 0).all()), "a page has a negative reference count")
        owned = int(np.count_nonzero(self._references))
        require(owned == self.used, f"{owned} pages have an owner, {self.used} are not free")


def require(condition: bool, what: str) -> None:
    """Raises AssertionError with `what` unless the condition holds, also under `python -O`."""
    if not condition:
        raise AssertionError(what)
