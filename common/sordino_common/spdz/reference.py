"""The oracle: a circuit on plain integers; the same under masks; and how far that may be from the Plan over the reals.

`evaluate` has all masks zero. `masked` follows m and λ of every wire as the protocol defines them, with no shares and
no parties: what it asserts on the way are the identities that the protocol rests on. `error_bounds` is a running error
analysis, element by element: no statistics, no constants to tune.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from sordino_common.errors import LocalError
from sordino_common.spdz.circuit import Cat, Circuit, Gate, Linear, Node, Product, Sum, View, Wire
from sordino_common.spdz.lowering.settings import Lowered

Ints: TypeAlias = npt.NDArray[np.int64]
Floats: TypeAlias = npt.NDArray[np.float64]


def local(circuit: Circuit, node: Node, values: Mapping[int, npt.NDArray[Any]], *, constants: bool) -> npt.NDArray[Any]:
    """What a local node gives; `constants` False leaves the constants away, as for masks."""
    match node:
        case View(op="gather", operand=operand, args=args):
            flat = np.append(values[operand].ravel(), values[operand].dtype.type(0))
            return flat[np.array(circuit.tables[args[0]], np.int64)].reshape(node.wire.shape)
        case View(op="permute", operand=operand, args=args):
            return values[operand].transpose(args)
        case View(op="expand", operand=operand, args=args):
            return np.broadcast_to(values[operand], args)
        case View(operand=operand, args=args):
            return values[operand].reshape(args)
        case Linear():
            total: npt.NDArray[Any] = np.zeros(node.wire.shape, np.int64)
            for coefficient, wire in node.terms:
                total = total + np.int64(coefficient) * values[wire]
            if constants:
                total = total + np.int64(node.constant)
                if node.table is not None:
                    shape, entries = circuit.constants[node.table]
                    total = total + np.array(entries, np.int64).reshape(shape)
            return total
        case Sum(operand=operand, dims=dims, keepdim=keepdim):
            return np.asarray(values[operand].sum(axis=dims, keepdims=keepdim))
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


# --- error -------------------------------------------------------------------------------------------------------


def error_bounds(
    lowered: Lowered, values: Mapping[int, Ints], given: Mapping[tuple[str, str], Floats] | None = None
) -> dict[int, Floats]:
    """Wire -> bound on |wire's value - what the Plan gives over the reals|, in every run of the inputs of which
    `values` is a `trace`, whichever way its gates round.

    Inputs count as exact: they are what they were rounded to; or they are off by at most `given` (by name and role). A
    gate adds to what its operands bring the relative error of its coefficients, the rounding of its constant, and one
    unit in the last place. Operands a, b, for which the Plan has α, β with |a - α| <= e, |b - β| <= d, bring
    |a b - α β| <= |α| d + e |β| + e d; of the trace it is known, too, that it is no further from α, β: |α| is at most
    its own operand and e."""
    circuit = lowered.circuit
    errors = {note.wire: note.error for note in lowered.notes}
    bounds: dict[int, Floats] = {}
    for number, entry in enumerate(circuit.inputs):
        off = np.zeros(entry.wire.shape) if given is None else given[entry.name, entry.role]
        bounds[number] = off
    for number, node in enumerate(circuit.nodes, start=len(circuit.inputs)):
        if isinstance(node, Gate):
            bounds[number] = _gate_bound(circuit, node, errors[number], values, bounds)
        else:
            bounds[number] = _local_bound(circuit, node, bounds)
    return bounds


def _gate_bound(
    circuit: Circuit, gate: Gate, relative: float, values: Mapping[int, Ints], bounds: Mapping[int, Floats]
) -> Floats:
    scale = gate.shift + gate.wire.fraction_bits
    total = np.full(gate.wire.shape, 2.0**-gate.wire.fraction_bits + (2.0**-scale if gate.addend else 0.0))
    slack = relative / (1.0 - relative) + 1e-12
    for item in gate.products:
        a, b = circuit.wire(item.a), circuit.wire(item.b)
        plain = Product(kind=item.kind, a=item.a, b=item.b, coefficient=1, reduce=item.reduce)
        size_a, size_b = _size(values[item.a], a), _size(values[item.b], b)
        c = abs(item.coefficient) * 2.0 ** (a.fraction_bits + b.fraction_bits - scale)
        error = product(plain, size_a, bounds[item.b]) + product(plain, bounds[item.a], size_b)
        error = error + 3.0 * product(plain, bounds[item.a], bounds[item.b])
        total = total + c * ((1.0 + slack) * error + slack * product(plain, size_a, size_b))
    for term in gate.terms:
        wire = circuit.wire(term.operand)
        c = abs(term.coefficient) * 2.0 ** (wire.fraction_bits - scale)
        total = total + c * ((1.0 + slack) * bounds[term.operand] + slack * _size(values[term.operand], wire))
    return total


def _size(value: Ints, wire: Wire) -> Floats:
    return np.abs(value).astype(np.float64) * 2.0**-wire.fraction_bits


def _local_bound(circuit: Circuit, node: Node, bounds: Mapping[int, Floats]) -> Floats:
    if not isinstance(node, Linear):
        return np.asarray(local(circuit, node, bounds, constants=False), np.float64)
    rounded = 0.5 if node.constant or node.table is not None else 0.0
    total = np.full(node.wire.shape, 2 * rounded * 2.0**-node.wire.fraction_bits)
    for coefficient, operand in node.terms:
        scale = 2.0 ** (circuit.wire(operand).fraction_bits - node.wire.fraction_bits)
        total = total + abs(coefficient) * scale * bounds[operand]
    return total


# --- masks -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Masked:
    """x = m - λ."""

    m: Ints
    mask: Ints

    @property
    def x(self) -> Ints:
        return self.m - self.mask


def masked(
    circuit: Circuit,
    inputs: Mapping[tuple[str, str], Ints],
    random: np.random.Generator,
    state: Mapping[tuple[str, str], Masked] | None = None,
) -> dict[int, Masked]:
    """m and λ of every wire. `state`: those of inputs that come from the step before.

    Draws anew what meets the edge of the ring. Raises `LocalError` if a mask or masked value leaves its wire's room, or
    if what the parties and the dealer compute modulo 2^64 is not D."""
    wires: dict[int, Masked] = {}
    for number, entry in enumerate(circuit.inputs):
        key = (entry.name, entry.role)
        if state is not None and key in state:
            wires[number] = state[key]
        else:
            wires[number] = _fresh(inputs[key] << entry.shift, entry.bound_bits, entry.shift, random)[0]
        _require_room(number, entry.wire, wires[number])
    for number, node in enumerate(circuit.nodes, start=len(circuit.inputs)):
        if isinstance(node, Gate):
            wires[number] = _masked_gate(node, number, wires, random)
        else:
            m = local(circuit, node, {k: wire.m for k, wire in wires.items()}, constants=True)
            mask = local(circuit, node, {k: wire.mask for k, wire in wires.items()}, constants=False)
            wires[number] = Masked(m, mask)
        _require_room(number, node.wire, wires[number])
    return wires


def _fresh(z: Ints, bound_bits: int, shift: int, random: np.random.Generator) -> tuple[Masked, Ints, Ints]:
    """D = z + r, drawn until no element meets the edge; (m and λ, D, r)."""
    edge = (1 << 63) - (1 << bound_bits)
    while True:
        r = random.integers(-(1 << 63), (1 << 63) - 1, z.shape, np.int64, endpoint=True)
        exact = np.asarray(z.astype(object) + r.astype(object), object)
        if all(-edge < d < edge for d in exact.ravel()):
            opened = np.asarray(exact, np.int64).reshape(z.shape)
            return Masked(opened >> shift, r >> shift), opened, r


def _masked_gate(gate: Gate, number: int, wires: Mapping[int, Masked], random: np.random.Generator) -> Masked:
    z = np.full(gate.wire.shape, gate.addend, object)
    online = np.full(gate.wire.shape, gate.addend, np.int64)
    gamma = np.zeros(gate.wire.shape, np.int64)
    with np.errstate(over="ignore"):  # NumPy warns of wrapping scalars
        for item in gate.products:
            a, b = wires[item.a], wires[item.b]
            z = z + product(item, a.x.astype(object), b.x.astype(object))
            online = online + product(item, a.m, b.m) - product(item, a.m, b.mask) - product(item, a.mask, b.m)
            gamma = gamma + product(item, a.mask, b.mask)
        for term in gate.terms:
            wire = wires[term.operand]
            z = z + term.coefficient * wire.x.astype(object)
            online = online + np.int64(term.coefficient) * wire.m
            gamma = gamma - np.int64(term.coefficient) * wire.mask
    z = np.asarray(z, object)
    if any(abs(value) >= 1 << gate.bound_bits for value in z.ravel()):
        raise LocalError(f"gate {number}: a value leaves its bound of {gate.bound_bits} bits")
    result, opened, r = _fresh(np.asarray(z, np.int64).reshape(gate.wire.shape), gate.bound_bits, gate.shift, random)
    with np.errstate(over="ignore"):
        same = np.array_equal(online + (gamma + r), opened)
    if not same:
        raise LocalError(f"gate {number}: the shares' sum is not D")
    return result


def _require_room(number: int, wire: Wire, value: Masked) -> None:
    for what, array in (("masked value", value.m), ("mask", value.mask)):
        if array.size and max(abs(int(array.max())), abs(int(array.min()))) > wire.room:
            raise LocalError(f"wire {number}: a {what} leaves its room of {wire.room}")
