"""What a sequence shares with others through the prefix cache, and what others will share with it.

Requests of the same salt share the pages of equal beginnings; the siblings of one request always share the
prompt's, in a namespace of their own where the requests do not. Digests are made once, when somebody asks.
Pages become known after the plan that computes them was made, so that who reads them comes in a later plan.
"""

from __future__ import annotations

import dataclasses

from jaxserve.scheduler.prefix_cache import PrefixCache, extend_digests, root_digest, shared_root
from jaxserve.scheduler.types import Pooling, Request, Sequence


@dataclasses.dataclass(slots=True)
class _Family:
    """A live request's sequences.

    root: what the digests of its pages begin with; None: its pages are nobody's to share.
    private: nobody else can match its pages, so they are forgotten when it ends.
    prompt: digests of the prompt's whole pages, once somebody asked.
    """

    root: bytes | None
    private: bool
    prompt: list[bytes] | None = None


class Sharing:
    """The prefix cache as sequences use it. See `Scheduler` for the arguments."""

    def __init__(
        self, cache: PrefixCache, *, page_size: int, prefix_cache: bool, cache_generated: bool
    ) -> None:
        self._cache = cache
        self._page_size = page_size
        self._prefix_cache = prefix_cache
        self._cache_generated = cache_generated
        self._families: dict[str, _Family] = {}  # by request id
        # (page, digest) of the first unknown page that each prefill row of the plan being made computes
        self._computing: list[tuple[int, bytes]] = []

    def enter(self, request: Request, number: int) -> None:
        """A request came. number: no other request's."""
        root = None
        if self._prefix_cache:
            root = shared_root(request)
        elif request.params.sequences > 1:
            root = root_digest(b"request" + number.to_bytes(8))
        self._families[request.request_id] = _Family(root, private=not self._prefix_cache)

    def leave(self, request_id: str) -> None:
        """All of its sequences have ended."""
        family = self._families.pop(request_id)
        for digest in family.prompt or () if family.private else ():
            self._cache.forget(digest)

    def matchable(self, sequence: Sequence) -> int:
        """Pages that it may take from the cache: not all, because one token at least must be computed, and
        none while it wants its prompt's logprobs or their mean, because these come from computing it."""
        digests = self._digests(sequence)
        if digests is None or wants_scores(sequence) or sequence.request.pooling is Pooling.MEAN:
            return 0
        return min((sequence.prefill_len - 1) // self._page_size, len(digests))

    def match(self, sequence: Sequence) -> list[int]:
        """The pages that the cache has for it."""
        most = self.matchable(sequence)
        return self._cache.match(sequence.digests or (), most)

    def new_plan(self) -> None:
        """Nothing is computed in it yet."""
        self._computing = []

    def will_compute(self, sequence: Sequence, end: int) -> None:
        """The plan being made computes the sequence's tokens from `sequence.computed` to `end`."""
        digests = sequence.digests or ()
        for page in range(
            sequence.computed // self._page_size, min(-(-end // self._page_size), len(digests))
        ):
            if digests[page] not in self._cache:
                self._computing.append((page, digests[page]))
                break

    def should_wait(self, sequence: Sequence) -> bool:
        """Whether another one computes the first page that the cache lacks for it in the plan being made."""
        most = self.matchable(sequence)
        digests = sequence.digests or ()
        return any(page < most and digests[page] == digest for page, digest in self._computing)

    def register(self, sequence: Sequence, length: int) -> None:
        """The first `length` tokens of a sequence were computed: their whole pages become known."""
        self._extend_digests(sequence, length)
        digests = sequence.digests or ()
        whole = min(length // self._page_size, len(digests))
        for page in range(sequence.known, whole):
            self._cache.add(digests[page], sequence.pages[page])
        sequence.known = max(sequence.known, whole)

    def _digests(self, sequence: Sequence) -> list[bytes] | None:
        """Of the whole pages that prefill computes for it; None if it shares nothing.

        A prompt's are made once for all of its sequences, and the longer list that one of them may come to
        need is its own.
        """
        family = self._families[sequence.request.request_id]
        if family.root is None:
            return None
        if family.prompt is None:
            family.prompt = []
            extend_digests(family.prompt, family.root, sequence.request.prompt_token_ids, self._page_size)
        if sequence.digests is None:
            sequence.digests = family.prompt
        self._extend_digests(sequence, sequence.prefill_len)
        return sequence.digests

    def _extend_digests(self, sequence: Sequence, length: int) -> None:
        """Makes the digests of the whole pages among its first `length` tokens, generated ones included."""
        family = self._families[sequence.request.request_id]
        digests = sequence.digests
        if digests is None or family.root is None or family.private or not self._cache_generated:
            return
        if length // self._page_size > len(digests):
            if digests is family.prompt:
                digests = sequence.digests = list(digests)
            tokens = sequence.tokens(len(digests) * self._page_size, length)
            extend_digests(digests, family.root, tokens, self._page_size)


def wants_scores(sequence: Sequence) -> bool:
    """Whether its prompt's logprobs are wanted, which its siblings' would be the same as. If it is preempted
    before it has them all, it computes them all again."""
    wanted = sequence.request.params.prompt_logprobs is not None and sequence.index == 0
    return wanted and not sequence.scored
