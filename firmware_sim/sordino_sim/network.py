"""The network between a fleet and its broker, as arithmetic: when does a packet arrive?

    depart  = max(now, until the link is free, end of a partition) + wire bits / bandwidth
    arrive  = depart + latency + Exp(jitter) + retransmissions        (then never before the packet sent before it)

MQTT runs over TCP, so a link keeps its order and loses nothing: a lost segment costs its sender a retransmission
timeout (RFC 6298: 1 s at first sight, 200 ms at least on Linux; doubled each time), and what follows waits behind it.
Two switches leave that world, for tests of what `Link` survives: `lossy` really drops, and `reorder` lets packets
overtake one another.

A direction of a connection is a link of its own: (agent, broker) and (broker, agent). The random draws for a packet
are a hash of (seed, sender, receiver, how many packets this link carried before), and of nothing else: one agent more,
or another order of events elsewhere, changes no other link's draws.
"""

from __future__ import annotations

import hashlib
import math
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final

from sordino_common.errors import ConfigError

BROKER: Final = "broker"  # the broker's id in `deliveries`

_MSS_BYTES: Final = 1448  # TCP payload of one Ethernet frame (1500 - 20 IP - 20 TCP - 12 timestamps)
_FRAME_OVERHEAD_BYTES: Final = 90  # preamble 8 + Ethernet 18 + gap 12 + IP 20 + TCP 32: what a segment adds
_RTO_S: Final = (
    0.2  # Linux' least retransmission timeout; the first one is this or two round trips, if those are longer
)
_WORDS: Final = struct.Struct(">8Q")
_MAX_RETRANSMISSIONS: Final = 10  # a TCP connection gives up after about 15; bounding it keeps every delay finite


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkSpec:
    """One device's connection. Bandwidths in bit/s, 0 for unlimited; probabilities per packet; times in seconds.

    `latency_s` is one way. Jitter is exponential with mean `jitter_s` (queues have long tails), so the mean one-way
    time of a small packet is `latency_s + jitter_s`. A packet of n bytes is lost as one: loss is per packet."""

    latency_s: float = 0.0
    jitter_s: float = 0.0
    up_bps: float = 0.0
    down_bps: float = 0.0
    loss: float = 0.0
    duplicate: float = 0.0
    reorder: float = 0.0
    reorder_s: float = 0.05

    def __post_init__(self) -> None:
        for name in ("latency_s", "jitter_s", "up_bps", "down_bps", "reorder_s"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0.0):
                raise ConfigError(f"network: {name} is {value}; a finite number of at least 0 is expected")
        for name in ("loss", "duplicate", "reorder"):
            value = getattr(self, name)
            if not 0.0 <= value < 1.0:
                raise ConfigError(f"network: {name} is {value}; a probability of at least 0 and below 1 is expected")

    def worse(self, **changes: float) -> LinkSpec:
        """This link with some figures replaced, e.g. `worse(loss=0.05)`."""
        return replace(self, **changes)


@dataclass(frozen=True, slots=True, kw_only=True)
class Partition:
    """From `start_s` until `end_s` nothing passes between the broker and `names` (empty: everybody)."""

    start_s: float
    end_s: float
    names: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        if not 0.0 <= self.start_s < self.end_s < math.inf:
            raise ConfigError(
                f"network: a partition from {self.start_s} s to {self.end_s} s; expected 0 <= start < end, both finite"
            )


class _Direction:
    """What one direction of one connection remembers."""

    __slots__ = ("free_s", "key", "last_arrival_s", "packets")

    def __init__(self, seed: int, sender: str, receiver: str) -> None:
        # Lengths in front keep ("ab", "c") and ("a", "bc") apart.
        text = f"{seed}|{len(sender)}|{sender}|{len(receiver)}|{receiver}"
        self.key = hashlib.blake2b(text.encode(), digest_size=32, person=b"sordino-link").digest()
        self.packets = 0
        self.free_s = 0.0
        self.last_arrival_s = 0.0

    def uniforms(self) -> list[float]:
        """Eight numbers in (0, 1) for the next packet: (k + 1/2) / 2^53 with k from a keyed hash of its number."""
        digest = hashlib.blake2b(self.packets.to_bytes(8, "big"), key=self.key).digest()
        self.packets += 1
        return [((word >> 11) + 0.5) * 2.0**-53 for word in _WORDS.unpack(digest)]


class SimulatedNetwork:
    """`NetworkModel` for `MemoryBroker`: `links` by client id, `default` for everybody else.

    A hop's link is that of its client end: up towards the broker, down from it. Every random figure is reproducible
    from `seed`. `delivered`, `lost`, `duplicated` and `retransmitted` count packets, for reports and tests."""

    def __init__(
        self,
        *,
        seed: int,
        default: LinkSpec,
        links: Mapping[str, LinkSpec] | None = None,
        partitions: Sequence[Partition] = (),
        lossy: bool = False,
    ) -> None:
        self._seed = seed
        self._default = default
        self._links = dict(links or {})
        self._partitions = tuple(sorted(partitions, key=lambda partition: partition.start_s))
        self._lossy = lossy
        self._directions: dict[tuple[str, str], _Direction] = {}
        self.delivered = 0
        self.lost = 0
        self.duplicated = 0
        self.retransmitted = 0

    def link(self, client: str) -> LinkSpec:
        """The link of a client."""
        return self._links.get(client, self._default)

    def cut(self, names: frozenset[str], *, start_s: float, end_s: float) -> None:
        """One partition more. Packets that are already under way arrive."""
        partitions = (*self._partitions, Partition(start_s=start_s, end_s=end_s, names=names))
        self._partitions = tuple(sorted(partitions, key=lambda partition: partition.start_s))

    def deliveries(self, sender: str, receiver: str, nbytes: int, now_s: float) -> list[float]:
        """Absolute times at which a packet handed over at `now_s` arrives: none if lost, two if doubled."""
        client = sender if receiver == BROKER else receiver
        spec = self._links.get(client, self._default)
        direction = self._directions.get((sender, receiver))
        if direction is None:
            direction = self._directions[(sender, receiver)] = _Direction(self._seed, sender, receiver)
        u_jitter, u_loss, u_double, u_reorder, u_hold, u_second, _, _ = direction.uniforms()

        start_s = max(now_s, direction.free_s)
        cut_until_s = self._cut_until(client, start_s)
        if cut_until_s > start_s and self._lossy:
            self.lost += 1
            return []
        start_s = max(start_s, cut_until_s)
        bandwidth_bps = spec.up_bps if receiver == BROKER else spec.down_bps
        if bandwidth_bps > 0.0:
            start_s += 8.0 * wire_bytes(nbytes) / bandwidth_bps
        direction.free_s = start_s
        arrive_s = start_s + spec.latency_s - spec.jitter_s * math.log(u_jitter)

        if self._lossy:
            if u_loss < spec.loss:
                self.lost += 1
                return []
        elif spec.loss > 0.0:
            arrive_s += self._retransmission_s(spec, u_loss)
        if u_reorder < spec.reorder:
            arrive_s += u_hold * spec.reorder_s  # this one is held back; the others may pass
        else:
            # TCP hands over in order: a packet waits for the one before it.
            arrive_s = direction.last_arrival_s = max(arrive_s, direction.last_arrival_s)
        self.delivered += 1
        if u_double >= spec.duplicate:
            return [arrive_s]
        self.duplicated += 1
        return [arrive_s, arrive_s - (spec.jitter_s + spec.latency_s) * math.log(u_second)]

    def _retransmission_s(self, spec: LinkSpec, u_loss: float) -> float:
        """Time until a copy gets through: k losses in a row have chance loss^k and cost RTO (2^k - 1)."""
        failures = min(_MAX_RETRANSMISSIONS, int(math.log(u_loss) / math.log(spec.loss)))
        self.retransmitted += failures
        return float(max(_RTO_S, 4.0 * (spec.latency_s + spec.jitter_s)) * (2**failures - 1))

    def _cut_until(self, client: str, when_s: float) -> float:
        """End of the partition that cuts `client` off at `when_s`, taking overlapping ones together; else `when_s`."""
        for partition in self._partitions:
            if partition.start_s <= when_s < partition.end_s and (not partition.names or client in partition.names):
                when_s = partition.end_s
        return when_s


def wire_bytes(nbytes: int) -> int:
    """Bytes on the wire for `nbytes` of payload, frame by frame; an empty payload still needs a frame."""
    return nbytes + _FRAME_OVERHEAD_BYTES * max(1, -(-nbytes // _MSS_BYTES))
