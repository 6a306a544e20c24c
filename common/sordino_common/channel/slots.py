"""What a party remembers of each (peer, context), and how much of it: the state behind `SessionTable`.

Nothing here checks a signature or draws a key; nothing here raises but `create`, before it changes anything.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Final

from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from sordino_common.channel.effects import Lost
from sordino_common.channel.session import Session
from sordino_common.errors import HandshakeError, LocalError

CONTEXTS_PER_PEER: Final = 32  # commands, and a session per committee that both belong to
MAX_HALF_OPEN: Final = 4096  # about 3 kB each
HALF_OPEN_S: Final = 600.0  # longer than any wait for an Accept and the first sealed packet
OLDER_SESSIONS: Final = 2  # replaced sessions that still open packets which were on their way


@dataclass(slots=True, kw_only=True)
class Pending:
    """A Hello of ours that was not answered yet."""

    ephemeral: X25519PrivateKey
    packet: bytes
    body: bytes
    hash: bytes


@dataclass(slots=True, kw_only=True)
class HalfOpen:
    """A session that we accepted and whose initiator has not yet shown that it has the key."""

    session: Session
    hello: bytes  # hash of the Hello that it answers
    packet: bytes  # the Accept
    since_s: float
    number: int


@dataclass(slots=True)
class Slot:
    """Everything about one (peer, context). Numbers order events, for handshakes that cross (`Slots.confirm`)."""

    peer: str
    context: bytes
    ends_s: float = -math.inf  # the peer's entry in the roster that the sessions are bound to holds for so long
    pending: Pending | None = None
    settled: bytes = b""  # hash of our last Hello that is not pending any more
    heard: tuple[int, int, bytes] = (-1, -1, b"")  # boot, sequence, hash of the newest Hello that we accepted
    confirmed: bytes = b""  # hash of the Hello whose session the peer has confirmed
    half_open: HalfOpen | None = None
    current: Session | None = None
    current_number: int = 0
    older: list[Session] = field(default_factory=list)

    def sessions(self) -> Iterator[Session]:
        if self.half_open is not None:
            yield self.half_open.session
        if self.current is not None:
            yield self.current
        yield from self.older

    def settle(self) -> None:
        """Our pending Hello needs no answer any more."""
        if self.pending is not None:
            self.settled, self.pending = self.pending.hash, None


class Slots:
    """All slots of one party. Bounded: `CONTEXTS_PER_PEER` slots a peer, `max_half_open` half-open sessions in all."""

    __slots__ = ("_max_half_open", "_number", "boots", "by_peer", "by_session", "half_open")

    def __init__(self, *, max_half_open: int) -> None:
        self.by_peer: dict[str, dict[bytes, Slot]] = {}  # peer -> context -> slot
        self.by_session: dict[bytes, tuple[Slot, Session]] = {}
        self.half_open: dict[tuple[str, bytes], None] = {}  # in order of age
        self.boots: dict[str, int] = {}  # greatest boot that each peer has signed
        self._max_half_open = max_half_open
        self._number = 0

    def get(self, peer: str, context: bytes) -> Slot | None:
        return self.by_peer.get(peer, {}).get(context)

    def of(self, peer: str, context: bytes | None = None) -> list[Slot]:
        """The slot of one context of `peer`, or of all."""
        return [slot for slot in self.by_peer.get(peer, {}).values() if context in (None, slot.context)]

    def all(self) -> list[Slot]:
        return [slot for slots in self.by_peer.values() for slot in slots.values()]

    def create(self, peer: str, context: bytes, error: type[HandshakeError | LocalError]) -> Slot:
        """An empty slot; an idle one of the same peer makes room for it. Raises `error` if all are in use.

        One is kept for commands (the empty context): a peer that opens all others can't cut itself, or us, off."""
        taken = self.by_peer.setdefault(peer, {})
        if len(taken) >= CONTEXTS_PER_PEER - (context != b"" and b"" not in taken):
            free = (slot for slot in taken.values() if slot.current is None and slot.pending is None and slot.context)
            idle = next(free, None)
            if idle is None:
                raise error(f"{peer}: {len(taken)} contexts are in use, no more are taken. Drop those that are done")
            self._clear(idle, "")
            del taken[idle.context]
        slot = taken[context] = Slot(peer, context)
        return slot

    def hear(self, peer: str, boot: int) -> list[Lost]:
        """`peer` has signed that it is in `boot`; its sessions of earlier boots are dead."""
        if boot == self.boots.get(peer):
            return []
        self.boots[peer] = boot
        lost = []
        for slot in self.of(peer):
            current = slot.current
            for session in [session for session in slot.sessions() if session.peer_boot < boot]:
                self._forget(slot, session)
            if current is not None and slot.current is None:
                reason = f"{peer} restarted (boot {current.peer_boot}, now {boot})"
                lost.append(Lost(peer=peer, context=slot.context, reason=reason))
        return lost

    def put_half_open(self, slot: Slot, session: Session, *, hello: bytes, packet: bytes, now_s: float) -> None:
        """`session` waits to be confirmed, in place of the slot's earlier one; the oldest of all make room for it."""
        self._drop_half_open(slot)
        while self.half_open:
            oldest_peer, oldest_context = next(iter(self.half_open))
            oldest = self.by_peer[oldest_peer][oldest_context]
            assert oldest.half_open is not None
            if now_s - oldest.half_open.since_s < HALF_OPEN_S and len(self.half_open) < self._max_half_open:
                break
            self._drop_half_open(oldest)
        slot.half_open = HalfOpen(
            session=session, hello=hello, packet=packet, since_s=now_s, number=self._next_number()
        )
        self.half_open[slot.peer, slot.context] = None
        self.by_session[session.id] = (slot, session)

    def confirm(self, slot: Slot) -> bool:
        """The half-open session's peer has the key. True if the session is now the one to seal with."""
        half_open = slot.half_open
        assert half_open is not None
        slot.half_open = None
        del self.half_open[slot.peer, slot.context]
        slot.confirmed = half_open.hello
        current = slot.current
        if current is not None and current.initiated and slot.current_number > half_open.number:
            # Handshakes crossed: our own Hello was accepted after we had accepted this one. Keep ours for sealing, as
            # the peer has moved to it, or will; this one goes on opening what the peer seals until then.
            self._keep_older(slot, half_open.session)
            return False
        slot.settle()
        self.make_current(slot, half_open.session)
        return True

    def make_current(self, slot: Slot, session: Session) -> None:
        """Seal with `session` from now on; the one before still opens."""
        if slot.current is not None:
            self._keep_older(slot, slot.current)
        slot.current, slot.current_number = session, self._next_number()
        self.by_session[session.id] = (slot, session)

    def clear(self, slots: Iterable[Slot], reason: str) -> list[Lost]:
        """Forget the sessions and the pending Hello of each; what was heard stays, so that replays are still known."""
        return [lost for slot in slots for lost in self._clear(slot, reason)]

    def keep_only(self, members: set[str]) -> None:
        """Forget everything about everybody else. Their slots must have been cleared."""
        self.by_peer = {peer: slots for peer, slots in self.by_peer.items() if peer in members}
        self.boots = {name: boot for name, boot in self.boots.items() if name in members}

    def _next_number(self) -> int:
        self._number += 1
        return self._number

    def _keep_older(self, slot: Slot, session: Session) -> None:
        slot.older.insert(0, session)
        for gone in slot.older[OLDER_SESSIONS:]:
            self._forget(slot, gone)

    def _drop_half_open(self, slot: Slot) -> None:
        if slot.half_open is not None:
            self._forget(slot, slot.half_open.session)

    def _clear(self, slot: Slot, reason: str) -> list[Lost]:
        lost = slot.current is not None
        slot.settle()
        for session in list(slot.sessions()):
            self._forget(slot, session)
        return [Lost(peer=slot.peer, context=slot.context, reason=reason)] if lost else []

    def _forget(self, slot: Slot, session: Session) -> None:
        self.by_session.pop(session.id, None)
        if slot.half_open is not None and slot.half_open.session is session:
            slot.half_open = None
            self.half_open.pop((slot.peer, slot.context), None)
        if slot.current is session:
            slot.current = None
        slot.older = [other for other in slot.older if other is not session]
