"""Noised releases, counted as they go out: on disk before a device is asked, so a crash can only count one too many.

A release is one set of noised answers: a secure sum under its own session, or one attempt of a round in which every
device adds its own noise. It counts when it is asked for, whatever comes of it: of a sum that is void because a helper
was lost, a server that colludes with that helper may still learn the noised result; of answers that come too late, it
has learned them.

A job's noise is calibrated for a number of releases. Void sums and repeated attempts are paid from the same number, so
a run on a bad day ends a few rounds early and keeps its epsilon.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass, replace
from typing import TypeVar

from sordino_common.messages import Message
from sordino_server.rounds.effects import Ask, Effect, PrivateState, Result, Save, Tell, begin

T = TypeVar("T")
ReleaseId = Callable[[Message], bytes | None]


@dataclass(slots=True, kw_only=True)
class Releases:
    """`begun` of `planned` releases. `identify(message)` names the release that a command asks for, None if it asks
    for none: commands with the same name are of one release."""

    planned: int
    identify: ReleaseId
    begun: int = 0

    @property
    def left(self) -> int:
        """How many may still be made."""
        return max(0, self.planned - self.begun)

    def counted(self, rounds: Generator[Effect, Result, T]) -> Generator[Effect, Result, T]:
        """`rounds`, but every release is on disk before its first command leaves, and every checkpoint has the count.
        What `rounds` returns, this returns."""
        known: set[bytes] = set()
        result: Result = None
        while True:
            try:
                effect = rounds.send(result)
            except StopIteration as stop:
                value: T = stop.value
                return value
            asked = effect.messages.values() if isinstance(effect, Ask) else ()
            told = (effect.message,) if isinstance(effect, Tell) else ()
            # One message object goes to many agents: look at each object once.
            for message in {id(message): message for message in (*asked, *told)}.values():
                name = self.identify(message)
                if name is not None and name not in known:
                    known.add(name)
                    self.begun += 1
                    yield from begin(self.begun)
            if isinstance(effect, Save):
                state = effect.checkpoint
                private = replace(state.private or PrivateState(), begun=self.begun)
                effect = Save(checkpoint=replace(state, private=private))
            result = yield effect
