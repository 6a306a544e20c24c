"""`SpdzCorrection` by hand is the codec's, byte for byte: it writes and takes the same, and leaves it the rest."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers_by_hand import by_codec, edges, mutants, require_as_by_codec
from sordino_common.errors import CodecError, LocalError
from sordino_common.messages import (
    Limits,
    SpdzCorrection,
    decode_message,
    encode,
    encode_message,
    read_correction,
    write_correction,
)
from sordino_common.messages.spdz import CORRECTION_PART_BYTES

GOOD = {"session": bytes(range(16)), "step": 300, "attempt": 0, "part": 1, "parts": 2, "data": bytes(30)}


def correction(**changes: object) -> SpdzCorrection:
    return SpdzCorrection(**{**GOOD, **changes})  # type: ignore[arg-type]


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_by_hand_is_as_by_codec(data: st.DataObject) -> None:
    parts = data.draw(edges(1, 1 << 16))
    message = correction(
        session=data.draw(st.binary(min_size=16, max_size=16)),
        step=data.draw(edges(0, 1 << 40)),
        attempt=data.draw(edges(0, 1 << 20)),
        part=data.draw(edges(0, parts - 1)),
        parts=parts,
        data=data.draw(st.sampled_from([0, 1, 23, 24, 255, 256, 65_536]).map(bytes) | st.binary(max_size=300)),
    )
    written = by_codec(message)
    assert write_correction(message) == encode_message(message) == written
    assert read_correction(written) == decode_message(written) == message


@pytest.mark.parametrize("seed", range(20))
def test_what_is_changed_is_taken_or_refused_as_by_codec(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    draw = random.Random(seed)
    parts = draw.choice([1, 2, 30, 70_000 - 5000])
    whole = by_codec(
        correction(
            step=draw.choice([0, 23, 24, 300, 70_000, 1 << 33]),
            attempt=draw.choice([0, 30]),
            part=draw.randrange(parts),
            parts=parts,
            data=draw.randbytes(draw.choice([0, 5, 30])),
        )
    )
    for data in mutants(whole, draw, count=80):
        require_as_by_codec(data, read_correction, monkeypatch)


def test_what_is_cut_short_or_goes_on_is_not_read() -> None:
    data = by_codec(correction())
    for end in range(len(data)):
        assert read_correction(data[:end]) is None
    assert read_correction(data + b"\0") is None
    endless = data.replace(b"\x64data\x58\x1e", b"\x64data\x5b" + b"\xff" * 8)
    assert read_correction(endless) is None
    with pytest.raises(CodecError, match="truncated string"):
        decode_message(endless)


@pytest.mark.parametrize(
    "wrong",
    [
        {"session": bytes(15)},
        {"session": bytearray(16)},
        {"step": -1},
        {"step": (1 << 40) + 1},
        {"step": True},
        {"attempt": (1 << 20) + 1},
        {"part": -1},
        {"part": 1.0},
        {"parts": (1 << 16) + 1},
        {"data": bytearray(1)},
        {"data": "text"},
        {"data": bytes(CORRECTION_PART_BYTES + 1)},
    ],
)
def test_what_breaks_a_bound_is_not_written(wrong: dict[str, object]) -> None:
    message = correction(**wrong)
    assert write_correction(message) is None
    with pytest.raises(LocalError, match=r"message spdz-correction|bytearray has no place on the wire"):
        encode_message(message)


@pytest.mark.parametrize(
    "wrong",
    [
        {"session": bytes(17)},
        {"step": (1 << 40) + 1},
        {"attempt": (1 << 20) + 1},
        {"part": 2},
        {"parts": 1},
        {"parts": 0},
        {"parts": (1 << 16) + 1},
        {"data": bytes(CORRECTION_PART_BYTES + 1)},
    ],
)
def test_what_breaks_a_bound_is_not_read(wrong: dict[str, object]) -> None:
    data = encode(["spdz-correction", {**GOOD, **wrong}])
    assert read_correction(data) is None
    with pytest.raises(CodecError, match="message spdz-correction"):
        decode_message(data)


def test_the_limit_of_bytes_holds() -> None:
    with pytest.raises(CodecError, match="at most 90"):
        decode_message(by_codec(correction(data=bytes(100))), Limits(payload_bytes=90))
