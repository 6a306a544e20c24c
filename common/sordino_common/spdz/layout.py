"""Where each root and gate stands in the flat arrays of a step, and the local functions between gates.

Dealer and parties lay out a step alike: the masks of all roots one after the other (ascending wire numbers), and the
openings of all gates by round. A flat array costs one expansion of a seed instead of one per tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from sordino_common.ring.fp_core import FP_BYTES
from sordino_common.spdz.circuit import Cat, Circuit, Gate, Linear, Sum, View
from sordino_common.spdz.tagging import Tagging, tagging_of

I64 = npt.NDArray[np.int64]
Array = npt.NDArray[Any]
Values = list[Any]
Local = Callable[[Values], Array]


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """`roots`, `gates`: wire -> its slice of the flat array. `rounds`: the slice of the gates' array that opens in each
    round. `stages[r]`: local nodes, in order, that can be computed once r rounds have opened. `tagging`: what a step is
    checked with."""

    circuit: Circuit
    roots: Mapping[int, slice]
    gates: Mapping[int, slice]
    rounds: tuple[slice, ...]
    root_elements: int
    gate_elements: int
    stages: tuple[tuple[int, ...], ...]
    tagging: Tagging

    def preprocessing_bytes(self, *, active: bool) -> int:
        """Bytes of one step's correction: a ring element for every element of roots and gates, and if active the tags,
        elements of F_p. The other parties' shares come from seeds."""
        tags = FP_BYTES * self.tagging.tags if active else 0
        return 8 * (self.root_elements + self.gate_elements) + tags


def layout_of(circuit: Circuit) -> Layout:
    roots: dict[int, slice] = {}
    end = 0
    for number in circuit.roots:
        roots[number] = slice(end, end + circuit.wire(number).numel)
        end = roots[number].stop
    root_elements = end
    gates: dict[int, slice] = {}
    rounds: list[slice] = []
    end = 0
    for opened in circuit.rounds:
        start = end
        for number in opened:
            gates[number] = slice(end, end + circuit.wire(number).numel)
            end = gates[number].stop
        rounds.append(slice(start, end))
    return Layout(
        circuit=circuit,
        roots=roots,
        gates=gates,
        rounds=tuple(rounds),
        root_elements=root_elements,
        gate_elements=end,
        stages=_stages(circuit),
        tagging=tagging_of(circuit),
    )


def _stages(circuit: Circuit) -> tuple[tuple[int, ...], ...]:
    levels = [0] * len(circuit.inputs)
    stages: list[list[int]] = [[] for _ in range(len(circuit.rounds) + 1)]
    for number, node in enumerate(circuit.nodes, start=len(circuit.inputs)):
        if isinstance(node, Gate):
            levels.append(node.round + 1)
            continue
        level = max((levels[operand] for operand in operands_of(node)), default=0)
        levels.append(level)
        stages[level].append(number)
    return tuple(tuple(stage) for stage in stages)


def operands_of(node: View | Linear | Sum | Cat) -> tuple[int, ...]:
    match node:
        case View() | Sum():
            return (node.operand,)
        case Linear():
            return tuple(wire for _, wire in node.terms)
        case Cat():
            return node.operands


def local_functions(circuit: Circuit) -> Mapping[int, Local]:
    """Wire -> what computes its λ from those before it, for the dealer (parties: `calls`). Constants are in m only."""
    functions: dict[int, Local] = {}
    tables = [np.array(table, dtype=np.int64) for table in circuit.tables]
    for number, node in enumerate(circuit.nodes, start=len(circuit.inputs)):
        match node:
            case View():
                functions[number] = _view_function(node, tables)
            case Linear():
                functions[number] = _linear_function(node)
            case Sum():
                functions[number] = _sum_function(node)
            case Cat():
                functions[number] = _cat_function(node)
            case Gate():
                pass
    return functions


def _view(node: View, array: Array, tables: list[I64]) -> Array:
    match node.op:
        case "view":
            return array.reshape(node.wire.shape)
        case "permute":
            return array.transpose(node.args)
        case "expand":
            return np.broadcast_to(array, node.wire.shape)
        case "gather":
            padded = np.append(array.reshape(-1), array.dtype.type(0))
            taken: Array = padded[tables[node.args[0]]]
            return taken.reshape(node.wire.shape)


def _view_function(node: View, tables: list[I64]) -> Local:
    operand = node.operand
    return lambda values: _view(node, values[operand], tables)


def _linear_function(node: Linear) -> Local:
    shape, terms = node.wire.shape, node.terms

    def linear(values: Values) -> Array:
        out: Array | None = None
        for coefficient, wire in terms:
            if out is None:
                out = np.array(values[wire] * np.int64(coefficient))
            elif coefficient == 1:
                np.add(out, values[wire], out=out)
            elif coefficient == -1:
                np.subtract(out, values[wire], out=out)
            else:
                np.add(out, values[wire] * np.int64(coefficient), out=out)
        if out is None:
            out = np.zeros(shape, dtype=np.int64)
        return np.asarray(out)

    return linear


def _sum_function(node: Sum) -> Local:
    operand, dims, keepdim = node.operand, node.dims, node.keepdim
    if not dims:
        return lambda values: values[operand]
    return lambda values: np.asarray(values[operand].sum(axis=dims, keepdims=keepdim, dtype=np.int64))


def _cat_function(node: Cat) -> Local:
    operands, dim = node.operands, node.dim
    return lambda values: np.concatenate([values[operand] for operand in operands], axis=dim)
