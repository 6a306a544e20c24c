"""A step of an optimizer on all parameters at once: what a Plan does to each alike, it does to all of them end to end.

An optimizer's Plan treats one parameter after the other, by the same few elementwise ops: a model of many small ones is
stepped by many small calls. Here such a Plan is found to be L copies of one, a *lane* for each parameter, and is made
into one lane on vectors that are P entries long. Every op that is taken rounds each entry by itself, as IEEE has it, so
the results are the same bits. What is not such a Plan is left as it is.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final, Self

from sordino_common.plan.spec import TensorSpec
from sordino_common.plan.values import Arg, Input, Node, Output, Plan, Ref, refs

MOST_ENTRIES: Final = 1 << 16  # beyond, a call costs little beside its work, and temporaries would cost memory
_EXACT: Final = frozenset({"add", "sub", "mul", "div", "sqrt", "neg", "abs", "maximum", "minimum"})


@dataclass(frozen=True, slots=True, kw_only=True)
class FlatStep:
    """A Plan, and of what its inputs are made: each the entries of these inputs of the Plan that was, end to end. It
    gives parameters and states in the order of its inputs, as every such Plan does (`require_apply`)."""

    plan: Plan
    inputs: tuple[tuple[int, ...], ...]

    @classmethod
    def unchanged(cls, plan: Plan) -> Self:
        return cls(plan=plan, inputs=tuple((index,) for index in range(len(plan.inputs))))

    @classmethod
    def of(cls, plan: Plan) -> Self:
        """`plan` on one lane, or unchanged. To be called with what `require_apply` has passed."""
        lanes = _lanes(plan)
        if len(lanes) < 2 or any(_shape_of_lane(plan, lane) != _shape_of_lane(plan, lanes[0]) for lane in lanes[1:]):
            return cls.unchanged(plan)
        specs, first = plan.specs(), plan.first_node_value()
        length = sum(math.prod(specs[lane[0]].shape) for lane in lanes)
        if length > MOST_ENTRIES:
            return cls.unchanged(plan)
        left_out = {value for lane in lanes[1:] for value in lane}
        kept = [value for value in range(len(specs)) if value not in left_out]
        number = {value: at for at, value in enumerate(kept)}
        one = {value: tuple(lane[at] for lane in lanes) for at, value in enumerate(lanes[0])}

        def flat(value: int) -> TensorSpec:
            return TensorSpec(specs[value].dtype, (length,)) if value in one else specs[value]

        given = _given(plan)
        inputs = [value for value in kept if value < len(plan.inputs)]
        nodes = [value for value in kept if value >= first]
        made = Plan(
            name=plan.name,
            inputs=tuple(
                Input(name=plan.inputs[value].name, role=plan.inputs[value].role, spec=flat(value)) for value in inputs
            ),
            constants=plan.constants,
            nodes=tuple(
                Node(
                    op=plan.nodes[value - first].op,
                    args=tuple(_renumbered(arg, number) for arg in plan.nodes[value - first].args),
                    outs=(flat(value),),
                )
                for value in nodes
            ),
            outputs=tuple(
                Output(name=plan.inputs[value].name, role=plan.inputs[value].role, value=number[given[value]])
                for value in inputs
                if value in given
            ),
        )
        return cls(plan=made, inputs=tuple(one.get(value, (value,)) for value in inputs))


def _lanes(plan: Plan) -> list[list[int]]:
    """By gradient, in their order: the numbers of the values, ascending, that nodes join with it. Scalars join nothing.
    Empty unless every node is a scalar's, or entry by entry on values of one shape that belong to one gradient."""
    specs, first = plan.specs(), plan.first_node_value()
    lane = list(range(len(specs)))

    def root(value: int) -> int:
        while lane[value] != value:
            lane[value] = lane[lane[value]]  # halves the way for who asks next: a Plan may be one long chain
            value = lane[value]
        return value

    if any(specs[value].shape for value in range(len(plan.inputs), first)):
        return []  # a constant of many entries
    for value, node in enumerate(plan.nodes, start=first):
        if len(node.outs) != 1:
            return []
        joined = [ref for arg in node.args for ref in refs(arg) if specs[ref].shape]
        if joined and node.op not in _EXACT:
            return []
        if any(specs[ref].shape != specs[value].shape for ref in joined) or bool(joined) != bool(specs[value].shape):
            return []
        for ref in joined:
            lane[root(ref)] = root(value)
    members: dict[int, list[int]] = {
        root(value): [] for value, entry in enumerate(plan.inputs) if entry.role == "gradient" and entry.spec.shape
    }
    for value, spec in enumerate(specs):
        if not spec.shape:
            continue
        if root(value) not in members:
            return []
        members[root(value)].append(value)
    if any(specs[before].shape and root(before) != root(after) for before, after in _given(plan).items()):
        return []
    gradients = sum(entry.role == "gradient" for entry in plan.inputs)
    return list(members.values()) if len(members) == gradients else []


def _given(plan: Plan) -> dict[int, int]:
    """By a parameter's or state's input: the value that is given back for it."""
    carried = [value for value, entry in enumerate(plan.inputs) if entry.role in ("param", "state")]
    return dict(zip(carried, (entry.value for entry in plan.outputs), strict=True))


def _shape_of_lane(plan: Plan, lane: list[int]) -> list[object]:
    """What the lane's values are, with its own numbered from 0: equal for lanes that do the same."""
    specs, first = plan.specs(), plan.first_node_value()
    number = {value: -1 - at for at, value in enumerate(lane)}  # scalars keep their numbers
    number |= {value: value for value, spec in enumerate(specs) if not spec.shape}
    given = _given(plan)
    found: list[object] = []
    for value in lane:
        if value < len(plan.inputs):
            after = given.get(value)
            found.append((plan.inputs[value].role, specs[value].dtype, None if after is None else number[after]))
        else:
            node = plan.nodes[value - first]
            # `repr`, for 0.0 equals -0.0
            found.append((node.op, specs[value].dtype, repr([_renumbered(arg, number) for arg in node.args])))
    return found


def _renumbered(arg: Arg, number: dict[int, int]) -> Arg:
    if isinstance(arg, Ref):
        return Ref(number[arg.value])
    return tuple(_renumbered(item, number) for item in arg) if isinstance(arg, tuple) else arg
