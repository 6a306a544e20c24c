"""The readiness protocol of systemd: a datagram of NAME=VALUE lines to the socket that NOTIFY_SOCKET names.

    READY=1                               start-up is over, or a reload
    RELOADING=1, MONOTONIC_USEC=<now>     a reload begins; the next READY=1 ends it
    STOPPING=1                            no new work is taken
    EXTEND_TIMEOUT_USEC=<n>               this much longer before the stop counts as failed
    WATCHDOG=1                            alive; due every WATCHDOG_USEC
    STATUS=<text>                         one line for `systemctl status`

Source: sd_notify(3) and "sd_watchdog_enabled(3)" of systemd 252. Where no NOTIFY_SOCKET is, nothing is sent.
"""

from __future__ import annotations

import logging
import os
import re
import socket
import time
from collections.abc import MutableMapping
from typing import Final

from sordino_common.errors import ConfigError

log = logging.getLogger("sordino.daemon")

_SEND_S: Final = 1.0  # a service manager that does not read for so long must not hold up the loop
_STATUS_CHARS: Final = 400
_VARIABLES: Final = ("NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID")


class Notifier:
    """Tells the service manager how we are. `address`: a path, or "@name" for an abstract socket; None: nobody listens.

    `watchdog_s`: how long it waits for `alive` before it ends us; None: it does not watch. A message that can't be sent
    is logged, and nothing else: losing the service manager must not stop the service."""

    def __init__(self, address: str | None = None, *, watchdog_s: float | None = None) -> None:
        self.watchdog_s: Final = watchdog_s
        self._address = None if address is None else _socket_address(address)
        self._status = ""
        self._lost = False

    @classmethod
    def from_environment(cls, environ: MutableMapping[str, str]) -> Notifier:
        """As systemd set it up. The variables are taken away: children must not speak in our name.

        Raises `ConfigError` for an address or a time that is none."""
        address, interval, pid = (environ.pop(name, None) for name in _VARIABLES)
        watchdog_s: float | None = None
        if interval is not None and pid in (None, str(os.getpid())):
            if re.fullmatch(r"[1-9][0-9]{0,17}", interval) is None:
                raise ConfigError(f"WATCHDOG_USEC={interval[:40]!r}: expected a number of microseconds")
            watchdog_s = int(interval) / 1e6
        return cls(address, watchdog_s=watchdog_s if address is not None else None)

    @property
    def listened(self) -> bool:
        """Whether anybody has asked to be told."""
        return self._address is not None

    def ready(self) -> None:
        """Start-up is over, or a reload."""
        self._send("READY=1")

    def reloading(self) -> None:
        """A reload begins; `ready` ends it."""
        self._send("RELOADING=1", f"MONOTONIC_USEC={time.monotonic_ns() // 1000}")

    def stopping(self, within_s: float) -> None:
        """No new work is taken; the end comes within `within_s`, whatever TimeoutStopSec says."""
        self._send("STOPPING=1", f"EXTEND_TIMEOUT_USEC={int(within_s * 1e6)}")

    def alive(self) -> None:
        """What the watchdog waits for."""
        self._send("WATCHDOG=1")

    def status(self, text: str) -> None:
        """One line for people; sent if it is another than the last."""
        # A line of its own would be a message of its own: what a broker gives as its reason must not be one.
        line = "".join(char if char.isprintable() else " " for char in text)[:_STATUS_CHARS]
        if line != self._status:
            self._status = line
            self._send(f"STATUS={line}")

    def _send(self, *lines: str) -> None:
        if self._address is None:
            return
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
                sock.settimeout(_SEND_S)
                sock.sendto("\n".join(lines).encode(), self._address)
        except OSError as error:
            if not self._lost:
                log.warning("event=notify-failed message=%s reason=%r", lines[0].partition("=")[0], str(error))
            self._lost = True
        else:
            self._lost = False


def _socket_address(text: str) -> str:
    if text.startswith("/"):
        return text
    if text.startswith("@") and len(text) > 1:
        return "\0" + text[1:]
    raise ConfigError(f"NOTIFY_SOCKET={text[:100]!r}: expected the path of a socket, or @name")
