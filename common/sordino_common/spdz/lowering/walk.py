"""From a Plan to a sketch: every op by its rule, values lazy as long as nobody needs them as a wire."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np

from sordino_common.plan.arrays import to_numpy
from sordino_common.plan.spec import FLOATS
from sordino_common.plan.values import Node, Plan, Ref, refs
from sordino_common.spdz.lowering.lazy import Lazy, Pending, added, as_lazy_wire, of_wire, to_output
from sordino_common.spdz.lowering.rules import REFUSED, RULES, Walk, computed
from sordino_common.spdz.lowering.rules.base import lifted
from sordino_common.spdz.lowering.settings import LoweringError, Settings
from sordino_common.spdz.lowering.sketch import Sketch

# Ops that need their secret operands as wires, whatever becomes of their result.
_NEED_WIRES: Final = frozenset({
    "mul", "div", "pow", "mm", "bmm", "addmm", "convolution", "convolution_backward", "expand", "slice", "select",
    "flip", "repeat", "pad", "gather", "index", "embedding", "cat", "slice_scatter", "select_scatter", "where",
})  # fmt: skip
# Ops whose results the stated range of values speaks of; products of elements and their sums (a loss) are bounded by
# their operands.
_CAPPED: Final = frozenset({"mm", "bmm", "addmm", "convolution", "convolution_backward", "add", "sub"})
_LAYERS: Final = frozenset({"mm", "bmm", "addmm", "convolution"})
# Ops whose result is a wire for free once their operand is one.
_PASS_ON: Final = frozenset({"view", "permute", "neg", "clone", "to"})


@dataclass(frozen=True, slots=True)
class Drawn:
    """`outputs[k]`: the wire of output k of the Plan. `powers`: (wire, |c|) of what is raised to a power of 3
    or more, c · wire."""

    sketch: Sketch
    outputs: tuple[int, ...]
    powers: dict[tuple[int, float], int]


def draw(plan: Plan, settings: Settings, apart: frozenset[str]) -> Drawn:
    """The sketch of a valid Plan. `apart`: outputs whose products are opened before they are multiplied by what they
    come with: a round and as many openings more, where a coefficient is too small for one gate.

    Raises `LoweringError` naming the node that can't be lowered."""
    specs = plan.specs()
    sketch = Sketch()
    walk = Walk(sketch, specs, settings.ranges.preactivations)
    hidden = _secrets(plan)
    wanted = _wanted(plan, hidden)
    for index, entry in enumerate(plan.inputs):
        if entry.spec.dtype not in FLOATS:
            raise LoweringError(
                f"input {entry.name!r} is {entry.spec}: on secret shares inputs are floats; give class labels as "
                f"one-hot floats"
            )
        walk.values.append(of_wire(sketch, sketch.given(index, entry.spec.shape)))
    walk.values += [np.asarray(to_numpy(constant)) for constant in plan.constants]
    carried = {(entry.name, entry.role) for entry in plan.inputs}
    for index, node in enumerate(plan.nodes):
        walk.index, walk.op, sketch.plan_node = index, node.op, index
        args = tuple(walk.value(arg) for arg in node.args)
        if not _any_lazy(args):
            walk.values += computed(node, args, specs)
            continue
        if node.op not in RULES:
            why = REFUSED.get(node.op, "it has no rule")
            walk.refuse(f"not offered on secret shares yet: {why}")
        for result, out in zip(RULES[node.op](walk, node, args), node.outs, strict=True):
            number = len(walk.values)
            value = result
            if isinstance(value, Lazy):
                assert value.shape == out.shape, (node.op, value.shape, out.shape)
                if wanted[number]:
                    value = as_lazy_wire(sketch, value)
                    if node.op in _CAPPED:
                        _cap(sketch, value, settings.ranges.values)
            walk.values.append(value)
    outputs = []
    for output in plan.outputs:
        value = walk.values[output.value]
        sketch.plan_node = _maker(plan, output.value)
        sketch.output = output.name if output.name == output.role else f"{output.role} {output.name}"
        kept = output.role in ("param", "state") and (output.name, output.role) in carried
        lazy = value if isinstance(value, Lazy) else lifted(walk, value, specs[output.value].shape)
        if sketch.output in apart:
            lazy = _opened_first(sketch, lazy)
        if kept:
            own, change = settings.of_input(output.role, output.name), settings.of_update(output.role, output.name)
            outputs.append(to_output(sketch, lazy, carried=True, cap=own, change=change))
        else:
            outputs.append(to_output(sketch, lazy, carried=False, cap=_stated(plan, output.value, settings)))
    return Drawn(sketch, tuple(outputs), walk.powers)


def _opened_first(sketch: Sketch, value: Lazy) -> Lazy:
    """The value with its pending products opened as one gate."""
    pending = tuple((c, atom) for c, atom in value.terms if isinstance(atom, Pending))
    if not pending:
        return value
    opened = as_lazy_wire(sketch, Lazy(shape=value.shape, terms=pending))
    rest = tuple((c, atom) for c, atom in value.terms if not isinstance(atom, Pending))
    return added([opened, replace(value, terms=rest)])


def _any_lazy(args: tuple[Any, ...]) -> bool:
    return any(isinstance(item, Lazy) for arg in args for item in (arg if isinstance(arg, tuple) else (arg,)))


def _cap(sketch: Sketch, value: Lazy, limit: float) -> None:
    """A Plan's value is stated not to pass `limit`: then the wire that it is a multiple of doesn't pass limit / |c|."""
    if len(value.terms) == 1 and not np.any(value.constant):
        c, wire = value.terms[0]
        if isinstance(wire, int):
            sketch.cap(wire, limit / abs(c))


def _stated(plan: Plan, value: int, settings: Settings) -> float:
    """What is stated not to be passed by an output that is the result of a layer."""
    node = plan.nodes[_maker(plan, value)] if value >= plan.first_node_value() else None
    while node is not None and node.op in _PASS_ON and isinstance(node.args[0], Ref):
        inner = node.args[0].value
        node = plan.nodes[_maker(plan, inner)] if inner >= plan.first_node_value() else None
    return settings.ranges.values if node is not None and node.op in _LAYERS else math.inf


def _maker(plan: Plan, value: int) -> int:
    number = plan.first_node_value()
    for index, node in enumerate(plan.nodes):
        if number <= value < number + len(node.outs):
            return index
        number += len(node.outs)
    return -1


def _secrets(plan: Plan) -> list[bool]:
    hidden = [True] * len(plan.inputs) + [False] * len(plan.constants)
    for node in plan.nodes:
        result = any(hidden[number] for arg in node.args for number in refs(arg))
        hidden += [result] * len(node.outs)
    return hidden


def _wanted(plan: Plan, hidden: list[bool]) -> list[bool]:
    """Which values must be wires sooner or later. They are opened where they arise, so that all who use them share the
    wire; the others stay lazy and end in the gate of an output."""
    wanted = [False] * len(hidden)
    last = len(hidden)
    for node in reversed(plan.nodes):
        outs = range(last - len(node.outs), last)
        last = outs.start
        operands = [number for arg in node.args for number in refs(arg) if hidden[number]]
        if node.op in _NEED_WIRES and not _scaling(node, hidden):
            skipped = {node.args[0].value} if node.op == "addmm" and isinstance(node.args[0], Ref) else set()
            if node.op == "convolution" and isinstance(node.args[2], Ref):
                skipped = {node.args[2].value}
            for number in operands:
                wanted[number] = wanted[number] or number not in skipped
        elif (node.op in _PASS_ON or _scaling(node, hidden)) and any(wanted[number] for number in outs):
            for number in operands:
                wanted[number] = True
    return wanted


def _scaling(node: Node, hidden: list[bool]) -> bool:
    """Multiplication by what is public; if that is a tensor of several values, its rule opens what it needs."""
    if node.op == "mul":
        return any(not isinstance(arg, Ref) or not hidden[arg.value] for arg in node.args)
    return node.op == "div"
