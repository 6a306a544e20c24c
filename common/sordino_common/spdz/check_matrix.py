"""The check of products of matrices, with coefficients χ for rows and ψ for columns. See `check` for V and W_i.

With u = χ A, t = B ψ for m and y = χ μ_A, x = μ_B ψ for the MAC shares, a product k A·B contributes Σ k u t to V and
-Σ k (u x + t y) to W; its gate Σ χ (E ψ) to V and Σ χ (μ_γ ψ) to W. All products with χ and ψ, of a step's m and μ
together, are one `Field.mat_vecs`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final, TypeAlias

import numpy as np
import numpy.typing as npt

from sordino_common.spdz.circuit import Circuit, Gate, Product
from sordino_common.spdz.layout import Layout

if TYPE_CHECKING:
    from sordino_common.spdz.check import Step
    from sordino_common.spdz.field import Field, Planes

I64 = npt.NDArray[np.int64]
_Job: TypeAlias = "tuple[npt.NDArray[Any], I64, Planes]"  # of `Field.mat_vecs`


class MatrixGates:
    """All gates of a circuit that have a product of matrices, made ready. Their coefficients begin at `first`."""

    def __init__(self, circuit: Circuit, layout: Layout, *, first: int) -> None:
        self._circuit = circuit
        self._layout = layout
        self._first = first
        self._products: list[tuple[int, Product]] = []
        self.places: Final[dict[int, tuple[slice, slice]]] = {}
        end = first
        for number in layout.gates:
            gate = circuit.node(number)
            assert isinstance(gate, Gate)
            products = [product for product in gate.products if product.kind != "mul"]
            if products:
                *rows, columns = gate.wire.shape
                height = math.prod(rows)
                self.places[number] = (slice(end, end + height), slice(end + height, end + height + columns))
                end += height + columns
                self._products += [(number, product) for product in products]
        self.end: Final = end  # of the coefficients
        inner = [self._inner(product) for _, product in self._products]
        self._half = sum(inner)
        multiples = np.repeat(np.array([product.coefficient for _, product in self._products], dtype=np.int64), inner)
        self._multiples = multiples if (multiples != 1).any() else None

    def _inner(self, product: Product) -> int:
        """How many numbers u has, and t."""
        *batch, _, inner = self._circuit.wire(product.a).shape
        return math.prod(batch) * inner

    def sums(self, field: Field, steps: Sequence[Step]) -> tuple[int, int]:
        """(V, W_i) of these gates, but for their elementwise products; not reduced mod p."""
        if not self.places:
            return 0, 0
        tables = [field.vectors(step.coefficients[self._first : self.end]) for step in steps]
        both = list(zip(steps, tables, strict=True))
        jobs = [self._left(step, table, number, one) for step, table in both for number, one in self._products]
        jobs += [self._right(step, table, number, one) for step, table in both for number, one in self._products]
        jobs += [self._gate(step, table, number) for step, table in both for number in self.places]
        jobs += [
            self._top(field, step, table, number)
            for step, table in both
            for number in self.places
            if number in step.highs
        ]
        macs, values = field.mat_vecs(jobs)
        half = self._half * len(steps)
        whole = 2 * half
        scaled = values[:, :whole]
        if self._multiples is not None:
            scaled = field.mul_int64(np.ascontiguousarray(scaled), np.tile(self._multiples, 2 * len(steps)))
        chi = np.concatenate([step.coefficients[at] for step in steps for at, _ in self.places.values()])
        end = whole + len(chi)
        u_x, u_t = field.dots(scaled[:, :half], (macs[:, half:whole], values[:, half:whole]))
        (t_y,) = field.dots(scaled[:, half:], (macs[:, :half],))
        of_macs, of_values = field.dots(chi, (macs[:, whole:end], values[:, whole:end]))
        public = u_t + of_values
        tops = [
            step.coefficients[at] for step in steps for number, (at, _) in self.places.items() if number in step.highs
        ]
        if tops:
            public += field.dots(np.concatenate(tops), (values[:, end:],))[0] << 64
        return public, of_macs - u_x - t_y

    def _left(self, step: Step, table: Planes, number: int, product: Product) -> _Job:
        """χ times A, as A transposed times χ."""
        macs, values = step.operand(product.a)
        chi = self._vector(table, self.places[number][0])
        return (
            macs.swapaxes(-1, -2),
            values.swapaxes(-1, -2),
            chi.reshape(len(table), *values.shape[:-1], table.shape[-1]),
        )

    def _right(self, step: Step, table: Planes, number: int, product: Product) -> _Job:
        """B times ψ."""
        macs, values = step.operand(product.b)
        return macs, values, self._vector(table, self.places[number][1])

    def _gate(self, step: Step, table: Planes, number: int) -> _Job:
        """(γ, E mod 2^64) times ψ."""
        chi, psi = self.places[number]
        shape, place = (chi.stop - chi.start, psi.stop - psi.start), self._layout.gates[number]
        macs, rests = step.gate_macs[:, place], step.rests[place]
        return macs.reshape(2, *shape), rests.reshape(shape), self._vector(table, psi)

    def _top(self, field: Field, step: Step, table: Planes, number: int) -> _Job:
        """What E is over 2^64, times ψ."""
        chi, psi = self.places[number]
        high = step.highs[number].reshape(chi.stop - chi.start, psi.stop - psi.start)
        return field.from_int64(np.zeros_like(high)), high, self._vector(table, psi)

    def _vector(self, table: Planes, place: slice) -> Planes:
        return table[:, place.start - self._first : place.stop - self._first]
