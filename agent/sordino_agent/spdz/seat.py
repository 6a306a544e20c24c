"""One agent's seat in one session, in the worker: party, owner of rows, reader of outputs, or several of these.

Events in, effects out. What comes before the secrets are there is held back by the daemon; inputs that run further
ahead than the party takes are held here.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, Protocol

import numpy as np
import numpy.typing as npt

from sordino_agent.errors import BadCommand
from sordino_agent.spdz.reading import Named, Reader
from sordino_agent.spdz.steps import Steps
from sordino_agent.spdz.tasks import SpdzEffect, SpdzEvent
from sordino_common.errors import LocalError
from sordino_common.messages import SpdzOpen, SpdzSetup, SpdzShare
from sordino_common.plan.arrays import from_numpy, to_numpy
from sordino_common.ring.prg import Seed
from sordino_common.spdz.circuit import Wire
from sordino_common.spdz.effects import Broadcast, Checked, Done, Effect, Retry
from sordino_common.spdz.errors import ProtocolError
from sordino_common.spdz.intake import AHEAD_STEPS
from sordino_common.spdz.opening import MODEL, OWNERS
from sordino_common.spdz.owner import InputOwner, mask_state
from sordino_common.spdz.party import Party
from sordino_common.spdz.spec import PADDING, PartySetup, SessionSpec

I64 = npt.NDArray[np.int64]
_Input = tuple[str, int, Named]  # an owner, attempt, D of its rows


class MakeParty(Protocol):
    """`Party`, or what a test puts in its place."""

    def __call__(
        self, spec: SessionSpec, index: int, setup: PartySetup, *, random: Callable[[int], bytes]
    ) -> Party: ...


class Seat:
    """`rows`: input name -> fixed point [R, ...] of this agent's rows, None if it owns none in this session. `model`:
    the first state, fixed point, if this agent provides it."""

    def __init__(
        self,
        command: SpdzOpen,
        spec: SessionSpec,
        *,
        agent: str,
        rows: Mapping[str, I64] | None,
        model: Mapping[str, I64] | None = None,
        random: Callable[[int], bytes],
        make_party: MakeParty = Party,
    ) -> None:
        self.spec: Final = spec
        self._command = command
        self._agent = agent
        self._rows = rows
        self._model = model
        self._state_seed: Seed | None = None
        self._random = random
        self._make_party = make_party
        self._index = command.parties.index(agent) if agent in command.parties else None
        self._party: Party | None = None
        self._owner: InputOwner | None = None
        self._at = command.first_step  # the party is at this step, or at the one after it
        self._attempt = 0
        self._checkpoints = frozenset(command.checkpoints)
        self._shares: list[SpdzShare] = []  # what this task broadcasts
        self._effects: list[SpdzEffect] = []  # and what else it wants done
        self._early: dict[int, list[_Input]] = {}  # of steps that are too far ahead for the party
        self._reader = Reader(command.parties, most=4 * command.ahead + 4)
        self._sums: dict[str, float] = {}
        self._summed: dict[str, int] = {}
        self._predictions: dict[str, npt.NDArray[np.float32]] = {}
        self._steps = Steps(spec, agent) if spec.stepwise else None

    @property
    def waiting_for(self) -> str:
        return self._party.waiting_for if self._party is not None else ""

    def begin(self, setup: SpdzSetup) -> None:
        """The dealer's secrets. Raises `ProtocolError` if they are not for this seat."""
        if self._party is not None or self._owner is not None or self._state_seed is not None:
            raise ProtocolError("the dealer's set-up came twice")
        if (setup.party_seed is not None) != (self._index is not None):
            raise ProtocolError("the dealer's set-up has a party's seed for who is no party, or lacks one")
        if self._index is not None and (setup.mac_key is not None) != self.spec.active:
            raise ProtocolError(f"a set-up {'without' if self.spec.active else 'with'} a MAC key in a session with "
                                f"security {self.spec.security}")  # fmt: skip
        if (setup.owner_seed is not None) != (self._rows is not None or self._steps is not None):
            raise ProtocolError("the dealer's set-up has an owner's seed for who owns no rows, or lacks one")
        if (setup.state_seed is not None) != (self._model is not None):
            raise ProtocolError("the dealer's set-up has a state's seed for who provides no parameters, or lacks one")
        if setup.state_seed is not None:
            self._state_seed = Seed(setup.state_seed)
        if self._index is not None and setup.party_seed is not None:
            key = None if setup.mac_key is None else int.from_bytes(setup.mac_key, "little")
            secrets = PartySetup(Seed(setup.party_seed), key)
            self._party = self._make_party(self.spec, self._index, secrets, random=self._random)
        if setup.owner_seed is not None and self._steps is not None:
            self._steps.begin(Seed(setup.owner_seed))
        elif setup.owner_seed is not None:
            self._owner = InputOwner(self.spec, self._agent, Seed(setup.owner_seed))

    @property
    def has_work(self) -> bool:
        """Whether there is something to do that no event has to come for."""
        return self._party is not None and self._party.has_work

    def feed(self, events: Sequence[SpdzEvent]) -> tuple[list[SpdzShare], list[SpdzEffect]]:
        """Take the events in order, or, if there are none, do a portion of the work: what is to be broadcast, and what
        else is to be done. Raises what the party raises; the session is then over."""
        if not events and self._party is not None:
            self._perform(self._party.work())
        for event in events:
            if event.what == "share":
                self._share(event)
            else:
                self._take(event)
        shares, self._shares = self._shares, []
        effects, self._effects = self._effects, []
        return shares, effects

    def catch_up(self) -> None:
        """What was put off until the answer is on its way."""
        if self._party is not None:
            self._party.catch_up()

    def end(self, *, finished: bool) -> None:
        if self._party is None:
            return
        if finished:
            self._party.close()
        else:
            self._party.abandon()

    # -----------------------------------------------------------------------------------------------------------------

    def _share(self, event: SpdzEvent) -> None:
        party = self._party
        if party is None:
            return  # an owner only
        sender = self._command.parties.index(event.sender)
        self._perform(party.on_message(sender, event.kind, event.step, event.attempt, event.round, event.data))

    def _take(self, event: SpdzEvent) -> None:
        match event.what:
            case "mask":
                return self._mask(event)
            case "provide":
                return self._provide()
            case "outputs":
                return self._read(event.step, self._reader.on_copy(event.sender, event.step, _named(event)))
            case "masks" if self._steps is not None:
                return self._effects.append(self._steps.read(event.step, _named(event)))
            case "masks":
                return self._read(event.step, self._reader.on_masks(event.step, _named(event)))
            case "restart":
                self._attempt = event.attempt
                self._early = {
                    step: [one for one in held if one[1] >= event.attempt] for step, held in self._early.items()
                }
        party = self._party
        if party is None:
            return None  # an owner only: states, shares and corrections are not for it
        if self._steps is not None and event.what in ("step", "state"):
            return self._feed(party, self._steps, event)
        match event.what:
            case "state":
                return self._begin_with(party, event.sender, _named(event))
            case "resume":  # of a session that carried more, perhaps: an optimizer's state
                state, wanted = _named(event), {entry.name for entry in self.spec.state_inputs}
                held = {name: value for name, value in state.items() if name in wanted}
                return self._perform(party.resume(self._command.first_step, held))
            case "input":
                return self._input(party, event.step, (event.sender, event.attempt, _named(event)))
            case "correction":
                return self._perform(party.on_correction(event.step, event.attempt, event.data))
            case "restart":
                return self._perform(party.on_restart(event.step, event.attempt))
        raise LocalError(f"event {event.what}")

    # --- inputs ----------------------------------------------------------------------------------------------------

    def _provide(self) -> None:
        """The first state, masked, for every party, this one included; after that it is forgotten here."""
        model, seed = self._model, self._state_seed
        if model is None or seed is None:
            raise LocalError("an agent was asked for first parameters that it does not provide, or twice")
        self._model = self._state_seed = None
        masked = mask_state(self.spec, seed, model)
        self._effects.append(
            SpdzEffect(what="state", names=tuple(masked), values=tuple(from_numpy(value) for value in masked.values()))
        )
        if self._party is not None:
            self._begin_with(self._party, self._agent, masked)

    def _begin_with(self, party: Party, sender: str, masked: Named) -> None:
        try:
            effects = party.on_state(masked)
        except ProtocolError as error:
            raise ProtocolError(f"first parameters of {sender}: {error}") from None
        return self._perform(effects)

    def _feed(self, party: Party, steps: Steps, event: SpdzEvent) -> None:
        """What a step was said to be, or what somebody gives to it; once all is there the party begins."""
        if event.what == "step":
            masked = steps.tell(event.step, event.data, _named(event))
            if masked:
                names, values = tuple(masked), tuple(from_numpy(value) for value in masked.values())
                self._effects.append(SpdzEffect(what="state", step=event.step, names=names, values=values))
        else:
            steps.give(event.sender, event.step, _named(event))
        fed = steps.complete(self._command)
        if fed is not None:
            self._perform(party.feed(fed.step, fed.terms, fed.kept, fed.given))

    def _mask(self, event: SpdzEvent) -> None:
        """Own rows of the batches of steps [step, until), for every party, this one included."""
        if self._owner is None or self._rows is None or self.spec.schedule is None:
            raise LocalError("an agent without rows was asked for its rows")
        self._attempt = max(self._attempt, event.attempt)
        for step in range(event.step, event.until):
            mine = [part for part in self.spec.schedule.step(step) if part.owner == self._agent]
            if not mine:
                continue
            picked = {name: _picked(values, mine[0].rows) for name, values in self._rows.items()}
            masked = self._owner.masked(step, event.attempt, picked)
            names, values = tuple(masked), tuple(from_numpy(value) for value in masked.values())
            self._effects.append(SpdzEffect(what="input", step=step, attempt=event.attempt, names=names, values=values))
            if self._party is not None:
                self._input(self._party, step, (self._agent, event.attempt, masked))

    def _input(self, party: Party, step: int, rows: _Input) -> None:
        sender, attempt, masked = rows
        if step > self._at + AHEAD_STEPS:
            limit = 4 * self._command.ahead
            if step > self._at + limit:
                raise ProtocolError(f"rows of {sender} for step {step}, this party is at step {self._at}")
            waiting = sum(map(len, self._early.values()))
            if waiting >= limit * len(self._command.rows):
                raise ProtocolError(f"{waiting} batches wait for their steps, no more are taken")
            self._early.setdefault(step, []).append(rows)
            return None
        return self._perform(party.on_input(sender, step, attempt, masked))

    def _reached(self, party: Party, step: int) -> None:
        """The party is at `step`, later than before: inputs that waited for it are due."""
        self._at = step
        for due in [early for early in self._early if early <= step + AHEAD_STEPS]:
            for sender, attempt, masked in self._early.pop(due, ()):
                self._perform(party.on_input(sender, due, attempt, masked))

    # --- effects ---------------------------------------------------------------------------------------------------

    def _perform(self, effects: list[Effect]) -> None:
        party = self._party
        assert party is not None
        for effect in effects:
            match effect:
                case Broadcast():
                    self._shares.append(
                        SpdzShare(
                            kind=effect.kind,
                            step=effect.step,
                            attempt=effect.attempt,
                            round=effect.round,
                            payload=effect.payload,
                        )
                    )
                    if effect.step > self._at:
                        self._reached(party, effect.step)
                case Retry():
                    self._effects.append(
                        SpdzEffect(what="retry", step=effect.step, attempt=effect.attempt, kind=effect.where[:200])
                    )
                case Checked():
                    self._release(effect)
                    self._effects.append(SpdzEffect(what="checked", step=effect.step + 1))
                    if effect.step >= self._at:
                        self._reached(party, effect.step + 1)
                case Done():
                    self._effects.append(SpdzEffect(what="done", step=self.spec.steps))

    def _release(self, checked: Checked) -> None:
        """What leaves, now that it is checked: the outputs that the session names, to whom it names; checkpoints."""
        done = checked.step + 1
        if self._steps is not None:
            self._effects += self._steps.release(checked, attempt=self._attempt)
            return
        for output in self._command.outputs:
            if output.name == MODEL:
                if done == self.spec.steps or (output.every and done % output.every == 0):
                    params = [entry.name for entry in self.spec.state_inputs if entry.role == "param"]
                    self._tell(output.receiver, done, {name: checked.state[name] for name in params})
                continue
            for step, values in checked.outputs.items():
                if output.name not in values:
                    raise ProtocolError(f"the Plan has no output {output.name!r}")
                self._output(output.name, output.receiver, step, values[output.name])
        if done in self._checkpoints:
            names, arrays = tuple(checked.state), tuple(from_numpy(value) for value in checked.state.values())
            self._effects.append(SpdzEffect(what="checkpoint", step=done, names=names, values=arrays))

    def _output(self, name: str, receiver: str, step: int, value: I64) -> None:
        if receiver != OWNERS:
            self._tell(receiver, step, {name: value})
            return
        assert self.spec.schedule is not None
        for part in self.spec.schedule.step(step):
            self._tell(part.owner, step, {name: np.ascontiguousarray(value[part.positions])})

    def _tell(self, to: str, step: int, values: Named) -> None:
        if to == self._agent:
            self._read(step, self._reader.on_copy(self._agent, step, dict(values)))
            return
        arrays = tuple(from_numpy(np.asarray(value, order="C")) for value in values.values())
        self._effects.append(SpdzEffect(what="output", to=to, step=step, names=tuple(values), values=arrays))

    # --- reading ---------------------------------------------------------------------------------------------------

    def _read(self, step: int, values: Named | None) -> None:
        """x of an output that opens to this agent: a model becomes a file, row results become sums."""
        if values is None:
            return
        params = {entry.name: entry for entry in self.spec.state_inputs if entry.role == "param"}
        if values.keys() == params.keys():
            floats = {
                name: (value.astype(np.float64) / 2.0 ** params[name].wire.fraction_bits).astype(np.float32)
                for name, value in values.items()
            }
            self._effects.append(SpdzEffect(what="model", step=step, kind="model", data=_file_of(floats)))
            return
        if any(output.receiver == self._agent and output.name in values for output in self._command.outputs):
            self._gather(step, values)
            return
        self._sum(step, values)

    def _gather(self, step: int, values: Named) -> None:
        """Row results of all owners, for who may read them all: OUTPUT/OWNER in one file, when every row is there."""
        assert self.spec.schedule is not None
        counts = dict(self.spec.schedule.rows)
        wires = {entry.name: self.spec.circuit.wire(entry.wire) for entry in self.spec.circuit.outputs}
        for part in self.spec.schedule.step(step):
            real = part.rows != PADDING
            for name, value in values.items():
                picked = value[part.positions[real]].astype(np.float64) / 2.0 ** wires[name].fraction_bits
                blank = np.zeros((counts[part.owner], *picked.shape[1:]), dtype=np.float32)
                held = self._predictions.setdefault(f"{name}/{part.owner}", blank)
                held[part.rows[real]] = picked.astype(np.float32)
                self._summed[name] = self._summed.get(name, 0) + int(real.sum())
        wanted = [output.name for output in self._command.outputs if output.receiver == self._agent]
        total = sum(counts.values())
        if all(self._summed.get(name, 0) == total for name in wanted if name != MODEL):
            self._effects.append(SpdzEffect(what="model", kind="predictions", data=_file_of(self._predictions)))
            self._effects.append(SpdzEffect(what="sums", round=total))

    def _sum(self, step: int, values: Named) -> None:
        assert self.spec.schedule is not None
        (mine,) = [part for part in self.spec.schedule.step(step) if part.owner == self._agent]
        real = mine.rows != PADDING
        wires = {entry.name: self.spec.circuit.wire(entry.wire) for entry in self.spec.circuit.outputs}
        if self._rows is not None and "y" not in self._rows:
            self._predict(values, mine.rows[real], real, wires)
            return
        for output, value in values.items():
            if value.shape[:1] != real.shape:
                raise BadCommand(f"output {output!r} has no entry per row")
            if output == "prediction":
                name, entries = "correct", self._correct(value[real], mine.rows[real])
            else:
                name, entries = output, value[real].astype(np.float64) / 2.0 ** wires[output].fraction_bits
            self._sums[name] = self._sums.get(name, 0.0) + float(entries.sum())
            self._summed[name] = self._summed.get(name, 0) + int(real.sum())
        wanted = sum(output.receiver == OWNERS for output in self._command.outputs)
        own = dict(self.spec.schedule.rows)[self._agent]
        if len(self._summed) == wanted and all(count == own for count in self._summed.values()):
            self._effects.append(
                SpdzEffect(what="sums", names=tuple(self._sums), sums=tuple(self._sums.values()), round=own)
            )

    def _predict(self, values: Named, rows: I64, real: npt.NDArray[np.bool_], wires: Mapping[str, Wire]) -> None:
        """Predictions of own rows, gathered until all are there; then a file of them."""
        assert self.spec.schedule is not None
        own = dict(self.spec.schedule.rows)[self._agent]
        for name, value in values.items():
            floats = (value[real].astype(np.float64) / 2.0 ** wires[name].fraction_bits).astype(np.float32)
            held = self._predictions.setdefault(name, np.zeros((own, *floats.shape[1:]), dtype=np.float32))
            held[rows] = floats
            self._summed[name] = self._summed.get(name, 0) + len(rows)
        if all(count == own for count in self._summed.values()):
            self._effects.append(SpdzEffect(what="model", kind="predictions", data=_file_of(self._predictions)))
            self._effects.append(SpdzEffect(what="sums", round=own))

    def _correct(self, predictions: I64, rows: I64) -> npt.NDArray[np.float64]:
        """1 for every row whose predicted class is its own: the largest of several, or the sign of a logit."""
        if self._rows is None or "y" not in self._rows:
            raise BadCommand("a prediction without a target can't be counted")
        y = self._rows["y"][rows]
        if predictions.ndim == 2 and predictions.shape[1] > 1:
            return np.asarray(predictions.argmax(axis=1) == y.argmax(axis=1), dtype=np.float64)
        half = y.max(initial=0) // 2
        return np.asarray((predictions.reshape(len(y)) > 0) == (y.reshape(len(y)) > half), dtype=np.float64)


def _file_of(arrays: Mapping[str, npt.NDArray[np.float32]]) -> bytes:
    """A .npz file."""
    file = io.BytesIO()
    np.savez(file, **arrays)  # type: ignore[arg-type]  # the stub sees ** as allow_pickle, too
    return file.getvalue()


def _named(event: SpdzEvent) -> dict[str, Any]:
    return {name: to_numpy(value) for name, value in zip(event.names, event.values, strict=True)}


def _picked(values: I64, rows: I64) -> I64:
    """The rows' values; zeros for `PADDING`."""
    taken = values[rows]
    if np.minimum.reduce(rows) == PADDING:
        taken[rows == PADDING] = 0
    return taken
