"""What tests of links and endpoints share: messages of a chosen size, and links joined by a seeded bad network."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from helpers_channel import FLEET, OPERATOR, device
from sordino_common.channel.roster import Roster, RosterBook, RosterEntry, sign_roster
from sordino_common.clock import Loop, Timer, VirtualLoop
from sordino_common.errors import RemoteError
from sordino_common.messages import Array, Message, TensorDropped, TensorValue
from sordino_common.messages.protocol import PROTOCOL, ProtocolVersion
from sordino_common.transport.base import Transport
from sordino_common.transport.endpoint import Endpoint, Incoming
from sordino_common.transport.events import Delivered, Event, Outcome, Stuck, Unreadable
from sordino_common.transport.link import Link
from sordino_common.transport.memory import MemoryBroker, MemoryTransport, NetworkModel, Publication
from sordino_common.transport.settings import LinkCounters, LinkSettings

PACKET_BYTES = 300_000


def bulky(nbytes: int, fill: int = 7) -> Message:
    """A message that encodes to a little more than `nbytes`, and not compressible by repetition."""
    data = random.Random(fill).randbytes(min(nbytes, 4096))
    whole = (data * (nbytes // max(1, len(data)) + 1))[:nbytes]
    return TensorValue(tensor_id=fill.to_bytes(16, "big"), value=Array("uint8", (nbytes,), whole))


def small(number: int = 0) -> Message:
    return TensorDropped(dropped=number)


@dataclass
class BadNetwork:
    """Loss, doubling, delay and reordering of packets, drawn from one seed."""

    seed: int = 0
    loss: float = 0.0
    double: float = 0.0
    delay_s: float = 0.01
    jitter_s: float = 0.0

    def __post_init__(self) -> None:
        self.random = random.Random(self.seed)

    def delays_s(self) -> list[float]:
        if self.random.random() < self.loss:
            return []
        copies = 2 if self.random.random() < self.double else 1
        return [self.delay_s + self.jitter_s * self.random.random() for _ in range(copies)]


@dataclass
class Report:
    """What a caller is told of one message."""

    told: list[tuple[bool, str]] = field(default_factory=list)

    def __call__(self, delivered: bool, reason: str) -> None:
        self.told.append((delivered, reason))

    @property
    def delivered(self) -> bool:
        return self.told == [(True, "")]


class Station:
    """A `Link` on a loop, joined to others by `Mesh`: what the endpoint does, without keys and topics."""

    def __init__(self, mesh: Mesh, name: str, settings: LinkSettings, boot: int = 1) -> None:
        self.mesh, self.name, self.boot = mesh, name, boot
        self.counters = LinkCounters()
        self.link = Link(settings=settings, counters=self.counters)
        self.inbox: list[Delivered] = []
        self.stuck = 0
        self.errors: list[RemoteError] = []
        self.packets: list[tuple[str, int]] = []  # (receiver, bytes) of every packet sent
        self._timer: Timer | None = None
        self._number = 0
        self.link.connected(mesh.packet_bytes, mesh.loop.now_s())

    def send(self, to: str, message: Message, *, expires_s: float = 3600.0, context: bytes = b"") -> Report:
        report = Report()
        self._number += 1
        self.link.send(
            to,
            message,
            correlation=self._number.to_bytes(16, "big"),
            context=context,
            expires_s=expires_s,
            on_outcome=report,
            now_s=self.mesh.loop.now_s(),
        )
        self.pump()
        return report

    def pump(self) -> None:
        now_s = self.mesh.loop.now_s()
        while packet := self.link.poll(now_s):
            peer, context, plaintext = packet
            assert len(plaintext) <= self.mesh.packet_bytes
            self.packets.append((peer, len(plaintext)))
            self.mesh.carry(self, peer, context, plaintext)
        for event in self.link.take_events():
            self._event(event)
        if self._timer is not None:
            self._timer.cancel()
        due_s = self.link.next_deadline_s()
        self._timer = self.mesh.loop.call_at(due_s, self._on_time) if due_s < float("inf") else None

    def _on_time(self) -> None:
        self.link.on_time(self.mesh.loop.now_s())
        self.pump()

    def _event(self, event: Event) -> None:
        match event:
            case Delivered():
                self.inbox.append(event)
            case Outcome(report=report) if report is not None:
                report(event.delivered, event.reason)
            case Stuck():
                self.stuck += 1
            case Unreadable(error=error):
                self.errors.append(error)

    @property
    def bytes_sent(self) -> int:
        return sum(nbytes for _, nbytes in self.packets)


class Mesh:
    """Stations by name on one virtual loop; `cut` takes names off the network."""

    def __init__(self, network: BadNetwork | None = None, *, packet_bytes: int = PACKET_BYTES) -> None:
        self.loop = VirtualLoop()
        self.network = network or BadNetwork()
        self.packet_bytes = packet_bytes
        self.stations: dict[str, Station] = {}
        self.cut: set[str] = set()
        self.slow: dict[str, float] = {}  # name -> bytes per second of its way in
        self._free_s: dict[str, float] = {}

    def add(self, name: str, settings: LinkSettings | None = None, boot: int = 1) -> Station:
        station = Station(self, name, settings or LinkSettings(), boot)
        self.stations[name] = station
        return station

    def join(self, a: str, b: str, context: bytes = b"") -> None:
        """A session between two stations."""
        for here, there in ((a, b), (b, a)):
            station, peer = self.stations[here], self.stations[there]
            station.link.lane_up(there, context, peer_boot=peer.boot, now_s=self.loop.now_s())
            station.pump()

    def carry(self, sender: Station, to: str, context: bytes, plaintext: bytes) -> None:
        if {sender.name, to} & self.cut:
            return
        for delay_s in self.network.delays_s():
            arrival_s = self.loop.now_s() + delay_s
            if to in self.slow:
                arrival_s = max(arrival_s, self._free_s.get(to, 0.0)) + len(plaintext) / self.slow[to]
                self._free_s[to] = arrival_s
            self.loop.call_at(arrival_s, lambda: self._arrive(sender.name, sender.boot, to, context, plaintext))

    def _arrive(self, sender: str, boot: int, to: str, context: bytes, plaintext: bytes) -> None:
        station = self.stations.get(to)
        if station is None or to in self.cut or self.stations[sender].boot != boot:
            return
        try:
            station.link.receive(sender, context, plaintext, self.loop.now_s())
        except RemoteError as error:
            station.errors.append(error)
        station.pump()

    def run_until(self, *reports: Report, within_s: float = 600.0) -> None:
        assert self.loop.run_until(
            lambda: all(report.told for report in reports), deadline_s=self.loop.now_s() + within_s
        ), f"no outcome within {within_s} s of virtual time"


# --- endpoints -------------------------------------------------------------------------------------------------------


class Recorder:
    """A handler that writes down what it hears, and may answer messages."""

    def __init__(self) -> None:
        self.messages: list[Incoming] = []
        self.presence: list[tuple[str, bool, int]] = []
        self.connection: list[tuple[bool, str]] = []
        self.rosters: list[int] = []
        self.refusals: list[tuple[str, RemoteError]] = []
        self.on_each: Callable[[Incoming], None] | None = None

    def on_message(self, incoming: Incoming) -> None:
        self.messages.append(incoming)
        if self.on_each is not None:
            self.on_each(incoming)

    def on_presence(self, name: str, online: bool, boot: int) -> None:
        self.presence.append((name, online, boot))

    def on_connection(self, connected: bool, reason: str) -> None:
        self.connection.append((connected, reason))

    def on_roster(self, roster: Roster) -> None:
        self.rosters.append(roster.epoch)

    def on_refusal(self, sender: str, error: RemoteError) -> None:
        self.refusals.append((sender, error))


class Party:
    """One endpoint of a `Band`, with its handler and transport."""

    def __init__(self, endpoint: Endpoint, heard: Recorder, transport: Transport) -> None:
        self.endpoint, self.heard, self.transport = endpoint, heard, transport

    def send(self, to: str, message: Message, *, expires_s: float = 600.0, context: bytes = b"") -> Report:
        report = Report()
        self.endpoint.send(to, message, expires_s=expires_s, context=context, on_outcome=report)
        return report

    @property
    def got(self) -> list[Message]:
        return [incoming.message for incoming in self.heard.messages]


class Band:
    """A fleet of endpoints with fixed keys: `server` and agents, on any transport and loop."""

    def __init__(
        self,
        loop: Loop,
        transport: Callable[[str], Transport],
        *,
        server: str = "hub",
        settings: LinkSettings | None = None,
        names: Iterable[str] = ("alto", "bass"),
    ) -> None:
        self.loop, self.server, self.settings = loop, server, settings
        self._transport = transport
        self.parties: dict[str, Party] = {}
        self.names = (server, *names)
        self.signed = self.roster(1, self.names)

    def roster(self, epoch: int, names: Iterable[str]) -> bytes:
        entries = tuple(
            RosterEntry(
                name=name,
                sign_key=device(name).public.sign_key,
                box_key=device(name).public.box_key,
                roles=("server",) if name == self.server else ("data",),
            )
            for name in names
        )
        now_s = int(self.loop.wall_s())
        whole = Roster(fleet=FLEET, epoch=epoch, issued_s=now_s - 10, expires_s=now_s + 10_000_000, entries=entries)
        return sign_roster(whole, OPERATOR)

    def add(
        self,
        name: str,
        *,
        boot: int = 1,
        signed: bytes | None = None,
        enrolled: bool = True,
        protocol: ProtocolVersion = PROTOCOL,
    ) -> Party:
        """Build the endpoint of `name` (in place of an earlier one) and open it."""
        book = RosterBook(fleet=FLEET, operator_key=OPERATOR.public, wall_s=self.loop.wall_s)
        if enrolled:
            book.accept(signed or self.signed)
        heard, transport = Recorder(), self._transport(name)
        endpoint = Endpoint(
            name=name,
            identity=device(name),
            roster=book,
            fleet=FLEET,
            server=self.server,
            boot=boot,
            transport=transport,
            loop=self.loop,
            handler=heard,
            version="test",
            settings=self.settings,
            random=random.Random(f"{name} {boot}").randbytes,
            protocol=protocol,
        )
        party = self.parties[name] = Party(endpoint, heard, transport)
        endpoint.open()
        return party


class BadHops:
    """A `NetworkModel` of a `BadNetwork`; with limits per receiver in bytes per second."""

    def __init__(self, network: BadNetwork | None = None) -> None:
        self.network = network or BadNetwork(delay_s=0.005)
        self.bytes_per_s: dict[str, float] = {}
        self._free_s: dict[str, float] = {}

    def deliveries(self, sender: str, receiver: str, nbytes: int, now_s: float) -> list[float]:
        times_s = [now_s + delay_s for delay_s in self.network.delays_s()]
        rate = self.bytes_per_s.get(receiver)
        if rate is not None and times_s:
            start_s = max(times_s[0], self._free_s.get(receiver, 0.0))
            self._free_s[receiver] = start_s + nbytes / rate
            times_s = [start_s + nbytes / rate]
        return times_s


class MemoryBand(Band):
    """A band on a `MemoryBroker` and virtual time."""

    def __init__(
        self, network: NetworkModel | None = None, *, packet_bytes: int = PACKET_BYTES, window: int = 16, **kwargs: Any
    ) -> None:
        self.virtual = VirtualLoop()
        self.broker = MemoryBroker(self.virtual, network=network)
        self.packets: list[Publication] = []
        self.broker.tap(self.packets.append)

        def transport(name: str) -> MemoryTransport:
            return MemoryTransport(
                self.broker, self.virtual, name, window=window, max_packet_bytes=packet_bytes, reconnect_most_s=5.0
            )

        super().__init__(self.virtual, transport, **kwargs)

    def kill(self, name: str) -> None:
        """The process is gone; the broker notices at once."""
        transport = self.parties[name].transport
        assert isinstance(transport, MemoryTransport)
        transport.kill()

    def run_until(self, done: Callable[[], bool], *, within_s: float = 60.0) -> None:
        assert self.virtual.run_until(done, deadline_s=self.virtual.now_s() + within_s), f"not within {within_s} s"

    def told(self, *reports: Report, within_s: float = 60.0) -> None:
        self.run_until(lambda: all(report.told for report in reports), within_s=within_s)

    def all_online(self) -> None:
        """Until the server has seen everybody's birth, and they the server's."""
        agents = {name for name in self.parties if name != self.server}
        hub = self.parties[self.server].endpoint
        self.run_until(
            lambda: agents <= set(hub.peers()) and all(self.parties[a].endpoint.online(self.server) for a in agents)
        )
