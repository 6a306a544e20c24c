"""Steps on shares -> Plan -> circuit, once for every structure; and how large the masks of what is kept get.

A result that is written into memory whose old contents the program reads is *carried*, as a parameter is by a training
step: it is what was there plus a change, and its mask grows from program to program by the change's. Lowering gives
such an input room for many steps; the masks' true sizes are followed here, so that one circuit serves a whole training
loop.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

from sordino_common.errors import LocalError, PlanError
from sordino_common.plan.plan import encode_plan, plan_id
from sordino_common.plan.spec import TensorSpec
from sordino_common.plan.values import Input, Plan, Ref
from sordino_common.spdz.circuit import Cat, Circuit, Gate, Linear, Sum, View
from sordino_common.spdz.lowering import Lowered, LoweringError, Ranges, Settings, lower
from sordino_server.tensors.compile import Structure, capture_steps
from sordino_server.tensors.values import Facts
from sordino_server.trace.draft import Draft
from sordino_server.trace.lowering import lower as lower_graph
from sordino_server.trace.origins import Origin
from sordino_server.trace.tracing import TracedPlan

NAME: Final = "shares"
PROGRAMS_MOST: Final = 256  # of the last that were used; a notebook may run for days
# How far off coefficients may be: tried in this order, as far as the ranges allow.
_EXACTNESS: Final = (2.0**-12, 2.0**-9, None)
# What the lowering calls by the names of a job's keys, in the words of this room.
_WORDS: Final = {
    "(spdz.ranges.preactivations)": "(ranges=Ranges(preactivations=...))",
    "(spdz.ranges: params, updates, values)": "(ranges=Ranges(params=..., updates=..., values=...))",
    "spdz.ranges.": "Ranges.",
    "spdz.activation.interval": "the interval",
    "(`spdz.activation` replaces torch.sigmoid and tanh by one)": "(sordino.sigmoid, sordino.polynomial_activations)",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """What a circuit depends on. `carried`: for every output the number of the input whose memory it is written into,
    -1 for none. `limits`: of the inputs. `numbers`: all Python numbers; on shares each is part of the circuit."""

    structure: Structure
    numbers: tuple[str, ...]
    carried: tuple[int, ...]
    limits: tuple[float, ...]
    ranges: Ranges
    fraction_bits: int
    interval: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Program:
    """A Plan with its circuit. `outputs`: names, in the task's order."""

    traced: TracedPlan
    settings: Settings
    lowered: Lowered
    outputs: tuple[str, ...]

    @property
    def circuit(self) -> Circuit:
        return self.lowered.circuit

    def takes(self, rooms: Sequence[int | None]) -> bool:
        """Whether kept values with masks of these sizes fit into the circuit's inputs. None: freshly masked."""
        return all(
            room is None or room <= entry.wire.room for room, entry in zip(rooms, self.circuit.inputs, strict=True)
        )

    def rooms_after(self, rooms: Sequence[int]) -> tuple[int, ...]:
        """How large m and λ of each output can be, if those of the inputs are at most `rooms`."""
        circuit = self.circuit
        found = list(rooms)
        for node in circuit.nodes:
            match node:
                case View(operand=operand):
                    room = found[operand]
                case Linear(terms=terms, constant=constant, table=table):
                    room = sum(abs(k) * found[wire] for k, wire in terms) + abs(constant)
                    room += 0 if table is None else max(map(abs, circuit.constants[table][1]), default=0)
                case Sum(operand=operand, dims=dims):
                    room = found[operand] * math.prod(circuit.wire(operand).shape[dim] for dim in dims)
                case Cat(operands=wires):
                    room = max(found[wire] for wire in wires)
                case Gate():
                    room = node.wire.room
            found.append(room)
        places = {entry.name: entry.wire for entry in circuit.outputs}
        return tuple(found[places[name]] for name in self.outputs)

    def magnitudes(self) -> tuple[float, ...]:
        """What the real value of each output is not to pass, by the stated ranges."""
        wires = {entry.name: entry.wire for entry in self.circuit.outputs}
        return tuple(self.circuit.wire(wires[name]).magnitude for name in self.outputs)


class Programs:
    """Programs by what they depend on; more than one for a task if masks have grown out of the first."""

    def __init__(self) -> None:
        self._plans: OrderedDict[Any, TracedPlan] = OrderedDict()
        self._programs: OrderedDict[Task, list[Program]] = OrderedDict()
        self.lowered = 0

    def program(
        self, task: Task, numbers: tuple[float, ...], rooms: Sequence[int | None], lines: Sequence[Origin]
    ) -> Program:
        """Raises `PlanError` with the user's line for what can't be traced or lowered."""
        variants = self._programs.setdefault(task, [])
        self._programs.move_to_end(task)
        for program in variants:
            if program.takes(rooms):
                return program
        key = (task.structure, task.numbers, task.carried)
        traced = self._plans.get(key)
        if traced is None:
            traced = self._plans[key] = traced_plan(task.structure, numbers, task.carried, lines)
        self.lowered += 1
        program = _lowered(task, traced, rooms)
        variants.append(program)
        while len(self._programs) > PROGRAMS_MOST:
            self._programs.popitem(last=False)
        while len(self._plans) > PROGRAMS_MOST:
            self._plans.popitem(last=False)
        return program


def output_names(carried: Sequence[int]) -> tuple[str, ...]:
    return tuple(f"o{k}" if source < 0 else f"i{source}" for k, source in enumerate(carried))


def traced_plan(
    structure: Structure, numbers: Sequence[float], carried: Sequence[int], lines: Sequence[Origin]
) -> TracedPlan:
    """The steps as a Plan whose inputs all are secret."""
    inputs = [Input(f"i{k}", "state", spec) for k, spec in enumerate(structure.inputs)]
    draft = Draft(inputs)
    if structure.steps:
        graph = capture_steps(structure, inputs, lambda _: numbers, lines)
        refs = lower_graph(graph, draft, name=NAME)
    else:
        refs = [Ref(index) for _, index in structure.outputs]
    roles = ["value" if source < 0 else "state" for source in carried]
    names = output_names(carried)
    plan, origins = draft.finish(NAME, list(zip(names, roles, refs, strict=True)))
    data = encode_plan(plan)
    return TracedPlan(plan=plan, data=data, plan_id=plan_id(data), origins=tuple(map(str, origins)))


def _lowered(task: Task, traced: TracedPlan, rooms: Sequence[int | None]) -> Program:
    ranges = task.ranges
    settings = Settings(
        fraction_bits=task.fraction_bits,
        ranges=ranges,
        interval=task.interval,
        inputs={f"i{k}": limit for k, limit in enumerate(task.limits)},
        rooms={f"i{k}": max(1, (room - 1).bit_length()) for k, room in enumerate(rooms) if room is not None},
    )
    refusal: LoweringError | None = None
    for exactness in _EXACTNESS:
        try:
            lowered, settings = _with_room(traced, replace(settings, exactness=exactness))
        except LoweringError as error:
            refusal = refusal or error
            continue
        return Program(traced=traced, settings=settings, lowered=lowered, outputs=output_names(task.carried))
    assert refusal is not None
    raise PlanError(said_of(refusal, traced))


def _with_room(traced: TracedPlan, settings: Settings) -> tuple[Lowered, Settings]:
    """The circuit for as many repetitions as its masks have room for."""
    while True:
        lowered = lower(traced.plan, plan_id=traced.plan_id, settings=settings)
        if lowered.max_steps >= settings.steps or settings.steps == 1:
            return lowered, settings
        settings = replace(settings, steps=max(1, lowered.max_steps))


def said_of(error: LoweringError, traced: TracedPlan) -> str:
    """A refusal of the lowering, with the user's line and in the words of this room."""
    line = traced.origins[error.node] if 0 <= error.node < len(traced.origins) else ""
    text = in_our_words(str(error))
    return f"{line}: {text}" if line else text


def in_our_words(text: str) -> str:
    """A refusal of the lowering as a user of tensors knows things."""
    for said, ours in _WORDS.items():
        text = text.replace(said, ours)
    return text


def single_step(facts: Facts, specs: Sequence[TensorSpec], numbers: Sequence[float], line: Origin) -> Plan:
    """The Plan of one step alone, all of whose operands are secret."""
    count = sum(spec is not None for spec in facts.outs)
    if not count:
        raise LocalError("a step that gives nothing")
    places = tuple((0, k) for k, spec in enumerate(facts.outs) if spec is not None)
    structure = Structure(
        inputs=tuple(specs),
        steps=((facts, tuple((-1, k) for k in range(len(specs)))),),
        outputs=places,
    )
    return traced_plan(structure, numbers, (-1,) * len(places), (line,)).plan
