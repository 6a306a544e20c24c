"""One agent's steps: recorded as they are dispatched, sent as one Plan when something is needed.

What nobody holds any more is not sent: pending values are kept alive by who needs them (pointers, later steps), so that
dead code is gone by Python's own counting.
"""

from __future__ import annotations

import itertools
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Final, Literal

import torch

from sordino_common.errors import PlanError
from sordino_common.plan.spec import FLOATS, TensorSpec
from sordino_server.tensors.ahead import Foresight
from sordino_server.tensors.compile import Compiled, Compiler, Place, Structure, infer
from sordino_server.tensors.errors import RemoteFailure, UnsupportedOperation
from sordino_server.tensors.lines import Line, user_line
from sordino_server.tensors.ops import instead_of
from sordino_server.tensors.script import Flush, Script
from sordino_server.tensors.values import Cell, Facts, Key, Step, Stored, Value, interned

# What a flush sends: everything that somebody here holds; what a fetch needs and what else is due; a whole step.
Scope = Literal["all", "asked", "step"]
PLACES: Final = 1 << 20  # more results than one step has
PENDING_MOST: Final = 4000  # steps that wait, dead ones counted: a fifth of what a Plan may have
backward_pass: Final = torch._C._current_graph_task_id  # PyTorch's number of it; -1 outside of one


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One Plan to run: what it reads, which values it makes, its numbers in the order of the structure. `left`: cells
    that wait for another flush. `known`: the flush before, if it was this one."""

    compiled: Compiled
    inputs: tuple[Value, ...]
    outputs: tuple[Value, ...]
    numbers: tuple[float, ...]
    lines: tuple[Line, ...]
    left: tuple[weakref.ref[Cell], ...] = ()
    known: Flush | None = field(default=None, compare=False)


class Recorder:
    """What waits for the agent `name`. `forgotten`: ids there that nobody here needs any more. `on_backward` is called
    when a backward pass begins, the first since the last flush."""

    def __init__(self, name: str, compiler: Compiler, *, on_backward: Callable[[], None] = lambda: None) -> None:
        self.name = name
        self.chain = f"PointerTensor({name})"
        self.compiler = compiler
        self.forgotten: deque[bytes] = deque()
        self.recorded = 0  # steps since the last flush
        self.backwards = 0  # backward passes since the last flush
        self.backward = -1  # the backward pass that runs
        self._line: Line | None = None  # of that pass
        self._last_write = -1  # since the last flush, to what is not a gradient: an optimizer's step, mostly
        self._held: dict[bytes, float] = {}  # id -> when its lease began, oldest first
        self._pending: dict[int, weakref.ref[Cell]] = {}
        self._numbers = itertools.count()  # of cells
        self._on_backward = on_backward
        self.script = Script()
        self.foresight = Foresight()

    def cell(self, value: Value) -> Cell:
        """New memory that holds `value`."""
        cell = Cell(value, next(self._numbers), self.backward >= 0)
        if value.step is not None:
            self._pending[cell.number] = weakref.ref(cell)
        return cell

    def write(self, cell: Cell, value: Value) -> None:
        cell.value = value
        if value.step is not None:
            self._pending[cell.number] = weakref.ref(cell)
        if not cell.gradient:
            self._last_write = self.script.next - 1

    def knows(self, facts: Facts) -> bool:
        """Whether a step of this form may be recorded again without being looked at."""
        return True

    @property
    def full(self) -> bool:
        """Whether it is time to send, whatever is needed."""
        return self.recorded >= PENDING_MOST

    def crowded(self) -> bool:
        """Whether to send before the next step: it is full, or a second backward pass begins, since a loop in eager
        style sends what it has once a step."""
        task = backward_pass()
        if task != self.backward:
            self.backward = task
            self._line = None
            if task >= 0:
                self._line = user_line()  # it is the same one for the whole pass
                self.backwards += 1
                if self.backwards > 1 or self.full:
                    return True
                self._on_backward()
        return self.recorded >= PENDING_MOST

    def apply(
        self,
        op: Any,
        args: Key,
        kwargs: tuple[tuple[str, Any], ...],
        operands: tuple[Value, ...],
        numbers: tuple[float, ...],
        kinds: Key,
    ) -> tuple[Facts, tuple[Value | None, ...]]:
        """Record one step. Raises `UnsupportedOperation` at the user's line if no Plan has it, and the operand's own
        failure if it has one."""
        specs = tuple([operand.spec for operand in operands])
        key = (op, args, kwargs, kinds, specs)
        facts = self.compiler.facts.get(key)
        if facts is None:
            for operand in operands:
                if operand.failure is not None:
                    raise operand.failure
            try:
                facts = infer(partial(Facts, op=op, args=args, kwargs=kwargs), specs, numbers, user_line().origin)
            except PlanError as error:
                text = str(error).removeprefix("tensors: ")
                raise UnsupportedOperation(f"{op.name()} on {self.chain}: {text}{instead_of(op.name())}") from None
            self.compiler.facts[key] = facts
        values = self.record(facts, operands, numbers)
        self.script.interrupt()
        return facts, values

    def record(self, facts: Facts, operands: Sequence[Value], numbers: Sequence[float]) -> tuple[Value | None, ...]:
        """Record one step of a known form. Raises the operand's own failure if it has one."""
        for operand in operands:
            if operand.failure is not None:
                raise operand.failure
            self.script.place(operand)
        return self.add(facts, operands, numbers)

    def add(self, facts: Facts, operands: Sequence[Value], numbers: Sequence[float]) -> tuple[Value | None, ...]:
        """Record one step, whose operands have their places in the script and no failure."""
        script, line = self.script, self._line or user_line()
        place, outs = script.next, facts.outs
        step = Step(facts, operands, numbers, place, line)
        script.next = place + len(outs)
        script.lines.append(line)
        if numbers:
            script.given.append(numbers)
        self.recorded += 1
        if facts.single:
            return (Value(outs[0], step, 0, place),)  # type: ignore[arg-type]  # what is single is there
        return tuple([None if spec is None else Value(spec, step, k, place + k) for k, spec in enumerate(outs)])

    def request(self, scope: Scope = "all", asked: Value | None = None) -> Request | None:
        """The Plan of everything that is due and not there yet; None if nothing is. Changes nothing.

        With `asked` or `step`, what is likely to die unread waits for another flush, and is computed anew if it is
        needed after all: gradients that an optimizer has used, and at the boundary of a step what follows the last
        write, the next step's beginning. It waits once: what is still held at the flush after that goes with it."""
        outputs, left = self._due(scope, asked)
        known = self.script.flush_of(outputs.values())
        return self._walked(scope, outputs, left) if known is None else self._repeated(known, outputs, left)

    def _repeated(self, known: Flush, outputs: dict[int, Value], left: Sequence[weakref.ref[Cell]]) -> Request:
        """The request of a flush that is the last one again."""
        script = self.script
        numbers = tuple([number for k in known.given for number in script.given[k]])
        lines = tuple([script.lines[k] for k in known.steps])
        return Request(
            compiled=self.compiler.compiled(known.family, numbers, lines),
            inputs=script.read(known),
            outputs=tuple(outputs.values()),
            numbers=numbers,
            lines=lines,
            left=tuple(left),
            known=known,
        )

    def _walked(self, scope: Scope, outputs: dict[int, Value], left: Sequence[weakref.ref[Cell]]) -> Request | None:
        """The request for these outputs, found by walking from each to what it needs."""
        steps = self._steps(outputs)
        if not steps:  # with `step`: what was written is gone, and nothing else says where the step ends
            return self.request("all") if scope == "step" else None
        # The structure as a flat key of integers and of objects that hash by identity: one for every step of a loop.
        key: list[Any] = []
        inputs: dict[int, int] = {}
        read: list[Value] = []
        numbers: list[float] = []
        starts: dict[int, int] = {}

        def place(value: Value) -> int:
            made = value.step
            if made is not None:
                return starts[made.number] + value.index
            found = inputs.get(id(value))
            if found is None:
                found = inputs[id(value)] = ~len(read)
                read.append(value)
            return found

        start = 0
        for step in steps:
            starts[step.number] = start
            start += PLACES
            key.append(step.facts)
            key += map(place, step.operands)
            numbers += step.numbers
        key.append(None)
        key += map(place, outputs.values())
        key.append(None)
        key += [id(value.spec) for value in read]  # interned
        lines = tuple([step.line for step in steps])
        structure = partial(_structure, steps, place, read, outputs)
        family = self.compiler.family(tuple(key), structure, tuple(numbers))
        self.script.remember(family, steps, read, outputs.values())
        return Request(
            compiled=self.compiler.compiled(family, tuple(numbers), lines),
            inputs=tuple(read),
            outputs=tuple(outputs.values()),
            numbers=tuple(numbers),
            lines=lines,
            left=tuple(left),
        )

    def _due(self, scope: Scope, asked: Value | None) -> tuple[dict[int, Value], list[weakref.ref[Cell]]]:
        """What a flush has to send, by id, in the order in which its memory was made; and what waits."""
        if scope == "step" and self._last_write < 0:
            scope = "all"  # nothing says where the step ends
        due: dict[int, Value] = {}
        left: list[weakref.ref[Cell]] = []
        if asked is not None and asked.step is not None:
            due[id(asked)] = asked
        for _, reference in sorted(self._pending.items()):
            cell = reference()
            if cell is None:
                continue
            value = cell.value
            if value.step is None or value.failure is not None:
                continue
            if scope != "all" and not cell.waited:
                after = value.step.number > self._last_write
                if after if scope == "step" else cell.gradient and not after:
                    left.append(reference)
                    continue
            due[id(value)] = value
        return due, left

    def _steps(self, outputs: dict[int, Value]) -> list[Step]:
        """The steps that `outputs` need. An output that needs a failed value has failed with it, and is left out."""
        try:
            return _reached(outputs.values())
        except RemoteFailure:
            for key, value in list(outputs.items()):
                try:
                    _reached((value,))
                except RemoteFailure as failure:
                    value.failure = failure
                    del outputs[key]
            return _reached(outputs.values())

    def store(self, value: Value, tensor_id: bytes, now_s: float) -> None:
        """`value` is on the agent now, under this id, until nobody here has it any more."""
        self._held[tensor_id] = now_s
        value.spec = interned(value.spec)
        value.stored, value.step = Stored(tensor_id, self._forget), None

    def _forget(self, tensor_id: bytes) -> None:
        if tensor_id in self._held:
            del self._held[tensor_id]
            self.forgotten.append(tensor_id)

    def held(self) -> tuple[bytes, ...]:
        """All ids that are still needed here; from now on they are not."""
        ids, self._held = tuple(self._held), {}
        return ids

    def due(self, now_s: float, lease_s: float) -> tuple[bytes, ...]:
        """All ids, if half of the oldest lease is over: they are given new ones now. Else none."""
        oldest_s = next(iter(self._held.values()), now_s)
        if now_s - oldest_s < lease_s / 2:
            return ()
        self._held = dict.fromkeys(self._held, now_s)
        return tuple(self._held)

    def new_step(self) -> None:
        """What was recorded is sent, and the backward pass that had begun is the first of what follows."""
        self.backwards = 1

    def sent(self, request: Request, ids: Iterable[bytes], now_s: float) -> None:
        """The request was carried out: its outputs are stored under these ids."""
        held, forget = self._held, self._forget
        for value, tensor_id in zip(request.outputs, ids, strict=True):  # `store`; what steps give has interned specs
            held[tensor_id] = now_s
            value.stored, value.step = Stored(tensor_id, forget), None
        self.foresight.sent(request)
        self._waited(request.left)
        self._settle()

    def _waited(self, left: Iterable[weakref.ref[Cell]]) -> None:
        for reference in left:
            cell = reference()
            if cell is not None:
                cell.waited = True

    def nothing_due(self) -> None:
        """A flush has found that nobody holds anything of what was recorded."""
        self._settle()

    def failed(self, request: Request, failure: RemoteFailure) -> None:
        """The request can't be carried out, ever: whoever uses its outputs is told."""
        for value in request.outputs:
            value.failure = failure
        self._settle()

    def _settle(self) -> None:
        self.recorded = self.backwards = 0
        self._last_write = -1
        self.script.begin()
        left = {}
        for number, reference in self._pending.items():
            cell = reference()
            if cell is not None and cell.value.step is not None and cell.value.failure is None:
                left[number] = reference
        self._pending = left


def _structure(
    steps: Sequence[Step], place: Callable[[Value], int], read: Sequence[Value], outputs: Mapping[int, Value]
) -> Structure:
    """What a key stands for, written out."""

    def written(value: Value) -> Place:
        code = place(value)
        return (-1, ~code) if code < 0 else divmod(code, PLACES)

    return Structure(
        inputs=tuple(value.spec for value in read),
        steps=tuple((step.facts, tuple(written(operand) for operand in step.operands)) for step in steps),
        outputs=tuple(written(value) for value in outputs.values()),
    )


def _reached(outputs: Iterable[Value]) -> list[Step]:
    """The steps that these values need, in the order in which they were recorded."""
    found: dict[int, Step] = {}
    waiting: list[Iterable[Value]] = [outputs]
    while waiting:
        for value in waiting.pop():
            step = value.step
            if step is not None and step.number not in found:
                if value.failure is not None:
                    raise value.failure
                found[step.number] = step
                waiting.append(step.operands)
    return [found[number] for number in sorted(found)]


def liftable(spec: TensorSpec) -> bool:
    """Whether a number beside a tensor of this spec may become an input: it then has the tensor's dtype."""
    return spec.dtype in FLOATS
