"""Which pages already hold the keys and values of a prompt's beginning.

A page is known by a digest of all tokens from the prompt's start to the page's end: each page's digest is of
the one before it and of its own tokens, so that a lookup costs what the prompt costs, never what the pool
costs. Only whole pages are known, and a page that is known is never written again: who matches it starts
computing on a page of its own. 16 bytes of BLAKE2b make an accidental collision unthinkable and a sought one
as hard as 2**64 hashes; the first digest is of the salt, which keeps apart who must not share.

Does not know about sequences, slots or plans; of a request it reads the prompt.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from jaxserve.scheduler.pages import PageAllocator, require
from jaxserve.scheduler.types import Request

DIGEST_BYTES = 16


def root_digest(salt: bytes) -> bytes:
    """What the first page's digest is made with."""
    return hashlib.blake2b(salt, digest_size=DIGEST_BYTES, person=b"jaxserve salt").digest()


def extend_digests(digests: list[bytes], root: bytes, tokens: NDArray[np.int32], page_size: int) -> None:
    """Appends the digests of the whole pages in `tokens`, which follow the pages that `digests` has."""
    data = memoryview(np.ascontiguousarray(tokens, "<i4").tobytes())
    width = 4 * page_size
    parent = digests[-1] if digests else root
    for start in range(0, len(data) - width + 1, width):
        parent = hashlib.blake2b(parent + data[start : start + width], digest_size=DIGEST_BYTES).digest()
        digests.append(parent)


def shared_root(request: Request) -> bytes:
    """What the digests of a request's pages begin with where requests share pages."""
    return root_digest(b"shared" + request.salt)


def prompt_digests(request: Request, page_size: int) -> list[bytes]:
    """Of the whole pages of its prompt that it may take from a cache: one token at least is computed."""
    digests: list[bytes] = []
    extend_digests(digests, shared_root(request), request.prompt_token_ids[:-1], page_size)
    return digests


class PrefixCache:
    """Digest -> page, for pages that are owned or idle; the allocator says when an idle one is taken."""

    def __init__(self, pages: PageAllocator) -> None:
        self._allocator = pages
        self._pages: dict[bytes, int] = {}
        self._digests: dict[int, bytes] = {}
        pages.on_evict = self._evicted

    def __contains__(self, digest: bytes) -> bool:
        return digest in self._pages

    def __len__(self) -> int:
        return len(self._pages)

    def match(self, digests: Sequence[bytes], most: int) -> list[int]:
        """The pages of the longest known beginning, at most `most` of them. Takes no reference."""
        pages = []
        for digest in digests[:most]:
            page = self._pages.get(digest)
            if page is None:
                break
            pages.append(page)
        return pages

    def adopt(self, digests: Sequence[bytes], first: int) -> list[tuple[int, int]]:
        """Idle pages for those of digests[first:] that are not known, as far as there are free ones:
        (index of the digest, page). They are known from now on; the caller has them written at once.

        None where a page before the first is not known: nobody could come upon these.
        """
        if len(self.match(digests, first)) < first:
            return []
        known = [self._pages[digest] for digest in digests if digest in self._pages]
        self._allocator.share(known)  # or they might make room for what follows them
        lacking = [i for i, digest in enumerate(digests) if digest not in self._pages]
        pages = self._allocator.allocate(min(len(lacking), self._allocator.free))
        adopted = list(zip(lacking, pages, strict=False))
        for i, page in adopted:
            self.add(digests[i], page)
        in_order = [self._pages[digest] for digest in digests if digest in self._pages]
        self._allocator.release(in_order[::-1])  # the beginning's first pages are the last to be taken
        return adopted

    def add(self, digest: bytes, page: int) -> None:
        """From now on this page, which somebody owns, is known; unless another with the same content is."""
        if digest not in self._pages and page not in self._digests:
            self._pages[digest] = page
            self._digests[page] = digest
            self._allocator.keep(page)

    def forget(self, digest: bytes) -> None:
        page = self._pages.pop(digest, None)
        if page is not None:
            del self._digests[page]
            self._allocator.drop(page)

    def _evicted(self, page: int) -> None:
        del self._pages[self._digests.pop(page)]

    def check_invariants(self) -> None:
        """Raises AssertionError unless digests and pages are one to one. For tests: slow."""
        inverse = {page: digest for digest, page in self._pages.items()}
        require(inverse == self._digests, "digests and pages do not agree")
        require(len(self._pages) == self._allocator.kept, "kept pages are not the known ones")
