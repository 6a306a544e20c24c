"""Golden bytes of every packet, with fixed keys and ephemerals, and their `bad_*` twins."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from helpers_channel import (
    FLEET,
    KEYS,
    OPERATOR,
    Wall,
    only_reply,
    opened,
    picture,
    replies,
    roster,
    session,
    signed,
    table,
)
from sordino_common.channel.effects import RosterOffered
from sordino_common.channel.handshake import SessionTable
from sordino_common.channel.identity import DeviceKey, OperatorKey
from sordino_common.channel.presence import Birth, Death, make_birth, make_death, read_presence
from sordino_common.channel.roster import RosterBook, read_roster
from sordino_common.channel.sealed_box import open_box
from sordino_common.errors import RemoteError

VECTORS = json.loads((Path(__file__).parent.parent / "vectors" / "channel_packets.json").read_text("utf-8"))


def good(kind: str, name: str = "good") -> bytes:
    return bytes.fromhex(VECTORS[kind][name])


def bad_of(*kinds: str) -> list[object]:
    return [
        pytest.param(kind, bytes.fromhex(value["data"]), value["error"], value["text"], id=f"{kind}-{name}")
        for kind in kinds
        for name, value in sorted(VECTORS[kind].items())
        if name.startswith("bad_")
    ]


def after_handshake() -> tuple[SessionTable, SessionTable]:
    """Both tables, every packet compared with its golden bytes."""
    alto, bass = table("alto"), table("bass")
    assert alto.initiate("bass", now_s=0) == good("hello")
    assert only_reply(bass.receive(good("hello"), now_s=0)) == good("accept")
    assert replies(alto.receive(good("accept"), now_s=0)) == [good("accept", "confirm")]
    bass.receive(good("accept", "confirm"), now_s=0)
    return alto, bass


def test_keys() -> None:
    for name, expected in VECTORS["keys"].items():
        key = DeviceKey.from_seeds(bytes.fromhex(expected["sign_seed"]), bytes.fromhex(expected["box_seed"]))
        assert key.public == KEYS[name].public
        assert key.public.sign_key.hex() == expected["sign_key"]
        assert key.public.box_key.hex() == expected["box_key"]
        assert key.fingerprint == expected["fingerprint"]
    assert OperatorKey.from_seed(good("operator", "seed")).public == good("operator", "key") == OPERATOR.public


def test_roster() -> None:
    assert signed() == good("roster")
    read = read_roster(good("roster"), operator_key=OPERATOR.public)
    assert read == roster()
    assert read.digest == good("roster", "digest")


def test_handshake_and_sealed_packets() -> None:
    alto, bass = after_handshake()
    assert session(alto, "bass").id == session(bass, "alto").id == good("accept", "session_id")
    assert session(alto, "bass").seal(b"from alto") == good("sealed", "from_alto")
    assert session(bass, "alto").seal(b"from bass") == good("sealed", "from_bass")
    assert opened(bass.receive(good("sealed", "from_alto"), now_s=0)) == [b"from alto"]
    assert opened(alto.receive(good("sealed", "from_bass"), now_s=0)) == [b"from bass"]


def test_reject() -> None:
    alto = table("alto")
    hello = alto.initiate("bass", now_s=0)
    assert only_reply(table("bass", first=signed(2)).receive(hello, now_s=0)) == good("reject")
    assert alto.receive(good("reject"), now_s=0)[0] == RosterOffered(signed=signed(2))


def test_presence() -> None:
    birth = Birth(fleet=FLEET, name="alto", boot=1, connection=2, version="0.1.0", epoch=1)
    death = Death(fleet=FLEET, name="alto", boot=1, connection=2)
    assert read_presence(good("birth"), roster()) == birth
    assert read_presence(good("death"), roster()) == death
    fields = {"fleet": FLEET, "name": "alto", "boot": 1, "connection": 2}
    assert make_birth(KEYS["alto"], version="0.1.0", epoch=1, **fields) == good("birth")  # type: ignore[arg-type]
    assert make_death(KEYS["alto"], **fields) == good("death")  # type: ignore[arg-type]


def test_box() -> None:
    opened_box = open_box(
        good("box"),
        identity=KEYS["bass"],
        roster=roster(),
        sender="alto",
        receiver="bass",
        session=b"run 1",
        round=3,
        kind="seed",
    )
    assert opened_box == b"a seed"


@pytest.mark.parametrize(("kind", "data", "code", "text"), bad_of("roster"))
def test_bad_rosters(kind: str, data: bytes, code: str, text: str) -> None:
    book = RosterBook(fleet=FLEET, operator_key=OPERATOR.public, wall_s=Wall())
    with pytest.raises(RemoteError, match=text) as caught:
        book.accept(data)
    assert caught.value.code == code
    assert book.current is None


@pytest.mark.parametrize(("kind", "data", "code", "text"), bad_of("hello", "accept", "reject", "sealed"))
def test_bad_packets(kind: str, data: bytes, code: str, text: str) -> None:
    if kind == "sealed":
        _, owner = after_handshake()
    elif kind == "hello":
        owner = table("bass")
    else:
        owner = table("alto")
        owner.initiate("bass", now_s=0)
    before = picture(owner)
    with pytest.raises(RemoteError, match=text) as caught:
        owner.receive(data, now_s=0)
    assert caught.value.code == code
    assert picture(owner) == before


@pytest.mark.parametrize(("kind", "data", "code", "text"), bad_of("birth", "death"))
def test_bad_presence(kind: str, data: bytes, code: str, text: str) -> None:
    with pytest.raises(RemoteError, match=text) as caught:
        read_presence(data, roster())
    assert caught.value.code == code


def test_every_kind_has_bad_twins() -> None:
    for kind in ("roster", "hello", "accept", "reject", "sealed", "birth", "death"):
        assert any(name.startswith("bad_") for name in VECTORS[kind]), kind
