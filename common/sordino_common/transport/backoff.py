"""How long to wait before the next attempt to connect: exponential, with jitter, slower after a refusal."""

from __future__ import annotations

import random
from typing import Final

_GROWTH: Final = 2.0
_STABLE_S: Final = 10.0  # longer than a broker takes to refuse what it does not like


class Backoff:
    """Delays in seconds. After k failures in a row: least * 2^k, at most `most_s`, times a uniform draw of [1/2, 1].

    The draw keeps a fleet that lost its broker at one instant from coming back at one instant. A refusal (credentials,
    a client id that somebody else uses) is not mended by trying again soon: its delay starts at `refused_s`."""

    def __init__(
        self, *, least_s: float, most_s: float, refused_s: float, draw: random.Random | random.SystemRandom
    ) -> None:
        self._least_s = least_s
        self._most_s = most_s
        self._refused_s = refused_s
        self._draw = draw
        self._failures = 0

    def stood(self, seconds: float) -> None:
        """A connection was lost after it had stood for `seconds`. If that was long, its loss is a first failure again;
        one that is accepted and cut off over and over keeps slowing down."""
        if seconds >= _STABLE_S:
            self._failures = 0

    def next_s(self, *, refused: bool = False) -> float:
        """The delay before the next attempt; counts one failure."""
        first_s = max(self._refused_s, self._least_s) if refused else self._least_s
        most_s = max(self._most_s, first_s)
        # The exponent is bounded only to keep the power finite.
        delay_s = min(most_s, first_s * _GROWTH ** min(self._failures, 60))
        self._failures += 1
        return delay_s * self._draw.uniform(0.5, 1.0)
