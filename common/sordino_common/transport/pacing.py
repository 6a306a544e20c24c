"""How fast a sender goes: the window of packets in flight, and the retransmission timeout.

The window grows by one a round trip and is halved once per loss (AIMD); the timeout follows the measured round trips
(RFC 6298) and doubles with every timeout in a row.
"""

from __future__ import annotations

from sordino_common.transport.settings import LinkSettings


class Pace:
    __slots__ = ("_deviation_s", "_recovered_stamp", "_settings", "_window", "round_trip_s", "timeouts")

    def __init__(self, settings: LinkSettings) -> None:
        self._settings = settings
        self._window = float(settings.window_chunks)
        self._recovered_stamp = -1
        self._deviation_s = 0.0
        self.round_trip_s: float | None = None  # smoothed; None before the first
        self.timeouts = 0  # in a row

    @property
    def window(self) -> int:
        """Most packets in flight now."""
        return int(self._window)

    @property
    def timeout_s(self) -> float:
        """How long to wait for an answer now, back-off included."""
        settings = self._settings
        if self.round_trip_s is None:
            base_s = settings.rto_initial_s
        else:
            base_s = max(settings.rto_min_s, self.round_trip_s + 4 * self._deviation_s)
        return min(settings.rto_max_s, base_s * 2.0 ** min(self.timeouts, 16))

    @property
    def reorder_s(self) -> float:
        """By how much a packet may be overtaken and is not lost yet (RFC 9002 section 6.1.2, with a quarter)."""
        return (self.round_trip_s or 0.0) / 4 + 0.01

    def answered(self, sample_s: float) -> None:
        """A packet was answered after `sample_s` (RFC 6298 section 2)."""
        self.timeouts = 0
        if self.round_trip_s is None:
            self.round_trip_s, self._deviation_s = sample_s, sample_s / 2
        else:
            self._deviation_s += (abs(self.round_trip_s - sample_s) - self._deviation_s) / 4
            self.round_trip_s += (sample_s - self.round_trip_s) / 8

    def acknowledged(self, packets: int) -> None:
        self.timeouts = 0
        self._window = min(self._settings.window_chunks, self._window + packets / self._window)

    def lost(self, stamp: int, next_stamp: int) -> None:
        """The packet of that stamp was overtaken and lost; those sent before `next_stamp` are the same trouble."""
        if stamp > self._recovered_stamp:
            self._window = max(1.0, self._window / 2)
            self._recovered_stamp = next_stamp
