"""Signals as a list that the loop reads: a handler may interrupt anything, so it only notes.

A second SIGTERM or SIGINT ends the process as the system would.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Sequence
from types import FrameType, TracebackType
from typing import Final, Self

from sordino_common.transport.reactor import Reactor

STOPS: Final = (signal.SIGTERM, signal.SIGINT)


class Signals:
    """While it is entered, `numbers` are noted in `arrived` and wake the reactor."""

    def __init__(self, reactor: Reactor, numbers: Sequence[signal.Signals] = STOPS) -> None:
        self._reactor = reactor
        self.arrived: list[signal.Signals] = []
        self._stops = 0
        self._before = {number: signal.signal(number, self._on_signal) for number in numbers}

    def taken(self) -> list[signal.Signals]:
        """What arrived since the last time."""
        arrived, self.arrived = self.arrived, []
        return arrived

    def restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.restore()

    def _on_signal(self, number: int, _frame: FrameType | None) -> None:
        self._stops += number in STOPS
        if self._stops > 1:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        self.arrived.append(signal.Signals(number))
        self._reactor.wake()
