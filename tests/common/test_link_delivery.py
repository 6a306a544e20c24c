"""Links over a network that loses, doubles, delays and reorders: every message once, or a named reason."""

from __future__ import annotations

import random

import pytest

from helpers_link import PACKET_BYTES, BadNetwork, Mesh, bulky, small
from sordino_common.errors import LimitExceeded, RemoteError
from sordino_common.messages import TensorGet, encode_message
from sordino_common.transport.settings import KIB, MIB, LinkSettings


def pair(network: BadNetwork | None = None, *, packet_bytes: int = 300_000, **settings: object) -> Mesh:
    mesh = Mesh(network, packet_bytes=packet_bytes)
    for name in ("a", "b"):
        mesh.add(name, LinkSettings(**settings))  # type: ignore[arg-type]
    mesh.join("a", "b")
    return mesh


def test_a_small_message_is_one_packet_and_one_ack() -> None:
    mesh = pair()
    report = mesh.stations["a"].send("b", small(5))
    mesh.run_until(report)
    assert report.delivered
    assert [one.message for one in mesh.stations["b"].inbox] == [small(5)]
    assert len(mesh.stations["a"].packets) == len(mesh.stations["b"].packets) == 1


def test_an_ack_rides_with_the_reply() -> None:
    mesh = pair()
    a, b = mesh.stations["a"], mesh.stations["b"]
    asked = a.send("b", small(1))
    mesh.loop.run_until(lambda: bool(b.inbox), deadline_s=1.0)
    answered = b.send("a", small(2))
    mesh.run_until(asked, answered)
    assert len(a.packets) == 2 and len(b.packets) == 1


def test_thirty_megabytes_arrive_whole_with_little_overhead() -> None:
    mesh = pair()
    message = bulky(30 * MIB)
    report = mesh.stations["a"].send("b", message)
    mesh.run_until(report)
    assert report.delivered
    assert mesh.stations["b"].inbox[0].message == message
    size = len(encode_message(message))
    assert mesh.stations["a"].bytes_sent < 1.001 * size
    assert mesh.stations["a"].link.encoded_bytes == 0
    assert mesh.stations["b"].link.reassembly_bytes == 0


@pytest.mark.parametrize("seed", range(120))
def test_every_message_arrives_once_over_a_bad_network(seed: int) -> None:
    draw = random.Random(seed)
    network = BadNetwork(
        seed=seed,
        loss=draw.choice([0.0, 0.05, 0.3]),
        double=draw.choice([0.0, 0.2]),
        delay_s=draw.choice([0.0, 0.02, 0.3]),
        jitter_s=draw.choice([0.0, 0.05, 1.0]),
    )
    mesh = pair(network, packet_bytes=draw.choice([2 * KIB, 20 * KIB]), expires_s=10_000.0)
    sent: dict[str, list[object]] = {"a": [], "b": []}
    reports = []
    for number in range(12):
        sender, receiver = draw.sample(["a", "b"], 2)
        message = bulky(draw.choice([1, 500, 5_000, 60_000]), fill=number)
        sent[receiver].append(message)
        reports.append(mesh.stations[sender].send(receiver, message))
        mesh.loop.advance(draw.choice([0.0, 0.1]))
    mesh.run_until(*reports, within_s=3000.0)
    assert all(report.delivered for report in reports)
    mesh.loop.advance(200.0)
    for name, station in mesh.stations.items():
        got = [one.message for one in station.inbox]
        assert sorted(map(repr, map(encode_message, got))) == sorted(map(repr, map(encode_message, sent[name])))  # type: ignore[arg-type]
        assert station.errors == []
        assert station.link.idle and station.link.reassembly_bytes == station.link.encoded_bytes == 0


def test_a_message_to_nobody_ends_with_the_name_and_the_time() -> None:
    mesh = Mesh()
    a = mesh.add("a")
    report = a.send("absent", small(), expires_s=30.0)
    a.link.obstacle("absent", b"", "never seen")
    assert a.link.wants("absent", b"")
    mesh.run_until(report)
    assert mesh.loop.now_s() == pytest.approx(30.0)
    assert report.told == [(False, "tensor-dropped: not acknowledged by absent within 30 s (never seen)")]
    assert not a.link.wants("absent", b"") and a.link.idle


def test_a_transfer_goes_on_where_it_was_when_the_network_comes_back() -> None:
    mesh = pair(BadNetwork(delay_s=0.05))
    a, b = mesh.stations["a"], mesh.stations["b"]
    message = bulky(8 * MIB)
    report = a.send("b", message)
    mesh.loop.run_until(lambda: a.bytes_sent > 4 * MIB, deadline_s=60.0)
    mesh.cut.add("b")
    mesh.loop.advance(40.0)
    mesh.cut.clear()
    mesh.join("a", "b")
    mesh.run_until(report, within_s=10.0)
    assert report.delivered and len(b.inbox) == 1
    assert a.bytes_sent < 1.3 * 8 * MIB


def test_a_slow_link_is_not_filled_with_copies() -> None:
    mesh = pair(BadNetwork(delay_s=0.02))
    mesh.slow["b"] = 100_000.0  # 2.6 s a chunk; the first answers take longer than the first timeout
    a = mesh.stations["a"]
    report = a.send("b", bulky(4 * MIB))
    mesh.run_until(report)
    assert report.delivered
    assert a.counters.total.retransmissions == 0
    assert a.bytes_sent < 1.01 * 4 * MIB


def test_small_messages_pass_a_bulky_one() -> None:
    mesh = pair(BadNetwork(delay_s=0.02))
    mesh.slow["b"] = 1e6
    a = mesh.stations["a"]
    big = a.send("b", bulky(20 * MIB))
    mesh.loop.advance(1.0)
    quick = a.send("b", small())
    mesh.run_until(quick, within_s=5.0)
    assert quick.delivered and not big.told


@pytest.mark.parametrize(("nbytes", "packets"), [(180_000, 16), (300_000, 32)])
def test_bulky_messages_do_not_wait_for_the_acks_of_those_before(nbytes: int, packets: int) -> None:
    """A stream of them, as a dealer's: a window of packets a round trip."""
    mesh = pair(BadNetwork(delay_s=0.5))
    a, b = mesh.stations["a"], mesh.stations["b"]
    reports = [a.send("b", bulky(nbytes, fill=number)) for number in range(16)]
    mesh.run_until(*reports, within_s=1.1 * packets / LinkSettings().window_chunks)
    assert all(report.delivered for report in reports)
    assert [one.message for one in b.inbox] == [bulky(nbytes, fill=number) for number in range(16)]
    assert a.counters.total.retransmissions == 0 and len(a.packets) == packets
    assert len(b.packets) <= packets // 4  # several to an ack


def test_the_peer_restarts_in_mid_transfer_and_gets_it_all_again() -> None:
    mesh = pair(BadNetwork(delay_s=0.05))
    a = mesh.stations["a"]
    message = bulky(4 * MIB)
    report = a.send("b", message)
    mesh.loop.run_until(lambda: a.bytes_sent > 2 * MIB, deadline_s=60.0)
    b = mesh.add("b", boot=2)
    mesh.join("a", "b")
    mesh.run_until(report)
    assert report.delivered and [one.message for one in b.inbox] == [message]


def test_a_new_session_with_the_same_peer_neither_repeats_nor_loses() -> None:
    mesh = pair(BadNetwork(seed=3, delay_s=0.2))
    a, b = mesh.stations["a"], mesh.stations["b"]
    reports = [a.send("b", small(number)) for number in range(6)] + [a.send("b", bulky(2 * MIB))]
    for _ in range(5):
        mesh.loop.advance(0.15)
        for station, peer in ((a, "b"), (b, "a")):
            station.link.lane_down(peer, b"")
        mesh.join("a", "b")
    mesh.run_until(*reports)
    assert all(report.delivered for report in reports)
    assert len(b.inbox) == 7
    assert a.bytes_sent < 1.5 * 2 * MIB


def test_a_new_boot_of_the_sender_starts_numbers_anew() -> None:
    mesh = pair()
    first = mesh.stations["a"].send("b", small(1))
    mesh.run_until(first)
    a = mesh.add("a", boot=2)
    mesh.join("a", "b")
    second = a.send("b", small(2))
    mesh.run_until(second)
    assert [one.message for one in mesh.stations["b"].inbox] == [small(1), small(2)]


def test_contexts_are_separate_lanes() -> None:
    mesh = pair()
    mesh.join("a", "b", b"job")
    reports = [mesh.stations["a"].send("b", small(n), context=c) for n, c in ((1, b""), (2, b"job"))]
    mesh.run_until(*reports)
    assert {(one.context, one.message) for one in mesh.stations["b"].inbox} == {(b"", small(1)), (b"job", small(2))}


# --- bounds -----------------------------------------------------------------------------------------------------------


def test_too_long_a_message_is_refused_here_by_name() -> None:
    mesh = pair(max_message_bytes=MIB)
    a = mesh.stations["a"]
    with pytest.raises(LimitExceeded, match="at most 1048576 are sent"):
        a.send("b", bulky(3 * MIB))
    report = a.send("b", bulky(MIB + 1))
    mesh.run_until(report)
    assert not report.delivered and "at most 1048576 are sent" in report.told[0][1]


def test_too_long_a_message_is_refused_there_and_its_sender_learns_why() -> None:
    mesh = Mesh()
    a = mesh.add("a")
    mesh.add("b", LinkSettings(max_message_bytes=MIB))
    mesh.join("a", "b")
    report = a.send("b", bulky(2 * MIB))
    mesh.run_until(report, within_s=10.0)
    assert not report.delivered
    assert report.told[0][1].startswith("refused by b: message of 2097") and "[limit]" in report.told[0][1]
    assert mesh.stations["b"].link.reassembly_bytes == 0


def test_the_queue_for_a_peer_is_bounded() -> None:
    mesh = Mesh()
    a = mesh.add("a", LinkSettings(queue_messages=3, queue_bytes=2 * MIB))
    for _ in range(3):
        a.send("b", small())
    with pytest.raises(LimitExceeded, match="b: 3 messages are waiting"):
        a.send("b", small())
    a.send("c", bulky(MIB))
    with pytest.raises(LimitExceeded, match=r"c: .* bytes are waiting"):
        a.send("c", bulky(MIB))


def test_fan_out_encodes_a_shared_message_once_and_is_fair() -> None:
    mesh = Mesh(BadNetwork(delay_s=0.05))
    server = mesh.add("server")
    names = [f"agent-{number}" for number in range(50)]
    for name in names:
        mesh.add(name)
        mesh.join("server", name)
    mesh.cut.add("agent-0")  # never answers
    mesh.slow["agent-1"] = 50_000.0
    message = bulky(MIB)
    peak = 0
    server.link.disconnected()
    reports = {name: server.send(name, message, expires_s=300.0) for name in names}
    server.link.connected(PACKET_BYTES, mesh.loop.now_s())
    server.pump()

    def others_are_done() -> bool:
        nonlocal peak
        peak = max(peak, server.link.encoded_bytes)
        return all(reports[name].told for name in names[2:])

    assert mesh.loop.run_until(others_are_done, deadline_s=5.0)
    assert all(reports[name].delivered for name in names[2:])
    assert peak < 1.1 * MIB
    order = [peer for peer, nbytes in server.packets if nbytes > KIB][:100]
    assert all(order.count(name) == 2 for name in names)  # round robin: two turns each in the first hundred packets
    mesh.run_until(*reports.values(), within_s=400.0)
    assert reports["agent-1"].delivered
    assert "not acknowledged by agent-0 within 300 s" in reports["agent-0"].told[0][1]


def test_fan_out_of_different_messages_holds_few_encoded() -> None:
    mesh = Mesh(BadNetwork(delay_s=0.05))
    server = mesh.add("server", LinkSettings(encoded_bytes=4 * MIB))
    peak = 0
    for number in range(30):
        mesh.add(f"agent-{number}")
        mesh.join("server", f"agent-{number}")
    mesh.cut |= {"agent-0", "agent-1", "agent-2", "agent-3", "agent-4"}  # as many as the pool holds: must not block it
    reports = [server.send(f"agent-{number}", bulky(MIB, fill=number), expires_s=500.0) for number in range(30)]

    def done() -> bool:
        nonlocal peak
        peak = max(peak, server.link.encoded_bytes)
        return all(report.told for report in reports[5:])

    assert mesh.loop.run_until(done, deadline_s=120.0)
    assert all(report.delivered for report in reports[5:])
    assert peak <= 5.1 * MIB


def test_fan_in_over_the_reassembly_budget_waits_and_completes() -> None:
    mesh = Mesh(BadNetwork(delay_s=0.02))
    server = mesh.add("server", LinkSettings(max_message_bytes=4 * MIB, reassembly_bytes=4 * MIB))
    reports, peak = [], 0
    for number in range(12):
        agent = mesh.add(f"agent-{number}")
        mesh.join("server", agent.name)
        reports.append(agent.send("server", bulky(MIB, fill=number), expires_s=300.0))

    def done() -> bool:
        nonlocal peak
        peak = max(peak, server.link.reassembly_bytes)
        return all(report.told for report in reports)

    assert mesh.loop.run_until(done, deadline_s=10.0)
    assert all(report.delivered for report in reports) and len(server.inbox) == 12
    assert peak <= 4 * MIB


def test_a_half_sent_message_whose_sender_vanished_is_dropped() -> None:
    mesh = pair(BadNetwork(delay_s=0.05), stall_s=60.0)
    a, b = mesh.stations["a"], mesh.stations["b"]
    a.send("b", bulky(8 * MIB))
    mesh.loop.run_until(lambda: b.link.reassembly_bytes > 0 and a.bytes_sent > 3 * MIB, deadline_s=10.0)
    mesh.cut.add("a")
    mesh.loop.advance(61.0)
    assert b.link.reassembly_bytes == 0


def test_a_message_that_was_dropped_as_stalled_starts_again() -> None:
    mesh = pair(BadNetwork(delay_s=0.05), stall_s=20.0)
    a, b = mesh.stations["a"], mesh.stations["b"]
    report = a.send("b", bulky(8 * MIB))
    mesh.loop.run_until(lambda: a.bytes_sent > 4 * MIB, deadline_s=10.0)
    mesh.cut.add("a")
    mesh.loop.advance(50.0)
    assert b.link.reassembly_bytes == 0
    mesh.cut.clear()
    mesh.run_until(report)
    assert report.delivered and len(b.inbox) == 1


def test_smaller_packets_after_a_reconnect_recut_what_is_under_way() -> None:
    mesh = pair(BadNetwork(delay_s=0.05))
    a, b = mesh.stations["a"], mesh.stations["b"]
    message = bulky(4 * MIB)
    report = a.send("b", message)
    mesh.loop.run_until(lambda: a.bytes_sent > 2 * MIB, deadline_s=10.0)
    mesh.packet_bytes = 50_000
    for station in (a, b):
        station.link.disconnected()
        station.link.connected(50_000, mesh.loop.now_s())
        station.pump()
    mesh.run_until(report)
    assert report.delivered and [one.message for one in b.inbox] == [message] and b.errors == []


def test_packets_too_small_for_the_settings_are_refused_with_the_remedy() -> None:
    mesh = Mesh()
    with pytest.raises(LimitExceeded, match="max_packet_size"):
        mesh.add("a").link.connected(1000, 0.0)


def test_bookkeeping_stays_small_over_many_messages() -> None:
    mesh = pair(BadNetwork(delay_s=0.001))
    a, b = mesh.stations["a"], mesh.stations["b"]
    for number in range(2000):
        report = a.send("b", small(number))
        mesh.run_until(report)
    link = a.link
    assert len(link._expiries) < 200 and len(link._wakes) < 200 and len(b.link._wakes) < 200
    receiver = b.link._peers["a"].contexts[b""].receiver
    assert len(receiver._finished) <= 2


def test_mutated_packets_get_a_named_refusal_and_the_link_goes_on() -> None:
    mesh = pair(expires_s=10_000.0)
    a, b = mesh.stations["a"], mesh.stations["b"]
    caught: list[bytes] = []
    carry = mesh.carry

    def keep(sender: object, to: str, context: bytes, plaintext: bytes) -> None:
        caught.append(plaintext)
        carry(sender, to, context, plaintext)  # type: ignore[arg-type]

    mesh.carry = keep  # type: ignore[method-assign]
    for size in (10, 400_000):
        mesh.run_until(a.send("b", bulky(size)))
    draw = random.Random(11)
    heads = [packet[:600] for packet in caught]
    refused = 0
    for _ in range(5000):
        packet = bytearray(draw.choice(heads))
        for _ in range(draw.randint(1, 5)):
            packet[draw.randrange(len(packet))] = draw.randrange(256)
        try:
            b.link.receive("a", b"", bytes(packet), mesh.loop.now_s())
        except RemoteError:
            refused += 1
        b.link.take_events()
    assert refused > 3000
    assert b.link.reassembly_bytes <= LinkSettings().max_message_bytes
    # What a forged number told b of parcels that never were, only a may have told: a new boot of a clears it.
    a = mesh.add("a", boot=2)
    mesh.join("a", "b")
    report = a.send("b", small(1))
    mesh.run_until(report)
    assert report.delivered and b.inbox[-1].message == small(1)


def test_a_peer_that_was_removed_and_comes_back_is_not_taken_for_the_old_one() -> None:
    mesh = pair(BadNetwork(delay_s=0.05))
    a, b = mesh.stations["a"], mesh.stations["b"]
    mesh.run_until(*(a.send("b", small(number)) for number in range(5)))
    half = b.send("a", bulky(4 * MIB))
    mesh.loop.run_until(lambda: b.bytes_sent > MIB, deadline_s=10.0)
    a.link.remove("b", "struck off")
    b.link.lane_down("a", b"")
    mesh.loop.advance(1.0)
    mesh.join("a", "b")
    report = a.send("b", small(99))
    mesh.run_until(report, half)
    assert report.delivered and half.delivered
    assert [one.message for one in b.inbox][-1] == small(99)
    assert len(a.inbox) == 1


def test_a_message_that_can_not_be_encoded_ends_with_the_reason() -> None:
    mesh = pair()
    wrong = TensorGet(tensor_id=b"short")
    report = mesh.stations["a"].send("b", wrong)
    mesh.run_until(report)
    assert not report.delivered and "tensor-get" in report.told[0][1]
