"""The two Plans of training with a bound on every row, and what a device makes sure of before it runs them.

    gradient   inputs  param*P, x [B, ...], y [B, ...]     outputs  per trainable parameter its rows, row: loss [B]
    apply      inputs  param*P, state*S, gradient*T        outputs  param*P, state*S

A parameter's rows are `row-gradient` [B, *shape], or, where the gradient of row b is the outer product of two vectors
(a linear layer: backward signal times input), `row-left` [B, m] and `row-right` [B, n] for a parameter [m, n]: then
|gradient_b| is |left_b| |right_b|, and a sum over rows is one matrix product, so no [B, m, n] is ever made
(Goodfellow, "Efficient per-example gradient computations", arXiv 1510.01799).

Nothing is clipped in the Plan. Whoever runs it clips, by norms that it computes itself; together with
`require_separable` this bounds what a row can do to a sum whatever the Plan is.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TypeAlias

from sordino_common.errors import PlanError
from sordino_common.plan.separable import require_separable
from sordino_common.plan.spec import TensorSpec
from sordino_common.plan.values import Output, Plan


@dataclass(frozen=True, slots=True, kw_only=True)
class WholeRows:
    """Output number `output` of the Plan is the gradient of each row by parameter `name`: float32 [B, *shape].

    A bias [m] may be the very value of a matrix's left factor: then `rides` is that output, and the two parameters
    together have the gradient left_b ⊗ (right_b, 1). No two blocks ride on one output."""

    name: str
    shape: tuple[int, ...]
    output: int
    rides: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class OuterRows:
    """The gradient of row b by parameter `name` [m, n] is output `left` [B, m] times output `right` [B, n]."""

    name: str
    shape: tuple[int, ...]
    left: int
    right: int


RowBlock: TypeAlias = WholeRows | OuterRows


@dataclass(frozen=True, slots=True, kw_only=True)
class RowGradients:
    """What a gradient Plan gives: B, a block per trainable parameter in the order of the parameters, and which output
    the loss of each row is."""

    rows: int
    blocks: tuple[RowBlock, ...]
    loss: int


def row_gradients(plan: Plan) -> RowGradients:
    """The outputs of a valid gradient Plan, with the proof that its rows are separate.

    Raises `NotSeparable` for rows that mix, `PlanError` for outputs that are no such gradients.
    """
    rows = require_separable(plan)
    specs = plan.specs()
    params = {entry.name: (place, entry.spec) for place, entry in enumerate(plan.inputs) if entry.role == "param"}
    blocks: list[RowBlock] = []
    losses: list[int] = []
    place, last = 0, -1
    while place < len(plan.outputs):
        output = plan.outputs[place]
        if output.role == "row":
            losses.append(place)
            place += 1
            continue
        if output.name not in params:
            raise PlanError(f"output {output.name!r} ({output.role}) is of no parameter of the Plan")
        number, param = params[output.name]
        if number <= last:
            raise PlanError(f"output {output.name!r} ({output.role}) is out of order, expected that of the parameters")
        last = number
        block = _block(plan, place, rows, param, specs)
        blocks.append(block)
        place += 1 if isinstance(block, WholeRows) else 2
    if not blocks:
        raise PlanError(
            "the Plan has no gradients: expected outputs of the role row-gradient, or row-left and row-right"
        )
    if len(losses) != 1 or specs[plan.outputs[losses[0]].value] != TensorSpec("float32", (rows,)):
        raise PlanError(
            f"expected one output of the role row, float32[{rows}] (the loss), got {len(losses)} such roles"
        )
    return RowGradients(rows=rows, blocks=_with_riders(plan, blocks), loss=losses[0])


def _with_riders(plan: Plan, blocks: list[RowBlock]) -> tuple[RowBlock, ...]:
    # Which value an output is decides, not what is in it: the Plan says the two are one.
    lefts = {(plan.outputs[b.left].value, b.shape[:1]): b.left for b in blocks if isinstance(b, OuterRows)}
    found: list[RowBlock] = []
    for block in blocks:
        if isinstance(block, WholeRows):
            rides = lefts.pop((plan.outputs[block.output].value, block.shape), None)
            block = replace(block, rides=rides)
        found.append(block)
    return tuple(found)


def _block(plan: Plan, place: int, rows: int, param: TensorSpec, specs: list[TensorSpec]) -> RowBlock:
    """The block that begins with output `place`."""
    output = plan.outputs[place]
    if output.role == "row-gradient":
        _expect(specs, output, (rows, *param.shape))
        return WholeRows(name=output.name, shape=param.shape, output=place)
    following = plan.outputs[place + 1] if place + 1 < len(plan.outputs) else None
    if output.role != "row-left" or following is None or following.role != "row-right" or following.name != output.name:
        raise PlanError(
            f"output {output.name!r} ({output.role}): expected row-left and then row-right of one parameter"
        )
    if param.rank != 2:
        raise PlanError(f"output {output.name!r} ({output.role}): the parameter is {param}, expected a matrix")
    _expect(specs, output, (rows, param.shape[0]))
    _expect(specs, following, (rows, param.shape[1]))
    return OuterRows(name=output.name, shape=param.shape, left=place, right=place + 1)


def _expect(specs: list[TensorSpec], output: Output, shape: tuple[int, ...]) -> None:
    expected = TensorSpec("float32", shape)
    if specs[output.value] != expected:
        raise PlanError(f"output {output.name!r} ({output.role}) is {specs[output.value]}, expected {expected}")


def require_apply(plan: Plan, gradients: RowGradients) -> None:
    """`PlanError` unless `plan` is a step on the sum of these gradients: it reads no data, takes one gradient for each
    block in their order, and gives back every parameter and state that it took."""
    taken = [(entry.name, entry.spec) for entry in plan.inputs if entry.role == "gradient"]
    expected = [(block.name, TensorSpec("float32", block.shape)) for block in gradients.blocks]
    if taken != expected:
        raise PlanError(f"the Plan takes the gradients {_listed(taken)}, expected {_listed(expected)}")
    foreign = [entry for entry in plan.inputs if entry.role not in ("param", "state", "gradient")]
    if foreign:
        raise PlanError(f"input {foreign[0].name!r} has the role {foreign[0].role}, expected param, state or gradient")
    specs = plan.specs()
    kept = [(entry.role, entry.name, entry.spec) for entry in plan.inputs if entry.role in ("param", "state")]
    given = [(entry.role, entry.name, specs[entry.value]) for entry in plan.outputs]
    if kept != given:
        raise PlanError("the Plan does not give back just the parameters and states that it takes, in their order")


def _listed(entries: list[tuple[str, TensorSpec]]) -> str:
    return ", ".join(f"{name} {spec}" for name, spec in entries[:8]) + (", ..." if len(entries) > 8 else "") or "none"
