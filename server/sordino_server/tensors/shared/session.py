"""A stepwise session as this process conducts and deals it: a circuit that stays open, one step at a time.

    tell   spdz-step to every party, what we give, masked; the step's correction
    hear   spdz-taken or a refusal, spdz-checked with m of what opens
    tell   spdz-masks to the party to which something opens, hear spdz-stored
    tell   spdz-confirm: the step is settled

Rounds of a step: one message to the parties, the circuit's rounds, four of the check, one message back.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from sordino_common import messages as m
from sordino_common.plan.arrays import from_numpy
from sordino_common.spdz.errors import StateAtEdge
from sordino_common.spdz.owner import given_mask, mask_given
from sordino_common.spdz.spec import SessionSpec, origin_of
from sordino_server.dealer.desk import DealerDesk
from sordino_server.rounds.effects import Effect, Gone, Result, Said, listen, look, tell
from sordino_server.rounds.spdz_dealing import Here
from sordino_server.rounds.spdz_session import Session, SessionLost, SessionRefused

I64 = npt.NDArray[np.int64]


class StepRefused(SessionRefused):
    """A party does not take part in a step. `agent`, `reason`: its own words."""

    def __init__(self, agent: str, reason: str) -> None:
        super().__init__(f"{agent} refuses the step: {reason}")
        self.agent, self.reason = agent, reason


@dataclass(frozen=True, slots=True, kw_only=True)
class StepDone:
    """`opened`: x of what opened. `masks`, `origins`: of all outputs."""

    opened: Mapping[str, I64]
    masks: Mapping[str, I64]
    origins: Mapping[str, bytes]


class StepwiseSession(Session):
    """`desk`: who deals for it, in this process."""

    def __init__(
        self, command: m.SpdzOpen, spec: SessionSpec, desk: DealerDesk, *, server: str, deadline_s: float
    ) -> None:
        super().__init__(command, spec, Here(desk), server=server, data=None, deadline_s=deadline_s)
        self._desk: Final = desk
        self._boots: dict[str, int] = {}
        self._asked: dict[bytes, str] = {}
        self._receivers: set[str] = set()  # to whom something opens, and who has not said that it is stored
        self.over = False

    @property
    def next_step(self) -> int:
        return self.confirmed

    def begin(self) -> Generator[Effect, Result, None]:
        """Have everybody ready, and remember who they are: a device that restarts has forgotten the session."""
        present = yield from look()
        self._boots = {name: present.everybody.get(name, -1) for name in self.command.parties}
        yield from self.open(None)

    def step(
        self, message: m.SpdzStep, *, given: Mapping[str, I64], masks: Mapping[str, I64]
    ) -> Generator[Effect, Result, StepDone]:
        """Run the next step. `given`: what we put in, fixed point; `masks`: λ of what is kept.

        Raises `StepRefused`, `SessionLost`, `OutOfRange` and errors of exit code 4; then the session is over."""
        try:
            return (yield from self._step(message, given, masks))
        except Exception as error:
            self.over = True
            yield from self.abort(error)
            raise

    def _step(
        self, message: m.SpdzStep, given: Mapping[str, I64], masks: Mapping[str, I64]
    ) -> Generator[Effect, Result, StepDone]:
        present = yield from look()
        for name, boot in self._boots.items():
            if present.everybody.get(name, boot) != boot:
                raise SessionLost(f"{name} has restarted")
        yield from listen(frozenset(self.command.parties))
        step, spec, desk = message.step, self.spec, self._desk
        try:
            ours = mask_given(spec, desk.giver_seed(self._server), step, given)
        except StateAtEdge as error:
            raise SessionLost(str(error)) from None
        entries = {entry.name: entry for entry in spec.state_inputs}
        fed = dict(masks)
        for gift in message.given:
            entry = entries[gift.name]
            fed[gift.name] = np.asarray(
                given_mask(spec, desk.giver_seed(gift.owner), entry, step) >> np.int64(entry.shift)
            )
        desk.feed(step, fed)
        yield from self._tell_step(message, ours)
        yield from self.dealing.deal()
        while self._done(step + 1) <= step:
            yield from self._hear(self._slowest())
            yield from self._retry()
            if self.dealing.may_deal:
                yield from self.dealing.deal()
        all_masks = {**desk.state(step + 1), **desk.output_masks(step)}
        opened = self._agreed(step, message.opened, all_masks) if message.opened else {}
        yield from self._release_moved(message, all_masks)
        yield from self.settle(step + 1)
        names = [entry.name for entry in spec.circuit.outputs]
        return StepDone(
            opened=opened,
            masks={name: all_masks[name] for name in names},
            origins={name: origin_of(spec, step, self._attempt, name) for name in names},
        )

    def _release_moved(self, message: m.SpdzStep, masks: Mapping[str, I64]) -> Generator[Effect, Result, None]:
        """λ of what opens to a party, now that all have checked; then wait until it is stored."""
        self._receivers = {entry.to for entry in message.moved}
        for name in sorted(self._receivers):
            ours = {entry.name: masks[entry.name] for entry in message.moved if entry.to == name}
            yield from self.dealing.release(name, message.step, ours)
        while self._receivers:
            yield from self._hear(tuple(sorted(self._receivers)))

    def _tell_step(self, message: m.SpdzStep, ours: Mapping[str, I64]) -> Generator[Effect, Result, None]:
        gift = m.SpdzState(
            session=self.command.session,
            terms=m.terms_of_step(self.command, message),
            step=message.step,
            names=tuple(ours),
            values=tuple(from_numpy(value) for value in ours.values()),
        )
        self._asked = {}
        for name in self.command.parties:
            self._asked[(yield from tell(name, message))] = name
            if ours:
                yield from tell(name, gift)

    def _take(self, item: Said | Gone) -> None:
        match item:
            case Said(name=name, message=m.Refused() as refused, correlation=correlation) if (
                self._asked.get(correlation) == name
            ):
                reason = f"{refused.code}: {refused.reason}"
                if refused.code in ("unknown-session", "busy", "draining"):
                    raise SessionLost(f"{name} can't take part in the step: {reason}")
                raise StepRefused(name, reason)
            case Said(name=name, message=m.SpdzStored() as stored) if (
                stored.session == self.command.session and stored.step == self.confirmed
            ):
                self._receivers.discard(name)
            case _:
                super()._take(item)
