"""From sketch to circuit: integers for coefficients, bounds, mask room, rounds.

Bounds on integers are followed exactly (Python integers), wire by wire, from the stated ranges of the inputs. Mask room
is affine in the number of steps n that parameters are carried through, base + growth · n: a parameter that is changed
by adding a fresh gate grows by that gate's room in every step. Where a sum of masks could leave int64 within the stated
number of steps, a gate that multiplies by one is put in and gives it a fresh mask.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Final, TypeAlias

import numpy as np

from sordino_common.plan.values import Plan
from sordino_common.spdz.circuit import (
    BOUND_BITS_MAX,
    BOUND_BITS_TARGET,
    Cat,
    Circuit,
    CircuitInput,
    CircuitOutput,
    Gate,
    Linear,
    Node,
    Product,
    Sum,
    Term,
    View,
    Wire,
)
from sordino_common.spdz.lowering.magnitudes import ceil_log2, inner
from sordino_common.spdz.lowering.scales import BAD, SLACK, Part, choose
from sordino_common.spdz.lowering.settings import CoefficientRefused, GateNote, LoweringError, Settings
from sordino_common.spdz.lowering.sketch import (
    Combined,
    Given,
    Joined,
    Opened,
    Public,
    Sketch,
    Summed,
    Viewed,
)
from sordino_common.spdz.lowering.walk import Drawn

_INPUT_SHIFT: Final = 20
_ROOM: Final = (1 << 63) - 1
_ENDLESS: Final = 1 << 40


@dataclass(frozen=True, slots=True)
class _Known:
    """A wire of the circuit: number, shape, scale, bound on |integer|, room = base + growth·n, round it is there.
    `carried`: its mask is made of masks of the step before."""

    number: int
    shape: tuple[int, ...]
    bits: int
    size: int
    base: int
    growth: int
    level: int
    carried: bool = False


Key: TypeAlias = tuple[str, str]  # name and role of an input that is an output too
Room: TypeAlias = tuple[int, int]


def _room_after(before: _Known, after: _Known) -> Room:
    """(base, growth) that hold for the next step too: a mask that is new every step does not grow."""
    if not after.carried:
        return max(before.base, after.base), 0
    return before.base, max(before.growth, after.base - before.base, after.growth)


@dataclass
class Emitter:
    """Builds the circuit of one sketch. `rooms`: (base, growth) of the carried inputs, as far as they are known."""

    plan: Plan
    drawn: Drawn
    settings: Settings
    found: Mapping[int, float]
    bits: Mapping[int, int]
    rooms: Mapping[Key, Room]
    fresh: frozenset[Key]  # outputs that get a new mask every step
    max_steps: int = _ENDLESS
    nodes: list[Node] = field(default_factory=list)
    inputs: list[CircuitInput] = field(default_factory=list)
    tables: list[tuple[int, ...]] = field(default_factory=list)
    constants: list[tuple[tuple[int, ...], tuple[int, ...]]] = field(default_factory=list)
    notes: list[GateNote] = field(default_factory=list)
    known: dict[int, _Known] = field(default_factory=dict)
    _gathers: dict[int, int] = field(default_factory=dict)
    _remasked: dict[int, _Known] = field(default_factory=dict)

    @property
    def sketch(self) -> Sketch:
        return self.drawn.sketch

    def emit(self, order: Sequence[int], plan_id: bytes) -> tuple[Circuit, dict[Key, Room]]:
        """The circuit, and what room its carried outputs want their inputs to have."""
        for index in range(len(self.plan.inputs)):
            self._given(index)
        for wire in order:
            entry = self.sketch.entries[wire]
            self.known[wire] = self._node(wire, entry.node, entry.shape, entry.plan_node)
        outputs, wanted = [], {}
        places = {(entry.name, entry.role): k for k, entry in enumerate(self.plan.inputs)}
        for output, wire in zip(self.plan.outputs, self.drawn.outputs, strict=True):
            key = (output.name, output.role)
            result = self._exactly(self.known[wire], self.settings.fraction_bits)
            if key in places and output.role in ("param", "state"):
                if key in self.fresh:
                    result = self._remask(result, -1)
                wanted[key] = _room_after(self._input_wires[places[key]], result)
            outputs.append(CircuitOutput(name=output.name, role=output.role, wire=result.number))
        circuit = Circuit(
            plan_id=plan_id,
            inputs=tuple(self.inputs),
            nodes=tuple(self.nodes),
            outputs=tuple(outputs),
            tables=tuple(self.tables),
            constants=tuple(self.constants),
        )
        return circuit, wanted

    _input_wires: list[_Known] = field(default_factory=list)

    @cached_property
    def _carried(self) -> frozenset[str]:
        """What gates of carried outputs are made for, as `Sketch.output` says it."""
        inputs = {(entry.name, entry.role) for entry in self.plan.inputs}
        return frozenset(
            f"{entry.role} {entry.name}" for entry in self.plan.outputs if (entry.name, entry.role) in inputs
        )

    # --- wires ---------------------------------------------------------------------------------------------------

    def _given(self, index: int) -> None:
        given, full = self.plan.inputs[index], self.settings.fraction_bits
        stated = self.settings.of_input(given.role, given.name)
        size = int(math.ldexp(stated, full)) + 1
        shift = min(_INPUT_SHIFT, BOUND_BITS_TARGET - size.bit_length())
        if shift < 1:
            raise LoweringError(
                f"input {given.name!r}: a range of {stated:g} leaves no room for a mask at {full} fraction bits; scale "
                f"the data, or state a smaller range"
            )
        fresh = 1 << self.settings.rooms.get(given.name, 63 - shift)
        base, growth = self.rooms.get((given.name, given.role), (fresh, 0))
        wire = Wire(
            shape=given.spec.shape,
            fraction_bits=full,
            magnitude=math.ldexp(float(size), -full),
            room=min(base + growth * self.settings.steps, _ROOM),
        )
        self.inputs.append(
            CircuitInput(
                name=given.name, role=given.role, wire=wire, shift=shift, bound_bits=(size << shift).bit_length()
            )
        )
        self._check_room(base, growth)
        carried = given.role in ("param", "state")
        self._input_wires.append(_Known(index, given.spec.shape, full, size, base, growth, 0, carried))

    def _add(
        self,
        make: Any,
        shape: tuple[int, ...],
        bits: int,
        size: int,
        base: int,
        growth: int,
        level: int,
        carried: bool = False,
    ) -> _Known:
        """Append a node; `make(wire)` builds it."""
        wire = Wire(
            shape=shape,
            fraction_bits=bits,
            magnitude=math.ldexp(float(size), -bits),
            room=min(base + growth * self.settings.steps, _ROOM),
        )
        self.nodes.append(make(wire))
        return _Known(len(self.inputs) + len(self.nodes) - 1, shape, bits, size, base, growth, level, carried)

    def _node(self, wire: int, node: Any, shape: tuple[int, ...], plan_node: int) -> _Known:
        match node:
            case Given(index=index):
                return self._input_wires[index]
            case Public(table=table):
                return self._public(table)
            case Viewed(operand=operand):
                return self._view(node, self.known[operand], shape)
            case Summed(operand=operand, dims=dims):
                x = self.known[operand]
                count = math.prod(x.shape[dim] for dim in dims)
                (x,) = self._roomy(((count, x),), plan_node)
                return self._add(
                    lambda made: Sum(operand=x.number, dims=dims, keepdim=False, wire=made),
                    shape, x.bits, x.size * count, x.base * count, x.growth * count, x.level, x.carried,
                )  # fmt: skip
            case Joined(operands=parts, dim=dim):
                top = max(self.known[part].bits for part in parts)
                wires = [self._exactly(self.known[part], top) for part in parts]
                return self._add(
                    lambda made: Cat(operands=tuple(x.number for x in wires), dim=dim, wire=made),
                    shape, top, max(x.size for x in wires), max(x.base for x in wires), max(x.growth for x in wires),
                    max(x.level for x in wires), any(x.carried for x in wires),
                )  # fmt: skip
            case Combined(terms=terms, constant=constant, table=table):
                return self._combined([(k, self.known[part]) for k, part in terms], constant, table, shape, plan_node)
            case Opened():
                return self._gate(wire, node, shape, plan_node)
        raise AssertionError(node)

    def _view(self, node: Viewed, x: _Known, shape: tuple[int, ...]) -> _Known:
        args = node.args
        if node.op == "gather":
            if args[0] not in self._gathers:
                self._gathers[args[0]] = len(self.tables)
                self.tables.append(tuple(self.sketch.gathers[args[0]].tolist()))
            args = (self._gathers[args[0]],)
        return self._add(
            lambda made: View(op=node.op, operand=x.number, args=args, wire=made),
            shape, x.bits, x.size, x.base, x.growth, x.level, x.carried,
        )  # fmt: skip

    def _public(self, table: int) -> _Known:
        """A public tensor as a wire whose mask is zero. Small entries get more fraction bits."""
        values = self.sketch.publics[table]
        largest = float(np.abs(values).max()) if values.size else 0.0
        bits = self.settings.fraction_bits + max(0, -ceil_log2(largest)) if largest else self.settings.fraction_bits
        bits = min(bits, 2 * self.settings.fraction_bits)
        if math.ldexp(largest, bits) >= 2.0**BOUND_BITS_TARGET:
            raise LoweringError(f"a constant of size {largest:g} is too large for {bits} fraction bits")
        number, size = self._constant(values, bits)
        return self._add(
            lambda made: Linear(terms=(), constant=0, table=number, wire=made), values.shape, bits, size, size, 0, 0
        )

    def _constant(self, values: Any, bits: int) -> tuple[int, int]:
        whole = np.rint(np.ldexp(values, bits)).astype(np.int64)
        entry = (tuple(values.shape), tuple(whole.ravel().tolist()))
        if entry not in self.constants:
            self.constants.append(entry)
        return self.constants.index(entry), int(np.abs(whole).max()) if whole.size else 0

    def _combined(
        self,
        terms: Sequence[tuple[int, _Known]],
        constant: float,
        table: int | None,
        shape: tuple[int, ...],
        plan_node: int,
        bits: int = 0,
    ) -> _Known:
        top = max([bits, *(x.bits for _, x in terms)])
        scaled = [(k << (top - x.bits), x) for k, x in terms]
        wires = self._roomy(scaled, plan_node)
        whole = round(math.ldexp(constant, top))
        number, extra = (None, 0) if table is None else self._constant(self.sketch.publics[table], top)
        size = sum(abs(k) * x.size for (k, _), x in zip(scaled, wires, strict=True)) + abs(whole) + extra
        return self._add(
            lambda made: Linear(
                terms=tuple((k, x.number) for (k, _), x in zip(scaled, wires, strict=True)),
                constant=whole, table=number, wire=made,
            ),
            shape, top, size,
            sum(abs(k) * x.base for (k, _), x in zip(scaled, wires, strict=True)) + abs(whole) + extra,
            sum(abs(k) * x.growth for (k, _), x in zip(scaled, wires, strict=True)),
            max((x.level for x in wires), default=0), any(x.carried for x in wires),
        )  # fmt: skip

    def _exactly(self, x: _Known, bits: int) -> _Known:
        """x at that scale. What has more fraction bits (a small constant, and what is made of it) loses them in a gate
        of its own."""
        if x.bits <= bits:
            return x if x.bits == bits else self._combined([(1, x)], 0.0, None, x.shape, -1, bits)
        up = max(0, BOUND_BITS_TARGET - x.size.bit_length())
        return self._open(
            (), ((1 << up, x),), 0, up + x.bits - bits, bits, x.size << up, x.shape, -1, "fewer bits", 0.0
        )

    # --- room ----------------------------------------------------------------------------------------------------

    def _roomy(self, terms: Sequence[tuple[int, _Known]], plan_node: int) -> list[_Known]:
        """The wires of Σ k w, the largest masks replaced by fresh ones until the sum of masks stays in int64."""
        wires = [x for _, x in terms]
        tried: set[int] = set()
        while not self._fits(sum(abs(k) * x.base for (k, _), x in zip(terms, wires, strict=True)),
                             sum(abs(k) * x.growth for (k, _), x in zip(terms, wires, strict=True))):  # fmt: skip
            left = [index for index in range(len(wires)) if index not in tried]
            if not left:
                raise LoweringError(
                    f"node {plan_node}: a sum of masks leaves 64 bits even with fresh masks; sum fewer elements at a "
                    f"time (a smaller batch or image)",
                    node=plan_node,
                )
            worst = max(left, key=lambda index: abs(terms[index][0]) * self._room(wires[index]))
            tried.add(worst)
            wires[worst] = self._remask(wires[worst], plan_node)
        self._check_room(sum(abs(k) * x.base for (k, _), x in zip(terms, wires, strict=True)),
                         sum(abs(k) * x.growth for (k, _), x in zip(terms, wires, strict=True)))  # fmt: skip
        return wires

    def _room(self, x: _Known) -> int:
        return x.base + x.growth * self.settings.steps

    def _fits(self, base: int, growth: int) -> bool:
        return base + growth * self.settings.steps <= _ROOM

    def _check_room(self, base: int, growth: int) -> None:
        if growth:
            self.max_steps = min(self.max_steps, (_ROOM - base) // growth)

    def _remask(self, x: _Known, plan_node: int) -> _Known:
        """x times one, with a fresh mask as small as the bound allows."""
        if x.number in self._remasked:
            return self._remasked[x.number]
        shift = BOUND_BITS_TARGET - x.size.bit_length()
        if shift < 1:
            raise LoweringError(
                f"node {plan_node}: a value of {x.size.bit_length()} bits can't get a fresh mask; state smaller ranges",
                node=plan_node,
            )
        gate = self._open(
            (), ((1 << shift, x),), 0, shift, x.bits, x.size << shift, x.shape, plan_node, "fresh mask", 0.0
        )
        self._remasked[x.number] = gate
        return gate

    # --- gates ---------------------------------------------------------------------------------------------------

    def _gate(self, wire: int, node: Opened, shape: tuple[int, ...], plan_node: int) -> _Known:
        parts = [
            Part(
                coefficient=factor.coefficient,
                scale=self.known[factor.a].bits + self.known[factor.b].bits,
                size=self.known[factor.a].size * self.known[factor.b].size * inner(self.sketch, factor),
            )
            for factor in node.products
        ]
        parts += [
            Part(coefficient=c, scale=self.known[part].bits, size=self.known[part].size) for c, part in node.terms
        ]
        # The real bound of the pre-pass is no worse than what integers say: polynomials are bounded as such there.
        cap = self.found[wire]
        bits = self.bits[wire]
        output, worst = self.sketch.entries[wire].output, self.settings.exactness or BAD
        if output in self._carried:
            worst = BAD
        chosen = choose(parts, node.constant, cap, bits, math.prod(shape), worst=worst)
        if chosen is None:
            raise self._refusal(parts, cap, bits, plan_node, output)
        count = len(node.products)
        products = tuple((factor, k) for factor, k in zip(node.products, chosen.integers[:count], strict=True) if k)
        terms = tuple(
            (k, self.known[part]) for (_, part), k in zip(node.terms, chosen.integers[count:], strict=True) if k
        )
        return self._open(
            tuple(
                Product(
                    kind=factor.kind,
                    a=self.known[factor.a].number,
                    b=self.known[factor.b].number,
                    coefficient=k,
                    reduce=factor.reduce,
                )
                for factor, k in products
            ),
            terms,
            chosen.addend,
            chosen.scale - bits,
            bits,
            chosen.size,
            shape,
            plan_node,
            self._text(node),
            chosen.error,
            output=output,
            extra_level=max([0, *(self.known[part].level for factor, _ in products for part in (factor.a, factor.b))]),
        )

    def _open(
        self,
        products: tuple[Product, ...],
        terms: Sequence[tuple[int, _Known]],
        addend: int,
        shift: int,
        bits: int,
        size: int,
        shape: tuple[int, ...],
        plan_node: int,
        text: str,
        error: float,
        extra_level: int = 0,
        output: str = "",
    ) -> _Known:
        level = max([extra_level, *(x.level for _, x in terms)])
        bound = max(size, 1).bit_length()
        made = self._add(
            lambda wire: Gate(
                products=products,
                terms=tuple(Term(operand=x.number, coefficient=k) for k, x in terms),
                addend=addend,
                shift=shift,
                bound_bits=bound,
                round=level,
                node=max(plan_node, 0),
                wire=wire,
            ),
            shape, bits, (size >> shift) + 1, 1 << (63 - shift), 0, level + 1,
        )  # fmt: skip
        self.notes.append(
            GateNote(
                wire=made.number,
                node=plan_node,
                op=self.plan.nodes[plan_node].op if plan_node >= 0 else "output",
                output=output,
                text=text,
                round=level,
                elements=math.prod(shape),
                bound_bits=bound,
                shift=shift,
                magnitude=math.ldexp(float(size), -(shift + bits)),
                error=error,
            )
        )
        return made

    def _text(self, node: Opened) -> str:
        kinds: dict[str, int] = {}
        for factor in node.products:
            kind = f"{factor.kind}+sum" if factor.reduce else factor.kind
            kinds[kind] = kinds.get(kind, 0) + 1
        if node.terms:
            kinds["term"] = len(node.terms)
        return " + ".join(kind if count == 1 else f"{count} {kind}" for kind, count in kinds.items())

    def _refusal(self, parts: Sequence[Part], cap: float, bits: int, plan_node: int, output: str) -> CoefficientRefused:
        op = self.plan.nodes[plan_node].op if plan_node >= 0 else "output"
        where = f"node {plan_node} ({op}{', for ' + output if output else ''})"
        smallest = min((abs(part.coefficient) for part in parts), default=1.0)
        reach = max(cap * SLACK, 2.0**-bits)
        needed = max((part.scale + 6 - ceil_log2(abs(part.coefficient)) for part in parts), default=bits + 1)
        bound = max(needed, bits + 1) + ceil_log2(reach)
        return CoefficientRefused(
            f"{where}: a value of up to {cap:.4g} with a coefficient of {smallest:.3g} takes a bound of about {bound} "
            f"bits, at most {BOUND_BITS_MAX} are allowed; state smaller ranges (spdz.ranges: params, updates, values), "
            f"or use a smaller batch, a larger learning rate or fewer fraction bits",
            node=plan_node,
            output=output,
        )
