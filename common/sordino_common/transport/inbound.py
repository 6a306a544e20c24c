"""The receiving half of a lane (one peer, one context): chunks into messages, each delivered once, acks when due.

A parcel is known by (the sender's boot, its number). The receiver remembers which numbers from the sender's `floor` on
are finished; a part of one of them is answered by the same verdict again and goes nowhere. Numbers run at most
`_SPREAD` ahead of the floor, so this memory is bounded. Half-received parcels reserve their full size in a budget that
all lanes share; where there is no room the sender is told to hold, and is asked again when there is.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import msgspec

from sordino_common.errors import CodecError, LimitExceeded, LocalError
from sordino_common.transport.chunks import Holding, Reassembler
from sordino_common.transport.frames import (
    MAX_DONE,
    MAX_FRAMES,
    MAX_STATES,
    REASON_CHARS,
    Ack,
    Frame,
    Part,
    Probe,
    Refuse,
    State,
    Whole,
)
from sordino_common.transport.settings import LinkSettings

LEAST_CHUNK_BYTES = 512  # each costs some 60 bytes of bookkeeping, which the budget does not count
_SPREAD = 1024  # four times what a sender of ours uses


class Budget:
    """Bytes that half-received messages may hold: of one peer, which is a part of `whole`, that of all. `freed` is set
    when some came back."""

    __slots__ = ("_left", "freed", "limit", "whole")

    def __init__(self, limit: int, *, whole: Budget | None = None) -> None:
        self.limit = self._left = limit
        self.whole = whole
        self.freed = False

    @property
    def left(self) -> int:
        return self._left if self.whole is None else min(self._left, self.whole.left)

    def reserve(self, nbytes: int) -> bool:
        if nbytes > self.left:
            return False
        self._left -= nbytes
        return self.whole is None or self.whole.reserve(nbytes)

    def release(self, nbytes: int) -> None:
        if self._left + nbytes > self.limit:
            raise LocalError("Budget: more bytes came back than were reserved")
        self._left += nbytes
        self.freed = self.freed or nbytes > 0
        if self.whole is not None:
            self.whole.release(nbytes)


@dataclass(slots=True)
class _Incoming:
    reassembler: Reassembler
    correlation: bytes
    incarnation: int
    reserved: int
    news_s: float


class Arrived(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """A parcel that came in several parts, put together."""

    parcel: int
    correlation: bytes
    data: bytes


class Receiver:
    """Sans-IO. `on_whole`, `on_part` and `on_probe` take what came; `frames` gives what to answer, at `due_s` at the
    latest. A parcel that is there the caller answers with `finish`."""

    def __init__(self, settings: LinkSettings, budget: Budget, *, first_incarnation: int = 0) -> None:
        """Incarnations start at this: above all that the peer may remember of an earlier lane."""
        self._settings = settings
        self._budget = budget
        self._floor = 0
        self._stamp = -1
        self._incarnations = first_incarnation
        self.parcels: dict[int, _Incoming] = {}  # of several parts, of which some are missing
        self._finished: dict[int, Refuse | None] = {}
        self.pending: dict[int, None] = {}  # parcels whose state or verdict the next ack carries, in order
        self.held: dict[int, int] = {}  # parcel -> size, of those told to hold
        self._unacknowledged = 0
        self.due_s = math.inf
        self.duplicates = 0

    @property
    def floor(self) -> int:
        return self._floor

    @property
    def incarnations(self) -> int:
        """More than any incarnation told so far, or as many."""
        return self._incarnations

    @property
    def budget(self) -> Budget:
        return self._budget

    def on_whole(self, whole: Whole, now_s: float) -> bool:
        """Whether the parcel is wanted. Raises as `on_part` does."""
        number = whole.parcel
        if not whole.floor <= number < self._floor + _SPREAD:
            self._check_place(number, whole.floor)
        if number in self.parcels:
            raise CodecError(f"part: parcel {number} has changed its size, digest or correlation on the way")
        if not self._is_news(number, whole.stamp, whole.floor, now_s):
            return False
        if len(whole.data) > self._settings.max_message_bytes:
            self._refuse_size(number, len(whole.data), now_s)
            return False
        return True

    def on_part(self, part: Part, now_s: float) -> Arrived | None:
        """Take a part; the whole parcel if this was its last. Raises `CodecError` if it contradicts what came before,
        or runs ahead of what is remembered; the state is then as before."""
        self._check(part)
        number = part.parcel
        if not self._is_news(number, part.stamp, part.floor, now_s):
            return None
        incoming = self._incoming(part, now_s)
        if incoming is None:
            return None
        if incoming.reassembler.put(part.index, part.data):
            incoming.news_s = now_s
        else:
            self.duplicates += 1
        if not incoming.reassembler.complete:
            self._answer(number, now_s, at_once=False)
            return None
        self._drop(number)
        try:
            data = incoming.reassembler.assemble()
        except CodecError as error:
            self.finish(number, now_s, Refuse(parcel=number, code=error.code, reason=str(error)))
            raise
        return Arrived(parcel=number, correlation=incoming.correlation, data=data)

    def on_probe(self, probe: Probe, now_s: float) -> None:
        self._stamp = max(self._stamp, probe.stamp)
        self._rise(probe.floor)
        for number in probe.parcels:
            if self._floor <= number < self._floor + _SPREAD:  # as for parts: what is to be told is bounded
                self._answer(number, now_s, at_once=True)

    def finish(self, number: int, now_s: float, refusal: Refuse | None = None) -> None:
        """The parcel was delivered, or will never be taken. Parts that still come get the same answer."""
        self._finished[number] = refusal
        self._answer(number, now_s, at_once=refusal is not None)

    def _is_news(self, number: int, stamp: int, floor: int, now_s: float) -> bool:
        """Note what a part says of its sender. False if its parcel is over; then that is told again."""
        if stamp > self._stamp:
            self._stamp = stamp
        if floor > self._floor:
            self._rise(floor)
        if number < self._floor:  # the sender itself has said that it is over
            self.duplicates += 1
            return False
        if number in self._finished:
            self.duplicates += 1
            self._answer(number, now_s, at_once=True)
            return False
        return True

    def _refuse_size(self, number: int, nbytes: int, now_s: float) -> None:
        text = f"message of {nbytes} bytes, at most {self._settings.max_message_bytes} are taken"
        self.finish(number, now_s, Refuse(parcel=number, code=LimitExceeded.code, reason=text[:REASON_CHARS]))

    def invite(self, number: int, now_s: float) -> None:
        """There is room now for a parcel that was told to hold."""
        self.held.pop(number, None)
        self._answer(number, now_s, at_once=True)

    def frames(self) -> list[Frame]:
        """What is to be told, and then counts as told. What does not fit these frames stays due."""
        done: list[int] = []
        held: list[int] = []
        states: list[State] = []
        refusals: list[Frame] = []
        for number in list(self.pending):
            if len(done) == MAX_DONE or len(held) == MAX_DONE or len(states) == MAX_STATES:
                break
            if number in self._finished:
                refusal = self._finished[number]
                if refusal is None:
                    done.append(number)
                elif len(refusals) < MAX_FRAMES - 2:  # an ack, and a part or probe, may ride along
                    refusals.append(refusal)
                else:
                    break
            elif number in self.held:
                held.append(number)
            elif number >= self._floor:
                states.append(self._state(number))
            del self.pending[number]
        self._unacknowledged = 0
        if not self.pending:
            self.due_s = math.inf
        if self._stamp < 0:
            return refusals
        return [Ack(stamp=self._stamp, done=tuple(done), held=tuple(held), states=tuple(states)), *refusals]

    def next_stall_s(self) -> float:
        """When the oldest half-received parcel without news is to be dropped."""
        if not self.parcels:
            return math.inf
        return min(one.news_s for one in self.parcels.values()) + self._settings.stall_s

    def drop_stalled(self, now_s: float) -> None:
        stall_s = self._settings.stall_s  # added as in `next_stall_s`: rounded otherwise, a timer would not be done
        for number in [number for number, one in self.parcels.items() if one.news_s + stall_s <= now_s]:
            self._drop(number)

    def reset(self) -> None:
        """The sender has started anew: its numbers begin again, what it had sent before will never be completed."""
        for number in list(self.parcels):
            self._drop(number)
        self._finished.clear()
        self.pending.clear()
        self.held.clear()
        self._floor, self._stamp, self._unacknowledged = 0, -1, 0
        self.due_s = math.inf

    # ---------------------------------------------------------------------------------------------------------------

    def _check_place(self, number: int, stated_floor: int) -> None:
        floor = self._floor if self._floor > stated_floor else stated_floor
        if number >= floor + _SPREAD:
            raise CodecError(f"part: parcel {number} runs more than {_SPREAD} ahead of the oldest, {floor}")
        if stated_floor > number:
            raise CodecError(f"part: parcel {number} is below the floor {stated_floor} that it states")

    def _check(self, part: Part) -> None:
        self._check_place(part.parcel, part.floor)
        if part.index >= part.shape.count or len(part.data) != part.shape.length(part.index):
            raise CodecError(
                f"part: chunk {part.index} of {part.shape.count} with {len(part.data)} bytes is not of a parcel of "
                f"{part.shape.size} bytes in chunks of {part.shape.chunk_bytes}"
            )
        if part.shape.count > 1 and part.shape.chunk_bytes < LEAST_CHUNK_BYTES:
            raise CodecError(
                f"part: chunks of {part.shape.chunk_bytes} bytes; a message of several has at least {LEAST_CHUNK_BYTES}"
            )
        known = self.parcels.get(part.parcel)
        if known is not None:
            shape = known.reassembler.shape
            told = (shape.size, shape.digest, known.correlation)
            if told != (part.shape.size, part.shape.digest, part.correlation):
                raise CodecError(f"part: parcel {part.parcel} has changed its size, digest or correlation on the way")

    def _rise(self, floor: int) -> None:
        """The sender says that all below is over."""
        if floor <= self._floor:
            return
        self._floor = floor
        if self.parcels:
            for number in [number for number in self.parcels if number < floor]:
                self._drop(number)
        for table in (self._finished, self.held, self.pending):
            for number in list(table):
                if number < floor:
                    del table[number]
        if not self.pending:  # what was due to be told is wanted no more
            self.due_s = math.inf

    def _incoming(self, part: Part, now_s: float) -> _Incoming | None:
        """The half-received parcel of this part, begun if need be; None if the part is not wanted (and answered)."""
        known = self.parcels.get(part.parcel)
        if known is not None:
            if part.shape.chunk_bytes > known.reassembler.shape.chunk_bytes:
                return None  # overtaken by a cut into smaller chunks
            if part.shape.chunk_bytes == known.reassembler.shape.chunk_bytes:
                return known
            self._drop(part.parcel)
        size = part.shape.size
        if size > self._settings.max_message_bytes:
            self._refuse_size(part.parcel, size, now_s)
            return None
        reserved = size if part.shape.count > 1 else 0
        if reserved and (
            len(self.parcels) >= self._settings.reassemblies_per_peer or not self._budget.reserve(reserved)
        ):
            self.held[part.parcel] = size
            self._answer(part.parcel, now_s, at_once=True)
            return None
        self.held.pop(part.parcel, None)
        self._incarnations += 1
        incoming = _Incoming(Reassembler(part.shape), part.correlation, self._incarnations, reserved, now_s)
        self.parcels[part.parcel] = incoming
        return incoming

    def _drop(self, number: int) -> None:
        incoming = self.parcels.pop(number, None)
        if incoming is not None:
            self._incarnations += 1
            self._budget.release(incoming.reserved)

    def _state(self, number: int) -> State:
        incoming = self.parcels.get(number)
        if incoming is None:
            nothing = Holding(upto=0, end=0)
            return State(parcel=number, incarnation=self._incarnations, chunk_bytes=0, holding=nothing)
        return State(
            parcel=number,
            incarnation=incoming.incarnation,
            chunk_bytes=incoming.reassembler.shape.chunk_bytes,
            holding=incoming.reassembler.holding(),
        )

    def _answer(self, number: int, now_s: float, *, at_once: bool) -> None:
        self.pending.setdefault(number)
        self._unacknowledged += 1
        settings = self._settings
        if at_once or self._unacknowledged >= settings.ack_every:
            self.due_s = now_s
        else:
            self.due_s = min(self.due_s, now_s + settings.ack_delay_s)
