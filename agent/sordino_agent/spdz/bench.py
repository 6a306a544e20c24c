"""The bench: all seats of this agent, in the process that computes. State stays here between tasks.

A worker that dies takes its seats along: a task for a session that is not here says so by name, and the daemon ends it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, Protocol

import numpy as np
import numpy.typing as npt

from sordino_agent import compute
from sordino_agent.batches import feature_rows, target_rows
from sordino_agent.compute import Check
from sordino_agent.data.catalogue import Catalogue
from sordino_agent.data.models import MemoryModels, Models, first_state
from sordino_agent.errors import BadCommand, CircuitDiffers, UnknownSession
from sordino_agent.spdz.seat import MakeParty, Seat
from sordino_agent.spdz.tasks import SpdzEndTask, SpdzFacts, SpdzOpenFacts, SpdzOpenTask, SpdzTask
from sordino_agent.tasks import TaskCost
from sordino_common.errors import LimitExceeded
from sordino_common.messages import SpdzNumber, SpdzOpen
from sordino_common.messages.spdz import CORRECTION_PART_BYTES
from sordino_common.plan.values import Plan
from sordino_common.spdz.circuit import Circuit, CircuitInput, Gate
from sordino_common.spdz.layout import layout_of
from sordino_common.spdz.lowering.settings import Settings
from sordino_common.spdz.opening import settings_of, spec_of
from sordino_common.spdz.party import Party
from sordino_common.spdz.spec import SessionSpec

I64 = npt.NDArray[np.int64]
MOST_SEATS: Final = 8


class Lower(Protocol):
    """Plan -> (circuit, its digest)."""

    def __call__(self, plan: Plan, *, plan_id: bytes, settings: Settings) -> tuple[Circuit, bytes]: ...


class Bench:
    """`plan_of` decodes a Plan (cached); `random` is the cryptographic generator."""

    def __init__(
        self,
        *,
        catalogue: Catalogue,
        models: Models | None = None,
        plan_of: Callable[[bytes], Plan],
        lower: Lower | None = None,
        random: Callable[[int], bytes] = os.urandom,
        make_party: MakeParty = Party,
    ) -> None:
        self._catalogue = catalogue
        self._models = models or MemoryModels({})
        self._plan_of = plan_of
        self._lower = lower or _lower
        self._random = random
        self._make_party = make_party
        self._seats: dict[bytes, tuple[Seat, TaskCost]] = {}  # and a round's share of the step
        self._circuits: dict[tuple[bytes, tuple[SpdzNumber, ...]], tuple[Circuit, bytes]] = {}

    def cost_of(self, task: SpdzOpenTask | SpdzTask | SpdzEndTask) -> TaskCost:
        """An estimate: a round's share of the step, for every event, or for a portion of the work."""
        if isinstance(task, SpdzTask) and task.session in self._seats:
            round_, events = self._seats[task.session][1], max(1, len(task.events))
            return TaskCost(kind=task.kind, nodes=round_.nodes * events, flops=round_.flops * events, runs=1)
        return TaskCost(kind=task.kind, nodes=1, runs=1)

    def open(self, task: SpdzOpenTask, check: Check | None) -> SpdzOpenFacts:
        """Raises whatever does not fit, by name, and then nothing is open."""
        command = task.command
        if len(self._seats) >= MOST_SEATS:
            raise LimitExceeded(f"{len(self._seats)} sessions are open on this device, as many as it takes")
        plan = self._plan_of(task.plan)
        key = (command.plan_id, command.settings)
        lowered = self._circuits.get(key)
        if lowered is None:
            lowered = self._lower(plan, plan_id=command.plan_id, settings=settings_of(command.settings))
            if len(self._circuits) >= MOST_SEATS:
                self._circuits.pop(next(iter(self._circuits)))
            self._circuits[key] = lowered
        circuit, digest = lowered
        if digest != command.circuit:
            raise CircuitDiffers(
                f"this device lowers Plan {command.plan_id.hex()[:12]} to circuit {digest.hex()[:12]}, the server says "
                f"{command.circuit.hex()[:12]}: another version of the software, or a lie"
            )
        spec = spec_of(command, circuit, digest)
        if spec.digest != command.digest:
            raise CircuitDiffers("the session's digest is not that of its own numbers")
        _require_outputs(command, spec, task.agent)
        correction_bytes = layout_of(circuit).preprocessing_bytes(active=spec.active)
        batch_bytes = _bytes_of(spec.row_inputs)
        if task.agent in command.parties and command.ahead * correction_bytes > task.held_bytes:
            raise LimitExceeded(
                f"{command.ahead} corrections of {correction_bytes} bytes ahead; limits.spdz_bytes on the device is "
                f"{task.held_bytes}: raise it there, or give the job a smaller batch_rows"
            )
        _require_messages(task, spec, batch_bytes=batch_bytes, correction_bytes=correction_bytes)
        rows = self._rows(task, plan, spec)
        model = self._model(task, plan, spec)
        seat = Seat(
            command, spec, agent=task.agent, rows=rows, model=model, random=self._random, make_party=self._make_party
        )
        rounds = len(circuit.rounds)
        round_ = TaskCost(
            kind=task.kind, nodes=len(circuit.nodes) // (rounds + 1) + 1, flops=_flops(circuit) // (rounds + 1)
        )
        self._seats[command.session] = seat, round_
        return SpdzOpenFacts(
            circuit=digest,
            digest=spec.digest,
            correction_bytes=correction_bytes,
            batch_bytes=batch_bytes,
            opened_elements=circuit.gate_elements,
            rounds=rounds,
            **(_facts_of_steps(plan, circuit) if spec.stepwise else {}),
        )

    def run(self, task: SpdzTask, check: Check | None) -> SpdzFacts:
        """Raises the error that ended the session."""
        found = self._seats.get(task.session)
        if found is None:
            raise UnknownSession("the process that computes has lost the session's shares (it ended and began anew)")
        seat = found[0]
        try:
            if task.setup is not None:
                seat.begin(task.setup)
            shares, effects = seat.feed(task.events)
        except Exception:
            self._forget(task.session)
            raise
        return SpdzFacts(
            shares=tuple(shares), effects=tuple(effects), has_work=seat.has_work, waiting_for=seat.waiting_for[:400]
        )

    def catch_up(self) -> None:
        """What the sessions put off until their answers are on their way. What fails here fails again, and by name, in
        the next task of its session."""
        for seat, _ in self._seats.values():
            seat.catch_up()

    def end(self, task: SpdzEndTask, check: Check | None) -> SpdzFacts:
        """Ending what is not here does nothing."""
        found = self._seats.pop(task.session, None)
        if found is not None:
            found[0].end(finished=task.finished)
        return SpdzFacts(effects=())

    def _forget(self, session: bytes) -> None:
        seat, _ = self._seats.pop(session)
        seat.end(finished=False)

    def _rows(self, task: SpdzOpenTask, plan: Plan, spec: SessionSpec) -> Mapping[str, I64] | None:
        """This agent's rows as fixed point, input name -> [R, ...]."""
        command = task.command
        counts = {entry.owner: entry.rows for entry in command.rows}
        if task.agent not in counts:
            return None
        if command.data is None:
            raise BadCommand("the session wants rows but does not say of which dataset")
        table = self._catalogue.table(command.data.dataset)
        have = len(table.rows(command.data.split))
        compute.require_rows(have, task.min_rows, dataset=table.name, what="a session on shares")
        if have != counts[task.agent]:
            raise BadCommand(f"dataset {table.name!r} has {have} {command.data.split} rows, the session counts on "
                             f"{counts[task.agent]}")  # fmt: skip
        specs = {(entry.role, entry.name): entry.spec for entry in plan.inputs}
        rows: dict[str, I64] = {}
        for entry in spec.row_inputs:
            make: Any = feature_rows if entry.role == "x" else target_rows
            values = make(table, command.data, specs[entry.role, entry.name])
            scaled = np.rint(values.astype(np.float64) * 2.0**entry.wire.fraction_bits)
            # Beyond this the cast would wrap; what is beyond the stated range is refused when it is masked.
            rows[entry.name] = (
                np.clip(scaled, -(2.0**62), 2.0**62).astype(np.int64).reshape(have, *entry.wire.shape[1:])
            )
        return rows

    def _model(self, task: SpdzOpenTask, plan: Plan, spec: SessionSpec) -> Mapping[str, I64] | None:
        """The first state, fixed point, if this agent provides it."""
        command = task.command
        if command.state_from != task.agent:
            return None
        if command.model is None:
            raise BadCommand("the session wants a model but does not say which")
        wanted = {entry.name: entry.spec for entry in plan.inputs if entry.role == "param"}
        return first_state(
            command.model,
            self._models.tensors(command.model),
            wanted=wanted,
            spec=spec,
            settings=settings_of(command.settings),
        )


def _facts_of_steps(plan: Plan, circuit: Circuit) -> dict[str, Any]:
    inputs = tuple(entry.name for entry in plan.inputs)
    return {
        "inputs": inputs,
        "outputs": tuple((entry.name, 8 * circuit.wire(entry.wire).numel) for entry in circuit.outputs),
        "copies": tuple((entry.name, inputs[entry.value]) for entry in plan.outputs if entry.value < len(inputs)),
    }


def _lower(plan: Plan, *, plan_id: bytes, settings: Settings) -> tuple[Circuit, bytes]:
    from sordino_common.spdz.lowering import lower  # only who computes on shares pays for it

    lowered = lower(plan, plan_id=plan_id, settings=settings)
    return lowered.circuit, lowered.digest


def _require_outputs(command: SpdzOpen, spec: SessionSpec, agent: str) -> None:
    if spec.stepwise and (
        spec.row_inputs or len({entry.name for entry in spec.circuit.outputs}) < len(spec.circuit.outputs)
    ):
        raise BadCommand("the circuit of a stepwise session takes no rows, and every output has a name of its own")
    by_row = {output.name for output in spec.circuit.outputs if output.role == "row"}
    for output in command.outputs:
        if output.name != "model" and output.name not in spec.value_outputs:
            known = ", ".join(sorted(spec.value_outputs)) or "none"
            raise BadCommand(f"the Plan has no output {output.name!r} to open; it has {known}")
        once = output.name in by_row and command.order == "by-owner"
        if output.receiver == agent and output.name != "model" and not once:
            raise BadCommand(f"output {output.name!r} opens to an agent row by row, in a session over every row once")
        if output.every % command.check_every:
            raise BadCommand(f"output {output.name!r} every {output.every} steps, checks every {command.check_every}")
    for done in command.checkpoints:
        if done > command.steps or (done % command.check_every and done != command.steps):
            raise BadCommand(f"a checkpoint after {done} steps, but the check comes every {command.check_every}")


def _require_messages(task: SpdzOpenTask, spec: SessionSpec, *, batch_bytes: int, correction_bytes: int) -> None:
    """What goes in one message, or in one answer of this process, must fit into one; later would be in mid-session."""
    is_party = task.agent in task.command.parties
    needs: dict[str, int] = {}
    if is_party or any(entry.owner == task.agent for entry in task.command.rows):
        needs["a batch's masked rows"] = batch_bytes
    if is_party:
        openings = 8 * max(spec.circuit.opened_elements, default=0)  # may come with rows and with a checkpoint
        state = 0 if spec.stepwise else _bytes_of(spec.state_inputs)  # else each member gives what it has
        needs["a batch's masked rows, the largest round and the state"] = batch_bytes + openings + state
        needs["a part of a correction"] = min(correction_bytes, CORRECTION_PART_BYTES)
    for what, needed in needs.items():
        if needed > task.message_bytes:
            raise LimitExceeded(
                f"{what} may take {needed} bytes at once; limits.payload_bytes on the device is {task.message_bytes}: "
                "raise it there, or give the job a smaller batch_rows"
            )


def _bytes_of(inputs: Sequence[CircuitInput]) -> int:
    return 8 * sum(entry.wire.numel for entry in inputs)


def _flops(circuit: Circuit) -> int:
    """Multiplications of one step, about: three products of each party per product of the circuit, and its check."""
    total = 0
    for number in circuit.gates:
        gate = circuit.node(number)
        assert isinstance(gate, Gate)
        for product in gate.products:
            inner = circuit.wire(product.a).shape[-1] if product.kind != "mul" else 1
            total += 12 * max(circuit.wire(product.a).numel, gate.wire.numel) * max(1, inner)
        total += 20 * gate.wire.numel
    return total
