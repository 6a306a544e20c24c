"""The MAC check: compute in the ring, verify over the integers, in F_p with p = 2^127 - 1.

Since nothing wraps, every gate satisfies an identity over the integers, so modulo p too, and times α:

    α (Σ_j k_j m_A·m_B + Σ_l k_l m_L + c - D) - Σ_j k_j (m_A·αλ_B + αλ_A·m_B) + αγ = 0                  (*)

with γ = Σ k λ_A·λ_B - Σ k λ_L + r (`dealing`). Party i has the m and D, its share α_i and its shares of αλ and αγ.
After all openings are fixed, coefficients ρ are drawn for the elements of every gate, and party i computes its share of
the sum of ρ times (*), over all gates and steps:

    σ_i = α_i V + W_i,    V = Σ ρ (Σ k m_A·m_B + Σ k m_L + c - D),    W_i = Σ ρ (μ_γ^i - Σ k (m_A·μ_B^i + μ_A^i·m_B))

The members accept iff Σ σ_i = 0. A wrong opening D + e, 0 < |e| < 2^65 < p, leaves α ρ e, which is 0 only if ρ (63
bits) hits a root of a polynomial of degree 1, or 2 where ρ is of rank one, or if the cheater's shift of σ guesses α:
chance at most 2^-62 + 2^-127.

Matrix gates take ρ_ij = χ_i ψ_j as in Freivalds' check (IFIP 1977), so that a product costs its operands' sizes and not
its work: Σ ρ (m_A m_B) = (χ m_A)(m_B ψ).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from sordino_common.ring.prg import Seed, expand_ring
from sordino_common.spdz.circuit import Circuit, Gate, Product, View
from sordino_common.spdz.field import Field, Fp
from sordino_common.spdz.layout import Layout, Values, view
from sordino_common.spdz.spec import SessionSpec, stream

I64 = npt.NDArray[np.int64]
COEFFICIENT_BITS: Final = 63


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """One step attempt that awaits its check: m of every wire, D of every gate (flat), and this party's MAC shares
    (None: to be expanded from its seed)."""

    step: int
    attempt: int
    values: Values
    opened: I64
    root_macs: Fp | None
    gamma_macs: Fp | None


class Checker:
    """Computes σ_i. One per party and session."""

    def __init__(self, spec: SessionSpec, layout: Layout, field: Field, *, seed: Seed, mac_key: int) -> None:
        self._spec = spec
        self._layout = layout
        self._field = field
        self._seed = seed
        self._key = mac_key
        self._tables = [np.array(table, dtype=np.int64) for table in spec.circuit.tables]

    @property
    def prime(self) -> int:
        """p: shares of σ are taken modulo it."""
        return self._field.prime

    def sigma(self, records: list[Record], joint: Seed) -> int:
        """σ_i over all gates of `records`, with the coefficients that `joint` gives."""
        public, private = 0, 0
        for record in records:
            one = _Step(self._spec, self._layout, self._field, self._tables, record, *self._macs(record), joint)
            for number in self._layout.gates:
                v, w = one.gate(number)
                public += v
                private += w
        return (self._key * public + private) % self._field.prime

    def _macs(self, record: Record) -> tuple[Fp, Fp]:
        if record.root_macs is not None and record.gamma_macs is not None:
            return record.root_macs, record.gamma_macs
        expand, spec, layout = self._field.expand, self._spec, self._layout
        at = (record.step, record.attempt)
        return (
            expand(self._seed, stream(spec, "lambda-mac", *at), layout.root_elements),
            expand(self._seed, stream(spec, "gamma-mac", *at), layout.gate_elements),
        )


class _Step:
    """The sums of one record."""

    def __init__(
        self,
        spec: SessionSpec,
        layout: Layout,
        field: Field,
        tables: list[I64],
        record: Record,
        root_macs: Fp,
        gamma_macs: Fp,
        joint: Seed,
    ) -> None:
        self._circuit: Circuit = spec.circuit
        self._layout = layout
        self._field = field
        self._tables = tables
        self._record = record
        self._values = record.values
        self._root_macs = root_macs
        self._gamma_macs = gamma_macs
        self._seen: dict[int, Fp] = {}
        counts = {number: self._coefficients(number) for number in layout.gates}
        info = stream(spec, "check", record.step, record.attempt)
        drawn = expand_ring(joint, info, (sum(sum(count) for count in counts.values()),))
        drawn &= np.int64((1 << COEFFICIENT_BITS) - 1)
        self._drawn: Mapping[int, list[I64]] = _cut(drawn, counts)

    def _coefficients(self, number: int) -> tuple[int, ...]:
        """How many coefficients a gate draws: one an element, or rows (of all batches) and columns."""
        gate = self._gate(number)
        if all(product.kind == "mul" for product in gate.products):
            return (gate.wire.numel,)
        *rows, columns = gate.wire.shape
        return (int(np.prod(rows, dtype=np.int64)), columns)

    def _gate(self, number: int) -> Gate:
        gate = self._circuit.node(number)
        assert isinstance(gate, Gate)
        return gate

    def gate(self, number: int) -> tuple[int, int]:
        """(V, W_i) of one gate, not reduced."""
        drawn = self._drawn[number]
        return self._vector_gate(number, drawn[0]) if len(drawn) == 1 else self._matrix_gate(number, *drawn)

    # --- a coefficient an element ----------------------------------------------------------------------------------

    def _vector_gate(self, number: int, rho: I64) -> tuple[int, int]:
        field, gate, place = self._field, self._gate(number), self._layout.gates[number]
        weights = field.from_int64(rho)
        public = -field.dot_int64(weights, self._record.opened[place])
        private = field.dot(weights, self._gamma_macs[:, place])
        for term in gate.terms:
            public += term.coefficient * field.dot_int64(weights, _flat(self._values[term.operand]))
        if gate.addend:
            public += gate.addend * int(field.dot_int64(weights, np.ones(len(rho), dtype=np.int64)))
        for product in gate.products:
            spread = self._spread(product, weights.reshape(2, *gate.wire.shape))
            v, w = self._elementwise(product, spread)
            public += product.coefficient * v
            private -= product.coefficient * w
        return public, private

    def _spread(self, product: Product, weights: Fp) -> Fp:
        """Coefficients of the result's elements as coefficients of the products before they are summed; flat."""
        if product.reduce:
            shape = self._circuit.wire(product.a).shape
            weights = np.expand_dims(weights, tuple(1 + dim for dim in product.reduce))
            weights = np.broadcast_to(weights, (2, *shape))
        return np.ascontiguousarray(weights).reshape(2, -1)

    def _elementwise(self, product: Product, weights: Fp) -> tuple[int, int]:
        """(Σ ρ m_A m_B, Σ ρ (m_A μ_B + μ_A m_B))."""
        field = self._field
        a, b = _flat(self._values[product.a]), _flat(self._values[product.b])
        weighted = field.mul_int64(weights, a)
        public = field.dot_int64(weighted, b)
        private = field.dot(weighted, self._flat_mac(product.b))
        if product.a == product.b:
            return public, 2 * private
        private += field.dot(field.mul_int64(weights, b), self._flat_mac(product.a))
        return public, private

    # --- coefficients of rank one ----------------------------------------------------------------------------------

    def _matrix_gate(self, number: int, rows: I64, columns: I64) -> tuple[int, int]:
        """The result's last axis has coefficients ψ, all before it together χ."""
        field, gate, place = self._field, self._gate(number), self._layout.gates[number]
        chi, psi = field.from_int64(rows), field.from_int64(columns)
        shape = (len(rows), len(columns))
        opened = self._record.opened[place].reshape(shape)
        public = -field.dot(chi, field.mat_vec(opened, psi))
        tags = self._gamma_macs[:, place].reshape(2, *shape)
        private = field.dot(chi, field.mat_vec_fp(tags, psi))
        for term in gate.terms:
            plain = _flat(self._values[term.operand]).reshape(shape)
            public += term.coefficient * field.dot(chi, field.mat_vec(plain, psi))
        if gate.addend:
            sums = [int(np.sum(drawn.astype(object))) for drawn in (rows, columns)]
            public += gate.addend * sums[0] * sums[1]
        for product in gate.products:
            if product.kind == "mul":
                outer = field.mul(
                    np.broadcast_to(chi[:, :, None], (2, *shape)), np.broadcast_to(psi[:, None, :], (2, *shape))
                )
                v, w = self._elementwise(product, self._spread(product, outer.reshape(2, *gate.wire.shape)))
            else:
                v, w = self._matrix_product(product, chi, psi)
            public += product.coefficient * v
            private -= product.coefficient * w
        return public, private

    def _matrix_product(self, product: Product, chi: Fp, psi: Fp) -> tuple[int, int]:
        """(χ m_A m_B ψ, χ m_A μ_B ψ + χ μ_A m_B ψ), summed over the batch of a `bmm`."""
        field = self._field
        a, b = self._values[product.a], self._values[product.b]
        tag_a, tag_b = self._mac(product.a), self._mac(product.b)
        if product.kind == "mm":
            a, b, tag_a, tag_b = a[None], b[None], tag_a[:, None], tag_b[:, None]
        public = private = 0
        height = a.shape[1]
        for k in range(a.shape[0]):
            row = chi[:, k * height : (k + 1) * height]
            left, right = field.vec_mat(row, a[k]), field.mat_vec(b[k], psi)
            public += field.dot(left, right)
            private += field.dot(left, field.mat_vec_fp(tag_b[:, k], psi))
            private += field.dot(field.vec_mat_fp(row, tag_a[:, k]), right)
        return public, private

    # --- MAC shares ------------------------------------------------------------------------------------------------

    def _mac(self, wire: int) -> Fp:
        """This party's share of α λ of an operand: its root's, seen through its views."""
        if wire not in self._seen:
            place = self._layout.roots.get(wire)
            if place is not None:
                self._seen[wire] = self._root_macs[:, place].reshape(2, *self._circuit.wire(wire).shape)
            else:
                node = self._circuit.node(wire)
                assert isinstance(node, View)
                self._seen[wire] = view(node, self._mac(node.operand), self._tables, lead=1)
        return self._seen[wire]

    def _flat_mac(self, wire: int) -> Fp:
        tag = self._mac(wire)
        return np.ascontiguousarray(tag).reshape(2, -1)


def _flat(values: Any) -> I64:
    flat: I64 = np.ascontiguousarray(values, dtype=np.int64).reshape(-1)
    return flat


def _cut(drawn: I64, counts: Mapping[int, tuple[int, ...]]) -> dict[int, list[I64]]:
    result: dict[int, list[I64]] = {}
    start = 0
    for number, sizes in counts.items():
        result[number] = []
        for size in sizes:
            result[number].append(drawn[start : start + size])
            start += size
    return result
