"""`SpdzShares` by hand is the codec's, byte for byte: it writes the same, takes the same, and leaves the rest to it."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sordino_common.errors import CodecError, LocalError
from sordino_common.messages import (
    SHARES_AT_ONCE,
    Limits,
    SpdzShare,
    SpdzShares,
    decode_message,
    encode,
    encode_message,
    read_shares,
    write_shares,
)
from sordino_common.messages.base import to_plain

KINDS = ("open", "check-1", "check-2", "check-3", "check-4")


def edges(most: int) -> st.SearchStrategy[int]:
    near = [0, 23, 24, 255, 256, 65_535, 65_536, (1 << 32) - 1, 1 << 32, most]
    return st.sampled_from([number for number in near if number <= most]) | st.integers(0, most)


SHARE = st.builds(
    SpdzShare,
    kind=st.sampled_from(KINDS),
    step=edges(1 << 40),
    attempt=edges(1 << 20),
    round=edges(1 << 16),
    payload=st.sampled_from([0, 1, 23, 24, 255, 256, 65_536]).map(bytes) | st.binary(max_size=300),
)
SHARES = st.lists(SHARE, min_size=1, max_size=SHARES_AT_ONCE).map(lambda shares: SpdzShares(shares=tuple(shares)))


def by_codec(message: SpdzShares) -> bytes:
    return encode(["spdz-shares", to_plain(message)])


@settings(max_examples=200, deadline=None)
@given(message=SHARES)
def test_by_hand_is_as_by_codec(message: SpdzShares) -> None:
    data = by_codec(message)
    assert write_shares(message) == encode_message(message) == data
    assert read_shares(data) == decode_message(data) == message


def _by_codec_only(data: bytes, monkeypatch: pytest.MonkeyPatch) -> SpdzShares | str:
    with monkeypatch.context() as patch:
        patch.setattr("sordino_common.messages.base._READ_BY_HAND", {})
        try:
            message = decode_message(data)
        except CodecError as error:
            return str(error)
    assert isinstance(message, SpdzShares)
    return message


@pytest.mark.parametrize("seed", range(40))
def test_what_is_changed_is_taken_or_refused_as_by_codec(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    draw = random.Random(seed)
    shares = tuple(
        SpdzShare(
            kind=draw.choice(KINDS),  # type: ignore[arg-type]
            step=draw.choice([0, 23, 24, 300, 70_000]),
            attempt=draw.choice([0, 30]),
            round=draw.choice([0, 7, 24]),
            payload=draw.randbytes(draw.choice([0, 5, 30])),
        )
        for _ in range(draw.randrange(1, 4))
    )
    whole = by_codec(SpdzShares(shares=shares))
    for _ in range(60):
        data = bytearray(whole)
        for _ in range(draw.choice([1, 1, 2])):
            at = draw.randrange(len(data))
            match draw.randrange(4):
                case 0:
                    data[at] ^= 1 << draw.randrange(8)
                case 1:
                    data[at] = draw.choice([0x00, 0x18, 0x19, 0x1A, 0x1B, 0x5F, 0x78, 0xA5, 0xFF])
                case 2:
                    del data[at : at + draw.choice([1, 2])]
                case _:
                    data[at:at] = draw.choice([b"\0", b"\x18\x05", b"\x00\x00"])
        changed = bytes(data)
        expected = _by_codec_only(changed, monkeypatch)
        if isinstance(expected, str):
            assert read_shares(changed) is None
            with pytest.raises(CodecError) as caught:
                decode_message(changed)
            assert str(caught.value) == expected
        else:
            assert decode_message(changed) == expected


@pytest.mark.parametrize("end", range(120))
def test_what_is_cut_short_or_goes_on_is_not_read(end: int) -> None:
    data = by_codec(SpdzShares(shares=(SpdzShare(kind="open", step=300, attempt=0, round=1, payload=bytes(30)),)))
    assert read_shares(data[: min(end, len(data) - 1)]) is None
    assert read_shares(data + b"\0") is None


@pytest.mark.parametrize(
    "wrong",
    [
        {"kind": "check-5"},
        {"step": -1},
        {"step": (1 << 40) + 1},
        {"step": True},
        {"attempt": (1 << 20) + 1},
        {"round": (1 << 16) + 1},
        {"round": 1.0},
        {"payload": bytearray(1)},
        {"payload": "text"},
    ],
)
def test_what_breaks_a_bound_is_not_written(wrong: dict[str, object]) -> None:
    fields: dict[str, object] = {"kind": "open", "step": 1, "attempt": 0, "round": 1, "payload": b"1"}
    message = SpdzShares(shares=(SpdzShare(**{**fields, **wrong}),))  # type: ignore[arg-type]
    assert write_shares(message) is None
    with pytest.raises(LocalError):
        encode_message(message)


def test_numbers_of_shares_and_bytes_are_bounded() -> None:
    one = SpdzShare(kind="open", step=1, attempt=0, round=1, payload=bytes(100))
    for shares in ((), (one,) * (SHARES_AT_ONCE + 1)):
        assert write_shares(SpdzShares(shares=shares)) is None
        assert read_shares(by_codec(SpdzShares(shares=shares))) is None
    with pytest.raises(CodecError, match="at most 90"):
        decode_message(by_codec(SpdzShares(shares=(one,))), Limits(payload_bytes=90))
