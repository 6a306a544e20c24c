"""What parties say unasked, kept in order for a generator that listens to them, and who of them is gone.

A party that goes offline has `gone_s` to come back, as for questions; one that comes back under a new boot has
forgotten what it was in, and is gone at once.
"""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Mapping
from typing import Final

from sordino_common.messages import Message
from sordino_server.rounds.effects import Gone, Heard, Said

_KEPT_MOST: Final = 4096  # what is not heard by then is lost: its sender will be missed
_KEPT_EACH: Final = 64  # of one party, so that none can fill the room of the others; nobody has as much to say


class Ear:
    """Of a conductor. Times are of the loop, passed in."""

    def __init__(self, *, gone_s: float) -> None:
        self._gone_s = gone_s
        self._boots: dict[str, int] = {}  # of those who are listened to
        self._kept: deque[Said | Gone] = deque()
        self._counts: Counter[str] = Counter()  # of what is kept, by name
        self._away: dict[str, float] = {}  # offline since

    def __bool__(self) -> bool:
        """Whether there is something to be heard."""
        return bool(self._kept)

    def listen(self, names: frozenset[str], online: Mapping[str, int], now_s: float) -> None:
        """To `names` from now on; what was kept of others is forgotten."""
        self._kept = deque(item for item in self._kept if item.name in names and item.name in self._boots)
        self._counts = Counter(item.name for item in self._kept)
        self._boots = {name: online.get(name, self._boots.get(name, -1)) for name in sorted(names)}
        self._away = {name: self._away.get(name, now_s) for name in sorted(names) if name not in online}

    def said(self, name: str, message: Message, correlation: bytes = b"") -> bool:
        """Whether it is kept."""
        if name not in self._boots or len(self._kept) >= _KEPT_MOST or self._counts[name] >= _KEPT_EACH:
            return False
        self._counts[name] += 1
        self._kept.append(Said(name=name, message=message, correlation=correlation))
        return True

    def lose(self, name: str, why: str) -> None:
        """`name` can't go on, if it is listened to."""
        self._away.pop(name, None)
        if name in self._boots:
            self._kept.append(Gone(name=name, why=why))

    def presence(self, name: str, online: bool, boot: int, now_s: float) -> None:
        if name not in self._boots:
            return
        if not online:
            self._away.setdefault(name, now_s)
        elif boot == self._boots[name]:
            self._away.pop(name, None)
        else:
            self.lose(name, "restarted")

    def reconnected(self, now_s: float) -> None:
        """While the server itself was cut off it could not see who came back: give everybody their time again."""
        self._away = dict.fromkeys(self._away, now_s)

    def review(self, now_s: float) -> float:
        """Those who are away for too long are gone; when the next one will be."""
        for name in [name for name, since in self._away.items() if now_s >= since + self._gone_s]:
            self.lose(name, "went offline")
        return min((since + self._gone_s for since in self._away.values()), default=math.inf)

    def take(self) -> Heard:
        items = tuple(self._kept)
        self._kept.clear()
        self._counts.clear()
        return Heard(items=items)
