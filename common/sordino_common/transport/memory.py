"""An MQTT broker in memory, on a `Loop`: for tests, and for the simulator's virtual clock. Deterministic.

It keeps what the layers above rely on: topic filters with + and #, retained messages, wills, quality of service 1
with acknowledgements that free the sender's window, sessions that are taken over, restarts. When each packet arrives
is asked of a `NetworkModel`, once per hop; without one, packets arrive at once and in order.

Connecting takes two round trips, as in MQTT: CONNECT and CONNACK, SUBSCRIBE and SUBACK. Packets that a client had
under way when its connection was *lost* are lost; those it had under way when it *closed* arrive. Not modelled: the
broker's queue limit per subscriber, and the acknowledgements of subscribers (4 bytes each).
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Final, Protocol

from sordino_common.clock import Loop, Timer
from sordino_common.errors import LimitExceeded, LocalError
from sordino_common.transport.backoff import Backoff
from sordino_common.transport.base import TransportHandler
from sordino_common.transport.subscriptions import Subscriptions
from sordino_common.transport.topic_tree import TopicTree, check_topic, split_shared

BROKER: Final = "broker"  # the broker's id in `NetworkModel.deliveries`

_CONTROL_BYTES: Final = 64  # CONNECT, SUBSCRIBE and their answers, about
_ACK_BYTES: Final = 4  # PUBACK
_PUBLISH_BYTES: Final = 10  # fixed header, lengths, packet id, property length
_CONTROL_RETRY_S: Final = 1.0  # TCP's first retransmission timeout, RFC 6298 section 2

TAKEN_OVER: Final = "another client uses this client id"


class NetworkModel(Protocol):
    """When does a packet arrive? Asked once per hop, client to broker or broker to client."""

    def deliveries(self, sender: str, receiver: str, nbytes: int, now_s: float) -> list[float]:
        """Absolute times of arrival of a packet handed over at `now_s`: [] is lost, two entries are a duplicate.

        A lost publish is lost for good (a network that repeats lost packets answers with a later time instead); its
        acknowledgement still comes, because a window that leaks is no MQTT. Other packets are repeated until one
        arrives."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Publication:
    """One packet at the broker, with what MQTT v5 carries beside the payload."""

    sender: str
    topic: str
    payload: bytes
    retain: bool
    response_topic: str | None = None
    correlation: bytes | None = None

    @property
    def nbytes(self) -> int:
        properties = len(self.response_topic or "") + len(self.correlation or b"")
        return _PUBLISH_BYTES + len(self.topic) + len(self.payload) + properties


class _Session:
    """One connection as the broker sees it. `lost`: ended without DISCONNECT."""

    __slots__ = ("client", "filters", "live", "lost", "transport", "will")

    def __init__(self, transport: MemoryTransport, will: Publication | None) -> None:
        self.client = transport.client_id
        self.transport = transport
        self.will = will
        self.filters: dict[str, None] = {}
        self.live = True
        self.lost = False


class MemoryBroker:
    """The broker. Runs from the start; `stop` and `start` are a restart that keeps retained messages."""

    def __init__(self, loop: Loop, *, network: NetworkModel | None = None) -> None:
        self._loop = loop
        self._network = network
        self._sessions: dict[str, _Session] = {}
        self._subscriptions: TopicTree[dict[_Session, None]] = TopicTree()
        self._shared: TopicTree[dict[str, dict[_Session, None]]] = TopicTree()  # filter -> group -> who is next first
        self._retained: TopicTree[Publication] = TopicTree()
        self._taps: list[Callable[[Publication], None]] = []
        self.running = True

    @property
    def clients(self) -> tuple[str, ...]:
        """Ids of the clients that are connected, in the order in which they came."""
        return tuple(self._sessions)

    def tap(self, observer: Callable[[Publication], None]) -> None:
        """`observer` sees every packet that the broker accepts, wills included, before it is passed on."""
        self._taps.append(observer)

    def stop(self) -> None:
        """Every connection is lost, as when a broker is killed: no will is published."""
        self.running = False
        for session in tuple(self._sessions.values()):
            self._end(session, lost=True)
            session.transport._lost(session, "the broker stopped", refused=False)

    def start(self) -> None:
        self.running = True

    def disconnect(self, client_id: str, reason: str = "the connection was lost") -> None:
        """Cut one client's connection: its will is published, and it will connect again. Unknown ids: nothing."""
        session = self._sessions.get(client_id)
        if session is not None:
            self._cut(session, reason, refused=False)

    # What transports send, on arrival.

    def connect(self, session: _Session) -> None:
        """CONNECT has arrived."""
        older = self._sessions.get(session.client)
        if not self.running or not session.live:
            return
        if older is not None:
            self._cut(older, TAKEN_OVER, refused=True)
        self._sessions[session.client] = session

    def subscribe(self, session: _Session, topic_filter: str, granted: Callable[[], None] | None) -> None:
        """SUBSCRIBE has arrived: SUBACK (`granted`) goes back, then the retained messages that match."""
        if self._sessions.get(session.client) is not session:
            return
        session.filters[topic_filter] = None
        group, shared = split_shared(topic_filter)
        if group is None:
            self._subscriptions.setdefault(topic_filter, {})[session] = None
        else:
            self._shared.setdefault(shared, {}).setdefault(group, {})[session] = None
        if granted is not None:
            self.hop(BROKER, session.client, _CONTROL_BYTES, granted)
        if group is not None:
            return  # MQTT v5, section 4.8.2: a shared subscription begins without the retained messages
        for publication in self._retained.matched_by(topic_filter):
            self._forward(session, publication, retained=True)

    def unsubscribe(self, session: _Session, topic_filter: str) -> None:
        """UNSUBSCRIBE has arrived."""
        if session.filters.pop(topic_filter, 0) is None:
            self._drop_filter(session, topic_filter)

    def publish(self, session: _Session, publication: Publication, acknowledge: bool) -> None:
        """PUBLISH has arrived."""
        if session.lost or not self.running:
            return
        self._accept(publication)
        if acknowledge:
            self.acknowledge(session)

    def acknowledge(self, session: _Session) -> None:
        """Send PUBACK to `session`."""
        self.hop(BROKER, session.client, _ACK_BYTES, partial(session.transport._acknowledged, session))

    def leave(self, session: _Session) -> None:
        """DISCONNECT has arrived: the will is forgotten."""
        if self._sessions.get(session.client) is session:
            self._end(session, lost=False)

    def lose(self, session: _Session, reason: str) -> None:
        """The broker notices that a client is gone: its will is published."""
        if self._sessions.get(session.client) is session:
            self._cut(session, reason, refused=False)

    def hop(self, sender: str, receiver: str, nbytes: int, arrive: Callable[[], None]) -> None:
        """Call `arrive` when a packet that may not be lost or doubled gets there."""
        if self._network is None:
            self._loop.call_at(self._loop.now_s(), arrive)
            return
        times_s = self._network.deliveries(sender, receiver, nbytes, self._loop.now_s())
        if times_s:
            self._loop.call_at(times_s[0], arrive)
        else:
            again = partial(self.hop, sender, receiver, nbytes, arrive)
            self._loop.call_at(self._loop.now_s() + _CONTROL_RETRY_S, again)

    def times_s(self, sender: str, receiver: str, nbytes: int) -> list[float]:
        """When a PUBLISH arrives."""
        now_s = self._loop.now_s()
        return [now_s] if self._network is None else self._network.deliveries(sender, receiver, nbytes, now_s)

    def _accept(self, publication: Publication) -> None:
        for observer in self._taps:
            observer(publication)
        if publication.retain:
            if publication.payload:
                self._retained.put(publication.topic, publication)
            else:  # MQTT v5, section 3.3.1.3: an empty retained message clears the topic
                self._retained.remove(publication.topic)
        receivers: dict[_Session, None] = {}
        for sessions in self._subscriptions.matching(publication.topic):
            receivers.update(sessions)
        for groups in self._shared.matching(publication.topic):
            for members in groups.values():
                chosen = next(iter(members))
                members[chosen] = members.pop(chosen)  # the next one is another's
                receivers[chosen] = None
        for session in receivers:
            self._forward(session, publication, retained=False)

    def _forward(self, session: _Session, publication: Publication, *, retained: bool) -> None:
        arrive = partial(session.transport._arrived, session, publication, retained)
        for when_s in self.times_s(BROKER, session.client, publication.nbytes):
            self._loop.call_at(when_s, arrive)

    def _cut(self, session: _Session, reason: str, *, refused: bool) -> None:
        self._end(session, lost=True)
        if session.will is not None and self.running:
            self._accept(session.will)
        session.transport._lost(session, reason, refused=refused)

    def _end(self, session: _Session, *, lost: bool) -> None:
        session.live, session.lost = False, lost
        if self._sessions.get(session.client) is session:
            del self._sessions[session.client]
        for topic_filter in session.filters:
            self._drop_filter(session, topic_filter)
        session.filters.clear()

    def _drop_filter(self, session: _Session, topic_filter: str) -> None:
        group, shared = split_shared(topic_filter)
        groups = None if group is None else self._shared.get(shared)
        if group is not None and groups is not None:
            groups.get(group, {}).pop(session, None)
            if not groups.get(group):
                groups.pop(group, None)
            if not groups:
                self._shared.remove(shared)
            return
        sessions = self._subscriptions.get(topic_filter)
        if sessions is not None:
            sessions.pop(session, None)
            if not sessions:
                self._subscriptions.remove(topic_filter)


class MemoryTransport:
    """`Transport` to a `MemoryBroker`. After `close` or `kill` the handler hears nothing more."""

    def __init__(
        self,
        broker: MemoryBroker,
        loop: Loop,
        client_id: str,
        *,
        window: int = 16,
        max_packet_bytes: int = 1_000_000,
        reconnect_least_s: float = 1.0,
        reconnect_most_s: float = 60.0,
    ) -> None:
        if not client_id or client_id == BROKER:
            raise LocalError(f"MemoryTransport: client id {client_id!r}; expected one that is neither empty nor BROKER")
        if window < 1 or max_packet_bytes < 1:
            raise LocalError("MemoryTransport: window and max_packet_bytes are at least 1")
        self.client_id = client_id
        self._broker = broker
        self._loop = loop
        self._window = window
        self._max_packet_bytes = max_packet_bytes
        self._handler: TransportHandler | None = None
        self._will: Callable[[int], tuple[str, bytes]] | None = None
        self._filters = Subscriptions(self._unsubscribe)
        self._session: _Session | None = None
        self._connected = False
        self._stands_since_s = 0.0
        self._connections = 0
        self._unacknowledged = 0
        self._timer: Timer | None = None
        # Seeded by the id: a run of the simulator is the same run again, and the agents still differ.
        self._backoff = Backoff(
            least_s=reconnect_least_s,
            most_s=reconnect_most_s,
            refused_s=15 * reconnect_least_s,
            draw=random.Random(client_id),
        )

    @property
    def connected(self) -> bool:
        return self._connected

    @property
    def connections(self) -> int:
        return self._connections

    @property
    def max_packet_bytes(self) -> int:
        return self._max_packet_bytes

    @property
    def window(self) -> int:
        return self._window

    @property
    def unacknowledged(self) -> int:
        """Packets handed over that the broker has not acknowledged."""
        return self._unacknowledged

    def open(self, handler: TransportHandler, *, will: Callable[[int], tuple[str, bytes]] | None = None) -> None:
        if self._handler is not None:
            raise LocalError(f"MemoryTransport {self.client_id}: opened twice")
        self._handler, self._will = handler, will
        self._timer = self._loop.call_at(self._loop.now_s(), self._connect)

    def close(self) -> None:
        session = self._forget()
        if session is not None:
            self._broker.hop(self.client_id, BROKER, _CONTROL_BYTES, partial(self._broker.leave, session))

    def kill(self, *, noticed_after_s: float = 0.0) -> None:
        """Die without a word: the broker notices after `noticed_after_s` (the keep-alive) and publishes the will."""
        session = self._forget()
        if session is not None:
            session.lost = True  # what is under way does not arrive
            lose = partial(self._broker.lose, session, "the keep-alive was missed")
            self._loop.call_at(self._loop.now_s() + noticed_after_s, lose)

    def subscribe(self, topic_filter: str) -> Callable[[], None]:
        end = self._filters.hold(topic_filter)
        if self._connected:
            assert self._session is not None
            self._send_subscribe(self._session, topic_filter, None)
        return end

    def publish(
        self,
        topic: str,
        payload: bytes,
        *,
        retain: bool = False,
        fleeting: bool = False,
        response_topic: str | None = None,
        correlation: bytes | None = None,
    ) -> bool:
        """A fleeting packet is treated as any other: what is lost here is the `NetworkModel`'s affair."""
        if fleeting and (retain or response_topic is not None or correlation is not None):
            raise LocalError(f"{self.client_id}: a fleeting packet is not retained, nor answered")
        check_topic(topic)
        if len(payload) > self._max_packet_bytes:
            raise LimitExceeded(
                f"{self.client_id}: a packet of {len(payload)} bytes on {topic}; the limit is {self._max_packet_bytes}"
            )
        if not self._connected or self._unacknowledged >= self._window:
            return False
        session = self._session
        assert session is not None
        publication = Publication(
            sender=self.client_id,
            topic=topic,
            payload=payload,
            retain=retain,
            response_topic=response_topic,
            correlation=correlation,
        )
        self._unacknowledged += 1
        times_s = self._broker.times_s(self.client_id, BROKER, publication.nbytes)
        for copy, when_s in enumerate(times_s):
            self._loop.call_at(when_s, partial(self._broker.publish, session, publication, copy == 0))
        if not times_s:
            self._broker.acknowledge(session)
        return True

    def _connect(self) -> None:
        self._timer = None
        if not self._broker.running:
            self._fail("the broker is not there", refused=False)
            return
        self._connections += 1
        will = None
        if self._will is not None:
            topic, payload = self._will(self._connections)
            check_topic(topic)
            will = Publication(sender=self.client_id, topic=topic, payload=payload, retain=True)
        session = self._session = _Session(self, will)
        self._broker.hop(self.client_id, BROKER, _CONTROL_BYTES, partial(self._connect_arrived, session))

    def _connect_arrived(self, session: _Session) -> None:
        if self._session is not session:
            return
        if not self._broker.running:
            self._lost(session, "the broker is not there", refused=False)
            return
        self._broker.connect(session)
        self._broker.hop(BROKER, self.client_id, _CONTROL_BYTES, partial(self._accepted, session))

    def _accepted(self, session: _Session) -> None:
        """CONNACK: subscribe, and count the connection as standing when all is granted."""
        if self._session is not session:
            return
        missing = set(self._filters)
        if not missing:
            self._stand(session)

        def granted(topic_filter: str) -> None:
            missing.discard(topic_filter)
            if not missing and not self._connected:
                self._stand(session)

        for topic_filter in self._filters:
            self._send_subscribe(session, topic_filter, partial(granted, topic_filter))

    def _stand(self, session: _Session) -> None:
        if self._session is not session:
            return
        assert self._handler is not None
        for topic_filter in self._filters:
            if topic_filter not in session.filters:  # asked for while we were connecting
                self._send_subscribe(session, topic_filter, None)
        self._connected = True
        self._stands_since_s = self._loop.now_s()
        self._unacknowledged = 0
        self._handler.on_connected()

    def _send_subscribe(self, session: _Session, topic_filter: str, granted: Callable[[], None] | None) -> None:
        arrive = partial(self._broker.subscribe, session, topic_filter, granted)
        self._broker.hop(self.client_id, BROKER, _CONTROL_BYTES, arrive)

    def _unsubscribe(self, topic_filter: str) -> None:
        if self._session is not None:
            arrive = partial(self._broker.unsubscribe, self._session, topic_filter)
            self._broker.hop(self.client_id, BROKER, _CONTROL_BYTES, arrive)

    # What the broker tells.

    def _arrived(self, session: _Session, publication: Publication, retained: bool) -> None:
        if self._session is session and self._handler is not None:
            self._handler.on_packet(publication.topic, publication.payload, retained)

    def _acknowledged(self, session: _Session) -> None:
        if self._session is not session or not self._connected:
            return
        was_full = self._unacknowledged >= self._window
        self._unacknowledged -= 1
        if was_full and self._handler is not None:
            self._handler.on_writable()

    def _lost(self, session: _Session, reason: str, *, refused: bool) -> None:
        if self._session is session:
            if self._connected:
                self._backoff.stood(self._loop.now_s() - self._stands_since_s)
            self._session = None
            self._connected = False
            self._unacknowledged = 0
            self._fail(reason, refused=refused)

    def _fail(self, reason: str, *, refused: bool) -> None:
        when_s = self._loop.now_s() + self._backoff.next_s(refused=refused)
        self._timer = self._loop.call_at(when_s, self._connect)
        if self._handler is not None:
            self._handler.on_disconnected(reason)

    def _forget(self) -> _Session | None:
        """No more callbacks, no more attempts. Returns the session that was open."""
        session, self._session = self._session, None
        self._handler = None
        self._connected = False
        self._unacknowledged = 0
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        return session
