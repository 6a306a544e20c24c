"""The bytes of the channel: every packet is the canonical CBOR of a list that starts with its kind.

    ["hello" | "accept" | "reject" | "birth" | "death", body, signature]    signature over body, purpose = kind
    ["sealed", session id, counter, ciphertext]
    ["roster", signed roster]

A body is the canonical CBOR of a list, the fields of its struct below in their order. Both levels are decoded strictly,
so one meaning has one encoding and a hash over a body identifies it.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Final, Literal, TypeVar

import msgspec

from sordino_common.channel.identity import DeviceKey, verify
from sordino_common.channel.roster import MAX_ROSTER_BYTES
from sordino_common.errors import CodecError, LocalError
from sordino_common.messages.base import Count, Digest, Label, Name
from sordino_common.messages.codec import Limits, decode, encode

MAX_CONTEXT_BYTES: Final = 256
SESSION_ID_BYTES: Final = 16
MAX_COUNTER: Final = (1 << 64) - 1

_PACKET_LIMITS: Final = Limits(payload_bytes=MAX_ROSTER_BYTES + 4096, depth=1, items=8, text_bytes=16)
_BODY_LIMITS: Final = Limits(payload_bytes=MAX_ROSTER_BYTES + 2048, depth=1, items=24, text_bytes=1024)
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
    version: Literal[1] = 1
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
    version: Literal[1] = 1
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
    version: Literal[1] = 1
    fleet: Name
    sender: Name
    receiver: Name
    boot: Count
    epoch: Count
    context: Context
    hello: Digest
    code: Literal["stale-epoch", "roster-wanted"]
    reason: Label
    signed_roster: bytes | None


B = TypeVar("B", bound=Body)


def signed_packet(identity: DeviceKey, body: Body) -> tuple[bytes, bytes]:
    """(packet, body bytes) of `body`, signed by `identity`."""
    raw = body.encoded()
    return encode([body.kind, raw, identity.sign(body.kind, raw)]), raw


def read_packet(packet: bytes) -> tuple[str, list[Any]]:
    """(kind, the parts behind it), with the number and types of the parts checked. Raises `CodecError`."""
    items = decode(packet, _PACKET_LIMITS)
    if not (isinstance(items, list) and items and isinstance(items[0], str)):
        raise CodecError("packet: expected [kind, ...]")
    kind, parts = items[0], items[1:]
    if kind in _SIGNED:
        if len(parts) != 2 or not all(isinstance(part, bytes) for part in parts):
            raise CodecError(f"packet: expected [{kind}, body, signature]")
    elif kind == "sealed":
        _check_sealed(parts)
    elif kind == "roster":
        if len(parts) != 1 or not isinstance(parts[0], bytes):
            raise CodecError("packet: expected [roster, signed roster]")
    else:
        raise CodecError(f"packet: unknown kind {kind!r}")
    return kind, parts


def _check_sealed(parts: list[Any]) -> None:
    match parts:
        case [bytes() as session_id, int() as counter, bytes()] if (
            len(session_id) == SESSION_ID_BYTES and not isinstance(counter, bool) and 0 <= counter <= MAX_COUNTER
        ):
            return
    raise CodecError(f"packet: expected [sealed, {SESSION_ID_BYTES}-byte session id, counter below 2^64, ciphertext]")


def read_body(expected: type[B], raw: bytes) -> B:
    """The `expected` body in `raw`, with every field within its bound. Raises `CodecError`. Not yet verified."""
    try:
        return msgspec.convert(decode(raw, _BODY_LIMITS), expected, builtin_types=(bytes,))
    except msgspec.ValidationError as error:
        raise CodecError(f"{expected.kind}: {_named(expected, str(error))}") from None


def verify_body(body: Body, raw: bytes, signature: bytes, sign_key: bytes) -> None:
    """Raises `SignatureError` unless `signature` is one of `sign_key` over `raw` for the purpose `body.kind`."""
    verify(sign_key, body.kind, raw, signature)


def roster_packet(signed: bytes) -> bytes:
    """The packet that carries a signed roster."""
    return encode(["roster", signed])


def _named(expected: type[Body], text: str) -> str:
    """msgspec says `$[3]`; say the field's name."""
    for index, name in enumerate(expected.__struct_fields__):
        text = text.replace(f"`$[{index}]`", f"`{name}`")
    return text
