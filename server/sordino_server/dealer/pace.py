"""When the next step is dealt: as fast as the parties go and a little faster, not all at once whenever they report.

The parties run their rounds beside a dealer that may share their processors: to deal in one go what a report allows
would hold their rounds up for as long as that takes. What lies ahead of them lasts until the next report and longer, so
there is time. Where it does not, everything is dealt at once: at the beginning, while nobody knows how fast they go,
and whenever half of what may be dealt ahead is not there.
"""

from __future__ import annotations

from typing import Final

_SPREAD: Final = 0.75  # of the time between the last two reports: the window is full when the next one comes
_SLOWEST_S: Final = 0.25  # for a step: with rounds that slow, nobody minds


class Pace:
    """Of one session; a number of steps that is `confirmed` or `dealt` counts from the run's beginning. Times are of
    one loop, passed in."""

    def __init__(self, *, first: int, ahead: int) -> None:
        self._ahead = ahead
        self._confirmed = first
        self._confirmed_s: float | None = None
        self._step_s: float | None = None
        self._due_s = 0.0

    def wait_s(self, now_s: float, *, confirmed: int, dealt: int) -> float:
        """How long until the next step is to be dealt; 0 if now."""
        if confirmed > self._confirmed:
            if self._confirmed_s is not None:
                left = max(1, confirmed + self._ahead - dealt)
                self._step_s = min(_SLOWEST_S, _SPREAD * (now_s - self._confirmed_s) / left)
            self._confirmed, self._confirmed_s, self._due_s = confirmed, now_s, now_s
        if self._step_s is None or 2 * (dealt - confirmed) < self._ahead:
            self._due_s = now_s
        return max(0.0, self._due_s - now_s)

    def dealt(self) -> None:
        """A step was."""
        self._due_s += self._step_s or 0.0
