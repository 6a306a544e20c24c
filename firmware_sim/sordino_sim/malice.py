"""A broker that means harm: drops, doubles, delays, corrupts, replays, splices, by a seeded schedule.

It sees ciphertexts only, and that is what it can do with them. Every schedule has rates of its own, so that some seeds
are a bad day and some a siege; a schedule may also fall silent for a while, or for good.
"""

from __future__ import annotations

import random
from collections import deque
from functools import partial
from typing import TYPE_CHECKING, Final

from sordino_common.clock import Loop
from sordino_common.transport.memory import MemoryBroker, NetworkModel, Publication

if TYPE_CHECKING:
    from sordino_common.transport.memory import _Session

_KEPT: Final = 512  # packets to replay and to splice from
_DEEDS: Final = ("drop", "double", "delay", "corrupt", "replay", "splice")


class MaliciousBroker(MemoryBroker):
    """`past`: packets of earlier fleets, to be replayed into this one. `counts`: what was done, by deed."""

    def __init__(
        self, loop: Loop, *, seed: int, network: NetworkModel | None = None, past: tuple[Publication, ...] = ()
    ) -> None:
        super().__init__(loop, network=network)
        self._clock = loop
        self._rng = random.Random(f"sordino-malice|{seed}")
        # From a packet in a thousand to one in five, a different mix each time.
        self._rates = {deed: 10 ** self._rng.uniform(-3.0, -0.7) for deed in _DEEDS}
        self.seen: deque[Publication] = deque(past, maxlen=_KEPT)
        self.counts: dict[str, int] = dict.fromkeys(_DEEDS, 0)
        self._silent_from_s = self._rng.choice((float("inf"), float("inf"), self._rng.uniform(0.5, 10.0)))
        self._silent_for_s = self._rng.choice((2.0, 10.0, float("inf")))

    def _forward(self, session: _Session, publication: Publication, *, retained: bool) -> None:
        now_s = self._clock.now_s()
        if self._silent_from_s <= now_s < self._silent_from_s + self._silent_for_s:
            return
        if retained or publication.retain:  # births and the roster: without them nothing would begin to be attacked
            super()._forward(session, publication, retained=retained)
            return
        self.seen.append(publication)
        deed = next((deed for deed in _DEEDS if self._rng.random() < self._rates[deed]), None)
        if deed is None:
            super()._forward(session, publication, retained=retained)
            return
        self.counts[deed] += 1
        match deed:
            case "drop":
                return
            case "double":
                super()._forward(session, publication, retained=retained)
                super()._forward(session, publication, retained=retained)
            case "delay":
                later = partial(super()._forward, session, publication, retained=retained)
                self._clock.call_at(now_s + self._rng.expovariate(2.0), later)
            case "corrupt":
                super()._forward(session, _with(publication, self._corrupted(publication.payload)), retained=retained)
            case "replay":
                super()._forward(session, publication, retained=retained)
                if self.seen:
                    super()._forward(session, self._rng.choice(self.seen), retained=False)
            case "splice":
                # Another packet in this one's place, or the head of one with the tail of the other.
                other = self._rng.choice(self.seen).payload if self.seen else b""
                cut = self._rng.randrange(len(publication.payload) + 1)
                mixed = publication.payload[:cut] + other[cut:]
                payload = other if self._rng.random() < 0.5 else mixed
                super()._forward(session, _with(publication, payload), retained=retained)

    def _corrupted(self, payload: bytes) -> bytes:
        out = bytearray(payload)
        for _ in range(self._rng.randint(1, 4)):
            if out:
                out[self._rng.randrange(len(out))] ^= 1 << self._rng.randrange(8)
        if self._rng.random() < 0.2:
            del out[self._rng.randrange(len(out) + 1) :]
        return bytes(out)


def _with(publication: Publication, payload: bytes) -> Publication:
    return Publication(
        sender=publication.sender,
        topic=publication.topic,
        payload=payload,
        retain=publication.retain,
        response_topic=publication.response_topic,
        correlation=publication.correlation,
    )
