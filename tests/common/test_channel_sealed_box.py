"""Sealed boxes open at one place, for one receiver, from one sender."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers_channel import KEYS, entry, roster
from sordino_common.channel.identity import seal_to
from sordino_common.channel.sealed_box import MAX_BOX_BYTES, open_box, seal_box
from sordino_common.errors import CodecError, LocalError, RemoteError, RosterError, SessionError, SignatureError
from sordino_common.messages.codec import decode, encode

ROSTER = roster()
PLACE: dict[str, object] = {"session": b"run 1", "round": 3, "kind": "seed"}


def sealed(plaintext: bytes = b"a seed of 32 bytes, or nearly so", **changes: object) -> bytes:
    return seal_box(
        plaintext,
        identity=KEYS["alto"],
        sender=ROSTER.entry("alto"),
        receiver=ROSTER.entry("bass"),
        **{**PLACE, **changes},  # type: ignore[arg-type]
    )


def opened(box: bytes, **changes: object) -> bytes:
    fields = {"identity": KEYS["bass"], "roster": ROSTER, "sender": "alto", "receiver": "bass", **PLACE, **changes}
    return open_box(box, **fields)  # type: ignore[arg-type]


BOX = sealed()


def test_round_trip() -> None:
    assert opened(BOX) == b"a seed of 32 bytes, or nearly so"
    assert opened(sealed(b"")) == b""
    assert sealed() != sealed()  # a fresh encapsulated key each time


@pytest.mark.parametrize(
    "changes",
    [{"session": b"run 2"}, {"round": 4}, {"kind": "mask"}, {"sender": "cello"}, {"sender": "hub"}],
    ids=lambda changes: "-".join(changes),
)
def test_it_opens_at_its_place_only(changes: dict[str, object]) -> None:
    with pytest.raises(SignatureError):
        opened(BOX, **changes)


def test_it_opens_for_its_receiver_only() -> None:
    with pytest.raises(SessionError, match="is for bass, whose key is not"):
        opened(BOX, identity=KEYS["cello"])
    with pytest.raises(SignatureError):
        opened(BOX, identity=KEYS["cello"], receiver="cello")
    with pytest.raises(RosterError):
        opened(BOX, sender="stranger")


def test_nobody_puts_their_name_on_anothers_box() -> None:
    """Cello takes alto's ciphertext and signs it, correctly, as its own."""
    _, ciphertext, _ = decode(BOX)
    cello, bass = ROSTER.entry("cello"), ROSTER.entry("bass")
    info = encode(["sordino-box", 1, b"run 1", 3, "cello", "bass", "seed", cello.sign_key, bass.box_key])
    stolen = encode(["box", ciphertext, KEYS["cello"].sign("sealed-box", encode([info, ciphertext]))])
    with pytest.raises(SessionError, match="does not open"):
        opened(stolen, sender="cello")


def test_an_unsigned_box_does_not_open() -> None:
    alto, bass = ROSTER.entry("alto"), ROSTER.entry("bass")
    info = encode(["sordino-box", 1, b"run 1", 3, "alto", "bass", "seed", alto.sign_key, bass.box_key])
    ciphertext = seal_to(bass.box_key, b"made by anybody", info)
    with pytest.raises(SignatureError):
        opened(encode(["box", ciphertext, bytes(64)]))


def test_keys_that_changed_since() -> None:
    changed = roster(epoch=2, entries=[entry("hub"), entry("alto", **_other_keys("sign_key")), entry("bass")])
    with pytest.raises(SignatureError):
        opened(BOX, roster=changed)


def test_what_is_no_box() -> None:
    _, ciphertext, signature = decode(BOX)
    for bad in (
        b"",
        BOX + b"\0",
        encode([]),
        encode(["box", ciphertext]),
        encode(["bix", ciphertext, signature]),
        encode(["box", ciphertext, signature[:-1]]),
        encode(["box", ciphertext[:47], signature]),
        encode(["box", bytes(MAX_BOX_BYTES + 600), signature]),
    ):
        with pytest.raises(CodecError):
            opened(bad)


def test_our_own_mistakes() -> None:
    with pytest.raises(LocalError, match="at most"):
        sealed(bytes(MAX_BOX_BYTES))
    with pytest.raises(LocalError, match="is not that of bass"):
        seal_box(
            b"",
            identity=KEYS["alto"],
            sender=ROSTER.entry("bass"),
            receiver=ROSTER.entry("cello"),
            session=b"",
            round=0,
            kind="seed",
        )


@settings(deadline=None, derandomize=True, max_examples=200)
@given(st.integers(0, len(BOX) * 8 - 1))
def test_any_flipped_bit_is_refused(bit: int) -> None:
    bad = bytearray(BOX)
    bad[bit // 8] ^= 1 << bit % 8
    with pytest.raises(RemoteError):
        opened(bytes(bad))


def _other_keys(which: str) -> dict[str, object]:
    return {which: getattr(KEYS["stranger"].public, which)}
