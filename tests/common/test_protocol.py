"""Versions of the protocol: neighbours understand each other to the byte, others are refused by name on both sides."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any, ClassVar

import msgspec
import pytest

from helpers_channel import FLEET, KEYS, connect, forged, only_reply, replies, roster, table
from helpers_link import BadHops, MemoryBand, Report, small
from sordino_common.channel.effects import Unlike
from sordino_common.channel.handshake import SessionTable
from sordino_common.channel.packets import Hello, Reject, read_body, read_packet, signed_packet
from sordino_common.channel.presence import make_birth, read_presence
from sordino_common.errors import CodecError, LocalError, ProtocolMismatch, RosterError, SignatureError
from sordino_common.messages import base, decode, decode_message, encode, encode_message
from sordino_common.messages.base import Count, Message, Name, least_minor, register
from sordino_common.messages.protocol import PROTOCOL, ProtocolVersion, agreed

V = ProtocolVersion
NEXT = V(PROTOCOL.major, PROTOCOL.minor + 1)
AFTER_NEXT = V(PROTOCOL.major, PROTOCOL.minor + 2)
OTHER = V(PROTOCOL.major + 1, 0)
OLD, NEW = PROTOCOL.minor, NEXT.minor
TOO_NEW = f"is of protocol {NEXT}, the session speaks {PROTOCOL}"


def test_neighbouring_minors_of_one_major_work_together() -> None:
    assert agreed(V(1, 3), V(1, 3), peer="alto") == V(1, 3)
    assert agreed(V(1, 3), V(1, 4), peer="alto") == agreed(V(1, 4), V(1, 3), peer="alto") == V(1, 3)
    for ours, theirs, remedy in [
        (V(1, 3), V(1, 5), "upgrade sordino here"),
        (V(1, 5), V(1, 3), "upgrade sordino on alto"),
        (V(1, 0), V(2, 0), "upgrade sordino here"),
        (V(2, 0), V(1, 9), "upgrade sordino on alto"),
    ]:
        with pytest.raises(
            ProtocolMismatch, match=f"alto speaks protocol {theirs}, this side {ours}.*: {remedy}$"
        ) as e:
            agreed(ours, theirs, peer="alto")
        assert e.value.exit_code == 2


# --- the handshake --------------------------------------------------------------------------------------------------


def spoken(table: SessionTable, peer: str) -> ProtocolVersion:
    session = table.established(peer)
    assert session is not None
    return session.protocol


@pytest.mark.parametrize(("one", "other"), [(PROTOCOL, NEXT), (NEXT, PROTOCOL), (NEXT, NEXT), (PROTOCOL, PROTOCOL)])
def test_a_session_speaks_the_smaller_minor(one: ProtocolVersion, other: ProtocolVersion) -> None:
    alto, bass = table("alto", protocol=one), table("bass", protocol=other)
    connect(alto, bass)
    assert spoken(alto, "bass") == spoken(bass, "alto") == min(one, other)


@pytest.mark.parametrize(("one", "other"), [(PROTOCOL, AFTER_NEXT), (AFTER_NEXT, PROTOCOL), (PROTOCOL, OTHER)])
def test_a_hello_of_a_version_unlike_ours_is_refused_by_name_on_both_sides(
    one: ProtocolVersion, other: ProtocolVersion
) -> None:
    alto, bass = table("alto", protocol=one), table("bass", protocol=other)
    unlike, reject = bass.receive(alto.initiate("bass", now_s=0), now_s=0)
    assert isinstance(unlike, Unlike) and unlike.peer == "alto"
    assert f"alto speaks protocol {one}, this side {other}" in str(unlike.error)
    (back,) = alto.receive(replies([reject])[0], now_s=0)
    assert isinstance(back, Unlike) and back.peer == "bass"
    assert f"bass speaks protocol {other}, this side {one}" in str(back.error)
    assert alto.established("bass") is None and bass.established("alto") is None


def signed_by(name: str, kind: str, *fields: object) -> bytes:
    """A packet of a future layout, of which only version, fleet and sender are known."""
    raw = encode(list(fields))
    return encode([kind, raw, KEYS[name].sign(kind, raw)])


def test_of_another_version_only_the_sender_is_read_and_it_must_have_signed() -> None:
    bass = table("bass")
    whatever = ([9, 9], FLEET, "alto", [["anything"], 5])
    for kind in ("hello", "accept", "reject"):
        effect, *rest = bass.receive(signed_by("alto", kind, *whatever), now_s=0)
        assert isinstance(effect, Unlike) and "alto speaks protocol 9.9" in str(effect.error)
        assert len(rest) == (kind == "hello")
        with pytest.raises(SignatureError):
            bass.receive(signed_by("cello", kind, *whatever), now_s=0)
    for fields in ([[9, 9]], [[9, 9], FLEET, "../alto"], [[9, 9], FLEET, 5]):
        with pytest.raises(RosterError, match="a peer that gives no name"):
            bass.receive(signed_by("alto", "hello", *fields), now_s=0)
    for fields in ([], [[1]], [["1", 0], FLEET, "alto"], [[1, -1], FLEET, "alto"], [5, FLEET, "alto"]):
        with pytest.raises(CodecError):
            bass.receive(signed_by("alto", "hello", *fields), now_s=0)


def test_a_version_can_not_be_talked_down() -> None:
    """Both versions stand in what is signed, and the keys follow from it: a changed one is a forged one."""
    alto, bass = table("alto", protocol=NEXT), table("bass", protocol=NEXT)
    packet = alto.initiate("bass", now_s=0)
    _, (raw, signature) = read_packet(packet)
    lower = msgspec.structs.replace(read_body(Hello, raw, protocol=NEXT), protocol=PROTOCOL)
    with pytest.raises(SignatureError):
        bass.receive(encode(["hello", lower.encoded(), signature]), now_s=0)
    accept = only_reply(bass.receive(packet, now_s=0))
    _, (raw, signature) = read_packet(accept)
    with pytest.raises((SignatureError, CodecError)):
        alto.receive(encode(["accept", encode([[1, 0], *list_of(raw)[1:]]), signature]), now_s=0)


def list_of(raw: bytes) -> list[object]:
    fields = decode(raw)
    assert isinstance(fields, list)
    return fields


def test_a_reject_for_the_protocol_that_is_none_ends_the_attempt_only() -> None:
    """A member that says so although our versions agree: the Hello it names is not given up, since it names no context
    of ours, and one that does is settled."""
    alto = table("alto")
    packet = alto.initiate("bass", now_s=0)
    hello = signed_packet(KEYS["alto"], read_body(Hello, read_packet(packet)[1][0]))
    assert hello[0] == packet
    reject = Reject(
        fleet=FLEET, sender="bass", receiver="alto", boot=1, epoch=1, context=b"", code="protocol", reason="no",
        hello=hashlib.sha256(read_packet(packet)[1][0]).digest(), signed_roster=None,
    )  # fmt: skip
    (effect,) = alto.receive(forged(reject, "bass"), now_s=0)
    assert (effect.code, effect.reason) == ("protocol", "no")  # type: ignore[union-attr]


def test_births_of_other_versions() -> None:
    fields: dict[str, Any] = {"fleet": FLEET, "name": "alto", "boot": 1, "connection": 1, "version": "9", "epoch": 1}
    for version in (PROTOCOL, NEXT):
        assert read_presence(make_birth(KEYS["alto"], protocol=version, **fields), roster()).protocol == version
    with pytest.raises(ProtocolMismatch, match=f"alto speaks protocol {OTHER}"):
        read_presence(make_birth(KEYS["alto"], protocol=OTHER, **fields), roster())
    with pytest.raises(SignatureError):
        read_presence(make_birth(KEYS["bass"], protocol=OTHER, **fields), roster())


# --- messages that a later minor has ---------------------------------------------------------------------------------


class Inner(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    old: Count
    new: Count = 5
    added: ClassVar[Mapping[str, int]] = {"new": NEW}


class Grown(Message, frozen=True, kw_only=True):
    """It had `old` and `inner.old`; the next minor brings two fields."""

    old: Count
    new: tuple[Name, ...] = ()
    inner: Inner
    added: ClassVar[Mapping[str, int]] = {"new": NEW}


class Fresh(Message, frozen=True, kw_only=True):
    """The next minor brings it."""

    what: Name


@pytest.fixture
def later(monkeypatch: pytest.MonkeyPatch) -> None:
    """A registry with messages that came with minor 1."""
    monkeypatch.setattr(base, "_REGISTRY", dict(base._REGISTRY))
    register("test-grown")(Grown)
    register("test-fresh", since=NEW)(Fresh)


def test_a_field_that_came_later_is_left_out_for_an_older_peer_and_never_dropped(later: None) -> None:
    plain = Grown(old=1, inner=Inner(old=2))
    says_more = [
        (Grown(old=1, inner=Inner(old=2), new=("a",)), f"test-grown: new {TOO_NEW}"),
        (Grown(old=1, inner=Inner(old=2, new=9)), f"Inner: new {TOO_NEW}"),
    ]
    as_of_old = encode(["test-grown", {"old": 1, "inner": {"old": 2}}])
    assert encode_message(plain, minor=OLD) == as_of_old
    assert decode_message(as_of_old, minor=OLD) == plain
    assert least_minor(plain) == 0
    for message, words in says_more:
        assert decode_message(encode_message(message, minor=NEW), minor=NEW) == message
        with pytest.raises(LocalError, match=words):
            encode_message(message, minor=OLD)
        assert least_minor(message) == NEW


def test_in_one_minor_a_message_has_one_encoding(later: None) -> None:
    plain = Grown(old=1, inner=Inner(old=2))
    new, old = encode_message(plain, minor=NEW), encode_message(plain, minor=OLD)
    assert decode_message(new, minor=NEW) == decode_message(old, minor=OLD) == plain
    cases = [
        (old, 1, "missing fields new"),
        (new, 0, f"new {TOO_NEW}"),
        (encode(["test-grown", {"old": 1, "inner": {"old": 2, "new": 5}}]), 0, "not its one encoding"),
        (encode(["test-grown", {"old": 1, "new": [], "inner": {"old": 2}}]), 1, "not its one encoding"),
        (encode(["test-grown", {"old": 1, "inner": {"old": 2}, "zzz": 1}]), 0, "unknown field `zzz`"),
    ]
    for data, minor, words in cases:
        with pytest.raises(CodecError, match=words):
            decode_message(data, minor=minor)


def test_a_kind_that_came_later_is_neither_sent_nor_taken(later: None) -> None:
    fresh = Fresh(what="a")
    data = encode_message(fresh, minor=NEW)
    assert decode_message(data, minor=NEW) == fresh
    assert least_minor(fresh) == NEW
    with pytest.raises(LocalError, match=f"test-fresh {TOO_NEW}: upgrade"):
        encode_message(fresh, minor=OLD)
    with pytest.raises(CodecError, match=f"test-fresh {TOO_NEW}"):
        decode_message(data, minor=OLD)


# --- live, on endpoints ----------------------------------------------------------------------------------------------


def test_one_server_speaks_to_agents_of_both_minors_in_one_breath(later: None) -> None:
    """The same object, encoded once for each of them; what only the newer one knows fails by name for the older."""
    fleet = MemoryBand(BadHops(), names=("alto", "bass"))
    hub = fleet.add("hub", protocol=NEXT)
    alto, bass = fleet.add("alto"), fleet.add("bass", protocol=NEXT)
    fleet.all_online()
    plain, fresh = Grown(old=1, inner=Inner(old=2)), Fresh(what="a")
    reports = {name: hub.send(name, plain) for name in ("alto", "bass")}
    late = {name: hub.send(name, fresh) for name in ("alto", "bass")}
    back = alto.endpoint.send("hub", small(3), on_outcome=(heard := Report()))
    for report in (*reports.values(), *late.values(), heard):
        fleet.told(report)
    assert back and heard.delivered
    assert all(report.delivered for report in reports.values())
    assert late["bass"].delivered and not late["alto"].delivered
    assert f"message test-fresh {TOO_NEW}: upgrade" in late["alto"].told[-1][1]
    assert alto.got == [plain]
    assert sorted(bass.got, key=repr) == sorted([plain, fresh], key=repr)
    assert not [party.heard.refusals for party in fleet.parties.values() if party.heard.refusals]


def test_an_agent_that_is_upgraded_between_two_boots_gets_what_waits_in_its_new_tongue(later: None) -> None:
    fleet = MemoryBand(BadHops(), names=("alto",))
    hub, alto = fleet.add("hub", protocol=NEXT), fleet.add("alto")
    fleet.all_online()
    fleet.told(hub.send("alto", small(1)))
    alto.transport.kill()  # type: ignore[attr-defined]
    plain = hub.send("alto", Grown(old=1, inner=Inner(old=2)))  # under way, in the old tongue, to nobody
    fleet.run_until(lambda: not hub.endpoint.online("alto"))
    fresh = hub.send("alto", Fresh(what="a"))
    alto = fleet.add("alto", boot=2, protocol=NEXT)
    fleet.told(plain)
    fleet.told(fresh)
    assert plain.delivered and fresh.delivered
    assert len(alto.got) == 2


@pytest.mark.parametrize("version", [AFTER_NEXT, OTHER, V(PROTOCOL.major - 1, 7)])
def test_a_party_of_another_version_is_told_apart_from_one_that_is_away(version: ProtocolVersion) -> None:
    fleet = MemoryBand(BadHops(), names=("alto", "bass"))
    hub, alto, bass = fleet.add("hub"), fleet.add("alto", protocol=version), fleet.add("bass")
    fleet.run_until(lambda: "alto" in hub.endpoint.unlike() and "hub" in alto.endpoint.unlike())
    fleet.run_until(lambda: hub.endpoint.online("bass"))
    assert not hub.endpoint.online("alto") and not alto.endpoint.online("hub")
    assert f"alto speaks protocol {version}, this side {PROTOCOL}" in hub.endpoint.unlike()["alto"]
    assert f"hub speaks protocol {PROTOCOL}, this side {version}" in alto.endpoint.unlike()["hub"]
    report = Report()
    hub.endpoint.send("alto", small(1), expires_s=5.0, on_outcome=report)
    fleet.told(report)
    assert not report.delivered and f"alto speaks protocol {version}" in report.told[-1][1]
    # An upgrade ends it, and a replayed packet of before does not bring it back.
    stale = next(packet for packet in fleet.packets if packet.topic.endswith("alto/status"))
    alto = fleet.add("alto", boot=2)
    fleet.run_until(lambda: hub.endpoint.online("alto"))
    assert hub.endpoint.unlike() == {}
    hub.endpoint.on_packet(stale.topic, stale.payload, True)
    assert hub.endpoint.unlike() == {} and hub.endpoint.online("alto")
    assert bass.endpoint.unlike() == {}
