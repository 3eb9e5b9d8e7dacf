"""Who owns which page of the KV pool: a reference count for each, and the pages that nobody owns.

Those are of two kinds. Blank pages wait on a stack. Idle ones still hold what the prefix cache knows them by;
they count as free, can be shared again, and are taken, least recently used first, once no blank one is left.
Pages are plain numbers here; what they hold and where they live is the engine's business.
Every call costs what its own pages cost, whatever the size of the pool.
"""

from __future__ import annotations

import collections
import itertools
from collections.abc import Callable, Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

NOBODY = -1


class OutOfPages(RuntimeError):
    """More pages were asked for than are free: an internal error, since the scheduler makes room first."""


class PageAllocator:
    """Hands out pages 0 .. num_pages-1. A page returns to the pool with its last reference.

    owners: owners are numbered 0 .. owners-1 (the scheduler's slots), and a call names one, or NOBODY while
        pages only pass through; 0 owners: nobody asks for `private`.
    private: i32[owners], the pages that would be free if this owner alone let go of its own. A page that two
        owners had and whose first one left counts for nobody until it is free, so that
        used - sum(private) pages are known to be shared, or were.
    on_evict: called with an idle page that is about to become somebody's.
    """

    def __init__(self, num_pages: int, owners: int = 0) -> None:
        if num_pages < 1:
            raise ValueError(f"{num_pages=} must be at least 1")
        self.num_pages = num_pages
        self.private = np.zeros(owners, np.int32)
        self.evictions = 0
        self.on_evict: Callable[[int], None] | None = None
        # i32[num_pages], a stack: the entries below `_blank` are blank pages, its top is handed out next
        self._stack = np.arange(num_pages - 1, -1, -1, dtype=np.int32)
        self._blank = num_pages
        self._idle: collections.OrderedDict[int, None] = collections.OrderedDict()  # the next to go first
        self._references = np.zeros(num_pages, np.int32)  # i32[num_pages], 0 for a free page
        self._home = np.full(num_pages, NOBODY, np.int32)  # i32[num_pages], the owner it counts for
        self._kept = np.zeros(num_pages, np.bool_)  # bool[num_pages], the prefix cache knows it

    @property
    def free(self) -> int:
        """Blank and idle pages."""
        return self._blank + len(self._idle)

    @property
    def idle(self) -> int:
        return len(self._idle)

    @property
    def kept(self) -> int:
        """Pages that the cache knows, idle or owned."""
        return int(np.count_nonzero(self._kept))

    @property
    def used(self) -> int:
        return self.num_pages - self.free

    def references(self, pages: Sequence[int]) -> NDArray[np.int32]:
        """i32[pages]: how many owners each has; 0 when it is free."""
        return self._references[np.asarray(pages, np.intp)]

    def freed_by(self, holdings: Iterable[Sequence[int]]) -> int:
        """How many pages would be free if the owners of these lists of pages let go of all of them."""
        held = np.fromiter(itertools.chain.from_iterable(holdings), np.intp)
        pages, owners = np.unique(held, return_counts=True)
        return int(np.count_nonzero(self._references[pages] == owners))

    def allocate(self, count: int, owners: int | NDArray[np.intp] = NOBODY) -> list[int]:
        """`count` distinct free pages, now with one reference each. Raises `OutOfPages`, taking none.

        owners: whose they are, or of each one, intp[count].
        """
        if count < 0:
            raise ValueError(f"{count=} must not be negative")
        if count > self.free:
            raise OutOfPages(f"{count} pages asked for, {self.free} of {self.num_pages} are free")
        while self._blank < count:
            self._evict()
        taken = self._stack[self._blank - count : self._blank][::-1]
        self._references[taken] = 1
        self._home[taken] = owners
        if not len(self.private) or (isinstance(owners, int) and owners == NOBODY):
            pass
        elif isinstance(owners, int):
            self.private[owners] += count
        else:
            np.add.at(self.private, owners, 1)
        self._blank -= count
        pages: list[int] = taken.tolist()
        return pages

    def _evict(self) -> None:
        page, _ = self._idle.popitem(last=False)
        self._kept[page] = False
        self._stack[self._blank] = page
        self._blank += 1
        self.evictions += 1
        if self.on_evict is not None:
            self.on_evict(page)

    def share(self, pages: Sequence[int], owner: int = NOBODY) -> None:
        """One more owner for each of these distinct pages, which must be owned or idle."""
        if not pages:
            return
        shared = self._distinct(pages)
        before = self._references[shared]
        if not ((before > 0) | self._kept[shared]).all():
            raise ValueError(f"a page has no owner and is not kept: {list(pages)}")
        self._references[shared] = before + 1
        revived = shared[before == 0]
        for page in revived.tolist():
            del self._idle[page]
        self._home[revived] = owner
        if len(self.private):
            if owner != NOBODY:
                self.private[owner] += len(revived)
            self._count(self._home[shared[before == 1]], -1)

    def release(self, pages: Sequence[int], owner: int = NOBODY) -> None:
        """One owner less for each of these distinct pages; those without an owner are free again.

        Of those that the cache knows, the first in `pages` will be the first to be taken.
        """
        owned = self._distinct(pages)
        left = self._references[owned] - 1
        if (left < 0).any():
            raise ValueError(f"a page has no owner: {list(pages)}")
        self._references[owned] = left
        freed = owned[left == 0]
        if len(self.private):
            self._count(self._home[freed], -1)
            self._home[owned[self._home[owned] == owner]] = NOBODY
            self._count(self._home[owned[left == 1]], 1)
        idle = freed[self._kept[freed]]
        self._idle.update(dict.fromkeys(idle.tolist()))
        blank = freed if not len(idle) else freed[~self._kept[freed]]
        self._stack[self._blank : self._blank + len(blank)] = blank
        self._blank += len(blank)

    def _count(self, homes: NDArray[np.int32], change: int) -> None:
        """Adds to `private` for each home that is somebody's."""
        if len(homes):
            np.add.at(self.private, homes[homes != NOBODY], change)

    def keep(self, page: int) -> None:
        """The cache knows this page, which somebody owns: without an owner it will be idle, not blank."""
        if self._references[page] < 1:
            raise ValueError(f"{page=} has no owner: it may hold anything")
        self._kept[page] = True

    def drop(self, page: int) -> None:
        """The cache forgets this page."""
        self._kept[page] = False
        if page in self._idle:
            del self._idle[page]
            self._stack[self._blank] = page
            self._blank += 1

    def _distinct(self, pages: Sequence[int]) -> NDArray[np.int32]:
        """The pages as i32[pages]. Raises ValueError if one is repeated or unknown."""
        if len(set(pages)) != len(pages):  # a repeated index would be counted once
            raise ValueError(f"a page is named twice: {list(pages)}")
        if pages and (min(pages) < 0 or max(pages) >= self.num_pages):
            raise ValueError(f"pages lie in [0, {self.num_pages - 1}]: {list(pages)}")
        return np.asarray(pages, np.int32)

    def check_invariants(self) -> None:
        """Raises AssertionError unless each page is blank, idle or owned, and is counted as such."""
        blank = self._stack[: self._blank]
        idle = np.fromiter(self._idle, np.int32, len(self._idle))
        free = np.concatenate([blank, idle])
        require(len(np.unique(free)) == self.free, "a page is free twice")
        require(not self._references[free].any(), "a free page has an owner")
        require(bool((self._references >= 0).all()), "a page has a negative reference count")
        owned = int(np.count_nonzero(self._references))
        require(owned == self.used, f"{owned} pages have an owner, {self.used} are not free")
        require(bool(self._kept[idle].all()), "an idle page is not kept")
        require(not self._kept[blank].any(), "a blank page is kept")
        if len(self.private):
            alone = (self._references == 1) & (self._home != NOBODY)
            counts = np.bincount(self._home[alone], minlength=len(self.private))
            require(counts.tolist() == self.private.tolist(), "private pages are miscounted")


def require(condition: bool, what: str) -> None:
    """Raises AssertionError with `what` unless the condition holds, also under `python -O`."""
    if not condition:
        raise AssertionError(what)
