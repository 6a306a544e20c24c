"""`Endpoint`: one party of a fleet. Typed messages to others by name, encrypted, each delivered once or said why not.

It joins a `Link` (reliability), a `SessionTable` (keys), a `Transport` (packets) and a `Loop` (time), publishes its own
birth and death, follows the births and deaths of others and the roster. What it hears that is malformed, forged or
repeated goes to `EndpointHandler.on_refusal` and changes nothing.

    send -> Link.poll -> Session.seal -> Transport.publish      for as long as the transport's window takes packets
    Transport.on_packet -> SessionTable.receive -> Link.receive -> EndpointHandler.on_message
"""

from __future__ import annotations

import math
import os
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from sordino_common.channel.effects import Effect, Established, Lost, Opened, Rejected, Reply, RosterOffered
from sordino_common.channel.handshake import SessionTable
from sordino_common.channel.identity import DeviceKey
from sordino_common.channel.packets import roster_packet
from sordino_common.channel.presence import Birth, Death, PresenceBook, make_birth, make_death, read_presence
from sordino_common.channel.roster import Roster, RosterBook
from sordino_common.channel.session import SEALED_OVERHEAD
from sordino_common.clock import Loop, Timer
from sordino_common.errors import (
    HandshakeError,
    LimitExceeded,
    LocalError,
    RemoteError,
    RosterError,
    SessionError,
)
from sordino_common.messages import Message
from sordino_common.transport.base import Transport
from sordino_common.transport.greetings import Greetings
from sordino_common.transport.link import Delivered, Event, Link, Outcome, Stuck, Unreadable, Wanted
from sordino_common.transport.settings import LinkCounters, LinkSettings
from sordino_common.transport.topics import packet_topic, read_topic, roster_topic, status_topic, subscriptions

_CONTROL_PACKETS = 4096  # handshake packets that wait for the transport; over it the oldest goes, and is repeated
_UNVERIFIED = 1024  # statuses of parties that the roster lacks, kept for the next roster
_UNVERIFIED_BYTES = 2048
_FAREWELL_S = 2.0  # how long a close waits for the transport to take the death


@dataclass(frozen=True, slots=True, kw_only=True)
class Incoming:
    """A message from `sender`, which its session proves. A reply goes back with the same correlation and context."""

    sender: str
    message: Message
    correlation: bytes
    context: bytes


class EndpointHandler(Protocol):
    """The layer above. All calls come on the loop's thread; sending from within is fine."""

    def on_message(self, incoming: Incoming) -> None: ...

    def on_presence(self, name: str, online: bool, boot: int) -> None:
        """`name` appeared (again, if it was online), or is gone."""
        ...

    def on_connection(self, connected: bool, reason: str) -> None: ...

    def on_roster(self, roster: Roster) -> None:
        """A newer roster is in force."""
        ...

    def on_refusal(self, sender: str, error: RemoteError) -> None:
        """A packet or message, claimed or proved to be of `sender`, was refused; or `sender` refused a session."""
        ...


class Endpoint:
    """See the module's text. One object per party and boot; `boot` must have grown since the last (`next_boot`)."""

    def __init__(
        self,
        *,
        name: str,
        identity: DeviceKey,
        roster: RosterBook,
        fleet: str,
        server: str,
        boot: int,
        transport: Transport,
        loop: Loop,
        handler: EndpointHandler,
        version: str,
        settings: LinkSettings | None = None,
        random: Callable[[int], bytes] = os.urandom,
    ) -> None:
        settings = settings or LinkSettings()
        self.name = name
        self.fleet = fleet
        self.server = server
        self.boot = boot
        self.counters = LinkCounters()
        self._identity = identity
        self._book = roster
        self._transport = transport
        self._loop = loop
        self._handler = handler
        self._version = version
        self._random = random
        self._sessions = SessionTable(
            name=name, identity=identity, roster=roster, fleet=fleet, boot=boot, random=random
        )
        self._link = Link(settings=settings, counters=self.counters)
        self._greetings = Greetings(settings)
        self._presence = PresenceBook()
        self._unverified: dict[str, bytes] = {}
        self._control: deque[tuple[str, bytes]] = deque(maxlen=_CONTROL_PACKETS)
        self._sealed: tuple[str, bytes] | None = None  # sealed, but not taken by the transport yet
        self._birth_due = False
        self._roster_due = False
        self._announced: bytes | None = None  # the roster that the server publishes
        self._events: deque[Event] = deque()
        self._pumping = False
        self._timer: Timer | None = None
        self._timer_s = math.inf
        self._opened = False
        self._connected = False
        self._close_by_s: float | None = None
        self._farewell_by_s: float | None = None
        self.closed = False

    # --- for the owner -----------------------------------------------------------------------------------------------

    def open(self) -> None:
        """Connect, and stay connected until `close`."""
        if self._opened:
            raise LocalError(f"endpoint {self.name}: opened twice")
        self._opened = True
        for topic_filter in subscriptions(self.fleet, self.name, self.server):
            self._transport.subscribe(topic_filter)
        self._transport.open(self, will=lambda connection: (self._status_topic, self._death(connection)))

    def close(self, *, drain_s: float = 0.0) -> None:
        """Take no more messages, wait up to `drain_s` for those under way, publish our death, disconnect.

        Returns at once; `closed` is true when it is done. What is not acknowledged then has failed."""
        if self._close_by_s is None:
            self._close_by_s = self._loop.now_s() + drain_s
            self._pump()

    def send(
        self,
        to: str,
        message: Message,
        *,
        correlation: bytes | None = None,
        context: bytes = b"",
        expires_s: float | None = None,
        on_outcome: Callable[[bool, str], None] | None = None,
    ) -> bytes:
        """Queue `message` for `to`; returns its correlation id (16 bytes, drawn unless given).

        `on_outcome(delivered, reason)` is called once: delivered, refused by the peer, or not acknowledged within
        `expires_s` (the settings' if None). Raises `LimitExceeded` (too long, queue full) or `LocalError`."""
        if self._close_by_s is not None:
            raise LocalError(f"endpoint {self.name}: {message.kind} to {to} after close")
        packet_topic(self.fleet, self.name, to, self.server)  # raises if `to` is no name, or us
        correlation = self._random(16) if correlation is None else correlation
        self._link.send(
            to,
            message,
            correlation=correlation,
            context=context,
            expires_s=expires_s,
            on_outcome=on_outcome,
            now_s=self._loop.now_s(),
        )
        self._pump()
        return correlation

    def publish_roster(self, signed: bytes) -> None:
        """Server only: put a signed roster into force here and before the fleet, now and at every reconnect. Raises
        what `RosterBook.accept` raises, and `LimitExceeded` if the broker takes no packet that large."""
        if self.name != self.server:
            raise LocalError(f"endpoint {self.name}: only the server ({self.server}) publishes the roster")
        packet = roster_packet(signed)
        if self._transport.connected and len(packet) > self._transport.max_packet_bytes:
            raise LimitExceeded(
                f"roster: {len(packet)} bytes, the broker takes packets of {self._transport.max_packet_bytes}: raise "
                "its max_packet_size"
            )
        effects = self._sessions.receive(packet, now_s=self._loop.now_s())
        self._announced, self._roster_due = packet, True
        self._perform(effects)
        self._pump()

    def online(self, name: str) -> bool:
        """Whether `name` has told of its birth, and nobody of its death."""
        return self._presence.online(name)

    def peers(self) -> tuple[str, ...]:
        """All that are online, sorted, without ourselves."""
        return tuple(name for name in self._presence.names() if name != self.name)

    def unacknowledged(self) -> dict[str, int]:
        """Messages per peer that are queued or under way."""
        return self._link.unacknowledged()

    # --- TransportHandler --------------------------------------------------------------------------------------------

    def on_connected(self) -> None:
        try:
            self._link.connected(self._transport.max_packet_bytes - SEALED_OVERHEAD, self._loop.now_s())
        except LimitExceeded as error:
            self._handler.on_connection(False, str(error))
            return
        self._connected = True
        self._birth_due = True
        self._roster_due = self._announced is not None
        self._sealed = None  # its session may be, its connection is gone; the link sends again what it held
        self._handler.on_connection(True, "")
        self._pump()

    def on_disconnected(self, reason: str) -> None:
        self._connected = False
        self._link.disconnected()
        self._handler.on_connection(False, reason)
        self._pump()

    def on_writable(self) -> None:
        self._pump()

    def on_packet(self, topic: str, payload: bytes, retained: bool) -> None:
        total = self.counters.total
        total.packets_received += 1
        total.packet_bytes_received += len(payload)
        sender = ""
        try:
            origin = read_topic(topic, fleet=self.fleet, server=self.server)
            sender = origin.sender
            if origin.channel == "status":
                self._on_status(sender, payload)
            else:
                self._perform(self._sessions.receive(payload, now_s=self._loop.now_s()), len(payload))
        except RemoteError as error:
            self._refuse(sender, error)
            if isinstance(error, SessionError):
                self._answer_unknown_session(sender)
        self._pump()

    # --- what comes in -----------------------------------------------------------------------------------------------

    def _perform(self, effects: list[Effect], nbytes: int = 0) -> None:
        """Do what the session table says. Raises what `Link.receive` raises, after all else is done."""
        now_s = self._loop.now_s()
        fault: RemoteError | None = None
        for effect in effects:
            match effect:
                case Reply(to=to, packet=packet):
                    self._post(to, packet)
                case Established(peer=peer, context=context, session=session):
                    self._link.lane_up(peer, context, peer_boot=session.peer_boot, now_s=now_s)
                    self._greetings.settle((peer, context))
                case Opened(peer=peer, context=context, plaintext=plaintext):
                    traffic = self.counters.peer(peer)
                    traffic.packets_received += 1
                    traffic.packet_bytes_received += nbytes
                    self._alive(peer, context)
                    try:
                        self._link.receive(peer, context, plaintext, now_s)
                    except RemoteError as error:
                        fault = error
                case Lost(peer=peer, context=context):
                    self._link.lane_down(peer, context)
                case Rejected(peer=peer, context=context, code=code, reason=reason):
                    self._link.obstacle(peer, context, f"{peer} refused a session: {reason}")
                    self._refuse(peer, HandshakeError(f"{peer} refused a session: {reason} [{code}]"))
                case RosterOffered(signed=signed):
                    self._follow_roster(signed)
        if fault is not None:
            raise fault

    def _alive(self, peer: str, context: bytes) -> None:
        """A packet of the peer was opened. If its death had us put the lane down, that was of another connection."""
        session = self._sessions.established(peer, context)
        if session is not None and not self._link.is_up(peer, context):
            self._link.lane_up(peer, context, peer_boot=session.peer_boot, now_s=self._loop.now_s())
            self._greetings.settle((peer, context))

    def _on_status(self, sender: str, payload: bytes) -> None:
        if sender == self.name:
            return  # our own, as the broker keeps it
        roster = self._book.current
        try:
            if roster is None:
                raise RosterError(f"status of {sender}: can't be verified before a roster was received")
            roster.entry(sender)
        except RosterError:
            room = sender in self._unverified or len(self._unverified) < _UNVERIFIED
            if room and len(payload) <= _UNVERIFIED_BYTES:
                self._unverified[sender] = payload
            raise
        presence = read_presence(payload, roster)
        if presence.name != sender:
            raise RosterError(f"status of {sender}: it is a {presence.kind} of {presence.name}")
        before = self._presence.birth(sender)
        if self._presence.accept(presence):
            self._on_presence(presence, before)

    def _on_presence(self, presence: Birth | Death, before: Birth | None) -> None:
        name, now_s = presence.name, self._loop.now_s()
        if isinstance(presence, Death):
            for context in self._link.contexts(name):
                self._link.lane_down(name, context)
            if before is not None:
                self._handler.on_presence(name, False, presence.boot)
            return
        if before is not None and (before.boot, before.connection) == (presence.boot, presence.connection):
            return  # news of its roster only
        for context in self._link.contexts(name):
            session = self._sessions.established(name, context)
            if session is not None and session.peer_boot < presence.boot:
                self._perform(list(self._sessions.drop(name, context, reason=f"{name} has restarted")))
            elif session is not None:
                self._link.lane_up(name, context, peer_boot=session.peer_boot, now_s=now_s)
                self._greetings.settle((name, context))
        self._greetings.hurry(name, now_s)
        self._handler.on_presence(name, True, presence.boot)

    def _follow_roster(self, signed: bytes) -> None:
        roster = self._book.current
        if roster is None:
            raise LocalError("endpoint: a roster was offered, and none is in force")
        members = {entry.name for entry in roster.entries}
        for peer in self._link.peers():
            if peer not in members:
                self._perform(list(self._sessions.drop(peer, reason="not in the roster")))
                self._link.remove(peer, f"{peer} is not in the roster of epoch {roster.epoch}")
        boots = {name: birth.boot for name in self._presence.names() if (birth := self._presence.birth(name))}
        self._birth_due = self._connected  # it tells our epoch
        if self.name == self.server:
            self._announced, self._roster_due = roster_packet(signed), True
        for name in self._presence.keep_only(roster):
            self._handler.on_presence(name, False, boots[name])
        self._handler.on_roster(roster)
        waiting, self._unverified = self._unverified, {}
        for name, payload in waiting.items():
            try:
                self._on_status(name, payload)
            except RemoteError as error:
                self._refuse(name, error)

    def _refuse(self, sender: str, error: RemoteError) -> None:
        try:
            self._book.require().entry(sender)
            self.counters.add(sender, refusals=1)
        except RosterError:
            self.counters.total.refusals += 1  # no place per name: anybody can make up names
        self._handler.on_refusal(sender, error)

    def _answer_unknown_session(self, sender: str) -> None:
        """If we have no session with a member that thinks so, a Hello tells it our boot."""
        now_s = self._loop.now_s()
        if sender == self.name or self._sessions.established(sender) is not None:
            return
        try:
            self._book.party(sender)
        except RosterError:
            return
        if self._greetings.may_answer(sender, now_s):
            self._greet(sender, b"")

    # --- what goes out -----------------------------------------------------------------------------------------------

    def _pump(self) -> None:
        """Send what can be sent, tell what is to be told, set the timer. Calls from within join the first."""
        if self._pumping or not self._opened or self.closed:
            return
        self._pumping = True
        try:
            more = True
            while more:
                self._tell()
                self._greet_who_is_due()
                self._publish()
                self._events.extend(self._link.take_events())
                more = bool(self._events)
            self._closing()
        finally:
            self._pumping = False
            self._set_timer()

    def _tell(self) -> None:
        """Hand events to their owners, one by one: if one of them raises, the others are still there."""
        self._events.extend(self._link.take_events())
        while self._events:
            event = self._events.popleft()
            match event:
                case Delivered():
                    incoming = Incoming(
                        sender=event.peer, message=event.message, correlation=event.correlation, context=event.context
                    )
                    self._handler.on_message(incoming)
                case Outcome():
                    if event.report is not None:
                        event.report(event.delivered, event.reason)
                case Stuck():
                    self._greet(event.peer, event.context)
                case Wanted():
                    self._greetings.want((event.peer, event.context), self._loop.now_s())
                case Unreadable():
                    self._handler.on_refusal(event.peer, event.error)
            self._events.extend(self._link.take_events())

    def _greet_who_is_due(self) -> None:
        if not self._connected:
            return
        for peer, context in self._greetings.due(self._loop.now_s()):
            if self._link.wants(peer, context):
                self._greet(peer, context)
            else:
                self._greetings.settle((peer, context))

    def _greet(self, peer: str, context: bytes) -> None:
        try:
            self._post(peer, self._sessions.initiate(peer, context, now_s=self._loop.now_s()))
        except RosterError as error:
            self._link.obstacle(peer, context, str(error))
        else:
            told = "online" if self.online(peer) else "not seen online"
            self._link.obstacle(peer, context, f"no session yet, {peer} is {told}")

    def _post(self, to: str, packet: bytes) -> None:
        entry = (to, packet)
        if entry not in self._control:
            self._control.append(entry)

    def _publish(self) -> None:
        if not self._connected:
            return
        if self._birth_due and self._put("", self._status_topic, self._birth(), retain=True):
            self._birth_due = False
        if self._roster_due and self._announced is not None:
            self._roster_due = not self._put("", roster_topic(self.fleet, self.server), self._announced, retain=True)
        while self._control:
            to, packet = self._control[0]
            if not self._put(to, packet_topic(self.fleet, self.name, to, self.server), packet):
                return
            self._control.popleft()
        while True:
            sealed = self._sealed or self._next_sealed()
            if sealed is None:
                return
            to, packet = self._sealed = sealed
            if not self._put(to, packet_topic(self.fleet, self.name, to, self.server), packet):
                return
            self._sealed = None

    def _next_sealed(self) -> tuple[str, bytes] | None:
        while packet := self._link.poll(self._loop.now_s()):
            peer, context, plaintext = packet
            session = self._sessions.established(peer, context)
            if session is not None:
                return peer, session.seal(plaintext)
            self._link.lane_down(peer, context)  # the roster has changed or expired; a new session sends it again
        return None

    def _put(self, to: str, topic: str, payload: bytes, *, retain: bool = False) -> bool:
        """Publish; False if the transport's window is full. What the broker's limit forbids is dropped and counted."""
        try:
            if not self._transport.publish(topic, payload, retain=retain):
                return False
        except LimitExceeded:
            self.counters.total.oversized += 1
            return True
        if to:
            self.counters.add(to, packets_sent=1, packet_bytes_sent=len(payload))
        else:
            self.counters.total.packets_sent += 1
            self.counters.total.packet_bytes_sent += len(payload)
        return True

    # --- time and the end --------------------------------------------------------------------------------------------

    def _set_timer(self) -> None:
        if self.closed:
            due_s = math.inf
        elif self._events:
            due_s = self._loop.now_s()  # a handler has raised; the others are told all the same
        else:
            due_s = min(self._link.next_deadline_s(), self._greetings.next_s() if self._connected else math.inf)
            if self._close_by_s is not None:
                due_s = min(due_s, self._farewell_by_s or self._close_by_s)
        if due_s == self._timer_s:
            return
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._timer_s = due_s
        if due_s < math.inf:
            self._timer = self._loop.call_at(due_s, self._on_timer)

    def _on_timer(self) -> None:
        self._timer, self._timer_s = None, math.inf
        self._link.on_time(self._loop.now_s())
        self._pump()

    def _closing(self) -> None:
        """Go on with closing, if it is time."""
        now_s = self._loop.now_s()
        if self._close_by_s is None:
            return
        if self._farewell_by_s is None:
            if now_s < self._close_by_s and not (self._link.idle and not self._control and self._sealed is None):
                return
            self._farewell_by_s = now_s + _FAREWELL_S
        death = self._death(self._transport.connections)
        told = not self._connected or self._put("", self._status_topic, death, retain=True)
        if not told and now_s < self._farewell_by_s:
            return
        self._connected = False
        self._transport.close()
        for peer in self._link.peers():
            self._link.remove(peer, f"not acknowledged by {peer} before {self.name} closed")
        self.closed = True
        self._tell()

    @property
    def _status_topic(self) -> str:
        return status_topic(self.fleet, self.name)

    def _birth(self) -> bytes:
        roster = self._book.current
        return make_birth(
            self._identity,
            fleet=self.fleet,
            name=self.name,
            boot=self.boot,
            connection=self._transport.connections,
            version=self._version,
            epoch=roster.epoch if roster is not None else 0,
        )

    def _death(self, connection: int) -> bytes:
        return make_death(self._identity, fleet=self.fleet, name=self.name, boot=self.boot, connection=connection)
