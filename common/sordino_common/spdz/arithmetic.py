"""Local arithmetic of one party between two openings.

Party i's share of a gate's opening, from m (public to the committee), its shares of the masks and of γ:

    z^i = [i=0] (Σ k m_A·m_B + Σ k m_L + c) - Σ k (m_A·λ_B^i + λ_A^i·m_B) + γ^i     mod 2^64

and, summed over the parties with Σ λ^i = λ and γ as in `dealing`,

    Σ z^i = Σ k (m_A - λ_A)(m_B - λ_B) + Σ k (m_L - λ_L) + c + r = z + r.
"""

from __future__ import annotations

from functools import partial
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from sordino_common.spdz.calls import ADD_UP, Call, Locals, Scratch, add_multiple, constant, product_calls
from sordino_common.spdz.circuit import Circuit, Gate, Product, View, gate_of
from sordino_common.spdz.layout import Layout, Values

I64 = npt.NDArray[np.int64]
_SLOTS: Final = 5  # of scratch memory: two results, a factor, copies of two factors


class Run:
    """The arrays of a step attempt, and the calls that write them.

    `shares`: this party's, of λ, then of γ (`gammas`); shares of openings take the place of γ, then D does. `rounds`:
    D of each round. `values`: m of every wire; `inputs` come first. `tags`: see `check`."""

    __slots__ = (
        *("shares", "gammas", "rounds", "inputs", "values", "tags", "round"),
        *("masking", "opening", "accepting", "locals"),
    )

    def __init__(self, circuit: Circuit, layout: Layout) -> None:
        self.shares: I64 = np.empty(layout.root_elements + layout.gate_elements, dtype="<i8")  # as it travels
        self.gammas = self.shares[layout.root_elements :]
        self.rounds = [self.gammas[place] for place in layout.rounds]
        self.inputs: list[I64] = [np.empty(entry.wire.shape, dtype=np.int64) for entry in circuit.inputs]
        self.values: Values = list(self.inputs)
        self.masking: list[Call] = []  # once the shares are there
        self.opening: list[list[Call]] = [[] for _ in layout.rounds]  # what is opened in each round
        self.accepting: list[list[Call]] = [[] for _ in layout.rounds]  # m of what has been opened
        self.locals: list[list[Call]] = [[] for _ in layout.stages]  # and what can be computed then
        self.round = 0
        self.tags: Any = None


class Arithmetic:
    """The circuit made ready for a party: `first` for party 0. It lends arrays for steps, and takes them back."""

    def __init__(self, circuit: Circuit, layout: Layout, *, first: bool) -> None:
        self._circuit = circuit
        self._layout: Final = layout
        self._first = first
        self._views = self._operand_views()
        self._bounds = [max(gate_of(circuit, number).bound_bits for number in opened) for opened in circuit.rounds]
        self._scratch = Scratch(self._largest(), slots=_SLOTS)
        self._locals = Locals(circuit, self._scratch)
        self._free: list[Run] = []

    def lend(self) -> Run:
        """Arrays for a step attempt; what they hold is of no meaning."""
        one = self._free.pop() if self._free else self._lay_out()
        one.round, one.tags = 0, None
        return one

    def take_back(self, one: Run) -> None:
        """Its arrays are for another step."""
        self._free.append(one)

    def forget(self) -> None:
        self._free.clear()

    def begin(self, one: Run) -> None:
        """All that follows from the inputs' m and the shares, once these are there."""
        for call in one.masking:
            call()
        for call in one.locals[0]:
            call()

    def share(self, one: Run) -> I64:
        """This party's shares of everything that opens in the current round, flat."""
        for call in one.opening[one.round]:
            call()
        return one.rounds[one.round]

    def accept(self, one: Run) -> str:
        """From D of the current round m = D >> t, and all local nodes that can be computed then; the next round begins.
        Or, if some |D| >= 2^63 - 2^bound_bits, the gate where that was."""
        if at_edge(one.rounds[one.round], self._bounds[one.round]):  # at that of the gate with the largest bound
            for number in self._circuit.rounds[one.round]:
                if at_edge(one.gammas[self._layout.gates[number]], gate_of(self._circuit, number).bound_bits):
                    return f"gate {number}"
        for call in one.accepting[one.round]:
            call()
        one.round += 1
        for call in one.locals[one.round]:
            call()
        return ""

    # --- laying out ------------------------------------------------------------------------------------------------

    def _lay_out(self) -> Run:
        circuit, layout = self._circuit, self._layout
        one = Run(circuit, layout)
        moved = np.empty(layout.gate_elements, dtype=np.int64)
        stage_of = {number: stage for stage, numbers in enumerate(layout.stages) for number in numbers}
        for number, node in enumerate(circuit.nodes, start=len(circuit.inputs)):
            if isinstance(node, Gate):
                place = layout.gates[number]
                shift = partial(np.right_shift, one.gammas[place], constant(node.shift), moved[place])
                one.accepting[node.round].append(shift)
                one.values.append(moved[place].reshape(node.wire.shape))
            else:
                array, calls = self._locals.of(node, one.values)
                one.locals[stage_of[number]] += calls
                one.values.append(array)
        masks: dict[int, I64] = {
            number: one.shares[place].reshape(circuit.wire(number).shape) for number, place in layout.roots.items()
        }
        for number, view in self._views:
            masks[number], calls = self._locals.view(view, masks[view.operand])
            one.masking += calls
        for round_, opened in enumerate(circuit.rounds):
            for number in opened:
                one.opening[round_] += self._gate_calls(number, one, masks)
        return one

    def _gate_calls(self, number: int, one: Run, masks: dict[int, I64]) -> list[Call]:
        """Add to γ^i, where it stands, all else that z^i is made of."""
        gate = gate_of(self._circuit, number)
        out = one.gammas[self._layout.gates[number]].reshape(gate.wire.shape)
        calls: list[Call] = []
        for product in gate.products:
            calls += self._product_calls(product, one.values, masks, out)
        if self._first:
            for term in gate.terms:
                scratch = self._scratch.take(0, out.shape)
                calls += add_multiple(out, term.coefficient, one.values[term.operand], scratch)
            if gate.addend:
                calls.append(partial(np.add, out, constant(gate.addend), out))
        return calls

    def _product_calls(self, product: Product, values: Values, masks: dict[int, I64], out: I64) -> list[Call]:
        """out += k ([i=0] m_A·m_B - m_A·λ_B^i - λ_A^i·m_B)"""
        m_a, m_b, mask_a, mask_b = values[product.a], values[product.b], masks[product.a], masks[product.b]
        scratch, matrix = self._scratch, product.kind != "mul"
        found = scratch.take(0, out.shape if matrix else m_a.shape)
        other = scratch.take(1, found.shape)
        factor = product.coefficient if self._first else -product.coefficient
        calls: list[Call] = []
        if product.a == product.b and not matrix:  # m (m - 2 λ), or -2 m λ
            if self._first:
                calls += (partial(np.multiply, mask_a, constant(-2), found), partial(np.add, found, m_a, found))
                calls.append(partial(np.multiply, found, m_a, found))
            else:
                calls.append(partial(np.multiply, mask_a, m_a, found))
                factor = 2 * factor
        else:  # m_A (m_B - λ_B) - λ_A m_B, or -(m_A λ_B + λ_A m_B)
            right = mask_b
            if self._first:
                right = scratch.take(2, m_b.shape)
                calls.append(partial(np.subtract, m_b, mask_b, right))
            if matrix:
                calls += product_calls(m_a, right, found, scratch, 3)
                calls += product_calls(mask_a, m_b, other, scratch, 3)
            else:
                calls += [partial(np.multiply, m_a, right, found), partial(np.multiply, mask_a, m_b, other)]
            calls.append(partial(np.subtract if self._first else np.add, found, other, found))
        if product.reduce:
            total = scratch.take(1, out.shape)
            calls.append(partial(ADD_UP, found, product.reduce, np.int64, total))
            found = total
        return calls + add_multiple(out, factor, found, found)

    def _largest(self) -> int:
        """Elements of the largest array that scratch memory is taken for: an operand or a result."""
        circuit = self._circuit
        operands = [(product.a, product.b) for number in circuit.gates for product in gate_of(circuit, number).products]
        wires = [wire for pair in operands for wire in pair]
        wires += range(len(circuit.inputs), len(circuit.inputs) + len(circuit.nodes))
        return max((circuit.wire(wire).numel for wire in wires), default=0)

    def _operand_views(self) -> list[tuple[int, View]]:
        """The views between roots and operands, in order."""
        needed: set[int] = set()
        for number in self._layout.gates:
            for product in gate_of(self._circuit, number).products:
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


def at_edge(opened: I64, bound_bits: int) -> bool:
    """Whether some |D| >= 2^63 - 2^bound_bits: then D may have wrapped."""
    if not opened.size:
        return False
    limit = (1 << 63) - (1 << bound_bits)
    return bool(np.maximum.reduce(opened, axis=None) >= limit) or bool(np.minimum.reduce(opened, axis=None) <= -limit)
