"""A committee's steps, recorded as an agent's are. What no shares can compute is refused when it is recorded."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from sordino_common.errors import PlanError
from sordino_common.spdz.lowering import LoweringError, Settings
from sordino_common.spdz.lowering.walk import draw
from sordino_server.tensors.compile import Compiler, Place, Structure
from sordino_server.tensors.errors import RemoteFailure, UnsupportedOperation
from sordino_server.tensors.lines import user_line
from sordino_server.tensors.ops import instead_of
from sordino_server.tensors.recorder import Recorder, Scope
from sordino_server.tensors.shared.kept import SharedCell
from sordino_server.tensors.shared.program import in_our_words, single_step
from sordino_server.tensors.values import Cell, Facts, Key, Value
from sordino_server.trace.origins import Origin


@dataclass(frozen=True, slots=True, kw_only=True)
class SharedRequest:
    """One program: what it reads and makes. `carried`: for each output the input whose memory it is written into, -1
    for none; `written`: that memory, by the input's number. `left`: as a `Request`'s."""

    structure: Structure
    inputs: tuple[Value, ...]
    outputs: tuple[Value, ...]
    carried: tuple[int, ...]
    written: dict[int, SharedCell]
    numbers: tuple[float, ...]
    lines: tuple[Origin, ...]
    interval: float | None
    left: tuple[weakref.ref[Cell], ...]


class SharedRecorder(Recorder):
    """What waits for the committee `name`, whose tensors' chain is `chain`."""

    def __init__(self, name: str, chain: str, compiler: Compiler) -> None:
        super().__init__(name, compiler)
        self.chain = chain
        self.interval: float | None = None  # where the polynomial activations of what waits were fitted
        self._computable: set[int] = set()  # ids of facts that shares can compute
        self._public: set[int] = set()

    def cell(self, value: Value) -> SharedCell:
        cell = SharedCell(value, next(self._numbers), self.backward >= 0)
        if value.step is not None:
            self._pending[cell.number] = weakref.ref(cell)
        return cell

    def write(self, cell: Cell, value: Value) -> None:
        assert isinstance(cell, SharedCell)
        if cell.value.step is None:
            cell.base = cell.value
        super().write(cell, value)

    def note_interval(self, interval: float) -> None:
        """A polynomial that was fitted on |z| <= interval is part of what waits."""
        self.interval = interval if self.interval is None else min(self.interval, interval)

    def apply(
        self,
        op: Any,
        args: Key,
        kwargs: tuple[tuple[str, Any], ...],
        operands: tuple[Value, ...],
        numbers: tuple[float, ...],
        kinds: Key,
    ) -> tuple[Facts, tuple[Value | None, ...]]:
        facts, values = super().apply(op, args, kwargs, operands, numbers, kinds)
        if id(facts) not in self._computable:  # the compiler keeps facts for ever
            self._require_computable(facts, operands, numbers)
        return facts, values

    def knows(self, facts: Facts) -> bool:
        return id(facts) in self._computable

    def _require_computable(self, facts: Facts, operands: Sequence[Value], numbers: Sequence[float]) -> None:
        if any(operand.step is not None and not operand.step.operands for operand in operands):
            return  # an operand is public, perhaps: the whole program will tell
        line = user_line().origin
        try:
            plan = single_step(facts, [operand.spec for operand in operands], numbers, line)
            draw(plan, Settings(), frozenset())
        except LoweringError as error:
            why = in_our_words(str(error)).partition(": ")[2]
            raise UnsupportedOperation(
                f"{line}: {facts.op.name()} on {self.chain}: {why or error}{instead_of(facts.op.name())}"
            ) from None
        except PlanError as error:
            raise UnsupportedOperation(f"{line}: {facts.op.name()} on {self.chain}: {error}") from None
        self._computable.add(id(facts))

    def shared_request(
        self, scope: Scope = "all", asked: Value | None = None, *, only: Value | None = None
    ) -> SharedRequest | None:
        """The program of everything that is due and not there yet, as `request`'s; or of `only`. None if nothing is."""
        outputs: dict[int, Value] = {}
        left: list[weakref.ref[Cell]] = []
        if only is None:
            outputs, left = self._due(scope, asked)
        else:
            outputs[id(only)] = only
        holders: dict[int, list[SharedCell]] = {}
        for _, reference in sorted(self._pending.items()):
            cell = reference()
            if cell is not None and id(cell.value) in outputs:
                assert isinstance(cell, SharedCell)
                holders.setdefault(id(cell.value), []).append(cell)
        steps = self._steps(outputs)
        if not steps:
            return self.shared_request("all") if scope == "step" and only is None else None
        position = {id(step): k for k, step in enumerate(steps)}
        inputs: dict[int, tuple[int, Value]] = {}

        def place(value: Value) -> Place:
            if value.step is not None:
                return position[id(value.step)], value.index
            return -1, inputs.setdefault(id(value), (len(inputs), value))[0]

        entries = tuple((step.facts, tuple([place(operand) for operand in step.operands])) for step in steps)
        places = tuple(place(value) for value in outputs.values())
        written: dict[int, SharedCell] = {}
        carried: list[int] = []
        for value in outputs.values():
            source = -1
            for cell in holders.get(id(value), ()):
                found = inputs.get(id(cell.base)) if cell.base is not None else None
                if found is not None and found[0] not in written and found[1].spec == value.spec:
                    source = found[0]
                    written[source] = cell
                    break
            carried.append(source)
        return SharedRequest(
            structure=Structure(
                inputs=tuple(value.spec for _, value in inputs.values()), steps=entries, outputs=places
            ),
            inputs=tuple(value for _, value in inputs.values()),
            outputs=tuple(outputs.values()),
            carried=tuple(carried),
            written=written,
            numbers=tuple(number for step in steps for number in step.numbers),
            lines=tuple(step.line.origin for step in steps),
            interval=self.interval,
            left=tuple(left),
        )

    def kept(self, request: SharedRequest, ids: Iterable[bytes], now_s: float) -> None:
        """The program has run: its outputs are kept under these ids."""
        for cell in request.written.values():
            cell.base = None
        for value, tensor_id in zip(request.outputs, ids, strict=True):
            self.store(value, tensor_id, now_s)
        self._waited(request.left)
        self._settled()

    def nothing_due(self) -> None:
        self._settled()

    def gave_up(self, request: SharedRequest, failure: RemoteFailure) -> None:
        """It can't run, ever: whoever uses its outputs is told."""
        for value in request.outputs:
            value.failure = failure
        self._settled()

    def _settled(self) -> None:
        self._settle()
        if not self._pending:
            self.interval = None
