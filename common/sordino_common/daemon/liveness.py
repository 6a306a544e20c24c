"""The watchdog's food: given only while the loop turns and everything that the daemon stands on is sane.

Every half of the watchdog's time a byte is put into a pipe. When the loop reports the pipe as readable, both its timers
and its waiting for files have been proved; then the probes are asked, and only if none has a complaint the watchdog is
fed. A loop that is stuck in a callback, or whose selector has died, feeds nothing; so does a daemon whose journal is
gone. What a restart can't mend (a broker that is away, a full disk) is no business of a probe.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable, Mapping
from typing import Final

from sordino_common.clock import Timer
from sordino_common.daemon.notify import Notifier
from sordino_common.transport.reactor import READ, Reactor

log = logging.getLogger("sordino.daemon")

Probe = Callable[[], str | None]  # what is wrong, or None


class Liveness:
    """Feeds the watchdog of `notifier`, from `start` until `stop`; does nothing where nobody watches.

    `probes`: by name, asked in their order, each for what is wrong. `on_beat(complaint)`: called at each beat, so that
    what is due from time to time needs no timer, and no waking up, of its own."""

    def __init__(
        self,
        reactor: Reactor,
        notifier: Notifier,
        *,
        probes: Mapping[str, Probe],
        on_beat: Callable[[str | None], None] = lambda complaint: None,
    ) -> None:
        self._reactor = reactor
        self._notifier = notifier
        self._probes = probes
        self._on_beat = on_beat
        self._complaint: str | None = None
        self._timer: Timer | None = None
        self._pipe: tuple[int, int] | None = None
        self.interval_s: Final = None if notifier.watchdog_s is None else notifier.watchdog_s / 2

    @property
    def complaint(self) -> str | None:
        """Why the watchdog was not fed the last time."""
        return self._complaint

    def start(self) -> None:
        if self.interval_s is None or self._pipe is not None:
            return
        self._pipe = os.pipe()
        for end in self._pipe:
            os.set_blocking(end, False)
        self._reactor.register(self._pipe[0], READ, lambda _ready: self._turned())
        self._knock()

    def stop(self) -> None:
        """Idempotent."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._pipe is not None:
            self._reactor.unregister(self._pipe[0])
            for end in self._pipe:
                os.close(end)
            self._pipe = None

    def _knock(self) -> None:
        assert self._pipe is not None
        assert self.interval_s is not None
        with contextlib.suppress(BlockingIOError):  # full: nobody reads, so nobody is fed
            os.write(self._pipe[1], b"\0")
        self._timer = self._reactor.call_at(self._reactor.now_s() + self.interval_s, self._knock)

    def _turned(self) -> None:
        assert self._pipe is not None
        os.read(self._pipe[0], 4096)
        complaint = self._ask()
        if complaint != self._complaint:
            if complaint is None:
                log.warning("event=well-again")
            else:
                log.error("event=unwell reason=%r remedy='restarted by the watchdog if it stays so'", complaint)
        self._complaint = complaint
        if complaint is None:
            self._notifier.alive()
        self._on_beat(complaint)

    def _ask(self) -> str | None:
        for name, probe in self._probes.items():
            try:
                fault = probe()
            except Exception as error:  # noqa: BLE001  a probe that fails has found something
                fault = f"{type(error).__name__}: {error}"
            if fault is not None:
                return f"{name}: {fault}"
        return None
