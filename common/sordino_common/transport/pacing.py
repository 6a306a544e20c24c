"""How fast a sender goes: the window of packets in flight, and the retransmission timeout.

The window grows by one a round trip and is halved once per loss (AIMD); the timeout follows the measured round trips
(RFC 6298) and doubles with every timeout in a row.
"""

from __future__ import annotations

from sordino_common.transport.settings import LinkSettings


class Pace:
    """`window`: most packets in flight now. `timeout_s`: how long to wait for an answer now, back-off included.
    `timeouts`: how many there were in a row. `round_trip_s`: smoothed; None before the first."""

    __slots__ = (
        "_deviation_s",
        "_recovered_stamp",
        "_settings",
        "_width",
        "round_trip_s",
        "timeout_s",
        "timeouts",
        "window",
    )

    def __init__(self, settings: LinkSettings) -> None:
        self._settings = settings
        self._width = float(settings.window_chunks)
        self._recovered_stamp = -1
        self._deviation_s = 0.0
        self.window = settings.window_chunks
        self.round_trip_s: float | None = None
        self.timeouts = 0
        self._set_timeout()

    @property
    def reorder_s(self) -> float:
        """By how much a packet may be overtaken and is not lost yet (RFC 9002 section 6.1.2, with a quarter)."""
        return (self.round_trip_s or 0.0) / 4 + 0.01

    def timed_out(self) -> None:
        self.timeouts += 1
        self._set_timeout()

    def revived(self) -> None:
        """There is news of the peer."""
        if self.timeouts:
            self.timeouts = 0
            self._set_timeout()

    def answered(self, sample_s: float) -> None:
        """A packet was answered after `sample_s` (RFC 6298 section 2)."""
        if self.round_trip_s is None:
            self.round_trip_s, self._deviation_s = sample_s, sample_s / 2
        else:
            self._deviation_s += (abs(self.round_trip_s - sample_s) - self._deviation_s) / 4
            self.round_trip_s += (sample_s - self.round_trip_s) / 8
        self.timeouts = 0
        self._set_timeout()

    def acknowledged(self, packets: int) -> None:
        if self.timeouts:
            self.revived()
        most = self._settings.window_chunks
        if self._width < most:
            self._set_width(min(most, self._width + packets / self._width))

    def lost(self, stamp: int, next_stamp: int) -> None:
        """The packet of that stamp was overtaken and lost; those sent before `next_stamp` are the same trouble."""
        if stamp > self._recovered_stamp:
            self._set_width(max(1.0, self._width / 2))
            self._recovered_stamp = next_stamp

    def _set_width(self, width: float) -> None:
        self._width = width
        self.window = int(width)

    def _set_timeout(self) -> None:
        settings = self._settings
        if self.round_trip_s is None:
            base_s = settings.rto_initial_s
        else:
            base_s = max(settings.rto_min_s, self.round_trip_s + 4 * self._deviation_s)
        self.timeout_s = min(settings.rto_max_s, base_s * 2.0 ** min(self.timeouts, 16))
