"""What only MQTT has: limits that the broker sets, refusals, silence, keep-alive, bytes that are no packets."""

from __future__ import annotations

import random
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from helpers_fake_broker import (
    CONNECT,
    DISCONNECT,
    PINGREQ,
    PINGRESP,
    PUBACK,
    PUBLISH,
    SUBACK,
    SUBSCRIBE,
    FakeBroker,
    connack,
    packet,
    puback,
    publish,
)
from helpers_mosquitto import Mosquitto, find_program, free_port
from helpers_transport import Recorder, mqtt_harness
from sordino_common.errors import LimitExceeded, LocalError
from sordino_common.transport.mqtt import TAKEN_OVER, MqttSettings, MqttTransport
from sordino_common.transport.reactor import Reactor

LIMIT_S = 20.0


class Bench:
    """A reactor, a fake broker on it, and transports to that broker."""

    def __init__(self) -> None:
        self.reactor = Reactor()
        self.broker = FakeBroker(self.reactor)
        self.opened: list[MqttTransport] = []

    def make(self, **changes: Any) -> tuple[MqttTransport, Recorder]:
        base: dict[str, Any] = {
            "host": "127.0.0.1",
            "port": self.broker.port,
            "client_id": "a",
            "reconnect_least_s": 0.01,
            "reconnect_most_s": 0.05,
        }
        transport = MqttTransport(MqttSettings(**{**base, **changes}), self.reactor)
        self.opened.append(transport)
        return transport, Recorder()

    def run_until(self, done: Callable[[], bool]) -> None:
        assert self.reactor.run_until(done, deadline_s=self.reactor.now_s() + LIMIT_S)

    def close(self) -> None:
        for transport in self.opened:
            transport.kill()
        self.broker.close()
        self.reactor.close()


@pytest.fixture
def bench() -> Iterator[Bench]:
    bench = Bench()
    yield bench
    bench.close()


def test_the_broker_sets_window_and_packet_size(bench: Bench) -> None:
    bench.broker.answers[CONNECT] = lambda body: connack(receive_maximum=3, maximum_packet=20_000)
    transport, heard = bench.make(window=16)
    assert transport.window == 16
    transport.open(heard)
    bench.run_until(lambda: transport.connected)
    assert transport.window == 3
    assert 18_000 < transport.max_packet_bytes < 20_000
    with pytest.raises(LimitExceeded):
        transport.publish("x", bytes(19_900))
    with pytest.raises(LimitExceeded):  # what the names take, the payload can't have
        transport.publish("x" * 1000, bytes(transport.max_packet_bytes))
    taken = [transport.publish("x", bytes(transport.max_packet_bytes)) for _ in range(5)]
    assert taken == [True, True, True, False, False]
    bench.run_until(lambda: len(bench.broker.kinds(PUBLISH)) == 3)
    assert all(len(body) + 5 <= 20_000 for body in bench.broker.kinds(PUBLISH))
    assert heard.writables == 0
    bench.broker.say(puback(bench.broker.kinds(PUBLISH)[1]))
    bench.run_until(lambda: heard.writables == 1)
    assert transport.unacknowledged == 2


def test_a_reconnection_frees_the_window_and_repeats_nothing(bench: Bench) -> None:
    """paho alone would send the three again, all at once."""
    transport, heard = bench.make(window=3)
    transport.open(heard)
    for turn in range(1, 4):
        bench.run_until(lambda turn=turn: heard.connects == turn)
        assert [transport.publish("x", b"%d" % turn) for _ in range(4)] == [True, True, True, False]
        bench.run_until(lambda turn=turn: len(bench.broker.kinds(PUBLISH)) == 3 * turn)
        bench.broker.say(packet(DISCONNECT, b"\x8b"))
        bench.run_until(lambda turn=turn: len(heard.reasons) == turn)
        assert transport.unacknowledged == 0
    assert "Server shutting down" in heard.reasons[0]
    assert sorted(body[-1:] for body in bench.broker.kinds(PUBLISH)) == [b"1"] * 3 + [b"2"] * 3 + [b"3"] * 3


def test_a_refused_packet_frees_the_window(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    bench.broker.answers[PUBLISH] = lambda body: puback(body, 0x97)
    transport, heard = bench.make(window=1)
    transport.open(heard)
    bench.run_until(lambda: transport.connected)
    assert transport.publish("x", b"secret")
    bench.run_until(lambda: heard.writables == 1)
    assert "Quota exceeded" in caplog.text
    assert "secret" not in caplog.text


def test_a_packet_is_acknowledged_after_the_handler_has_taken_it(bench: Bench) -> None:
    transport, heard = bench.make()
    transport.open(heard)
    bench.run_until(lambda: transport.connected)

    def fail() -> None:
        raise RuntimeError("not taken")

    heard.then = {"packet": fail}
    bench.broker.say(publish(b"x", b"1", mid=7))
    with pytest.raises(RuntimeError, match="not taken"):
        bench.run_until(lambda: False)
    heard.then = {}
    bench.broker.say(publish(b"x", b"2", mid=8))
    bench.run_until(lambda: bool(bench.broker.kinds(PUBACK)))
    assert [body[:2] for body in bench.broker.kinds(PUBACK)] == [b"\0\x08"]


@pytest.mark.parametrize(
    ("code", "words", "slow"),
    [(0x86, "username and password", True), (0x87, "Not authorized", True), (0x88, "Server unavailable", False)],
)
def test_a_refusal_is_named_and_slows_down_if_it_will_last(bench: Bench, code: int, words: str, slow: bool) -> None:
    bench.broker.answers[CONNECT] = lambda body: connack(code)
    transport, heard = bench.make(refused_s=30.0)
    transport.open(heard)
    bench.run_until(lambda: len(heard.reasons) == 1)
    assert words in heard.reasons[0]
    assert str(bench.broker.port) in heard.reasons[0]
    other, heard_other = bench.make(client_id="b")
    other.open(heard_other)
    bench.run_until(lambda: len(heard_other.reasons) >= 1 and (slow or len(heard.reasons) >= 3))
    assert slow == (len(heard.reasons) == 1)


def test_a_refused_subscription_ends_the_connection(bench: Bench) -> None:
    bench.broker.answers[SUBSCRIBE] = lambda body: packet(SUBACK, body[:2] + b"\0\x87")
    transport, heard = bench.make()
    transport.subscribe("x")
    transport.open(heard)
    bench.run_until(lambda: len(heard.reasons) == 1)
    assert "refuses a subscription: Not authorized" in heard.reasons[0]
    assert heard.connects == 0


def test_takeover_is_named_and_slow(bench: Bench) -> None:
    transport, heard = bench.make(refused_s=30.0)
    transport.open(heard)
    bench.run_until(lambda: transport.connected)
    began_s = bench.reactor.now_s()
    bench.broker.say(packet(DISCONNECT, b"\x8e"))
    bench.run_until(lambda: len(heard.reasons) == 1)
    assert TAKEN_OVER in heard.reasons[0]
    assert transport._timer is not None
    upcoming_s = min(when_s for when_s, _, timer in bench.reactor._heap if timer is transport._timer)
    assert upcoming_s - began_s >= 15.0  # half of refused_s, by the jitter


def test_being_cut_off_again_and_again_asks_for_the_likely_cause(bench: Bench) -> None:
    transport, heard = bench.make()
    transport.open(heard)
    for turn in range(1, 3):
        bench.run_until(lambda turn=turn: heard.connects == turn)
        for client in tuple(bench.broker._clients):
            bench.broker._end(client)
        bench.run_until(lambda turn=turn: len(heard.reasons) == turn)
    assert TAKEN_OVER not in heard.reasons[0]
    assert TAKEN_OVER in heard.reasons[1]


@pytest.mark.parametrize("silent", [CONNECT, SUBSCRIBE])
def test_connecting_has_a_time_limit(bench: Bench, silent: int) -> None:
    bench.broker.answers[silent] = lambda body: b""
    transport, heard = bench.make(connect_timeout_s=0.1)
    transport.subscribe("x")
    wills: list[int] = []

    def will(connection: int) -> tuple[str, bytes]:
        wills.append(connection)
        return "status/a", b"dead"

    transport.open(heard, will=will)
    bench.run_until(lambda: len(heard.reasons) == 2)
    assert "after 0.1 s" in heard.reasons[0]
    assert heard.connects == 0
    assert wills[:2] == [1, 2], "the broker may have taken the first will: its number is not used again"


@pytest.mark.timeout(60)
@pytest.mark.parametrize("fleeting", [True, False])
def test_closing_ends_although_the_broker_hung_up_unnoticed(bench: Bench, fleeting: bool) -> None:
    """A process that was busy for longer than the keep-alive finds its connection gone only by what it then writes."""
    transport, heard = bench.make()
    transport.open(heard)
    bench.run_until(lambda: heard.connects == 1)
    bench.broker.hang_up()
    for _ in range(4):  # the first is written, the second meets the reset
        transport.publish("x", b"1", fleeting=fleeting)
    transport.close()
    assert heard.reasons == []


def test_a_broker_that_answers_no_ping_is_given_up(bench: Bench) -> None:
    transport, heard = bench.make(keepalive_s=1)
    transport.open(heard)
    bench.run_until(lambda: len(heard.reasons) == 1)
    assert bench.broker.kinds(PINGREQ)
    # ... and so is one that stops acknowledging; the ping of an idle connection is answered.
    bench.broker.answers[PINGREQ] = lambda body: packet(PINGRESP, b"")
    bench.run_until(lambda: heard.connects == 2)
    assert transport.publish("x", b"1")
    bench.run_until(lambda: len(heard.reasons) == 2)
    assert "nothing moved" in heard.reasons[1]


@pytest.mark.parametrize("seed", range(20))
def test_bytes_that_are_no_packets_only_cost_the_connection(bench: Bench, seed: int) -> None:
    draw = random.Random(seed)
    good = [
        publish(b"x", b"abc"),
        puback(b"\0\1x\0\1"),
        packet(SUBACK, b"\0\1\0\1"),
        packet(DISCONNECT, b"\x8b"),
        connack(),
    ]

    def noise(body: bytes) -> bytes:
        data = bytearray(draw.choice(good) if draw.random() < 0.8 else draw.randbytes(draw.randrange(1, 40)))
        for _ in range(draw.randrange(1, 4)):
            data[draw.randrange(len(data))] = draw.randrange(256)
        return (connack() if draw.random() < 0.8 else b"") + bytes(data)

    transport, heard = bench.make(connect_timeout_s=0.02)
    transport.subscribe("x")
    transport.open(heard)
    for _ in range(10):
        bench.broker.answers[CONNECT] = noise
        known = bench.broker.accepted
        bench.run_until(lambda known=known: bench.broker.accepted > known or transport.connected)
        for client in tuple(bench.broker._clients):
            bench.broker._end(client)
        bench.run_until(lambda: not transport.connected)
    bench.broker.answers[CONNECT] = lambda body: connack()
    heard.connects = 0
    bench.run_until(lambda: heard.connects >= 1)


def test_an_absent_broker_is_named() -> None:
    port = free_port()
    with Reactor() as reactor:
        settings = MqttSettings(
            host="127.0.0.1", port=port, client_id="a", reconnect_least_s=0.01, reconnect_most_s=0.05
        )
        transport, heard = MqttTransport(settings, reactor), Recorder()
        transport.open(heard)
        assert reactor.run_until(lambda: len(heard.reasons) == 3, deadline_s=reactor.now_s() + LIMIT_S)
        assert f"127.0.0.1:{port}: Connection refused" in heard.reasons[0]
        assert transport.connections == 0
        transport.close()


def test_a_name_that_does_not_resolve_is_named() -> None:
    with Reactor() as reactor:
        transport, heard = MqttTransport(MqttSettings(host="no..name", client_id="a"), reactor), Recorder()
        transport.open(heard)
        assert reactor.run_until(lambda: bool(heard.reasons), deadline_s=reactor.now_s() + LIMIT_S)
        assert "no..name: the name can't be resolved" in heard.reasons[0]
        transport.close()


def test_settings_hide_the_password_and_need_a_client_id() -> None:
    settings = MqttSettings(host="h", username="u", password="hush")
    assert "hush" not in repr(settings)
    assert "u@h:1883" in str(settings)
    with Reactor() as reactor, pytest.raises(LocalError, match="client_id"):
        MqttTransport(settings, reactor)


@pytest.mark.mqtt
def test_bad_credentials(start_mosquitto: Callable[..., Mosquitto], tmp_path: Path) -> None:
    program = find_program("mosquitto_passwd")
    if program is None:
        pytest.skip("no mosquitto_passwd program (apt install mosquitto)")
    passwords = tmp_path / "passwords"
    passwords.touch(mode=0o600)
    subprocess.run([program, "-b", str(passwords), "ada", "right"], check=True, capture_output=True)
    with mqtt_harness(start_mosquitto(f"password_file {passwords}", anonymous=False)) as harness:
        wrong, heard = harness.make("a", username="ada", password="wrong"), Recorder()
        right, heard_right = harness.make("b", username="ada", password="right"), Recorder()
        wrong.open(heard)
        right.open(heard_right)
        harness.run_until(lambda: right.connected and bool(heard.reasons))
        assert "Not authorized; check username and password" in heard.reasons[0]
        assert "wrong" not in heard.reasons[0]


@pytest.mark.mqtt
def test_mosquittos_packet_size_is_honoured(start_mosquitto: Callable[..., Mosquitto]) -> None:
    with mqtt_harness(start_mosquitto("max_packet_size 30000")) as harness:
        transport, heard = harness.transport("a"), Recorder()
        transport.subscribe("x")
        transport.open(heard)
        harness.run_until(lambda: transport.connected)
        assert 29_000 < transport.max_packet_bytes <= 30_000
        assert transport.publish("x", bytes(transport.max_packet_bytes))
        harness.run_until(lambda: len(heard.packets) == 1)
        assert not heard.reasons


@pytest.mark.mqtt
def test_three_hundred_parties_on_one_reactor(start_mosquitto: Callable[..., Mosquitto]) -> None:
    with mqtt_harness(start_mosquitto("max_queued_messages 10000")) as harness:
        centre, heard = harness.transport("centre", window=64), Recorder()
        centre.subscribe("up/+")
        centre.open(heard)
        parties = [(harness.transport(f"party-{index}"), Recorder()) for index in range(300)]
        for index, (party, ears) in enumerate(parties):
            party.subscribe(f"down/{index}")
            party.open(ears, will=lambda connection: ("status", b""))
        harness.run_until(lambda: centre.connected and all(party.connected for party, _ in parties))
        for index in range(300):
            harness.run_until(lambda index=index: centre.publish(f"down/{index}", b"go"))
        harness.run_until(lambda: all(ears.packets for _, ears in parties))
        for index, (party, _) in enumerate(parties):
            assert party.publish(f"up/{index}", bytes(1000))
        harness.run_until(lambda: len(heard.packets) == 300)
        harness.broker.restart()
        harness.run_until(lambda: all(ears.connects == 2 for _, ears in parties))
