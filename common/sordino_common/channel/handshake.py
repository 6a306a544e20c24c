"""How two parties of one roster agree on a session: `SessionTable`, one per party, sans-IO.

The parties name each other by roster name; packets travel through a broker that may drop, delay, repeat, reorder, make
up and send back whatever it likes. Two packets and one sealed packet suffice:

    initiator                                                             responder
    initiate() -> Hello     -- fleet, names, boot, sequence, epoch, -->   checks, answers, keeps a *half-open* session
                               roster digest, context, ephemeral
    Established             <-- Accept: the same, hash of the Hello --
                            -- first sealed packet ----------------->     Established: only now is an older one replaced

Hello, Accept and Reject are signed by the sender's Ed25519 key, each for a purpose of its own. The keys follow from
both ephemerals and both signed bodies (`session.py`), so the parties agree on everything in them or on nothing. The
initiator sends an empty sealed packet at once; it confirms the key, and carries nothing up. A session is named by peer
and `context` (empty for commands; such as a hash of plan and job for a committee's session).

One slot per (peer, context). What arrives, what it does:

    in state           packet                              effects
    -----------------  ----------------------------------  ------------------------------------------------------------
    any                Hello, newest of the peer's boot    Reply(Accept); half-open, in place of an earlier such one
    half-open          the same Hello again                Reply(the same Accept)
    confirmed          the same Hello again                nothing (QoS 1 repeats packets)
    our Hello pending  Hello, and our name is the smaller  Reply(our Hello): the smaller name's Hello wins
    our Hello pending  Accept for it                       Established, Reply(empty sealed packet)
    our Hello settled  Accept or Reject for it             nothing
    half-open          sealed                              Established, Opened; our own pending Hello is given up
    established        sealed                              Opened; older sessions still open what was on its way
    any                Hello or Accept of a greater boot   Lost for every session with an earlier boot, then as above
    any                Hello of an older epoch             Reply(Reject stale-epoch, with our signed roster)
    any                Hello of a newer epoch              Reply(Reject roster-wanted)
    our Hello pending  Reject stale-epoch + roster         RosterOffered, Lost for every session, Reply(a new Hello)
    our Hello pending  Reject roster-wanted                Reply(our signed roster), Reply(our Hello)
    any                Hello of a version unlike ours      Unlike, Reply(Reject protocol)
    any                Accept, Reject of such a version    Unlike
    any                roster, newer                       RosterOffered, Lost for every session

What somebody could send instead, and the error it gets. Whatever raises has changed nothing:

    not canonical, cut, too long, a field out of bounds    CodecError
    a Hello to somebody else, of another fleet, from us    HandshakeError      (so is our own packet sent back to us)
    a sender that the roster lacks, or with expired entry  RosterError
    signed by another key (an agent that plays the server) SignatureError      (so are S >= L, small-order keys)
    our epoch, but another roster                          RosterError
    an old Hello: smaller boot, or smaller sequence        HandshakeError      (the newest Hello is remembered)
    two Hellos with one sequence                           HandshakeError
    an Accept or Reject for no Hello of ours               HandshakeError      (it must name a pending Hello's hash)
    an Accept with changed context, epoch or roster        HandshakeError, RosterError
    an ephemeral of small order, or not canonical          HandshakeError
    a session id that is in use                            HandshakeError
    a roster, or a Reject with a roster, that is forged    what `RosterBook.accept` raises
    sealed: unknown id, replay, damage, reflected          SessionError

A replayed Hello that is new to us (we restarted, say) costs a signature and a half-open session that nobody can
confirm; it never touches a live session. Half-open sessions are bounded in total and per peer, the oldest goes first.

Cost: a Hello and its Accept take each party one signature, one verification, two X25519 multiplications. Forward
secrecy: ephemerals live until the Hello is settled. Not given: hiding who talks to whom, nor defence against a broker
that drops everything.
"""

from __future__ import annotations

import hashlib
import hmac
import os
from collections.abc import Callable
from typing import Final

from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from sordino_common.channel.effects import (
    Effect,
    Established,
    Lost,
    Opened,
    Rejected,
    Reply,
    RosterOffered,
    Unlike,
)
from sordino_common.channel.identity import DeviceKey, verify
from sordino_common.channel.packets import (
    MAX_CONTEXT_BYTES,
    SEALED,
    Accept,
    Hello,
    Reject,
    read_body,
    read_packet,
    read_sealed,
    roster_packet,
    signed_packet,
    verify_body,
)
from sordino_common.channel.roster import Roster, RosterBook, RosterEntry
from sordino_common.channel.session import Session, derive_session, shared_secret
from sordino_common.channel.slots import MAX_HALF_OPEN, Pending, Slot, Slots
from sordino_common.errors import (
    CodecError,
    HandshakeError,
    LocalError,
    ProtocolMismatch,
    RosterError,
    SessionError,
)
from sordino_common.messages.protocol import PROTOCOL, ProtocolVersion, agreed

OFFER_BYTES: Final = 128 * 1024  # a larger roster does not fit into a packet; it comes on the roster topic


class SessionTable:
    """All sessions of one party (see the top of this file). Single-threaded; the caller sends what `Reply` holds."""

    def __init__(
        self,
        *,
        name: str,
        identity: DeviceKey,
        roster: RosterBook,
        fleet: str,
        boot: int,
        random: Callable[[int], bytes] = os.urandom,
        max_half_open: int = MAX_HALF_OPEN,
        protocol: ProtocolVersion = PROTOCOL,
    ) -> None:
        if roster.fleet != fleet:
            raise LocalError(f"sessions of fleet {fleet} on the roster of fleet {roster.fleet}")
        self.name: Final = name
        self.fleet: Final = fleet
        self.boot: Final = boot
        self.protocol: Final = protocol
        self._identity = identity
        self._book = roster
        self._random = random
        self._roster = roster.current  # what the sessions below are bound to
        self._slots = Slots(max_half_open=max_half_open)
        self._sequence = 0
        self._owed: list[Effect] = []  # Lost, from a change of the roster that was noticed outside `receive`

    def __repr__(self) -> str:
        sessions, half_open = len(self._slots.by_session), len(self._slots.half_open)
        return f"SessionTable({self.name}, {sessions} sessions, {half_open} of them half-open)"

    # --- what the owner asks for ------------------------------------------------------------------------------

    def established(self, peer: str, context: bytes = b"") -> Session | None:
        """The session to seal with, or None if there is none, or the roster has changed or expired since."""
        if self._book.current is not self._roster:
            self._follow_roster()
        contexts = self._slots.by_peer.get(peer)
        slot = contexts.get(context) if contexts is not None else None
        if slot is None or slot.current is None:
            return None
        if slot.ends_s <= self._book.wall_s():
            try:
                self._book.party(peer)
            except RosterError:
                return None
        return slot.current

    def initiate(self, peer: str, context: bytes = b"", *, now_s: float) -> bytes:
        """The Hello to send to `peer`: the pending one, to be sent again, or a new one. A live session stays in use
        until the answer comes. Raises `RosterError` if the roster is missing or expired, or lacks us or `peer`."""
        self._follow_roster()
        if peer == self.name:
            raise LocalError(f"{self.name} initiates a session with itself")
        if len(context) > MAX_CONTEXT_BYTES:
            raise LocalError(f"a context has {MAX_CONTEXT_BYTES} bytes at most, got {len(context)}; use a hash")
        roster, _ = self._parties(peer)
        slot = self._slots.get(peer, context)
        if slot is not None and slot.pending is not None:
            return slot.pending.packet
        if slot is None:
            slot = self._slots.create(peer, context, LocalError)
        ephemeral = X25519PrivateKey.from_private_bytes(self._random(32))
        hello = Hello(
            protocol=self.protocol,
            fleet=self.fleet,
            sender=self.name,
            receiver=peer,
            boot=self.boot,
            sequence=self._sequence,
            epoch=roster.epoch,
            roster=roster.digest,
            context=context,
            ephemeral=ephemeral.public_key().public_bytes_raw(),
        )
        packet, body = signed_packet(self._identity, hello)
        self._sequence += 1
        slot.pending = Pending(ephemeral=ephemeral, packet=packet, body=body, hash=hashlib.sha256(body).digest())
        return packet

    def receive(self, packet: bytes, *, now_s: float) -> list[Effect]:
        """Take one packet of kind hello, accept, reject, sealed or roster. Raises `RemoteError`s (table above)."""
        if self._book.current is not self._roster:
            self._follow_roster()
        effects = self._on_sealed(packet) if packet.startswith(SEALED) else self._on_clear(packet, now_s)
        if self._owed:
            effects, self._owed = [*self._owed, *effects], []
        return effects

    def drop(self, peer: str, context: bytes | None = None, *, reason: str = "dropped") -> list[Lost]:
        """Forget sessions, half-open ones and pending Hellos with `peer`: those of one context, or all."""
        return self._slots.clear(self._slots.of(peer, context), reason)

    def drop_all(self, *, reason: str = "dropped") -> list[Lost]:
        """Forget all sessions, half-open ones and pending Hellos."""
        return self._slots.clear(self._slots.all(), reason)

    # --- what arrives -----------------------------------------------------------------------------------------

    def _on_clear(self, packet: bytes, now_s: float) -> list[Effect]:
        kind, parts = read_packet(packet)
        try:
            match kind:
                case "hello":
                    return self._on_hello(parts[0], parts[1], now_s)
                case "accept":
                    return self._on_accept(parts[0], parts[1])
                case "reject":
                    return self._on_reject(parts[0], parts[1], now_s)
                case "roster":
                    return self._on_roster(parts[0])
                case _:
                    raise CodecError(f"sessions: a packet of kind {kind} is not for them")
        except ProtocolMismatch as error:
            return self._on_unlike(kind, parts[0], parts[1], error)

    def _on_hello(self, raw: bytes, signature: bytes, now_s: float) -> list[Effect]:
        hello = read_body(Hello, raw, protocol=self.protocol)
        roster, entry = self._addressed_to_us(hello)
        verify_body(hello, raw, signature, entry.sign_key)
        self._check_boot(hello)
        hello_hash = hashlib.sha256(raw).digest()
        if hello.epoch != roster.epoch:
            return [self._reject(hello, hello_hash, roster)]
        self._check_same_roster(hello, roster)
        slot = self._slots.get(hello.sender, hello.context)
        if slot is not None:
            repeated = self._check_sequence(slot, hello, hello_hash)
            if repeated is not None:
                return repeated
            if slot.pending is not None and self.name < hello.sender:
                # Both opened at once. The other side answers ours, which may have been lost: send it again.
                return [*self._slots.hear(hello.sender, hello.boot), Reply(to=hello.sender, packet=slot.pending.packet)]
        return self._accept(hello, raw, hello_hash, roster, entry, now_s)

    def _accept(
        self, hello: Hello, raw: bytes, hello_hash: bytes, roster: Roster, entry: RosterEntry, now_s: float
    ) -> list[Effect]:
        ephemeral = X25519PrivateKey.from_private_bytes(self._random(32))
        shared = shared_secret(ephemeral, hello.ephemeral, hello.sender)
        accept = Accept(
            protocol=self.protocol,
            fleet=self.fleet,
            sender=self.name,
            receiver=hello.sender,
            boot=self.boot,
            epoch=roster.epoch,
            roster=roster.digest,
            context=hello.context,
            hello=hello_hash,
            ephemeral=ephemeral.public_key().public_bytes_raw(),
        )
        packet, body = signed_packet(self._identity, accept)
        session = self._derive(shared, raw, body, hello, initiated=False)
        slot = self._slots.get(hello.sender, hello.context)
        if slot is None:
            slot = self._slots.create(hello.sender, hello.context, HandshakeError)
        lost = self._slots.hear(hello.sender, hello.boot)
        slot.heard, slot.ends_s = (hello.boot, hello.sequence, hello_hash), roster.ends_s(entry)
        self._slots.put_half_open(slot, session, hello=hello_hash, packet=packet, now_s=now_s)
        return [*lost, Reply(to=hello.sender, packet=packet)]

    def _on_accept(self, raw: bytes, signature: bytes) -> list[Effect]:
        accept = read_body(Accept, raw, protocol=self.protocol)
        roster, entry = self._addressed_to_us(accept)
        verify_body(accept, raw, signature, entry.sign_key)
        self._check_boot(accept)
        slot = self._answered(accept)
        if slot is None:
            return list(self._slots.hear(accept.sender, accept.boot))
        pending = slot.pending
        assert pending is not None
        if accept.epoch != roster.epoch:
            raise HandshakeError(
                f"handshake with {accept.sender}: accepts in epoch {accept.epoch} a Hello of epoch {roster.epoch}"
            )
        self._check_same_roster(accept, roster)
        shared = shared_secret(pending.ephemeral, accept.ephemeral, accept.sender)
        session = self._derive(shared, pending.body, raw, accept, initiated=True)
        lost = self._slots.hear(accept.sender, accept.boot)
        slot.settle()
        slot.ends_s = roster.ends_s(entry)
        self._slots.make_current(slot, session)
        return [
            *lost,
            Established(peer=slot.peer, context=slot.context, session=session),
            Reply(to=slot.peer, packet=session.seal(b"")),
        ]

    def _on_sealed(self, packet: bytes) -> list[Effect]:
        session_id, counter, ciphertext = read_sealed(packet)
        found = self._slots.by_session.get(session_id)
        if found is None:
            raise SessionError(f"session {session_id.hex()}: not one of ours, or no longer")
        slot, session = found
        if slot.ends_s <= self._book.wall_s():
            self._book.party(slot.peer)  # raises, and says why
        plaintext = session.open(counter, ciphertext)
        effects: list[Effect] = []
        confirms = slot.half_open is not None and slot.half_open.session is session
        if confirms and self._slots.confirm(slot):
            effects.append(Established(peer=slot.peer, context=slot.context, session=session))
        if plaintext:
            effects.append(Opened(peer=slot.peer, context=slot.context, session_id=session_id, plaintext=plaintext))
        return effects

    def _on_reject(self, raw: bytes, signature: bytes, now_s: float) -> list[Effect]:
        reject = read_body(Reject, raw, protocol=self.protocol)
        roster, entry = self._addressed_to_us(reject)
        verify_body(reject, raw, signature, entry.sign_key)
        self._check_boot(reject)
        slot = self._answered(reject)
        if slot is None:
            return list(self._slots.hear(reject.sender, reject.boot))
        pending = slot.pending
        assert pending is not None
        if reject.code == "roster-wanted":
            if reject.epoch >= roster.epoch or self._book.signed is None:
                raise HandshakeError(
                    f"handshake with {slot.peer}: wants our roster, though its epoch {reject.epoch} is not older"
                )
            offer = Reply(to=slot.peer, packet=roster_packet(self._book.signed))
            return [*self._slots.hear(reject.sender, reject.boot), offer, Reply(to=slot.peer, packet=pending.packet)]
        if reject.signed_roster is not None and self._book.accept(reject.signed_roster):
            lost = [*self._slots.hear(reject.sender, reject.boot), *self._roster_changed()]
            offered = RosterOffered(signed=reject.signed_roster)
            try:
                hello = self.initiate(slot.peer, slot.context, now_s=now_s)
            except RosterError as error:
                refused = Rejected(peer=slot.peer, context=slot.context, code="roster", reason=str(error))
                return [offered, *lost, refused]
            return [offered, *lost, Reply(to=slot.peer, packet=hello)]
        slot.settle()
        refused = Rejected(peer=slot.peer, context=slot.context, code=reject.code, reason=reject.reason)
        return [*self._slots.hear(reject.sender, reject.boot), refused]

    def _on_unlike(self, kind: str, raw: bytes, signature: bytes, error: ProtocolMismatch) -> list[Effect]:
        """A packet of a version unlike ours. All that is known of its layout is whose it is; that is verified, so that
        nobody can have another called outdated. A Hello's sender is told: our Reject begins with our version."""
        roster, entry = self._parties(error.peer)
        verify(entry.sign_key, kind, raw, signature)
        unlike: list[Effect] = [Unlike(peer=entry.name, error=error)]
        if kind != "hello" or entry.name == self.name:
            return unlike
        reject = Reject(
            protocol=self.protocol,
            fleet=self.fleet,
            sender=self.name,
            receiver=entry.name,
            boot=self.boot,
            epoch=roster.epoch,
            context=b"",
            hello=hashlib.sha256(raw).digest(),
            code="protocol",
            reason=str(error)[:200],
            signed_roster=None,
        )
        return [*unlike, Reply(to=entry.name, packet=signed_packet(self._identity, reject)[0])]

    def _on_roster(self, signed: bytes) -> list[Effect]:
        if not self._book.accept(signed):
            return []
        return [RosterOffered(signed=signed), *self._roster_changed()]

    # --- checks: each raises, or changes nothing --------------------------------------------------------------

    def _parties(self, peer: str) -> tuple[Roster, RosterEntry]:
        """The roster and `peer`'s entry; makes sure that our own entry holds our own keys."""
        own = self._book.party(self.name)
        public = self._identity.public
        if (own.sign_key, own.box_key) != (public.sign_key, public.box_key):
            raise RosterError(
                f"roster: it lists other keys for {self.name} than this device has ({public.fingerprint}). "
                "Enrol this device again, or restore its key file"
            )
        return self._book.require(), self._book.party(peer)

    def _addressed_to_us(self, body: Hello | Accept | Reject) -> tuple[Roster, RosterEntry]:
        where = f"{body.kind} from {body.sender}"
        if body.fleet != self.fleet:
            raise HandshakeError(f"{where}: is for fleet {body.fleet}, this is fleet {self.fleet}")
        if body.receiver != self.name:
            raise HandshakeError(f"{where}: is for {body.receiver}, this is {self.name}")
        if body.sender == self.name:
            raise HandshakeError(f"{where}: we never write to ourselves")
        return self._parties(body.sender)

    def _check_boot(self, body: Hello | Accept | Reject) -> None:
        known = self._slots.boots.get(body.sender, -1)
        if body.boot < known:
            raise HandshakeError(
                f"{body.kind} from {body.sender}: of boot {body.boot}, but boot {known} was seen. A replay; or its "
                "state folder was restored from a backup: write a greater number into its boot file"
            )

    def _check_same_roster(self, body: Hello | Accept, roster: Roster) -> None:
        if not hmac.compare_digest(body.roster, roster.digest):
            raise RosterError(
                f"{body.kind} from {body.sender}: another roster of epoch {body.epoch} than ours. "
                f"The operator signed two: sign one of epoch {body.epoch + 1} for all"
            )

    def _check_sequence(self, slot: Slot, hello: Hello, hello_hash: bytes) -> list[Effect] | None:
        """Effects of a repeated Hello, None for a new one. Raises `HandshakeError` for an old one."""
        boot, sequence, heard_hash = slot.heard
        if (hello.boot, hello.sequence) > (boot, sequence):
            return None
        if (hello.boot, hello.sequence) < (boot, sequence):
            raise HandshakeError(f"hello from {hello.sender}: a replay, number {hello.sequence} came after {sequence}")
        if not hmac.compare_digest(hello_hash, heard_hash):
            raise HandshakeError(f"hello from {hello.sender}: two different Hellos with the number {sequence}")
        if slot.half_open is not None and slot.half_open.hello == hello_hash:
            return [Reply(to=hello.sender, packet=slot.half_open.packet)]
        if slot.confirmed == hello_hash:
            return []
        return None  # the half-open session was evicted or dropped: accept anew

    def _answered(self, body: Accept | Reject) -> Slot | None:
        """The slot whose pending Hello `body` answers; None if it is settled. Raises `HandshakeError` for others."""
        slot = self._slots.get(body.sender, body.context)
        if slot is not None and slot.pending is not None and hmac.compare_digest(slot.pending.hash, body.hello):
            return slot
        if slot is not None and hmac.compare_digest(slot.settled, body.hello):
            return None
        raise HandshakeError(f"{body.kind} from {body.sender}: answers no Hello of ours in this context")

    def _derive(
        self, shared: bytes, hello: bytes, accept: bytes, theirs: Hello | Accept, *, initiated: bool
    ) -> Session:
        session = derive_session(
            shared=shared,
            hello=hello,
            accept=accept,
            fleet=self.fleet,
            peer=theirs.sender,
            peer_boot=theirs.boot,
            context=theirs.context,
            initiated=initiated,
            protocol=agreed(self.protocol, theirs.protocol, peer=theirs.sender),
        )
        if session.id in self._slots.by_session:
            raise HandshakeError(f"handshake with {theirs.sender}: the session id {session.id.hex()} is in use")
        return session

    def _reject(self, hello: Hello, hello_hash: bytes, roster: Roster) -> Reply:
        behind = hello.epoch < roster.epoch
        signed = self._book.signed
        reject = Reject(
            protocol=self.protocol,
            fleet=self.fleet,
            sender=self.name,
            receiver=hello.sender,
            boot=self.boot,
            epoch=roster.epoch,
            context=hello.context,
            hello=hello_hash,
            code="stale-epoch" if behind else "roster-wanted",
            reason=f"your roster is of epoch {hello.epoch}, that of {self.name} is of epoch {roster.epoch}",
            signed_roster=signed if behind and signed is not None and len(signed) <= OFFER_BYTES else None,
        )
        packet, _ = signed_packet(self._identity, reject)
        return Reply(to=hello.sender, packet=packet)

    # --- the roster ---------------------------------------------------------------------------------------------------

    def _follow_roster(self) -> None:
        """Sessions and pending Hellos are bound to a roster: when the book has taken another one, they end."""
        if self._book.current is not self._roster:
            self._owed.extend(self._roster_changed())

    def _roster_changed(self) -> list[Lost]:
        old, new = self._roster, self._book.current
        self._roster = new
        epochs = f"epoch {old.epoch if old else 'none'}, now {new.epoch if new else 'none'}"
        lost = self.drop_all(reason=f"the roster changed ({epochs})")
        self._slots.keep_only({entry.name for entry in new.entries} if new else set())
        return lost
