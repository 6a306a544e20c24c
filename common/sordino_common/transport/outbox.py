"""What waits for the transport's window: our birth and the roster (retained), handshakes, then sealed messages.

Nothing is sealed before the transport takes packets: at most one sealed packet is kept here, so a slow connection
holds no copies of chunks, and a session's counters run in the order of sending. Sealed packets are fleeting: the link
has them acknowledged by who they are for, and a broker's word that it has read them would be of no use.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from sordino_common.errors import LimitExceeded
from sordino_common.transport.base import Transport
from sordino_common.transport.settings import LinkCounters

CONTROL_PACKETS = 4096  # handshake packets that wait; over it the oldest goes, and its sender repeats it

Packet = tuple[str, bytes]  # receiver, payload


class Outbox:
    """Publishes in the order above for as long as the transport takes packets, and counts what went out."""

    def __init__(
        self,
        *,
        transport: Transport,
        counters: LinkCounters,
        topic_of: Callable[[str], str],
        next_sealed: Callable[[], Packet | None],
    ) -> None:
        self._transport = transport
        self._counters = counters
        self._topic_of = topic_of
        self._next_sealed = next_sealed
        self._retained: dict[str, bytes] = {}  # topic -> payload, to be published
        self._control: deque[Packet] = deque(maxlen=CONTROL_PACKETS)
        self._sealed: Packet | None = None

    @property
    def empty(self) -> bool:
        return not self._retained and not self._control and self._sealed is None

    def retain(self, topic: str, payload: bytes) -> None:
        """Publish `payload` as what `topic` keeps, in place of one that still waits."""
        self._retained[topic] = payload

    def post(self, to: str, packet: bytes) -> None:
        """Send a handshake packet, unless the very same waits already."""
        if (to, packet) not in self._control:
            self._control.append((to, packet))

    def reconnected(self) -> None:
        """The connection is a new one: a packet sealed for the old goes again in the link's own time."""
        self._sealed = None

    def publish(self) -> None:
        """Hand over what the transport takes now."""
        if self._retained:
            for topic, payload in list(self._retained.items()):
                if not self.put("", topic, payload, retain=True):
                    return
                del self._retained[topic]
        while self._control:
            to, packet = self._control[0]
            if not self.put(to, self._topic_of(to), packet):
                return
            self._control.popleft()
        while True:
            sealed = self._sealed or self._next_sealed()
            if sealed is None:
                return
            to, packet = self._sealed = sealed
            if not self.put(to, self._topic_of(to), packet, fleeting=True):
                return
            self._sealed = None

    def put(self, to: str, topic: str, payload: bytes, *, retain: bool = False, fleeting: bool = False) -> bool:
        """Publish; False if it was not taken. What the broker's packet limit forbids is dropped, and counted."""
        try:
            if not self._transport.publish(topic, payload, retain=retain, fleeting=fleeting):
                return False
        except LimitExceeded:
            self._counters.total.oversized += 1
            return True
        if to:
            self._counters.sent_packet(to, len(payload))
        else:
            self._counters.total.packets_sent += 1
            self._counters.total.packet_bytes_sent += len(payload)
        return True
