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
from collections.abc import Callable
from typing import Protocol

import msgspec

from sordino_common.channel.effects import Effect, Established, Lost, Opened, Rejected, Reply, RosterOffered, Unlike
from sordino_common.channel.handshake import SessionTable
from sordino_common.channel.identity import DeviceKey
from sordino_common.channel.packets import roster_packet
from sordino_common.channel.presence import make_birth, make_death
from sordino_common.channel.roster import Roster, RosterBook
from sordino_common.channel.session import SEALED_OVERHEAD, Session
from sordino_common.clock import Loop, Timer
from sordino_common.errors import (
    HandshakeError,
    LimitExceeded,
    LocalError,
    ProtocolMismatch,
    RemoteError,
    RosterError,
    SessionError,
)
from sordino_common.messages import Message
from sordino_common.messages.protocol import PROTOCOL, ProtocolVersion
from sordino_common.transport.base import Transport
from sordino_common.transport.events import Delivered, Outcome, Stuck, Unreadable, Wanted
from sordino_common.transport.greetings import Greetings
from sordino_common.transport.link import Link
from sordino_common.transport.membership import Membership
from sordino_common.transport.outbox import Outbox
from sordino_common.transport.settings import LinkCounters, LinkSettings
from sordino_common.transport.topics import packet_topic, read_topic, roster_topic, status_topic, subscriptions

_FAREWELL_S = 2.0  # how long a close waits for the transport to take the death


class Incoming(msgspec.Struct, frozen=True, kw_only=True):
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

    def on_connection(self, connected: bool, reason: str) -> None:
        """`reason`: why not; or, if connected, a warning (the broker's packet limit forbids the roster), else empty."""

    def on_roster(self, roster: Roster) -> None:
        """A newer roster is in force."""

    def on_refusal(self, sender: str, error: RemoteError) -> None:
        """A packet or message, claimed or proved to be of `sender`, was refused; or `sender` refused a session."""


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
        protocol: ProtocolVersion = PROTOCOL,
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
        self._protocol = protocol
        self._random = random
        self._sessions = SessionTable(
            name=name, identity=identity, roster=roster, fleet=fleet, boot=boot, random=random, protocol=protocol
        )
        self._link = Link(settings=settings, counters=self.counters)
        self._greetings = Greetings(settings)
        self._members = Membership(roster, protocol=protocol)
        self._outbox = Outbox(
            transport=transport, counters=self.counters, topic_of=self._topic_to, next_sealed=self._next_sealed
        )
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
            self.closed = not self._opened
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
        too_large = self._too_large(packet)
        if too_large:
            raise LimitExceeded(too_large)
        self._perform(self._sessions.receive(packet, now_s=self._loop.now_s()))
        self._announce(signed)
        self._pump()

    def end_context(self, peer: str, context: bytes) -> None:
        """The exchange with `peer` that `context` stands for is over: its keys are forgotten, its messages end."""
        self._perform(list(self._sessions.drop(peer, context, reason="over")))
        self._greetings.settle((peer, context))
        self._link.remove(peer, f"not acknowledged by {peer} before the exchange was over", context=context)
        self._pump()

    def online(self, name: str) -> bool:
        """Whether `name` has told of its birth, and nobody of its death."""
        return self._members.online(name)

    def peers(self) -> tuple[str, ...]:
        """All that are online, sorted, without ourselves."""
        return tuple(name for name in self._members.names() if name != self.name)

    def unlike(self) -> dict[str, str]:
        """Members that are there, or were, but speak a version of the protocol that does not work with ours: why."""
        return dict(self._members.unlike)

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
        self._outbox.reconnected()
        self._outbox.retain(self._status_topic, self._birth())
        warning = ""
        if self.name == self.server and self._book.signed is not None:
            warning = self._announce(self._book.signed)
        self._handler.on_connection(True, warning)
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
        if not payload:
            return  # nothing: a retained packet that was taken back, or somebody who tries the broker's access rules
        sender = ""
        try:
            origin = read_topic(topic, fleet=self.fleet, server=self.server)
            sender = origin.sender
            if origin.channel == "status":
                self._on_status(sender, payload)
            else:
                self._perform(self._sessions.receive(payload, now_s=self._loop.now_s()), len(payload))
        except RemoteError as error:
            if isinstance(error, ProtocolMismatch):
                self._note_unlike(sender, error)
            self._refuse(sender, error)
            if isinstance(error, SessionError):
                self._answer_unknown_session(sender)
        self._pump()

    # --- what comes in -----------------------------------------------------------------------------------------------

    def _perform(self, effects: list[Effect], nbytes: int = 0) -> None:
        """Do what the session table says. Raises what `Link.receive` raises, after all else is done."""
        fault: RemoteError | None = None
        for effect in effects:
            match effect:
                case Reply(to=to, packet=packet):
                    self._outbox.post(to, packet)
                case Established(session=session):
                    self._up(session)
                case Opened(peer=peer, context=context, plaintext=plaintext):
                    try:
                        self._take(peer, context, plaintext, nbytes)
                    except RemoteError as error:
                        fault = error
                case Lost(peer=peer, context=context):
                    self._link.lane_down(peer, context)
                case Rejected(peer=peer, context=context, code=code, reason=reason):
                    self._link.obstacle(peer, context, f"{peer} refused a session: {reason}")
                    self._refuse(peer, HandshakeError(f"{peer} refused a session: {reason} [{code}]"))
                case Unlike(peer=peer, error=error):
                    self._note_unlike(peer, error)
                    self._refuse(peer, error)
                case RosterOffered(signed=signed):
                    self._follow_roster(signed)
        if fault is not None:
            raise fault

    def _up(self, session: Session) -> None:
        self._members.unlike.pop(session.peer, None)
        self._link.lane_up(
            session.peer,
            session.context,
            peer_boot=session.peer_boot,
            now_s=self._loop.now_s(),
            minor=session.protocol.minor,
        )
        self._greetings.settle((session.peer, session.context))

    def _take(self, peer: str, context: bytes, plaintext: bytes, nbytes: int) -> None:
        """A packet of `peer` was opened, so it is there: if its death was told, that was of another connection."""
        traffic = self.counters.peer(peer)
        traffic.packets_received += 1
        traffic.packet_bytes_received += nbytes
        if not self._link.is_up(peer, context):
            session = self._sessions.established(peer, context)
            if session is not None:
                self._up(session)
        self._link.receive(peer, context, plaintext, self._loop.now_s())

    def _on_status(self, sender: str, payload: bytes) -> None:
        change = self._members.status(sender, payload) if sender != self.name else None
        if change is None:
            return
        name, now_s = change.name, self._loop.now_s()
        for context in self._link.contexts(name):
            session = self._sessions.established(name, context)
            if not change.online:
                self._link.lane_down(name, context)
            elif session is not None and session.peer_boot < change.boot:
                self._perform(list(self._sessions.drop(name, context, reason=f"{name} has restarted")))
            elif session is not None:
                self._up(session)
        if change.online:
            self._greetings.hurry(name, now_s)
        if change.online or change.was_online:
            self._handler.on_presence(name, change.online, change.boot)

    def _note_unlike(self, peer: str, error: ProtocolMismatch) -> None:
        """Verified, but of any age: while the peer is there and understood, it is a packet from before its upgrade."""
        if self.online(peer) or any(self._link.is_up(peer, context) for context in self._link.contexts(peer)):
            return
        self._members.unlike[peer] = str(error)
        for context in self._link.contexts(peer):
            self._link.obstacle(peer, context, str(error))

    def _follow_roster(self, signed: bytes) -> None:
        roster = self._book.require()
        members = {entry.name for entry in roster.entries}
        for peer in self._link.peers():
            if peer not in members:
                self._perform(list(self._sessions.drop(peer, reason="not in the roster")))
                self._link.remove(peer, f"{peer} is not in the roster of epoch {roster.epoch}")
        gone, waiting = self._members.follow(roster)
        if self._connected:
            self._outbox.retain(self._status_topic, self._birth())  # it tells our epoch
        if self.name == self.server:
            self._announce(signed)
        for change in gone:
            self._handler.on_presence(change.name, False, change.boot)
        self._handler.on_roster(roster)
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
        link = self._link
        try:
            while True:
                if link.events:
                    self._tell()
                if self._connected:
                    if self._greetings.waiting:
                        self._greet_who_is_due()
                    self._outbox.publish()
                if not link.events:
                    break
            if self._close_by_s is not None:
                self._closing(self._close_by_s)
        finally:
            self._pumping = False
            self._set_timer()

    def _tell(self) -> None:
        """Hand events to their owners, one by one: if one of them raises, the others are still there."""
        events = self._link.events
        while events:
            event = events.popleft()
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

    def _greet_who_is_due(self) -> None:
        for peer, context in self._greetings.due(self._loop.now_s()):
            if self._link.wants(peer, context):
                self._greet(peer, context)
            else:
                self._greetings.settle((peer, context))

    def _greet(self, peer: str, context: bytes) -> None:
        try:
            self._outbox.post(peer, self._sessions.initiate(peer, context, now_s=self._loop.now_s()))
        except (RosterError, LocalError) as error:  # LocalError: the peer itself may have opened as many as there are
            self._link.obstacle(peer, context, str(error))
        else:
            told = "online" if self.online(peer) else "not seen online"
            unlike = self._members.unlike.get(peer)
            self._link.obstacle(peer, context, unlike or f"no session yet, {peer} is {told}")

    def _next_sealed(self) -> tuple[str, bytes] | None:
        while packet := self._link.poll(self._loop.now_s()):
            peer, context, plaintext = packet
            session = self._sessions.established(peer, context)
            if session is not None:
                return peer, session.seal(plaintext)
            self._link.lane_down(peer, context)  # the roster has changed or expired; a new session sends it again
        return None

    # --- time and the end --------------------------------------------------------------------------------------------

    def _set_timer(self) -> None:
        if self.closed:
            due_s = math.inf
        elif self._link.events:
            due_s = self._loop.now_s()  # a handler has raised; the others are told all the same
        else:
            due_s = self._link.next_deadline_s()
            if self._connected and self._greetings.waiting:
                due_s = min(due_s, self._greetings.next_s())
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

    def _closing(self, by_s: float) -> None:
        """Go on with closing, if it is time."""
        now_s = self._loop.now_s()
        if self._farewell_by_s is None:
            if now_s < by_s and not (self._link.idle and self._outbox.empty):
                return
            self._farewell_by_s = now_s + _FAREWELL_S
        death = self._death(self._transport.connections)
        told = not self._connected or self._outbox.put("", self._status_topic, death, retain=True)
        if not told and now_s < self._farewell_by_s:
            return
        self._connected = False
        self._transport.close()
        for peer in self._link.peers():
            self._link.remove(peer, f"not acknowledged by {peer} before {self.name} closed")
        self.closed = True
        self._tell()

    def _announce(self, signed: bytes) -> str:
        """Publish the roster, now and at the next connections; if the broker won't take it, returns why."""
        packet = roster_packet(signed)
        too_large = self._too_large(packet)
        if self._connected and not too_large:
            self._outbox.retain(roster_topic(self.fleet, self.server), packet)
        return too_large

    def _too_large(self, packet: bytes) -> str:
        limit = self._transport.max_packet_bytes
        if not self._transport.connected or len(packet) <= limit:
            return ""
        return f"the roster has {len(packet)} bytes, the broker takes packets of {limit}: raise its max_packet_size"

    def _topic_to(self, receiver: str) -> str:
        return packet_topic(self.fleet, self.name, receiver, self.server)

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
            protocol=self._protocol,
        )

    def _death(self, connection: int) -> bytes:
        return make_death(
            self._identity,
            fleet=self.fleet,
            name=self.name,
            boot=self.boot,
            connection=connection,
            protocol=self._protocol,
        )
