"""Arithmetic laid out beforehand: calls on arrays that stay where they are, whatever they hold.

A step does the same to arrays of the same shapes as the step before. So the arrays are made once, and all that can be
decided (views, back ends, constants) is decided once; what is left for a step is a row of calls without arguments,
nearly all of them one ufunc (a copy is `np.positive`: `np.copyto` costs twice the call). Everything is modulo 2^64.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from sordino_common.ring.limbs import Workspace
from sordino_common.ring.matmul import matmul_calls
from sordino_common.spdz.circuit import Cat, Circuit, Linear, Sum, View

I64 = npt.NDArray[np.int64]
Call = Callable[[], object]
# (array, axes, dtype, out, keepdims); its overloads can't be had of a `partial`.
ADD_UP: Callable[..., object] = np.add.reduce


class Scratch:
    """Memory for what lives within one gate's or node's calls: the same for all. `elements`: of the largest."""

    def __init__(self, elements: int, *, slots: int) -> None:
        self._memory = np.empty((slots, elements), dtype=np.int64)
        self.workspace = Workspace()

    def take(self, slot: int, shape: tuple[int, ...]) -> I64:
        """Void when the slot is taken again."""
        return self._memory[slot, : int(np.prod(shape, dtype=np.int64))].reshape(shape)


def add_multiple(out: I64, multiple: int, array: I64, scratch: I64) -> list[Call]:
    """out += multiple · array. `scratch`, of the array's shape, may be the array itself, which is then lost."""
    if multiple == 1:
        return [partial(np.add, out, array, out)]
    if multiple == -1:
        return [partial(np.subtract, out, array, out)]
    return [partial(np.multiply, array, constant(multiple), scratch), partial(np.add, out, scratch, out)]


def constant(value: int) -> I64:
    return np.array(value, dtype=np.int64)


def product_calls(a: I64, b: I64, out: I64, scratch: Scratch, slot: int) -> list[Call]:
    """out = a b, matrices. `slot`, and the next: for what has to be copied on the way."""
    return matmul_calls(
        a, b, out, workspace=scratch.workspace, room=lambda number, shape: scratch.take(slot + number, shape)
    )


class Locals:
    """The local nodes of a circuit. Each method gives the array that a node's values are in, and the calls that write
    them when those of the operands are written: none if the array is a view."""

    def __init__(self, circuit: Circuit, scratch: Scratch) -> None:
        self._scratch = scratch
        self._tables = [np.array(table, dtype=np.int64) for table in circuit.tables]
        self._constants = [np.array(flat, dtype=np.int64).reshape(shape) for shape, flat in circuit.constants]

    def of(self, node: View | Linear | Sum | Cat, values: Sequence[Any]) -> tuple[I64, list[Call]]:
        match node:
            case View():
                return self.view(node, values[node.operand])
            case Linear():
                return self._linear(node, values)
            case Sum():
                return self._sum(node, values[node.operand])
            case Cat():
                out = _new(node.wire.shape)
                return out, [partial(np.concatenate, [values[operand] for operand in node.operands], node.dim, out)]

    def view(self, node: View, array: I64) -> tuple[I64, list[Call]]:
        match node.op:
            case "permute":
                return array.transpose(node.args), []
            case "expand":
                return np.broadcast_to(array, node.wire.shape), []
            case "view":
                if array.flags.c_contiguous:
                    return array.reshape(node.wire.shape), []
                out = _new(node.wire.shape)
                return out, [partial(np.positive, array, out.reshape(array.shape))]
            case "gather":
                out, padded = _new(node.wire.shape), np.zeros(array.size + 1, dtype=np.int64)
                fill = partial(np.positive, array, padded[:-1].reshape(array.shape))
                return out, [fill, partial(padded.take, self._tables[node.args[0]], None, out.reshape(-1))]

    def _linear(self, node: Linear, values: Sequence[Any]) -> tuple[I64, list[Call]]:
        out = _new(node.wire.shape)
        calls: list[Call] = []
        terms = list(node.terms)
        if len(terms) > 1 and terms[0][0] == terms[1][0] == 1:
            calls.append(partial(np.add, values[terms[0][1]], values[terms[1][1]], out))
            del terms[:2]
        elif terms:
            coefficient, wire = terms.pop(0)
            calls.append(partial(np.multiply, values[wire], constant(coefficient), out))
        else:
            calls.append(partial(out.fill, 0))
        for coefficient, wire in terms:
            calls += add_multiple(out, coefficient, values[wire], self._scratch.take(0, out.shape))
        if node.table is not None:
            calls.append(partial(np.add, out, self._constants[node.table], out))
        if node.constant:
            calls.append(partial(np.add, out, constant(node.constant), out))
        return out, calls

    def _sum(self, node: Sum, array: I64) -> tuple[I64, list[Call]]:
        if not node.dims:
            return array, []
        out = _new(node.wire.shape)
        return out, [partial(ADD_UP, array, node.dims, np.int64, out, node.keepdim)]


def _new(shape: tuple[int, ...]) -> I64:
    return np.empty(shape, dtype=np.int64)
