"""What has come for one session and has not gone to the worker yet: so that a round costs one crossing of the pipe.

Shares of a round wait until every other party's is there; before that the party could do nothing with them. A
correction of a step that the party has not come to waits for company: alone it would cost a crossing, too. All else
goes with the next task, in the order it came; but a task takes the openings of one round at most, so that what it makes
of them leaves before the next round is computed. Else two members settle into computing by turns: each gets two rounds
at a time, while the other waits.
"""

from __future__ import annotations

from typing import Final

from sordino_agent.spdz.tasks import SpdzEvent
from sordino_common.messages import SpdzShare
from sordino_common.spdz.errors import ProtocolError

MOST_ROUNDS: Final = 64  # of incomplete rounds: an honest party is at most two rounds ahead of another
MOST_EVENTS: Final = 4096
MOST_EARLY: Final = 8  # that wait for company,
EARLY_BYTES: Final = 1 << 20  # each of at most so many: of one that is larger the crossing is the least
TASK_BYTES: Final = 4 << 20  # of a crossing, or of one event that is larger: it is held by both sides
_Round = tuple[str, int, int, int]  # kind, step, attempt, round


class Mailbox:
    """Of a session with `others` other parties. `ready`: what the next task takes. Raises `ProtocolError` when somebody
    sends more than fits."""

    def __init__(self, *, others: int) -> None:
        self.ready: list[SpdzEvent] = []
        self._early: list[SpdzEvent] = []
        self._others = others
        self._rounds: dict[_Round, dict[str, SpdzEvent]] = {}

    def put(self, event: SpdzEvent) -> None:
        """All but shares."""
        if len(self.ready) >= MOST_EVENTS:
            raise self._full()
        self.ready.append(event)

    def put_early(self, event: SpdzEvent) -> None:
        """What is of no use before its step: it goes along with the next task, and is `ready` once that is
        `reached`."""
        if len(self._early) < MOST_EARLY and len(event.data) <= EARLY_BYTES:
            self._early.append(event)
        else:
            self.put(event)

    def reached(self, step: int) -> None:
        """What is of `step`, or before, waits no longer."""
        self.ready += [event for event in self._early if event.step <= step]
        self._early = [event for event in self._early if event.step > step]

    def put_shares(self, sender: str, shares: tuple[SpdzShare, ...]) -> None:
        for share in shares:
            if len(self.ready) >= MOST_EVENTS:
                raise self._full()
            event = SpdzEvent(
                what="share", sender=sender, kind=share.kind, step=share.step, attempt=share.attempt,
                round=share.round, data=share.payload,
            )  # fmt: skip
            if self._others == 1:  # there is nobody else to wait for
                self.ready.append(event)
            else:
                self._gather(event)

    def _gather(self, event: SpdzEvent) -> None:
        place = (event.kind, event.step, event.attempt, event.round)
        waiting = self._rounds.setdefault(place, {})
        if event.sender in waiting:  # twice, or a contradiction: the party decides
            self.ready.append(event)
            return
        waiting[event.sender] = event
        if len(waiting) == self._others:
            self.ready += self._rounds.pop(place).values()
        elif len(self._rounds) > MOST_ROUNDS:
            raise ProtocolError(f"{event.sender} sends shares of round after round that others have not reached")

    def _full(self) -> ProtocolError:
        return ProtocolError(f"{len(self.ready)} messages wait for this device, no more are taken")

    def take(self) -> tuple[SpdzEvent, ...]:
        """What the next task takes: the openings of one round at most, and as much as one crossing should carry."""
        count = self._due()
        taken, self.ready = tuple(self.ready[:count]), self.ready[count:]
        if not self.ready and self._early:
            taken += tuple(self._early)
            self._early = []
        return taken

    def _due(self) -> int:
        """How many of the first of those that are ready: at least one if there is any."""
        first: tuple[int, int, int] | None = None
        total = 0
        for count, event in enumerate(self.ready):
            total += _bytes_of(event)
            if count and total > TASK_BYTES:
                return count
            if event.kind == "open":
                round_ = (event.step, event.attempt, event.round)
                if first is not None and round_ != first:
                    return count
                first = round_
        return len(self.ready)

    def missing(self) -> dict[str, tuple[str, ...]]:
        """Who has sent what of the rounds that are not complete, for people."""
        return {
            f"{kind} of step {step} round {round_}": tuple(sorted(waiting))
            for (kind, step, _, round_), waiting in self._rounds.items()
        }


def _bytes_of(event: SpdzEvent) -> int:
    """What it carries: a correction or a share as it travels, or masked rows."""
    return len(event.data) + sum(value.nbytes for value in event.values) if event.values else len(event.data)
