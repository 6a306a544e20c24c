"""Noised releases, counted as they go out: on disk before a device is asked, so a crash can only count one too many.

A release is one set of noised answers: a secure sum under its own session, or one attempt of a round in which every
device adds its own noise. It counts when it is asked for, whatever comes of it: of a sum that is void because a helper
was lost, a server that colludes with that helper may still learn the noised result; of answers that come too late, it
has learned them.

A job's noise is calibrated for a number of releases. Void sums and repeated attempts are paid from the same number, so
a run on a bad day ends a few rounds early and keeps its epsilon.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

from sordino_common.messages import Message, RecordTerms, SumGradient, SumStatistics, SumUpdate, Train
from sordino_server.job import TrainSpec
from sordino_server.rounds.effects import (
    Ask,
    Checkpoint,
    Effect,
    PrivateState,
    Result,
    Save,
    Tell,
    begin,
    report,
)
from sordino_server.rounds.events import Note
from sordino_server.rounds.roll import Program

T = TypeVar("T")


@dataclass(slots=True, kw_only=True)
class Releases:
    """`begun` of `planned` releases."""

    planned: int
    begun: int = 0

    @property
    def left(self) -> int:
        """How many may still be made."""
        return max(0, self.planned - self.begun)

    @property
    def told(self) -> str:
        """For people: how many have begun."""
        return f"{self.begun} of the {self.planned} noised releases that epsilon is planned for have begun"

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
                name = release_of(message)
                if name is not None and name not in known:
                    known.add(name)
                    self.begun += 1
                    yield from begin(self.begun)
            if isinstance(effect, Save):
                state = effect.checkpoint
                private = replace(state.private or PrivateState(), begun=self.begun)
                effect = Save(checkpoint=replace(state, private=private))
            result = yield effect


def release_of(command: Message) -> bytes | None:
    """The release that a command asks for, None if for none: a secure sum by its session, a round's attempt by its
    numbers; commands of one name are of one release. Sums of metrics are exact and no releases: they are of held-out
    rows, which no epsilon covers."""
    match command:
        case SumGradient():
            return command.terms.session
        case SumUpdate() if command.privacy is not None or command.terms.noise is not None:
            return command.terms.session
        case SumStatistics() if command.terms.noise is not None:
            return command.terms.session
        case Train() if command.privacy is not None:
            return f"{command.round}/{command.attempt}".encode()
        case _:
            return None


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalNoise:
    """Records are protected by noise that devices add in each of their steps: `record` goes into the command, `apply`
    is the Plan of the optimizer's step, which they need as well."""

    record: RecordTerms
    apply: Program
    releases: Releases


def plans_of(programs: Sequence[Program], private: LocalNoise | None) -> tuple[Program, ...]:
    """The Plans that devices must know."""
    return (*programs, *(() if private is None else (private.apply,)))


def retries_of(train: TrainSpec, private: LocalNoise | None) -> int:
    """How often a round may be asked again: under privacy every attempt is a release."""
    return train.retries if private is None else min(train.retries, max(0, private.releases.left - 1))


def used_up(releases: Releases | None) -> bool:
    """Whether no further round can follow."""
    return releases is not None and releases.left == 0


def out_of_releases(
    private: LocalNoise | Releases | None, state: Checkpoint, rounds: int
) -> Generator[Effect, Result, bool]:
    """Whether the planned releases are used up before the rounds are; says so."""
    releases = private.releases if isinstance(private, LocalNoise) else private
    if releases is None or releases.left > 0:
        return False
    done = state.record.round
    text = (
        f"training ends after {done} of {rounds} rounds: {releases.begun} noised releases have begun, as many as "
        f"epsilon was planned for; {releases.begun - done} of them came to nothing"
    )
    yield from report(Note(text=text, level="warning"))
    return True
