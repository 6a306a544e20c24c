"""The MAC check: compute in the ring, verify over the integers, in F_p with p = 2^127 - 1.

Since nothing wraps, every gate satisfies an identity over the integers, so modulo p too, and times α:

    α (Σ_j k_j m_A·m_B + Σ_l k_l m_L + c - D) - Σ_j k_j (m_A·αλ_B + αλ_A·m_B) + αγ = 0                  (*)

with γ = Σ k λ_A·λ_B - Σ k λ_L + r (`dealing`). Party i has the m and D, its share α_i and its shares of αλ and αγ.
After all openings are fixed, coefficients ρ are drawn for the elements of every gate, and party i computes its share of
the sum of ρ times (*), over all gates and steps:

    σ_i = α_i V + W_i,    V = Σ ρ (Σ k m_A·m_B + Σ k m_L + c - D),    W_i = Σ ρ (μ_γ^i - Σ k (m_A·μ_B^i + μ_A^i·m_B))

The members accept iff Σ σ_i = 0. A wrong opening D + e, 0 < |e| < 2^65 < p, leaves α ρ e, which is 0 only if ρ (63
bits) hits a root of a polynomial of degree 1, or 3 for products of matrices, or if the cheater's shift of σ guesses α:
chance at most 3/2^63 + 2^-127 < 2^-61.

Products of matrices take ρ_bij = β_b χ_i ψ_j as in Freivalds' check (IFIP 1977), so that they cost their operands'
sizes and not their work: Σ ρ (m_A m_B) = Σ_b β_b (χ m_A,b)(m_B,b ψ). The steps that wait for the check are stacked:
gate k of all of them is one array, and b runs over steps (and over the batch of a `bmm`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
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
        macs = [self._macs(record) for record in records]
        stack = _Stack(
            self._spec.circuit,
            self._layout,
            self._tables,
            records,
            np.stack([roots for roots, _ in macs], axis=1),
            np.stack([gammas for _, gammas in macs], axis=1),
        )
        info = stream(self._spec, "check", records[-1].step, records[-1].attempt, len(records))
        coefficients = _Coefficients(self._spec.circuit, len(records), joint, info)
        public, private = 0, 0
        for number in self._layout.gates:
            gate = _GateSum(self._field, stack, number)
            v, w = gate.sums(coefficients)
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


class _Coefficients:
    """63 random bits after 63 random bits, from the seed that all members made together."""

    def __init__(self, circuit: Circuit, steps: int, joint: Seed, info: bytes) -> None:
        self._circuit = circuit
        self._steps = steps
        total = sum(sum(self.counts(number)) for number in circuit.gates)
        self._drawn = expand_ring(joint, info, (total,))
        self._drawn &= np.int64((1 << COEFFICIENT_BITS) - 1)
        self._start = 0

    def counts(self, number: int) -> tuple[int, ...]:
        """How many coefficients a gate draws: one an element and step; or β, χ, ψ."""
        gate = gate_of(self._circuit, number)
        if all(product.kind == "mul" for product in gate.products):
            return (self._steps * gate.wire.numel,)
        *batch, rows, columns = gate.wire.shape
        return (self._steps * math.prod(batch), rows, columns)

    def draw(self, number: int) -> list[I64]:
        """The next gate's; gates come in ascending order."""
        parts = []
        for count in self.counts(number):
            parts.append(self._drawn[self._start : self._start + count])
            self._start += count
        return parts


class _Stack:
    """The records' values, one above the other: arrays of shape [steps, ...]."""

    def __init__(
        self,
        circuit: Circuit,
        layout: Layout,
        tables: list[I64],
        records: list[Record],
        root_macs: Fp,
        gamma_macs: Fp,
    ) -> None:
        self.circuit = circuit
        self.steps = len(records)
        self._layout = layout
        self._tables = tables
        self._records = records
        self._root_macs = root_macs
        self._gamma_macs = gamma_macs
        self._seen: dict[int, Fp] = {}

    def values(self, wire: int) -> I64:
        """m of a wire, [steps, *shape]."""
        if self.steps == 1:
            return np.asarray(self._records[0].values[wire])[None]
        return np.stack([record.values[wire] for record in self._records])

    def opened(self, gate: int) -> I64:
        """D of a gate, [steps * elements]."""
        place = self._layout.gates[gate]
        if self.steps == 1:
            return self._records[0].opened[place]
        return np.concatenate([record.opened[place] for record in self._records])

    def gamma_macs(self, gate: int) -> Fp:
        """This party's shares of α γ, [2, steps * elements]."""
        return np.ascontiguousarray(self._gamma_macs[:, :, self._layout.gates[gate]]).reshape(2, -1)

    def mask_macs(self, wire: int) -> Fp:
        """This party's shares of α λ of an operand, its root's seen through its views: [2, steps, *shape]."""
        if wire not in self._seen:
            place = self._layout.roots.get(wire)
            if place is not None:
                shape = self.circuit.wire(wire).shape
                self._seen[wire] = self._root_macs[:, :, place].reshape(2, self.steps, *shape)
            else:
                node = self.circuit.node(wire)
                assert isinstance(node, View)
                self._seen[wire] = view(node, self.mask_macs(node.operand), self._tables, lead=2)
        return self._seen[wire]


class _GateSum:
    """(V, W_i) of one gate over all steps of a stack."""

    def __init__(self, field: Field, stack: _Stack, number: int) -> None:
        self._field = field
        self._stack = stack
        self._number = number
        self._gate = gate_of(stack.circuit, number)

    def sums(self, coefficients: _Coefficients) -> tuple[int, int]:
        """Not reduced mod p."""
        drawn = coefficients.draw(self._number)
        if len(drawn) == 1:
            return self._sums(*self._vector(drawn[0]))
        beta, chi, psi = (self._field.from_int64(part) for part in drawn)
        return self._sums(*self._matrix(beta, chi, psi))

    def _sums(
        self,
        weigh: Callable[[I64], int],
        weigh_macs: Callable[[Fp], int],
        product: Callable[[Product], tuple[int, int]],
    ) -> tuple[int, int]:
        gate, stack = self._gate, self._stack
        public = -weigh(stack.opened(self._number))
        private = weigh_macs(stack.gamma_macs(self._number))
        for term in gate.terms:
            public += term.coefficient * weigh(_flat(stack.values(term.operand)))
        if gate.addend:
            public += gate.addend * weigh(np.ones(stack.steps * gate.wire.numel, dtype=np.int64))
        for one in gate.products:
            v, w = product(one)
            public += one.coefficient * v
            private -= one.coefficient * w
        return public, private

    # --- a coefficient an element ----------------------------------------------------------------------------------

    def _vector(self, rho: I64) -> tuple[Any, Any, Any]:
        field = self._field
        weights = field.from_int64(rho)

        def weigh(plain: I64) -> int:
            return field.dot_int64(weights, plain)

        def weigh_macs(macs: Fp) -> int:
            return field.dot(weights, macs)

        def product(one: Product) -> tuple[int, int]:
            spread = rho
            if one.reduce:  # an element's coefficient is that of every product that is summed into it
                shape = (self._stack.steps, *self._stack.circuit.wire(one.a).shape)
                spread = np.expand_dims(rho.reshape(-1, *self._gate.wire.shape), tuple(1 + dim for dim in one.reduce))
                spread = np.broadcast_to(spread, shape).reshape(-1)
            return self._elementwise(one, lambda plain: field.weighted(spread, plain))

        return weigh, weigh_macs, product

    def _elementwise(self, product: Product, weigh: Callable[[I64], Fp]) -> tuple[int, int]:
        """(Σ ρ m_A m_B, Σ ρ (m_A μ_B + μ_A m_B)); `weigh`: times ρ."""
        field, stack = self._field, self._stack
        a, b = _flat(stack.values(product.a)), _flat(stack.values(product.b))
        weighted = weigh(a)
        public = field.dot_int64(weighted, b)
        private = field.dot(weighted, _flat_macs(stack.mask_macs(product.b)))
        if product.a == product.b:
            return public, 2 * private
        private += field.dot(weigh(b), _flat_macs(stack.mask_macs(product.a)))
        return public, private

    # --- coefficients β χ ψ ----------------------------------------------------------------------------------------

    def _matrix(self, beta: Fp, chi: Fp, psi: Fp) -> tuple[Any, Any, Any]:
        field = self._field
        batch, rows, columns = beta.shape[1], chi.shape[1], psi.shape[1]
        heights = _outer(field, beta, chi)  # β_b χ_i, flat

        def weigh(plain: I64) -> int:
            return field.dot(heights, field.mat_vec(plain.reshape(batch * rows, columns), psi))

        def weigh_macs(macs: Fp) -> int:
            return field.dot(heights, field.mat_vec_fp(macs.reshape(2, batch * rows, columns), psi))

        def product(one: Product) -> tuple[int, int]:
            if one.kind == "mul":
                weights = _outer(field, heights, psi)
                return self._elementwise(one, lambda plain: field.mul_int64(weights, plain))
            return self._matrices(one, beta, chi, psi, (batch, rows))

        return weigh, weigh_macs, product

    def _matrices(self, product: Product, beta: Fp, chi: Fp, psi: Fp, size: tuple[int, int]) -> tuple[int, int]:
        """(Σ β χ m_A m_B ψ, Σ β (χ m_A μ_B ψ + χ μ_A m_B ψ))."""
        field, stack = self._field, self._stack
        batch, rows = size
        columns = psi.shape[1]
        inner = stack.circuit.wire(product.a).shape[-1]
        a = stack.values(product.a).reshape(batch, rows, inner)
        b = stack.values(product.b).reshape(batch * inner, columns)
        tag_a = stack.mask_macs(product.a).reshape(2, batch, rows, inner)
        tag_b = stack.mask_macs(product.b).reshape(2, batch * inner, columns)
        # χ m_A for all of the batch at once: [rows, batch * inner]
        left = field.vec_mat(chi, np.ascontiguousarray(a.transpose(1, 0, 2)).reshape(rows, batch * inner))
        left_tag = field.vec_mat_fp(
            chi, np.ascontiguousarray(tag_a.transpose(0, 2, 1, 3)).reshape(2, rows, batch * inner)
        )
        spread = np.repeat(beta, inner, axis=1)
        left, left_tag = field.mul(left, spread), field.mul(left_tag, spread)
        right = field.mat_vec(np.ascontiguousarray(b), psi)
        right_tag = field.mat_vec_fp(np.ascontiguousarray(tag_b), psi)
        return field.dot(left, right), field.dot(left, right_tag) + field.dot(left_tag, right)


def gate_of(circuit: Circuit, number: int) -> Gate:
    gate = circuit.node(number)
    assert isinstance(gate, Gate)
    return gate


def _outer(field: Field, a: Fp, b: Fp) -> Fp:
    """a_i b_j, flat."""
    shape = (2, a.shape[1], b.shape[1])
    left, right = np.broadcast_to(a[:, :, None], shape), np.broadcast_to(b[:, None, :], shape)
    return field.mul(np.ascontiguousarray(left).reshape(2, -1), np.ascontiguousarray(right).reshape(2, -1))


def _flat(values: Any) -> I64:
    flat: I64 = np.ascontiguousarray(values, dtype=np.int64).reshape(-1)
    return flat


def _flat_macs(macs: Fp) -> Fp:
    return np.ascontiguousarray(macs).reshape(2, -1)
