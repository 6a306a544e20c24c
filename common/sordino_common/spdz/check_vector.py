"""The check of elementwise products, in families (`tagging`), and of gates without products, for members and dealer.
See `check` for V and W_i.

All that is summed is an inner product: of ρ with D and with linear terms, of weights ρ m_A with m_B, of tags with m. A
gate's κ, a product's or a term's k are put to the sums, which are Python integers: nothing is too large.

Several steps are evaluated at once. A member wants their sum: it takes their numbers as one row. The dealer wants each
step's own sum: a row for each.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

import numpy as np
import numpy.typing as npt

from sordino_common.spdz.circuit import Gate, gate_of
from sordino_common.spdz.inner import InnerProducts, total
from sordino_common.spdz.layout import Layout
from sordino_common.spdz.tagging import Family, Group

if TYPE_CHECKING:
    from sordino_common.spdz.check import Numbers
    from sordino_common.spdz.field import Field, Fp

I64 = npt.NDArray[np.int64]


class FamilyGates:
    """One family, made ready."""

    def __init__(self, layout: Layout, family: Family) -> None:
        self._family: Final = family
        self._gates = [gate_of(layout.circuit, number) for number in family.gates]
        self._places = [layout.gates[number] for number in family.gates]
        # Of the operands of one step.
        self.elements: Final = sum(len(group.factors) * math.prod(group.shape) for group in family.groups)
        self._kappas = [layout.tagging.kappas[number] for number in family.gates] if family.rho is not None else None

    def sums(self, field: Field, steps: Sequence[Numbers]) -> tuple[int, int]:
        """(V, W_i) of these gates, but for γ's tag; of one with products of matrices only the elementwise ones. Not
        reduced mod p. The steps are of one check: they have the same κ."""
        public, private = 0, 0
        scales = self._scales(steps[:1])
        for group in self._family.groups:
            inner = InnerProducts(2, 1)
            values = [values_of(steps, factor.wire, 1) for factor in group.factors]
            for factor, array in zip(group.factors, values, strict=True):
                inner.right(factor.wire, array)
            drawn = self._drawn(group, steps)
            counted = [k for k, factor in enumerate(group.factors) if factor.weighed]
            if counted:
                mine = joined([values[k].reshape(-1) for k in counted])
                weights = _weights(field, [joined([each] * len(counted)) for each in drawn], mine)
                for place, k in enumerate(counted):
                    number = inner.left(weights.reshape(2, len(counted), 1, -1)[:, place])
                    for one in group.factors[k].weighed:
                        inner.add(number, one.wire, to=0, scales=[scales[one.gate][0] * one.multiple])
            for factor in group.factors:
                number = inner.left(tags_of(steps, [factor.tags]))
                for one in factor.partners:
                    inner.add(number, one.wire, to=1, scales=[scales[one.gate][0] * one.multiple])
            if self._has_linear(group):
                rho = drawn[0].reshape(1, -1)
                add_linear(inner, steps, rho, self._gates, self._places, scales, to=0)
                for gate, (scale,) in zip(self._gates, scales, strict=True):
                    public += scale * gate.addend * total(rho)[0] if gate.addend else 0
            (found,), (tagged,) = inner.run(field)
            public += found
            private -= tagged
        return public, private

    def deal(self, field: Field, steps: Sequence[Numbers], alpha: int) -> list[int]:
        """Write the tags of the steps, whose values are λ, and return each one's α Σ ρ κ γ, not reduced mod p."""
        totals, rows = [0] * len(steps), len(steps)
        scales = self._scales(steps)
        for group in self._family.groups:
            inner = InnerProducts(2, rows)
            drawn = self._drawn(group, steps)
            values = [values_of(steps, factor.wire, rows) for factor in group.factors]
            if group.factors:
                tags = self._tags(field, group, drawn, values, steps, alpha)
                for factor, array in zip(group.factors, values, strict=True):
                    inner.right(factor.wire, array)
                for index, factor in enumerate(group.factors):
                    if not factor.weighed:
                        continue
                    number = inner.left(tags[:, index])
                    for one in factor.weighed:
                        multiples = [scale * one.multiple for scale in scales[one.gate]]
                        inner.add(number, one.wire, to=0, scales=multiples)
            if self._has_linear(group):
                add_linear(inner, steps, drawn[0].reshape(rows, -1), self._gates, self._places, scales, to=1)
            for k, (products, linear) in enumerate(zip(*inner.run(field), strict=True)):
                totals[k] += products - alpha * linear
        return totals

    def _tags(
        self,
        field: Field,
        group: Group,
        drawn: Sequence[I64],
        values: Sequence[I64],
        steps: Sequence[Numbers],
        alpha: int,
    ) -> Fp:
        """Written, and returned as [2, factors, steps, n]."""
        scaled = field.scale(alpha, drawn[0])
        if len(drawn) > 1:
            scaled = field.mul_int64(scaled, drawn[1])
        count = len(values)
        flat = np.concatenate([array.reshape(-1) for array in values])
        tags = field.mul_int64(np.tile(scaled, count), flat).reshape(2, count, len(steps), -1)
        place = slice(group.factors[0].tags.start, group.factors[-1].tags.stop)
        for k, step in enumerate(steps):
            step.tags[:, place] = tags[:, :, k].reshape(2, -1)
        return tags

    def _scales(self, steps: Sequence[Numbers]) -> list[list[int]]:
        """κ of each gate: a list for the rows."""
        if self._kappas is None:
            return [[1] * len(steps)]
        return [[step.kappas[number] for step in steps] for number in self._kappas]

    def _has_linear(self, group: Group) -> bool:
        """Whether the linear parts of the gates are counted with this group: the first, of the results' shape."""
        return self._family.rho is not None and group is self._family.groups[0]

    def _drawn(self, group: Group, steps: Sequence[Numbers]) -> tuple[I64, ...]:
        """ρ, or χ and ψ, of each element of a factor: that of the result that it is summed into."""
        family = self._family
        if family.rho is not None:
            each = [(family.rho, family.shape)]
        else:
            assert family.rows is not None
            assert family.columns is not None
            each = [(family.rows, (*family.shape[:-1], 1)), (family.columns, family.shape[-1:])]
        return tuple(
            joined([_spread(step.coefficients[place].reshape(shape), group, family.shape) for step in steps])
            for place, shape in each
        )


class BareGates:
    """All gates without products: they add up what is linear, to have it truncated or masked anew."""

    def __init__(self, layout: Layout) -> None:
        self._gates = [
            (gate_of(layout.circuit, number), layout.gates[number], at) for number, at in layout.tagging.bare.items()
        ]

    def sums(self, field: Field, steps: Sequence[Numbers], rows: int, *, addends: bool) -> list[int]:
        """Σ ρ (Σ k L - D) of each row, of λ and r at the dealer; not reduced mod p. `addends`: with what is public (no
        mask has it)."""
        totals = [0] * rows
        for gate, place, at in self._gates:
            inner = InnerProducts(1, rows)
            rho = joined([step.coefficients[at] for step in steps]).reshape(rows, -1)
            add_linear(inner, steps, rho, [gate], [place], [[1] * rows], to=0)
            (found,) = inner.run(field)
            if addends and gate.addend:
                found = [each + gate.addend * more for each, more in zip(found, total(rho), strict=True)]
            totals = [before + more for before, more in zip(totals, found, strict=True)]
        return totals


def add_linear(
    inner: InnerProducts,
    steps: Sequence[Numbers],
    rho: I64,
    gates: Sequence[Gate],
    places: Sequence[slice],
    scales: Sequence[Sequence[int]],
    *,
    to: int,
) -> None:
    """Σ κ ρ (Σ k L - D), of λ and r at the dealer."""
    rows = len(rho)
    number = inner.left(rho)
    for index, (gate, place, scale) in enumerate(zip(gates, places, scales, strict=True)):
        inner.right(("opened", index), joined([step.opened[place] for step in steps]).reshape(rows, -1))
        inner.add(number, ("opened", index), to=to, scales=[-each for each in scale])
        for term in gate.terms:
            if not inner.knows(term.operand):
                inner.right(term.operand, values_of(steps, term.operand, rows))
            inner.add(number, term.operand, to=to, scales=[each * term.coefficient for each in scale])


def values_of(steps: Sequence[Numbers], wire: int, rows: int) -> I64:
    """m or λ of all steps, [rows, n]."""
    return joined([step.values[wire].reshape(-1) for step in steps]).reshape(rows, -1)


def tags_of(steps: Sequence[Numbers], places: Sequence[slice]) -> Fp:
    """Of all steps, one after the other: [2, 1, n]."""
    return np.concatenate([step.tags[:, place] for step in steps for place in places], axis=1)[:, np.newaxis]


def joined(vectors: Sequence[I64]) -> I64:
    """One after the other; one alone is no copy."""
    return np.concatenate(vectors) if len(vectors) > 1 else vectors[0]


def stacked(arrays: Sequence[I64]) -> I64:
    """Along a first axis; one alone is no copy. `np.stack` costs several times the calls."""
    if len(arrays) == 1:
        return arrays[0][np.newaxis]
    result = np.empty((len(arrays), *arrays[0].shape), dtype=arrays[0].dtype)
    for k, array in enumerate(arrays):
        result[k] = array
    return result


def _weights(field: Field, drawn: Sequence[I64], values: I64) -> Fp:
    weights = field.mul_exact(drawn[-1], values)
    return weights if len(drawn) == 1 else field.mul_int64(weights, drawn[0])


def _spread(drawn: I64, group: Group, result: tuple[int, ...]) -> I64:
    """Coefficients for the elements of a factor, flat."""
    if drawn.shape == group.shape:
        return drawn.reshape(-1)
    whole = np.expand_dims(np.broadcast_to(drawn, result), group.reduce)
    return np.ascontiguousarray(np.broadcast_to(whole, group.shape)).reshape(-1)
