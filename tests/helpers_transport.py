"""The laws of a transport, once, for every implementation.

A law is a function of a `Harness`: a broker, parties on it, and a way to let time pass until something has happened.
Nothing is proved by waiting for a while: that a packet does *not* come is shown by one that was sent after it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import pytest

from helpers_mosquitto import Mosquitto
from sordino_common.clock import VirtualLoop
from sordino_common.errors import LimitExceeded, LocalError
from sordino_common.transport.base import Transport
from sordino_common.transport.memory import BROKER, MemoryBroker, MemoryTransport, Publication
from sordino_common.transport.mqtt import TAKEN_OVER, MqttSettings, MqttTransport
from sordino_common.transport.reactor import Reactor

LIMIT_S = 20.0


@dataclass(slots=True)
class Recorder:
    """A handler that keeps what it hears, and does what a law hangs onto it."""

    connects: int = 0
    reasons: list[str] = field(default_factory=list)
    packets: list[tuple[str, bytes, bool]] = field(default_factory=list)
    writables: int = 0
    then: dict[str, Callable[[], None]] = field(default_factory=dict)

    def on_connected(self) -> None:
        self.connects += 1
        self.then.get("connected", _nothing)()

    def on_disconnected(self, reason: str) -> None:
        self.reasons.append(reason)
        self.then.get("disconnected", _nothing)()

    def on_packet(self, topic: str, payload: bytes, retained: bool) -> None:
        assert type(payload) is bytes
        self.packets.append((topic, payload, retained))
        self.then.get("packet", _nothing)()

    def on_writable(self) -> None:
        self.writables += 1
        self.then.get("writable", _nothing)()

    @property
    def payloads(self) -> list[bytes]:
        return [payload for _, payload, _ in self.packets]

    @property
    def events(self) -> int:
        return self.connects + len(self.reasons) + len(self.packets) + self.writables


def _nothing() -> None:
    return


@dataclass(frozen=True, slots=True)
class Observed:
    topic: str
    payload: bytes
    response_topic: str | None
    correlation: bytes | None


class Harness(Protocol):
    names_takeover: bool  # mosquitto 2.0 closes the older connection without a word

    def transport(self, client_id: str, *, window: int = 8, max_packet_bytes: int = 100_000) -> Transport: ...

    def run_until(self, done: Callable[[], bool]) -> None:
        """Let time pass until `done()`; the test fails if that takes longer than `LIMIT_S`."""
        ...

    def lose(self, transport: Transport) -> None:
        """Cut the connection; both sides notice, and the transport may come back."""
        ...

    def kill(self, transport: Transport) -> None:
        """The party dies without a word."""
        ...

    def stop_broker(self) -> None: ...

    def start_broker(self) -> None: ...

    def slow(self, client_id: str) -> Transport:
        """A transport that reads nothing between `stall` and `resume`."""
        ...

    def stall(self) -> None: ...

    def resume(self) -> None: ...

    def observe(self, topic: str) -> list[Observed]:
        """The list to which packets on `topic` will be added, as MQTT carries them."""
        ...


class MemoryHarness:
    """`MemoryBroker` on virtual time; `doubled` delivers each packet twice, `latency_s` later."""

    names_takeover = True

    def __init__(self, *, latency_s: float = 0.0, doubled: bool = False) -> None:
        self.loop = VirtualLoop()
        self.latency_s = latency_s
        self.doubled = doubled
        self.stalled = False
        self.broker = MemoryBroker(self.loop, network=self if latency_s or doubled else None)

    def deliveries(self, sender: str, receiver: str, nbytes: int, now_s: float) -> list[float]:
        assert BROKER in (sender, receiver)
        assert nbytes > 0
        if self.stalled and "slow" in (sender, receiver):
            return [now_s + 5.0]
        return [now_s + self.latency_s] * (2 if self.doubled else 1)

    def transport(self, client_id: str, *, window: int = 8, max_packet_bytes: int = 100_000) -> MemoryTransport:
        return MemoryTransport(self.broker, self.loop, client_id, window=window, max_packet_bytes=max_packet_bytes)

    def run_until(self, done: Callable[[], bool]) -> None:
        assert self.loop.run_until(done, deadline_s=self.loop.now_s() + LIMIT_S)

    def lose(self, transport: Transport) -> None:
        assert isinstance(transport, MemoryTransport)
        self.broker.disconnect(transport.client_id)

    def kill(self, transport: Transport) -> None:
        assert isinstance(transport, MemoryTransport)
        transport.kill(noticed_after_s=1.0)

    def stop_broker(self) -> None:
        self.broker.stop()

    def start_broker(self) -> None:
        self.broker.start()

    def slow(self, client_id: str) -> MemoryTransport:
        return self.transport(client_id)

    def stall(self) -> None:
        self.stalled = True

    def resume(self) -> None:
        self.stalled = False

    def observe(self, topic: str) -> list[Observed]:
        seen: list[Observed] = []

        def look(packet: Publication) -> None:
            if packet.topic == topic:
                seen.append(Observed(packet.topic, packet.payload, packet.response_topic, packet.correlation))

        self.broker.tap(look)
        return seen


class MqttHarness:
    """A real mosquitto, in real time. The slow party has a reactor of its own, which stands still while stalled."""

    names_takeover = False

    def __init__(self, broker: Mosquitto) -> None:
        self.broker = broker
        self.reactor = Reactor()
        self.slow_reactor = Reactor()
        self.stalled = False
        self.opened: list[MqttTransport] = []
        self.observers: list[Any] = []

    def settings(self, client_id: str, **changes: Any) -> MqttSettings:
        base: dict[str, Any] = {
            "host": "127.0.0.1",
            "port": self.broker.port,
            "client_id": client_id,
            "window": 8,
            "max_packet_bytes": 100_000,
            "connect_timeout_s": 5.0,
            "reconnect_least_s": 0.02,
            "reconnect_most_s": 0.2,
        }
        return MqttSettings(**{**base, **changes})

    def make(self, client_id: str, *, reactor: Reactor | None = None, **changes: Any) -> MqttTransport:
        transport = MqttTransport(self.settings(client_id, **changes), reactor or self.reactor)
        self.opened.append(transport)
        return transport

    def transport(self, client_id: str, *, window: int = 8, max_packet_bytes: int = 100_000) -> MqttTransport:
        return self.make(client_id, window=window, max_packet_bytes=max_packet_bytes)

    def run_until(self, done: Callable[[], bool]) -> None:
        deadline_s = self.reactor.now_s() + LIMIT_S
        while not done():
            assert self.reactor.now_s() < deadline_s, f"not within {LIMIT_S} s; the broker says:\n{self.broker.log}"
            if self.stalled:
                self.reactor.run_once(0.02)
            else:  # two to serve by turns
                self.reactor.run_once(0.001)
                self.slow_reactor.run_once(0.0)

    def lose(self, transport: Transport) -> None:
        assert isinstance(transport, MqttTransport)
        assert transport._wire is not None
        with transport._wire.twin() as twin:
            twin.shutdown(2)

    def kill(self, transport: Transport) -> None:
        assert isinstance(transport, MqttTransport)
        transport.kill()

    def stop_broker(self) -> None:
        self.broker.stop()

    def start_broker(self) -> None:
        self.broker.start()

    def slow(self, client_id: str) -> MqttTransport:
        return self.make(client_id, reactor=self.slow_reactor)

    def stall(self) -> None:
        self.stalled = True

    def resume(self) -> None:
        self.stalled = False

    def observe(self, topic: str) -> list[Observed]:
        """By a plain paho client in its own thread: what another program on the same broker sees."""
        from paho.mqtt.client import Client
        from paho.mqtt.enums import CallbackAPIVersion, MQTTProtocolVersion

        seen: list[Observed] = []
        ready = threading.Event()
        client = Client(CallbackAPIVersion.VERSION2, client_id="observer", protocol=MQTTProtocolVersion.MQTTv5)

        def look(_client: Any, _data: Any, message: Any) -> None:
            told = message.properties
            seen.append(
                Observed(
                    message.topic,
                    bytes(message.payload),
                    getattr(told, "ResponseTopic", None),
                    getattr(told, "CorrelationData", None),
                )
            )

        client.on_connect = lambda *_: client.subscribe(topic, qos=1)
        client.on_subscribe = lambda *_: ready.set()
        client.on_message = look
        client.connect("127.0.0.1", self.broker.port)
        client.loop_start()
        self.observers.append(client)
        assert ready.wait(LIMIT_S)
        return seen

    def close(self) -> None:
        for client in self.observers:
            client.disconnect()
            client.loop_stop()
        for transport in self.opened:
            transport.close()
        self.reactor.close()
        self.slow_reactor.close()


@contextmanager
def mqtt_harness(broker: Mosquitto) -> Iterator[MqttHarness]:
    harness = MqttHarness(broker)
    try:
        yield harness
    finally:
        harness.close()


# The laws.


def _pair(harness: Harness, *filters: str, window: int = 8) -> tuple[Transport, Recorder, Transport, Recorder]:
    """A sender, and a receiver that is subscribed to `filters`; both connected."""
    sender, heard_back = harness.transport("sender", window=window), Recorder()
    receiver, heard = harness.transport("receiver"), Recorder()
    for topic_filter in filters:
        receiver.subscribe(topic_filter)
    sender.open(heard_back)
    receiver.open(heard)
    harness.run_until(lambda: sender.connected and receiver.connected)
    return sender, heard_back, receiver, heard


def _send(harness: Harness, transport: Transport, topic: str, payload: bytes, **more: Any) -> None:
    """Publish, waiting for room."""
    harness.run_until(lambda: transport.publish(topic, payload, **more))


def law_connects_once_and_counts(harness: Harness) -> None:
    transport, heard = harness.transport("a"), Recorder()
    assert not transport.connected
    assert transport.connections == 0
    transport.open(heard)
    assert not transport.connected, "open does not block"
    harness.run_until(lambda: heard.connects == 1)
    assert transport.connected
    assert transport.connections == 1
    assert not heard.reasons
    with pytest.raises(LocalError, match="twice"):
        transport.open(heard)


def law_delivers_at_least_once(harness: Harness) -> None:
    sender, _, _, heard = _pair(harness, "x/y")
    sent = [bytes([index]) * index for index in range(60)]
    for payload in sent:
        _send(harness, sender, "x/y", payload)
    harness.run_until(lambda: set(heard.payloads) >= set(sent))
    assert set(heard.payloads) == set(sent)
    assert {(topic, retained) for topic, _, retained in heard.packets} == {("x/y", False)}


def law_carries_fleeting_packets(harness: Harness) -> None:
    """Many more than the window, among others, and to who is slow: nothing is lost while connections last."""
    sender, _, _, heard = _pair(harness, "x", window=1)
    slow, heard_slowly = harness.slow("slow"), Recorder()
    slow.subscribe("x")
    slow.open(heard_slowly)
    harness.run_until(lambda: slow.connected)
    harness.stall()
    sent = [b"%03d" % index + bytes(index % 7 * 5000) for index in range(200)]
    for index, payload in enumerate(sent):
        _send(harness, sender, "x", payload, fleeting=index % 10 != 0)
    harness.run_until(lambda: set(heard.payloads) >= set(sent))
    harness.resume()
    harness.run_until(lambda: set(heard_slowly.payloads) >= set(sent))
    assert {(topic, retained) for topic, _, retained in heard.packets} == {("x", False)}
    for more in ({"retain": True}, {"response_topic": "y"}, {"correlation": b"1"}):
        with pytest.raises(LocalError, match="fleeting"):
            sender.publish("x", b"1", fleeting=True, **more)


def law_lets_a_handler_raise_at_a_fleeting_packet(harness: Harness) -> None:
    sender, _, _, heard = _pair(harness, "x")

    def fail() -> None:
        heard.then.clear()
        raise RuntimeError("the handler's own")

    heard.then = {"packet": fail}
    for payload in (b"1", b"2", b"3"):
        _send(harness, sender, "x", payload, fleeting=True)
    with pytest.raises(RuntimeError, match="the handler's own"):
        harness.run_until(lambda: False)
    harness.run_until(lambda: {b"2", b"3"} <= set(heard.payloads))


def law_matches_wildcards(harness: Harness) -> None:
    sender, _, _, heard = _pair(harness, "a/+/c", "b/#", "last")
    for topic in ("a/1/c", "a/1/d", "a/1/2/c", "a/c", "b", "b/1", "b/1/2", "c", "a/2/c"):
        _send(harness, sender, topic, b"-")
    _send(harness, sender, "last", b"-")
    harness.run_until(lambda: any(topic == "last" for topic, _, _ in heard.packets))
    assert {topic for topic, _, _ in heard.packets} == {"a/1/c", "a/2/c", "b", "b/1", "b/1/2", "last"}


def law_unsubscribes_when_the_last_holder_ends(harness: Harness) -> None:
    sender, _, receiver, heard = _pair(harness, "last")
    first, second = receiver.subscribe("x"), receiver.subscribe("x")
    harness.run_until(lambda: sender.publish("x", b"probe") and b"probe" in heard.payloads)
    first()
    first()  # once more counts for nothing
    _send(harness, sender, "x", b"held")
    harness.run_until(lambda: b"held" in heard.payloads)
    second()
    # Told by somebody else's packet that comes back round: UNSUBSCRIBE stood before it in the receiver's own line.
    _send(harness, receiver, "last", b"turn")
    harness.run_until(lambda: b"turn" in heard.payloads)
    _send(harness, sender, "x", b"gone")
    _send(harness, sender, "last", b"end")
    harness.run_until(lambda: b"end" in heard.payloads)
    assert b"gone" not in heard.payloads


def law_gives_a_shared_packet_to_one_of_the_group(harness: Harness) -> None:
    """Each packet to one member of each group, and to everybody else; a member that is gone leaves its part to the
    others. By the standard (MQTT v5, section 4.8.2) it begins without retained packets; mosquitto 2.0 sends them."""
    sender, _, _, everybody = _pair(harness, "f/+/status")
    _send(harness, sender, "f/x/status", b"before", retain=True)
    harness.run_until(lambda: b"before" in everybody.payloads)
    members: dict[str, tuple[Transport, Recorder]] = {}
    for name, group in (("ada", "g"), ("bob", "g"), ("cyd", "h")):
        transport, heard = members[name] = harness.transport(name), Recorder()
        transport.subscribe(f"$share/{group}/f/+/status")
        transport.open(heard)
    harness.run_until(lambda: all(transport.connected for transport, _ in members.values()))
    ada, bob, cyd = (heard for _, heard in members.values())
    sent = [b"n%d" % number for number in range(20)]
    for payload in sent:
        _send(harness, sender, "f/x/status", payload)
    harness.run_until(lambda: all(set(sent) <= set(parts) for parts in (ada.payloads + bob.payloads, cyd.payloads)))
    harness.run_until(lambda: set(sent) <= set(everybody.payloads))
    twice = set(ada.payloads) & set(bob.payloads) & set(sent)
    assert not twice or getattr(harness, "doubled", False), f"each to one of them, but {twice}"
    assert ada.payloads and bob.payloads, "to both in turn"
    if isinstance(harness, MemoryHarness):
        assert b"before" not in ada.payloads + bob.payloads + cyd.payloads
    members["ada"][0].close()
    # When the broker has noticed is not told: until then a packet may be lost with its member, as any subscriber's.
    for number in range(1000):
        if b"last" in bob.payloads:
            break
        _send(harness, sender, "f/x/status", b"last")
        harness.run_until(lambda seen=number + 1: everybody.payloads.count(b"last") >= seen)  # type: ignore[misc]
    assert b"last" in bob.payloads


def law_keeps_retained_packets(harness: Harness) -> None:
    sender, _, _, heard = _pair(harness, "r/#")
    _send(harness, sender, "r/a", b"old", retain=True)
    _send(harness, sender, "r/a", b"new", retain=True)
    _send(harness, sender, "r/b", b"passing")
    _send(harness, sender, "r/c", b"cleared", retain=True)
    _send(harness, sender, "r/c", b"", retain=True)
    harness.run_until(lambda: ("r/c", b"", False) in heard.packets)
    assert not any(retained for _, _, retained in heard.packets), "who was there hears it as it happens"
    late, heard_late = harness.transport("late"), Recorder()
    late.subscribe("r/#")
    late.open(heard_late)
    harness.run_until(lambda: late.connected)
    _send(harness, sender, "r/end", b"end")
    harness.run_until(lambda: b"end" in heard_late.payloads)
    assert set(heard_late.packets) == {("r/a", b"new", True), ("r/end", b"end", False)}


def law_publishes_the_will_of_who_dies(harness: Harness) -> None:
    watcher, heard = harness.transport("watcher"), Recorder()
    watcher.subscribe("status/+")
    watcher.open(heard)
    mortal = harness.transport("mortal")
    mortal_heard = Recorder()
    mortal.open(mortal_heard, will=lambda connection: ("status/mortal", b"dead %d" % connection))
    harness.run_until(lambda: watcher.connected and mortal.connected)
    harness.lose(mortal)
    harness.run_until(lambda: mortal.connections == 2 and mortal.connected and b"dead 1" in heard.payloads)
    assert mortal_heard.reasons
    events = mortal_heard.events
    harness.kill(mortal)
    harness.run_until(lambda: b"dead 2" in heard.payloads)
    assert mortal_heard.events == events, "the dead hear nothing"
    late, heard_late = harness.transport("late"), Recorder()
    late.subscribe("status/mortal")
    late.open(heard_late)
    harness.run_until(lambda: ("status/mortal", b"dead 2", True) in heard_late.packets)


def law_keeps_the_will_of_who_closes(harness: Harness) -> None:
    watcher, heard = harness.transport("watcher"), Recorder()
    watcher.subscribe("status/#")
    watcher.open(heard)
    for turn in range(5):
        party, party_heard = harness.transport("party"), Recorder()
        party.open(party_heard, will=lambda connection: ("status/party", b"dead"))
        harness.run_until(lambda party=party: watcher.connected and party.connected)
        assert party.publish("status/party", b"goodbye %d" % turn, retain=True)
        events = party_heard.events
        party.close()
        party.close()
        assert not party.connected
        assert not party.publish("status/party", b"late")
        # What was handed over before `close` arrives; a will would have come by the time of the last packet.
        harness.run_until(lambda turn=turn: b"goodbye %d" % turn in heard.payloads)
        assert party_heard.events == events
    _send(harness, watcher, "status/end", b"end")
    harness.run_until(lambda: b"end" in heard.payloads)
    assert b"dead" not in heard.payloads
    assert b"late" not in heard.payloads


def law_closes_what_never_stood(harness: Harness) -> None:
    transport, heard = harness.transport("a"), Recorder()
    transport.close()
    opened = harness.transport("b")
    opened.open(heard)
    opened.close()
    other = harness.transport("c")
    other.open(Recorder())
    harness.run_until(lambda: other.connected)
    assert heard.events == 0


def law_takes_no_more_than_the_window(harness: Harness) -> None:
    sender, heard_back, _, heard = _pair(harness, "x", window=3)
    assert sender.window == 3
    taken = 0
    while sender.publish("x", b"%d" % taken):
        taken += 1
        assert taken <= 3
    assert taken == 3
    assert heard_back.writables == 0
    harness.run_until(lambda: heard_back.writables >= 1)
    assert sender.publish("x", b"again")
    harness.run_until(lambda: b"again" in heard.payloads)


def law_says_when_there_is_room_again(harness: Harness) -> None:
    """A sender that only ever reacts to `on_connected` and `on_writable` gets everything through."""
    receiver, heard = harness.transport("receiver"), Recorder()
    receiver.subscribe("x")
    receiver.open(heard)
    harness.run_until(lambda: receiver.connected)
    sender, heard_back = harness.transport("sender", window=3), Recorder()
    left = [b"%d" % index for index in range(100)]
    all_of_them = set(left)
    most = 0

    def pump() -> None:
        nonlocal most
        while left and sender.publish("x", left[-1]):
            left.pop()
            most = max(most, sender.unacknowledged)  # type: ignore[attr-defined]  # beyond the protocol, for this

    heard_back.then = {"connected": pump, "writable": pump}
    sender.open(heard_back)
    harness.run_until(lambda: set(heard.payloads) == all_of_them)
    assert most == 3


def law_refuses_what_is_too_large(harness: Harness) -> None:
    sender, _, _, heard = _pair(harness, "x")
    limit = sender.max_packet_bytes
    assert 1024 <= limit <= 100_000
    for transport in (sender, harness.transport("not opened")):
        with pytest.raises(LimitExceeded, match=str(transport.max_packet_bytes)):
            transport.publish("x", bytes(transport.max_packet_bytes + 1))
    assert sender.publish("x", bytes(limit))
    harness.run_until(lambda: bytes(limit) in heard.payloads)


def law_refuses_what_is_no_topic(harness: Harness) -> None:
    sender, *_ = _pair(harness)
    for topic in ("", "a/+", "#", "a\0b"):
        with pytest.raises(LocalError):
            sender.publish(topic, b"")
    for topic_filter in ("", "a/#/b", "a+", "#a"):
        with pytest.raises(LocalError):
            sender.subscribe(topic_filter)


def law_takes_nothing_while_not_connected(harness: Harness) -> None:
    transport, heard = harness.transport("a"), Recorder()
    assert not transport.publish("x", b"1")
    transport.open(heard)
    assert not transport.publish("x", b"2")
    harness.run_until(lambda: heard.connects == 1)
    harness.stop_broker()
    harness.run_until(lambda: len(heard.reasons) >= 2)  # lost, and then at least one attempt in vain
    assert not transport.connected
    assert not transport.publish("x", b"3")
    assert all(heard.reasons)


def law_comes_back_after_a_restart(harness: Harness) -> None:
    sender, heard_back, receiver, heard = _pair(harness, "x/#", "y", window=2)
    while sender.publish("x/1", b"before"):
        pass
    harness.stop_broker()
    harness.run_until(lambda: bool(heard.reasons and heard_back.reasons))
    receiver.subscribe("z")
    harness.start_broker()
    harness.run_until(lambda: heard.connects == 2 and heard_back.connects == 2)
    assert receiver.connections >= 2
    for topic in ("x/2", "y", "z"):  # the window of 2 that was full before is free
        _send(harness, sender, topic, topic.encode())
    harness.run_until(lambda: {b"x/2", b"y", b"z"} <= set(heard.payloads))


def law_carries_response_topic_and_correlation(harness: Harness) -> None:
    seen = harness.observe("ask")
    sender, *_ = _pair(harness)
    _send(harness, sender, "ask", b"1", response_topic="answer/here", correlation=bytes(range(16)))
    _send(harness, sender, "ask", b"2")
    harness.run_until(lambda: {packet.payload for packet in seen} == {b"1", b"2"})
    first = next(packet for packet in seen if packet.payload == b"1")
    second = next(packet for packet in seen if packet.payload == b"2")
    assert first == Observed("ask", b"1", "answer/here", bytes(range(16)))
    assert second == Observed("ask", b"2", None, None)


def law_lets_a_slow_subscriber_be_slow(harness: Harness) -> None:
    sender, _, _, heard = _pair(harness, "x")
    slow, heard_slowly = harness.slow("slow"), Recorder()
    slow.subscribe("x")
    slow.open(heard_slowly)
    harness.run_until(lambda: slow.connected)
    harness.stall()
    sent = [b"%03d" % index + bytes(20_000) for index in range(200)]
    for payload in sent:
        _send(harness, sender, "x", payload)
    harness.run_until(lambda: set(heard.payloads) >= set(sent))
    assert len(heard_slowly.packets) < len(sent)
    harness.resume()
    harness.run_until(lambda: set(heard_slowly.payloads) >= set(sent))
    assert not heard_slowly.reasons


def law_yields_to_another_client_of_the_same_name(harness: Harness) -> None:
    first, heard_first = harness.transport("same"), Recorder()
    first.open(heard_first)
    harness.run_until(lambda: first.connected)
    second, heard_second = harness.transport("same"), Recorder()
    second.subscribe("x")
    second.open(heard_second)
    harness.run_until(lambda: second.connected and bool(heard_first.reasons))
    if harness.names_takeover:
        assert TAKEN_OVER in heard_first.reasons[0]
        assert not first.connected
    first.close()
    harness.run_until(lambda: second.connected and second.publish("x", b"mine") and b"mine" in heard_second.payloads)


def law_lets_a_handler_call_anything(harness: Harness) -> None:
    sender, _, _, _ = _pair(harness)
    transport, heard = harness.transport("a"), Recorder()
    ends: list[Callable[[], None]] = []

    def connected() -> None:
        ends.append(transport.subscribe("x"))
        assert transport.publish("y", b"from on_connected")

    def packet() -> None:
        assert transport.publish("y", b"from on_packet")
        ends.append(transport.subscribe("z"))
        ends[0]()
        transport.close()
        assert not transport.connected

    heard.then = {"connected": connected, "packet": packet}
    seen = harness.observe("y")
    transport.open(heard)
    harness.run_until(lambda: heard.connects == 1)
    harness.run_until(lambda: sender.publish("x", b"go") and bool(heard.packets))
    harness.run_until(lambda: {packet.payload for packet in seen} >= {b"from on_connected", b"from on_packet"})
    assert len(heard.packets) == 1, "nothing comes after close"


def law_lets_a_handler_raise(harness: Harness) -> None:
    """What a handler raises reaches who runs the loop, and the transport works on."""
    sender, _, _, heard = _pair(harness, "x")

    def fail() -> None:
        heard.then.clear()
        raise RuntimeError("the handler's own")

    heard.then = {"packet": fail}
    _send(harness, sender, "x", b"1")
    with pytest.raises(RuntimeError, match="the handler's own"):
        harness.run_until(lambda: False)
    _send(harness, sender, "x", b"2")
    harness.run_until(lambda: b"2" in heard.payloads)


LAWS: dict[str, Callable[[Harness], None]] = {
    name.removeprefix("law_"): law for name, law in sorted(globals().items()) if name.startswith("law_")
}
