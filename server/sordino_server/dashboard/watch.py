"""The dashboard as a service: ready, and alive, when both of its loops turn: the one that accepts, the one that looks.

The accepting loop calls `turn`; that knocks at the collecting thread, and a later turn, when it was heard there, tells
the service manager. So a thread that hangs on a disk, or has died, starves the watchdog, and so does a stuck loop.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final, Protocol

from sordino_common.daemon.notify import Notifier


class Knocked(Protocol):
    """A thread that can be asked whether it turns (`Collector`)."""

    def knock(self) -> None: ...

    @property
    def heard(self) -> bool: ...


class Watch:
    """Tells `notifier` of a dashboard at `url`. One thread's: the accepting loop's."""

    def __init__(
        self, notifier: Notifier, collector: Knocked, *, url: str, now_s: Callable[[], float] = time.monotonic
    ) -> None:
        self._notifier = notifier
        self._collector = collector
        self._url = url
        self._now_s = now_s
        self._interval_s: Final = None if notifier.watchdog_s is None else notifier.watchdog_s / 2
        self._due_s = now_s()
        self._asked = self._ready = False

    def turn(self) -> None:
        """Between connections. Sends what is due."""
        if self._now_s() < self._due_s:
            return
        if not self._asked:
            self._asked = True
            self._collector.knock()
            return
        if not self._collector.heard:
            return
        self._asked = False
        if not self._ready:
            self._ready = True
            self._notifier.ready()
            self._notifier.status(self._url)
        if self._interval_s is None:
            self._due_s = float("inf")
            return
        self._notifier.alive()
        self._due_s = self._now_s() + self._interval_s
