"""What somebody could send instead: each gets its named error, and leaves the table as it was."""

from __future__ import annotations

import ast
import random
from collections.abc import Callable
from pathlib import Path

import cbor2
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import sordino_common.channel
from helpers_channel import (
    FLEET,
    KEYS,
    OPERATOR,
    STRANGER_OPERATOR,
    WALL_S,
    Wall,
    altered,
    body_of,
    connect,
    entry,
    fixed_random,
    only_reply,
    opened,
    picture,
    replies,
    roster,
    session,
    signed,
    table,
)
from helpers_messages import mutate
from sordino_common.channel.handshake import SessionTable
from sordino_common.channel.packets import Hello, Reject, read_packet, roster_packet
from sordino_common.channel.presence import make_birth, make_death
from sordino_common.channel.roster import RosterBook, sign_roster
from sordino_common.errors import (
    CodecError,
    HandshakeError,
    RemoteError,
    RosterError,
    SessionError,
    SignatureError,
    StaleEpoch,
)
from sordino_common.messages.codec import encode

L = 2**252 + 27742317777372353535851937790883648493


def refused(owner: SessionTable, packet: bytes, error: type[RemoteError], text: str | None = None) -> None:
    """`owner` raises exactly `error` for `packet`, and is what it was."""
    before = picture(owner)
    with pytest.raises(RemoteError, match=text) as caught:
        owner.receive(packet, now_s=0)
    assert type(caught.value) is error
    assert picture(owner) == before


class Scene:
    """Alto's Hello is on its way to bass; bass's Accept and the confirmation were recorded in a twin of this world."""

    def __init__(self) -> None:
        self.alto, self.bass = table("alto"), table("bass")
        self.hello = self.alto.initiate("bass", now_s=0)
        twin_a, twin_b = table("alto"), table("bass")
        self.accept = only_reply(twin_b.receive(twin_a.initiate("bass", now_s=0), now_s=0))
        (self.confirm,) = replies(twin_a.receive(self.accept, now_s=0))
        newer = table("bass", first=signed(2))
        self.stale = only_reply(newer.receive(self.hello, now_s=0))
        older = table("alto", first=signed(2))
        self.wanted = only_reply(table("bass").receive(older.initiate("bass", now_s=0), now_s=0))


@pytest.fixture
def scene() -> Scene:
    return Scene()


def test_the_scene_is_one_in_which_the_real_packets_work(scene: Scene) -> None:
    assert only_reply(scene.bass.receive(scene.hello, now_s=0)) == scene.accept
    assert replies(scene.alto.receive(scene.accept, now_s=0)) == [scene.confirm]
    scene.bass.receive(scene.confirm, now_s=0)
    assert session(scene.alto, "bass").id == session(scene.bass, "alto").id
    assert len(Scene().alto.receive(scene.stale, now_s=0)) == 2


# --- who speaks ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("signer", ["bass", "cello", "hub", "stranger"])
def test_nobody_opens_in_anothers_name(scene: Scene, signer: str) -> None:
    refused(scene.bass, altered(scene.hello, signer), SignatureError, "hello: the signature does not verify")


def test_an_agent_can_not_play_the_server(scene: Scene) -> None:
    played = altered(scene.hello, "alto", sender="hub")
    refused(scene.bass, played, SignatureError)
    connect(scene.alto, scene.bass)
    assert scene.bass.established("hub") is None  # what alto opened is alto's, whatever it says in it


@pytest.mark.parametrize("signer", ["cello", "hub", "stranger", "alto"])
def test_nobody_answers_in_anothers_name(scene: Scene, signer: str) -> None:
    for packet in (scene.accept, scene.stale):
        refused(scene.alto, altered(packet, signer), SignatureError)


def test_swapped_names(scene: Scene) -> None:
    refused(scene.bass, altered(scene.hello, "bass", sender="bass", receiver="alto"), HandshakeError, "is for alto")
    cello = altered(scene.accept, "cello", sender="cello")
    refused(scene.alto, cello, HandshakeError, "accept from cello: answers no Hello of ours")


def test_a_hello_for_another_is_not_ours(scene: Scene) -> None:
    """Unknown-key-share: cello gets alto's Hello to bass, and can't make it one to itself."""
    cello = table("cello")
    refused(cello, scene.hello, HandshakeError, "is for bass, this is cello")
    refused(cello, altered(scene.hello, "cello", receiver="cello"), SignatureError)


def test_our_own_packets_sent_back_to_us(scene: Scene) -> None:
    refused(scene.alto, scene.hello, HandshakeError, "hello from alto: is for bass, this is alto")
    scene.bass.receive(scene.hello, now_s=0)
    refused(scene.bass, scene.accept, HandshakeError, "accept from bass: is for alto, this is bass")
    near, _ = connect(scene.alto, scene.bass)
    refused(scene.alto, near.seal(b"x"), SessionError, "forged or damaged")
    to_self = altered(scene.hello, "alto", receiver="alto")
    refused(scene.alto, to_self, HandshakeError, "we never write to ourselves")


def test_a_party_that_the_roster_does_not_know(scene: Scene) -> None:
    refused(
        scene.bass, altered(scene.hello, "stranger", sender="stranger"), RosterError, "'stranger' is not in epoch 1"
    )
    refused(scene.alto, altered(scene.accept, "stranger", sender="stranger"), RosterError, "'stranger'")


def test_a_party_whose_entry_has_expired() -> None:
    wall = Wall()
    entries = [entry("hub"), entry("bass"), entry("alto", not_after_s=WALL_S + 100)]
    first = signed(1, entries=entries)
    alto, bass = table("alto", first=first), table("bass", first=first, wall=wall)
    near, _ = connect(alto, bass)
    hello = alto.initiate("bass", now_s=0)
    wall.now_s = WALL_S + 100
    assert bass.established("alto") is None
    for packet in (hello, near.seal(b"x")):
        refused(bass, packet, RosterError, "the entry of alto has expired")


def test_another_fleet(scene: Scene) -> None:
    refused(
        scene.bass, altered(scene.hello, "alto", fleet="other"), HandshakeError, "for fleet other, this is fleet ward"
    )
    refused(scene.alto, altered(scene.accept, "bass", fleet="other"), HandshakeError, "for fleet other")


def test_without_any_roster(scene: Scene) -> None:
    empty = RosterBook(fleet=FLEET, operator_key=OPERATOR.public, wall_s=Wall())
    bass = SessionTable(name="bass", identity=KEYS["bass"], roster=empty, fleet=FLEET, boot=1)
    refused(bass, scene.hello, RosterError, "none of fleet ward was received yet")
    assert bass.established("alto") is None
    bass.receive(roster_packet(signed()), now_s=0)
    connect(scene.alto, bass)


# --- which roster ----------------------------------------------------------------------------------------------------


def test_our_epoch_with_another_roster(scene: Scene) -> None:
    other = table("alto", first=signed(1, expires_s=WALL_S + 99_999))
    refused(scene.bass, other.initiate("bass", now_s=0), RosterError, "another roster of epoch 1 than ours")
    refused(scene.alto, altered(scene.accept, "bass", roster=bytes(32)), RosterError, "another roster of epoch 1")


def test_an_accept_of_another_epoch(scene: Scene) -> None:
    refused(scene.alto, altered(scene.accept, "bass", epoch=2), HandshakeError, "accepts in epoch 2 a Hello of epoch 1")
    refused(scene.alto, altered(scene.accept, "bass", epoch=0), HandshakeError)


def test_a_reject_can_not_plant_a_roster(scene: Scene) -> None:
    for planted, error in (
        (sign_roster(roster(epoch=9), STRANGER_OPERATOR), SignatureError),
        (signed(9, fleet="other"), RosterError),
        (signed(1, expires_s=WALL_S + 99_999), RosterError),
        (signed(9, expires_s=WALL_S + 1, issued_s=1), RosterError),
        (b"nonsense", CodecError),
        (b"", CodecError),
    ):
        refused(scene.alto, altered(scene.stale, "bass", signed_roster=planted), error)
        refused(scene.alto, roster_packet(planted), error)
    scene.alto._book.accept(signed(3))
    scene.alto.receive(roster_packet(signed(3)), now_s=0)
    refused(scene.alto, roster_packet(signed(2)), StaleEpoch, "epoch 2 is older than epoch 3")


def test_a_reject_does_not_pull_our_roster_without_need(scene: Scene) -> None:
    for epoch in (1, 2):
        greedy = altered(scene.stale, "bass", code="roster-wanted", signed_roster=None, epoch=epoch)
        refused(scene.alto, greedy, HandshakeError, "wants our roster")


def test_a_hello_of_an_older_epoch_changes_nothing(scene: Scene) -> None:
    newer = table("bass", first=signed(2))
    before = picture(newer)
    body = body_of(only_reply(newer.receive(scene.hello, now_s=0)))
    assert isinstance(body, Reject)
    assert (body.code, body.epoch) == ("stale-epoch", 2)
    assert picture(newer) == before


def test_only_members_are_answered_with_a_roster(scene: Scene) -> None:
    newer = table("bass", first=signed(2))
    refused(newer, altered(scene.hello, "stranger"), SignatureError)
    refused(newer, altered(scene.hello, "stranger", sender="stranger"), RosterError)


# --- replays ---------------------------------------------------------------------------------------------------------


def test_an_old_hello_of_this_boot(scene: Scene) -> None:
    old = scene.hello
    connect(scene.alto, scene.bass)
    connect(scene.alto, scene.bass)
    refused(scene.bass, old, HandshakeError, "a replay, number 0 came after 1")


def test_a_hello_of_an_earlier_boot() -> None:
    bass = table("bass")
    old = table("alto", boot=1).initiate("bass", now_s=0)
    connect(table("alto", boot=2), bass)
    refused(bass, old, HandshakeError, "of boot 1, but boot 2 was seen. A replay; or its state folder")


def test_an_answer_from_an_earlier_boot(scene: Scene) -> None:
    """Alto has heard bass's boot 2, in another context: what bass signed in boot 1 is over, pending Hello or not."""
    connect(table("bass", boot=2), scene.alto, b"job")
    for packet in (scene.accept, scene.stale):
        refused(scene.alto, packet, HandshakeError, "from bass: of boot 1, but boot 2 was seen")


def test_a_replay_that_is_new_to_us_does_not_touch_the_live_session(scene: Scene) -> None:
    """Bass has restarted and forgotten; a Hello of alto's that it never saw is replayed after they have met again."""
    kept_back = scene.alto.initiate("bass", b"job", now_s=0)
    near, there = connect(scene.alto, scene.bass)
    replay_of_other_context = only_reply(scene.bass.receive(kept_back, now_s=0))
    assert scene.bass.established("alto") is there
    assert opened(scene.bass.receive(near.seal(b"alive"), now_s=0)) == [b"alive"]
    assert scene.bass.established("alto", b"job") is None
    restarted = table("alto", boot=2)
    refused(restarted, replay_of_other_context, HandshakeError, "answers no Hello of ours in this context")


def test_an_attacker_who_replays_can_not_confirm(scene: Scene) -> None:
    """The half-open session of a replayed Hello has a fresh ephemeral: yesterday's confirmation does not open it."""
    connect(scene.alto, scene.bass)
    fresh = table("bass", random=fixed_random("bass after a restart"), boot=2)
    fresh.receive(scene.hello, now_s=0)
    refused(fresh, scene.confirm, SessionError, "not one of ours")
    assert fresh.established("alto") is None


def test_an_old_accept(scene: Scene) -> None:
    connect(scene.alto, scene.bass)
    scene.alto.initiate("bass", now_s=0)
    before = picture(scene.alto)
    assert scene.alto.receive(scene.accept, now_s=0) == []  # it answers the Hello before, which is settled
    assert picture(scene.alto) == before
    connect(scene.alto, scene.bass)
    refused(scene.alto, scene.accept, HandshakeError, "accept from bass: answers no Hello of ours in this context")


def test_an_accept_or_reject_that_nobody_asked_for(scene: Scene) -> None:
    fresh = table("alto")
    for packet in (scene.accept, scene.stale, scene.wanted):
        refused(fresh, packet, HandshakeError, "answers no Hello of ours")


def test_an_old_reject(scene: Scene) -> None:
    scene.alto.drop("bass")
    pending = scene.alto.initiate("bass", now_s=0)
    assert scene.alto.receive(scene.stale, now_s=0) == []  # it is about the Hello before, which is settled
    assert scene.alto.initiate("bass", now_s=0) == pending
    assert scene.alto._book.require().epoch == 1
    connect(scene.alto, scene.bass)
    refused(scene.alto, scene.stale, HandshakeError, "reject from bass: answers no Hello")


def test_a_second_accept_for_one_hello_is_not_taken(scene: Scene) -> None:
    """A responder that answers twice, with two ephemerals, does not move a session that stands."""
    scene.alto.receive(scene.accept, now_s=0)
    before = picture(scene.alto)
    second = only_reply(table("bass", random=fixed_random("again")).receive(scene.hello, now_s=0))
    assert second != scene.accept
    assert scene.alto.receive(second, now_s=0) == []
    assert picture(scene.alto) == before


def test_replayed_data(scene: Scene) -> None:
    near, _ = connect(scene.alto, scene.bass)
    packet = near.seal(b"pay 100")
    scene.bass.receive(packet, now_s=0)
    refused(scene.bass, packet, SessionError, "is a replay")
    connect(scene.alto, scene.bass)
    refused(scene.bass, packet, SessionError, "is a replay")


def test_two_hellos_with_one_number(scene: Scene) -> None:
    scene.bass.receive(scene.hello, now_s=0)
    other = table("alto", random=fixed_random("two-faced")).initiate("bass", now_s=0)
    refused(scene.bass, other, HandshakeError, "two different Hellos with the number 0")


# --- what is in it ---------------------------------------------------------------------------------------------------


def test_another_context(scene: Scene) -> None:
    refused(scene.alto, altered(scene.accept, "bass", context=b"job"), HandshakeError, "in this context")
    refused(scene.alto, altered(scene.stale, "bass", context=b"job"), HandshakeError, "in this context")


def test_an_accept_for_another_hello(scene: Scene) -> None:
    refused(scene.alto, altered(scene.accept, "bass", hello=bytes(32)), HandshakeError, "answers no Hello of ours")


@pytest.mark.parametrize(
    ("key", "text"),
    [
        (bytes(32), "small order"),
        ((1).to_bytes(32, "little"), "small order"),
        (bytes.fromhex("e0eb7a7c3b41b8ae1656e3faf19fc46ada098deb9c32b1fd866205165f49b800"), "small order"),
        ((2**255 - 19).to_bytes(32, "little"), "not canonical"),
        (b"\xff" * 32, "not canonical"),
    ],
)
def test_degenerate_ephemerals(scene: Scene, key: bytes, text: str) -> None:
    refused(scene.bass, altered(scene.hello, "alto", ephemeral=key), HandshakeError, text)
    refused(scene.alto, altered(scene.accept, "bass", ephemeral=key), HandshakeError, text)


def test_a_session_id_that_is_in_use() -> None:
    """Random bytes that repeat give the same ephemeral, so the same Hello and the same keys. It must not be taken."""
    alto, bass = table("alto"), table("bass", random=lambda count: b"\x42" * count)
    hello = alto.initiate("bass", now_s=0)
    (confirm,) = replies(alto.receive(only_reply(bass.receive(hello, now_s=0)), now_s=0))
    bass.receive(confirm, now_s=0)
    slot = bass._slots.by_peer["alto"][b""]
    slot.heard, slot.confirmed = (-1, -1, b""), b""  # as if the memory of that Hello had been evicted
    refused(bass, hello, HandshakeError, "is in use")


def test_signatures_that_are_malleable_or_of_a_wrong_length(scene: Scene) -> None:
    kind, (body, signature) = read_packet(scene.hello)
    s = int.from_bytes(signature[32:], "little") + L
    for bad, text in (
        (signature[:32] + s.to_bytes(32, "little"), "malleable"),
        (signature[:-1], "64 bytes, got 63"),
        (signature + b"\0", "64 bytes, got 65"),
        (b"", "64 bytes, got 0"),
        (bytes(64), "does not verify"),
    ):
        refused(scene.bass, encode([kind, body, bad]), SignatureError, text)


def test_one_kind_of_packet_does_not_pass_for_another(scene: Scene) -> None:
    kinds = ("hello", "accept", "reject", "birth", "death")
    for packet in (scene.hello, scene.accept, scene.stale):
        kind, (body, signature) = read_packet(packet)
        for other in kinds:
            if other != kind:
                for owner in (scene.alto, scene.bass):
                    refused(owner, encode([other, body, signature]), CodecError)
    hello_as_signed_for_accept = encode(["hello", read_packet(scene.hello)[1][0], read_packet(scene.accept)[1][1]])
    refused(scene.bass, hello_as_signed_for_accept, SignatureError)


def test_presence_is_not_for_the_table(scene: Scene) -> None:
    fields = {"fleet": "ward", "name": "alto", "boot": 1, "connection": 1}
    death = make_death(KEYS["alto"], **fields)  # type: ignore[arg-type]
    birth = make_birth(KEYS["alto"], version="1", epoch=1, **fields)  # type: ignore[arg-type]
    for packet in (death, birth):
        refused(scene.bass, packet, CodecError, "is not for them")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("protocol", 1),
        ("protocol", [1, 0, 0]),
        ("protocol", [1, True]),
        ("protocol", [1, 65_536]),
        ("fleet", "Ward"),
        ("fleet", b"ward"),
        ("sender", "alto\n"),
        ("sender", "../alto"),
        ("receiver", ""),
        ("boot", -1),
        ("boot", 1 << 63),
        ("boot", 1.0),
        ("sequence", None),
        ("epoch", "1"),
        ("roster", bytes(31)),
        ("context", bytes(257)),
        ("context", "YWJj"),
        ("ephemeral", bytes(31)),
        ("ephemeral", bytes(33)),
        ("ephemeral", "A" * 43 + "="),  # base64 of 32 bytes
    ],
)
def test_fields_out_of_bounds(scene: Scene, name: str, value: object) -> None:
    """Validly signed, canonical, and still no Hello."""
    fields = cbor2.loads(read_packet(scene.hello)[1][0])
    fields[Hello.__struct_fields__.index(name)] = value
    raw = cbor2.dumps(fields, canonical=True)
    refused(scene.bass, encode(["hello", raw, KEYS["alto"].sign("hello", raw)]), CodecError, f"hello: .*`{name}")


def test_bodies_with_fields_too_few_too_many_or_not_a_list(scene: Scene) -> None:
    fields = cbor2.loads(read_packet(scene.hello)[1][0])
    for value in (fields[:-1], [*fields, 0], [], {}, None, fields[::-1], [[[fields]]]):
        raw = cbor2.dumps(value, canonical=True)
        refused(scene.bass, encode(["hello", raw, KEYS["alto"].sign("hello", raw)]), CodecError)


def test_a_body_that_is_not_canonical(scene: Scene) -> None:
    body = read_packet(scene.hello)[1][0]
    loose = body[:1] + b"\x18\x01" + body[2:]  # version 1 in two bytes
    refused(
        scene.bass, encode(["hello", loose, KEYS["alto"].sign("hello", loose)]), CodecError, "not the shortest form"
    )
    trailing = body + b"\0"
    refused(scene.bass, encode(["hello", trailing, KEYS["alto"].sign("hello", trailing)]), CodecError, "after the end")
    indefinite = b"\x9f" + body[1:] + b"\xff"
    refused(scene.bass, encode(["hello", indefinite, KEYS["alto"].sign("hello", indefinite)]), CodecError, "indefinite")


PACKETS: dict[str, Callable[[Scene], tuple[SessionTable, bytes]]] = {
    "hello": lambda scene: (scene.bass, scene.hello),
    "accept": lambda scene: (scene.alto, scene.accept),
    "stale-epoch": lambda scene: (scene.alto, scene.stale),
    "roster": lambda scene: (scene.alto, roster_packet(signed(2))),
    "sealed": lambda scene: (_half_open(scene), scene.confirm),
}


def _half_open(scene: Scene) -> SessionTable:
    scene.bass.receive(scene.hello, now_s=0)
    return scene.bass


@pytest.mark.parametrize("kind", sorted(PACKETS))
def test_cut_anywhere_or_with_a_byte_more(scene: Scene, kind: str) -> None:
    owner, packet = PACKETS[kind](scene)
    for end in range(len(packet)):
        refused(owner, packet[:end], CodecError)
    refused(owner, packet + b"\0", CodecError)
    assert owner.receive(packet, now_s=0)


@settings(deadline=None, derandomize=True, max_examples=500)
@given(st.sampled_from(sorted(PACKETS)), st.data())
def test_any_flipped_bit_of_any_packet_is_refused(kind: str, data: st.DataObject) -> None:
    owner, packet = PACKETS[kind](SHARED if kind != "sealed" else Scene())
    bit = data.draw(st.integers(0, len(packet) * 8 - 1))
    bad = bytearray(packet)
    bad[bit // 8] ^= 1 << bit % 8
    before = picture(owner)
    with pytest.raises(RemoteError):
        owner.receive(bytes(bad), now_s=0)
    assert picture(owner) == before


SHARED = Scene()


def test_mutated_packets_are_refused_by_name_or_are_the_original() -> None:
    rng = random.Random(20_261_123)
    scene = Scene()
    pairs = [PACKETS[kind](scene) for kind in sorted(PACKETS) if kind != "sealed"]
    for _ in range(3000):
        owner, packet = rng.choice(pairs)
        bad = mutate(packet, rng)
        if bad != packet:
            before = picture(owner)
            with pytest.raises(RemoteError):
                owner.receive(bad, now_s=0)
            assert picture(owner) == before


def test_sealed_packets_for_sessions_that_are_not_there(scene: Scene) -> None:
    near, _ = connect(scene.alto, scene.bass)
    packet = near.seal(b"x")
    refused(table("cello"), packet, SessionError, "not one of ours")
    scene.bass.drop("alto")
    refused(scene.bass, packet, SessionError, "not one of ours, or no longer")


def test_a_packet_of_one_session_under_the_id_of_another(scene: Scene) -> None:
    near, _ = connect(scene.alto, scene.bass)
    job, _ = connect(scene.alto, scene.bass, b"job")
    _, (_, counter, ciphertext) = read_packet(near.seal(b"x"))
    refused(scene.bass, encode(["sealed", job.id, counter + 1, bytes(ciphertext)]), SessionError, "forged")


# --- the room --------------------------------------------------------------------------------------------------------


def test_nothing_here_knows_sockets_clocks_loops_or_numpy() -> None:
    forbidden = {"socket", "time", "asyncio", "numpy", "threading", "selectors", "logging", "random", "pickle"}
    folder = Path(sordino_common.channel.__file__).parent
    modules = sorted(folder.glob("*.py"))
    assert len(modules) >= 10
    for module in modules:
        for node in ast.walk(ast.parse(module.read_text("utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not {name.split(".")[0] for name in names} & forbidden, module.name
