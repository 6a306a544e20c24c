"""`SpdzShares` by hand is the codec's, byte for byte: it writes the same, takes the same, and leaves the rest to it."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers_by_hand import by_codec, edges, mutants, require_as_by_codec
from sordino_common.errors import CodecError, LocalError
from sordino_common.messages import (
    SHARES_AT_ONCE,
    Limits,
    SpdzShare,
    SpdzShares,
    decode_message,
    encode_message,
    read_shares,
    write_shares,
)

KINDS = ("open", "check-1", "check-2", "check-3", "check-4")


SHARE = st.builds(
    SpdzShare,
    kind=st.sampled_from(KINDS),
    step=edges(0, 1 << 40),
    attempt=edges(0, 1 << 20),
    round=edges(0, 1 << 16),
    payload=st.sampled_from([0, 1, 23, 24, 255, 256, 65_536]).map(bytes) | st.binary(max_size=300),
)
SHARES = st.lists(SHARE, min_size=1, max_size=SHARES_AT_ONCE).map(lambda shares: SpdzShares(shares=tuple(shares)))


@settings(max_examples=200, deadline=None)
@given(message=SHARES)
def test_by_hand_is_as_by_codec(message: SpdzShares) -> None:
    data = by_codec(message)
    assert write_shares(message) == encode_message(message) == data
    assert read_shares(data) == decode_message(data) == message


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
    for data in mutants(whole, draw, count=60):
        require_as_by_codec(data, read_shares, monkeypatch)


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
