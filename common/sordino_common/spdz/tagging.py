"""What a step is checked with: coefficients for everything that it opens, and tags, dealt for them. See `check`.

Coefficients of a step are numbers of 63 bits, expanded from the check's joint seed; nobody but the dealer knows them
before the step's openings are fixed. Gates are of two kinds:

`Family`   all gates of elementwise products whose results have one shape. They share the coefficients ρ of their
           elements, times a κ for each gate. So one tag α ρ λ for each element of a wire serves all products that the
           wire is a factor of, in all gates of the family (one for each set of axes that products are summed over).
           A gate without products has a coefficient for each element, and no tags.
`Product`  of matrices, in a gate with coefficients χ for rows and ψ for columns: a tag for each element of α χ λ_A and
           of α λ_B ψ, vectors as long as the product's inner dimension. Elementwise products in such a gate form a
           family of its own, with ρ = χ ψ and without κ.

And one tag for the step, α times the sum of all γ, each with its coefficient.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, TypeAlias

from sordino_common.spdz.circuit import Circuit, Product, gate_of

COEFFICIENT_BITS: Final = 63


@dataclass(frozen=True, slots=True)
class Partner:
    """The other factor of a product, in gate number `gate` of the family; `multiple`: k of the product."""

    gate: int
    wire: int
    multiple: int


@dataclass(frozen=True, slots=True)
class Factor:
    """A wire that elementwise products multiply with. `tags`: where its tags stand; `partners`: whatever it is
    multiplied by (itself in a square: twice); `weighed`: of these products the ones that are counted here, each product
    in one of its factors."""

    wire: int
    tags: slice
    partners: tuple[Partner, ...]
    weighed: tuple[Partner, ...]


@dataclass(frozen=True, slots=True)
class Group:
    """Factors of one shape, of products that are summed over the same axes of it."""

    shape: tuple[int, ...]
    reduce: tuple[int, ...]
    factors: tuple[Factor, ...]


@dataclass(frozen=True, slots=True)
class Family:
    """`gates`: wire numbers; `rho`: where coefficients stand, or `rows` and `columns`: where χ and ψ do. With `rho` the
    first group is that of factors as large as the results; the gates' linear parts are counted with it."""

    shape: tuple[int, ...]
    gates: tuple[int, ...]
    rho: slice | None
    rows: slice | None
    columns: slice | None
    groups: tuple[Group, ...]


@dataclass(frozen=True, slots=True)
class MatrixGate:
    """Where χ and ψ stand."""

    gate: int
    rows: slice
    columns: slice


@dataclass(frozen=True, slots=True)
class MatrixProduct:
    """`left`, `right`: where the tags of α χ λ_A and α λ_B ψ stand."""

    gate: MatrixGate
    product: Product
    left: slice
    right: slice


@dataclass(frozen=True, slots=True, kw_only=True)
class Tagging:
    """Of a circuit. `families`: first all that have κ. `bare`: gates without products, and where their coefficients
    stand, one after the other. `kappas`: gate -> number of its κ; `coefficients`, `tags`: how many a step has; the
    last tag is that of γ."""

    families: tuple[Family, ...]
    bare: Mapping[int, slice]
    matrix_gates: tuple[MatrixGate, ...]
    products: tuple[MatrixProduct, ...]
    kappas: Mapping[int, int]
    coefficients: int
    tags: int


def tagging_of(circuit: Circuit) -> Tagging:
    return _Builder(circuit).build()


_Key: TypeAlias = tuple[tuple[int, ...], tuple[int, ...], int]  # (shape, reduce, wire)


def _partners(table: Mapping[tuple[int, int], int]) -> tuple[Partner, ...]:
    return tuple(Partner(gate, wire, multiple) for (gate, wire), multiple in table.items())


class _Builder:
    def __init__(self, circuit: Circuit) -> None:
        self._circuit = circuit
        self._coefficients = 0
        self._tags = 0

    def build(self) -> Tagging:
        alike: dict[tuple[int, ...], list[int]] = {}
        bare: list[int] = []
        matrix: list[MatrixGate] = []
        products: list[MatrixProduct] = []
        for number in self._circuit.gates:
            gate = gate_of(self._circuit, number)
            of_matrices = [product for product in gate.products if product.kind != "mul"]
            if not gate.products:
                bare.append(number)
            elif not of_matrices:
                alike.setdefault(gate.wire.shape, []).append(number)
            else:
                *heights, columns = gate.wire.shape
                place = MatrixGate(number, self._draw(math.prod(heights)), self._draw(columns))
                matrix.append(place)
                for product in of_matrices:
                    *batch, _, inner = self._circuit.wire(product.a).shape
                    count = math.prod(batch) * inner
                    products.append(MatrixProduct(place, product, self._tag(count), self._tag(count)))
        families = [
            Family(shape, tuple(gates), self._draw(math.prod(shape)), None, None, self._groups(tuple(gates), shape))
            for shape, gates in alike.items()
        ]
        for place in matrix:
            shape, groups = self._circuit.wire(place.gate).shape, self._groups((place.gate,), None)
            if groups:
                families.append(Family(shape, (place.gate,), None, place.rows, place.columns, groups))
        self._tag(1)
        return Tagging(
            families=tuple(families),
            bare={number: self._draw(self._circuit.wire(number).numel) for number in bare},
            matrix_gates=tuple(matrix),
            products=tuple(products),
            kappas={number: k for k, number in enumerate(number for gates in alike.values() for number in gates)},
            coefficients=self._coefficients,
            tags=self._tags,
        )

    def _groups(self, gates: tuple[int, ...], own: tuple[int, ...] | None) -> tuple[Group, ...]:
        """The first one is of shape `own`, even if it has no factors."""
        partners: dict[_Key, dict[tuple[int, int], int]] = {}
        weighed: dict[_Key, dict[tuple[int, int], int]] = {}
        for index, number in enumerate(gates):
            for product in gate_of(self._circuit, number).products:
                if product.kind != "mul":
                    continue
                shape = self._circuit.wire(product.a).shape
                a, b = ((shape, product.reduce, wire) for wire in (product.a, product.b))
                for mine, other in ((a, product.b), (b, product.a)):
                    table = partners.setdefault(mine, {})
                    table[index, other] = table.get((index, other), 0) + product.coefficient
                mine, other = (b, product.a) if b in weighed and a not in weighed else (a, product.b)
                table = weighed.setdefault(mine, {})
                table[index, other] = table.get((index, other), 0) + product.coefficient
        groups: dict[tuple[tuple[int, ...], tuple[int, ...]], list[_Key]] = {}
        if own is not None:
            groups[own, ()] = []
        for key in partners:
            groups.setdefault(key[:2], []).append(key)
        return tuple(
            Group(
                shape,
                reduce,
                tuple(
                    Factor(
                        key[2], self._tag(math.prod(shape)), _partners(partners[key]), _partners(weighed.get(key, {}))
                    )
                    for key in keys
                ),
            )
            for (shape, reduce), keys in groups.items()
        )

    def _draw(self, count: int) -> slice:
        place = slice(self._coefficients, self._coefficients + count)
        self._coefficients = place.stop
        return place

    def _tag(self, count: int) -> slice:
        place = slice(self._tags, self._tags + count)
        self._tags = place.stop
        return place
