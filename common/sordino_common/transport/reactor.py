"""Real time: one thread that waits for sockets, pipes and timers, and calls back. A `Loop` on `selectors`.

Callbacks run one after the other, and what one of them raises leaves `run_once` or `run_until`: nothing is swallowed.
The reactor stays usable: the remaining callbacks of that round run in the next one (timers keep their place, sockets
that are still ready are reported again).

A signal handler of Python runs between two instructions, but a wait that it interrupts goes on (PEP 475). So a handler
that wants to be heard calls `wake`, or gives `wakeup_fd` to `signal.set_wakeup_fd`.
"""

from __future__ import annotations

import contextlib
import heapq
import os
import selectors
import time
from collections.abc import Callable
from types import TracebackType
from typing import Final, Protocol, Self

import msgspec

from sordino_common.errors import LocalError

READ: Final = selectors.EVENT_READ
WRITE: Final = selectors.EVENT_WRITE

_LONGEST_WAIT_S: Final = 3600.0  # epoll's timeout is a 32-bit number of milliseconds
_COMPACT_ABOVE: Final = 64  # a heap smaller than this may hold any number of cancelled timers


class HasFileno(Protocol):
    """A socket, a pipe's end, or a wrapper of one."""

    def fileno(self) -> int: ...


class _Timer(msgspec.Struct, eq=False):  # a struct is made without a call of Python, and every turn makes some
    callback: Callable[[], None] | None
    reactor: Reactor

    def cancel(self) -> None:
        if self.callback is not None:
            self.callback = None
            reactor = self.reactor
            reactor._cancelled += 1
            # Most timers are set far ahead and cancelled: the heap must not keep them.
            if 2 * reactor._cancelled > len(reactor._heap) > _COMPACT_ABOVE:
                reactor._compact()


class _Watch:
    __slots__ = ("callback", "live")

    def __init__(self, callback: Callable[[int], None]) -> None:
        self.callback = callback
        self.live = True


class Reactor:
    """A `Loop` in real time. Not for several threads: only `wake` may be called from elsewhere."""

    def __init__(self) -> None:
        self._selector = selectors.DefaultSelector()
        self._order = 0  # of timers, as they were set
        self._heap: list[tuple[float, int, _Timer]] = []
        self._cancelled = 0
        self._wake_read, self._wake_write = os.pipe()
        for end in (self._wake_read, self._wake_write):
            os.set_blocking(end, False)
        self._selector.register(self._wake_read, READ, _Watch(self._woken))

    @property
    def wakeup_fd(self) -> int:
        """For `signal.set_wakeup_fd(..., warn_on_full_buffer=False)`: a byte written here ends the wait."""
        return self._wake_write

    # Asked several times a packet: the functions themselves, with none of Python's around them.
    now_s = staticmethod(time.monotonic)
    wall_s = staticmethod(time.time)

    def call_at(self, when_s: float, callback: Callable[[], None]) -> _Timer:
        if when_s != when_s:  # NaN would break the heap's order silently
            raise LocalError("call_at: the time is NaN")
        timer = _Timer(callback, self)
        # A time in the past counts as now, or a callback that asks for it again and again would starve the others.
        now_s = time.monotonic()
        self._order += 1
        heapq.heappush(self._heap, (when_s if when_s > now_s else now_s, self._order, timer))
        return timer

    def register(self, fileobj: HasFileno | int, events: int, callback: Callable[[int], None]) -> None:
        """Call `callback(ready)` whenever `fileobj` is ready for some of `events` (READ | WRITE); level-triggered.

        Raises `LocalError` if it is registered already, or closed."""
        try:
            self._selector.register(fileobj, events, _Watch(callback))
        except (KeyError, ValueError) as error:
            raise LocalError(f"Reactor.register: {error}") from None

    def modify(self, fileobj: HasFileno | int, events: int) -> None:
        """Wait for other `events` on `fileobj`. Raises `LocalError` if it is not registered."""
        try:
            self._selector.modify(fileobj, events, self._selector.get_key(fileobj).data)
        except (KeyError, ValueError) as error:
            raise LocalError(f"Reactor.modify: not registered: {error}") from None

    def unregister(self, fileobj: HasFileno | int) -> None:
        """No more calls for `fileobj`, not even those due in this round. To be called before it is closed."""
        try:
            key = self._selector.unregister(fileobj)
        except (KeyError, ValueError) as error:
            raise LocalError(f"Reactor.unregister: not registered: {error}") from None
        key.data.live = False

    def wake(self) -> None:
        """End the wait that is on, or the next one. Safe in a signal handler and from another thread."""
        with contextlib.suppress(BlockingIOError):  # a full pipe wakes as well
            os.write(self._wake_write, b"\0")

    def run_once(self, timeout_s: float | None = None) -> None:
        """Wait until something is due, `timeout_s` at most (None: as long as it takes), and run what is due."""
        wait_s = _LONGEST_WAIT_S if timeout_s is None else min(max(0.0, timeout_s), _LONGEST_WAIT_S)
        heap = self._heap
        while heap and heap[0][2].callback is None:  # cancelled: nothing to wake up for
            heapq.heappop(heap)
            self._cancelled -= 1
        if heap:
            wait_s = min(wait_s, max(0.0, heap[0][0] - time.monotonic()))
        for key, ready in self._selector.select(wait_s):
            watch: _Watch = key.data
            if watch.live:  # an earlier callback of this round may have unregistered it
                watch.callback(ready)
        # Timers set by these callbacks for "now" wait for the next round, so that sockets get their turn.
        now_s, newest = time.monotonic(), self._order
        while heap and heap[0][0] <= now_s and heap[0][1] <= newest:
            _, _, timer = heapq.heappop(heap)
            callback, timer.callback = timer.callback, None
            if callback is None:
                self._cancelled -= 1
            else:
                callback()

    def run_until(self, done: Callable[[], bool], *, deadline_s: float) -> bool:
        """Run until `done()`, or until `now_s() >= deadline_s` (absolute; `math.inf` for never). Returns `done()`."""
        while not done():
            left_s = deadline_s - time.monotonic()
            if left_s <= 0:
                return done()
            self.run_once(left_s)
        return True

    def breathe(self) -> None:
        """Run what is due now; wait for nothing. For who computes for long between two waits."""
        self.run_once(0.0)

    def close(self) -> None:
        """Free the reactor's own descriptors. What was registered stays open: it belongs to others."""
        self._selector.close()
        for end in (self._wake_read, self._wake_write):
            with contextlib.suppress(OSError):
                os.close(end)
        self._heap.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _woken(self, _ready: int) -> None:
        with contextlib.suppress(BlockingIOError):
            while len(os.read(self._wake_read, 4096)) == 4096:
                pass

    def _compact(self) -> None:
        self._heap[:] = [entry for entry in self._heap if entry[2].callback is not None]  # `run_once` holds the list
        heapq.heapify(self._heap)
        self._cancelled = 0
