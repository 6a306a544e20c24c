"""A loop that a simulated device lives on, and that can be stopped dead.

When power fails, a device does not clean up: its timers simply never fire again. Whatever was given a `MortalLoop`
stops at `kill()` without its own doing, as a killed process does; the real loop goes on for everybody else.

A device also has a clock on the wall of its own: it may be wrong, and be set while the device runs.
"""

from __future__ import annotations

from collections.abc import Callable

from sordino_common.clock import Loop, Timer


class _Never:
    """The timer of the dead."""

    __slots__ = ()

    def cancel(self) -> None:
        """Nothing to cancel."""


_NEVER = _Never()


class MortalLoop:
    """`Loop` on top of another one, until `kill`."""

    __slots__ = ("_loop", "alive", "wall_offset_s")

    def __init__(self, loop: Loop, *, wall_offset_s: float = 0.0) -> None:
        self._loop = loop
        self.alive = True
        self.wall_offset_s = wall_offset_s  # of this device's clock from the true time

    def kill(self) -> None:
        """Nothing that was asked for here runs any more."""
        self.alive = False

    def now_s(self) -> float:
        return self._loop.now_s()

    def wall_s(self) -> float:
        return self._loop.wall_s() + self.wall_offset_s

    def call_at(self, when_s: float, callback: Callable[[], None]) -> Timer:
        if not self.alive:
            return _NEVER

        def if_alive() -> None:
            if self.alive:
                callback()

        return self._loop.call_at(when_s, if_alive)
