"""Lazy values: Σ c (wire | pending product) + constant, with real c. Nothing is opened until a wire is needed.

A value becomes a wire when it is an operand of a product, goes through an operation on positions that a pending product
can't go through, or is an output. Coefficients (a learning rate, 1/N) flow on to the truncation that is due anyway:
`to_wire` gives a wire and the coefficient that it stands for.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final, Literal, TypeAlias

import numpy as np

from sordino_common.spdz.circuit import ProductKind
from sordino_common.spdz.lowering.sketch import UNSTATED, Factor, Floats, Opened, Shape, Sketch

_SMALL: Final = 64  # integer ratios up to this are applied by a local sum
_SAME: Final = 1e-12  # two coefficients this close are one
_SMALL_EXPONENT: Final = -4  # coefficients up to 1/16 are taken out; above that they cost the value few digits
_DECAY: Final = 2.0**-4  # a carried value's coefficient this near to an integer is split: integer outside, rest inside


@dataclass(frozen=True, slots=True)
class Step:
    """A view or permutation of a pending product's entries: `args` as in `circuit.View`, from shape `before`."""

    op: Literal["view", "permute"]
    args: tuple[int, ...]
    before: Shape

    @property
    def after(self) -> Shape:
        return self.args if self.op == "view" else tuple(self.before[dim] for dim in self.args)

    def apply(self, sketch: Sketch, wire: int) -> int:
        return sketch.view(wire, self.args) if self.op == "view" else sketch.permute(wire, self.args)

    def undo(self, sketch: Sketch, wire: int) -> int:
        if self.op == "view":
            return sketch.view(wire, self.before)
        inverse = sorted(range(len(self.args)), key=lambda dim: self.args[dim])
        return sketch.permute(wire, tuple(inverse))


@dataclass(frozen=True, slots=True)
class Pending:
    """A·B, not opened yet. `raw`: the product's own shape; `chain`: what is done to its entries afterwards."""

    kind: ProductKind
    a: int
    b: int
    reduce: tuple[int, ...]
    raw: Shape
    chain: tuple[Step, ...] = ()

    @property
    def shape(self) -> Shape:
        return self.chain[-1].after if self.chain else self.raw


Atom: TypeAlias = int | Pending


@dataclass(frozen=True, slots=True, kw_only=True)
class Lazy:
    """A secret value. `constant`: a number, or a public tensor of the value's shape."""

    shape: Shape
    terms: tuple[tuple[float, Atom], ...]
    constant: float | Floats = 0.0

    @property
    def pending(self) -> bool:
        return any(isinstance(atom, Pending) for _, atom in self.terms)


def of_wire(sketch: Sketch, wire: int, coefficient: float = 1.0) -> Lazy:
    return Lazy(shape=sketch.shape(wire), terms=((coefficient, wire),))


def of_product(pending: Pending, coefficient: float) -> Lazy:
    return Lazy(shape=pending.shape, terms=((coefficient, pending),))


def scaled(value: Lazy, factor: float) -> Lazy:
    if factor == 1.0:
        return value
    terms = tuple((factor * c, atom) for c, atom in value.terms) if factor else ()
    return replace(value, terms=terms, constant=_plain(factor * value.constant))


def _divided(value: Lazy, base: float) -> Lazy:
    """value / base; a coefficient that equals `base` becomes exactly 1."""
    return replace(
        value, terms=tuple((c / base, atom) for c, atom in value.terms), constant=_plain(value.constant / base)
    )


def added(values: Sequence[Lazy]) -> Lazy:
    """Σ of values of one shape."""
    merged: dict[Atom, float] = {}
    constant: float | Floats = 0.0
    for value in values:
        constant = _plain(constant + value.constant)
        for c, atom in value.terms:
            merged[atom] = merged.get(atom, 0.0) + c
    return Lazy(shape=values[0].shape, terms=tuple((c, atom) for atom, c in merged.items() if c), constant=constant)


def shifted(value: Lazy, constant: float | Floats) -> Lazy:
    """value + constant."""
    return replace(value, constant=_plain(value.constant + constant))


def stepped(sketch: Sketch, value: Lazy, op: Literal["view", "permute"], args: tuple[int, ...]) -> Lazy:
    """A view or permutation: applied to wires now, to pending products when they are opened."""
    step = Step(op, args, value.shape)
    terms: list[tuple[float, Atom]] = []
    for c, atom in value.terms:
        if isinstance(atom, Pending):
            terms.append((c, replace(atom, chain=_shorter((*atom.chain, step)))))
        else:
            terms.append((c, step.apply(sketch, atom)))
    constant = value.constant
    if isinstance(constant, np.ndarray):
        constant = constant.reshape(args) if op == "view" else constant.transpose(args)
    return Lazy(shape=step.after, terms=tuple(terms), constant=constant)


def moved(sketch: Sketch, value: Lazy, apply: Any, shape: Shape, move: Any) -> Lazy:
    """An operation on positions: `apply(wire) -> wire` on wires, `move(array) -> array` on a public tensor. Products
    are opened first, all of the value as one gate."""
    if value.pending:
        value = as_lazy_wire(sketch, value)
    terms: tuple[tuple[float, Atom], ...] = tuple(
        (c, apply(atom)) for c, atom in value.terms if not isinstance(atom, Pending)
    )
    constant = value.constant
    if isinstance(constant, np.ndarray) or move is not None:
        constant = _uniform(move(np.broadcast_to(np.asarray(constant, np.float64), value.shape)))
    return added([Lazy(shape=shape, terms=terms, constant=constant)])


def summed(sketch: Sketch, value: Lazy, dims: tuple[int, ...]) -> Lazy:
    """The sum over `dims`, which go. A product of matrices is summed before it is multiplied, a product of elements
    as part of its gate."""
    shape = tuple(size for dim, size in enumerate(value.shape) if dim not in dims)
    count = math.prod(value.shape[dim] for dim in dims)
    constant = value.constant
    constant = _fsum(constant, dims) if isinstance(constant, np.ndarray) else constant * count
    terms: list[tuple[float, Atom]] = []
    rest: list[tuple[float, Atom]] = []
    for c, atom in value.terms:
        folded = _folded(sketch, atom, dims) if isinstance(atom, Pending) else sketch.summed(atom, dims)
        (rest if folded is None else terms).append((c, atom if folded is None else folded))
    if rest:
        opened = as_lazy_wire(sketch, Lazy(shape=value.shape, terms=tuple(rest)))
        terms += [(c, sketch.summed(atom, dims)) for c, atom in opened.terms if not isinstance(atom, Pending)]
    return added([Lazy(shape=shape, terms=tuple(terms), constant=constant)])


def _folded(sketch: Sketch, pending: Pending, dims: tuple[int, ...]) -> Pending | None:
    """Σ over dims of the product as a product, if it is one."""
    flat = _unchained(sketch, pending)
    if flat is None or flat.reduce:
        return None
    if flat.kind == "mul":
        raw = tuple(size for dim, size in enumerate(flat.raw) if dim not in dims)
        return replace(flat, reduce=dims, raw=raw)
    rows, columns = len(flat.raw) - 2, len(flat.raw) - 1
    if not set(dims) <= {rows, columns}:
        return None
    a, b = flat.a, flat.b
    if rows in dims:
        a = sketch.view(sketch.summed(a, (rows,)), (*sketch.shape(a)[:rows], 1, sketch.shape(a)[columns]))
    if columns in dims:
        b = sketch.view(sketch.summed(b, (columns,)), (*sketch.shape(b)[:columns], 1))
    raw = (*flat.raw[:rows], 1 if rows in dims else flat.raw[rows], 1 if columns in dims else flat.raw[columns])
    kept = tuple(size for dim, size in enumerate(flat.raw) if dim not in dims)
    return Pending(flat.kind, a, b, (), raw, (Step("view", kept, raw),))


def _unchained(sketch: Sketch, pending: Pending) -> Pending | None:
    """The same product with its steps pushed into the operands, if that can be done."""
    if not pending.chain:
        return pending
    if pending.kind == "mul" and not pending.reduce:
        a, b = pending.a, pending.b
        for step in pending.chain:
            a, b = step.apply(sketch, a), step.apply(sketch, b)
        return Pending("mul", min(a, b), max(a, b), (), pending.shape)
    swap = (*range(len(pending.raw) - 2), len(pending.raw) - 1, len(pending.raw) - 2)
    if pending.kind != "mul" and len(pending.chain) == 1 and pending.chain[0].op == "permute":
        if pending.chain[0].args != swap:
            return None
        return Pending(
            pending.kind, sketch.permute(pending.b, swap), sketch.permute(pending.a, swap), (), pending.shape
        )
    return None


# --- from lazy to wire -------------------------------------------------------------------------------------------


def as_lazy_wire(sketch: Sketch, value: Lazy) -> Lazy:
    """The same value with no pending product: a coefficient and one wire (or a constant alone)."""
    if not value.terms:
        return value
    base, wire = to_wire(sketch, value)
    return of_wire(sketch, wire, base)


def to_wire(sketch: Sketch, value: Lazy) -> tuple[float, int]:
    """(c, wire) with value = c · wire. A gate is made only if the value is no small integer combination of wires."""
    if not value.terms:
        constant = value.constant
        if not isinstance(constant, np.ndarray):
            constant = np.full(value.shape, constant)
        return 1.0, sketch.public(constant)
    local = _local(sketch, value)
    if local is not None:
        return local
    base = _base(value)
    return base, _gate(sketch, _divided(value, base))


def to_output(sketch: Sketch, value: Lazy, *, carried: bool, cap: float = UNSTATED, change: float = UNSTATED) -> int:
    """The wire of exactly this value, |value| <= cap. `carried`: it is a parameter or state of the next step, and near
    to a wire of this one; wires with integer coefficients are then added after the gate, whose bound is that of the
    change (`change`)."""
    if not value.terms:
        return to_wire(sketch, value)[1]
    local = _local(sketch, value)
    if local is not None:
        base, wire = local
        if base == 1.0:
            return wire
        if base == int(base) and abs(base) <= _SMALL:
            return sketch.combined([(int(base), wire)], 0.0, None, value.shape)
    inside: list[tuple[float, Atom]] = []
    outside: list[tuple[int, int]] = []
    for c, atom in value.terms:
        whole = round(c)
        if not carried or isinstance(atom, Pending) or whole == 0 or abs(c - whole) > _DECAY or abs(whole) > _SMALL:
            inside.append((c, atom))
            continue
        outside.append((whole, atom))
        if abs(c - whole) > _SAME:
            inside.append((c - whole, atom))
    if not inside:
        whole_constant, table = _parts(value.constant)
        return sketch.combined(outside, whole_constant, table, value.shape)
    gate = _gate(sketch, replace(value, terms=tuple(inside)))
    sketch.cap(gate, change if outside else cap)
    return sketch.combined([*outside, (1, gate)], 0.0, None, value.shape) if outside else gate


def _local(sketch: Sketch, value: Lazy) -> tuple[float, int] | None:
    """(c, wire) if no gate is needed: all terms are wires (or products that are open already), all coefficients small
    multiples of one of them."""
    wires: list[tuple[float, int]] = []
    for c, atom in value.terms:
        if isinstance(atom, Pending):
            known = sketch.find(Opened((_factor(1.0, atom),), ()), atom.raw)
            if known is None:
                return None
            for step in atom.chain:
                known = step.apply(sketch, known)
            wires.append((c, known))
        else:
            wires.append((c, atom))
    base = min((c for c, _ in wires), key=abs)
    ratios = [c / base for c, _ in wires]
    if any(abs(ratio - round(ratio)) > _SAME * abs(ratio) or abs(ratio) > _SMALL for ratio in ratios):
        return None
    constant, table = _parts(value.constant)
    wire = sketch.combined(
        [(round(ratio), wire) for ratio, (_, wire) in zip(ratios, wires, strict=True)],
        constant / base,
        None if table is None else table / base,
        value.shape,
    )
    return base, wire


def _base(value: Lazy) -> float:
    """What is taken out of a value before it is opened: the coefficient of a lone product; otherwise, where all
    coefficients are small, the power of two that brings the largest to at least 1/2: small gradients keep their
    digits."""
    if len(value.terms) == 1 and _zero(value.constant):
        return value.terms[0][0]
    exponent = math.frexp(max(abs(c) for c, _ in value.terms))[1]
    return math.ldexp(1.0, exponent) if exponent <= _SMALL_EXPONENT else 1.0


def _gate(sketch: Sketch, value: Lazy) -> int:
    """Open `value`, coefficient 1: one gate for the pending products that share a shape, others before it."""
    chosen = _chain(sketch, value)
    products: list[Factor] = []
    terms: list[tuple[float, int]] = []
    raw = chosen[0].before if chosen else value.shape
    for c, atom in value.terms:
        if isinstance(atom, Pending):
            fitted = _fitted(sketch, atom, chosen)
            if fitted is not None:
                products.append(_factor(c, fitted))
                continue
            base, wire = to_wire(sketch, Lazy(shape=atom.shape, terms=((1.0, atom),)))
            c *= base
        else:
            wire = atom
        for step in reversed(chosen):
            wire = step.undo(sketch, wire)
        terms.append((c, wire))
    constant, table = _parts(value.constant)
    wire = sketch.opened(products, _merged(terms), constant, raw)
    for step in chosen:
        wire = step.apply(sketch, wire)
    return wire if table is None else sketch.combined([(1, wire)], 0.0, table, value.shape)


def _chain(sketch: Sketch, value: Lazy) -> tuple[Step, ...]:
    """The steps that the gate leaves for after the opening: those of the first product that can't do without."""
    for _, atom in value.terms:
        if isinstance(atom, Pending) and atom.chain and _unchained(sketch, atom) is None:
            return atom.chain
    return ()


def _fitted(sketch: Sketch, pending: Pending, chain: tuple[Step, ...]) -> Pending | None:
    """The product as one of the raw shape of `chain`."""
    if pending.chain == chain:
        return replace(pending, chain=())
    flat = _unchained(sketch, pending)
    if flat is None or not chain:
        return flat
    if flat.kind != "mul" or flat.reduce:
        return None
    a, b = flat.a, flat.b
    for step in reversed(chain):
        a, b = step.undo(sketch, a), step.undo(sketch, b)
    return Pending("mul", min(a, b), max(a, b), (), chain[0].before)


def _factor(coefficient: float, pending: Pending) -> Factor:
    return Factor(coefficient, pending.kind, pending.a, pending.b, pending.reduce)


def _merged(terms: Iterable[tuple[float, int]]) -> list[tuple[float, int]]:
    merged: dict[int, float] = {}
    for c, wire in terms:
        merged[wire] = merged.get(wire, 0.0) + c
    return [(c, wire) for wire, c in merged.items() if c]


def _shorter(chain: tuple[Step, ...]) -> tuple[Step, ...]:
    """Without steps that do nothing or undo one another."""
    kept: list[Step] = []
    for step in chain:
        if kept and step.op == "view" and kept[-1].op == "view":
            step = Step("view", step.args, kept.pop().before)
        elif kept and step.op == "permute" and kept[-1].op == "permute":
            last = kept.pop()
            step = Step("permute", tuple(last.args[dim] for dim in step.args), last.before)
        if step.after != step.before or (step.op == "permute" and step.args != tuple(range(len(step.args)))):
            kept.append(step)
    return tuple(kept)


def _parts(constant: float | Floats) -> tuple[float, Floats | None]:
    return (0.0, constant) if isinstance(constant, np.ndarray) else (constant, None)


def _zero(constant: float | Floats) -> bool:
    return not isinstance(constant, np.ndarray) and constant == 0.0


def _plain(constant: Any) -> float | Floats:
    return np.asarray(constant, np.float64) if isinstance(constant, np.ndarray) and constant.ndim else float(constant)


def _uniform(array: Floats) -> float | Floats:
    """A number if all entries are equal."""
    if array.size == 0:
        return 0.0
    first = float(array.flat[0])
    return first if bool((array == first).all()) else np.asarray(array, np.float64, order="C")


def _fsum(array: Floats, dims: tuple[int, ...]) -> float | Floats:
    """The correctly rounded sum: the same on every machine."""
    kept = [dim for dim in range(array.ndim) if dim not in dims]
    rows = array.transpose([*kept, *dims]).reshape(math.prod(array.shape[dim] for dim in kept), -1)
    sums = np.array([math.fsum(row) for row in rows.tolist()], np.float64)
    return _plain(sums.reshape([array.shape[dim] for dim in kept]))
