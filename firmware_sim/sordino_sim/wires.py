"""What the parties of a simulated fleet are connected by: memory with a network model, or a real broker."""

from __future__ import annotations

from typing import Final, Protocol

from sordino_common.clock import VirtualLoop
from sordino_common.transport.base import Transport
from sordino_common.transport.memory import MemoryBroker, MemoryTransport, NetworkModel
from sordino_sim.mortal import MortalLoop

_WINDOW: Final = 16  # as the real transport's default


class Wire(Protocol):
    """Makes every party's transport, and breaks what a fault schedule says."""

    def transport(self, name: str, loop: MortalLoop) -> Transport:
        """The transport of a new boot of `name`, living on `loop`."""
        ...

    def kill(self, name: str, *, noticed_after_s: float) -> None:
        """The process of `name` is gone, its connection with it; the broker notices after so long."""
        ...

    def restart_broker(self, *, down_s: float) -> None:
        """The broker stops now and starts again after `down_s`."""
        ...


class MemoryWire:
    """A `MemoryBroker` on a virtual loop, with a network model."""

    def __init__(self, loop: VirtualLoop, *, network: NetworkModel | None) -> None:
        self._loop = loop
        self.broker = MemoryBroker(loop, network=network)
        self._transports: dict[str, MemoryTransport] = {}
        self._stops = 0

    def transport(self, name: str, loop: MortalLoop) -> Transport:
        # Not on the mortal loop: `kill` and `close` stop the transport's own timers, and the broker's part goes on.
        transport = self._transports[name] = MemoryTransport(self.broker, self._loop, name, window=_WINDOW)
        return transport

    def kill(self, name: str, *, noticed_after_s: float) -> None:
        transport = self._transports.pop(name, None)
        if transport is not None:
            transport.kill(noticed_after_s=noticed_after_s)

    def restart_broker(self, *, down_s: float) -> None:
        self._stops += 1
        stop = self._stops
        self.broker.stop()

        def start() -> None:
            if stop == self._stops:  # else it was stopped again meanwhile, and starts later
                self.broker.start()

        self._loop.call_at(self._loop.now_s() + down_s, start)
