"""A sealed box: one signed message to one receiver, with no session (seeds for helpers, masks for owners).

    info      = canonical CBOR of ["sordino-box", 1, session, round, sender, receiver, kind, their two keys]
    sealed    = HPKE base mode (RFC 9180; X25519, HKDF-SHA256, ChaCha20-Poly1305) of the plaintext under `info`
    box       = canonical CBOR of ["box", sealed, signature over the CBOR of [info, sealed] for "sealed-box"]

`info` binds the box to its place: opened under another session, round, sender, receiver or kind, it does not open. The
signature is over the ciphertext, and `info` names the signer inside the key schedule too, so that nobody can put their
own name on another's box. One-way, so not forward secret towards the receiver; and a box can be replayed within its
place: the protocol that uses it takes one box per (session, round, sender, receiver, kind).
"""

from __future__ import annotations

from typing import Final

from sordino_common.channel.identity import BOX_OVERHEAD, SIGNATURE_BYTES, DeviceKey, seal_to, verify
from sordino_common.channel.roster import Roster, RosterEntry
from sordino_common.errors import CodecError, LocalError, SessionError
from sordino_common.messages.codec import Limits, decode, encode

MAX_BOX_BYTES: Final = 64 * 1024  # for seeds and short lists of them; what is larger belongs into a session
_LIMITS: Final = Limits(payload_bytes=MAX_BOX_BYTES + 512, depth=1, items=4, text_bytes=8)


def seal_box(
    plaintext: bytes,
    *,
    identity: DeviceKey,
    sender: RosterEntry,
    receiver: RosterEntry,
    session: bytes,
    round: int,
    kind: str,
) -> bytes:
    """The box that only `receiver` can open, in this place only. Raises `LocalError` if it is too large, or `identity`
    is not that of `sender`."""
    if identity.public.sign_key != sender.sign_key:
        raise LocalError(f"sealed box: the key {identity.fingerprint} is not that of {sender.name}")
    if len(plaintext) > MAX_BOX_BYTES - BOX_OVERHEAD:
        raise LocalError(f"sealed box: {len(plaintext)} bytes, at most {MAX_BOX_BYTES - BOX_OVERHEAD}; use a session")
    info = _info(sender, receiver, session, round, kind)
    sealed = seal_to(receiver.box_key, plaintext, info)
    return encode(["box", sealed, identity.sign("sealed-box", encode([info, sealed]))])


def open_box(
    box: bytes,
    *,
    identity: DeviceKey,
    roster: Roster,
    sender: str,
    receiver: str,
    session: bytes,
    round: int,
    kind: str,
) -> bytes:
    """The plaintext.

    Raises `CodecError`, `RosterError` (unknown party), `SignatureError` (not signed by `sender` for this place) or
    `SessionError` (does not open)."""
    parts = decode(box, _LIMITS)
    if not (
        isinstance(parts, list)
        and len(parts) == 3
        and parts[0] == "box"
        and isinstance(parts[1], bytes)
        and isinstance(parts[2], bytes)
    ):
        raise CodecError("sealed box: expected [box, sealed, signature]")
    _, sealed, signature = parts
    if len(signature) != SIGNATURE_BYTES or len(sealed) < BOX_OVERHEAD:
        raise CodecError(
            f"sealed box: {len(sealed)} sealed bytes and a signature of {len(signature)} bytes can't be one"
        )
    from_entry, to_entry = roster.entry(sender), roster.entry(receiver)
    if identity.public.box_key != to_entry.box_key:
        raise SessionError(f"sealed box: is for {receiver}, whose key is not {identity.fingerprint}")
    info = _info(from_entry, to_entry, session, round, kind)
    verify(from_entry.sign_key, "sealed-box", encode([info, sealed]), signature)
    return identity.unseal(sealed, info)


def _info(sender: RosterEntry, receiver: RosterEntry, session: bytes, round_number: int, kind: str) -> bytes:
    return encode(
        [
            "sordino-box",
            1,
            session,
            round_number,
            sender.name,
            receiver.name,
            kind,
            sender.sign_key,
            receiver.box_key,
        ]
    )
