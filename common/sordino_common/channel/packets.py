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
from sordino_common.messages.heads import BYTES, NO_HEAD, NUMBER, WIDE, head
from sordino_common.messages.protocol import PROTOCOL, ProtocolVersion, mismatch, protocol_of

MAX_CONTEXT_BYTES: Final = 256
SESSION_ID_BYTES: Final = 16
MAX_COUNTER: Final = (1 << 64) - 1

_PACKET_LIMITS: Final = Limits(payload_bytes=MAX_ROSTER_BYTES + 4096, depth=1, items=8, text_bytes=16)
# More than our bodies need: one of another version has to be read as far as its sender.
_BODY_LIMITS: Final = Limits(payload_bytes=MAX_ROSTER_BYTES + 2048, depth=4, items=128, text_bytes=1024)
SEALED: Final = b"\x84\x66sealed" + bytes([0x40 + SESSION_ID_BYTES])  # CBOR: array(4), text(6), bytes(16)
_COUNTER_AT: Final = len(SEALED) + SESSION_ID_BYTES
_FRONT: Final = {1: b"\x18", 2: b"\x19", 4: b"\x1a", 8: b"\x1b"}  # bytes of a number -> what stands before it
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
    if packet.startswith(SEALED):
        return "sealed", list(read_sealed(packet))
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
    if counter < 24:
        number = bytes((counter,))
    else:  # not of `heads`, which would remember it: every counter comes once
        width = 1 if counter < 1 << 8 else 2 if counter < 1 << 16 else 4 if counter < 1 << 32 else 8
        number = _FRONT[width] + counter.to_bytes(width, "big")
    return SEALED + session_id + number + head(BYTES, ciphertext_bytes)


SEALED_HEAD_BYTES: Final = len(SEALED) + SESSION_ID_BYTES + 9 + 5  # at most


def read_sealed(packet: bytes) -> tuple[bytes, int, memoryview]:
    """(session id, counter, ciphertext) of a packet that starts with `SEALED`; the ciphertext is a view of it. Raises
    `CodecError` unless `sealed_head` and so much ciphertext make this very packet."""
    packet_bytes = len(packet)
    if packet_bytes > _PACKET_LIMITS.payload_bytes:
        raise CodecError(f"packet: {packet_bytes} bytes, at most {_PACKET_LIMITS.payload_bytes} are taken")
    at, counter, argument = _COUNTER_AT, 0, 0
    for major in (NUMBER, BYTES):
        counter, begin = argument, at
        argument, at = packet[at] - major if at < packet_bytes else -1, at + 1
        if argument > 23:
            width, least = WIDE.get(argument, NO_HEAD)
            argument, at = int.from_bytes(packet[at : at + width], "big"), at + width
            if argument < least or at > packet_bytes:
                argument = -1
        if argument < 0:
            what = "a number" if major == NUMBER else "bytes"
            raise CodecError(f"packet: expected {what}, in shortest form, at byte {begin}")
    if argument != packet_bytes - at:
        raise CodecError(f"packet: a ciphertext of {argument} bytes, but {packet_bytes - at} follow")
    return packet[len(SEALED) : _COUNTER_AT], counter, memoryview(packet)[at:]


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
