"""One agent's steps: recorded as they are dispatched, sent as one Plan when something is needed.

What nobody holds any more is not sent: pending values are kept alive by who needs them (pointers, later steps), so that
dead code is gone by Python's own counting.
"""

from __future__ import annotations

import itertools
import weakref
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

import torch

from sordino_common.errors import PlanError
from sordino_common.plan.spec import FLOATS, TensorSpec
from sordino_server.tensors.compile import Compiled, Compiler, Place, Structure, infer
from sordino_server.tensors.errors import RemoteFailure, UnsupportedOperation
from sordino_server.tensors.lines import user_line
from sordino_server.tensors.ops import instead_of
from sordino_server.tensors.values import Cell, Facts, Key, Step, Value
from sordino_server.trace.origins import Origin

PENDING_MOST: Final = 4000  # steps that wait, dead ones counted: a fifth of what a Plan may have


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One Plan to run: what it reads, which values it makes, its numbers in the order of the structure."""

    compiled: Compiled
    inputs: tuple[Value, ...]
    outputs: tuple[Value, ...]
    numbers: tuple[float, ...]
    lines: tuple[Origin, ...]


class Recorder:
    """What waits for the agent `name`. `forgotten`: ids there that nobody here needs any more."""

    def __init__(self, name: str, compiler: Compiler) -> None:
        self.name = name
        self.chain = f"PointerTensor({name})"
        self.compiler = compiler
        self.forgotten: deque[bytes] = deque()
        self.recorded = 0  # steps since the last flush
        self.backwards = 0  # backward passes since the last flush
        self._in_backward = False
        self._held: dict[bytes, float] = {}  # id -> when its lease began, oldest first
        self._pending: dict[int, weakref.ref[Cell]] = {}
        self._numbers = itertools.count()

    def cell(self, value: Value) -> Cell:
        """New memory that holds `value`."""
        cell = Cell(value, next(self._numbers))
        self._wait(cell)
        return cell

    def write(self, cell: Cell, value: Value) -> None:
        cell.value = value
        self._wait(cell)

    def _wait(self, cell: Cell) -> None:
        if cell.value.step is not None:
            self._pending[cell.number] = weakref.ref(cell)

    @property
    def full(self) -> bool:
        """Whether it is time to send, whatever is needed."""
        return self.recorded >= PENDING_MOST

    def boundary(self) -> bool:
        """Whether a second backward pass begins: a loop in eager style then sends what it has, once a step."""
        inside = torch._C._current_autograd_node() is not None  # None outside a backward pass, whatever its stub says
        begins, self._in_backward = inside and not self._in_backward, inside
        if not begins:
            return False
        self.backwards += 1
        return self.backwards > 1

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
        line = user_line()
        for operand in operands:
            if operand.failure is not None:
                raise operand.failure
        specs = tuple(operand.spec for operand in operands)
        key = (op, args, kwargs, kinds, specs)
        facts = self.compiler.facts.get(key)
        if facts is None:
            try:
                facts = infer(partial(Facts, op=op, args=args, kwargs=kwargs), specs, numbers, line)
            except PlanError as error:
                text = str(error).removeprefix("tensors: ")
                raise UnsupportedOperation(f"{op.name()} on {self.chain}: {text}{instead_of(op.name())}") from None
            self.compiler.facts[key] = facts
        step = Step(facts, operands, numbers, next(self._numbers), line)
        self.recorded += 1
        values = tuple(
            None if spec is None else Value(spec, step=step, index=index) for index, spec in enumerate(facts.outs)
        )
        return facts, values

    def request(self) -> Request | None:
        """The Plan of everything that is needed and not there yet; None if nothing is. Changes nothing."""
        cells = [cell for reference in self._pending.values() if (cell := reference()) is not None]
        outputs: dict[int, Value] = {}
        for cell in sorted(cells, key=lambda cell: cell.number):
            value = cell.value
            if value.step is not None and value.failure is None:
                outputs[id(value)] = value
        steps = self._steps(outputs)
        if not steps:
            return None
        position = {id(step): k for k, step in enumerate(steps)}
        inputs: dict[int, tuple[int, Value]] = {}

        def place(value: Value) -> Place:
            if value.step is not None:
                return position[id(value.step)], value.index
            return -1, inputs.setdefault(id(value), (len(inputs), value))[0]

        entries = tuple((step.facts, tuple([place(operand) for operand in step.operands])) for step in steps)
        structure = Structure(
            inputs=tuple(value.spec for _, value in inputs.values()),
            steps=entries,
            outputs=tuple(place(value) for value in outputs.values()),
        )
        numbers = tuple(number for step in steps for number in step.numbers)
        lines = tuple(step.line for step in steps)
        return Request(
            compiled=self.compiler.compiled(structure, numbers, lines),
            inputs=tuple(value for _, value in inputs.values()),
            outputs=tuple(outputs.values()),
            numbers=numbers,
            lines=lines,
        )

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
        value.stored(tensor_id, self._forget)

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
        for value, tensor_id in zip(request.outputs, ids, strict=True):
            self.store(value, tensor_id, now_s)
        self._settle()

    def failed(self, request: Request, failure: RemoteFailure) -> None:
        """The request can't be carried out, ever: whoever uses its outputs is told."""
        for value in request.outputs:
            value.failure = failure
        self._settle()

    def _settle(self) -> None:
        self.recorded = self.backwards = 0
        left = {}
        for number, reference in self._pending.items():
            cell = reference()
            if cell is not None and cell.value.step is not None and cell.value.failure is None:
                left[number] = reference
        self._pending = left


def _reached(outputs: Iterable[Value]) -> list[Step]:
    """The steps that these values need, in the order in which they were recorded."""
    found: dict[int, Step] = {}
    waiting = [value for value in outputs if value.step is not None]
    while waiting:
        value = waiting.pop()
        step = value.step
        if step is None or id(step) in found:
            continue
        if value.failure is not None:
            raise value.failure
        found[id(step)] = step
        waiting += [operand for operand in step.operands if operand.step is not None]
    return sorted(found.values(), key=lambda step: step.number)


def liftable(spec: TensorSpec) -> bool:
    """Whether a number beside a tensor of this spec may become an input: it then has the tensor's dtype."""
    return spec.dtype in FLOATS
