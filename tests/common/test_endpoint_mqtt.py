"""The same endpoints over a real mosquitto, in real time: large messages, small packets, restarts, a slow reader."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from helpers_link import Band, Report, bulky, small
from helpers_mosquitto import Mosquitto
from sordino_common.transport.mqtt import MqttTransport
from sordino_common.transport.mqtt_settings import MqttSettings
from sordino_common.transport.reactor import Reactor
from sordino_common.transport.settings import MIB, LinkSettings

pytestmark = pytest.mark.mqtt

LIMIT_S = 60.0
NAMES = ("alto", "bass")


class MqttBand(Band):
    """A band on mosquitto. Those in `slow` have a reactor of their own, which stands still while `stalled`."""

    def __init__(self, broker: Mosquitto, *, slow: tuple[str, ...] = (), settings: LinkSettings | None = None) -> None:
        self.broker = broker
        self.reactor, self.slow_reactor = Reactor(), Reactor()
        self.stalled = False

        def transport(name: str) -> MqttTransport:
            mqtt = MqttSettings(
                host="127.0.0.1", port=broker.port, client_id=name, reconnect_least_s=0.05, reconnect_most_s=0.2
            )
            return MqttTransport(mqtt, self.slow_reactor if name in slow else self.reactor)

        super().__init__(self.reactor, transport, names=NAMES, settings=settings)
        for name in self.names:
            self.loop = self.slow_reactor if name in slow else self.reactor
            self.add(name)
        self.loop = self.reactor

    def run_until(self, done: Callable[[], bool]) -> None:
        deadline_s = self.reactor.now_s() + LIMIT_S
        while not done():
            assert self.reactor.now_s() < deadline_s, f"not within {LIMIT_S} s"
            self.reactor.run_once(0.01)
            if not self.stalled:
                self.slow_reactor.run_once(0.0)

    def told(self, *reports: Report) -> None:
        self.run_until(lambda: all(report.told for report in reports))

    def all_online(self) -> None:
        hub = self.parties["hub"].endpoint
        self.run_until(lambda: hub.peers() == NAMES and all(self.parties[n].endpoint.online("hub") for n in NAMES))

    def close(self) -> None:
        self.stalled = False
        for party in self.parties.values():
            party.endpoint.close()
        self.run_until(lambda: all(party.endpoint.closed for party in self.parties.values()))
        self.reactor.close()
        self.slow_reactor.close()


@contextmanager
def mqtt_band(broker: Mosquitto, **kwargs: object) -> Iterator[MqttBand]:
    band = MqttBand(broker, **kwargs)  # type: ignore[arg-type]
    try:
        band.all_online()
        yield band
    finally:
        band.close()


def test_thirty_megabytes_over_a_small_packet_limit(start_mosquitto: Callable[..., Mosquitto]) -> None:
    with mqtt_band(start_mosquitto("max_packet_size 300000")) as band:
        hub, alto = band.parties["hub"], band.parties["alto"]
        message = bulky(30 * MIB)
        report = alto.send("hub", message)
        band.told(report)
        assert report.delivered and hub.got == [message]
        assert alto.endpoint.counters.total.packet_bytes_sent < 1.05 * 30 * MIB


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_a_broker_restart_in_mid_transfer(start_mosquitto: Callable[..., Mosquitto], how: signal.Signals) -> None:
    broker = start_mosquitto("max_packet_size 300000")
    with mqtt_band(broker) as band:
        hub, alto = band.parties["hub"], band.parties["alto"]
        message = bulky(20 * MIB)
        reports = [alto.send("hub", message), hub.send("bass", small(1))]
        band.run_until(lambda: hub.endpoint.counters.total.packet_bytes_received > 8 * MIB)
        broker.restart(how)
        band.told(*reports)
        assert all(report.delivered for report in reports)
        assert hub.got == [message] and band.parties["bass"].got == [small(1)]
        assert alto.endpoint.counters.total.packet_bytes_sent < 1.5 * 20 * MIB
        band.all_online()


def test_a_slow_reader_does_not_hold_up_the_other(start_mosquitto: Callable[..., Mosquitto]) -> None:
    with mqtt_band(start_mosquitto(), slow=("alto",)) as band:
        hub = band.parties["hub"]
        message = bulky(10 * MIB)
        slow, quick = hub.send("alto", message), hub.send("bass", message)
        band.run_until(lambda: bool(hub.endpoint.counters.peer("alto").packets_sent > 3))
        band.stalled = True
        band.told(quick)
        assert quick.delivered and not slow.told
        band.stalled = False
        band.told(slow)
        assert slow.delivered and band.parties["alto"].got == [message]


def test_a_party_that_dies_is_missed_and_gets_its_message_when_it_is_back(
    start_mosquitto: Callable[..., Mosquitto],
) -> None:
    with mqtt_band(start_mosquitto()) as band:
        hub, alto = band.parties["hub"], band.parties["alto"]
        report = hub.send("alto", bulky(5 * MIB))
        band.run_until(lambda: alto.endpoint.counters.total.packet_bytes_received > MIB)
        assert isinstance(alto.transport, MqttTransport)
        alto.transport.kill()
        band.run_until(lambda: not hub.endpoint.online("alto"))
        assert not report.told
        again = band.add("alto", boot=2)
        band.told(report)
        assert report.delivered and len(again.got) == 1


def test_packets_of_two_kilobytes(start_mosquitto: Callable[..., Mosquitto]) -> None:
    with mqtt_band(start_mosquitto("max_packet_size 2400")) as band:
        message = bulky(200_000)
        report = band.parties["alto"].send("bass", message)
        band.told(report)
        assert report.delivered and band.parties["bass"].got == [message]
