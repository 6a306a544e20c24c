"""Encoded messages under way, shared and bounded.

A message is encoded when its transmission begins, and its bytes are let go when it is acknowledged or its peer has
gone quiet. A message sent to 50 peers (the same object) is encoded, hashed and held once for each minor version of the
protocol that they speak.
"""

from __future__ import annotations

import hashlib
from functools import cache
from typing import Final

import msgspec

from sordino_common.errors import LimitExceeded, LocalError
from sordino_common.messages import Array, Message, encode_message
from sordino_common.messages.protocol import PROTOCOL

_FIELD_BYTES: Final = 9  # CBOR's longest head; an estimate needs no more


class Encoded(msgspec.Struct):
    """A message's bytes, held for `users` parcels."""

    message: Message
    minor: int
    data: memoryview
    users: int = 0
    _digest: bytes = b""

    @property
    def digest(self) -> bytes:
        """SHA-256 of the bytes."""
        self._digest = self._digest or hashlib.sha256(self.data).digest()
        return self._digest


class EncodedPool:
    """At most `limit_bytes` of encoded messages, and one message more."""

    def __init__(self, *, limit_bytes: int, max_message_bytes: int) -> None:
        self._limit_bytes = limit_bytes
        self._max_message_bytes = max_message_bytes
        # By id() and minor: an entry keeps its message alive, so the id stays its own.
        self._held: dict[tuple[int, int], Encoded] = {}
        self.bytes = 0

    def admits(self, message: Message, minor: int = PROTOCOL.minor) -> bool:
        """Whether `acquire` may be called now: there is room, or the message is here anyway."""
        return self.bytes < self._limit_bytes or (id(message), minor) in self._held

    def acquire(self, message: Message, minor: int = PROTOCOL.minor) -> Encoded:
        """The message's bytes for a peer of that minor version; call `release` once for each. Raises `LocalError` if it
        has no encoding, and `LimitExceeded` if that is too long."""
        entry = self._held.get((id(message), minor))
        if entry is None:
            data = encode_message(message, minor=minor)
            if len(data) > self._max_message_bytes:
                raise LimitExceeded(
                    f"message {message.kind}: {len(data)} bytes encoded, at most {self._max_message_bytes} are sent"
                )
            entry = Encoded(message, minor, memoryview(data))
            self._held[id(message), minor] = entry
            self.bytes += len(data)
        entry.users += 1
        return entry

    def release(self, entry: Encoded) -> None:
        if entry.users < 1:
            raise LocalError("EncodedPool: released more often than acquired")
        entry.users -= 1
        if entry.users == 0:
            del self._held[id(entry.message), entry.minor]
            self.bytes -= len(entry.data)


def estimate_bytes(value: object) -> int:
    """About how many bytes `value` will take: exact in the bulk (arrays, byte strings, text), without encoding."""
    total, pending = 0, [value]
    while pending:
        item = pending.pop()
        kind = type(item)
        total += _FIELD_BYTES
        if kind is int or kind is float or item is None:
            continue
        if kind is bytes or kind is str:
            total += len(item)  # type: ignore[arg-type]
        elif kind is tuple or kind is list:
            pending += item  # type: ignore[arg-type]
        elif isinstance(item, msgspec.Struct):
            total += _names_bytes(type(item)) - _FIELD_BYTES
            pending += msgspec.structs.astuple(item)
        elif isinstance(item, Array):
            total += item.nbytes + 3 * _FIELD_BYTES
    return total


@cache
def _names_bytes(kind: type[msgspec.Struct]) -> int:
    """How long the names of a struct's fields are together."""
    return sum(map(len, kind.__struct_fields__))
