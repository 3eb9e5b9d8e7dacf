"""Which replica a request goes to: where it would be done soonest, as far as one knows beforehand.

Work is counted in prompt tokens. To a replica a request costs the prompt tokens that it does not hold yet;
what it has to do first is the same of the requests that it was given and that have not ended, each sequence
counted as `sequence_tokens` more for what it will draw. A request goes where the sum is least, so a long
prefix draws it to the replica that holds it, until that one is so busy that computing the prefix anew
elsewhere is sooner.

What a replica holds is what was sent there, the least recently used forgotten at the size of its pool: its
own prefix cache may have lost a page earlier, or hold generated tokens too. Wrong by either, a request is
placed less well, never answered differently. One thread at a time calls it.
"""

from __future__ import annotations

import collections
import dataclasses

from jaxserve.scheduler.prefix_cache import prompt_digests
from jaxserve.scheduler.types import Request

SEQUENCE_TOKENS = 256


@dataclasses.dataclass(slots=True)
class _Replica:
    """pages: digests of what it was sent, the least recently used first. work: prompt tokens, see above."""

    pages: collections.OrderedDict[bytes, None]
    work: int = 0
    sequences: int = 0


class Placement:
    """Places requests and hears of their ends.

    pages: of one replica's pool; what is remembered of it is no more.
    prefix_aware: False: by the work alone.
    """

    def __init__(
        self,
        replicas: int,
        *,
        pages: int,
        page_size: int,
        prefix_aware: bool = True,
        sequence_tokens: int = SEQUENCE_TOKENS,
    ) -> None:
        if replicas < 1 or pages < 1 or page_size < 1:
            raise ValueError(f"{replicas=} {pages=} {page_size=} must all be at least 1")
        self._page_size, self._most_pages = page_size, pages
        self._prefix_aware = prefix_aware
        self._sequence_tokens = sequence_tokens
        self._replicas = [_Replica(collections.OrderedDict()) for _ in range(replicas)]
        self._placed: dict[str, tuple[int, int, int]] = {}  # request id -> replica, work, sequences left

    def sequences(self, replica: int) -> int:
        """That it was given and that have not ended."""
        return self._replicas[replica].sequences

    def work(self, replica: int) -> int:
        """Of the requests that it was given and that have not ended, in prompt tokens."""
        return self._replicas[replica].work

    def replica_of(self, request_id: str) -> int | None:
        """Where a request is that has not ended."""
        return self._placed[request_id][0] if request_id in self._placed else None

    def place(self, request: Request, among: list[int] | None = None) -> int:
        """The replica for a request, among some or all; from now on the request counts there."""
        digests = prompt_digests(request, self._page_size) if self._prefix_aware else []
        length, sequences = len(request.prompt_token_ids), request.params.sequences
        choices = range(len(self._replicas)) if among is None else among

        def cost(replica: int) -> tuple[int, int, int]:
            there = self._replicas[replica]
            return there.work + length - self._held(there, digests), there.sequences, replica

        chosen = min(choices, key=cost)
        there = self._replicas[chosen]
        work = length - self._held(there, digests) + sequences * self._sequence_tokens
        there.work += work
        there.sequences += sequences
        self._placed[request.request_id] = chosen, work, sequences
        for digest in reversed(digests):  # the prompt's beginning is the last to be forgotten
            there.pages[digest] = None
            there.pages.move_to_end(digest)
        while len(there.pages) > self._most_pages:
            there.pages.popitem(last=False)
        return chosen

    def ended(self, request_id: str) -> None:
        """One of a request's sequences ended; unknown requests are ignored."""
        if request_id not in self._placed:
            return
        replica, work, left = self._placed[request_id]
        there = self._replicas[replica]
        share = work // left
        there.work -= share
        there.sequences -= 1
        if left > 1:
            self._placed[request_id] = replica, work - share, left - 1
        else:
            del self._placed[request_id]

    def _held(self, replica: _Replica, digests: list[bytes]) -> int:
        """Prompt tokens of the longest beginning that a replica was sent."""
        held = 0
        for digest in digests:
            if digest not in replica.pages:
                break
            held += 1
        return held * self._page_size
