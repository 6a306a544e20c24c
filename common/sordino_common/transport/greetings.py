"""When to send a Hello to whom: at once, then with doubled waits, for as long as messages wait. Sans-IO.

Also the answer to a packet of a session that we do not know (we have restarted, its sender has not noticed): one Hello
tells it our new boot. Anybody can make up such packets, so these are rationed.
"""

from __future__ import annotations

import heapq
import itertools
import math
from dataclasses import dataclass

from sordino_common.transport.settings import LinkSettings

_ANSWER_EVERY_S = 5.0  # per peer; a restart needs one

Key = tuple[str, bytes]  # peer, context


@dataclass(slots=True)
class _Greeting:
    due_s: float
    tries: int = 0


class Greetings:
    """The lanes that wait for a session, each with its next attempt."""

    def __init__(self, settings: LinkSettings) -> None:
        self._settings = settings
        self._open: dict[Key, _Greeting] = {}
        self._heap: list[tuple[float, int, Key]] = []
        self._order = itertools.count()
        self._answered_s: dict[str, float] = {}

    def want(self, key: Key, now_s: float) -> None:
        """The lane needs a session; no news if that was known."""
        if key not in self._open:
            self._schedule(key, _Greeting(now_s))

    def hurry(self, peer: str, now_s: float) -> None:
        """The peer has just appeared: greet it now, whatever the back-off says."""
        for key in [key for key in self._open if key[0] == peer]:
            self._schedule(key, _Greeting(now_s))

    def settle(self, key: Key) -> None:
        """There is a session, or nothing waits for one any more."""
        self._open.pop(key, None)

    def due(self, now_s: float) -> list[Key]:
        """The lanes to greet now; each is due again after its back-off."""
        found: list[Key] = []
        while self._heap and self._heap[0][0] <= now_s:
            due_s, _, key = heapq.heappop(self._heap)
            greeting = self._open.get(key)
            if greeting is None or greeting.due_s != due_s:
                continue
            wait_s = min(self._settings.hello_retry_max_s, self._settings.hello_retry_s * 2.0**greeting.tries)
            self._schedule(key, _Greeting(now_s + wait_s, min(greeting.tries + 1, 16)))
            found.append(key)
        return found

    def next_s(self) -> float:
        """When `due` will have something; infinity if never."""
        while self._heap and (key := self._heap[0][2]) is not None:
            greeting = self._open.get(key)
            if greeting is not None and greeting.due_s == self._heap[0][0]:
                return greeting.due_s
            heapq.heappop(self._heap)
        return math.inf

    def may_answer(self, peer: str, now_s: float) -> bool:
        """Whether a packet of an unknown session may be answered by a Hello to `peer` now; then that is noted."""
        if now_s - self._answered_s.get(peer, -math.inf) < _ANSWER_EVERY_S:
            return False
        self._answered_s[peer] = now_s
        return True

    def _schedule(self, key: Key, greeting: _Greeting) -> None:
        self._open[key] = greeting
        heapq.heappush(self._heap, (greeting.due_s, next(self._order), key))
