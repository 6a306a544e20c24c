"""When to send a Hello to whom: at once, then with doubled waits, for as long as messages wait. Sans-IO.

Also the answer to a packet of a session that we do not know (we have restarted, its sender has not noticed): one Hello
tells it our new boot. Anybody can make up such packets, so these are rationed.
"""

from __future__ import annotations

import math

from sordino_common.transport.deadlines import Deadlines
from sordino_common.transport.settings import LinkSettings

_ANSWER_EVERY_S = 5.0  # per peer; a restart needs one

Key = tuple[str, bytes]  # peer, context


class Greetings:
    """The lanes that wait for a session, each with its next attempt."""

    def __init__(self, settings: LinkSettings) -> None:
        self._settings = settings
        self.waiting: dict[Key, int] = {}  # -> how often it was tried
        self._due: Deadlines[Key] = Deadlines()
        self._answered_s: dict[str, float] = {}

    def want(self, key: Key, now_s: float) -> None:
        """The lane needs a session; no news if that was known."""
        if key not in self.waiting:
            self.waiting[key] = 0
            self._due.set(key, now_s)

    def hurry(self, peer: str, now_s: float) -> None:
        """The peer has just appeared: greet it now, whatever the back-off says."""
        for key in self.waiting:
            if key[0] == peer:
                self.waiting[key] = 0
                self._due.set(key, now_s)

    def settle(self, key: Key) -> None:
        """There is a session, or nothing waits for one any more."""
        self.waiting.pop(key, None)
        self._due.lift(key)

    def due(self, now_s: float) -> list[Key]:
        """The lanes to greet now; each is due again after its back-off."""
        found = self._due.pop(now_s)
        for key in found:
            wait_s = self._settings.hello_retry_s * 2.0 ** min(self.waiting[key], 16)
            self.waiting[key] += 1
            self._due.set(key, now_s + min(self._settings.hello_retry_max_s, wait_s))
        return found

    def next_s(self) -> float:
        """When `due` will have something; infinity if never."""
        return self._due.next_s()

    def may_answer(self, peer: str, now_s: float) -> bool:
        """Whether a packet of an unknown session may be answered by a Hello to `peer` now; then that is noted."""
        if now_s - self._answered_s.get(peer, -math.inf) < _ANSWER_EVERY_S:
            return False
        self._answered_s[peer] = now_s
        return True
