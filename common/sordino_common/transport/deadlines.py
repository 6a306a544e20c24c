"""Many deadlines, most of which move or are lifted before they pass: a heap with lazy deletion, bounded."""

from __future__ import annotations

import heapq
import itertools
import math
from typing import Generic, TypeVar

T = TypeVar("T")

_SLACK = 64  # a heap this small is not worth tidying


class Deadlines(Generic[T]):
    """At most one deadline per item (hashed). O(log n) each; an item whose deadline is lifted is not held any more."""

    __slots__ = ("_due", "_heap", "_items", "_order")

    def __init__(self) -> None:
        self._due: dict[T, tuple[float, int]] = {}
        self._items: dict[int, T] = {}
        self._heap: list[tuple[float, int]] = []  # (when, order): no items, which may be large
        self._order = itertools.count()

    def __len__(self) -> int:
        """How many entries are kept, lifted ones included."""
        return len(self._heap)

    def set(self, item: T, due_s: float) -> None:
        """The item's deadline is now `due_s`; infinity lifts it."""
        known = self._due.get(item)
        if known is not None:
            if known[0] == due_s:
                return
            self.lift(item)
        if due_s == math.inf:
            return
        entry = (due_s, next(self._order))
        self._due[item] = entry
        self._items[entry[1]] = item
        if len(self._heap) > _SLACK + 4 * len(self._due):
            self._heap = list(self._due.values())
            heapq.heapify(self._heap)
        else:
            heapq.heappush(self._heap, entry)

    def get(self, item: T) -> float:
        """The item's deadline; infinity if it has none."""
        return self._due.get(item, (math.inf, 0))[0]

    def lift(self, item: T) -> None:
        known = self._due.pop(item, None)
        if known is not None:
            del self._items[known[1]]

    def next_s(self) -> float:
        """The earliest deadline; infinity if there is none."""
        while self._heap and self._heap[0][1] not in self._items:
            heapq.heappop(self._heap)
        return self._heap[0][0] if self._heap else math.inf

    def pop(self, now_s: float) -> list[T]:
        """The items whose deadline has come, in its order; they have none any more."""
        passed: list[T] = []
        while self.next_s() <= now_s:
            item = self._items[self._heap[0][1]]
            self.lift(item)
            passed.append(item)
        return passed
