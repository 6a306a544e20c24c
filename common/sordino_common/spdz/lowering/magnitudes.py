"""How large the real value of each wire of a sketch can get: the smaller of worst case and statement.

A gate whose terms are all powers of one wire z (perhaps times one other wire) is a polynomial p(z), and bounded by the
range of p: the triangle inequality would make four of a sigmoid. Only +, -, x of floats and square roots: the same on
every machine.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Final, TypeAlias

import numpy as np

from sordino_common.plan.values import Plan
from sordino_common.spdz.lowering.settings import LoweringError, Settings
from sordino_common.spdz.lowering.sketch import (
    Combined,
    Factor,
    Given,
    Joined,
    Opened,
    Public,
    Sketch,
    Summed,
    Viewed,
    operands,
)

_GRID: Final = 2048
_HIGHEST: Final = 16
_ITSELF: Final = (0.0, 1.0)
Polynomial: TypeAlias = tuple[float, ...]


def ceil_log2(x: float) -> int:
    """The least e with x <= 2^e; x > 0. Exact."""
    mantissa, exponent = math.frexp(x)
    return exponent - 1 if mantissa == 0.5 else exponent


def inner(sketch: Sketch, factor: Factor) -> int:
    """How many products of elements each element of the result sums."""
    shape = sketch.shape(factor.a)
    return math.prod(shape[dim] for dim in factor.reduce) if factor.kind == "mul" else shape[-1]


def needed(sketch: Sketch, outputs: Sequence[int]) -> list[int]:
    """The wires that the outputs are made of, ascending."""
    seen: set[int] = set()
    waiting = list(outputs)
    while waiting:
        wire = waiting.pop()
        if wire not in seen:
            seen.add(wire)
            waiting += operands(sketch.entries[wire].node)
    return sorted(seen)


def magnitudes(plan: Plan, sketch: Sketch, order: Sequence[int], settings: Settings) -> dict[int, float]:
    """Wire -> bound on |real value|, for the wires of `order` (ascending)."""
    found: dict[int, float] = {}
    forms: dict[int, _Form] = {}
    for wire in order:
        entry = sketch.entries[wire]
        match entry.node:
            case Given(index=index):
                given = plan.inputs[index]
                worst = settings.of_input(given.role, given.name)
            case Public(table=table):
                worst = _largest(sketch, table)
            case Viewed(operand=operand):
                worst = found[operand]
            case Summed(operand=operand, dims=dims):
                worst = found[operand] * math.prod(sketch.shape(operand)[dim] for dim in dims)
            case Joined(operands=wires):
                worst = max(found[part] for part in wires)
            case Combined(terms=local, constant=constant, table=table):
                worst = sum(abs(k) * found[part] for k, part in local) + abs(constant)
                worst += 0.0 if table is None else _largest(sketch, table)
            case Opened() as gate:
                worst = sum(
                    abs(f.coefficient) * found[f.a] * found[f.b] * inner(sketch, f) for f in gate.products
                ) + sum(abs(c) * found[part] for c, part in gate.terms)
                worst += abs(gate.constant)
                form = _form(gate, forms)
                if form is not None:
                    outer = 1.0 if form.factor is None else found[form.factor]
                    worst = min(worst, outer * _range(form.coefficients, found[form.base]))
                    if form.factor is None:
                        forms[wire] = form
        found[wire] = min(worst, entry.cap)
        forms.setdefault(wire, _Form(wire, _ITSELF))
    return found


def check_interval(
    found: dict[int, float], powers: dict[tuple[int, float], int], settings: Settings, ops: Sequence[str]
) -> None:
    """Refuse what may leave the interval on which the polynomial activations were fitted, unless it was stated what
    their inputs never pass: then whoever stated it has weighed it."""
    if settings.interval is None or settings.ranges.preactivations is not None:
        return
    for (wire, coefficient), node in sorted(powers.items(), key=lambda item: item[1]):
        reach = coefficient * found.get(wire, 0.0)
        if reach > settings.interval * (1 + 1e-9):
            raise LoweringError(
                f"node {node} ({ops[node]}): what goes into a polynomial activation may reach {reach:.3g} by the "
                f"stated ranges, but the polynomial was fitted on [-{settings.interval:g}, {settings.interval:g}]; "
                f"state what it never passes (spdz.ranges.preactivations), or widen spdz.activation.interval",
                node=node,
            )


def _largest(sketch: Sketch, table: int) -> float:
    values = sketch.publics[table]
    return float(np.abs(values).max()) if values.size else 0.0


@dataclass(frozen=True, slots=True)
class _Form:
    """factor · p(base), elementwise; factor None means 1."""

    base: int
    coefficients: Polynomial
    factor: int | None = None


def _form(gate: Opened, known: Mapping[int, _Form]) -> _Form | None:
    """The gate as p(z), or as g · p(z): an activation, or a derivative passed back through one."""
    parts: list[tuple[float, list[_Form]]] = []
    for factor in gate.products:
        if factor.kind != "mul" or factor.reduce:
            return None
        parts.append((factor.coefficient, [known[factor.a], known[factor.b]]))
    parts += [(c, [known[wire]]) for c, wire in gate.terms]
    if gate.constant:
        parts.append((gate.constant, []))
    bases = sorted({form.base for _, forms in parts for form in forms})
    for factor_wire in (None, *bases):
        for base in bases:
            if base != factor_wire:
                total = _collected(parts, base, factor_wire)
                if total is not None:
                    return _Form(base, total, factor_wire)
    return None


def _collected(parts: Sequence[tuple[float, list[_Form]]], base: int, factor: int | None) -> Polynomial | None:
    """p if every part is a multiple of (factor ·) a polynomial of `base`."""
    total = [0.0] * (_HIGHEST + 1)
    for c, forms in parts:
        product, linear = [c], 0
        for form in forms:
            if form.factor is not None:
                return None
            if form.base == factor:
                if form.coefficients != _ITSELF:
                    return None
                linear += 1
            elif form.base == base:
                product = _times(product, form.coefficients)
            else:
                return None
        if linear != (factor is not None) or len(product) > _HIGHEST + 1:
            return None
        for power, x in enumerate(product):
            total[power] += x
    while len(total) > 1 and total[-1] == 0.0:
        total.pop()
    return tuple(total)


def _times(p: Sequence[float], q: Sequence[float]) -> list[float]:
    product = [0.0] * (len(p) + len(q) - 1)
    for i, x in enumerate(p):
        for j, y in enumerate(q):
            product[i + j] += x * y
    return product


@lru_cache(maxsize=256)
def _range(coefficients: Polynomial, limit: float) -> float:
    """A bound on |p(z)| over |z| <= limit: the largest on a grid, and what p can gain between its points."""
    if not math.isfinite(limit):
        return math.inf
    step = 2.0 * limit / _GRID
    largest = 0.0
    for k in range(_GRID + 1):
        z, value = -limit + k * step, 0.0
        for c in reversed(coefficients):
            value = value * z + c
        largest = max(largest, abs(value))
    slope, power = 0.0, 1.0
    for degree, c in enumerate(coefficients[1:], start=1):
        slope += degree * abs(c) * power
        power *= limit
    return largest + slope * step / 2
