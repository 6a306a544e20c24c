"""The bounds of a link, and what it counts."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final

from sordino_common.errors import LocalError

KIB: Final = 1024
MIB: Final = 1024 * 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkSettings:
    """Every bound of a link. All memory is bounded by these, whatever peers send or callers queue.

    Defaults: 8 chunks of 256 KiB fill 100 Mbit/s at 160 ms of round trip, and 8 packets from each of 100 agents stay
    under mosquitto's default queue of 1,000 messages per subscriber."""

    chunk_bytes: int = 256 * KIB
    window_chunks: int = 8  # packets in flight to one peer
    max_message_bytes: int = 64 * MIB
    reassembly_bytes: int = 128 * MIB  # of half-received messages, over all peers; more have to wait
    reassemblies_per_peer: int = 8
    encoded_bytes: int = 64 * MIB  # of encoded messages under way; over it, at most one more message
    small_bytes: int = 64 * KIB  # messages up to this pass by a bulky one to the same peer
    queue_messages: int = 1024  # waiting or under way, per peer
    queue_bytes: int = 256 * MIB  # estimated, per peer; arrays that messages share are counted once per message
    contexts_per_peer: int = 31  # a SessionTable keeps 32; one is left for the Hello that tells a new boot
    expires_s: float = 600.0  # of a message that names none
    ack_delay_s: float = 0.04  # TCP's: long enough for most answers to carry the ack
    ack_every: int = 4  # half a window; messages that are answered need none of their own
    rto_initial_s: float = 3.0
    rto_min_s: float = 0.25
    rto_max_s: float = 30.0
    hold_s: float = 5.0  # a peer without room says so; unasked, it is tried again after this
    stall_s: float = 120.0  # a half-received message without news is dropped
    park_after: int = 3  # timeouts in a row after which a message's encoded bytes are let go
    rekey_after: int = 3  # timeouts in a row after which a new session is asked for
    hello_retry_s: float = 1.0
    hello_retry_max_s: float = 30.0

    def __post_init__(self) -> None:
        if not (KIB <= self.chunk_bytes <= self.max_message_bytes <= self.reassembly_bytes):
            raise LocalError(
                f"LinkSettings: expected 1024 <= chunk_bytes ({self.chunk_bytes}) <= max_message_bytes "
                f"({self.max_message_bytes}) <= reassembly_bytes ({self.reassembly_bytes})"
            )
        if min(self.window_chunks, self.queue_messages, self.ack_every, self.reassemblies_per_peer) < 1:
            raise LocalError("LinkSettings: window, queue, ack_every and reassemblies_per_peer are at least 1")
        if not 0 < self.rto_min_s <= self.rto_initial_s <= self.rto_max_s:
            raise LocalError("LinkSettings: expected 0 < rto_min_s <= rto_initial_s <= rto_max_s")


@dataclass(slots=True)
class Traffic:
    """What went to and came from one party, or all of them. `packet_bytes` are payloads handed to the transport
    (chunks sent twice count twice); `message_bytes` are encoded messages, once each, when acknowledged or delivered."""

    packets_sent: int = 0
    packets_received: int = 0
    packet_bytes_sent: int = 0
    packet_bytes_received: int = 0
    messages_sent: int = 0
    messages_received: int = 0
    message_bytes_sent: int = 0
    message_bytes_received: int = 0
    retransmissions: int = 0
    duplicates: int = 0
    refusals: int = 0  # packets and messages of theirs that were refused here
    oversized: int = 0  # packets of ours that the broker's limit forbade


@dataclass(slots=True)
class LinkCounters:
    """`total`, and the same per peer. Peers are names of the roster, so their number is bounded."""

    total: Traffic = field(default_factory=Traffic)
    peers: dict[str, Traffic] = field(default_factory=dict)

    def peer(self, name: str) -> Traffic:
        traffic = self.peers.get(name)
        if traffic is None:
            traffic = self.peers[name] = Traffic()
        return traffic

    def add(self, peer: str, **amounts: int) -> None:
        """Add `amounts` (by field name) to the peer's traffic and to the total."""
        for traffic in (self.total, self.peer(peer)):
            for name, amount in amounts.items():
                setattr(traffic, name, getattr(traffic, name) + amount)

    def sent_packet(self, peer: str, nbytes: int) -> None:
        """As `add`; every packet comes here."""
        for traffic in (self.total, self.peers.get(peer) or self.peer(peer)):
            traffic.packets_sent += 1
            traffic.packet_bytes_sent += nbytes

    def sent_message(self, peer: str, nbytes: int) -> None:
        for traffic in (self.total, self.peers.get(peer) or self.peer(peer)):
            traffic.messages_sent += 1
            traffic.message_bytes_sent += nbytes

    def received_message(self, peer: str, nbytes: int) -> None:
        for traffic in (self.total, self.peers.get(peer) or self.peer(peer)):
            traffic.messages_received += 1
            traffic.message_bytes_received += nbytes
