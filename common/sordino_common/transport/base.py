"""What a transport owes to the layers above: small packets on topics, at least once, in any order.

A transport knows nothing of messages, keys or chunks; `Link` (see `link.py`) makes reliable messages out of it. The
law suite in `tests/helpers_transport.py` runs against every implementation.

The send window belongs to us: `publish` takes a packet only while fewer than `window` packets are unacknowledged by
the broker, and answers False otherwise. The caller keeps what was not taken and tries again in `on_writable`.

A packet may be `fleeting`: the broker need not acknowledge it, and it takes no place in the window. It is lost where
others are, when a connection ends, and also when the broker has no room; whoever sends it notices by itself.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol


class TransportHandler(Protocol):
    """The layer above. All calls come on the loop's thread."""

    def on_connected(self) -> None:
        """A (new) connection stands, and the subscriptions are granted again."""
        ...

    def on_disconnected(self, reason: str) -> None: ...

    def on_packet(self, topic: str, payload: bytes, retained: bool) -> None: ...

    def on_writable(self) -> None:
        """The window was full and has room again."""
        ...


class Transport(Protocol):
    """One party's connection to the broker. Reconnects by itself, with back-off and jitter, until `close`."""

    @property
    def connected(self) -> bool: ...

    @property
    def connections(self) -> int:
        """How many times a connection was made: 0 before the first. Goes into birth and will."""
        ...

    @property
    def max_packet_bytes(self) -> int:
        """Largest payload that `publish` takes: the broker's limit where it is known, less the header."""
        ...

    @property
    def window(self) -> int:
        """Most packets unacknowledged by the broker at a time: ours, or the broker's receive maximum if smaller."""
        ...

    def open(self, handler: TransportHandler, *, will: Callable[[int], tuple[str, bytes]] | None = None) -> None:
        """Connect. `will(connection)` gives topic and payload of the will for the connection of that number;
        it is retained, so that who subscribes later sees it too."""
        ...

    def close(self) -> None:
        """Disconnect in order (no will is published). Idempotent."""
        ...

    def subscribe(self, topic_filter: str) -> Callable[[], None]:
        """Subscribe, now and after every reconnect. Returns the function that ends the subscription."""
        ...

    def publish(
        self,
        topic: str,
        payload: bytes,
        *,
        retain: bool = False,
        fleeting: bool = False,
        response_topic: str | None = None,
        correlation: bytes | None = None,
    ) -> bool:
        """Hand over one packet; False if it was not taken (not connected, or the window is full).

        Raises `LimitExceeded` if the payload is larger than `max_packet_bytes`."""
        ...
