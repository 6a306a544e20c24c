"""Messages that are written and read by hand, held against the codec."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator

import pytest
from hypothesis import strategies as st

from sordino_common.errors import CodecError
from sordino_common.messages import Message, decode_message, encode
from sordino_common.messages.base import to_plain

_HEADS = (0x00, 0x18, 0x19, 0x1A, 0x1B, 0x50, 0x5B, 0x5F, 0x78, 0xA5, 0xA6, 0xFF)


def edges(least: int, most: int) -> st.SearchStrategy[int]:
    """Numbers of [least, most], those near a change of their head's width above all."""
    near = [least, 23, 24, 255, 256, 65_535, 65_536, (1 << 32) - 1, 1 << 32, most]
    return st.sampled_from([number for number in near if least <= number <= most]) | st.integers(least, most)


def by_codec(message: Message) -> bytes:
    return encode([message.kind, to_plain(message)])


def mutants(whole: bytes, draw: random.Random, *, count: int) -> Iterator[bytes]:
    """`whole` with a bit or two flipped, heads put in, bytes left out or added."""
    for _ in range(count):
        data = bytearray(whole)
        for _ in range(draw.choice([1, 1, 2])):
            at = draw.randrange(len(data))
            match draw.randrange(4):
                case 0:
                    data[at] ^= 1 << draw.randrange(8)
                case 1:
                    data[at] = draw.choice(_HEADS)
                case 2:
                    del data[at : at + draw.choice([1, 2])]
                case _:
                    data[at:at] = draw.choice([b"\0", b"\x18\x05", b"\x00\x00"])
        yield bytes(data)


def require_as_by_codec(data: bytes, read: Callable[[bytes], Message | None], monkeypatch: pytest.MonkeyPatch) -> None:
    """What the codec alone refuses is refused, in its words; what it takes, `read` takes, too, or leaves to it."""
    with monkeypatch.context() as patch:
        patch.setattr("sordino_common.messages.base._READ_BY_HAND", {})
        try:
            expected: Message | str = decode_message(data)
        except CodecError as error:
            expected = str(error)
    if isinstance(expected, str):
        assert read(data) is None
        with pytest.raises(CodecError) as caught:
            decode_message(data)
        assert str(caught.value) == expected
    else:
        assert read(data) in (None, expected)
        assert decode_message(data) == expected
