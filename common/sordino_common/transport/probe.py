"""One short visit to the broker, step by step, to say at which step it fails and what the broker grants.

    resolve -> connect -> tls -> MQTT v5 CONNECT -> SUBSCRIBE -> PUBLISH -> what is delivered to us

Blocking, for commands that diagnose; daemons use `mqtt.py`. It goes under a client id of its own, so that the running
daemon stays connected, and publishes empty packets only, none of them retained: endpoints ignore those.
"""

from __future__ import annotations

import contextlib
import socket
import ssl
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Literal

from paho.mqtt.client import Client, ConnectFlags, DisconnectFlags, MQTTMessage
from paho.mqtt.enums import CallbackAPIVersion, MQTTProtocolVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties
from paho.mqtt.reasoncodes import ReasonCode
from paho.mqtt.subscribeoptions import SubscribeOptions

from sordino_common.transport.dialing import explain, explain_silence
from sordino_common.transport.mqtt_settings import MqttSettings, tls_context

Step = Literal["resolve", "connect", "tls", "mqtt", "visit", "done"]
_FAILURE: Final = 0x80
_SETTLE_S: Final = 0.2  # after the broker has answered everything, what it delivers is on its way already
_PAHO_OK: Final = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Granted:
    """What a broker's CONNACK says (MQTT v5, section 3.2.2.3), with the standard's defaults for the rest."""

    max_packet_bytes: int | None = None
    receive_maximum: int = 65_535
    topic_alias_maximum: int = 0
    maximum_qos: int = 2
    retain_available: bool = True
    wildcards_available: bool = True
    shared_available: bool = True
    session_expiry_s: int = 0
    keepalive_s: int | None = None


@dataclass(slots=True, kw_only=True)
class Visit:
    """`failed`: the step that failed, and `reason` why; "done" if none did. `subscribed`, `published`: by filter or
    topic, empty if granted, else the broker's word. `delivered`: payloads by topic, the last one each; `retained`:
    those that the broker kept."""

    failed: Step = "done"
    reason: str = ""
    addresses: tuple[str, ...] = ()
    tls_version: str = ""
    certificate: bytes | None = None  # the broker's, DER
    granted: Granted | None = None
    subscribed: dict[str, str] = field(default_factory=dict)
    published: dict[str, str] = field(default_factory=dict)
    delivered: dict[str, bytes] = field(default_factory=dict)
    retained: dict[str, bytes] = field(default_factory=dict)


class _Client(Client):
    """paho over a socket that is connected already."""

    def __init__(self, client_id: str, sock: socket.socket) -> None:
        super().__init__(CallbackAPIVersion.VERSION2, client_id=client_id, protocol=MQTTProtocolVersion.MQTTv5)
        self._given = sock

    def _create_socket(self) -> socket.socket:  # pyright: ignore[reportIncompatibleMethodOverride]  # see below
        return self._given  # paho says what it needs of a socket by other names of arguments


def visit_broker(settings: MqttSettings, *, subscribe: Sequence[str] = (), publish: Sequence[str] = ()) -> Visit:
    """Go as far as it goes. Raises `ConfigError` if a file of `settings.tls` can't be used; all else is told."""
    context = tls_context(settings.tls) if settings.tls is not None else None
    visit = Visit()
    deadline_s = time.monotonic() + settings.connect_timeout_s
    sock = _dial(settings, context, visit, deadline_s)
    if sock is None:
        return visit
    with contextlib.closing(sock):
        _converse(settings, sock, visit, subscribe, publish, tls=context is not None)
    return visit


def _dial(
    settings: MqttSettings, context: ssl.SSLContext | None, visit: Visit, deadline_s: float
) -> socket.socket | None:
    host, port = settings.host, settings.port
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        visit.failed = "resolve"
        visit.reason = str(error.strerror if isinstance(error, OSError) else "not a host name")
        return None
    visit.addresses = tuple(dict.fromkeys(str(address[4][0]) for address in found))
    sock: socket.socket | None = None
    for family, kind, protocol, _, address in found:
        candidate = socket.socket(family, kind, protocol)
        candidate.settimeout(max(0.1, deadline_s - time.monotonic()))
        try:
            candidate.connect(address)
        except OSError as error:
            candidate.close()
            visit.reason = "no answer" if isinstance(error, TimeoutError) else str(error.strerror)
        else:
            sock = candidate
            break
    if sock is None:
        visit.failed = "connect"
        return None
    if context is None:
        return sock
    name = (settings.tls.server_name if settings.tls is not None else None) or host
    try:
        wrapped = context.wrap_socket(sock, server_hostname=name)
    except (OSError, ValueError) as error:
        sock.close()
        visit.failed = "tls"
        visit.reason = explain(error) if isinstance(error, OSError) else str(error)
        return None
    visit.tls_version = str(wrapped.version())
    visit.certificate = wrapped.getpeercert(binary_form=True)
    return wrapped


def _converse(
    settings: MqttSettings,
    sock: socket.socket,
    visit: Visit,
    subscribe: Sequence[str],
    publish: Sequence[str],
    *,
    tls: bool,
) -> None:
    client = _Client(f"{settings.client_id}-check", sock)
    talk = _Talk(client, visit, settings.connect_timeout_s)
    if settings.username is not None or settings.password is not None:
        client.username_pw_set(settings.username or "", settings.password)
    properties = Properties(PacketTypes.CONNECT)  # type: ignore[no-untyped-call]  # paho's constructor has no annotations
    properties.MaximumPacketSize = settings.max_inbound_bytes
    try:
        client.connect(settings.host, settings.port, keepalive=60, clean_start=True, properties=properties)
        answered = talk.until(lambda: talk.answer is not None)
        if not answered or talk.answer is None:
            visit.failed = "mqtt"
            visit.reason = explain_silence(talk.error) if tls else "the connection was closed, or nothing was said"
            return
        if talk.answer.value >= _FAILURE:
            visit.failed, visit.reason = "mqtt", talk.answer.getName()
            return
        for topic_filter in subscribe:
            talk.subscribe(topic_filter)
        for topic in publish:
            talk.publish(topic)
        if not talk.until(lambda: not talk.awaited):
            visit.failed = "visit"
            visit.reason = talk.ended or "the broker stopped answering"
            return
        talk.linger(_SETTLE_S)
    except OSError as error:
        visit.failed, visit.reason = "visit", explain(error)
    finally:
        with contextlib.suppress(OSError):
            client.disconnect()
            client.loop(timeout=0.1)


class _Talk:
    """Drives paho's own loop, one step at a time, and notes what is said."""

    def __init__(self, client: _Client, visit: Visit, limit_s: float) -> None:
        self.answer: ReasonCode | None = None
        self.awaited: set[int] = set()
        self.ended = ""
        self.error: OSError | None = None
        self._client = client
        self._visit = visit
        self._limit_s = limit_s
        self._filters: dict[int, str] = {}
        self._topics: dict[int, str] = {}
        client.on_connect = self._connected
        client.on_subscribe = self._subscribed
        client.on_publish = self._published
        client.on_message = self._arrived
        client.on_disconnect = self._disconnected

    def until(self, done: Callable[[], bool]) -> bool:
        """False if the connection ends, or the time does."""
        deadline_s = time.monotonic() + self._limit_s
        while not done():
            left_s = deadline_s - time.monotonic()
            if left_s <= 0 or self._client.loop(timeout=min(0.1, left_s)) != _PAHO_OK:
                return done()
        return True

    def linger(self, seconds: float) -> None:
        deadline_s = time.monotonic() + seconds
        while (left_s := deadline_s - time.monotonic()) > 0 and self._client.loop(timeout=left_s) == _PAHO_OK:
            pass

    def subscribe(self, topic_filter: str) -> None:
        _, mid = self._client.subscribe(topic_filter, options=SubscribeOptions(qos=0))
        if mid is not None:
            self._filters[mid] = topic_filter
            self.awaited.add(mid)

    def publish(self, topic: str) -> None:
        """An empty packet, one at a time: a broker may allow but one unacknowledged."""
        info = self._client.publish(topic, b"", qos=1)
        self._topics[info.mid] = topic
        self.awaited.add(info.mid)
        self.until(lambda: info.mid not in self.awaited)

    def _connected(self, _c: Client, _d: Any, _f: ConnectFlags, code: ReasonCode, told: Properties | None) -> None:
        self.answer = code
        if code.value < _FAILURE:
            self._visit.granted = _granted(told)

    def _subscribed(self, _c: Client, _d: Any, mid: int, codes: list[ReasonCode], _t: Properties | None) -> None:
        self._visit.subscribed[self._filters[mid]] = codes[0].getName() if codes[0].value >= _FAILURE else ""
        self.awaited.discard(mid)

    def _published(self, _c: Client, _d: Any, mid: int, code: ReasonCode, _t: Properties | None) -> None:
        self._visit.published[self._topics[mid]] = code.getName() if code.value >= _FAILURE else ""
        self.awaited.discard(mid)

    def _arrived(self, _c: Client, _d: Any, message: MQTTMessage) -> None:
        with contextlib.suppress(UnicodeDecodeError):
            kept = self._visit.retained if message.retain else self._visit.delivered
            kept[message.topic] = bytes(message.payload)

    def _disconnected(
        self, _c: Client, _d: Any, flags: DisconnectFlags, code: ReasonCode, _t: Properties | None
    ) -> None:
        said = flags.is_disconnect_packet_from_server
        self.ended = f"the broker ended the connection: {code.getName()}" if said else "the connection was lost"


def _granted(told: Properties | None) -> Granted:
    def number(name: str, default: Any) -> Any:
        return getattr(told, name, default)

    return Granted(
        max_packet_bytes=number("MaximumPacketSize", None),
        receive_maximum=number("ReceiveMaximum", 65_535),
        topic_alias_maximum=number("TopicAliasMaximum", 0),
        maximum_qos=number("MaximumQoS", 2),
        retain_available=bool(number("RetainAvailable", 1)),
        wildcards_available=bool(number("WildcardSubscriptionAvailable", 1)),
        shared_available=bool(number("SharedSubscriptionAvailable", 1)),
        session_expiry_s=number("SessionExpiryInterval", 0),
        keepalive_s=number("ServerKeepAlive", None),
    )
