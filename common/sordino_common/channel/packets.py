"""The bytes of the channel: every packet is the canonical CBOR of a list that starts with its kind.

    ["hello" | "accept" | "reject" | "birth" | "death", body, signature]    signature over body, purpose = kind
    ["sealed", session id, counter, ciphertext]
    ["roster", signed roster]

A body is the canonical CBOR of a list, the fields of its struct below in their order; the sender's protocol version is
the first, and what is of a version unlike ours is not looked at any further. Both levels are decoded strictly, so one
meaning has one encoding and a hash over a body identifies it. Sealed packets are most of the traffic and have
one fixed shape: they are written and read by hand here, with no copy of the ciphertext, and byte for byte as the codec
would.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, ClassVar, Final, Literal, TypeVar

import msgspec

from sordino_common.channel.identity import DeviceKey, verify
from sordino_common.channel.roster import MAX_ROSTER_BYTES
from sordino_common.errors import CodecError, LocalError
from sordino_common.messages.base import NAME_PATTERN, Count, Digest, Label, Name
from sordino_common.messages.codec import Limits, decode, encode
from sordino_common.messages.protocol import PROTOCOL, ProtocolVersion, mismatch, protocol_of

MAX_CONTEXT_BYTES: Final = 256
SESSION_ID_BYTES: Final = 16
MAX_COUNTER: Final = (1 << 64) - 1

_PACKET_LIMITS: Final = Limits(payload_bytes=MAX_ROSTER_BYTES + 4096, depth=1, items=8, text_bytes=16)
# More than our bodies need: one of another version has to be read as far as its sender.
_BODY_LIMITS: Final = Limits(payload_bytes=MAX_ROSTER_BYTES + 2048, depth=4, items=128, text_bytes=1024)
_SEALED: Final = b"\x84\x66sealed" + bytes([0x40 + SESSION_ID_BYTES])  # CBOR: array(4), text(6), bytes(16)
_NUMBER: Final = 0x00  # CBOR's major types, as the bits of a head: natural number
_BYTES: Final = 0x40  # byte string
_SIGNED: Final = frozenset({"hello", "accept", "reject", "birth", "death"})

Key32 = Annotated[bytes, msgspec.Meta(min_length=32, max_length=32)]
Context = Annotated[bytes, msgspec.Meta(max_length=MAX_CONTEXT_BYTES)]


class Body(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, array_like=True):
    """What is signed. `kind` names the packet and is the purpose of the signature."""

    kind: ClassVar[str]

    def encoded(self) -> bytes:
        """Canonical CBOR. Raises `LocalError` if a field breaks the bound that the other side enforces."""
        fields = msgspec.to_builtins(self, builtin_types=(bytes,))
        try:
            msgspec.convert(fields, type(self), builtin_types=(bytes,))
        except msgspec.ValidationError as error:
            raise LocalError(f"{self.kind}: {error}") from None
        return encode(fields)


class Hello(Body, frozen=True, kw_only=True):
    """The initiator's opening. `sequence` grows with every Hello of one boot, so that an old one is known as such."""

    kind: ClassVar[str] = "hello"
    protocol: ProtocolVersion = PROTOCOL
    fleet: Name
    sender: Name
    receiver: Name
    boot: Count
    sequence: Count
    epoch: Count
    roster: Digest
    context: Context
    ephemeral: Key32


class Accept(Body, frozen=True, kw_only=True):
    """The responder's answer to the Hello whose body hashes to `hello`."""

    kind: ClassVar[str] = "accept"
    protocol: ProtocolVersion = PROTOCOL
    fleet: Name
    sender: Name
    receiver: Name
    boot: Count
    epoch: Count
    roster: Digest
    context: Context
    hello: Digest
    ephemeral: Key32


class Reject(Body, frozen=True, kw_only=True):
    """The responder's refusal of the Hello whose body hashes to `hello`.

    `signed_roster` comes with the code "stale-epoch", if it is small enough to travel with it."""

    kind: ClassVar[str] = "reject"
    protocol: ProtocolVersion = PROTOCOL
    fleet: Name
    sender: Name
    receiver: Name
    boot: Count
    epoch: Count
    context: Context
    hello: Digest
    code: Literal["stale-epoch", "roster-wanted", "protocol"]
    reason: Label
    signed_roster: bytes | None


B = TypeVar("B", bound=Body)


def signed_packet(identity: DeviceKey, body: Body) -> tuple[bytes, bytes]:
    """(packet, body bytes) of `body`, signed by `identity`."""
    raw = body.encoded()
    return encode([body.kind, raw, identity.sign(body.kind, raw)]), raw


def read_packet(packet: bytes) -> tuple[str, list[Any]]:
    """(kind, the parts behind it), with the number and types of the parts checked. Raises `CodecError`.

    The ciphertext of a sealed packet is a `memoryview` of `packet`."""
    if packet.startswith(_SEALED):
        return "sealed", _read_sealed(packet)
    items = decode(packet, _PACKET_LIMITS)
    if not (isinstance(items, list) and items and isinstance(items[0], str)):
        raise CodecError("packet: expected [kind, ...]")
    kind, parts = items[0], items[1:]
    if kind in _SIGNED:
        if len(parts) != 2 or not all(isinstance(part, bytes) for part in parts):
            raise CodecError(f"packet: expected [{kind}, body, signature]")
    elif kind == "roster":
        if len(parts) != 1 or not isinstance(parts[0], bytes):
            raise CodecError("packet: expected [roster, signed roster]")
    else:
        raise CodecError(f"packet: {kind!r} is no kind of packet, or not of this shape")
    return kind, parts


def sealed_head(session_id: bytes, counter: int, ciphertext_bytes: int) -> bytes:
    """What stands before the ciphertext in a sealed packet."""
    return _SEALED + session_id + _head(_NUMBER, counter) + _head(_BYTES, ciphertext_bytes)


SEALED_HEAD_BYTES: Final = len(_SEALED) + SESSION_ID_BYTES + 9 + 5  # at most


def _read_sealed(packet: bytes) -> list[Any]:
    """[session id, counter, ciphertext] of a packet that starts with `_SEALED`."""
    if len(packet) > _PACKET_LIMITS.payload_bytes:
        raise CodecError(f"packet: {len(packet)} bytes, at most {_PACKET_LIMITS.payload_bytes} are taken")
    at = len(_SEALED) + SESSION_ID_BYTES
    session_id = packet[len(_SEALED) : at]
    counter, at = _read_head(packet, at, _NUMBER)
    length, at = _read_head(packet, at, _BYTES)
    if length != len(packet) - at:
        raise CodecError(f"packet: a ciphertext of {length} bytes, but {len(packet) - at} follow")
    return [session_id, counter, memoryview(packet)[at:]]


def _head(major: int, number: int) -> bytes:
    """The shortest CBOR head of major type `major` with argument `number` (RFC 8949 section 3)."""
    if number < 24:
        return bytes([major + number])
    width = 0 if number < 1 << 8 else 1 if number < 1 << 16 else 2 if number < 1 << 32 else 3
    return bytes([major + 24 + width]) + number.to_bytes(1 << width, "big")


def _read_head(data: bytes, at: int, major: int) -> tuple[int, int]:
    """(argument, offset behind it) of the head at `at`. Raises `CodecError` unless it is what `_head` writes."""
    info = data[at] - major if at < len(data) else -1
    if 0 <= info < 24:
        return info, at + 1
    if 24 <= info <= 27:
        after = at + 1 + (1 << (info - 24))
        number = int.from_bytes(data[at + 1 : after], "big")
        if data[at:after] == _head(major, number):
            return number, after
    raise CodecError(f"packet: expected {'a number' if major == _NUMBER else 'bytes'}, in shortest form, at byte {at}")


def read_body(expected: type[B], raw: bytes, *, protocol: ProtocolVersion = PROTOCOL) -> B:
    """The `expected` body in `raw`, with every field within its bound. Raises `ProtocolMismatch` (with the sender that
    it names, in `peer`), unless it works with `protocol`, and `CodecError`. Not yet verified."""
    fields = decode(raw, _BODY_LIMITS)
    theirs = protocol_of(fields)
    if theirs is not None and not protocol.works_with(theirs):
        raise mismatch(protocol, theirs, peer=_sender(fields))
    try:
        return msgspec.convert(fields, expected, builtin_types=(bytes,))
    except msgspec.ValidationError as error:
        raise CodecError(f"{expected.kind}: {_named(expected, str(error))}") from None


def _sender(fields: list[Any]) -> str:
    """Whom a body of any version names as its sender: the third field, behind version and fleet, for good."""
    name = fields[2] if len(fields) > 2 else None
    return name if isinstance(name, str) and re.match(NAME_PATTERN, name) else "a peer that gives no name"


def verify_body(body: Body, raw: bytes, signature: bytes, sign_key: bytes) -> None:
    """Raises `SignatureError` unless `signature` is one of `sign_key` over `raw` for the purpose `body.kind`."""
    verify(sign_key, body.kind, raw, signature)


def roster_packet(signed: bytes) -> bytes:
    """The packet that carries a signed roster."""
    return encode(["roster", signed])


def _named(expected: type[Body], text: str) -> str:
    """msgspec says `$[3]`; say the field's name."""
    for index, name in enumerate(expected.__struct_fields__):
        text = text.replace(f"`$[{index}]", f"`{name}")
    return text
