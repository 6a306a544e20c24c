"""Local arithmetic of one party between two openings.

Party i's share of a gate's opening, from m (public to the committee), its shares of the masks and of γ:

    z^i = [i=0] (Σ k m_A·m_B + Σ k m_L + c) - Σ k (m_A·λ_B^i + λ_A^i·m_B) + γ^i     mod 2^64

and, summed over the parties with Σ λ^i = λ and γ as in `dealing`,

    Σ z^i = Σ k (m_A - λ_A)(m_B - λ_B) + Σ k (m_L - λ_L) + c + r = z + r.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from sordino_common.ring.matmul import matmul
from sordino_common.spdz.circuit import Circuit, Gate, Product, View
from sordino_common.spdz.layout import Layout, Values, local_functions, view

I64 = npt.NDArray[np.int64]
_Share = Callable[[Values, "dict[int, Any]", I64], None]


class Arithmetic:
    """The circuit made ready for party `index`: what can be decided once is."""

    def __init__(self, circuit: Circuit, layout: Layout, *, first: bool) -> None:
        self._circuit = circuit
        self._layout: Final = layout
        self._first = first
        self._locals = local_functions(circuit, constants=True)
        self._tables = [np.array(table, dtype=np.int64) for table in circuit.tables]
        self._shares = {number: self._gate_function(number) for number in layout.gates}
        self._views = self._operand_views()

    def split(self, flat: I64) -> tuple[dict[int, Any], I64]:
        """This party's shares: of λ, for every operand of a product (roots, and what views make of them), and of γ."""
        shares: dict[int, Any] = {
            number: flat[place].reshape(self._circuit.wire(number).shape)
            for number, place in self._layout.roots.items()
        }
        for number, node in self._views:
            shares[number] = view(node, shares[node.operand], self._tables)
        return shares, flat[self._layout.root_elements :]

    def locals_after(self, rounds: int, values: Values) -> None:
        """m of all local nodes that can be computed once so many rounds have opened."""
        for number in self._layout.stages[rounds]:
            values[number] = self._locals[number](values)

    def share(self, round_: int, values: Values, masks: dict[int, Any], gammas: I64) -> I64:
        """This party's shares of everything that opens in `round_`, flat. Overwrites its γ shares there."""
        for number in self._circuit.rounds[round_]:
            self._shares[number](values, masks, gammas[self._layout.gates[number]])
        return gammas[self._layout.rounds[round_]]

    def accept(self, round_: int, values: Values, opened: I64) -> str:
        """m = D >> t for the round's gates; or, if some |D| >= 2^63 - 2^bound_bits, the gate where that was."""
        for number in self._circuit.rounds[round_]:
            gate = self._circuit.node(number)
            assert isinstance(gate, Gate)
            flat = opened[self._layout.gates[number]]
            if at_edge(flat, gate.bound_bits):
                return f"gate {number}"
            values[number] = (flat >> np.int64(gate.shift)).reshape(gate.wire.shape)
        return ""

    def _operand_views(self) -> list[tuple[int, View]]:
        """The views between roots and operands, in order."""
        needed: set[int] = set()
        for number in self._layout.gates:
            gate = self._circuit.node(number)
            assert isinstance(gate, Gate)
            for product in gate.products:
                for operand in (product.a, product.b):
                    current = operand
                    while current not in self._layout.roots:
                        needed.add(current)
                        node = self._circuit.node(current)
                        assert isinstance(node, View)
                        current = node.operand
        result = []
        for number in sorted(needed):
            node = self._circuit.node(number)
            assert isinstance(node, View)
            result.append((number, node))
        return result

    def _gate_function(self, number: int) -> _Share:
        gate = self._circuit.node(number)
        assert isinstance(gate, Gate)
        shape = gate.wire.shape
        products = [(self._product_function(product), np.int64(product.coefficient)) for product in gate.products]
        terms = [(term.operand, np.int64(term.coefficient)) for term in gate.terms] if self._first else []
        addend = np.int64(gate.addend) if self._first and gate.addend else None

        def share(values: Values, masks: dict[int, Any], gammas: I64) -> None:
            out = gammas.reshape(shape)
            for product, coefficient in products:
                part = product(values, masks)
                if coefficient != 1:
                    part = part * coefficient
                np.add(out, part, out=out)
            for operand, coefficient in terms:
                np.add(out, values[operand] * coefficient, out=out)
            if addend is not None:
                np.add(out, addend, out=out)

        return share

    def _product_function(self, product: Product) -> Callable[[Values, dict[int, Any]], Any]:
        """[i=0] m_A·m_B - m_A·λ_B^i - λ_A^i·m_B"""
        a, b, first, reduce = product.a, product.b, self._first, product.reduce
        if product.kind != "mul":

            def matrix(values: Values, masks: dict[int, Any]) -> Any:
                right = values[b] - masks[b] if first else -masks[b]
                out = matmul(values[a], right)
                return np.subtract(out, matmul(masks[a], values[b]), out=out)

            return matrix

        def elementwise(values: Values, masks: dict[int, Any]) -> Any:
            if a == b:  # m (m - 2 λ), or -2 m λ
                right = np.asarray(masks[a] * np.int64(-2))
                if first:
                    right += values[a]
                full = right
                full *= values[a]
            else:
                full = np.asarray(values[b] - masks[b] if first else -masks[b])
                full *= values[a]
                full -= masks[a] * values[b]
            return full.sum(axis=reduce, dtype=np.int64) if reduce else full

        return elementwise


def at_edge(opened: I64, bound_bits: int) -> bool:
    """Whether some |D| >= 2^63 - 2^bound_bits: then D may have wrapped."""
    if not opened.size:
        return False
    limit = (1 << 63) - (1 << bound_bits)
    return bool(opened.max() >= limit) or bool(opened.min() <= -limit)
