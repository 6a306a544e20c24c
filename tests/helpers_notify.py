"""A service manager as far as a daemon sees it: the socket that NOTIFY_SOCKET names, and what came through it."""

from __future__ import annotations

import socket
from pathlib import Path

from sordino_common.transport.reactor import READ, Reactor


class Manager:
    """Collects notifications. With a reactor they come by themselves; without, `read` takes what is there."""

    def __init__(self, path: Path, *, reactor: Reactor | None = None) -> None:
        self.path = path
        self.messages: list[list[str]] = []
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.setblocking(False)
        self._socket.bind(str(path))
        self._reactor = reactor
        if reactor is not None:
            reactor.register(self._socket, READ, lambda _ready: self.read())

    def environment(self, *, watchdog_s: float | None = None) -> dict[str, str]:
        """What the daemon's environment has to hold beside the rest."""
        told = {"NOTIFY_SOCKET": str(self.path)}
        if watchdog_s is not None:
            told["WATCHDOG_USEC"] = str(int(watchdog_s * 1e6))
        return told

    def read(self) -> list[list[str]]:
        while True:
            try:
                data = self._socket.recv(65_536)
            except BlockingIOError:
                return self.messages
            self.messages.append(data.decode().split("\n"))

    def count(self, line: str) -> int:
        return sum(line in message for message in self.messages)

    @property
    def status(self) -> str:
        """The last STATUS."""
        found = [message[0] for message in self.messages if message[0].startswith("STATUS=")]
        return found[-1].removeprefix("STATUS=") if found else ""

    @property
    def steps(self) -> list[str]:
        """The first words of all messages but STATUS and WATCHDOG, in order."""
        heads = [message[0] for message in self.messages]
        return [head for head in heads if not head.startswith(("STATUS=", "WATCHDOG="))]

    def close(self) -> None:
        if self._reactor is not None:
            self._reactor.unregister(self._socket)
        self._socket.close()
