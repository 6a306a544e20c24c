"""An established session: two parties, one key per direction, a counter per packet.

    shared   = X25519(own ephemeral, the peer's ephemeral)                               refused if all zero
    salt     = SHA-256("sordino/transcript" 0x00 len(hello) hello len(accept) accept)    len: 8 bytes, big-endian
    keys     = HKDF-SHA256(shared, salt, info "sordino/session keys", 80 bytes)
             = key initiator->responder (32) | key responder->initiator (32) | session id (16)

The two signed bodies hold fleet, roster digest, epoch, context, both names, both boots and both ephemerals, so every
one of them enters the keys through the salt. A packet is ChaCha20-Poly1305 under the sender's key with

    nonce    = 0x00000000 counter         counter: 8 bytes, big-endian; starts at 0, never used twice, never wraps
    AD       = "sordino/sealed" 0x00 len(fleet) fleet session-id direction counter     direction: 0 from initiator, 1 to

The receiver takes each counter once, in any order within `WINDOW` of the highest that it has opened. Sources: RFC 8439
(AEAD), RFC 5869 (HKDF), RFC 7748 section 6.1 (X25519), RFC 6479 (sliding window).
"""

from __future__ import annotations

import hashlib
import io
from typing import Final, NoReturn

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from sordino_common.channel.identity import check_box_key
from sordino_common.channel.packets import MAX_COUNTER, SEALED_HEAD_BYTES, sealed_head
from sordino_common.errors import HandshakeError, LocalError, SessionError
from sordino_common.messages.protocol import PROTOCOL, ProtocolVersion

WINDOW: Final = 1024  # more than any number of packets that are in flight between two parties at a time
TAG_BYTES: Final = 16
_SMALL_BYTES: Final = 1 << 15  # copying so much costs less than what avoids it
SEALED_OVERHEAD: Final = SEALED_HEAD_BYTES + TAG_BYTES  # at most; a small packet needs less


class Session:
    """Both directions of one session. `repr` shows id, peer and context, never a key; it can't be copied or pickled."""

    __slots__ = (
        "_highest",
        "_next",
        "_receive",
        "_receive_ad",
        "_seal",
        "_seal_ad",
        "_seen",
        "context",
        "id",
        "initiated",
        "peer",
        "peer_boot",
        "protocol",
    )

    def __init__(
        self,
        *,
        session_id: bytes,
        fleet: str,
        peer: str,
        peer_boot: int,
        context: bytes,
        initiated: bool,
        send_key: bytes,
        receive_key: bytes,
        protocol: ProtocolVersion = PROTOCOL,
    ) -> None:
        self.protocol: Final = protocol  # that both speak
        self.id: Final = session_id
        self.peer: Final = peer
        self.peer_boot: Final = peer_boot
        self.context: Final = context
        self.initiated: Final = initiated  # by us
        self._seal = ChaCha20Poly1305(send_key)
        self._receive = ChaCha20Poly1305(receive_key)
        name = fleet.encode("ascii")
        common = b"sordino/sealed\0" + bytes([len(name)]) + name + session_id
        ours, theirs = (b"\0", b"\1") if initiated else (b"\1", b"\0")
        self._seal_ad = common + ours
        self._receive_ad = common + theirs
        self._next = 0
        self._highest = -1  # highest counter opened
        self._seen = 0  # bit k: counter highest - k was opened

    def __repr__(self) -> str:
        return f"Session({self.id.hex()}, peer={self.peer}, context={self.context.hex() or '-'})"

    def __reduce__(self) -> NoReturn:
        raise LocalError("a Session is never serialized: its counters would be used twice")

    def __copy__(self) -> NoReturn:
        raise LocalError("a Session is never copied: its counters would be used twice")

    def __deepcopy__(self, memo: dict[int, object]) -> NoReturn:
        raise LocalError("a Session is never copied: its counters would be used twice")

    @property
    def sent(self) -> int:
        """Packets sealed so far; also the next counter."""
        return self._next

    def seal(self, plaintext: bytes | bytearray | memoryview) -> bytes:
        """The whole packet that carries `plaintext`: `SEALED_OVERHEAD` bytes longer at most.

        Raises `LocalError` after 2^64 packets, when the counter would wrap, or for 4 GiB and more in one packet."""
        counter = self._next
        if counter > MAX_COUNTER:
            raise LocalError(f"session with {self.peer}: all 2^64 counters are used; set up a new session")
        plain_bytes = memoryview(plaintext).nbytes
        if plain_bytes >= (1 << 32) - TAG_BYTES:
            raise LocalError(f"session with {self.peer}: {plain_bytes} bytes in one packet; cut it into chunks")
        self._next = counter + 1  # before use: whatever happens below, this counter is gone
        nonce = counter.to_bytes(12, "big")
        head = sealed_head(self.id, counter, plain_bytes + TAG_BYTES)
        if plain_bytes <= _SMALL_BYTES:
            return head + self._seal.encrypt(nonce, plaintext, self._seal_ad + nonce[4:])
        # Encrypt straight into the packet: BytesIO owns these fresh bytes and hands them out again without a copy. At
        # 256 KiB a second buffer costs as much as the cipher itself (page faults).
        packet = io.BytesIO(bytes(len(head) + plain_bytes + TAG_BYTES))
        with packet.getbuffer() as buffer:
            buffer[: len(head)] = head
            self._seal.encrypt_into(nonce, plaintext, self._seal_ad + nonce[4:], buffer[len(head) :])
        return packet.getvalue()

    def open(self, counter: int, ciphertext: bytes | memoryview) -> bytes:
        """The plaintext of one packet.

        Raises `SessionError`, and changes nothing, for a counter that was opened before, one that
        is `WINDOW` or more behind the highest, or a ciphertext that is not the peer's for this counter."""
        if not 0 <= counter <= MAX_COUNTER:
            raise SessionError(f"session with {self.peer}: counter {counter} is not in 0..2^64-1")
        behind = self._highest - counter
        if behind >= WINDOW:
            raise SessionError(
                f"session with {self.peer}: packet {counter} is {behind} behind the newest, at most {WINDOW - 1}"
            )
        if behind >= 0 and self._seen >> behind & 1:
            raise SessionError(f"session with {self.peer}: packet {counter} is a replay")
        nonce = counter.to_bytes(12, "big")
        try:
            plaintext = self._receive.decrypt(nonce, ciphertext, self._receive_ad + nonce[4:])
        except (InvalidTag, ValueError):
            raise SessionError(f"session with {self.peer}: packet {counter} is forged or damaged") from None
        if behind < 0:
            # A jump of WINDOW or more leaves nothing of the old bits; never shift by a number that a peer chose.
            self._seen = (self._seen << -behind & (1 << WINDOW) - 1 if -behind < WINDOW else 0) | 1
            self._highest = counter
        else:
            self._seen |= 1 << behind
        return plaintext


def shared_secret(private: X25519PrivateKey, ephemeral: bytes, who: str) -> bytes:
    """X25519(private, ephemeral), 32 bytes.

    Raises `HandshakeError` for a key that is not canonical, one of small order, and an all-zero result."""
    fault = check_box_key(ephemeral)
    if fault is not None:
        raise HandshakeError(f"handshake with {who}: {fault}")
    try:
        shared = private.exchange(X25519PublicKey.from_public_bytes(ephemeral))
    except ValueError:
        raise HandshakeError(f"handshake with {who}: the X25519 shared secret is all zero") from None
    if shared == bytes(32):  # OpenSSL refuses it above; other back ends might not
        raise HandshakeError(f"handshake with {who}: the X25519 shared secret is all zero")
    return shared


def derive_session(
    *,
    shared: bytes,
    hello: bytes,
    accept: bytes,
    fleet: str,
    peer: str,
    peer_boot: int,
    context: bytes,
    initiated: bool,
    protocol: ProtocolVersion = PROTOCOL,
) -> Session:
    """The session that follows from the shared secret and the two signed bodies (formulas at the top)."""
    transcript = hashlib.sha256(b"sordino/transcript\0")
    for body in (hello, accept):
        transcript.update(len(body).to_bytes(8, "big"))
        transcript.update(body)
    keys = HKDF(algorithm=SHA256(), length=80, salt=transcript.digest(), info=b"sordino/session keys").derive(shared)
    forth, back, session_id = keys[:32], keys[32:64], keys[64:]
    return Session(
        session_id=session_id,
        fleet=fleet,
        peer=peer,
        peer_boot=peer_boot,
        context=context,
        initiated=initiated,
        send_key=forth if initiated else back,
        receive_key=back if initiated else forth,
        protocol=protocol,
    )
