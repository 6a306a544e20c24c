"""`SpdzShares` written and read by hand, byte for byte as the codec would: a session's rounds are made of little else.

    ["spdz-shares", {"shares": [{"kind": text, "step": n, "round": n, "attempt": n, "payload": bytes}, ...]}]

in canonical CBOR, so with keys in just this order and every head in its shortest form. `read_shares` gives None for
whatever differs from that in one bit, or breaks a bound; the general way then finds the words for it, or reads it.
"""

from __future__ import annotations

import re
from typing import Final, get_args

from sordino_common.messages.base import by_hand
from sordino_common.messages.heads import BYTES, LIST, NUMBER, TEXT, head, pattern_of
from sordino_common.messages.spdz import SHARES_AT_ONCE, ShareKind, SpdzShare, SpdzShares

_STEP, _ATTEMPT, _ROUND = 1 << 40, 1 << 20, 1 << 16  # at most, as the fields of `SpdzShare` say
_FRONT: Final = b"\x82\x6bspdz-shares\xa1\x66shares"
_KINDS: Final[dict[ShareKind, bytes]] = {kind: head(TEXT, len(kind)) + kind.encode() for kind in get_args(ShareKind)}
_KIND_OF: Final[dict[bytes, ShareKind]] = {written: kind for kind, written in _KINDS.items()}
_SHARE: Final = re.compile(
    rb"\xa5\x64kind(%b)\x64step%b\x65round%b\x67attempt%b\x67payload%b"
    % (b"|".join(map(re.escape, _KIND_OF)), *3 * (pattern_of(NUMBER),), pattern_of(BYTES)),
    re.DOTALL,
)


def write_shares(message: SpdzShares) -> bytes | None:
    """The encoding; None if a field breaks its bound."""
    shares = message.shares
    if type(shares) is not tuple or not 1 <= len(shares) <= SHARES_AT_ONCE:
        return None
    parts = [_FRONT, head(LIST, len(shares))]
    for share in shares:
        kind, step, round_, attempt, payload = share.kind, share.step, share.round, share.attempt, share.payload
        if kind not in _KINDS or not type(step) is type(round_) is type(attempt) is int or type(payload) is not bytes:
            return None
        if not (0 <= step <= _STEP and 0 <= round_ <= _ROUND and 0 <= attempt <= _ATTEMPT):
            return None
        parts += (
            b"\xa5\x64kind", _KINDS[kind], b"\x64step", head(NUMBER, step), b"\x65round", head(NUMBER, round_),
            b"\x67attempt", head(NUMBER, attempt), b"\x67payload", head(BYTES, len(payload)), payload,
        )  # fmt: skip
    return b"".join(parts)


def read_shares(data: bytes) -> SpdzShares | None:
    """The message, if `data` is its one encoding and every field within its bound."""
    at = len(_FRONT)
    count = data[at] - LIST if data.startswith(_FRONT) and len(data) > at else 0
    if not 1 <= count <= SHARES_AT_ONCE:
        return None
    at += 1
    shares = []
    number = int.from_bytes
    for _ in range(count):
        found = _SHARE.match(data, at)
        if found is None:
            return None
        kind, s, r, a, p = found.groups()
        step = number(s[1:], "big") if len(s) > 1 else s[0]
        round_ = number(r[1:], "big") if len(r) > 1 else r[0]
        attempt = number(a[1:], "big") if len(a) > 1 else a[0]
        length = number(p[1:], "big") if len(p) > 1 else p[0] - BYTES
        begin = found.end()
        at = begin + length
        if step > _STEP or round_ > _ROUND or attempt > _ATTEMPT or at > len(data):
            return None
        shares.append(SpdzShare(kind=_KIND_OF[kind], step=step, attempt=attempt, round=round_, payload=data[begin:at]))
    return SpdzShares(shares=tuple(shares)) if at == len(data) else None


by_hand(SpdzShares, write=write_shares, read=read_shares)
