"""A priority queue whose items can leave from its middle."""

from __future__ import annotations

import heapq
from collections.abc import Hashable, Iterator
from typing import Any


class RemovableHeap[Item: Hashable]:
    """Items by ascending key, then in the order they came; every call costs O(log items), spread over calls.

    An item that leaves from the middle stays behind in the heap as a husk. Husks are swept when they are the
    majority, so that a long queue of requests that come and go does not grow.
    """

    def __init__(self) -> None:
        self._heap: list[tuple[Any, int, Item]] = []
        self._tickets: dict[Item, int] = {}  # an entry with another ticket is a husk
        self._next_ticket = 0

    def __len__(self) -> int:
        return len(self._tickets)

    def __iter__(self) -> Iterator[Item]:
        """In no particular order."""
        return iter(self._tickets)

    def __contains__(self, item: object) -> bool:
        return item in self._tickets

    def push(self, key: Any, item: Item) -> None:
        """Queues an item that is not in the queue."""
        self._next_ticket += 1
        self._tickets[item] = self._next_ticket
        heapq.heappush(self._heap, (key, self._next_ticket, item))

    def remove(self, item: Item) -> None:
        """Takes the item out; does nothing if it is not there."""
        if self._tickets.pop(item, None) is not None and len(self._heap) > 2 * len(self._tickets) + 64:
            self._heap = [entry for entry in self._heap if self._tickets.get(entry[2]) == entry[1]]
            heapq.heapify(self._heap)

    def first(self) -> tuple[Any, Item] | None:
        """The least key and its item, which stays."""
        while self._heap:
            key, ticket, item = self._heap[0]
            if self._tickets.get(item) == ticket:
                return key, item
            heapq.heappop(self._heap)
        return None
