"""Endpoints on the memory broker: presence, sessions, restarts, rosters, garbage, small packets."""

from __future__ import annotations

import random

import pytest

from helpers_channel import FLEET, device
from helpers_link import BadHops, BadNetwork, MemoryBand, Report, bulky, small
from sordino_common.channel.packets import roster_packet
from sordino_common.channel.presence import make_death
from sordino_common.errors import LimitExceeded, LocalError, RemoteError
from sordino_common.messages import Describe
from sordino_common.transport.settings import KIB, MIB, LinkSettings
from sordino_common.transport.topics import roster_topic, status_topic


def band(*names: str, **kwargs: object) -> MemoryBand:
    """A server and agents, online, over a network with 5 ms a hop."""
    made = MemoryBand(kwargs.pop("network", BadHops()), names=names or ("alto", "bass"), **kwargs)  # type: ignore[arg-type]
    for name in made.names:
        made.add(name)
    made.all_online()
    return made


def test_question_and_answer_with_one_correlation() -> None:
    fleet = band()
    hub, alto = fleet.parties["hub"], fleet.parties["alto"]
    alto.heard.on_each = lambda incoming: alto.endpoint.send(  # type: ignore[assignment]
        incoming.sender, small(4), correlation=incoming.correlation, context=incoming.context
    )
    report = Report()
    correlation = hub.endpoint.send("alto", Describe(), on_outcome=report)
    fleet.run_until(lambda: bool(hub.heard.messages))
    assert hub.heard.messages[0].correlation == correlation and hub.got == [small(4)]
    assert hub.heard.messages[0].sender == "alto"
    fleet.told(report)
    assert report.delivered
    assert all(not party.heard.refusals for party in fleet.parties.values())


def test_agents_write_to_each_other_without_the_server_reading() -> None:
    fleet = band()
    report = fleet.parties["alto"].send("bass", small(9), context=b"job")
    fleet.told(report)
    assert report.delivered
    assert fleet.parties["bass"].heard.messages[0].context == b"job"
    assert fleet.parties["hub"].got == []
    assert {packet.topic for packet in fleet.packets if "/peer/" in packet.topic} == {
        f"sordino/{FLEET}/bass/peer/alto",
        f"sordino/{FLEET}/alto/peer/bass",
    }


def test_contexts_are_bounded_and_can_be_ended() -> None:
    fleet = band()
    alto, bass = fleet.parties["alto"], fleet.parties["bass"]
    for number in range(100):
        context = b"job %d" % number
        report = alto.send("bass", small(number), context=context)
        fleet.told(report)
        assert report.delivered
        late = alto.send("bass", bulky(MIB), context=context)
        alto.endpoint.end_context("bass", context)
        bass.endpoint.end_context("alto", context)
        assert late.told == [(False, "not acknowledged by bass before the exchange was over")]
    assert bass.got == [small(number) for number in range(100)]
    for number in range(30):  # and the default one, by which a late packet of an ended context was answered
        alto.endpoint.send("bass", small(), context=b"open %d" % number)
    with pytest.raises(LimitExceeded, match="bass: 31 contexts are open"):
        alto.endpoint.send("bass", small(), context=b"one more")


@pytest.mark.parametrize("packet_bytes", [2 * KIB, 300_000])
def test_a_message_larger_than_packets_arrives_both_ways(packet_bytes: int) -> None:
    fleet = band(packet_bytes=packet_bytes)
    up, down = bulky(700_000, fill=1), bulky(500_000, fill=2)
    reports = [fleet.parties["alto"].send("hub", up), fleet.parties["hub"].send("alto", down)]
    fleet.told(*reports)
    assert fleet.parties["hub"].got == [up] and fleet.parties["alto"].got == [down]
    assert max(len(packet.payload) for packet in fleet.packets) <= packet_bytes


def test_thirty_megabytes_survive_a_broker_restart_with_little_repetition() -> None:
    fleet = band()
    hub, alto = fleet.parties["hub"], fleet.parties["alto"]
    message = bulky(30 * MIB)
    report = alto.send("hub", message)
    for part in (1, 2):
        fleet.run_until(lambda part=part: alto.endpoint.counters.total.packet_bytes_sent > part * 10 * MIB)  # type: ignore[misc]
        fleet.broker.stop()
        fleet.virtual.advance(3.0)
        fleet.broker.start()
    fleet.told(report)
    assert report.delivered and hub.got == [message]
    assert alto.endpoint.counters.total.packet_bytes_sent < 1.2 * 30 * MIB
    counted = hub.endpoint.counters.peer("alto")
    assert (counted.messages_received, counted.message_bytes_received) == (
        1,
        alto.endpoint.counters.peer("hub").message_bytes_sent,
    )


@pytest.mark.parametrize("seed", range(40))
def test_every_message_once_over_lossy_hops_and_cut_connections(seed: int) -> None:
    draw = random.Random(seed)
    bad = BadHops(BadNetwork(seed=seed, delay_s=0.01, jitter_s=draw.choice([0.0, 0.1])))
    fleet = band(network=bad, packet_bytes=20 * KIB)
    bad.network.loss = bad.network.double = 0.05  # births may be lost from now on, too
    reports, expected = [], dict.fromkeys(fleet.names, 0)
    for number in range(15):
        sender, receiver = draw.sample(fleet.names, 2)
        reports.append(fleet.parties[sender].send(receiver, bulky(draw.choice([10, 30_000, 90_000]), fill=number)))
        expected[receiver] += 1
        fleet.virtual.advance(draw.choice([0.0, 0.05, 0.5]))
        if draw.random() < 0.2:
            fleet.broker.disconnect(draw.choice(fleet.names))
    fleet.told(*reports, within_s=600.0)
    assert all(report.delivered for report in reports)
    fleet.virtual.advance(60.0)
    assert {name: len(party.got) for name, party in fleet.parties.items()} == expected
    assert all(len(set(map(repr, party.heard.messages))) == len(party.got) for party in fleet.parties.values())


def test_a_restarted_agent_gets_the_message_again_and_the_server_learns_its_boot() -> None:
    fleet = band()
    hub, alto = fleet.parties["hub"], fleet.parties["alto"]
    message = bulky(5 * MIB)
    report = hub.send("alto", message)
    fleet.run_until(lambda: alto.endpoint.counters.total.packet_bytes_received > 2 * MIB)
    fleet.kill("alto")
    fleet.run_until(lambda: not hub.endpoint.online("alto"))
    again = fleet.add("alto", boot=2)
    fleet.told(report)
    assert report.delivered and again.got == [message]
    assert hub.heard.presence[-2:] == [("alto", False, 1), ("alto", True, 2)]


def test_a_restarted_server_is_answered_anew() -> None:
    fleet = band()
    alto = fleet.parties["alto"]
    fleet.told(alto.send("hub", small(1)))
    fleet.kill("hub")
    lost = alto.send("hub", small(2))
    fleet.virtual.advance(20.0)
    hub = fleet.add("hub", boot=2)
    fleet.told(lost, within_s=10.0)
    assert hub.got == [small(2)]


def test_agents_recover_from_a_peer_restart_that_nobody_tells_them_of() -> None:
    fleet = band()
    alto = fleet.parties["alto"]
    fleet.told(alto.send("bass", small(1)))
    fleet.kill("bass")
    bass = fleet.add("bass", boot=2)
    fleet.run_until(lambda: fleet.parties["hub"].heard.presence[-1] == ("bass", True, 2))
    report = alto.send("bass", small(2))
    fleet.told(report, within_s=5.0)
    assert report.delivered and bass.got == [small(2)]


def test_a_peer_that_never_comes_is_named() -> None:
    fleet = band()
    report = fleet.parties["hub"].send("cello", small(), expires_s=20.0)
    fleet.told(report)
    assert not report.delivered
    assert "not acknowledged by cello within 20 s" in report.told[0][1] and "not in epoch 1" in report.told[0][1]


def test_a_message_waits_for_a_peer_that_comes_late() -> None:
    fleet = MemoryBand(BadHops(), names=("alto",))
    hub = fleet.add("hub")
    report = hub.send("alto", small(3))
    fleet.virtual.advance(300.0)
    hellos = sum(1 for packet in fleet.packets if packet.topic.endswith("/cmd"))
    assert hellos < 20
    alto = fleet.add("alto")
    fleet.told(report, within_s=2.0)  # at its birth, not at the next back-off
    assert alto.got == [small(3)]


def test_a_slow_subscriber_does_not_hold_up_the_others() -> None:
    names = tuple(f"agent-{number}" for number in range(20))
    hops = BadHops()
    fleet = band(*names, network=hops)
    hops.bytes_per_s["agent-0"] = 200_000.0
    message = bulky(2 * MIB)
    hub = fleet.parties["hub"]
    reports = {name: hub.send(name, message) for name in names}
    fleet.told(*(reports[name] for name in names[1:]), within_s=5.0)
    assert not reports["agent-0"].told
    fleet.told(reports["agent-0"])
    assert all(report.delivered for report in reports.values())
    assert hub.endpoint.counters.total.packet_bytes_sent < 1.1 * 20 * 2 * MIB


def test_the_windows_of_transport_and_broker_are_kept() -> None:
    fleet = band(window=3)
    hub = fleet.parties["hub"]
    reports = [hub.send(name, bulky(3 * MIB)) for name in ("alto", "bass")]
    transport = fleet.parties["hub"].transport
    most = 0

    def done() -> bool:
        nonlocal most
        most = max(most, transport.unacknowledged)  # type: ignore[attr-defined]
        return all(report.told for report in reports)

    fleet.run_until(done)
    assert most == 3 and all(report.delivered for report in reports)


# --- presence, roster, closing ----------------------------------------------------------------------------------------


def test_presence_is_seen_by_who_comes_later_and_ends_with_an_orderly_close() -> None:
    fleet = MemoryBand(BadHops(), names=("alto",))
    alto = fleet.add("alto")
    fleet.virtual.advance(1.0)
    hub = fleet.add("hub")
    fleet.all_online()
    report = hub.send("alto", bulky(MIB))
    alto_report = alto.send("hub", small())
    alto.endpoint.close(drain_s=10.0)
    fleet.run_until(lambda: alto.endpoint.closed and not hub.endpoint.online("alto"))
    assert alto_report.delivered
    assert hub.heard.presence == [("alto", True, 1), ("alto", False, 1)]
    assert not report.told or report.delivered
    with pytest.raises(LocalError, match="after close"):
        alto.endpoint.send("hub", small())


def test_a_close_that_does_not_wait_ends_what_is_under_way_with_a_reason() -> None:
    fleet = band()
    report = fleet.parties["hub"].send("alto", bulky(8 * MIB))
    fleet.parties["hub"].endpoint.close()
    fleet.run_until(lambda: fleet.parties["hub"].endpoint.closed, within_s=3.0)
    assert report.told == [(False, "not acknowledged by alto before hub closed")]
    fleet.run_until(lambda: not fleet.parties["alto"].endpoint.online("hub"))


def test_a_late_death_of_an_older_connection_changes_nothing() -> None:
    fleet = band()
    hub = fleet.parties["hub"]
    fleet.broker.disconnect("alto")
    fleet.run_until(lambda: hub.heard.presence[-1] == ("alto", True, 1) and len(hub.heard.presence) == 4)
    death = make_death(device("alto"), fleet=FLEET, name="alto", boot=1, connection=1)
    fleet.parties["bass"].transport.publish(status_topic(FLEET, "alto"), death)
    fleet.virtual.advance(1.0)
    assert hub.endpoint.online("alto") and hub.endpoint.peers() == ("alto", "bass")


def test_a_new_roster_reaches_all_and_messages_under_way_arrive() -> None:
    fleet = band()
    hub, alto, bass = (fleet.parties[name] for name in ("hub", "alto", "bass"))
    up, peer = alto.send("hub", bulky(4 * MIB)), alto.send("bass", bulky(2 * MIB))
    down = hub.send("bass", bulky(4 * MIB))
    fleet.run_until(lambda: bass.endpoint.counters.total.packet_bytes_received > MIB)
    hub.endpoint.publish_roster(fleet.roster(2, ("hub", "alto", "bass", "cello")))
    cello = fleet.add("cello", enrolled=False)
    fleet.told(up, peer, down)
    assert up.delivered and peer.delivered and down.delivered
    assert (len(hub.got), len(bass.got)) == (1, 2)
    fleet.run_until(lambda: cello.heard.rosters == [2] and hub.endpoint.online("cello"))
    late = hub.send("cello", small())
    fleet.told(late)
    assert late.delivered and hub.heard.rosters == alto.heard.rosters == [2]


def test_a_member_that_is_struck_off_gets_nothing_more() -> None:
    fleet = band()
    hub = fleet.parties["hub"]
    fleet.told(hub.send("bass", small(1)))
    waiting = hub.send("bass", bulky(8 * MIB))
    hub.endpoint.publish_roster(fleet.roster(2, ("hub", "alto")))
    fleet.told(waiting)
    assert waiting.told == [(False, "bass is not in the roster of epoch 2")]
    assert hub.endpoint.peers() == ("alto",)
    before = len(hub.got)
    fleet.parties["bass"].send("hub", small(2))
    fleet.virtual.advance(30.0)
    assert len(hub.got) == before


def test_agents_do_not_publish_rosters_and_large_rosters_are_named() -> None:
    fleet = band(packet_bytes=2 * KIB)
    with pytest.raises(LocalError, match="only the server"):
        fleet.parties["alto"].endpoint.publish_roster(fleet.signed)
    names = ("hub", "alto", "bass", *(f"agent-{number}" for number in range(60)))
    with pytest.raises(LimitExceeded, match="max_packet_size"):
        fleet.parties["hub"].endpoint.publish_roster(fleet.roster(2, names))


# --- what should not be there -----------------------------------------------------------------------------------------


def test_garbage_is_refused_by_name_and_the_rest_goes_on() -> None:
    fleet = band()
    hub, alto = fleet.parties["hub"], fleet.parties["alto"]
    fleet.told(hub.send("alto", small(0)))
    sealed = next(
        packet for packet in fleet.packets if packet.topic.endswith("alto/cmd") and b"sealed" in packet.payload
    )
    draw = random.Random(5)
    stranger = fleet.parties["bass"].transport
    for number in range(300):
        payload = bytearray(draw.choice([sealed.payload, fleet.signed, roster_packet(fleet.signed), b"\x80"]))
        for _ in range(draw.randint(1, 4)):
            payload[draw.randrange(len(payload))] ^= 1 << draw.randrange(8)
        topic = draw.choice(
            ["alto/cmd", "alto/peer/bass", "alto/peer/nobody", "hub/status", "hub/roster", "alto/cmd/x"]
        )
        assert stranger.publish(f"sordino/{FLEET}/{topic}", bytes(payload[: draw.randint(0, len(payload))]))
        if number % 10 == 0:
            fleet.virtual.advance(0.1)
    report = hub.send("alto", small(1))
    fleet.told(report)
    fleet.virtual.advance(1.0)
    assert report.delivered and alto.got == [small(0), small(1)]
    assert alto.heard.refusals and all(isinstance(error, RemoteError) for _, error in alto.heard.refusals)
    assert alto.endpoint.counters.total.refusals == len(alto.heard.refusals)
    assert "nobody" not in alto.endpoint.counters.peers


def test_a_replayed_packet_is_not_delivered_twice() -> None:
    fleet = band()
    hub, alto = fleet.parties["hub"], fleet.parties["alto"]
    fleet.told(hub.send("alto", small(7)))
    for packet in [packet for packet in fleet.packets if packet.topic.endswith("alto/cmd")]:
        fleet.parties["bass"].transport.publish(packet.topic, packet.payload)
    fleet.virtual.advance(5.0)
    assert alto.got == [small(7)]
    report = hub.send("alto", small(8))
    fleet.told(report)
    assert report.delivered


def test_a_broker_with_packets_too_small_is_named() -> None:
    fleet = MemoryBand(BadHops(), names=("alto",), packet_bytes=700)
    hub = fleet.add("hub")
    fleet.virtual.advance(1.0)
    assert not hub.heard.connection[0][0] and "max_packet_size" in hub.heard.connection[0][1]


def test_a_handler_that_raises_loses_no_other_message() -> None:
    fleet = band()
    alto = fleet.parties["alto"]

    def fail_on_first(incoming: object) -> None:
        if len(alto.heard.messages) == 1:
            raise ZeroDivisionError

    alto.heard.on_each = fail_on_first  # type: ignore[assignment]
    reports = [fleet.parties["hub"].send("alto", small(number)) for number in range(3)]
    with pytest.raises(ZeroDivisionError):
        fleet.told(*reports)
    fleet.told(*reports)
    fleet.run_until(lambda: len(alto.got) == 3)


def test_settings_that_contradict_each_other_are_refused() -> None:
    with pytest.raises(LocalError, match="chunk_bytes"):
        LinkSettings(chunk_bytes=100)
    with pytest.raises(LocalError, match="rto"):
        LinkSettings(rto_min_s=5.0)


def test_the_roster_topic_is_the_servers() -> None:
    assert roster_topic(FLEET, "hub") == f"sordino/{FLEET}/hub/roster"
