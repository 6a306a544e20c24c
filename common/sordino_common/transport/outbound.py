"""The sending half of a lane (one peer, one context): which chunk goes next, what is lost, when to ask again.

A sliding window of packets, no stop-and-wait. Losses are found by comparing transmissions, not by guessing: every part
carries a stamp, an ack echoes the highest stamp that arrived, and a part is lost if it is not acknowledged although
one sent clearly later is: by three stamps, a quarter of a round trip (RFC 9002 section 6.1), or on a newer connection.
When nothing comes back, the timer (see `pacing`) sends the oldest part again if that is small, else a
probe: a few bytes that ask what is there. So a slow link is never filled with copies of a large chunk.

A lane begins one bulky message after the other; small ones pass them by. Messages may arrive in another order than
sent.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable

import msgspec

from sordino_common.errors import CodecError, LimitExceeded, LocalError
from sordino_common.messages import Message
from sordino_common.messages.protocol import PROTOCOL
from sordino_common.transport.chunks import Cutter, Shape
from sordino_common.transport.encoded import Encoded, EncodedPool
from sordino_common.transport.frames import MAX_PROBED, PART_OVERHEAD, Ack, Part, Probe, State, Whole
from sordino_common.transport.pacing import Pace
from sordino_common.transport.settings import KIB, LinkSettings

SPREAD = 256  # most parcel numbers between the oldest unfinished and the next: the receiver remembers all of those
_REORDER_STAMPS = 3  # RFC 9002 section 6.1.1
_CHEAP_BYTES = 4 * KIB  # a part this small is its own probe


class Outgoing(msgspec.Struct, kw_only=True, eq=False):
    """One message on its way. `number`, `encoded` and `cutter` come when its transmission begins."""

    message: Message
    correlation: bytes
    estimate: int
    patience_s: float
    on_outcome: Callable[[bool, str], None] | None
    number: int = -1
    encoded: Encoded | None = None
    cutter: Cutter | None = None
    incarnation: int = 0
    hold_until_s: float = 0.0
    bulk: bool = False
    over: bool = False


class _Sent(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    stamp: int
    parcel: int
    index: int
    nbytes: int
    sent_s: float
    generation: int


_ASK = Outgoing(
    message=Message(), correlation=b"", estimate=0, patience_s=0.0, on_outcome=None
)  # not a message: a probe
_NOTHING = _Sent(stamp=-1, parcel=-1, index=0, nbytes=0, sent_s=-math.inf, generation=-1)


class Sender:
    """Sans-IO. `next` gives the next frame to send; `on_ack` and `on_refuse` return the messages that are over."""

    def __init__(
        self, settings: LinkSettings, pool: EncodedPool, *, first_number: int = 0, first_stamp: int = 0
    ) -> None:
        """Numbers and stamps start at these: above all that the peer may remember of an earlier lane."""
        self._settings = settings
        self._pool = pool
        self._queues: dict[bool, deque[Outgoing]] = {False: deque(), True: deque()}  # bulk? -> not begun
        self._active: dict[int, Outgoing] = {}
        self._flight: dict[int, _Sent] = {}  # by stamp, ascending
        self._probe = _NOTHING
        self._echo = _NOTHING
        self._next_number = first_number
        self._next_stamp = first_stamp
        self._generation = 0
        self._pace = Pace(settings)
        self._timer_base_s = 0.0
        self._ask = False
        self._bulk_turn = False
        self.minor = PROTOCOL.minor  # of the protocol, in the session with the peer
        self.retransmissions = 0
        self.starved = False  # had to wait for the pool; to be tried again when something is released
        self.failed: list[tuple[Outgoing, str]] = []  # messages that could not be encoded

    # --- state -----------------------------------------------------------------------------------------------------

    @property
    def idle(self) -> bool:
        return not self._active and not any(self._queues.values())

    @property
    def has_more(self) -> bool:
        """Whether anything waits that was not sent, or was lost: `choose` says what."""
        if self._queues[False] or self._queues[True] or self._ask:
            return True
        for parcel in self._active.values():  # noqa: SIM110  a generator would take twice the time
            if parcel.cutter is None or parcel.cutter.unsent:
                return True
        return False

    @property
    def floor(self) -> int:
        return next(iter(self._active), self._next_number)

    @property
    def next_number(self) -> int:
        """The number of the next message to begin: more than any before."""
        return self._next_number

    @property
    def next_stamp(self) -> int:
        return self._next_stamp

    @property
    def timeouts(self) -> int:
        """How many there were in a row."""
        return self._pace.timeouts

    def due_s(self, now_s: float) -> float:
        """When `on_time` has something to do."""
        due_s = self._timer_base_s + self._pace.timeout_s if self._flight else math.inf
        for parcel in self._active.values():
            if due_s > parcel.hold_until_s > now_s:
                due_s = parcel.hold_until_s
        return due_s

    def choose(self, now_s: float) -> Outgoing | None:
        """What `next` would send, as far as can be said without encoding anything; for `next`, if nothing comes in
        between."""
        if self._ask and self._flight:
            return _ASK
        return self._candidate(now_s) if len(self._flight) < self._pace.window else None

    def waiting(self) -> list[Outgoing]:
        """All messages that are not over, oldest first."""
        return [*self._active.values(), *self._queues[False], *self._queues[True]]

    # --- sending ---------------------------------------------------------------------------------------------------

    def enqueue(self, parcel: Outgoing) -> None:
        parcel.bulk = parcel.estimate > self._settings.small_bytes
        self._queues[parcel.bulk].append(parcel)

    def next(self, now_s: float, choice: Outgoing, *, room: int, chunk_bytes: int) -> Whole | Part | Probe | None:
        """The next frame, of what `choose` has just said, if it is one of at most `room` bytes; new messages are cut
        every `chunk_bytes`."""
        if choice is _ASK:
            self._ask = False
            self._probe = msgspec.structs.replace(
                _NOTHING, stamp=self._next_stamp, sent_s=now_s, generation=self._generation
            )
            self._next_stamp += 1
            flying = dict.fromkeys(sent.parcel for sent in self._flight.values())
            return Probe(stamp=self._probe.stamp, floor=self.floor, parcels=tuple(flying)[:MAX_PROBED])
        parcel: Outgoing | None = choice
        while parcel is not None:
            if parcel.encoded is not None or self._begin(parcel, chunk_bytes):
                return self._part(parcel, now_s, room)
            parcel = self._candidate(now_s)
        return None

    def _candidate(self, now_s: float) -> Outgoing | None:
        """The message whose chunk goes next. Bulk and small take turns; a bulky one begins when all of the one before
        is under way, so that what is sent in single chunks waits for no acks."""
        turn, queues = self._bulk_turn, self._queues
        if not (self._active or queues[turn] or queues[not turn]):
            return None
        first: dict[bool, Outgoing] = {}
        bulk_begun = False
        for parcel in self._active.values():
            bulk = parcel.bulk
            if bulk in first or parcel.cutter is None or not parcel.cutter.unsent:
                continue
            bulk_begun |= bulk
            if parcel.hold_until_s <= now_s:
                first[bulk] = parcel
        full = len(self._active) > 0 and self._next_number - self.floor >= SPREAD
        for bulk in (turn, not turn):
            candidate = first.get(bulk)
            if candidate is None and queues[bulk] and not full and not (bulk and bulk_begun):
                candidate = queues[bulk][0]
            if candidate is None:
                continue
            if candidate.encoded is not None or self._pool.admits(candidate.message, self.minor):
                return candidate
            self.starved = True
        return None

    def _begin(self, parcel: Outgoing, chunk_bytes: int) -> bool:
        """Encode; give a number if it has none. False if the message can't be sent at all: it is in `failed`."""
        fresh = parcel.cutter is None
        try:
            encoded = self._pool.acquire(parcel.message, self.minor)
        except (LocalError, LimitExceeded) as error:
            self.finish(parcel)
            self.failed.append((parcel, str(error)))
            return False
        parcel.encoded = encoded
        if fresh:
            self._queues[parcel.bulk].popleft()
            parcel.number = self._next_number
            self._next_number += 1
            self._active[parcel.number] = parcel
            parcel.cutter = Cutter(_shape(encoded, chunk_bytes))
        return True

    def _part(self, parcel: Outgoing, now_s: float, room: int) -> Whole | Part | None:
        cutter, encoded = parcel.cutter, parcel.encoded
        index = cutter.next_index if cutter is not None else None
        if cutter is None or encoded is None or index is None:
            raise LocalError(f"Sender: message {parcel.number} has no chunk to send")
        shape, data = cutter.shape, cutter.chunk(encoded.data, index)
        if len(data) + PART_OVERHEAD > room:
            return None
        self._bulk_turn = not parcel.bulk
        cutter.sent(index)
        if not self._flight:
            self._timer_base_s = now_s
        stamp, number, floor = self._next_stamp, parcel.number, self.floor
        self._next_stamp = stamp + 1
        self._flight[stamp] = _Sent(
            stamp=stamp, parcel=number, index=index, nbytes=len(data), sent_s=now_s, generation=self._generation
        )
        if not shape.digest:
            return Whole(stamp=stamp, floor=floor, parcel=number, correlation=parcel.correlation, data=data)
        return Part(
            stamp=stamp,
            floor=floor,
            parcel=number,
            index=index,
            shape=shape,
            correlation=parcel.correlation,
            data=data,
        )

    # --- what comes back -------------------------------------------------------------------------------------------

    def on_ack(self, ack: Ack, now_s: float) -> list[Outgoing]:
        """The messages that this ack says are delivered. Raises `CodecError`, and changes nothing, if it speaks of
        chunks that never were."""
        if ack.stamp >= self._next_stamp:
            raise CodecError(f"ack: stamp {ack.stamp} was never sent (the next is {self._next_stamp})")
        known: list[tuple[Outgoing, Cutter, State]] = []
        for state in ack.states:
            parcel = self._active.get(state.parcel)
            if parcel is not None and parcel.cutter is not None:
                shape = parcel.cutter.shape
                if state.chunk_bytes == shape.chunk_bytes and state.holding.end > shape.count:
                    raise CodecError(f"ack: chunk {state.holding.end - 1} of {shape.count} of parcel {state.parcel}")
                known.append((parcel, parcel.cutter, state))
        self._take_echo(ack.stamp, now_s)
        over: list[Outgoing] = []
        for number in ack.done:
            parcel = self._active.get(number)
            if parcel is not None:
                self.finish(parcel)
                over.append(parcel)
        news = len(over)
        for parcel, cutter, state in known:
            news += self._take_state(parcel, cutter, state)
        for number in ack.held:
            self._hold(number, now_s)
        if known:
            self._flight = {stamp: sent for stamp, sent in self._flight.items() if not self._arrived(sent)}
        if news:
            self._pace.acknowledged(news)
            self._timer_base_s = now_s
        if self._flight:
            self._find_lost()
        return over

    def on_refuse(self, number: int) -> Outgoing | None:
        """The message that the peer will never take, if it is under way."""
        parcel = self._active.get(number)
        if parcel is not None:
            self.finish(parcel)
        return parcel

    def finish(self, parcel: Outgoing) -> None:
        """Forget a message: delivered, refused, expired or given up."""
        if parcel.over:
            return
        parcel.over = True
        if parcel.number < 0:
            self._queues[parcel.bulk].remove(parcel)
            return
        self._active.pop(parcel.number, None)
        for sent in list(self._flight.values()):
            if sent.parcel == parcel.number:
                del self._flight[sent.stamp]
        if parcel.encoded is not None:
            self._release(parcel)

    def _take_echo(self, stamp: int, now_s: float) -> None:
        sent = self._probe if stamp == self._probe.stamp else self._flight.get(stamp)
        if sent is None or stamp <= self._echo.stamp:
            return
        self._echo = sent
        self._timer_base_s = now_s
        self._pace.answered(now_s - sent.sent_s)

    def _take_state(self, parcel: Outgoing, cutter: Cutter, state: State) -> int:
        if state.incarnation < parcel.incarnation:
            return 0  # overtaken by a newer one
        if state.incarnation > parcel.incarnation:
            parcel.incarnation = state.incarnation
            cutter.forget()
        parcel.hold_until_s = 0.0
        return cutter.acknowledge(state.holding) if state.chunk_bytes == cutter.shape.chunk_bytes else 0

    def _hold(self, number: int, now_s: float) -> None:
        parcel = self._active.get(number)
        if parcel is None or parcel.cutter is None:
            return
        parcel.hold_until_s = now_s + self._settings.hold_s
        for stamp in [stamp for stamp, sent in self._flight.items() if sent.parcel == number]:
            parcel.cutter.lost(self._flight.pop(stamp).index)

    def _arrived(self, sent: _Sent) -> bool:
        parcel = self._active.get(sent.parcel)
        return parcel is None or parcel.cutter is None or parcel.cutter.is_acknowledged(sent.index)

    def _find_lost(self) -> None:
        echo = self._echo
        reorder_s = self._pace.reorder_s
        for sent in list(self._flight.values()):
            if sent.stamp > echo.stamp:
                break
            reconnected = sent.generation < echo.generation
            overtaken = echo.stamp - sent.stamp >= _REORDER_STAMPS or echo.sent_s - sent.sent_s > reorder_s
            if reconnected or overtaken:
                self._lose(sent)
            if overtaken and not reconnected:
                self._pace.lost(sent.stamp, self._next_stamp)

    def _lose(self, sent: _Sent) -> None:
        del self._flight[sent.stamp]
        parcel = self._active.get(sent.parcel)
        if parcel is not None and parcel.cutter is not None and parcel.cutter.lost(sent.index):
            self.retransmissions += 1

    # --- time, connections, sessions -------------------------------------------------------------------------------

    def on_time(self, now_s: float) -> None:
        """The retransmission timer, if it is due."""
        if not self._flight or now_s < self._timer_base_s + self._pace.timeout_s:
            return
        self._stir(now_s)
        self._pace.timed_out()
        if self._pace.timeouts >= self._settings.park_after:
            self.park()

    def reconnected(self, now_s: float) -> None:
        """Ours or the peer's connection is new: what was in flight may be gone. Ask at once."""
        self._generation += 1
        self._pace.revived()
        if self._flight:
            self._stir(now_s)

    def restart(self) -> None:
        """The peer has started anew and knows nothing: every message under way begins again."""
        self._flight.clear()
        self._echo = self._probe = _NOTHING
        self._ask = False
        self._pace.revived()
        for parcel in self._active.values():
            if parcel.cutter is not None:
                parcel.cutter = Cutter(parcel.cutter.shape)
            parcel.incarnation, parcel.hold_until_s = 0, 0.0

    def speak(self, minor: int) -> None:
        """The peer is of another version than before (so it has restarted): messages under way are other bytes from now
        on, and those that can't be said to it have `failed`."""
        if minor == self.minor:
            return
        self.minor = minor
        for parcel in list(self._active.values()):
            self._release(parcel)
            try:
                encoded = self._pool.acquire(parcel.message, minor)
            except (LocalError, LimitExceeded) as error:
                self.finish(parcel)
                self.failed.append((parcel, str(error)))
                continue
            if parcel.cutter is not None:
                parcel.cutter = Cutter(_shape(encoded, parcel.cutter.shape.chunk_bytes))
            self._pool.release(encoded)

    def recut(self, chunk_bytes: int) -> None:
        """Packets have become smaller: what is under way in larger chunks begins again in small ones."""
        for parcel in self._active.values():
            if parcel.cutter is not None and parcel.cutter.shape.chunk_bytes > chunk_bytes:
                encoded = self._pool.acquire(
                    parcel.message, self.minor
                )  # its parts need a digest now, if they had none
                parcel.cutter = Cutter(_shape(encoded, chunk_bytes))
                self._pool.release(encoded)
                for stamp in [stamp for stamp, sent in self._flight.items() if sent.parcel == parcel.number]:
                    del self._flight[stamp]

    def park(self) -> None:
        """The peer is quiet: let go of encoded bytes. They are made again when they are needed."""
        for parcel in self._active.values():
            self._release(parcel)

    def _stir(self, now_s: float) -> None:
        self._timer_base_s = now_s
        oldest = next(iter(self._flight.values()))
        if oldest.nbytes <= _CHEAP_BYTES:
            self._lose(oldest)
        else:
            self._ask = True

    def _release(self, parcel: Outgoing) -> None:
        if parcel.encoded is not None:
            self._pool.release(parcel.encoded)
            parcel.encoded = None


def _shape(encoded: Encoded, chunk_bytes: int) -> Shape:
    size = len(encoded.data)
    return Shape(size=size, chunk_bytes=chunk_bytes, digest=encoded.digest if size > chunk_bytes else b"")
