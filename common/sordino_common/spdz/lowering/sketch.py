"""The sketch: the circuit's structure with real coefficients, before anything is known of scales, bounds and rounds.

Wires are numbered as they are made, equal nodes once (the same key gives the same wire), so a product that two values
need is opened once. A sketch knows shapes only; `emit` gives it fixed point, and what nothing needs is left out there.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final, TypeAlias

import numpy as np
import numpy.typing as npt

from sordino_common.errors import LocalError
from sordino_common.spdz.circuit import ProductKind, ViewOp

Shape: TypeAlias = tuple[int, ...]
Floats: TypeAlias = npt.NDArray[np.float64]

UNSTATED: Final = math.inf


@dataclass(frozen=True, slots=True)
class Given:
    """Input number `index` of the Plan."""

    index: int


@dataclass(frozen=True, slots=True)
class Public:
    """Tensor number `table` of `Sketch.publics`: known to everybody."""

    table: int


@dataclass(frozen=True, slots=True)
class Viewed:
    """As `circuit.View`; the args of a gather are the number of one of `Sketch.gathers`."""

    op: ViewOp
    operand: int
    args: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Combined:
    """Σ k w + constant + public tensor; small integers k: local."""

    terms: tuple[tuple[int, int], ...]
    constant: float = 0.0
    table: int | None = None


@dataclass(frozen=True, slots=True)
class Summed:
    operand: int
    dims: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Joined:
    operands: tuple[int, ...]
    dim: int


@dataclass(frozen=True, slots=True)
class Factor:
    """coefficient · A·B, as `circuit.Product` with a real coefficient."""

    coefficient: float
    kind: ProductKind
    a: int
    b: int
    reduce: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Opened:
    """Σ c A·B + Σ c w + constant: a gate."""

    products: tuple[Factor, ...]
    terms: tuple[tuple[float, int], ...]
    constant: float = 0.0


Node: TypeAlias = Given | Public | Viewed | Combined | Summed | Joined | Opened


@dataclass(slots=True)
class Entry:
    """A wire of the sketch. `cap`: what |value| is stated not to pass; `plan_node`: the Plan's node that asked first;
    `output`: the Plan's output that it was made for, or ""."""

    node: Node
    shape: Shape
    plan_node: int
    output: str
    cap: float = UNSTATED


@dataclass(slots=True)
class Sketch:
    """Wires, and the tables that they refer to. `plan_node` and `output` are set by whoever walks the
    Plan."""

    entries: list[Entry] = field(default_factory=list)
    publics: list[Floats] = field(default_factory=list)
    gathers: list[npt.NDArray[np.int64]] = field(default_factory=list)
    plan_node: int = -1
    output: str = ""
    _made: dict[object, int] = field(default_factory=dict)
    _tables: dict[object, int] = field(default_factory=dict)

    def shape(self, wire: int) -> Shape:
        return self.entries[wire].shape

    def cap(self, wire: int, limit: float) -> None:
        """State that |value of wire| <= limit. It then holds of what the wire is a full view of."""
        entry = self.entries[wire]
        entry.cap = min(entry.cap, limit)
        if isinstance(entry.node, Viewed) and entry.node.op != "gather":
            self.cap(entry.node.operand, limit)

    def given(self, index: int, shape: Shape) -> int:
        return self._make(Given(index), shape)

    def public(self, values: Floats) -> int:
        return self._make(Public(self.table(values)), values.shape)

    def table(self, values: Floats) -> int:
        """The number of a public tensor."""
        exact = np.asarray(values, np.float64, order="C")
        key = ("public", exact.shape, hashlib.sha256(exact.tobytes()).digest())
        if key not in self._tables:
            self._tables[key] = len(self.publics)
            self.publics.append(exact)
        return self._tables[key]

    def view(self, wire: int, shape: Shape) -> int:
        if shape == self.shape(wire):
            return wire
        node = self.entries[wire].node
        if isinstance(node, Viewed) and node.op == "view":
            return self.view(node.operand, shape)
        return self._make(Viewed("view", wire, shape), shape)

    def permute(self, wire: int, dims: tuple[int, ...]) -> int:
        if dims == tuple(range(len(dims))):
            return wire
        node = self.entries[wire].node
        if isinstance(node, Viewed) and node.op == "permute":
            return self.permute(node.operand, tuple(node.args[dim] for dim in dims))
        have = self.shape(wire)
        return self._make(Viewed("permute", wire, dims), tuple(have[dim] for dim in dims))

    def expand(self, wire: int, shape: Shape) -> int:
        if shape == self.shape(wire):
            return wire
        return self._make(Viewed("expand", wire, shape), shape)

    def gather(self, wire: int, index: npt.NDArray[np.int64]) -> int:
        """`index`: flat positions in the operand, or its element count for zero."""
        flat = np.asarray(index, np.int64, order="C")
        count = math.prod(self.shape(wire))
        if flat.size == count and flat.shape == self.shape(wire) and np.array_equal(flat.ravel(), np.arange(count)):
            return wire
        key = ("gather", hashlib.sha256(flat.tobytes()).digest(), flat.size)
        if key not in self._tables:
            self._tables[key] = len(self.gathers)
            self.gathers.append(flat.ravel())
        return self._make(Viewed("gather", wire, (self._tables[key],)), flat.shape)

    def combined(self, terms: Sequence[tuple[int, int]], constant: float, table: Floats | None, shape: Shape) -> int:
        kept = tuple(sorted((wire, k) for k, wire in terms if k))
        if len(kept) == 1 and kept[0][1] == 1 and constant == 0.0 and table is None:
            return kept[0][0]
        number = None if table is None else self.table(table)
        return self._make(Combined(tuple((k, wire) for wire, k in kept), constant, number), shape)

    def summed(self, wire: int, dims: tuple[int, ...]) -> int:
        """The sum over `dims`, which go."""
        if not dims:
            return wire
        have = self.shape(wire)
        return self._make(Summed(wire, dims), tuple(size for dim, size in enumerate(have) if dim not in dims))

    def joined(self, wires: tuple[int, ...], dim: int) -> int:
        if len(wires) == 1:
            return wires[0]
        shape = list(self.shape(wires[0]))
        shape[dim] = sum(self.shape(wire)[dim] for wire in wires)
        return self._make(Joined(wires, dim), tuple(shape))

    def opened(
        self, products: Sequence[Factor], terms: Sequence[tuple[float, int]], constant: float, shape: Shape
    ) -> int:
        node = Opened(
            tuple(sorted(products, key=lambda factor: (factor.kind, factor.a, factor.b, factor.reduce))),
            tuple(sorted(terms, key=lambda term: term[1])),
            constant,
        )
        if not node.products and not node.terms:
            raise LocalError("a gate of constants only")
        return self._make(node, shape)

    def find(self, node: Node, shape: Shape) -> int | None:
        """The wire of an equal node, if one was made."""
        return self._made.get((node, shape))

    def _make(self, node: Node, shape: Shape) -> int:
        key = (node, shape)
        if key not in self._made:
            self._made[key] = len(self.entries)
            self.entries.append(Entry(node, shape, self.plan_node, self.output))
        return self._made[key]


def operands(node: Node) -> tuple[int, ...]:
    """The wires that a node is made of."""
    match node:
        case Viewed(operand=operand) | Summed(operand=operand):
            return (operand,)
        case Combined(terms=terms):
            return tuple(wire for _, wire in terms)
        case Joined(operands=wires):
            return wires
        case Opened(products=products, terms=real):
            return (*(wire for factor in products for wire in (factor.a, factor.b)), *(wire for _, wire in real))
        case _:
            return ()
