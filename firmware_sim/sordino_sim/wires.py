"""What the parties of a simulated fleet are connected by: memory with a network model, or a real broker."""

from __future__ import annotations

from typing import Final, Protocol

from sordino_common.clock import VirtualLoop
from sordino_common.transport.base import Transport
from sordino_common.transport.memory import MemoryBroker, MemoryTransport, NetworkModel
from sordino_common.transport.mqtt import MqttTransport
from sordino_common.transport.mqtt_settings import MqttSettings
from sordino_common.transport.reactor import Reactor
from sordino_sim.broker import LocalBroker
from sordino_sim.mortal import MortalLoop

_WINDOW: Final = 16  # as the real transport's default


class Wire(Protocol):
    """Makes every party's transport, and breaks what a fault schedule says."""

    def transport(self, name: str, loop: MortalLoop) -> Transport:
        """The transport of a new boot of `name`, living on `loop`."""
        ...

    def transport_of(self, name: str) -> Transport | None:
        """The transport of the boot of `name` that is running."""
        ...

    def kill(self, name: str, *, noticed_after_s: float) -> None:
        """The process of `name` is gone, its connection with it; the broker notices after so long."""
        ...

    def restart_broker(self, *, down_s: float) -> None:
        """The broker stops now and starts again after `down_s`."""
        ...


class MemoryWire:
    """A `MemoryBroker` on a virtual loop, with a network model; or `broker`, if that is a special one."""

    def __init__(self, loop: VirtualLoop, *, network: NetworkModel | None, broker: MemoryBroker | None = None) -> None:
        self._loop = loop
        self.broker = broker or MemoryBroker(loop, network=network)
        self._transports: dict[str, MemoryTransport] = {}
        self._stops = 0

    def transport(self, name: str, loop: MortalLoop) -> Transport:
        # Not on the mortal loop: `kill` and `close` stop the transport's own timers, and the broker's part goes on.
        transport = self._transports[name] = MemoryTransport(self.broker, self._loop, name, window=_WINDOW)
        return transport

    def transport_of(self, name: str) -> Transport | None:
        return self._transports.get(name)

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


class MqttWire:
    """A real broker on the loopback interface, one reactor for all parties. There is no simulated network."""

    def __init__(self, reactor: Reactor, broker: LocalBroker) -> None:
        self._reactor = reactor
        self._broker = broker
        self._transports: dict[str, MqttTransport] = {}

    def transport(self, name: str, loop: MortalLoop) -> Transport:
        settings = MqttSettings(
            host="127.0.0.1",
            port=self._broker.port,
            client_id=f"sordino-sim-{name}",
            reconnect_least_s=0.2,
            reconnect_most_s=2.0,
            window=_WINDOW,
        )
        transport = self._transports[name] = MqttTransport(settings, self._reactor)
        return transport

    def transport_of(self, name: str) -> Transport | None:
        return self._transports.get(name)

    def kill(self, name: str, *, noticed_after_s: float) -> None:
        """The connection breaks at once, as that of a killed process does, whatever `noticed_after_s` says."""
        transport = self._transports.pop(name, None)
        if transport is not None:
            transport.kill()

    def restart_broker(self, *, down_s: float) -> None:
        self._broker.stop()
        self._reactor.call_at(self._reactor.now_s() + down_s, self._broker.start)
