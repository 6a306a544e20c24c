"""The oracle: a circuit on plain integers, all masks zero, and how far that may be from the Plan over the reals."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from sordino_common.errors import LocalError
from sordino_common.spdz.circuit import Cat, Circuit, Gate, Linear, Node, Product, Sum, View

Ints: TypeAlias = npt.NDArray[np.int64]


def local(circuit: Circuit, node: Node, values: Mapping[int, Ints], *, constants: bool) -> Ints:
    """What a local node gives; `constants` False leaves the constants away, as for masks."""
    match node:
        case View(op="gather", operand=operand, args=args):
            flat = np.append(values[operand].ravel(), np.int64(0))
            return flat[np.array(circuit.tables[args[0]], np.int64)].reshape(node.wire.shape)
        case View(op="permute", operand=operand, args=args):
            return values[operand].transpose(args)
        case View(op="expand", operand=operand, args=args):
            return np.broadcast_to(values[operand], args)
        case View(operand=operand, args=args):
            return values[operand].reshape(args)
        case Linear():
            total = np.zeros(node.wire.shape, np.int64)
            for coefficient, wire in node.terms:
                total = total + np.int64(coefficient) * values[wire]
            if constants:
                total = total + np.int64(node.constant)
                if node.table is not None:
                    shape, entries = circuit.constants[node.table]
                    total = total + np.array(entries, np.int64).reshape(shape)
            return total
        case Sum(operand=operand, dims=dims, keepdim=keepdim):
            return np.asarray(values[operand].sum(axis=dims, keepdims=keepdim), np.int64)
        case Cat(operands=operands, dim=dim):
            return np.concatenate([values[wire] for wire in operands], axis=dim)
    raise LocalError(f"{type(node).__name__} is no local node")


def product(kind: Product, a: npt.NDArray[Any], b: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """k A·B in whatever arithmetic the arrays have: int64 wraps, Python integers are exact."""
    made = a * b if kind.kind == "mul" else a @ b
    if kind.reduce:
        made = made.sum(axis=kind.reduce)
    return np.asarray(made * kind.coefficient)


def evaluate(
    circuit: Circuit, inputs: Mapping[tuple[str, str], Ints], rounding: np.random.Generator | None = None
) -> dict[tuple[str, str], Ints]:
    """{(name, role): integers} -> {(name, role): integers}. Gates round down; with `rounding`, up with a chance of the
    part that is cut off, as the protocol does.

    Raises `LocalError` if |z| of a gate leaves its bound, which the stated ranges exclude."""
    values = trace(circuit, inputs, rounding)
    return {(output.name, output.role): values[output.wire] for output in circuit.outputs}


def trace(
    circuit: Circuit, inputs: Mapping[tuple[str, str], Ints], rounding: np.random.Generator | None = None
) -> dict[int, Ints]:
    """As `evaluate`, all wires."""
    values: dict[int, Ints] = {}
    for number, entry in enumerate(circuit.inputs):
        given = inputs[entry.name, entry.role]
        if given.shape != entry.wire.shape or given.dtype != np.int64:
            raise LocalError(
                f"input {entry.name!r}: expected int64 {list(entry.wire.shape)}, got {given.dtype} {given.shape}"
            )
        values[number] = given
    for number, node in enumerate(circuit.nodes, start=len(circuit.inputs)):
        values[number] = (
            _gate(node, number, values, rounding)
            if isinstance(node, Gate)
            else local(circuit, node, values, constants=True)
        )
    return values


def _gate(gate: Gate, number: int, values: Mapping[int, Ints], rounding: np.random.Generator | None) -> Ints:
    z = np.full(gate.wire.shape, gate.addend, np.int64)
    for item in gate.products:
        z = z + product(item, values[item.a], values[item.b])
    for term in gate.terms:
        z = z + np.int64(term.coefficient) * values[term.operand]
    if z.size and int(np.abs(z).max()) >= 1 << gate.bound_bits:
        raise LocalError(f"gate {number} (node {gate.node}): a value of {int(np.abs(z).max()).bit_length()} bits, the "
                         f"bound is {gate.bound_bits}: something has left its stated range")  # fmt: skip
    if rounding is not None:
        z = z + rounding.integers(0, 1 << gate.shift, z.shape, np.int64)
    return z >> gate.shift
