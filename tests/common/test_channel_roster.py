"""Rosters: what the operator may sign, what a device takes, and what is still there after a power cut."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers_channel import FLEET, KEYS, OPERATOR, STRANGER_OPERATOR, WALL_S, Wall, book, entry, roster, signed
from sordino_common.channel.identity import PublicKeys
from sordino_common.channel.roster import Roster, RosterBook, RosterEntry, read_roster, sign_roster
from sordino_common.errors import (
    CodecError,
    ConfigError,
    LocalError,
    RemoteError,
    RosterError,
    SignatureError,
    StaleEpoch,
)
from sordino_common.messages.codec import decode, encode

SMALL = (1).to_bytes(32, "little")


def resigned(body: object) -> bytes:
    """Whatever `body` is, with the operator's valid signature."""
    raw = encode(body)
    return encode([raw, OPERATOR.sign("roster", raw)])


def fields_of(made: Roster) -> list[object]:
    fields = decode(made.body)
    assert isinstance(fields, list)
    return fields


def test_round_trip_whatever_the_order() -> None:
    made = roster()
    again = read_roster(sign_roster(made, OPERATOR), operator_key=OPERATOR.public)
    assert again == made
    assert again.digest == made.digest
    assert [item.name for item in again.entries] == ["alto", "bass", "cello", "hub"]
    assert again.server.name == "hub"
    assert again.entry("bass").roles == ("compute", "data")
    backwards = roster(entries=tuple(reversed(made.entries)))
    assert backwards.digest == made.digest
    assert entry("bass", roles={"data", "compute"}) == entry("bass", roles=["compute", "data", "data"])


def test_a_name_that_is_not_there() -> None:
    with pytest.raises(RosterError, match="'nobody' is not in epoch 1 of fleet ward"):
        roster().entry("nobody")


def test_anything_changes_the_digest() -> None:
    base = roster()
    others = [
        roster(epoch=2),
        roster(fleet="ward-2"),
        roster(issued_s=WALL_S + 1),
        roster(expires_s=WALL_S + 2),
        roster(entries=[item for item in base.entries if item.name != "alto"]),
        roster(entries=[item if item.name != "alto" else entry("alto", zone="north") for item in base.entries]),
        roster(entries=[item if item.name != "alto" else entry("alto", not_after_s=WALL_S) for item in base.entries]),
        roster(entries=[item if item.name != "alto" else entry("alto", roles=["compute"]) for item in base.entries]),
    ]
    assert len({made.digest for made in [base, *others]}) == 1 + len(others)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"name": "Alto"}, "is no name"),
        ({"name": "alto\n"}, "is no name"),
        ({"name": "../alto"}, "is no name"),
        ({"name": ""}, "is no name"),
        ({"name": "a" * 64}, "is no name"),
        ({"name": 7}, "is no name"),
        ({"roles": []}, "got none"),
        ({"roles": ["data", "root"]}, r"got \['root'\]"),
        ({"zone": "North Wing"}, "the zone must be a name"),
        ({"sign_key": bytes(31)}, "a signing key has 32 bytes, got 31"),
        ({"sign_key": SMALL}, "the signing key has small order"),
        ({"sign_key": b"\xff" * 32}, "the signing key is not canonical"),
        ({"box_key": SMALL}, "the X25519 key has small order"),
        ({"box_key": b"\xff" * 32}, "the X25519 key is not canonical"),
        ({"box_key": "text" * 8}, "keys are 32 bytes, got str"),
        ({"not_after_s": -1}, "not_after_s must be a whole number"),
        ({"not_after_s": True}, "not_after_s must be a whole number"),
        ({"not_after_s": 1 << 60}, "not_after_s must be a whole number"),
    ],
)
def test_entries_that_can_not_be(changes: dict[str, object], text: str) -> None:
    with pytest.raises(RosterError, match=text):
        entry("alto", **changes)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"fleet": "Ward"}, "is no fleet name"),
        ({"epoch": 0}, "epochs start at 1"),
        ({"epoch": -1}, "epoch must be a whole number"),
        ({"epoch": 1.0}, "epoch must be a whole number"),
        ({"expires_s": WALL_S}, "not after it is issued"),
        ({"entries": [entry("alto")]}, "exactly one entry has the role server, got none"),
        (
            {"entries": [entry("hub"), entry("alto", roles=["server"])]},
            "exactly one entry has the role server, got alto, hub",
        ),
        ({"entries": [entry("hub"), entry("alto"), entry("alto")]}, "alto and alto have the same name or key"),
        (
            {"entries": [entry("hub"), entry("alto"), entry("bass", sign_key=KEYS["alto"].public.sign_key)]},
            "alto and bass have the same name or key",
        ),
        (
            {"entries": [entry("hub"), entry("alto"), entry("bass", box_key=KEYS["alto"].public.box_key)]},
            "alto and bass have the same name or key",
        ),
    ],
)
def test_rosters_that_can_not_be(changes: dict[str, object], text: str) -> None:
    with pytest.raises(RosterError, match=text):
        roster(**changes)  # type: ignore[arg-type]


# --- on the wire -----------------------------------------------------------------------------------------------------


def test_only_the_pinned_operator_signs() -> None:
    with pytest.raises(SignatureError, match="roster: the signature does not verify"):
        read_roster(sign_roster(roster(), STRANGER_OPERATOR), operator_key=OPERATOR.public)


def test_what_an_operator_key_signed_for_another_purpose_is_no_roster() -> None:
    body = roster().body
    with pytest.raises(SignatureError):
        read_roster(encode([body, OPERATOR.sign("birth", body)]), operator_key=OPERATOR.public)


def test_one_roster_has_one_signed_body() -> None:
    fields = fields_of(roster())
    rows = fields[6]
    assert isinstance(rows, list)
    with pytest.raises(RosterError, match="canonical order"):
        read_roster(resigned([*fields[:6], rows[::-1]]), operator_key=OPERATOR.public)
    alto, bass, *rest = rows
    bass = [*bass[:3], ["data", "compute"], *bass[4:]]
    with pytest.raises(RosterError, match="canonical order"):
        read_roster(resigned([*fields[:6], [alto, bass, *rest]]), operator_key=OPERATOR.public)


@pytest.mark.parametrize(
    ("body", "text"),
    [
        ({}, r"expected the list .sordino-roster"),
        ([], r"expected the list .sordino-roster"),
        (["sordino-roster", 2, "ward", 1, 1, 2, []], "of form 2, this software knows form 1: upgrade"),
        (["sordino-roster", 1, "ward", 1, 1, 2, {}], "every entry is"),
        (["sordino-roster", 1, "ward", 1, 1, 2, [[]]], "every entry is"),
        (["sordino-roster", 1, "ward", 1, 1, 2, [["a", bytes(32), bytes(32), "data", "z", None]]], "list of text"),
        (["sordino-roster", 1, "ward", 1, 1, 2, [["a", bytes(32), bytes(32), [1], "z", None]]], "list of text"),
        (["sordino-roster", 1, "ward", 1, 1, 2, [["a", 5, bytes(32), ["data"], "z", None]]], "got int"),
        (["sordino-roster", 1, "ward", "1", 1, 2, []], "epoch must be a whole number"),
        (["sordino-roster", 1, None, 1, 1, 2, []], "no fleet name"),
    ],
)
def test_signed_bodies_that_are_no_roster(body: object, text: str) -> None:
    with pytest.raises(RosterError, match=text):
        read_roster(resigned(body), operator_key=OPERATOR.public)


@pytest.mark.parametrize(
    "data", [b"", b"\x80", encode([b"", b"", b""]), encode(["a", b"b"]), encode([b"", b""]) + b"0"]
)
def test_what_is_no_signed_roster(data: bytes) -> None:
    with pytest.raises(CodecError):
        read_roster(data, operator_key=OPERATOR.public)


@settings(deadline=None, derandomize=True, max_examples=300)
@given(st.data())
def test_any_flipped_bit_is_refused_and_changes_nothing(data: st.DataObject) -> None:
    target = bytearray(SECOND)
    bit = data.draw(st.integers(0, len(target) * 8 - 1))
    target[bit // 8] ^= 1 << bit % 8
    held = book()
    before = held.current, held.signed
    with pytest.raises(RemoteError):
        held.accept(bytes(target))
    assert (held.current, held.signed) == before


SECOND = signed(2)

# --- the book --------------------------------------------------------------------------------------------------------


def test_epochs_only_grow() -> None:
    held = book(first=signed(3))
    assert not held.accept(signed(3))
    with pytest.raises(StaleEpoch, match="epoch 2 is older than epoch 3"):
        held.accept(signed(2))
    with pytest.raises(RosterError, match="a second, different roster of epoch 3"):
        held.accept(signed(3, expires_s=WALL_S + 5))
    assert held.require().epoch == 3
    assert held.accept(signed(7))
    assert held.require().epoch == 7
    assert held.signed == signed(7)


def test_a_roster_of_another_fleet_or_operator_is_refused() -> None:
    held = book()
    with pytest.raises(RosterError, match="one of fleet other, this is fleet ward"):
        held.accept(signed(2, fleet="other"))
    with pytest.raises(SignatureError):
        held.accept(sign_roster(roster(epoch=2), STRANGER_OPERATOR))
    assert held.require().epoch == 1


def test_expiry() -> None:
    wall = Wall()
    held = book(wall=wall)
    assert held.party("alto").name == "alto"
    wall.now_s = WALL_S + 86_400
    for call in (held.require, lambda: held.party("alto")):
        with pytest.raises(RosterError, match="epoch 1 has expired"):
            call()
    with pytest.raises(RosterError, match="epoch 2 has expired already"):
        held.accept(signed(2))
    assert held.accept(signed(2, expires_s=WALL_S + 200_000))
    assert held.party("alto").name == "alto"


def test_an_entry_may_expire_earlier() -> None:
    wall = Wall()
    entries = [entry("hub"), entry("alto", not_after_s=WALL_S + 10)]
    held = book(wall=wall, first=signed(1, entries=entries))
    assert held.party("alto").name == "alto"
    wall.now_s = WALL_S + 10
    with pytest.raises(RosterError, match="the entry of alto has expired"):
        held.party("alto")
    assert held.party("hub").name == "hub"


def test_no_roster_yet() -> None:
    held = RosterBook(fleet=FLEET, operator_key=OPERATOR.public, wall_s=Wall())
    with pytest.raises(RosterError, match="none of fleet ward was received yet"):
        held.require()
    with pytest.raises(ConfigError, match="operator key: the signing key has small order"):
        RosterBook(fleet=FLEET, operator_key=SMALL, wall_s=Wall())


def test_it_is_on_disk_before_it_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "roster.cbor"

    def reopened() -> RosterBook:
        return RosterBook(fleet=FLEET, operator_key=OPERATOR.public, wall_s=Wall(), path=path)

    held = reopened()
    assert held.accept(signed(2))
    assert reopened().require() == held.require()
    with pytest.raises(StaleEpoch):
        reopened().accept(signed(1))

    def power_cut(handle: int) -> None:
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", power_cut)
        with pytest.raises(LocalError, match="can't be written: Input/output error"):
            held.accept(signed(3))
    assert held.require().epoch == 2
    assert reopened().require().epoch == 2
    assert [item.name for item in tmp_path.iterdir()] == ["roster.cbor"]
    assert held.accept(signed(3))
    assert reopened().require().epoch == 3


def test_a_file_that_was_tampered_with_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "roster.cbor"
    path.write_bytes(sign_roster(roster(), STRANGER_OPERATOR))
    with pytest.raises(SignatureError):
        RosterBook(fleet=FLEET, operator_key=OPERATOR.public, wall_s=Wall(), path=path)
    path.write_bytes(signed()[:-1])
    with pytest.raises(CodecError):
        RosterBook(fleet=FLEET, operator_key=OPERATOR.public, wall_s=Wall(), path=path)


def test_a_large_fleet_is_read_quickly_enough_and_within_its_bound() -> None:
    def made(number: int) -> RosterEntry:
        # Made-up keys: y = 2 number + 3 is canonical and not of small order, whether or not it is a point.
        keys = PublicKeys(
            sign_key=(2 * number + 3).to_bytes(32, "little"), box_key=(2 * number + (1 << 200)).to_bytes(32, "little")
        )
        return RosterEntry(
            name=f"agent-{number}", sign_key=keys.sign_key, box_key=keys.box_key, roles=("data",), zone="default"
        )

    big = roster(entries=[entry("hub"), *(made(number) for number in range(10_000))])
    again = read_roster(sign_roster(big, OPERATOR), operator_key=OPERATOR.public)
    assert again.digest == big.digest
    with pytest.raises(RosterError, match="20001 entries, at most 20000"):
        roster(entries=[entry("hub"), *(made(number) for number in range(20_000))])
