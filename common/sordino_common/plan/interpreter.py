"""`NumpyProgram`: a Plan made ready to run on NumPy alone.

Everything that does not depend on the data is done once: kernels are chosen and their scalars bound, values get their
slots, and every node becomes one closure that reads slots, writes slots and empties those that nobody needs any more.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final, TypeAlias

import numpy as np

from sordino_common.errors import LimitExceeded, PlanError
from sordino_common.plan.analysis import PlanCost
from sordino_common.plan.arrays import NdArray, to_numpy
from sordino_common.plan.ops import OPS, resolve
from sordino_common.plan.validation import validate_plan
from sordino_common.plan.values import Plan, PlanLimits, refs

# A program is made from a Plan that `decode_plan` has held against the device's own limits already, or from one that
# was just traced; here it is validated again for its shapes and references, not for its size.
UNBOUNDED: Final = PlanLimits(
    nodes=1 << 31,
    entries=1 << 31,
    value_bytes=1 << 62,
    peak_bytes=1 << 62,
    flops=1 << 200,
    encoded_bytes=1 << 62,
)

_Values: TypeAlias = list[Any]
_Step: TypeAlias = Callable[[_Values], None]


class NumpyProgram:
    """Runs a Plan. Reusable and without state between runs; raises `PlanError` if the Plan is not valid."""

    def __init__(self, plan: Plan) -> None:
        self.plan: Final = plan
        self.cost: Final[PlanCost] = validate_plan(plan, UNBOUNDED)
        specs = plan.specs()
        self._inputs = [(entry.spec.shape, np.dtype(entry.spec.dtype)) for entry in plan.inputs]
        self._template: _Values = [None] * len(specs)
        for number, constant in enumerate(plan.constants, start=len(plan.inputs)):
            self._template[number] = to_numpy(constant)
        self._steps: list[_Step] = []
        first = plan.first_node_value()
        for node, dead in zip(plan.nodes, self.cost.dead_after, strict=True):
            fn = OPS[node.op].kernel(node.outs, *resolve(node.args, specs))
            ins = tuple(number for arg in node.args for number in refs(arg))
            self._steps.append(_make_step(fn, ins, tuple(range(first, first + len(node.outs))), dead))
            first += len(node.outs)
        self._outputs = [(entry.value, copy) for entry, copy in zip(plan.outputs, self.cost.copied, strict=True)]

    def run(
        self,
        inputs: Sequence[NdArray],
        *,
        check: Callable[[], None] | None = None,
        own: bool = True,
        quiet: bool = False,
    ) -> list[NdArray]:
        """The outputs, each an array of its own. `inputs` in the Plan's order, of exactly its dtypes and shapes.

        With `own=False` they are for reading only, and may share memory with one another and with the inputs.
        `check` is called before every node and may raise to stop the run. `quiet` says that the caller has turned
        NumPy's floating-point warnings off already, once for many runs (a tenth of a small model's step). Raises
        `PlanError` on wrong inputs and on an index out of range, `LimitExceeded` if the machine has no memory left.
        Arithmetic follows IEEE: infinities and NaN are values, not errors."""
        check_inputs(self.plan, self._inputs, inputs)
        values = self._template.copy()
        values[: len(inputs)] = inputs
        if quiet:
            self._fill(values, check)
        else:
            with np.errstate(all="ignore"):
                self._fill(values, check)
        if not own:
            return [np.asarray(values[number]) for number, _ in self._outputs]
        return [_own(values[number], copy) for number, copy in self._outputs]

    def _fill(self, values: _Values, check: Callable[[], None] | None) -> None:
        """Run all nodes."""
        step: _Step | None = None
        try:
            for step in self._steps:
                if check is not None:
                    check()
                step(values)
        except (PlanError, MemoryError) as error:
            index = -1 if step is None else self._steps.index(step)
            if isinstance(error, PlanError):
                raise PlanError(f"node {index}: {error}") from None
            raise LimitExceeded(f"node {index} ({self.plan.nodes[index].op}): no memory left") from None


def check_inputs(
    plan: Plan, expected: Sequence[tuple[tuple[int, ...], np.dtype[Any]]], inputs: Sequence[NdArray]
) -> None:
    """`PlanError`, naming the input, unless the arrays are what the Plan declares."""
    if len(inputs) != len(expected):
        raise PlanError(f"Plan {plan.name!r} takes {len(expected)} inputs, got {len(inputs)}")
    for index, (shape, dtype) in enumerate(expected):
        array = inputs[index]
        # Equal dtypes are mostly one object, and that is the cheaper question.
        if array.shape != shape or (array.dtype is not dtype and array.dtype != dtype):
            entry = plan.inputs[index]
            raise PlanError(
                f"Plan {plan.name!r}, input {entry.name!r}: expected {entry.spec}, got {array.dtype}{list(array.shape)}"
            )


def _own(value: Any, copy: bool) -> NdArray:
    """The value as an array that shares nothing and can be written to."""
    array = np.asarray(value)
    return array.copy(order="C") if copy or not array.flags.writeable else array


def _make_step(fn: Callable[..., Any], ins: tuple[int, ...], outs: tuple[int, ...], dead: tuple[int, ...]) -> _Step:
    """One node as a closure, special-cased by the number of its operands: they are most of a small step's overhead."""
    if len(outs) != 1:
        return _general_step(fn, ins, outs, dead)
    (out,) = outs
    if len(ins) == 1:
        (a,) = ins

        def unary(values: _Values) -> None:
            values[out] = fn(values[a])
            for number in dead:
                values[number] = None

        return unary
    if len(ins) == 2:
        a, b = ins

        def binary(values: _Values) -> None:
            values[out] = fn(values[a], values[b])
            for number in dead:
                values[number] = None

        return binary

    def many(values: _Values) -> None:
        values[out] = fn(*[values[number] for number in ins])
        for number in dead:
            values[number] = None

    return many


def _general_step(fn: Callable[..., Any], ins: tuple[int, ...], outs: tuple[int, ...], dead: tuple[int, ...]) -> _Step:
    start, stop = (outs[0], outs[-1] + 1) if outs else (0, 0)

    def step(values: _Values) -> None:
        values[start:stop] = fn(*[values[number] for number in ins])
        for number in dead:
            values[number] = None

    return step
