"""The small parts of transports: topic trees against a plain matcher, back-off, and what the memory broker adds."""

from __future__ import annotations

import random
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

import helpers_mosquitto
from helpers_transport import LIMIT_S, MemoryHarness, Recorder
from sordino_common.clock import VirtualLoop
from sordino_common.errors import LocalError
from sordino_common.transport.backoff import Backoff
from sordino_common.transport.memory import BROKER, MemoryBroker, MemoryTransport
from sordino_common.transport.topic_tree import TopicTree, check_filter, split_shared
from sordino_common.transport.topics import requests_filter, shared_filter, status_filter, subscriptions

levels = st.sampled_from(["a", "b", "", "$s"])
topics = st.lists(levels, min_size=1, max_size=4).map("/".join).filter(bool)
filters = (
    st.lists(st.one_of(levels, st.just("+")), min_size=0, max_size=4)
    .flatmap(lambda head: st.sampled_from(["/".join(head), "/".join([*head, "#"])]))
    .filter(bool)
)


def _matches(topic_filter: str, topic: str) -> bool:
    """MQTT v5, section 4.7, word for word."""
    if topic.startswith("$") and topic_filter[0] in "+#":
        return False
    wanted, found = topic_filter.split("/"), topic.split("/")
    for index, level in enumerate(wanted):
        if level == "#":
            return True
        if index >= len(found):
            return False
        if level not in ("+", found[index]):
            return False
    return len(wanted) == len(found)


def test_the_plain_matcher_knows_the_standards_examples() -> None:
    assert _matches("sport/tennis/player1/#", "sport/tennis/player1")
    assert _matches("sport/#", "sport")
    assert not _matches("sport/tennis/+", "sport/tennis/player1/ranking")
    assert not _matches("sport/+", "sport")
    assert _matches("sport/+", "sport/")
    assert _matches("+/+", "/finance")
    assert not _matches("+", "/finance")
    assert not _matches("#", "$SYS/uptime")
    assert not _matches("+/monitor/Clients", "$SYS/monitor/Clients")
    assert _matches("$SYS/#", "$SYS/uptime")


@given(st.lists(filters, unique=True), topics)
def test_a_tree_of_filters_finds_those_that_match_a_topic(keys: list[str], topic: str) -> None:
    tree: TopicTree[str] = TopicTree()
    for key in keys:
        check_filter(key)
        tree.put(key, key)
    assert sorted(tree.matching(topic)) == sorted(key for key in keys if _matches(key, topic))


@given(st.lists(topics, unique=True), filters)
def test_a_tree_of_topics_finds_those_that_a_filter_matches(keys: list[str], topic_filter: str) -> None:
    tree: TopicTree[str] = TopicTree()
    for key in keys:
        tree.put(key, key)
    assert sorted(tree.matched_by(topic_filter)) == sorted(key for key in keys if _matches(topic_filter, key))


@given(st.lists(topics, unique=True), st.randoms(use_true_random=False))
def test_a_tree_forgets_what_is_removed(keys: list[str], draw: random.Random) -> None:
    tree: TopicTree[str] = TopicTree()
    for key in keys:
        tree.put(key, key)
    gone = [key for key in keys if draw.random() < 0.5]
    for key in [*gone, *gone, "never/there"]:
        tree.remove(key)
    assert [tree.get(key) for key in keys] == [None if key in gone else key for key in keys]
    for key in keys:
        tree.remove(key)
    assert not tree._root.children, "no empty branches stay"


def test_back_off_grows_to_its_limit_and_starts_anew_after_a_lasting_connection() -> None:
    backoff = Backoff(least_s=1.0, most_s=60.0, refused_s=30.0, draw=random.Random(1))
    bounds = [(0.5, 1.0), (1.0, 2.0), (2.0, 4.0), (4.0, 8.0), (8.0, 16.0), (16.0, 32.0), (30.0, 60.0), (30.0, 60.0)]
    for low, high in bounds:
        assert low <= backoff.next_s() <= high
    backoff.stood(5.0)  # that was no lasting one
    assert backoff.next_s() >= 30.0
    backoff.stood(3600.0)
    assert backoff.next_s() <= 1.0
    assert 30.0 <= backoff.next_s(refused=True) <= 60.0
    for _ in range(5000):  # years
        assert backoff.next_s() <= 60.0


def test_a_packet_that_the_network_loses_is_lost_and_its_place_in_the_window_is_not() -> None:
    class Lossy:
        def deliveries(self, sender: str, receiver: str, nbytes: int, now_s: float) -> list[float]:
            return [] if nbytes > 1000 else [now_s + 0.01]

    loop = VirtualLoop()
    broker = MemoryBroker(loop, network=Lossy())
    transport, heard = MemoryTransport(broker, loop, "a", window=1), Recorder()
    transport.subscribe("x")
    transport.open(heard)
    assert loop.run_until(lambda: transport.connected, deadline_s=LIMIT_S)
    assert transport.publish("x", bytes(2000))
    assert loop.run_until(lambda: heard.writables == 1, deadline_s=LIMIT_S)
    assert transport.publish("x", b"small")
    assert loop.run_until(lambda: bool(heard.packets), deadline_s=LIMIT_S)
    assert heard.payloads == [b"small"]


def test_connecting_survives_a_network_that_loses_half() -> None:
    draw = random.Random(7)

    class Half:
        def deliveries(self, sender: str, receiver: str, nbytes: int, now_s: float) -> list[float]:
            return [now_s + 0.01] if draw.random() < 0.5 else []

    loop = VirtualLoop()
    broker = MemoryBroker(loop, network=Half())
    parties = [(MemoryTransport(broker, loop, f"p{index}"), Recorder()) for index in range(50)]
    for party, heard in parties:
        party.subscribe("x")
        party.subscribe("y")
        party.open(heard)
    assert loop.run_until(lambda: all(party.connected for party, _ in parties), deadline_s=120.0)
    assert len(broker.clients) == 50


def test_packets_under_way_when_a_connection_is_lost_are_lost_and_when_it_closes_arrive() -> None:
    harness = MemoryHarness(latency_s=1.0)
    watcher, heard = harness.transport("watcher"), Recorder()
    watcher.subscribe("#")
    watcher.open(heard)
    for name in ("lost", "killed", "closed"):
        party = harness.transport(name)
        party.open(Recorder(), will=lambda connection, name=name: ("will", name.encode()))
        harness.run_until(lambda party=party: watcher.connected and party.connected)
        assert party.publish("x", name.encode())
        if name == "lost":
            harness.lose(party)
            party.kill()
        elif name == "killed":
            harness.kill(party)
        else:
            party.close()
        harness.loop.advance(10.0)
    assert set(heard.packets) == {
        ("will", b"lost", False),
        ("will", b"killed", False),
        ("x", b"closed", False),
    }


def test_who_dies_while_connecting_leaves_no_will_and_no_session() -> None:
    harness = MemoryHarness(latency_s=1.0)
    watcher, heard = harness.transport("watcher"), Recorder()
    watcher.subscribe("#")
    watcher.open(heard)
    harness.run_until(lambda: watcher.connected)
    party = harness.transport("party")
    party.open(Recorder(), will=lambda connection: ("will", b"dead"))
    harness.loop.advance(0.5)  # CONNECT is under way
    harness.kill(party)
    harness.loop.advance(20.0)
    assert harness.broker.clients == ("watcher",)
    assert not heard.packets


def test_the_memory_broker_is_deterministic() -> None:
    def run() -> list[tuple[float, str, bytes, bool]]:
        harness = MemoryHarness(latency_s=0.03)
        log: list[tuple[float, str, bytes, bool]] = []
        parties = [harness.transport(f"p{index}", window=2) for index in range(20)]
        for party in parties:
            heard = Recorder()
            party.subscribe("x/+")

            def note(heard: Recorder = heard) -> None:
                log.append((harness.loop.now_s(), *heard.packets[-1]))

            heard.then = {"packet": note}
            party.open(heard)
        harness.loop.advance(1.0)
        harness.stop_broker()
        harness.loop.advance(3.0)
        harness.start_broker()
        harness.loop.advance(30.0)
        for index, party in enumerate(parties):
            assert party.publish(f"x/{index}", b"%d" % index)
        harness.loop.advance(1.0)
        return log

    first = run()
    assert len(first) == 400
    assert first == run()


def test_the_brokers_own_id_is_taken() -> None:
    loop = VirtualLoop()
    for client_id in ("", BROKER):
        with pytest.raises(LocalError):
            MemoryTransport(MemoryBroker(loop), loop, client_id)


def test_an_absent_mosquitto_is_a_skip_or_by_request_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(helpers_mosquitto, "find_program", lambda name: None)
    monkeypatch.delenv("SORDINO_REQUIRE_MQTT", raising=False)
    with pytest.raises(pytest.skip.Exception, match="apt install mosquitto"):
        helpers_mosquitto.require_mosquitto()
    monkeypatch.setenv("SORDINO_REQUIRE_MQTT", "1")
    with pytest.raises(pytest.fail.Exception, match="SORDINO_REQUIRE_MQTT=1"):
        helpers_mosquitto.require_mosquitto()


@pytest.mark.parametrize("topic_filter", ["$share//f/+/status", "$share/a+b/f", "$share/g/", "$share/g", "$share/g/f+"])
def test_what_is_no_shared_filter_is_refused(topic_filter: str) -> None:
    with pytest.raises(LocalError, match=r"topic filter"):
        check_filter(topic_filter)


def test_packets_of_sessions_are_not_shared() -> None:
    assert shared_filter("viewers", status_filter("lab")) == "$share/viewers/sordino/lab/+/status"
    assert shared_filter("desk", requests_filter("lab")) == "$share/desk/sordino/lab/+/request"
    assert split_shared("$share/viewers/a/b") == ("viewers", "a/b")
    for name in ("server", "agent-1"):
        for topic_filter in subscriptions("lab", name, "server"):
            if not topic_filter.endswith("/status"):
                with pytest.raises(LocalError, match=r"a session's packets belong to one process"):
                    shared_filter("workers", topic_filter)
    with pytest.raises(LocalError, match=r"can't be shared"):
        shared_filter("no+group", status_filter("lab"))


def test_a_name_in_ascii_is_looked_up_without_the_tables_of_all_scripts() -> None:
    code = """
import socket, ssl, sys
from sordino_common.transport.dialing import Dial, plain
from sordino_common.transport.reactor import READ, Reactor
hello, accepted = [], []
with Reactor() as reactor, socket.create_server(("127.0.0.1", 0)) as server:
    def accept(_ready):
        accepted.append(server.accept()[0])
        reactor.register(accepted[0], READ, lambda _ready: hello.append(accepted[0].recv(4096)))
    reactor.register(server, READ, accept)
    dial = Dial(
        reactor, "localhost", server.getsockname()[1], context=ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT),
        server_name=None, first=0, most_bytes=4096, on_ready=print, on_failed=print,
    )
    dial.start()
    reactor.run_until(lambda: bool(hello), deadline_s=reactor.now_s() + 30)
    dial.abort()
    accepted[0].close()
assert b"localhost" in hello[0]  # the name that is asked for
assert "encodings.idna" not in sys.modules and "unicodedata" not in sys.modules
assert plain("b\u00fccher.example") == "b\u00fccher.example"
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr


def test_a_lazy_module_loads_at_the_first_look() -> None:
    code = """
import sys
import sordino_common.transport.mqtt
assert "http.client" not in sys.modules and "email" not in sys.modules
import urllib.request
assert "http.client" not in sys.modules
assert urllib.request.Request("http://localhost/").host == "localhost"
assert "http.client" in sys.modules
assert type(sys.modules["urllib.request"]).__name__ == "module"
from sordino_common.lazy import import_lazily
import_lazily("urllib.request")
assert urllib.request.Request and not hasattr(urllib.request, "nothing")
import_lazily("wave")
from wave import Wave_read
assert Wave_read.__module__ == "wave"
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr


def test_a_lazy_package_loads_for_what_is_inside() -> None:
    code = """
import sys
from sordino_common.lazy import import_lazily, is_loaded
import_lazily("ctypes", "wave")
import ctypes, wave
assert not is_loaded("ctypes") and not is_loaded("wave") and not is_loaded("nowhere")
assert not hasattr(ctypes, "__file__") and not is_loaded("ctypes") and "_ctypes" not in sys.modules
import ctypes.util
assert is_loaded("ctypes") and ctypes.util.find_library and ctypes.c_int(3).value == 3
assert not hasattr(wave, "__path__") and is_loaded("wave")
try:
    import wave.nothing
except ModuleNotFoundError as error:
    assert error.name == "wave.nothing", error.name
else:
    sys.exit("a module is no package")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
