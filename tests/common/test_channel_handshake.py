"""The handshake as its essay has it: one test per line of the first table, on perfect and on bad links."""

from __future__ import annotations

import hashlib
import random
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers_channel import (
    FLEET,
    KEYS,
    WALL_S,
    FakeLink,
    Wall,
    body_of,
    book,
    connect,
    entry,
    forged,
    only_reply,
    opened,
    picture,
    replies,
    roster,
    session,
    signed,
    table,
)
from sordino_common.channel.effects import Established, Lost, Opened, Rejected, Reply, RosterOffered
from sordino_common.channel.handshake import OFFER_BYTES, SessionTable
from sordino_common.channel.packets import Reject, read_packet, roster_packet
from sordino_common.channel.roster import RosterEntry
from sordino_common.channel.session import Session
from sordino_common.channel.slots import CONTEXTS_PER_PEER, HALF_OPEN_S, OLDER_SESSIONS
from sordino_common.errors import CodecError, HandshakeError, LocalError, RosterError, SessionError

# --- a perfect link --------------------------------------------------------------------------------------------------


def test_three_packets_make_a_session() -> None:
    alto, bass = table("alto"), table("bass")
    hello = alto.initiate("bass", now_s=0)
    (accepted,) = bass.receive(hello, now_s=0)
    assert isinstance(accepted, Reply)
    assert accepted.to == "alto"
    assert bass.established("alto") is None  # not before the initiator has shown that it has the key
    established, confirm = alto.receive(accepted.packet, now_s=0)
    assert isinstance(established, Established)
    assert isinstance(confirm, Reply)
    assert confirm.to == "bass"
    assert alto.established("bass") is established.session
    (there,) = bass.receive(confirm.packet, now_s=0)
    assert isinstance(there, Established)
    assert there.session.id == established.session.id
    assert bass.established("alto") is there.session

    packet = established.session.seal(b"ping")
    assert bass.receive(packet, now_s=0) == [
        Opened(peer="alto", context=b"", session_id=there.session.id, plaintext=b"ping")
    ]
    assert opened(alto.receive(there.session.seal(b"pong"), now_s=0)) == [b"pong"]


def test_the_first_data_confirms_as_well() -> None:
    alto, bass = table("alto"), table("bass")
    accept = only_reply(bass.receive(alto.initiate("bass", now_s=0), now_s=0))
    alto.receive(accept, now_s=0)  # the empty packet is lost
    effects = bass.receive(session(alto, "bass").seal(b"data"), now_s=0)
    assert [type(effect) for effect in effects] == [Established, Opened]


def test_contexts_are_sessions_of_their_own() -> None:
    alto, bass = table("alto"), table("bass")
    plain, _ = connect(alto, bass)
    job, there = connect(alto, bass, b"job 1")
    assert plain.id != job.id
    (found,) = bass.receive(job.seal(b"x"), now_s=0)
    assert found == Opened(peer="alto", context=b"job 1", session_id=there.id, plaintext=b"x")
    alto.drop("bass", b"job 1")
    assert alto.established("bass", b"job 1") is None
    assert alto.established("bass") is plain


def test_the_same_hello_is_sent_again_until_it_is_settled() -> None:
    alto, bass = table("alto"), table("bass")
    hello = alto.initiate("bass", now_s=0)
    assert alto.initiate("bass", now_s=50) == hello
    accept = only_reply(bass.receive(hello, now_s=0))
    state = picture(bass)
    assert only_reply(bass.receive(hello, now_s=1)) == accept
    assert picture(bass) == state
    (confirm,) = replies(alto.receive(accept, now_s=1))
    state = picture(alto)
    assert alto.receive(accept, now_s=2) == []  # QoS 1 repeats
    assert picture(alto) == state
    bass.receive(confirm, now_s=2)
    state = picture(bass)
    assert bass.receive(hello, now_s=3) == []
    assert picture(bass) == state
    assert alto.initiate("bass", now_s=4) != hello


def test_a_new_handshake_replaces_the_session_without_a_gap() -> None:
    alto, bass = table("alto"), table("bass")
    old_a, old_b = connect(alto, bass)
    hello = alto.initiate("bass", now_s=0)
    assert alto.established("bass") is old_a
    accept = only_reply(bass.receive(hello, now_s=0))
    assert bass.established("alto") is old_b
    in_flight = old_b.seal(b"on its way")
    (confirm,) = replies(alto.receive(accept, now_s=0))
    assert session(alto, "bass").id != old_a.id
    assert opened(alto.receive(in_flight, now_s=0)) == [b"on its way"]
    late = old_a.seal(b"late")
    bass.receive(confirm, now_s=0)
    assert session(bass, "alto").id == session(alto, "bass").id
    assert opened(bass.receive(late, now_s=0)) == [b"late"]


def test_old_sessions_are_forgotten_in_the_end() -> None:
    alto, bass = table("alto"), table("bass")
    ends = [connect(alto, bass) for _ in range(OLDER_SESSIONS + 2)]
    with pytest.raises(SessionError, match="not one of ours, or no longer"):
        bass.receive(ends[0][0].seal(b"x"), now_s=0)
    for near, _ in ends[1:]:
        assert opened(bass.receive(near.seal(b"x"), now_s=0)) == [b"x"]
    assert len(bass._slots.by_session) == len(alto._slots.by_session) == OLDER_SESSIONS + 1


# --- both at once ----------------------------------------------------------------------------------------------------


def test_simultaneous_open_the_smaller_name_wins() -> None:
    alto, bass = table("alto"), table("bass")
    from_alto, from_bass = alto.initiate("bass", now_s=0), bass.initiate("alto", now_s=0)
    assert only_reply(alto.receive(from_bass, now_s=0)) == from_alto
    accept = only_reply(bass.receive(from_alto, now_s=0))
    (confirm,) = replies(alto.receive(accept, now_s=0))
    bass.receive(confirm, now_s=0)
    assert session(alto, "bass").id == session(bass, "alto").id
    assert session(alto, "bass").initiated
    assert bass.receive(accept_of(alto, from_bass), now_s=0) == []  # bass's own Hello is settled


def accept_of(responder: SessionTable, hello: bytes) -> bytes:
    return only_reply(responder.receive(hello, now_s=0))


def test_crossing_handshakes_always_leave_both_able_to_read() -> None:
    """Alto has accepted bass's Hello, then opens itself; both Accepts and both confirmations cross."""
    alto, bass = table("alto"), table("bass")
    from_bass = bass.initiate("alto", now_s=0)
    accept_by_alto = only_reply(alto.receive(from_bass, now_s=0))
    accept_by_bass = only_reply(bass.receive(alto.initiate("bass", now_s=0), now_s=0))
    (confirm_by_bass,) = replies(bass.receive(accept_by_alto, now_s=0))
    (confirm_by_alto,) = replies(alto.receive(accept_by_bass, now_s=0))
    bass.receive(confirm_by_alto, now_s=0)
    alto.receive(confirm_by_bass, now_s=0)
    for sender, receiver in ((alto, bass), (bass, alto)):
        packet = session(sender, receiver.name).seal(b"x")
        assert opened(receiver.receive(packet, now_s=0)) == [b"x"]


# --- restarts and rosters --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("who", ["initiator", "responder"])
def test_a_restarted_peer_costs_the_old_sessions(who: str) -> None:
    alto, bass = table("alto"), table("bass")
    connect(alto, bass)
    connect(alto, bass, b"job")
    again = table("alto", boot=2)
    if who == "initiator":
        effects = bass.receive(again.initiate("bass", now_s=0), now_s=0)
    else:
        accept = only_reply(again.receive(bass.initiate("alto", now_s=0), now_s=0))
        effects = bass.receive(accept, now_s=0)
    reason = "alto restarted (boot 1, now 2)"
    lost = [effect for effect in effects if isinstance(effect, Lost)]
    assert lost == [
        Lost(peer="alto", context=b"", reason=reason),
        Lost(peer="alto", context=b"job", reason=reason),
    ]
    assert bass.established("alto", b"job") is None


def test_a_peer_that_restarts_while_we_wait_answers_the_hello_sent_again() -> None:
    alto, bass = table("alto"), table("bass")
    hello = alto.initiate("bass", now_s=0)
    first = only_reply(bass.receive(hello, now_s=0))
    second = only_reply(table("bass", boot=2).receive(hello, now_s=0))
    alto.receive(first, now_s=0)
    effects = alto.receive(second, now_s=0)  # settled, but its boot tells that the session is dead
    assert [type(effect) for effect in effects] == [Lost]
    assert alto.established("bass") is None


def test_a_responder_with_a_newer_roster_brings_the_initiator_up_to_date() -> None:
    alto, bass = table("alto"), table("bass", first=signed(2))
    cello = table("cello")
    connect(alto, cello)
    reject = only_reply(bass.receive(alto.initiate("bass", now_s=0), now_s=0))
    body = body_of(reject)
    assert isinstance(body, Reject)
    assert body.code == "stale-epoch"
    offered, lost, hello = alto.receive(reject, now_s=0)
    assert offered == RosterOffered(signed=signed(2))
    assert lost == Lost(peer="cello", context=b"", reason="the roster changed (epoch 1, now 2)")
    assert isinstance(hello, Reply)
    confirm = replies(alto.receive(only_reply(bass.receive(hello.packet, now_s=0)), now_s=0))
    bass.receive(confirm[0], now_s=0)
    assert session(alto, "bass").id == session(bass, "alto").id


def test_a_responder_with_an_older_roster_asks_for_ours() -> None:
    alto, bass = table("alto", first=signed(2)), table("bass")
    hello = alto.initiate("bass", now_s=0)
    wanted = only_reply(bass.receive(hello, now_s=0))
    offer, again = replies(alto.receive(wanted, now_s=0))
    assert offer == roster_packet(signed(2))
    assert again == hello
    assert bass.receive(offer, now_s=0) == [RosterOffered(signed=signed(2))]
    assert bass.receive(offer, now_s=0) == []
    alto.receive(only_reply(bass.receive(hello, now_s=0)), now_s=0)
    assert alto.established("bass") is not None


def test_a_roster_too_large_for_a_packet_is_left_to_its_topic() -> None:
    many = [
        RosterEntry(
            name=f"agent-{number}",
            sign_key=(2 * number + 3).to_bytes(32, "little"),
            box_key=(2 * number + (1 << 200)).to_bytes(32, "little"),
            roles=("data",),
        )
        for number in range(1500)
    ]
    big = signed(2, entries=[*roster().entries, *many])
    assert len(big) > OFFER_BYTES
    alto, bass = table("alto"), table("bass", first=big)
    reject = only_reply(bass.receive(alto.initiate("bass", now_s=0), now_s=0))
    (refused,) = alto.receive(reject, now_s=0)
    assert isinstance(refused, Rejected)
    assert refused.code == "stale-epoch"
    assert refused.reason == "your roster is of epoch 1, that of bass is of epoch 2"
    assert alto.receive(reject, now_s=0) == []


def test_a_new_roster_that_leaves_the_peer_out() -> None:
    alto = table("alto")
    hello = alto.initiate("bass", now_s=0)
    without = signed(2, entries=[entry("hub"), entry("alto")])
    reject = Reject(
        fleet=FLEET,
        sender="bass",
        receiver="alto",
        boot=1,
        epoch=2,
        context=b"",
        hello=_hash(hello),
        code="stale-epoch",
        reason="newer",
        signed_roster=without,
    )
    effects = alto.receive(forged(reject, "bass"), now_s=0)
    assert [type(effect) for effect in effects] == [RosterOffered, Rejected]
    refused = effects[1]
    assert isinstance(refused, Rejected)
    assert refused.code == "roster"
    with pytest.raises(RosterError, match="'bass' is not in epoch 2"):
        alto.initiate("bass", now_s=0)


def _hash(hello: bytes) -> bytes:
    return hashlib.sha256(read_packet(hello)[1][0]).digest()


def test_a_roster_taken_elsewhere_ends_the_sessions() -> None:
    """The endpoint gives the book a roster from its topic; the table notices, and still owes the news of the loss."""
    alto, bass = table("alto"), table("bass")
    old, _ = connect(alto, bass)
    pending = bass.initiate("cello", now_s=0)
    bass._book.accept(signed(2))
    assert bass.established("alto") is None
    with pytest.raises(SessionError):
        bass.receive(old.seal(b"x"), now_s=0)
    effects = bass.receive(roster_packet(signed(2)), now_s=0)
    assert effects == [Lost(peer="alto", context=b"", reason="the roster changed (epoch 1, now 2)")]
    assert bass.receive(roster_packet(signed(2)), now_s=0) == []
    assert bass.initiate("cello", now_s=0) != pending


def test_a_party_that_a_new_roster_leaves_out_is_forgotten() -> None:
    alto, bass = table("alto"), table("bass")
    connect(alto, bass)
    bass.receive(roster_packet(signed(2, entries=[entry("hub"), entry("bass")])), now_s=0)
    assert not bass._slots.by_peer
    assert not bass._slots.boots
    with pytest.raises(RosterError, match="'alto' is not in epoch 2"):
        bass.receive(alto.initiate("bass", now_s=0), now_s=0)


def test_an_expired_roster_ends_everything_until_a_new_one_comes() -> None:
    wall = Wall()
    alto, bass = table("alto"), table("bass", wall=wall)
    near, _ = connect(alto, bass)
    wall.now_s = WALL_S + 86_400
    assert bass.established("alto") is None
    for packet in (near.seal(b"x"), alto.initiate("bass", now_s=0)):
        with pytest.raises(RosterError, match="epoch 1 has expired"):
            bass.receive(packet, now_s=0)
    with pytest.raises(RosterError, match="epoch 1 has expired"):
        bass.initiate("alto", now_s=0)
    offer = roster_packet(signed(2, expires_s=WALL_S + 200_000))
    effects = bass.receive(offer, now_s=0)
    assert [type(effect) for effect in effects] == [RosterOffered, Lost]


@pytest.mark.parametrize("initiates", [True, False])
def test_a_session_holds_for_as_long_as_the_entry_in_the_roster_that_it_is_bound_to(initiates: bool) -> None:
    """To the second, on both sides of a handshake; a new roster brings new ends; a clock set back, the old ones."""
    wall = Wall()

    def book_of(epoch: int, ends_s: int | None) -> bytes:
        return signed(epoch, entries=[entry("hub"), entry("bass"), entry("alto", not_after_s=ends_s)])

    first = book_of(1, WALL_S + 100)
    alto, bass = table("alto", first=first), table("bass", first=first, wall=wall)

    def meet() -> Session:
        return connect(bass, alto)[1] if initiates else connect(alto, bass)[0]

    near = meet()
    for now_s, holds in ((99.5, True), (100, False), (99.5, True), (50_000, False)):
        wall.now_s = WALL_S + now_s
        assert (bass.established("alto") is not None) is holds
        if holds:
            assert opened(bass.receive(near.seal(b"x"), now_s=0)) == [b"x"]
        else:
            with pytest.raises(RosterError, match="the entry of alto has expired"):
                bass.receive(near.seal(b"x"), now_s=0)
    for epoch, ends_s, last_s in ((2, 200, 199), (3, None, 86_399), (4, 50, 49)):
        wall.now_s = WALL_S
        offer = roster_packet(book_of(epoch, None if ends_s is None else WALL_S + ends_s))
        for party in (alto, bass):
            party.receive(offer, now_s=0)
        assert bass.established("alto") is None
        near = meet()
        wall.now_s = WALL_S + last_s
        assert opened(bass.receive(near.seal(b"y"), now_s=0)) == [b"y"]
        wall.now_s = WALL_S + last_s + 1
        assert bass.established("alto") is None
        with pytest.raises(RosterError, match="has expired"):
            bass.receive(near.seal(b"y"), now_s=0)


def test_a_device_whose_key_the_roster_does_not_list_is_told_so() -> None:
    wrong = SessionTable(name="alto", identity=KEYS["stranger"], roster=book(), fleet=FLEET, boot=1)
    with pytest.raises(
        RosterError, match=r"lists other keys for alto than this device has \(.*Enrol this device again"
    ):
        wrong.initiate("bass", now_s=0)


# --- bounds, and our own mistakes ------------------------------------------------------------------------------------


def test_half_open_sessions_are_bounded_and_the_oldest_goes_first() -> None:
    hub = table("hub", max_half_open=2)
    others = [table(name) for name in ("alto", "bass", "cello")]
    accepts = [only_reply(hub.receive(other.initiate("hub", now_s=0), now_s=0)) for other in others]
    assert len(hub._slots.half_open) == len(hub._slots.by_session) == 2
    confirms = [replies(other.receive(accept, now_s=0))[0] for other, accept in zip(others, accepts, strict=True)]
    with pytest.raises(SessionError, match="not one of ours"):
        hub.receive(confirms[0], now_s=0)
    for confirm in confirms[1:]:
        assert [type(effect) for effect in hub.receive(confirm, now_s=0)] == [Established]
    connect(others[0], hub)  # and the evicted one gets in when it tries again
    assert not hub._slots.half_open


def test_a_hello_whose_half_open_session_was_evicted_is_accepted_anew() -> None:
    hub, alto, bass = table("hub", max_half_open=1), table("alto"), table("bass")
    hello = alto.initiate("hub", now_s=0)
    first = only_reply(hub.receive(hello, now_s=0))
    hub.receive(bass.initiate("hub", now_s=0), now_s=0)
    second = only_reply(hub.receive(hello, now_s=0))
    assert first != second
    (confirm,) = replies(alto.receive(second, now_s=0))
    assert [type(effect) for effect in hub.receive(confirm, now_s=0)] == [Established]


def test_a_newer_hello_takes_the_place_of_a_half_open_session() -> None:
    hub, alto = table("hub"), table("alto")
    hub.receive(alto.initiate("hub", now_s=0), now_s=0)
    alto.drop("hub")
    near, there = connect(alto, hub)
    assert near.id == there.id
    assert list(hub._slots.by_session) == [there.id]
    assert not hub._slots.half_open


def test_half_open_sessions_grow_old() -> None:
    hub, alto, bass = table("hub"), table("alto"), table("bass")
    hub.receive(alto.initiate("hub", now_s=0), now_s=0)
    hub.receive(bass.initiate("hub", now_s=0), now_s=HALF_OPEN_S - 1)
    assert len(hub._slots.half_open) == 2
    hub.receive(table("cello").initiate("hub", now_s=0), now_s=HALF_OPEN_S)
    assert list(hub._slots.half_open) == [("bass", b""), ("cello", b"")]


def test_a_flood_of_hellos_from_one_member_hurts_only_itself() -> None:
    hub, alto, bass = table("hub"), table("alto"), table("bass")
    near, _ = connect(alto, hub)
    for number in range(3 * CONTEXTS_PER_PEER):
        hub.receive(bass.initiate("hub", b"%d" % number, now_s=0), now_s=0)
        bass.drop("hub")
    assert len(hub._slots.all()) == 1 + CONTEXTS_PER_PEER - 1  # one of bass's is kept for commands
    assert len(hub._slots.half_open) == CONTEXTS_PER_PEER - 1
    assert opened(hub.receive(near.seal(b"still here"), now_s=0)) == [b"still here"]


def test_contexts_in_use_are_not_taken_away() -> None:
    hub, bass = table("hub"), table("bass")
    for number in range(CONTEXTS_PER_PEER - 1):  # one is kept for commands
        connect(bass, hub, b"%d" % number)
    with pytest.raises(LocalError, match="31 contexts are in use"):
        bass.initiate("hub", b"one more", now_s=0)
    bass.drop("hub", b"0")
    hello = bass.initiate("hub", b"one more", now_s=0)
    state = picture(hub)
    with pytest.raises(HandshakeError, match="31 contexts are in use"):
        hub.receive(hello, now_s=0)
    assert picture(hub) == state
    connect(bass, hub, b"")
    hub.drop("bass", b"0")
    assert len(replies(hub.receive(hello, now_s=0))) == 1


def test_drop_forgets_and_says_what_was_lost() -> None:
    alto, bass = table("alto"), table("bass")
    near, _ = connect(alto, bass)
    pending = alto.initiate("cello", now_s=0)
    assert bass.drop("alto", reason="no answer") == [Lost(peer="alto", context=b"", reason="no answer")]
    assert bass.drop("alto") == []
    with pytest.raises(SessionError):
        bass.receive(near.seal(b""), now_s=0)
    assert alto.drop_all() == [Lost(peer="bass", context=b"", reason="dropped")]
    assert not alto._slots.by_session
    assert alto.initiate("cello", now_s=0) != pending


def test_after_a_drop_on_one_side_the_next_hello_mends_it() -> None:
    alto, bass = table("alto"), table("bass")
    connect(alto, bass)
    bass.drop("alto")
    near, there = connect(alto, bass)
    assert near.id == there.id


def test_mistakes_of_our_own() -> None:
    alto = table("alto")
    with pytest.raises(LocalError, match="a session with itself"):
        alto.initiate("alto", now_s=0)
    with pytest.raises(LocalError, match="use a hash"):
        alto.initiate("bass", bytes(257), now_s=0)
    with pytest.raises(LocalError, match="on the roster of fleet ward"):
        SessionTable(name="alto", identity=KEYS["alto"], roster=book(), fleet="other", boot=1)
    with pytest.raises(RosterError, match="'nobody'"):
        alto.initiate("nobody", now_s=0)
    with pytest.raises(CodecError):
        alto.receive(b"", now_s=0)
    assert repr(alto) == "SessionTable(alto, 0 sessions, 0 of them half-open)"


# --- bad links -------------------------------------------------------------------------------------------------------


@dataclass
class Pair:
    """Two tables on a bad link; `talk` is what a reliable link above would do: Hello again until there is a session."""

    seed: int
    loss: float
    repeat: float
    link: FakeLink = field(init=False)

    def __post_init__(self) -> None:
        tables = {name: table(name, random=random.Random(f"{name} {self.seed}").randbytes) for name in ("alto", "bass")}
        self.link = FakeLink(tables=tables, rng=random.Random(self.seed), loss=self.loss, repeat=self.repeat)

    def hello(self, who: str) -> None:
        peer = "bass" if who == "alto" else "alto"
        self.link.send(peer, self.link.tables[who].initiate(peer, now_s=self.link.now_s))

    def say(self, who: str, plaintext: bytes) -> bool:
        peer = "bass" if who == "alto" else "alto"
        found = self.link.tables[who].established(peer)
        if found is not None:
            self.link.send(peer, found.seal(plaintext))
        return found is not None

    def talk(self, who: str, plaintext: bytes, *, tries: int = 200) -> None:
        """Until `plaintext` arrives; a session that gives no answer is set up again, as the link above does."""
        peer = "bass" if who == "alto" else "alto"
        for attempt in range(tries):
            self.link.now_s += 1
            if not self.say(who, plaintext) or attempt % 5 == 4:
                self.hello(who)
            self.link.settle()
            if plaintext in self.link.got.get(peer, []):
                return
        raise AssertionError(f"{who} did not get through")


@settings(deadline=None, derandomize=True, max_examples=60)
@given(
    seed=st.integers(0, 1 << 30),
    loss=st.sampled_from([0.0, 0.2, 0.6]),
    repeat=st.sampled_from([0.0, 0.3, 0.8]),
    steps=st.lists(
        st.sampled_from(["alto hello", "bass hello", "alto say", "bass say", "deliver", "old"]), max_size=60
    ),
)
def test_whatever_the_network_does_both_get_through_in_the_end(
    seed: int, loss: float, repeat: float, steps: list[str]
) -> None:
    """Chaos first (lost, repeated, reordered, replayed packets, both opening at once), then both reach each other.

    `FakeLink` checks on the way that every refusal left the table as it was."""
    pair = Pair(seed, loss, repeat)
    for step in steps:
        match step.split():
            case [who, "hello"]:
                pair.hello(who)
            case [who, "say"]:
                pair.say(who, b"chaos")
            case ["deliver"]:
                pair.link.deliver()
            case _ if pair.link.past:
                pair.link.give(*pair.link.rng.choice(pair.link.past))
            case _:
                pass
    pair.talk("alto", b"from alto")
    pair.talk("bass", b"from bass")
    pair.link.loss = pair.link.repeat = 0.0
    pair.link.settle()
    for sender, receiver in (("alto", "bass"), ("bass", "alto")):
        pair.link.got.clear()
        assert pair.say(sender, b"check")
        pair.link.settle()
        assert pair.link.got.get(receiver) == [b"check"]


@pytest.mark.parametrize("seed", range(20))
def test_both_opening_at_once_on_a_shuffled_link_need_no_second_try(seed: int) -> None:
    pair = Pair(seed, loss=0.0, repeat=0.5)
    pair.hello("alto")
    pair.hello("bass")
    pair.link.settle()
    assert session(pair.link.tables["alto"], "bass").id == session(pair.link.tables["bass"], "alto").id
    assert not [error for error in pair.link.refusals if not isinstance(error, SessionError)]


@pytest.mark.parametrize("seed", range(5))
def test_restarts_in_the_middle(seed: int) -> None:
    pair = Pair(seed, loss=0.3, repeat=0.3)
    for boot in range(2, 6):
        pair.talk("alto", b"a%d" % boot)
        pair.talk("bass", b"b%d" % boot)
        who = pair.link.rng.choice(["alto", "bass"])
        pair.link.tables[who] = table(who, boot=boot)
    pair.talk("alto", b"end of alto")
    pair.talk("bass", b"end of bass")
