"""The check of elementwise products: a coefficient for each element. See `check` for V and W_i.

A product contributes Σ ρ k m_A m_B to V and -Σ ρ k (m_A μ_B + μ_A m_B) to W: two *uses* of an operand's (μ, m), one
with weight w = ρ k m_A, one with ρ k m_B. Over all uses, Σ w μ is what W lacks, and Σ w m counts every product twice:
halved mod p, it is what V lacks. (A square is one use of weight 2 ρ k m.) So all there is to do is one multiplication
for the weights of all uses, and inner products.

In a gate that has a product of matrices too, the coefficient of an element is χ ψ (`check_matrix`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np
import numpy.typing as npt

from sordino_common.spdz.circuit import Circuit, Gate, Product
from sordino_common.spdz.layout import Layout, root_places

if TYPE_CHECKING:
    from sordino_common.spdz.check import Step
    from sordino_common.spdz.field import Field, Fp

I64 = npt.NDArray[np.int64]
_BATCH: Final = 1 << 14  # elements whose weights are computed together, unless one use has more


@dataclass(frozen=True, slots=True)
class _Use:
    """Places of each element: of ρ, or of χ and of ψ, in the coefficients; of its two factors in `Step.values`."""

    coefficients: tuple[I64, ...]
    factor: I64
    payload: I64
    multiple: int


@dataclass(frozen=True, slots=True)
class _Batch:
    """Uses that are computed together: times `multiples` (none: all 1), and times `outer` in the end."""

    coefficients: tuple[I64, ...]
    factor: I64
    payload: I64
    multiples: I64 | None
    outer: int


class VectorGates:
    """All elementwise products of a circuit, made ready."""

    def __init__(self, circuit: Circuit, layout: Layout, tables: list[I64]) -> None:
        self._circuit = circuit
        self._layout = layout
        self._tables = tables
        self._batches: list[_Batch] = []
        self._starts: dict[int, int] = {}
        self._mixed: list[int] = []
        self._places: list[slice] = []  # of the gates, as their coefficients follow one another
        uses: list[tuple[int, _Use]] = []
        end = 0
        for number, place in layout.gates.items():
            gate = circuit.node(number)
            assert isinstance(gate, Gate)
            kinds = {product.kind for product in gate.products}
            if kinds - {"mul"}:
                if "mul" in kinds:
                    self._mixed.append(number)
                continue
            count = gate.wire.numel
            self._starts[number] = end
            if self._places and self._places[-1].stop == place.start:
                place = slice(self._places.pop().start, place.stop)
            self._places.append(place)
            rho = np.arange(end, end + count).reshape(gate.wire.shape)
            for product in gate.products:
                uses += self._uses(product, (_spread(rho, product, circuit),))
            end += count
        self.coefficients: Final = end
        self._batches += _batched(uses)

    def add_mixed(self, places: Mapping[int, tuple[slice, slice]]) -> None:
        """The elementwise products in gates with matrices; `places`: of such a gate's χ and ψ."""
        uses: list[tuple[int, _Use]] = []
        for number in self._mixed:
            gate = self._circuit.node(number)
            assert isinstance(gate, Gate)
            chi, psi = places[number]
            *_, columns = shape = gate.wire.shape
            rows = np.broadcast_to(np.arange(chi.start, chi.stop).reshape(*shape[:-1], 1), shape)
            across = np.broadcast_to(np.arange(psi.start, psi.start + columns), shape)
            for product in gate.products:
                if product.kind == "mul":
                    both = (_spread(rows, product, self._circuit), _spread(across, product, self._circuit))
                    uses += self._uses(product, both)
        self._batches += _batched(uses)

    def sums(self, field: Field, steps: Sequence[Step]) -> tuple[int, int]:
        """(V, W_i) of these products and of the gates that have no others; not reduced mod p."""
        public, private = 0, 0
        if self._places:
            rho = np.concatenate([step.coefficients[: self.coefficients] for step in steps])
            macs = [step.gate_macs[:, place] for step in steps for place in self._places]
            rests = [step.rests[place] for step in steps for place in self._places]
            private, public = field.dots(rho, (np.concatenate(macs, axis=1), np.concatenate(rests)))
        tops = [
            (step.coefficients[start : start + step.highs[number].size], step.highs[number].reshape(-1))
            for step in steps
            for number, start in self._starts.items()
            if number in step.highs
        ]
        if tops:
            weights, highs = (np.concatenate(parts) for parts in zip(*tops, strict=True))
            public += field.dots(weights, (highs,))[0] << 64
        half = (field.prime + 1) // 2
        for batch in self._batches:
            macs_there = np.concatenate([step.root_macs.take(batch.payload, axis=1) for step in steps], axis=1)
            values_there = np.concatenate([step.values.take(batch.payload) for step in steps])
            of_macs, of_values = field.dots(_weights(field, steps, batch), (macs_there, values_there))
            private -= batch.outer * of_macs
            public += batch.outer * half * of_values
        return public, private

    def _uses(self, product: Product, coefficients: tuple[I64, ...]) -> list[tuple[int, _Use]]:
        """With each, the factor that is left for the end: k, if k m may not be an int64."""
        sides = [(product.a, product.b)]
        sides += [(product.b, product.a)] if product.a != product.b else []
        result = []
        for factor, payload in sides:
            multiple, outer = product.coefficient * (3 - len(sides)), 1
            if abs(multiple) * self._circuit.wire(factor).room >= 1 << 63:
                multiple, outer = 1, multiple
            places = tuple(
                root_places(self._circuit, self._layout, self._tables, wire).reshape(-1) for wire in (factor, payload)
            )
            there = np.flatnonzero((places[0] > 0) & (places[1] > 0))
            left, right = (place[there] - 1 for place in places)
            weighed = tuple(place[there] for place in coefficients)
            result.append((outer, _Use(weighed, left, right, multiple)))
        return result


def _weights(field: Field, steps: Sequence[Step], batch: _Batch) -> Fp:
    """ρ k m, or χ ψ k m, of all uses of all steps."""
    factors = [step.values.take(batch.factor) for step in steps]
    if batch.multiples is not None:
        for factor in factors:
            factor *= batch.multiples
    drawn = [np.concatenate([step.coefficients.take(places) for step in steps]) for places in batch.coefficients]
    if len(drawn) == 1:
        return field.weighted(drawn[0], np.concatenate(factors))
    return field.mul_int64(field.mul_exact(*drawn), np.concatenate(factors))


def _spread(places: I64, product: Product, circuit: Circuit) -> I64:
    """Places for the elements of the operands: an element's coefficient is that of all that is summed into it."""
    if product.reduce:
        places = np.broadcast_to(np.expand_dims(places, product.reduce), circuit.wire(product.a).shape)
    return np.ascontiguousarray(places).reshape(-1)


def _batched(uses: list[tuple[int, _Use]]) -> list[_Batch]:
    batches = []
    for outer in sorted({outer for outer, _ in uses}):
        waiting: list[_Use] = []
        for use in [use for other, use in uses if other == outer]:
            if waiting and sum(one.factor.size for one in waiting) + use.factor.size > _BATCH:
                batches.append(_batch(outer, waiting))
                waiting = []
            waiting.append(use)
        batches.append(_batch(outer, waiting))
    return batches


def _batch(outer: int, uses: list[_Use]) -> _Batch:
    multiples = np.repeat(np.array([use.multiple for use in uses]), [use.factor.size for use in uses])
    return _Batch(
        tuple(np.concatenate(places) for places in zip(*(use.coefficients for use in uses), strict=True)),
        np.concatenate([use.factor for use in uses]),
        np.concatenate([use.payload for use in uses]),
        multiples if (multiples != 1).any() else None,
        outer,
    )
