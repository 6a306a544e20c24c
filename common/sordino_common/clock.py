"""Time as something that is passed in: a `Loop` says what time it is and calls back later.

State machines take `now_s` (seconds on a monotonic clock) as an argument. The few objects that must wait hold a
`Loop`. There are two: `VirtualLoop` here, whose time jumps from one callback to the next (tests, simulator), and
`sordino_common.transport.reactor.Reactor`, which waits for sockets and the system's clock.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable
from typing import Final, Protocol

from sordino_common.errors import LocalError

_COMPACT_ABOVE: Final = 64  # a heap smaller than this may hold any number of cancelled timers


class Timer(Protocol):
    """A callback that was asked for with `Loop.call_at`. Cancelling twice, or after it ran, does nothing."""

    def cancel(self) -> None: ...


class Loop(Protocol):
    """One thread of callbacks in order of time; callbacks due at the same instant run in the order asked for."""

    def now_s(self) -> float:
        """Seconds on a clock that never goes back. Its zero means nothing."""
        ...

    def wall_s(self) -> float:
        """Seconds since 1970-01-01 UTC, for expiry dates and records only: it may jump."""
        ...

    def call_at(self, when_s: float, callback: Callable[[], None]) -> Timer:
        """Call `callback` once `now_s() >= when_s`; a time in the past means as soon as possible."""
        ...


class _VirtualTimer:
    __slots__ = ("_loop", "callback")

    def __init__(self, callback: Callable[[], None], loop: VirtualLoop) -> None:
        self.callback: Callable[[], None] | None = callback
        self._loop = loop

    def cancel(self) -> None:
        if self.callback is not None:
            self.callback = None
            self._loop._cancelled_one()


class VirtualLoop:
    """A `Loop` whose time is virtual: `step` jumps to the next callback and runs it. Deterministic."""

    def __init__(self, *, start_s: float = 0.0, wall_start_s: float = 1_700_000_000.0) -> None:
        self._now_s = start_s
        self._wall_offset_s = wall_start_s - start_s
        self._order = itertools.count()
        self._heap: list[tuple[float, int, _VirtualTimer]] = []
        self._cancelled = 0

    def now_s(self) -> float:
        return self._now_s

    def wall_s(self) -> float:
        return self._now_s + self._wall_offset_s

    def call_at(self, when_s: float, callback: Callable[[], None]) -> Timer:
        if when_s != when_s:  # NaN would break the heap's order silently
            raise LocalError("call_at: the time is NaN")
        timer = _VirtualTimer(callback, self)
        heapq.heappush(self._heap, (max(when_s, self._now_s), next(self._order), timer))
        return timer

    def step(self) -> bool:
        """Run the next callback. Returns False, and does nothing, when none is left."""
        while self._heap:
            when_s, _, timer = heapq.heappop(self._heap)
            if timer.callback is None:
                self._cancelled -= 1
                continue
            self._now_s = when_s
            callback, timer.callback = timer.callback, None
            callback()
            return True
        return False

    def run_until(self, done: Callable[[], bool], *, deadline_s: float) -> bool:
        """Step until `done()` or until virtual time would pass `deadline_s` (absolute). Returns `done()`."""
        while not done():
            upcoming = self._peek_s()
            if upcoming is None or upcoming > deadline_s:
                self._now_s = max(self._now_s, deadline_s)
                return done()
            self.step()
        return True

    def breathe(self) -> None:
        """As `Reactor.breathe`: nothing, since no time passes here while somebody computes."""

    def advance(self, seconds: float) -> None:
        """Run everything that is due within the next `seconds`, then stand at exactly that time."""
        end_s = self._now_s + seconds
        self.run_until(lambda: False, deadline_s=end_s)

    def _cancelled_one(self) -> None:
        """Deadlines are set far ahead and nearly always cancelled: in virtual time they would never be reached."""
        self._cancelled += 1
        if len(self._heap) > _COMPACT_ABOVE and 2 * self._cancelled > len(self._heap):
            self._heap = [entry for entry in self._heap if entry[2].callback is not None]
            heapq.heapify(self._heap)
            self._cancelled = 0

    def _peek_s(self) -> float | None:
        while self._heap and self._heap[0][2].callback is None:
            heapq.heappop(self._heap)
            self._cancelled -= 1
        return self._heap[0][0] if self._heap else None
