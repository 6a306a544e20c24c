"""The daemon has its certificate renewed when that is due: once a day it runs `sordino-agent renew --if-due --wait 0`.

In a process of its own: the visit to the broker is another connection, and X.509 stays out of the daemon's memory. One
run leaves the request, a later one takes the answer, whenever the operator's side has given it; a third of the
certificate's life is time for that. The new certificate is read when the daemon next connects.
"""

from __future__ import annotations

import logging
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Final, Protocol

from sordino_common.clock import Loop, Timer

FIRST_S: Final = 900.0  # after a start there is enough else to do
EVERY_S: Final = 86_400.0
TAKES_S: Final = 120.0  # a visit is bounded by its own deadlines, which are shorter

log = logging.getLogger("sordino.agent")


class Running(Protocol):
    """What of `subprocess.Popen` is used."""

    def poll(self) -> int | None: ...

    def kill(self) -> None: ...

    def wait(self) -> int: ...


class Spawn(Protocol):
    def __call__(self, command: Sequence[str]) -> Running: ...


def _spawn(command: Sequence[str]) -> Running:
    """What it has to say goes where the daemon's own log goes."""
    return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)


class Renewal:
    """Runs from `start` to `close`. `config`: the agent's configuration file."""

    def __init__(self, loop: Loop, config: Path, *, spawn: Spawn = _spawn) -> None:
        self._loop = loop
        self._command = (
            *(sys.executable, "-P", "-m", "sordino_agent", "renew", str(config)),
            *("--if-due", "--wait", "0"),
        )
        self._spawn = spawn
        self._running: Running | None = None
        self._timer: Timer | None = None

    def start(self) -> None:
        self._timer = self._loop.call_at(self._loop.now_s() + FIRST_S, self._run)

    def close(self) -> None:
        """Idempotent."""
        if self._timer is not None:
            self._timer.cancel()
        self._end()

    def _run(self) -> None:
        try:
            self._running = self._spawn(self._command)
        except OSError as error:  # no memory, no processes left: tomorrow is time enough
            log.warning("event=renewal-not-started reason=%r", error.strerror)
        self._timer = self._loop.call_at(self._loop.now_s() + TAKES_S, self._look)

    def _look(self) -> None:
        if self._running is not None:
            code = self._running.poll()
            if code is None:
                log.warning("event=renewal-killed reason='not done after %g s'", TAKES_S)
            elif code:
                log.warning("event=renewal-failed code=%d remedy='run it by hand: sordino-agent renew'", code)
            self._end()
        self._timer = self._loop.call_at(self._loop.now_s() + EVERY_S - TAKES_S, self._run)

    def _end(self) -> None:
        running, self._running = self._running, None
        if running is not None:
            if running.poll() is None:
                running.kill()
            running.wait()
