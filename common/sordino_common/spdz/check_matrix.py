"""The check of products of matrices, with coefficients χ for rows and ψ for columns. See `check` for V and W_i.

With u = χ A and t = k B ψ (of m at the members, of λ at the dealer) a product k A·B contributes Σ u t to V, and its
gate Σ χ (E ψ). A member lacks -Σ (u·[α k λ_B ψ] + t·[α χ λ_A]), for which it holds tags, vectors like t and u. So
products cost what their operands cost to read, and no element of a matrix needs a tag.

Steps are evaluated together, their matrices in one batch; results are [2, steps, n].
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

import numpy as np
import numpy.typing as npt

from sordino_common.spdz.check_vector import joined, stacked, tags_of
from sordino_common.spdz.circuit import gate_of
from sordino_common.spdz.inner import InnerProducts, total
from sordino_common.spdz.layout import Layout
from sordino_common.spdz.tagging import MatrixGate

if TYPE_CHECKING:
    from sordino_common.spdz.check import Numbers
    from sordino_common.spdz.field import Field, Fp, Planes

I64 = npt.NDArray[np.int64]


class MatrixGates:
    """All gates of a circuit that have a product of matrices, made ready."""

    def __init__(self, layout: Layout) -> None:
        self._layout: Final = layout
        self._products: Final = layout.tagging.products
        self._gates: Final = layout.tagging.matrix_gates
        self._nodes = [gate_of(layout.circuit, one.gate) for one in self._gates]
        places = [each for gate in self._gates for each in (gate.rows, gate.columns)]
        self._drawn = slice(min((at.start for at in places), default=0), max((at.stop for at in places), default=0))
        wires = [wire for one in self._products for wire in (one.product.a, one.product.b)]
        # Of the operands of one step.
        self.elements: Final = sum(layout.circuit.wire(wire).numel for wire in wires)
        self._inner = [one.left.stop - one.left.start for one in self._products]

    def sums(self, field: Field, steps: Sequence[Numbers]) -> tuple[int, int]:
        """(V, W_i) of these gates, but for their elementwise products and γ's tag; not reduced mod p."""
        if not self._gates:
            return 0, 0
        u, t, (linear,) = self._compressed(field, steps, 1)
        x = tags_of(steps, [one.left for one in self._products])
        y = tags_of(steps, [one.right for one in self._products])
        (u_t,), (u_y,), (x_t,) = field.dots((u, x), (t, y), ((0, 0), (0, 1), (1, 0)))
        public = u_t + linear
        for node, gate in zip(self._nodes, self._gates, strict=True):
            if node.addend:
                chi, psi = (stacked([step.coefficients[at] for step in steps]) for at in (gate.rows, gate.columns))
                public += node.addend * sum(a * b for a, b in zip(total(chi), total(psi), strict=True))
        return public, -u_y - x_t

    def deal(self, field: Field, steps: Sequence[Numbers], alpha: int) -> list[int]:
        """Write the tags of the steps, whose values are λ, and return each one's α Σ χ ψ γ, not reduced mod p."""
        if not self._gates:
            return [0] * len(steps)
        u, t, linear = self._compressed(field, steps, len(steps))
        (public,) = field.dots([u], [t], [(0, 0)])
        tags = field.scale_fp(alpha, np.concatenate((u, t), axis=2))
        start = 0
        for at in [one.left for one in self._products] + [one.right for one in self._products]:
            for k, step in enumerate(steps):
                step.tags[:, at] = tags[:, k, start : start + at.stop - at.start]
            start += at.stop - at.start
        return [alpha * (each - less) for each, less in zip(public, linear, strict=True)]

    def _compressed(self, field: Field, steps: Sequence[Numbers], rows: int) -> tuple[Fp, Fp, list[int]]:
        """u and t of all products, [2, rows, n]; and Σ χ (Σ k L - D) ψ of each row, of λ and r at the dealer."""
        table = field.vectors(joined([step.coefficients[self._drawn] for step in steps]))
        table = table.reshape(len(table), len(steps), -1, *table.shape[2:])

        def vector(place: slice) -> Planes:
            return table[:, :, place.start - self._drawn.start : place.stop - self._drawn.start]

        jobs: list[tuple[I64, Planes]] = []
        for one in self._products:  # χ times A: A transposed times χ
            a = stacked([step.values[one.product.a] for step in steps])
            chi = vector(one.gate.rows)
            jobs.append((a.swapaxes(-1, -2), chi.reshape(len(table), *a.shape[:-1], *chi.shape[3:])))
        # k goes to the integers of B if k B are some, and to t otherwise: of a trained model m and λ are large.
        of_t = []
        for one in self._products:
            b, k = stacked([step.values[one.product.b] for step in steps]), one.product.coefficient
            fits = abs(k) * max(int(b.max(initial=0)), -int(b.min(initial=0))) < 1 << 63
            of_t.append(1 if fits else k)
            psi = vector(one.gate.columns)
            if b.ndim == 4:
                psi = np.broadcast_to(psi[:, :, np.newaxis], (*psi.shape[:2], b.shape[1], *psi.shape[2:]))
            jobs.append((b * np.int64(k) if fits and k != 1 else b, psi))
        for gate in self._gates:
            opened = [step.opened[self._layout.gates[gate.gate]] for step in steps]
            jobs.append((_matrices(opened, gate), vector(gate.columns)))
        for node, gate in zip(self._nodes, self._gates, strict=True):
            for term in node.terms:
                wires = [step.values[term.operand].reshape(-1) for step in steps]
                jobs.append((_matrices(wires, gate), vector(gate.columns)))
        made, start = field.mat_vecs(jobs), 0
        parts = []
        for a, _ in jobs:
            size = math.prod(a.shape[:-1])
            parts.append(made[:, start : start + size].reshape(2, len(steps), -1))
            start += size
        count = len(self._products)
        u = np.concatenate(parts[:count], axis=2).reshape(2, rows, -1)
        t = np.concatenate(parts[count : 2 * count], axis=2)
        if set(of_t) != {1}:
            multiples = np.repeat(np.array(of_t, dtype=np.int64), self._inner)
            t = field.mul_int64(t, np.ascontiguousarray(np.broadcast_to(multiples, t.shape[1:])))
        return u, t.reshape(2, rows, -1), self._linear(field, steps, rows, parts[2 * count :])

    def _linear(self, field: Field, steps: Sequence[Numbers], rows: int, parts: Sequence[Fp]) -> list[int]:
        """Σ k χ part of each row. parts [2, steps, height]: D ψ of all gates, then L ψ of all terms."""
        chi = [stacked([step.coefficients[gate.rows] for step in steps]) for gate in self._gates]
        inner = InnerProducts(1, rows)
        inner.right(0, np.concatenate(parts[: len(chi)], axis=2).reshape(2, rows, -1))
        inner.add(inner.left(np.concatenate(chi, axis=1).reshape(rows, -1)), 0, to=0, scales=[-1] * rows)
        (found,) = inner.run(field)
        terms = iter(parts[len(chi) :])
        for node, drawn in zip(self._nodes, chi, strict=True):
            inner = InnerProducts(1, rows)
            number = inner.left(drawn.reshape(rows, -1))
            for index, term in enumerate(node.terms):
                inner.right(index, next(terms).reshape(2, rows, -1))
                inner.add(number, index, to=0, scales=[term.coefficient] * rows)
            if node.terms:
                found = [before + more for before, more in zip(found, inner.run(field)[0], strict=True)]
        return found


def _matrices(arrays: Sequence[I64], gate: MatrixGate) -> I64:
    return stacked(arrays).reshape(len(arrays), gate.rows.stop - gate.rows.start, -1)
