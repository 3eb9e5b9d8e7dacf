"""Who comes first, and who gives way.

A rank is a tuple; the least comes first. It is given when a request comes and does not change, because
waiting raises everybody's priority by one in every `aging_seconds`: priority - waited / aging orders two
sequences as priority * aging + arrival does, at any time. So a queue is a plain heap, however long it is.

Two things take a running sequence's slot and pages away:

- *Online work that finds no slot or no pages* takes them from batch sequences.
- *Pages that run out* (admission only estimates, and may be told to over-commit) are taken from the
  lowest-ranked running sequence, of whatever tier.

Neither can lead to a deadlock. Everything that may be held is held by running sequences, and no request that
needs more than the whole pool is accepted: the highest-ranked running sequence is never a victim of the
second kind and finds all pages it wants once the others gave theirs, so that every plan takes it further.
When it ends, another is the highest. Of the first kind, each victim makes way for a sequence of a higher
rank. The batch sequence that came first counts as online once `batch_patience` seconds have passed, and is no
victim any more; after its end the next one does. So each gets done, whatever online work there is.
"""

from __future__ import annotations

from collections.abc import Iterable

from jaxserve.scheduler.types import Request, Sequence, Tier

Rank = tuple[bool, float, int]  # (batch, priority and arrival, order of arrival)


def rank_of(request: Request, order: int, aging_seconds: float) -> Rank:
    """The rank of a sequence that came as number `order`."""
    key = request.priority * aging_seconds + request.arrival_time
    return request.tier is Tier.BATCH, key, order


def promoted(rank: Rank) -> Rank:
    """The rank of a batch sequence that counts as online."""
    return False, *rank[1:]


def lowest(running: Iterable[Sequence]) -> Sequence:
    """Who gives way when pages run out."""
    return max(running, key=lambda sequence: sequence.rank)


def victims(running: Iterable[Sequence]) -> list[Sequence]:
    """Batch sequences in the order in which they give way to online ones: the lowest priority first, then the
    latest admitted, which has the least to lose."""
    batch = [sequence for sequence in running if sequence.rank[0]]
    batch.sort(key=lambda sequence: (sequence.request.priority, sequence.admitted), reverse=True)
    return batch
