"""`SpdzCorrection` written and read by hand, byte for byte as the codec would: the largest message of a session's step.

    ["spdz-correction", {"data": bytes, "part": n, "step": n, "parts": n, "attempt": n, "session": bytes}]

in canonical CBOR, so with keys in just this order. The data is copied once each way. `read_correction` gives None for
whatever differs from that in one bit, or breaks a bound; the general way then finds the words for it, or reads it.
"""

from __future__ import annotations

import re
from typing import Final

from sordino_common.messages.base import by_hand
from sordino_common.messages.heads import BYTES, NUMBER, argument_of, head, pattern_of
from sordino_common.messages.spdz import CORRECTION_PART_BYTES, SpdzCorrection

_PART, _STEP, _ATTEMPT = 1 << 16, 1 << 40, 1 << 20  # at most, as the fields of `SpdzCorrection` say
_SESSION_BYTES: Final = 16
_FRONT: Final = b"\x82\x6fspdz-correction\xa6\x64data"
_DATA: Final = re.compile(re.escape(_FRONT) + pattern_of(BYTES), re.DOTALL)
_REST: Final = re.compile(
    rb"\x64part%b\x64step%b\x65parts%b\x67attempt%b\x67session\x50(.{%d})\Z"
    % (*4 * (pattern_of(NUMBER),), _SESSION_BYTES),
    re.DOTALL,
)


def write_correction(message: SpdzCorrection) -> bytes | None:
    """The encoding; None if a field breaks its bound."""
    session, data = message.session, message.data
    step, attempt, part, parts = message.step, message.attempt, message.part, message.parts
    if type(session) is not bytes or type(data) is not bytes:
        return None
    if not type(step) is type(attempt) is type(part) is type(parts) is int:
        return None
    if len(session) != _SESSION_BYTES or len(data) > CORRECTION_PART_BYTES:
        return None
    if not (0 <= step <= _STEP and 0 <= attempt <= _ATTEMPT and 0 <= part < parts <= _PART):
        return None
    return b"".join((
        _FRONT, head(BYTES, len(data)), data, b"\x64part", head(NUMBER, part), b"\x64step", head(NUMBER, step),
        b"\x65parts", head(NUMBER, parts), b"\x67attempt", head(NUMBER, attempt), b"\x67session\x50", session,
    ))  # fmt: skip


def read_correction(data: bytes) -> SpdzCorrection | None:
    """The message, if `data` is its one encoding and every field within its bound."""
    front = _DATA.match(data)
    if front is None:
        return None
    begin = front.end()
    end = begin + argument_of(front[1], BYTES)
    rest = _REST.match(data, end) if end <= len(data) else None
    if rest is None or end - begin > CORRECTION_PART_BYTES:
        return None
    *numbers, session = rest.groups()
    part, step, parts, attempt = map(argument_of, numbers)
    if step > _STEP or attempt > _ATTEMPT or not part < parts <= _PART:
        return None
    return SpdzCorrection(session=session, step=step, attempt=attempt, part=part, parts=parts, data=data[begin:end])


by_hand(SpdzCorrection, write=write_correction, read=read_correction)
