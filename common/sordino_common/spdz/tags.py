"""α times every mask of a step: what the dealer shares as MACs. For roots α λ, for gates α γ over the integers,

    γ = Σ_j k_j λ_A·λ_B + r - Σ_l k_l λ_L

The linear part is two words (`terms`): α low + (2^64 α) high. For elementwise products α λ_A is there already, it is
an operand's tag: one multiplication for all of them. Products of matrices are integers first, then times α.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from sordino_common.spdz.circuit import Circuit, Product, gate_of
from sordino_common.spdz.field import Field, Fp
from sordino_common.spdz.layout import Layout, root_places
from sordino_common.spdz.terms import has_terms

I64 = npt.NDArray[np.int64]


@dataclass(slots=True)
class _Layer:
    """At most one elementwise product a gate. Places of factors in the roots' array (one more stands for 0); what they
    are multiplied by; each gate's part of it, its shape and the axes to sum over; places of the results in the gates'.
    """

    left: I64
    right: I64
    multiples: I64 | None
    outer: I64 | None
    parts: list[tuple[slice, tuple[int, ...], tuple[int, ...]]]
    gates: I64


class Tags:
    """Made ready for one circuit and key. An array of tags is [2, roots and then gates]."""

    def __init__(self, circuit: Circuit, layout: Layout, field: Field, alpha: int) -> None:
        self._circuit = circuit
        self._layout = layout
        self._field: Final = field
        self._alpha = alpha
        self._tables = [np.array(table, dtype=np.int64) for table in circuit.tables]
        products = {number: gate_of(circuit, number).products for number in layout.gates}
        self._linear = self._places([number for number in products if has_terms(gate_of(circuit, number))])
        self._matrices = self._places(
            [number for number, all_ in products.items() if any(product.kind != "mul" for product in all_)]
        )
        elementwise = {number: [one for one in all_ if one.kind == "mul"] for number, all_ in products.items()}
        depth = max((len(all_) for all_ in elementwise.values()), default=0)
        self._layers = [
            self._layer([(number, all_[k]) for number, all_ in elementwise.items() if k < len(all_)])
            for k in range(depth)
        ]

    def linear(self, masks: I64, highs: list[I64]) -> Fp:
        """α λ, and α times the gates' linear part. `masks`: λ of the roots, then low words; `highs`: in gates' order,
        of the gates that have terms."""
        tags = self._field.scale(self._alpha, masks)
        if highs:
            flat = np.concatenate([high.reshape(-1) for high in highs])
            self._add(tags, self._linear, self._field.scale((self._alpha << 64) % self._field.prime, flat))
        return tags

    def add_elementwise(self, tags: Fp, roots: I64) -> None:
        """tags += α Σ k λ_A λ_B. `roots`: λ of the roots."""
        padded = np.append(roots, np.int64(0)) if self._layers else roots
        for layer in self._layers:
            right = padded.take(layer.right)
            if layer.multiples is not None:
                right *= layer.multiples
            made = self._field.mul_int64(tags.take(layer.left, axis=1), right)
            if layer.outer is not None:
                made = self._field.mul_int64(made, layer.outer)
            parts = [
                self._field.sum(made[:, at].reshape(2, *shape), axes).reshape(2, -1) if axes else made[:, at]
                for at, shape, axes in layer.parts
            ]
            self._add(tags, layer.gates, np.concatenate(parts, axis=1))

    def add_matrices(self, tags: Fp, residues: list[Fp]) -> None:
        """tags += α times `residues`, of the gates that have products of matrices, in order."""
        if residues:
            flat = np.concatenate([residue.reshape(2, -1) for residue in residues], axis=1)
            self._add(tags, self._matrices, self._field.scale_fp(self._alpha, flat))

    def _add(self, tags: Fp, places: I64, more: Fp) -> None:
        tags[:, places] = self._field.add(tags.take(places, axis=1), more)

    def _places(self, gates: list[int]) -> I64:
        """Of gates' elements in an array of tags."""
        start = self._layout.root_elements
        parts = [np.arange(start + self._layout.gates[k].start, start + self._layout.gates[k].stop) for k in gates]
        return np.concatenate([*parts, np.empty(0, dtype=np.int64)])

    def _layer(self, products: list[tuple[int, Product]]) -> _Layer:
        lefts, rights, multiples, outers, parts = [], [], [], [], []
        end = 0
        for _, product in products:
            k, outer = product.coefficient, 1
            sides = sorted((product.a, product.b), key=lambda wire: self._circuit.wire(wire).room, reverse=True)
            if abs(k) * self._circuit.wire(sides[1]).room >= 1 << 63:
                k, outer = 1, k
            left, right = (root_places(self._circuit, self._layout, self._tables, wire) - 1 for wire in sides)
            size = left.size  # -1: padding; there the right factor is the zero that `padded` ends with
            lefts.append(np.maximum(left, 0).reshape(-1))
            rights.append(np.where(left < 0, -1, right).reshape(-1))
            multiples.append(np.full(size, k, dtype=np.int64))
            outers.append(np.full(size, outer, dtype=np.int64))
            parts.append((slice(end, end + size), left.shape, product.reduce))
            end += size
        right = np.concatenate(rights)
        right[right < 0] = self._layout.root_elements
        multiple, outer_all = np.concatenate(multiples), np.concatenate(outers)
        return _Layer(
            np.concatenate(lefts),
            right,
            multiple if (multiple != 1).any() else None,
            outer_all if (outer_all != 1).any() else None,
            parts,
            self._places([number for number, _ in products]),
        )
