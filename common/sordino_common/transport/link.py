"""`Link`: reliable messages to many peers over sealed packets that may be lost, doubled or overtaken. Sans-IO.

A lane is one peer in one context; it has a `Sender` and a `Receiver` (see `outbound`, `inbound`). The link owns what
lanes share: the turn (round robin, so that one slow peer stalls nobody), the memory budgets, the deadlines, the
expiry of messages. It knows no keys and no topics: the `Endpoint` says which lanes are up (have a session), takes
plaintexts from `poll` for as long as its transport takes packets, and hands opened ones to `receive`.

Delivery: a message is delivered at most once per boot of its sender and its receiver, in any order; `Delivered` events
carry it. Its sender learns one `Outcome`: delivered, or why not, at the latest when the message expires.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from sordino_common.errors import CodecError, LimitExceeded, LocalError, SessionError
from sordino_common.messages import Limits, Message, decode_message
from sordino_common.messages.protocol import PROTOCOL
from sordino_common.transport.chunks import MAX_CHUNKS
from sordino_common.transport.deadlines import Deadlines
from sordino_common.transport.encoded import EncodedPool, estimate_bytes
from sordino_common.transport.events import Delivered, Event, Outcome, Stuck, Unreadable, Wanted
from sordino_common.transport.frames import (
    CORRELATION_BYTES,
    PART_OVERHEAD,
    REASON_CHARS,
    Ack,
    Frame,
    Part,
    Probe,
    Refuse,
    Whole,
    decode_frames,
    encode_frames,
)
from sordino_common.transport.inbound import LEAST_CHUNK_BYTES, Arrived, Budget, Receiver
from sordino_common.transport.outbound import Outgoing, Sender
from sordino_common.transport.settings import LinkCounters, LinkSettings


@dataclass(slots=True, eq=False)
class _Lane:
    peer: str
    context: bytes
    sender: Sender
    receiver: Receiver
    up: bool = False
    peer_boot: int = -1
    obstacle: str = ""
    in_ring: bool = False


_Waiting = tuple[_Lane, Outgoing]


@dataclass(slots=True)
class _Peer:
    """What the lanes of one peer share."""

    budget: Budget
    messages: int = 0
    nbytes: int = 0
    contexts: dict[bytes, _Lane] = field(default_factory=dict)


class Link:
    """See the module's text. All times are of one monotonic clock, passed in."""

    def __init__(self, *, settings: LinkSettings, counters: LinkCounters) -> None:
        self._settings = settings
        self._counters = counters
        self._limits = Limits(payload_bytes=settings.max_message_bytes)
        self._pool = EncodedPool(limit_bytes=settings.encoded_bytes, max_message_bytes=settings.max_message_bytes)
        self._budget = Budget(settings.reassembly_bytes)
        self._peers: dict[str, _Peer] = {}
        self._ring: deque[_Lane] = deque()
        self._starved: dict[_Lane, None] = {}
        self._holding: dict[_Lane, None] = {}
        self._wanting: dict[tuple[str, bytes], None] = {}
        self._wakes: Deadlines[_Lane] = Deadlines()
        self._expiries: Deadlines[_Waiting] = Deadlines()
        # Above all numbers, stamps and incarnations of lanes that are gone: a peer may remember those.
        self._first_number = self._first_stamp = self._first_incarnation = 0
        self.events: deque[Event] = deque()  # what came of all this, for the caller to take
        self._connected = False
        self._room = 0
        self._chunk_bytes = settings.chunk_bytes

    # --- for the caller ---------------------------------------------------------------------------------------------

    @property
    def chunk_bytes(self) -> int:
        """The size that messages are cut to now."""
        return self._chunk_bytes

    @property
    def encoded_bytes(self) -> int:
        """Bytes of encoded messages held now."""
        return self._pool.bytes

    @property
    def reassembly_bytes(self) -> int:
        """Bytes reserved by half-received messages now."""
        return self._budget.limit - self._budget.left

    @property
    def idle(self) -> bool:
        """Nothing is waiting to be sent, acknowledged or to acknowledge."""
        lanes = [lane for queue in self._peers.values() for lane in queue.contexts.values()]
        return all(lane.sender.idle and not (lane.up and lane.receiver.pending) for lane in lanes)

    def unacknowledged(self) -> dict[str, int]:
        """How many messages each peer has not acknowledged, for those that have any."""
        return {peer: queue.messages for peer, queue in self._peers.items() if queue.messages}

    def wants(self, peer: str, context: bytes) -> bool:
        """Whether the lane has messages to send and no session."""
        return (peer, context) in self._wanting

    def is_up(self, peer: str, context: bytes) -> bool:
        queue = self._peers.get(peer)
        lane = queue.contexts.get(context) if queue else None
        return lane is not None and lane.up

    def peers(self) -> list[str]:
        """All with whom there ever was a lane, and who were not removed."""
        return [peer for peer, queue in self._peers.items() if queue.contexts]

    def contexts(self, peer: str) -> list[bytes]:
        """The contexts of the lanes with `peer`."""
        queue = self._peers.get(peer)
        return list(queue.contexts) if queue else []

    def take_events(self) -> list[Event]:
        """All of `events`, which are then gone."""
        taken = list(self.events)
        self.events.clear()
        return taken

    def send(
        self,
        to: str,
        message: Message,
        *,
        correlation: bytes,
        context: bytes,
        expires_s: float | None,
        on_outcome: Callable[[bool, str], None] | None,
        now_s: float,
    ) -> None:
        """Queue a message. Raises `LimitExceeded` if it is too long or the queue for `to` is full."""
        settings = self._settings
        if len(correlation) != CORRELATION_BYTES:
            raise LocalError(f"Link: a correlation has {CORRELATION_BYTES} bytes, got {len(correlation)}")
        patience_s = settings.expires_s if expires_s is None else expires_s
        if not 0 < patience_s < math.inf:
            raise LocalError(f"Link: a message expires after {patience_s} s; expected more than 0, and an end")
        estimate = estimate_bytes(message)
        if estimate > 2 * settings.max_message_bytes:  # the exact size is checked when it is encoded
            raise LimitExceeded(
                f"message {message.kind} to {to}: about {estimate} bytes, at most {settings.max_message_bytes} are sent"
            )
        queue = self._peers.get(to)
        if queue is not None and queue.messages >= settings.queue_messages:
            raise LimitExceeded(f"{to}: {queue.messages} messages are waiting to be sent, which is the limit")
        if queue is not None and queue.messages and queue.nbytes + estimate > settings.queue_bytes:
            raise LimitExceeded(
                f"{to}: {queue.nbytes} bytes are waiting to be sent; {estimate} more would pass the limit of "
                f"{settings.queue_bytes}"
            )
        lane = queue.contexts.get(context) if queue is not None else None
        if lane is None:
            lane = self._lane(to, context)
            queue = self._peers[to]
        parcel = Outgoing(
            message=message,
            correlation=correlation,
            estimate=estimate,
            patience_s=patience_s,
            on_outcome=on_outcome,
        )
        assert queue is not None
        queue.messages += 1
        queue.nbytes += estimate
        lane.sender.enqueue(parcel)
        self._expiries.set((lane, parcel), now_s + patience_s)
        if not lane.up:
            self._want(lane)
        elif self._connected:
            self._enter(lane)

    # --- for the endpoint --------------------------------------------------------------------------------------------

    def connected(self, plaintext_bytes: int, now_s: float) -> None:
        """The transport has a (new) connection, whose packets have room for `plaintext_bytes`. Raises `LimitExceeded`
        if that is too little for the messages that the settings allow."""
        chunk_bytes = min(self._settings.chunk_bytes, plaintext_bytes - PART_OVERHEAD)
        least = max(LEAST_CHUNK_BYTES, -(-self._settings.max_message_bytes // MAX_CHUNKS))
        if chunk_bytes < least:
            raise LimitExceeded(
                f"the broker's packets have room for chunks of {chunk_bytes} bytes; messages of up to "
                f"{self._settings.max_message_bytes} bytes need {least}: raise the broker's max_packet_size"
            )
        shrunk = chunk_bytes < self._chunk_bytes
        self._room, self._chunk_bytes, self._connected = plaintext_bytes, chunk_bytes, True
        for lane in self._lanes():
            if shrunk:
                lane.sender.recut(chunk_bytes)
            lane.sender.reconnected(now_s)
            self._touch(lane, now_s)

    def disconnected(self) -> None:
        self._connected = False

    def lane_up(self, peer: str, context: bytes, *, peer_boot: int, now_s: float, minor: int = PROTOCOL.minor) -> None:
        """There is a session with `peer`, which has booted for the `peer_boot`th time and speaks that minor version; or
        the peer's connection is a new one, so that what was in flight to it may be gone."""
        try:
            lane = self._lane(peer, context)
        except LimitExceeded as error:
            raise SessionError(str(error)) from None
        lane.sender.speak(minor)
        if lane.peer_boot not in (-1, peer_boot):
            lane.sender.restart()
            lane.receiver.reset()
        else:
            lane.sender.reconnected(now_s)
        lane.up, lane.peer_boot, lane.obstacle = True, peer_boot, ""
        self._settle_failed(lane)
        self._wanting.pop((peer, context), None)
        self._touch(lane, now_s)

    def lane_down(self, peer: str, context: bytes) -> None:
        """The session is gone. Messages wait for the next one."""
        queue = self._peers.get(peer)
        lane = queue.contexts.get(context) if queue else None
        if lane is None:
            return
        lane.up = False
        lane.sender.park()
        self._feed_starved()
        if not lane.sender.idle:
            self._want(lane)

    def obstacle(self, peer: str, context: bytes, reason: str) -> None:
        """Why there is no session yet, for the text of the outcome."""
        queue = self._peers.get(peer)
        lane = queue.contexts.get(context) if queue else None
        if lane is not None:
            lane.obstacle = reason

    def remove(self, peer: str, reason: str, *, context: bytes | None = None) -> None:
        """The peer is not of the fleet any more, or this context is over: messages to it end for that `reason`, what
        it half sent is dropped."""
        queue = self._peers.get(peer)
        if queue is None:
            return
        for lane in [lane for lane in queue.contexts.values() if context in (None, lane.context)]:
            for parcel in lane.sender.waiting():
                self._end(lane, parcel, delivered=False, reason=reason)
            self._retire(lane)
            del queue.contexts[lane.context]

    def poll(self, now_s: float) -> tuple[str, bytes, bytes] | None:
        """The next packet to seal and send: (peer, context, plaintext). Lanes take turns."""
        while self._ring and self._connected:
            lane = self._ring.popleft()
            lane.in_ring = False
            plaintext = self._packet(lane, now_s) if lane.up else None
            if lane.sender.starved:
                self._starved[lane] = None
            if plaintext is not None:
                if lane.sender.has_more or lane.receiver.pending:
                    self._enter(lane)
                self._schedule(lane, now_s)
                return lane.peer, lane.context, plaintext
        return None

    def receive(self, peer: str, context: bytes, plaintext: bytes, now_s: float) -> None:
        """Take an opened packet; what comes of it is in `take_events`. Raises `RemoteError`,
        with the frames before the faulty one taken, if it is malformed, contradicts what came before, or if the lane is
        not up."""
        queue = self._peers.get(peer)
        lane = queue.contexts.get(context) if queue else None
        if lane is None or not lane.up:
            raise SessionError(f"a packet of {peer}, whose session is over")
        frames = decode_frames(plaintext)
        try:
            for frame in frames:
                self._take(lane, frame, now_s)
        finally:
            if lane.receiver.held:
                self._holding[lane] = None
            if self._budget.freed:
                self._invite(now_s)
            self._touch(lane, now_s)

    def next_deadline_s(self) -> float:
        """When `on_time` has something to do; infinity if never."""
        return min(self._wakes.next_s(), self._expiries.next_s())

    def on_time(self, now_s: float) -> None:
        """Expire messages, retransmit, send delayed acks, drop stalled reassemblies: whatever is due."""
        for lane, parcel in self._expiries.pop(now_s):
            why = f" ({lane.obstacle})" if lane.obstacle else ""
            text = f"{parcel.message.kind}: not acknowledged by {lane.peer} within {parcel.patience_s:g} s{why}"
            self._end(lane, parcel, delivered=False, reason=text)
            self._touch(lane, now_s)
        for lane in self._wakes.pop(now_s):
            lane.receiver.drop_stalled(now_s)
            if lane.up and self._connected:
                self._timer(lane, now_s)
            self._touch(lane, now_s)
        if self._budget.freed:
            self._invite(now_s)

    # -----------------------------------------------------------------------------------------------------------------

    def _lanes(self) -> list[_Lane]:
        return [lane for queue in self._peers.values() for lane in queue.contexts.values()]

    def _lane(self, peer: str, context: bytes) -> _Lane:
        queue = self._peers.get(peer)
        if queue is None:  # one peer alone can't take all the room that there is for half-received messages
            share = Budget(self._settings.max_message_bytes, whole=self._budget)
            queue = self._peers[peer] = _Peer(share)
        lane = queue.contexts.get(context)
        if lane is None:
            # One is kept for commands (the empty context), whatever else the peer opens.
            if len(queue.contexts) >= self._settings.contexts_per_peer - (context != b"" and b"" not in queue.contexts):
                free = (known for known in queue.contexts.values() if not known.up and known.sender.idle)
                idle = next((known for known in free if known.context), None)
                if idle is None:
                    raise LimitExceeded(f"{peer}: {len(queue.contexts)} contexts are open, which is the limit")
                self._retire(idle)
                del queue.contexts[idle.context]
            sender = Sender(self._settings, self._pool, first_number=self._first_number, first_stamp=self._first_stamp)
            receiver = Receiver(self._settings, queue.budget, first_incarnation=self._first_incarnation)
            lane = queue.contexts[context] = _Lane(peer, context, sender, receiver)
        return lane

    def _retire(self, lane: _Lane) -> None:
        """The lane goes. If there will be another in its place, the peer must not take its messages for old ones."""
        lane.up = False
        lane.receiver.reset()
        self._first_number = max(self._first_number, lane.sender.next_number)
        self._first_stamp = max(self._first_stamp, lane.sender.next_stamp)
        self._first_incarnation = max(self._first_incarnation, lane.receiver.incarnations)
        self._wakes.lift(lane)
        self._wanting.pop((lane.peer, lane.context), None)

    def _want(self, lane: _Lane) -> None:
        key = (lane.peer, lane.context)
        if key not in self._wanting:
            self._wanting[key] = None
            self.events.append(Wanted(peer=lane.peer, context=lane.context))

    def _touch(self, lane: _Lane, now_s: float) -> None:
        """Something has changed: the lane gets its turn, and its next deadline goes on the heap."""
        if lane.up and self._connected and (lane.receiver.due_s <= now_s or lane.sender.has_more):
            self._enter(lane)
        self._schedule(lane, now_s)

    def _enter(self, lane: _Lane) -> None:
        """The lane gets its turn, to say whether it has something to send."""
        if not lane.in_ring:
            lane.in_ring = True
            self._ring.append(lane)

    def _schedule(self, lane: _Lane, now_s: float) -> None:
        """The lane's next deadline goes on the heap."""
        sender, receiver = lane.sender, lane.receiver
        due_s = receiver.next_stall_s() if receiver.parcels else math.inf
        if lane.up and self._connected:
            if due_s > receiver.due_s > now_s:
                due_s = receiver.due_s
            timer_s = sender.due_s(now_s)
            if timer_s < due_s:
                due_s = timer_s
        # A deadline that moves away with every packet stays where it is: it passes for nothing, and is set anew then.
        if due_s == math.inf:
            self._wakes.lift(lane)
        elif due_s < self._wakes.get(lane):
            self._wakes.set(lane, due_s)

    def _packet(self, lane: _Lane, now_s: float) -> bytes | None:
        """What this lane has to say now: acks if they are due or can ride along, and one part or probe if it fits."""
        sender, receiver = lane.sender, lane.receiver
        choice, told = sender.choose(now_s), b""
        if receiver.pending and (choice is not None or receiver.due_s <= now_s):
            told = encode_frames(receiver.frames())
        if choice is None:
            return told or None
        frame = sender.next(now_s, choice, room=self._room - len(told), chunk_bytes=self._chunk_bytes)
        if sender.failed:
            self._settle_failed(lane)
        # News first: who gets the packet has it delivered before it looks after its books.
        return encode_frames([frame], told) if frame is not None else told or None

    def _take(self, lane: _Lane, frame: Frame, now_s: float) -> None:
        sender, receiver = lane.sender, lane.receiver
        lost, doubles = sender.retransmissions, receiver.duplicates
        match frame:
            case Whole():
                if receiver.on_whole(frame, now_s):
                    self._deliver(lane, frame, now_s)
            case Ack():
                for parcel in sender.on_ack(frame, now_s):
                    self._settle(lane, parcel, delivered=True, reason="")
            case Part():
                arrived = receiver.on_part(frame, now_s)
                if arrived is not None:
                    self._deliver(lane, arrived, now_s)
            case Refuse(parcel=number, code=code, reason=reason):
                refused = sender.on_refuse(number)
                if refused is not None:
                    self._settle(lane, refused, delivered=False, reason=f"refused by {lane.peer}: {reason} [{code}]")
            case Probe():
                receiver.on_probe(frame, now_s)
        if sender.retransmissions > lost:
            self._counters.add(lane.peer, retransmissions=sender.retransmissions - lost)
        if receiver.duplicates > doubles:
            self._counters.add(lane.peer, duplicates=receiver.duplicates - doubles)

    def _deliver(self, lane: _Lane, whole: Whole | Arrived, now_s: float) -> None:
        data = bytes(whole.data)
        try:
            message = decode_message(data, self._limits, minor=lane.sender.minor)
        except CodecError as error:
            refusal = Refuse(parcel=whole.parcel, code=error.code, reason=str(error)[:REASON_CHARS])
            lane.receiver.finish(whole.parcel, now_s, refusal)
            self._counters.add(lane.peer, refusals=1)
            self.events.append(Unreadable(peer=lane.peer, error=error))
            return
        lane.receiver.finish(whole.parcel, now_s)
        self._counters.received_message(lane.peer, len(data))
        self.events.append(
            Delivered(peer=lane.peer, context=lane.context, message=message, correlation=whole.correlation)
        )

    def _timer(self, lane: _Lane, now_s: float) -> None:
        lost, timeouts = lane.sender.retransmissions, lane.sender.timeouts
        lane.sender.on_time(now_s)
        if lane.sender.retransmissions > lost:
            self._counters.add(lane.peer, retransmissions=lane.sender.retransmissions - lost)
        if lane.sender.timeouts > timeouts and lane.sender.timeouts >= self._settings.rekey_after:
            self.events.append(Stuck(peer=lane.peer, context=lane.context))
            self._feed_starved()

    def _end(self, lane: _Lane, parcel: Outgoing, *, delivered: bool, reason: str) -> None:
        lane.sender.finish(parcel)
        self._settle(lane, parcel, delivered=delivered, reason=reason)

    def _settle(self, lane: _Lane, parcel: Outgoing, *, delivered: bool, reason: str) -> None:
        """Book a message that its lane's sender has forgotten."""
        queue = self._peers[lane.peer]
        self._expiries.lift((lane, parcel))
        queue.messages -= 1
        queue.nbytes -= parcel.estimate
        if self._wanting and lane.sender.idle:
            self._wanting.pop((lane.peer, lane.context), None)
        if delivered and parcel.cutter is not None:
            self._counters.sent_message(lane.peer, parcel.cutter.shape.size)
        self.events.append(Outcome(report=parcel.on_outcome, peer=lane.peer, delivered=delivered, reason=reason))
        if self._starved:
            self._feed_starved()

    def _settle_failed(self, lane: _Lane) -> None:
        failed, lane.sender.failed = lane.sender.failed, []
        for parcel, reason in failed:
            self._settle(lane, parcel, delivered=False, reason=reason)

    def _feed_starved(self) -> None:
        """Encoded bytes were let go: lanes that waited for room get their turn."""
        starved, self._starved = list(self._starved), {}
        for lane in starved:
            lane.sender.starved = False
            self._enter(lane)

    def _invite(self, now_s: float) -> None:
        """Reassembly memory came back: ask for parcels that were told to hold, as many as fit."""
        self._budget.freed = False
        room = self._budget.left
        for lane in list(self._holding):
            share = lane.receiver.budget.left
            for number, size in list(lane.receiver.held.items()):
                if size <= min(room, share):
                    room, share = room - size, share - size
                    lane.receiver.invite(number, now_s)
            if not lane.receiver.held:
                del self._holding[lane]
            self._touch(lane, now_s)
