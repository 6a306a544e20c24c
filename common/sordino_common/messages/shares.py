"""`SpdzShares` written and read by hand, byte for byte as the codec would: a session's rounds are made of little else.

    ["spdz-shares", {"shares": [{"kind": text, "step": n, "round": n, "attempt": n, "payload": bytes}, ...]}]

in canonical CBOR, so with keys in just this order and every head in its shortest form. `read_shares` gives None for
whatever differs from that in one bit, or breaks a bound; the general way then finds the words for it, or reads it.
"""

from __future__ import annotations

from typing import Final, get_args

from sordino_common.messages.base import by_hand
from sordino_common.messages.spdz import SHARES_AT_ONCE, ShareKind, SpdzShare, SpdzShares

_KINDS: Final[frozenset[str]] = frozenset(get_args(ShareKind))
_STEP, _ATTEMPT, _ROUND = 1 << 40, 1 << 20, 1 << 16  # at most, as the fields of `SpdzShare` say
_NUMBER: Final = 0x00  # CBOR's major types, as the bits of a head
_BYTES: Final = 0x40
_FRONT: Final = b"\x82\x6bspdz-shares\xa1\x66shares"
_KIND: Final = b"\xa5\x64kind"
_KIND_OF: Final = {bytes([0x60 + len(kind)]) + kind.encode(): kind for kind in _KINDS}  # head and text -> kind


def write_shares(message: SpdzShares) -> bytes | None:
    """The encoding; None if a field breaks its bound."""
    shares = message.shares
    if type(shares) is not tuple or not 1 <= len(shares) <= SHARES_AT_ONCE:
        return None
    parts = [_FRONT, bytes([0x80 + len(shares)])]
    for share in shares:
        kind, step, round_, attempt, payload = share.kind, share.step, share.round, share.attempt, share.payload
        if kind not in _KINDS or not type(step) is type(round_) is type(attempt) is int or type(payload) is not bytes:
            return None
        if not (0 <= step <= _STEP and 0 <= round_ <= _ROUND and 0 <= attempt <= _ATTEMPT):
            return None
        parts += (
            _KIND, bytes([0x60 + len(kind)]), kind.encode(), b"\x64step", _head(_NUMBER, step), b"\x65round",
            _head(_NUMBER, round_), b"\x67attempt", _head(_NUMBER, attempt), b"\x67payload",
            _head(_BYTES, len(payload)), payload,
        )  # fmt: skip
    return b"".join(parts)


def read_shares(data: bytes) -> SpdzShares | None:
    """The message, if `data` is its one encoding and every field within its bound."""
    at = len(_FRONT)
    try:
        count = data[at] - 0x80
        if not data.startswith(_FRONT) or not 1 <= count <= SHARES_AT_ONCE:
            return None
        at += 1
        shares = []
        for _ in range(count):
            if not data.startswith(_KIND, at):
                return None
            at += len(_KIND)
            end = at + 1 + data[at] - 0x60
            kind = _KIND_OF[data[at:end]]
            step, at = _number(data, end, b"\x64step", _STEP)
            round_, at = _number(data, at, b"\x65round", _ROUND)
            attempt, at = _number(data, at, b"\x67attempt", _ATTEMPT)
            length, at = _number(data, at, b"\x67payload", len(data), _BYTES)
            payload = data[at : at + length]
            if len(payload) != length:
                return None
            at += length
            shares.append(SpdzShare(kind=kind, step=step, attempt=attempt, round=round_, payload=payload))  # type: ignore[arg-type]  # of `_KINDS`
    except (IndexError, KeyError, ValueError):
        return None
    return SpdzShares(shares=tuple(shares)) if at == len(data) else None


def _head(major: int, number: int) -> bytes:
    """The shortest head of that major type with that argument (RFC 8949 section 3)."""
    if number < 24:
        return bytes((major + number,))
    width = 0 if number < 1 << 8 else 1 if number < 1 << 16 else 2 if number < 1 << 32 else 3
    return bytes((major + 24 + width,)) + number.to_bytes(1 << width, "big")


def _number(data: bytes, at: int, key: bytes, most: int, major: int = _NUMBER) -> tuple[int, int]:
    """(argument, offset behind it) of the head behind `key`. Raises `ValueError` if it is another one, or not in its
    shortest form, or too large."""
    if not data.startswith(key, at):
        raise ValueError
    at += len(key)
    info = data[at] - major
    if 0 <= info < 24:
        number, after = info, at + 1
    elif 24 <= info <= 27:
        after = at + 1 + (1 << (info - 24))
        number = int.from_bytes(data[at + 1 : after], "big")
        if data[at:after] != _head(major, number):
            raise ValueError
    else:
        raise ValueError
    if number > most:
        raise ValueError
    return number, after


by_hand(SpdzShares, write=write_shares, read=read_shares)
