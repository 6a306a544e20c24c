"""`Transport` over MQTT v5: paho's packets and parser, our own event loop, window and reconnection.

paho 2.2 keeps state across reconnects that we can't use: it sends its old queue again with no regard to a window
(`max_inflight_messages` is forgotten) or to the broker's receive maximum. So every connection gets a new paho client,
which is thrown away with its connection. Packets that were unacknowledged then are *not* sent again from here: `Link`
knows better which of them are still wanted.

Packets that the layer above calls `fleeting` go and come with quality of service 0, and, as they are most of the
traffic, round paho (`wire`): a PUBLISH out of its stream or into it. They take no place in the window; what holds them
back is the socket.

paho holds a lock that is not reentrant while it calls back. So its callbacks only note what happened (`_Client.events`)
and we act on that when paho has returned: the layer above may call anything from anywhere.

A packet is acknowledged to the broker after the layer above has taken it.

`connections` counts CONNECT packets sent, even if no CONNACK came: the broker may have taken the will along with it.
"""

from __future__ import annotations

import logging
import random
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

from sordino_common.clock import Timer
from sordino_common.errors import ConfigError, LimitExceeded, LocalError
from sordino_common.lazy import import_lazily
from sordino_common.transport.backoff import Backoff
from sordino_common.transport.base import TransportHandler
from sordino_common.transport.dialing import Dial, explain, explain_silence, see_off
from sordino_common.transport.mqtt_settings import MqttSettings, TlsSettings, tls_context
from sordino_common.transport.reactor import READ, WRITE, Reactor
from sordino_common.transport.subscriptions import Subscriptions
from sordino_common.transport.topic_tree import check_topic, topic_name
from sordino_common.transport.wire import ALERT, Wire, plain_head

# paho asks it for proxies of websockets, which we have none of; with it come email and http.client, a megabyte.
import_lazily("urllib.request")

from paho.mqtt.client import Client, ConnectFlags, DisconnectFlags, MQTTMessage  # noqa: E402
from paho.mqtt.enums import CallbackAPIVersion, MQTTErrorCode, MQTTProtocolVersion  # noqa: E402
from paho.mqtt.packettypes import PacketTypes  # noqa: E402
from paho.mqtt.properties import Properties  # noqa: E402
from paho.mqtt.reasoncodes import ReasonCode  # noqa: E402
from paho.mqtt.subscribeoptions import SubscribeOptions  # noqa: E402

__all__ = ["TAKEN_OVER", "MqttSettings", "MqttTransport", "TlsSettings"]

TAKEN_OVER: Final = "another client uses this client id"

_log = logging.getLogger(__name__)

_HEADER_BYTES: Final = 512  # fixed header 5, packet id 2, topic and response topic about 200 each, correlation 16
_MOST_BYTES: Final = 268_435_460  # MQTT v5, section 2.1.4: a packet's length is a number of 28 bits
_CLOSE_S: Final = 2.0  # `close` waits no longer for the broker to take what was handed over
_BRIEF_S: Final = 10.0
_READ_ROUNDS: Final = 16  # then the other connections get their turn
_FAILURE: Final = 0x80  # MQTT v5, section 2.4: reason codes from here on are failures

# Reason codes after which trying again soon can help: unavailable, busy, shutting down, quota, moved, rate.
_PASSING: Final = frozenset({0x80, 0x83, 0x88, 0x89, 0x8B, 0x8D, 0x93, 0x96, 0x97, 0x98, 0x9C, 0x9F, 0xA0})
_SESSION_TAKEN_OVER: Final = 0x8E


@dataclass(frozen=True, slots=True)
class _Answered:
    """CONNACK."""

    code: ReasonCode
    properties: Properties


@dataclass(frozen=True, slots=True)
class _Granted:
    """SUBACK."""

    mid: int
    codes: list[ReasonCode]


@dataclass(frozen=True, slots=True)
class _Acknowledged:
    """PUBACK."""

    mid: int
    code: ReasonCode


@dataclass(frozen=True, slots=True)
class _Arrived:
    """PUBLISH."""

    message: MQTTMessage


@dataclass(frozen=True, slots=True)
class _Ended:
    """The connection is gone; `code` if the broker said why."""

    code: ReasonCode | None
    properties: Properties | None


class _Client(Client):
    """A paho client for one connection, over a wire that is connected already. Notes what happens in `events`."""

    def __init__(self, client_id: str, wire: Wire) -> None:
        super().__init__(
            CallbackAPIVersion.VERSION2,
            client_id=client_id,
            protocol=MQTTProtocolVersion.MQTTv5,
            reconnect_on_failure=False,
            manual_ack=True,
        )
        self.events: deque[_Answered | _Granted | _Acknowledged | _Arrived | _Ended] = deque()
        self._wire = wire
        self.max_inflight_messages = 0  # no second window and no queue inside paho: ours is the only one
        self.on_connect = self._note_connect
        self.on_subscribe = self._note_subscribe
        self.on_publish = self._note_publish
        self.on_message = self._note_message
        self.on_disconnect = self._note_disconnect
        # With these two set, paho leaves all writing to `loop_write`.
        self.on_socket_register_write = self._note_more
        self.on_socket_unregister_write = self._note_flushed

    def _create_socket(self) -> Wire:
        """paho would connect here, and block; `Dial` has done that without."""
        return self._wire

    def release(self) -> None:
        """Close, and cut the cycles between this object and its callbacks, so that memory is free at once."""
        self._wire.close()
        self.on_connect = self.on_subscribe = self.on_publish = self.on_message = self.on_disconnect = None
        self.on_socket_register_write = self.on_socket_unregister_write = None
        self.events.clear()

    def _note_connect(self, _c: Client, _d: Any, _f: ConnectFlags, code: ReasonCode, told: Properties | None) -> None:
        self.events.append(_Answered(code, told or _properties(PacketTypes.CONNACK)))

    def _note_subscribe(self, _c: Client, _d: Any, mid: int, codes: list[ReasonCode], _t: Properties | None) -> None:
        self.events.append(_Granted(mid, codes))

    def _note_publish(self, _c: Client, _d: Any, mid: int, code: ReasonCode, _t: Properties | None) -> None:
        self.events.append(_Acknowledged(mid, code))

    def _note_message(self, _c: Client, _d: Any, message: MQTTMessage) -> None:
        self.events.append(_Arrived(message))

    def _note_disconnect(
        self, _c: Client, _d: Any, flags: DisconnectFlags, code: ReasonCode, told: Properties | None
    ) -> None:
        said = flags.is_disconnect_packet_from_server
        self.events.append(_Ended(code if said else None, told if said else None))

    def _note_more(self, _c: Client, _d: Any, _sock: object) -> None:
        self._wire.want_write(True)

    def _note_flushed(self, _c: Client, _d: Any, _sock: object) -> None:
        self._wire.want_write(False)


class MqttTransport:
    """One client of the broker. After `close` or `kill` the handler hears nothing more.

    `on_disconnected` is also told each failed attempt to connect, with its reason."""

    def __init__(self, settings: MqttSettings, reactor: Reactor, *, draw: random.Random | None = None) -> None:
        if not settings.client_id:
            raise LocalError("MqttTransport: settings.client_id is empty")
        self._settings = settings
        self._reactor = reactor
        self._context = tls_context(settings.tls) if settings.tls is not None else None
        self._where = f"{settings.host}:{settings.port}"
        self._handler: TransportHandler | None = None
        self._will: Callable[[int], tuple[str, bytes]] | None = None
        self._opened = False
        self._filters = Subscriptions(self._unsubscribe)
        self._backoff = Backoff(
            least_s=settings.reconnect_least_s,
            most_s=settings.reconnect_most_s,
            refused_s=settings.refused_s,
            draw=draw or random.SystemRandom(),
        )
        self._attempts = 0
        self._connections = 0
        self._dial: Dial | None = None
        self._client: _Client | None = None
        self._wire: Wire | None = None
        self._timer: Timer | None = None  # the next attempt, the limit of this one, or the keep-alive
        self._connected = False
        self._stands_since_s = 0.0
        self._awaited: set[int] = set()  # SUBSCRIBE packets without SUBACK, while connecting
        self._pending: set[int] = set()  # PUBLISH packets without PUBACK
        self._was_full = False
        self._brief_ones = 0
        self._progress_s = 0.0
        self._window = settings.window
        self._max_packet_bytes = settings.max_packet_bytes

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
        return len(self._pending)

    def open(self, handler: TransportHandler, *, will: Callable[[int], tuple[str, bytes]] | None = None) -> None:
        if self._opened:
            raise LocalError(f"MqttTransport {self._settings.client_id}: opened twice")
        self._opened = True
        self._handler, self._will = handler, will
        self._timer = self._reactor.call_at(self._reactor.now_s(), self._attempt)

    def close(self) -> None:
        """Disconnect in order. Waits, `_CLOSE_S` at most, until the broker has read all that was handed over."""
        client, wire = self._client, self._wire
        self._handler = None
        if client is not None and wire is not None and client.is_connected():
            client.disconnect()
            see_off(
                wire,
                want_write=lambda: wire.blocked or client.want_write(),
                write=lambda: client.loop_write() == MQTTErrorCode.MQTT_ERR_SUCCESS,
                limit_s=_CLOSE_S,
            )
        self._tear_down()

    def kill(self) -> None:
        """Drop the connection without a word, as a crash would: the broker publishes the will. For tests of that."""
        self._handler = None
        self._tear_down()

    def subscribe(self, topic_filter: str) -> Callable[[], None]:
        end = self._filters.hold(topic_filter)
        client = self._client
        if client is not None and client.is_connected():
            self._send_subscribe(client, [topic_filter])
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
        if fleeting and (retain or response_topic is not None or correlation is not None):
            raise LocalError(
                f"MqttTransport {self._settings.client_id}: a fleeting packet is not retained, nor answered"
            )
        name, payload_bytes = topic_name(topic), len(payload)
        names_bytes = len(name)
        if response_topic is not None or correlation is not None:
            names_bytes += len((response_topic or "").encode()) + len(correlation or b"")
        room_bytes = self._max_packet_bytes - max(0, names_bytes + 32 - _HEADER_BYTES)
        if payload_bytes > room_bytes:
            raise LimitExceeded(
                f"{self._settings.client_id}: a packet of {payload_bytes} bytes on {topic[:200]}; "
                f"the limit is {room_bytes}"
            )
        client, wire = self._client, self._wire
        if not self._connected or client is None or wire is None:
            return False
        if fleeting:
            if wire.busy and not self._make_way(client, wire):
                self._was_full = True
                return False
            wire.offer(plain_head(name, payload_bytes) + payload)
            if wire.ended:  # the connection broke: nobody else might tell
                self._reactor.call_at(self._reactor.now_s(), partial(self._read_on, client))
            return True
        if len(self._pending) >= self._window:
            self._was_full = True
            return False
        properties = None
        if response_topic is not None or correlation is not None:
            properties = _properties(PacketTypes.PUBLISH)
            if response_topic is not None:
                properties.ResponseTopic = response_topic
            if correlation is not None:
                properties.CorrelationData = correlation
        info = client.publish(topic, payload, qos=1, retain=retain, properties=properties)
        self._pending.add(info.mid)
        self._was_full = len(self._pending) >= self._window
        return True

    def _make_way(self, client: _Client, wire: Wire) -> bool:
        """Whether what paho has to write could all be written, so that a plain packet may follow."""
        if client.want_write() and not wire.blocked:
            client.loop_write()  # in order
            if client.events:  # the connection broke; not from inside: the caller is in the middle of something
                self._reactor.call_at(self._reactor.now_s(), partial(self._act, client))
        return not wire.blocked and not client.want_write()

    # Connecting.

    def _attempt(self) -> None:
        settings = self._settings
        if settings.tls is not None and self._attempts:
            try:  # certificates are renewed while we run
                self._context = tls_context(settings.tls)
            except ConfigError as error:
                _log.warning("%s: the certificates can't be read again, the old ones stay: %s", self._where, error)
        self._timer = self._reactor.call_at(self._reactor.now_s() + settings.connect_timeout_s, self._too_late)
        dial = self._dial = Dial(
            self._reactor,
            settings.host,
            settings.port,
            context=self._context,
            server_name=settings.tls.server_name if settings.tls is not None else None,
            first=self._attempts,
            most_bytes=settings.max_inbound_bytes,
            on_ready=self._dialled,
            on_failed=lambda reason, refused: self._fail(reason, refused=refused),
        )
        self._attempts += 1
        dial.start()

    def _dialled(self, wire: Wire) -> None:
        settings = self._settings
        self._dial = None
        client = self._client = _Client(settings.client_id, wire)
        self._wire = wire
        self._connections += 1
        if self._will is not None:
            topic, payload = self._will(self._connections)
            check_topic(topic)
            client.will_set(topic, payload, qos=1, retain=True)
        if settings.username is not None or settings.password is not None:
            client.username_pw_set(settings.username or "", settings.password)
        properties = _properties(PacketTypes.CONNECT)
        properties.MaximumPacketSize = settings.max_inbound_bytes
        # Clean start and no session expiry: what a broker would keep for us while we are away, `Link` repeats.
        client.connect_async(
            settings.host, settings.port, keepalive=settings.keepalive_s, clean_start=True, properties=properties
        )
        wire.watch(partial(self._ready, client))
        client.reconnect()

    def _too_late(self) -> None:
        phase = "no connection" if self._dial is not None else "the broker's answer is missing"
        self._fail(f"{self._where}: {phase} after {self._settings.connect_timeout_s:g} s", refused=False)

    def _answered(self, client: _Client, event: _Answered) -> None:
        if event.code.value >= _FAILURE:
            self._fail(
                f"{self._where} refuses the connection: {_words(event.code, event.properties)}",
                refused=event.code.value not in _PASSING,
            )
            return
        theirs = event.properties
        self._window = min(self._settings.window, max(1, getattr(theirs, "ReceiveMaximum", 65_535)))
        room_bytes = getattr(theirs, "MaximumPacketSize", _MOST_BYTES) - _HEADER_BYTES
        self._max_packet_bytes = max(0, min(self._settings.max_packet_bytes, room_bytes))
        filters = list(self._filters)
        if filters:
            self._send_subscribe(client, filters)
        else:
            self._stand()

    def _stand(self) -> None:
        """The broker knows us and our subscriptions."""
        self._connected = True
        self._stands_since_s = self._progress_s = self._reactor.now_s()
        self._cancel_timer()
        self._keep_alive()
        if self._handler is not None:
            self._handler.on_connected()

    def _fail(self, reason: str, *, refused: bool) -> None:
        """The connection, or the attempt at one, is over: tear down, and come back later."""
        if self._connected:
            self._backoff.stood(self._reactor.now_s() - self._stands_since_s)
        self._tear_down()
        handler = self._handler
        if handler is None:
            return
        delay_s = self._backoff.next_s(refused=refused)
        self._timer = self._reactor.call_at(self._reactor.now_s() + delay_s, self._attempt)
        handler.on_disconnected(reason)

    def _tear_down(self) -> None:
        self._cancel_timer()
        if self._dial is not None:
            self._dial.abort()
            self._dial = None
        client, self._client, self._wire = self._client, None, None
        self._connected = False
        self._was_full = False
        self._awaited.clear()
        self._pending.clear()
        if client is not None:
            client.release()

    # While connected.

    def _ready(self, client: _Client, ready: int) -> None:
        """The socket has something to read, or room to write."""
        self._progress_s = self._reactor.now_s()
        if ready & READ:
            self._read(client)
        wire = self._wire
        if ready & WRITE and self._client is client and wire is not None:
            wire.flush()
            if not wire.blocked:
                client.loop_write()
                self._act(client)
                self._tell_room(client)

    def _read(self, client: _Client) -> None:
        """Take what the socket has, a packet at a time, `_READ_ROUNDS` at most; then the others get their turn."""
        wire = self._wire
        assert wire is not None
        wire.fill()
        over = False
        try:
            for _ in range(_READ_ROUNDS):
                plain = wire.next_plain()
                if plain is not None:
                    name, payload = plain
                    try:
                        topic = name.decode()
                    except UnicodeDecodeError:
                        self._drop_unnamed()
                    else:
                        if self._handler is not None:
                            self._handler.on_packet(topic, payload, False)
                    over = wire.drained
                elif wire.waits_for_paho:
                    client.loop_read()
                    self._act(client)
                elif wire.pending():
                    wire.fill()
                else:
                    over = True
                if over or self._client is not client:
                    break
        finally:
            if not over and self._client is client:  # no selector reports what was read already
                self._reactor.call_at(self._reactor.now_s(), partial(self._read_on, client))

    def _read_on(self, client: _Client) -> None:
        if self._client is client:
            self._ready(client, READ)

    def _tell_room(self, client: _Client) -> None:
        """The socket took everything: what was refused for its sake may come again."""
        wire = self._wire
        if self._client is not client or wire is None or not self._was_full or wire.blocked or client.want_write():
            return
        if len(self._pending) < self._window:
            self._was_full = False
            if self._handler is not None:
                self._handler.on_writable()

    def _act(self, client: _Client) -> None:
        """Do what follows from what paho has noted. Any of it may end the connection."""
        while client.events and self._client is client:
            event = client.events.popleft()
            match event:
                case _Arrived(message):
                    self._arrived(client, message)
                case _Acknowledged():
                    self._acknowledged(event)
                case _Granted():
                    self._granted(event)
                case _Answered():
                    self._answered(client, event)
                case _Ended():
                    self._ended(event)

    def _arrived(self, client: _Client, message: MQTTMessage) -> None:
        try:
            topic = message.topic
        except UnicodeDecodeError:
            self._drop_unnamed()
        else:
            if self._handler is not None:
                self._handler.on_packet(topic, bytes(message.payload), bool(message.retain))
        if self._client is client and message.qos > 0:
            client.ack(message.mid, message.qos)

    def _drop_unnamed(self) -> None:
        _log.warning("%s: a packet on a topic that is not UTF-8 was dropped", self._settings.client_id)

    def _acknowledged(self, event: _Acknowledged) -> None:
        self._pending.discard(event.mid)
        if event.code.value >= _FAILURE:
            # Lost for certain. The window must not be lost with it, and `Link` will try again.
            _log.warning("%s: the broker refused a packet: %s", self._settings.client_id, event.code.getName())
        if self._was_full and len(self._pending) < self._window:
            self._was_full = False
            if self._handler is not None:
                self._handler.on_writable()

    def _granted(self, event: _Granted) -> None:
        failed = [code for code in event.codes if code.value >= _FAILURE]
        if failed:
            self._fail(f"{self._where} refuses a subscription: {failed[0].getName()}", refused=True)
            return
        self._awaited.discard(event.mid)
        if not self._connected and not self._awaited:
            self._stand()

    def _ended(self, event: _Ended) -> None:
        if event.code is not None:
            if event.code.value == _SESSION_TAKEN_OVER:
                reason = f"{TAKEN_OVER} ({self._settings.client_id}) at {self._where}"
            else:
                reason = f"{self._where} ended the connection: {_words(event.code, event.properties)}"
            self._fail(reason, refused=event.code.value not in _PASSING and event.code.value >= _FAILURE)
            return
        error = self._wire.error if self._wire is not None else None
        # A broker that wants a client certificate says so only now (TLS 1.3, RFC 8446 section 4.4.2.4).
        if self._context is not None and not self._connected:
            why = f" before the broker answered: {explain_silence(error)}"
        else:
            why = f": {explain(error)}" if error is not None else ""
        # mosquitto 2.0 does not say that it hands a session over: two clients with one id just cut each other off.
        brief = self._connected and self._reactor.now_s() - self._stands_since_s < _BRIEF_S
        self._brief_ones = self._brief_ones + 1 if brief else 0
        if self._brief_ones >= 2:
            why += f" ({self._brief_ones} times in a row soon after connecting: is it that {TAKEN_OVER}?)"
        alert = not self._connected and error is not None and ALERT in (getattr(error, "reason", None) or "")
        self._fail(f"the connection to {self._where} was lost{why}", refused=alert)

    def _keep_alive(self) -> None:
        """Ping when there is silence; give up when nothing moves. The broker allows 1.5 times the keep-alive."""
        client = self._client
        assert client is not None
        keepalive_s = client.keepalive
        if self._pending or client.want_write() or (self._wire is not None and self._wire.blocked):
            # paho counts only a PINGRESP as a sign of life, and that waits behind megabytes on a slow line. Here, any
            # byte that moves is one.
            if self._reactor.now_s() - self._progress_s > 1.5 * keepalive_s:
                self._fail(f"{self._where}: nothing moved for {1.5 * keepalive_s:g} s", refused=False)
                return
        else:
            client.loop_misc()
            self._act(client)
        if self._client is client:
            # A third: a ping then leaves at 1.33 times the keep-alive at the latest.
            self._timer = self._reactor.call_at(self._reactor.now_s() + keepalive_s / 3, self._keep_alive)

    def _send_subscribe(self, client: _Client, filters: list[str]) -> None:
        code, mid = client.subscribe([(topic_filter, SubscribeOptions(qos=1)) for topic_filter in filters])
        if mid is None:
            raise LocalError(f"MqttTransport: paho does not take the subscription to {filters}: {code!r}")
        if not self._connected:
            self._awaited.add(mid)

    def _unsubscribe(self, topic_filter: str) -> None:
        if self._client is not None and self._client.is_connected():
            self._client.unsubscribe(topic_filter)

    def _cancel_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


def _properties(packet_type: int) -> Properties:
    return Properties(packet_type)  # type: ignore[no-untyped-call]  # paho's constructor has no annotations


def _words(code: ReasonCode, properties: Properties | None) -> str:
    """What the broker gave as its reason. Its text is cut short: it comes from outside."""
    text = getattr(properties, "ReasonString", "")
    hint = "; check username and password" if code.value in (0x86, 0x87, 0x8C) else ""
    return f"{code.getName()}{hint}" + (f" ({str(text)[:200]!r})" if text else "")
