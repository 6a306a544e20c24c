"""One session's dealing, without I/O: secrets to their owners, corrections ahead of the steps, masks of what opens.

The desk knows every mask and sees no masked value. It deals at most `ahead` steps beyond what is confirmed, one step
at a time, so that whoever drives it can turn to other things in between, and says when the next one is due (`pace`).
Secrets leave it as messages for one receiver.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Final

import numpy as np
import numpy.typing as npt

from sordino_common import messages as m
from sordino_common.errors import LocalError
from sordino_common.messages.spdz import CORRECTION_PART_BYTES
from sordino_common.plan.arrays import from_numpy
from sordino_common.ring.backend import RingBackend
from sordino_common.ring.prg import SEED_BYTES, Seed
from sordino_common.spdz.dealing import Dealer
from sordino_common.spdz.opening import MODEL, OWNERS
from sordino_common.spdz.owner import mask_state
from sordino_common.spdz.spec import SessionSpec
from sordino_server.dealer.pace import Pace

I64 = npt.NDArray[np.int64]
State = Mapping[str, I64]
_MAC_KEY_BYTES: Final = 16


class DealerDesk:
    """`random`: the cryptographic generator, for the session's root. `masks`: λ of the state to go on from, None if the
    session begins with a first state. `stopwatch`: real time, for `seconds`."""

    def __init__(
        self,
        command: m.SpdzOpen,
        spec: SessionSpec,
        *,
        random: Callable[[int], bytes],
        masks: State | None,
        stopwatch: Callable[[], float],
        backend: RingBackend | None = None,
    ) -> None:
        if (masks is None) != (command.resume is None):
            raise LocalError("DealerDesk: masks of the state are given if, and only if, the session resumes")
        self.seconds = 0.0
        self.nbytes = 0
        self.confirmed = command.first_step
        self._command = command
        self._spec = spec
        self._stopwatch = stopwatch
        self._pace = Pace(first=command.first_step, ahead=command.ahead)
        self._dealer = Dealer(
            spec, Seed(random(SEED_BYTES)), state=masks, first_step=command.first_step, backend=backend
        )

    # --- the beginning ---------------------------------------------------------------------------------------------

    def setups(self) -> dict[str, m.SpdzSetup]:
        """Every member's secrets: for that member alone."""
        command = self._command
        owners = {entry.owner for entry in command.rows}
        if self._spec.stepwise:
            owners = set(command.parties)  # each may give something to a step
        members = dict.fromkeys((*command.parties, *sorted(owners)))
        if command.state_from is not None:
            members[command.state_from] = None
        members |= dict.fromkeys(readers_of(command))
        setups = {}
        for name in members:
            party_seed = mac_key = None
            if name in command.parties:
                setup = self._dealer.setup(command.parties.index(name))
                party_seed = setup.seed.expose()
                mac_key = None if setup.mac_key is None else setup.mac_key.to_bytes(_MAC_KEY_BYTES, "little")
            setups[name] = m.SpdzSetup(
                session=command.session,
                party_seed=party_seed,
                mac_key=mac_key,
                owner_seed=self._dealer.owner_seed(name).expose() if name in owners else None,
                state_seed=self._dealer.state_seed().expose() if name == command.state_from else None,
            )
        return setups

    # --- steps -----------------------------------------------------------------------------------------------------

    def giver_seed(self, name: str) -> Seed:
        """What `name` masks with, in a stepwise session: for the server's own gifts, and for what others' masks are."""
        return self._dealer.owner_seed(name)

    def feed(self, step: int, masks: State) -> None:
        """λ of all inputs of the next step of a stepwise session."""
        self._dealer.feed(step, masks)

    @property
    def dealt(self) -> int:
        """How many steps are dealt: nobody can have checked more."""
        return self._dealer.next_step

    @property
    def may_deal(self) -> bool:
        """Whether another step may be dealt: it is within the window, and there is one."""
        step = self._dealer.next_step
        return step < self._command.steps and step < self.confirmed + self._command.ahead

    def wait_s(self, now_s: float) -> float | None:
        """How long to do other things before the next step is dealt; None if none may be. `now_s`: of the loop."""
        if not self.may_deal:
            return None
        return self._pace.wait_s(now_s, confirmed=self.confirmed, dealt=self._dealer.next_step)

    def deal(self) -> tuple[str, list[m.SpdzCorrection]]:
        """The next step's correction: who gets it, and its parts."""
        if not self.may_deal:
            raise LocalError("DealerDesk: nothing may be dealt now")
        began_s = self._stopwatch()
        dealt = self._dealer.deal(self._dealer.next_step, self._dealer.next_attempt)
        self.seconds += self._stopwatch() - began_s
        self.nbytes += len(dealt.correction)
        self._pace.dealt()
        parts = max(1, -(-len(dealt.correction) // CORRECTION_PART_BYTES))
        messages = [
            m.SpdzCorrection(
                session=self._command.session,
                step=dealt.step,
                attempt=dealt.attempt,
                part=part,
                parts=parts,
                data=dealt.correction[part * CORRECTION_PART_BYTES : (part + 1) * CORRECTION_PART_BYTES],
            )
            for part in range(parts)
        ]
        return self._command.parties[dealt.corrected], messages

    def rewind(self, step: int, attempt: int) -> None:
        """From `step` on, everything is dealt anew under `attempt`."""
        self._dealer.rewind(step, attempt)

    # --- what opens ------------------------------------------------------------------------------------------------

    def output_masks(self, step: int) -> dict[str, I64]:
        """λ of the outputs of `step`, once all parties have checked it and before it is confirmed."""
        return self._dealer.output_masks(step)

    def state(self, done: int) -> dict[str, I64]:
        """λ of the state after `done` steps, before they are confirmed."""
        return self._dealer.state(done - 1)

    def masks_for(self, step: int, values: State) -> m.SpdzMasks:
        """As they travel to an agent that may read them."""
        arrays = tuple(from_numpy(np.asarray(value, order="C")) for value in values.values())
        return m.SpdzMasks(
            session=self._command.session,
            outputs=(m.SpdzValues(step=step, names=tuple(values), values=arrays),),
        )

    def confirm(self, done: int) -> None:
        """All parties have checked `done` steps, and what had to be durable is."""
        if done > self.confirmed:
            self.confirmed = done
            self._dealer.confirm(done - 1)


def readers_of(command: m.SpdzOpen) -> tuple[str, ...]:
    """Agents, and perhaps the server, to whom something opens by name."""
    return tuple(sorted({output.receiver for output in command.outputs} - {OWNERS}))


def first_state(command: m.SpdzOpen, spec: SessionSpec, seed: bytes, values: State) -> m.SpdzState:
    """The first parameters, fixed point, masked by whoever provides them: for every party."""
    masked = mask_state(spec, Seed(seed), values)
    return m.SpdzState(
        session=command.session,
        terms=m.terms_of(command),
        names=tuple(masked),
        values=tuple(from_numpy(value) for value in masked.values()),
    )


def releases(
    output: m.SpdzOutput,
    command: m.SpdzOpen,
    spec: SessionSpec,
    span: tuple[int, int],
    *,
    outputs: Callable[[int, tuple[str, ...]], State],
    model: Callable[[int, tuple[str, ...]], State],
) -> Iterator[tuple[str, int, State]]:
    """(receiver, step, masks) of all of `output` that opens with the steps from `span[0]` to before `span[1]`."""
    first, done = span
    if output.name == MODEL:
        params = tuple(entry.name for entry in spec.state_inputs if entry.role == "param")
        for step in range(first + 1, done + 1):
            if step == command.steps or (output.every and step % output.every == 0):
                yield output.receiver, step, model(step, params)
        return
    for step in range(first, done):
        masks = outputs(step, (output.name,))
        if output.receiver != OWNERS:
            yield output.receiver, step, masks
            continue
        assert spec.schedule is not None
        for part in spec.schedule.step(step):
            yield part.owner, step, {name: value[part.positions] for name, value in masks.items()}
