"""Births and deaths: only one's own, and a late one harms nobody."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers_channel import FLEET, KEYS, entry, forged, roster
from sordino_common.channel.packets import roster_packet
from sordino_common.channel.presence import Birth, Death, PresenceBook, make_birth, make_death, read_presence
from sordino_common.errors import CodecError, LocalError, RemoteError, RosterError, SignatureError
from sordino_common.messages.codec import decode, encode

ROSTER = roster()


def birth(boot: int = 1, connection: int = 1, *, name: str = "alto", epoch: int = 1) -> Birth:
    return Birth(fleet=FLEET, name=name, boot=boot, connection=connection, version="0.1.0", epoch=epoch)


def death(boot: int = 1, connection: int = 1, *, name: str = "alto") -> Death:
    return Death(fleet=FLEET, name=name, boot=boot, connection=connection)


BIRTH = make_birth(KEYS["alto"], fleet=FLEET, name="alto", boot=1, connection=1, version="0.1.0", epoch=1)
DEATH = make_death(KEYS["alto"], fleet=FLEET, name="alto", boot=1, connection=1)


def test_round_trip() -> None:
    assert read_presence(BIRTH, ROSTER) == birth()
    assert read_presence(DEATH, ROSTER) == death()


@pytest.mark.parametrize("body", [birth(), death()], ids=["birth", "death"])
def test_nobody_speaks_for_another(body: Birth | Death) -> None:
    for signer in ("bass", "hub", "stranger"):
        with pytest.raises(SignatureError, match=f"{body.kind}: the signature does not verify"):
            read_presence(forged(body, signer), ROSTER)


def test_a_party_that_the_roster_lacks() -> None:
    packet = make_death(KEYS["stranger"], fleet=FLEET, name="stranger", boot=1, connection=1)
    with pytest.raises(RosterError, match="'stranger' is not in epoch 1"):
        read_presence(packet, ROSTER)
    with pytest.raises(RosterError, match="is for fleet other"):
        read_presence(make_death(KEYS["alto"], fleet="other", name="alto", boot=1, connection=1), ROSTER)


def test_a_birth_can_not_be_shown_as_a_death() -> None:
    _, body, signature = _parts(BIRTH)
    with pytest.raises((CodecError, SignatureError)):
        read_presence(_packet("death", body, signature), ROSTER)
    _, body, _ = _parts(DEATH)
    with pytest.raises(SignatureError):
        read_presence(_packet("death", body, KEYS["alto"].sign("birth", body)), ROSTER)


def test_other_packets_are_no_presence() -> None:
    for packet in (roster_packet(b"x"), b"", b"\x80", BIRTH + b"\0", BIRTH[:-1]):
        with pytest.raises(CodecError):
            read_presence(packet, ROSTER)


def test_fields_have_bounds_on_both_sides() -> None:
    with pytest.raises(LocalError, match="birth: Expected"):
        make_birth(KEYS["alto"], fleet=FLEET, name="alto", boot=1, connection=1, version="v" * 201, epoch=1)
    with pytest.raises(LocalError, match="death: "):
        make_death(KEYS["alto"], fleet=FLEET, name="alto", boot=-1, connection=1)


@settings(deadline=None, derandomize=True, max_examples=200)
@given(st.sampled_from([BIRTH, DEATH]), st.data())
def test_any_flipped_bit_is_refused(packet: bytes, data: st.DataObject) -> None:
    bad = bytearray(packet)
    bit = data.draw(st.integers(0, len(bad) * 8 - 1))
    bad[bit // 8] ^= 1 << bit % 8
    with pytest.raises(RemoteError):
        read_presence(bytes(bad), ROSTER)


# --- the book --------------------------------------------------------------------------------------------------------


def test_a_late_will_does_not_kill_a_newer_connection_or_boot() -> None:
    book = PresenceBook()
    assert book.accept(birth(1, 1))
    assert book.accept(birth(1, 2))
    assert not book.accept(death(1, 1))
    assert book.online("alto")
    assert book.accept(birth(2, 1))
    assert not book.accept(death(1, 2))
    assert not book.accept(death(1, 99))
    assert book.online("alto")
    assert book.accept(death(2, 1))
    assert not book.online("alto")


def test_an_old_birth_does_not_raise_the_dead() -> None:
    book = PresenceBook()
    assert book.accept(death(1, 1))  # the will came first
    assert not book.accept(birth(1, 1))
    assert not book.accept(birth(1, 1, epoch=9))
    assert not book.online("alto")
    assert not book.accept(death(1, 1))
    assert book.accept(birth(1, 2))


def test_a_repeat_is_no_news_but_a_new_epoch_is() -> None:
    book = PresenceBook()
    assert book.accept(birth())
    assert not book.accept(birth())
    assert book.accept(birth(epoch=2))
    assert not book.accept(birth(epoch=1))
    found = book.birth("alto")
    assert found is not None
    assert found.epoch == 2


def test_names_and_a_roster_that_leaves_one_out() -> None:
    book = PresenceBook()
    for name in ("bass", "alto"):
        book.accept(birth(name=name))
    book.accept(death(name="cello"))
    assert book.names() == ("alto", "bass")
    assert book.birth("cello") is None
    assert not book.online("nobody")
    assert book.keep_only(roster(entries=[entry("hub"), entry("bass")])) == ("alto",)
    assert book.names() == ("bass",)


EVENTS = [make(boot, connection) for boot in (1, 2) for connection in (1, 2) for make in (birth, death)]


def test_any_order_and_any_repeats_end_in_the_newest_state() -> None:
    """The last word is that of the greatest (boot, connection), and a death in it counts. All 3-event schedules."""
    for schedule in itertools.product(EVENTS, repeat=3):
        book = PresenceBook()
        for event in schedule:
            book.accept(event)
        newest = max((event.boot, event.connection) for event in schedule)
        died = any((event.boot, event.connection) == newest and isinstance(event, Death) for event in schedule)
        assert book.online("alto") == (not died)


def _parts(packet: bytes) -> list[bytes]:
    parts = decode(packet)
    assert isinstance(parts, list)
    return parts


def _packet(*parts: object) -> bytes:
    return encode(list(parts))
