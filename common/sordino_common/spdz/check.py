"""The MAC check: compute in the ring, verify over the integers, in F_p with p = 2^127 - 1.

Since nothing wraps, every gate satisfies an identity over the integers, so modulo p too, and times α:

    α (Σ_j k_j m_A·m_B + E) - Σ_j k_j (m_A·αλ_B + αλ_A·m_B) + αγ = 0        E = Σ_l k_l m_L + c - D        (*)

with γ = Σ k λ_A·λ_B - Σ k λ_L + r (`dealing`). Party i has the m and D, its share α_i and its shares of αλ and αγ.
After all openings are fixed, coefficients ρ are drawn for the elements of every gate, and party i computes its share of
the sum of ρ times (*), over all gates and steps:

    σ_i = α_i V + W_i,    V = Σ ρ (Σ k m_A·m_B + E),    W_i = Σ ρ (μ_γ^i - Σ k (m_A·μ_B^i + μ_A^i·m_B))

The members accept iff Σ σ_i = 0. ρ is a random number of 63 bits for each element; for the elements of a product of
matrices ρ_bij = χ_bi ψ_j, random numbers for each of its rows and columns as in Freivalds' check (IFIP 1977), so that
it costs its operands' sizes and not its work. All steps' coefficients are independent. A wrong opening D + e,
0 < |e| < 2^65 < p, leaves α times a polynomial in the coefficients that is not zero, of degree 1 (ρ) or 2 (χ ψ): by the
lemma of Schwartz and Zippel it is 0 mod p with a chance of at most 2/2^63; or else the cheater's shift of σ guesses α:
at most 2/2^63 + 2^-127 < 2^-61 in all.

σ_i is evaluated a few steps at a time: weights, then inner products of μ, m and E (`check_vector`, `check_matrix`).

Later steps run while a check is under way (`party`). That changes nothing above: the openings that a check is of are
fixed when it begins, before anybody commits to a seed, and later ones enter neither its sum nor its transcript. Nor
does it give a cheater more: every opening is masked by an r of its own, whatever was opened before and whether that was
right; coefficients are drawn anew for every check; σ_i of a sum that is 0 tell nothing of α (the others' σ and the sum
determine them), and after one that is not, the session is dead before another is opened, because a check begins only
when the one before has passed. It is what steps between two checks do anyway, with the last check four rounds longer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from sordino_common.ring.prg import Seed, expand_ring
from sordino_common.spdz.check_matrix import MatrixGates
from sordino_common.spdz.check_vector import VectorGates
from sordino_common.spdz.circuit import Circuit, View, gate_of
from sordino_common.spdz.field import Field, Fp
from sordino_common.spdz.layout import Layout, Values, view
from sordino_common.spdz.spec import SessionSpec, stream
from sordino_common.spdz.terms import add_terms, has_terms

I64 = npt.NDArray[np.int64]
COEFFICIENT_BITS: Final = 63
_TOGETHER: Final = 1 << 17  # elements of steps that are evaluated together: enough to hide the calls


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """One step attempt that awaits its check: m of every wire, D of every gate (flat), and this party's MAC shares,
    those of the roots and then those of the gates (None: to be expanded from its seed)."""

    step: int
    attempt: int
    values: Values
    opened: I64
    macs: Fp | None


class Checker:
    """Computes σ_i. One per party and session."""

    def __init__(self, spec: SessionSpec, layout: Layout, field: Field, *, seed: Seed, mac_key: int) -> None:
        circuit = spec.circuit
        self._spec = spec
        self._layout = layout
        self._field = field
        self._seed = seed
        self._key = mac_key
        self._tables = [np.array(table, dtype=np.int64) for table in circuit.tables]
        self._linear = [number for number in layout.gates if has_terms(gate_of(circuit, number))]
        self._vector = VectorGates(circuit, layout, self._tables)
        self._matrix = MatrixGates(circuit, layout, first=self._vector.coefficients)
        self._vector.add_mixed(self._matrix.places)

    @property
    def prime(self) -> int:
        """p: shares of σ are taken modulo it."""
        return self._field.prime

    def sigma(self, records: list[Record], joint: Seed) -> int:
        """σ_i over all gates of `records`, with the coefficients that `joint` gives."""
        last, public, private = records[-1], 0, 0
        together = max(1, _TOGETHER // max(1, self._layout.root_elements + self._layout.gate_elements))
        for first in range(0, len(records), together):
            steps = []
            for number, record in enumerate(records[first : first + together], start=first):
                info = stream(self._spec, "check", last.step, last.attempt, len(records), number)
                drawn = expand_ring(joint, info, (self._matrix.end,))
                drawn &= np.int64((1 << COEFFICIENT_BITS) - 1)
                steps.append(Step(self._spec.circuit, self._layout, self._tables, record, self._macs(record), drawn))
                steps[-1].add_terms(self._linear)
            for part in (self._vector, self._matrix):
                v, w = part.sums(self._field, steps)
                public += v
                private += w
        return (self._key * public + private) % self._field.prime

    def _macs(self, record: Record) -> Fp:
        if record.macs is not None:
            return record.macs
        info = stream(self._spec, "mac", record.step, record.attempt)
        return self._field.expand(self._seed, info, self._layout.root_elements + self._layout.gate_elements)


class Step:
    """A step's numbers, flat. `values`: m of the roots; `rests`: E of the gates, mod 2^64 until `add_terms` has made
    `highs`; `root_macs`, `gate_macs`: μ; `coefficients`: 63 random bits each, made by all members together."""

    def __init__(
        self, circuit: Circuit, layout: Layout, tables: list[I64], record: Record, macs: Fp, coefficients: I64
    ) -> None:
        self._circuit = circuit
        self._layout = layout
        self._tables = tables
        self._record = record
        self.values: Final = np.empty(layout.root_elements, dtype=np.int64)
        for number, place in layout.roots.items():
            self.values[place] = np.ravel(record.values[number])
        self.rests: Final = np.negative(record.opened)  # |D| < 2^63: what meets the edge is never recorded
        self.highs: Final[dict[int, I64]] = {}
        self.root_macs: Final = macs[:, : layout.root_elements]
        self.gate_macs: Final = macs[:, layout.root_elements :]
        self.coefficients: Final = coefficients

    def add_terms(self, gates: list[int]) -> None:
        """E = rests + 2^64 highs of these gates, which have terms; of all others E = -D = rests."""
        for number in gates:
            gate = gate_of(self._circuit, number)
            rest = self.rests[self._layout.gates[number]].reshape(gate.wire.shape)
            terms = [(term.coefficient, self._record.values[term.operand]) for term in gate.terms]
            self.highs[number] = add_terms(rest, terms, gate.addend)

    def operand(self, wire: int) -> tuple[Fp, I64]:
        """(μ_λ, m) of an operand: [2, *shape], [*shape]."""
        m = self._record.values[wire]
        place = self._layout.roots.get(wire)
        if place is not None:
            return self.root_macs[:, place].reshape(2, *m.shape), m
        node = self._circuit.node(wire)
        assert isinstance(node, View)
        return view(node, self.operand(node.operand)[0], self._tables, lead=1), m
