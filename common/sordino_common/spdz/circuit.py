"""The circuit: a Plan lowered to wires on secret shares, gates that open, and the rounds that they open in.

A wire holds an integer tensor x (fixed point: the real value times 2^f, f = `Wire.fraction_bits`) as x = m - λ over the
integers: the masked value m is known to the whole committee, the mask λ to the dealer alone. Wires are numbered in one
row, inputs first, then nodes; a node refers to smaller numbers only.

Local nodes cost nothing: each party applies the same integer function to m that the dealer applies to λ.

    View       re-arranges entries (view, permute, expand, gather with zeros)
    Linear     Σ k_j w_j + constant, small integers k_j; the constant is added to m only
    Sum        over some dimensions
    Cat        along a dimension

A gate opens one ring element D per element of its result (Turbospeedz, Ben-Efraim, Nielsen and Omri, ACNS 2019, in a
ring, with a dealer):

    D = Σ_j k_j A_j·B_j + Σ_l k_l L_l + r    over the integers,    m = D >> t,   λ = r >> t        r uniform in Z_2^64

`·` is an elementwise product, summed over some dimensions if `reduce` says so, or a matrix product. No wrap: D is z + r
exactly unless |D| >= 2^63 - 2^bound_bits, which every party sees (`MaskAtEdge`); |z| < 2^bound_bits by the interval
analysis. The result is floor(z / 2^t) or that plus one: since D is uniform, an unbiased rounding.

A party needs shares of λ only for tensors that are operands of products. They are dealt for each operand's *root*: what
remains when its views are stripped. Whatever else a gate needs of the masks, the dealer puts into γ (see `dealing`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Final, Literal, TypeAlias

from sordino_common.errors import LocalError

BOUND_BITS_TARGET: Final = 40  # retry chance 2^-23 an element
BOUND_BITS_MAX: Final = 44  # beyond this the compiler refuses
RING_BITS: Final = 64

ViewOp = Literal["view", "permute", "expand", "gather"]
ProductKind = Literal["mul", "mm", "bmm"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Wire:
    """What is known of a wire before anything runs. |real value| <= `magnitude`; |m| and |λ| <= `room` (integers)."""

    shape: tuple[int, ...]
    fraction_bits: int
    magnitude: float
    room: int

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True, slots=True, kw_only=True)
class CircuitInput:
    """Input `name` of the Plan (`role`: as in the Plan). Who provides it opens D = (x << shift) + r to the committee;
    m = D >> shift. A parameter or state of a later step comes with the m and λ of the step before."""

    name: str
    role: str
    wire: Wire
    shift: int
    bound_bits: int  # |x << shift| < 2^bound_bits


@dataclass(frozen=True, slots=True, kw_only=True)
class View:
    """`view`: args = new shape. `permute`: args = dims. `expand`: args = new shape. `gather`: the flat result is the
    flat operand followed by one zero, taken at `Circuit.tables[args[0]]` (so zeros can be padded in); its shape is the
    wire's."""

    op: ViewOp
    operand: int
    args: tuple[int, ...]
    wire: Wire


@dataclass(frozen=True, slots=True, kw_only=True)
class Linear:
    """Σ coefficient · wire, all of one shape and one scale, plus `constant` (an integer at that scale, or the number
    of one of `Circuit.constants` of that shape)."""

    terms: tuple[tuple[int, int], ...]  # (coefficient, wire)
    constant: int
    table: int | None  # of `Circuit.constants`, added too
    wire: Wire


@dataclass(frozen=True, slots=True, kw_only=True)
class Sum:
    """Over `dims` (ascending, not negative); the dimensions go, or stay with size 1 if `keepdim`."""

    operand: int
    dims: tuple[int, ...]
    keepdim: bool
    wire: Wire


@dataclass(frozen=True, slots=True, kw_only=True)
class Cat:
    operands: tuple[int, ...]
    dim: int
    wire: Wire


@dataclass(frozen=True, slots=True, kw_only=True)
class Product:
    """k A·B. `mul`: equal shapes, summed over `reduce` (ascending; those dimensions go). `mm`: [M,K] x [K,N]. `bmm`:
    [B,M,K] x [B,K,N]; `reduce` is empty for these two."""

    kind: ProductKind
    a: int
    b: int
    coefficient: int
    reduce: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Term:
    """k L: a wire of the gate's shape."""

    operand: int
    coefficient: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Gate:
    """See the module's text. `node`: number of the Plan's node that asked for it. `addend`: a public integer that is
    added to z (and so to D)."""

    products: tuple[Product, ...]
    terms: tuple[Term, ...]
    addend: int
    shift: int
    bound_bits: int
    round: int
    node: int
    wire: Wire


Node: TypeAlias = View | Linear | Sum | Cat | Gate


@dataclass(frozen=True, slots=True, kw_only=True)
class CircuitOutput:
    """Wire `wire` is output `name` of the Plan, of role `role`."""

    name: str
    role: str
    wire: int


@dataclass(frozen=True, kw_only=True)
class Circuit:
    """One step. `tables`: int64 index tables of gathers; `constants`: public int64 tensors, as (shape, values)."""

    plan_id: bytes
    inputs: tuple[CircuitInput, ...]
    nodes: tuple[Node, ...]
    outputs: tuple[CircuitOutput, ...]
    tables: tuple[tuple[int, ...], ...]
    constants: tuple[tuple[tuple[int, ...], tuple[int, ...]], ...]

    def wire(self, number: int) -> Wire:
        if number < len(self.inputs):
            return self.inputs[number].wire
        return self.nodes[number - len(self.inputs)].wire

    def node(self, number: int) -> Node:
        """The node that makes wire `number`, which is no input."""
        if number < len(self.inputs):
            raise LocalError(f"wire {number} is an input, not a node")
        return self.nodes[number - len(self.inputs)]

    @cached_property
    def gates(self) -> tuple[int, ...]:
        """Wire numbers of all gates, ascending."""
        first = len(self.inputs)
        return tuple(first + k for k, node in enumerate(self.nodes) if isinstance(node, Gate))

    @cached_property
    def rounds(self) -> tuple[tuple[int, ...], ...]:
        """Wire numbers of the gates that open in each round, ascending within the round."""
        rounds: dict[int, list[int]] = {}
        for number in self.gates:
            gate = self.node(number)
            assert isinstance(gate, Gate)
            rounds.setdefault(gate.round, []).append(number)
        return tuple(tuple(rounds[k]) for k in range(len(rounds)))

    @cached_property
    def root_of(self) -> Mapping[int, int]:
        """Wire -> the wire that remains when its views are stripped."""
        roots: dict[int, int] = {number: number for number in range(len(self.inputs))}
        for number, node in enumerate(self.nodes, start=len(self.inputs)):
            roots[number] = roots[node.operand] if isinstance(node, View) else number
        return roots

    @cached_property
    def roots(self) -> tuple[int, ...]:
        """The wires whose masks the parties hold shares of, ascending: roots of the operands of products."""
        used: set[int] = set()
        for number in self.gates:
            gate = self.node(number)
            assert isinstance(gate, Gate)
            for product in gate.products:
                used.update((self.root_of[product.a], self.root_of[product.b]))
        return tuple(sorted(used))

    @cached_property
    def opened_elements(self) -> tuple[int, ...]:
        """Elements that every party opens in each round."""
        return tuple(sum(self.wire(number).numel for number in gates) for gates in self.rounds)

    @cached_property
    def root_elements(self) -> int:
        return sum(self.wire(number).numel for number in self.roots)

    @cached_property
    def gate_elements(self) -> int:
        return sum(self.opened_elements)


def gate_of(circuit: Circuit, number: int) -> Gate:
    """The gate that makes wire `number`."""
    gate = circuit.node(number)
    if not isinstance(gate, Gate):
        raise LocalError(f"wire {number} is made by a {type(gate).__name__}, not by a gate")
    return gate
