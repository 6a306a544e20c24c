"""`require_separable`: a proof that row b of a Plan's outputs depends on row b of its data and on no other row.

Differential privacy at the level of records needs it. A device clips the gradient of every row and adds the clipped
ones up; the bound on what one row can change in the sum is worth nothing if a row reaches the gradients of other rows
as well. The Plan comes from the server, whose word is not taken: the device proves it for itself, without running
anything, by following where each value's rows lie from node to node (`row_rules`). What can't be proven is refused, so
a wrong refusal is possible and a wrong proof is not: an op without a rule mixes.

Two claims for a Plan that passes, of B rows, run by NumPy on arrays x, y and x', y' of one memory layout that differ in
row j alone, with equal parameters:

1. Every output (of role `row`, `row-gradient`, `row-left`, `row-right`) is the same in all rows but j, bit for bit.
2. One run ends with an error if and only if the other does: no index can be out of range because of what a row holds.

With B = 1 there is no other row, and the first holds of any Plan; only the second is left to prove.
Not claimed: that both runs take equally long.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final, TypeAlias

from sordino_common.errors import PlanError
from sordino_common.plan.index_bounds import bounds_of, index_operands
from sordino_common.plan.row_rules import RULES, Mixes, Rows, Tag, Value
from sordino_common.plan.spec import TensorSpec
from sordino_common.plan.values import Arg, Node, Plan, Ref, refs

ROW_ROLES: Final = frozenset({"row", "row-gradient", "row-left", "row-right"})
_INPUT_ROLES: Final = frozenset({"param", "x", "y"})


class NotSeparable(PlanError):
    """A Plan whose rows can't be told apart. `node` is the node that mixes them, if it is a node."""

    code = "not-separable"

    def __init__(self, text: str, node: int | None = None) -> None:
        super().__init__(text)
        self.node = node


@dataclass(frozen=True, slots=True)
class Mixed:
    """A value that may depend on several rows, and where that began."""

    node: int
    why: str


State: TypeAlias = Tag | Mixed


def require_separable(plan: Plan) -> int:
    """B, the number of rows, of a valid Plan for which the two claims above hold; its row outputs are [B, ...].

    Inputs are of role param, x and y (one of each of the latter, both [B, ...]), outputs of row roles only. Raises
    `NotSeparable`, naming node and op, for what can't be proven.
    """
    rows, states = row_states(plan)
    specs = plan.specs()
    for output in plan.outputs:
        if output.role not in ROW_ROLES:
            raise NotSeparable(
                f"output {output.name!r} has the role {output.role}, expected {', '.join(sorted(ROW_ROLES))}: nothing "
                f"else may leave a Plan whose rows are private"
            )
        spec, state = specs[output.value], states[output.value]
        if not spec.rank or spec.shape[0] != rows:
            raise NotSeparable(f"output {output.name!r} ({output.role}) is {spec}, expected [{rows}, ...]: a row each")
        if isinstance(state, Mixed) and rows > 1:  # of one row anything is separate
            node = plan.nodes[state.node]
            raise NotSeparable(
                f"output {output.name!r} ({output.role}) mixes the rows of the batch: node {state.node} ({node.op}): "
                f"{state.why}",
                state.node,
            )
        if isinstance(state, Rows) and (state.dim, state.inner) != (0, 1):
            raise NotSeparable(
                f"output {output.name!r} ({output.role}) is {spec} with its rows in dimension {state.dim}, expected "
                f"them in dimension 0"
            )
    return rows


def row_states(plan: Plan) -> tuple[int, list[State]]:
    """B, and for each value by its number where its rows lie: `Rows`, None (it depends on no row), or `Mixed`.

    Raises `NotSeparable` for inputs of other roles and shapes, and for an index that may be out of range.
    """
    rows = _rows_of_inputs(plan)
    specs = plan.specs()
    # One row has no other one to be mixed with: its values lie anywhere, which `Mixed` says.
    alone = Mixed(-1, "")
    states: list[State] = []
    for entry in plan.inputs:
        free = entry.role == "param" or entry.spec.numel == 0
        states.append(None if free else Rows(0) if rows > 1 else alone)
    states += [None] * len(plan.constants)
    bounds: list[int | None] = [None] * len(states)
    for index, node in enumerate(plan.nodes):
        _refuse_open_index(index, node, specs, states, bounds)
        states += _follow(index, node, rows, specs, states)
        bounds += bounds_of(node, specs, bounds)
    return rows, states


def _rows_of_inputs(plan: Plan) -> int:
    found: dict[str, TensorSpec] = {}
    for entry in plan.inputs:
        if entry.role not in _INPUT_ROLES:
            raise NotSeparable(f"input {entry.name!r} has the role {entry.role}, expected param, x or y")
        if entry.role != "param":
            if entry.role in found:
                raise NotSeparable(f"the Plan has two inputs of the role {entry.role}, expected one")
            found[entry.role] = entry.spec
    for role in ("x", "y"):
        if role not in found:
            raise NotSeparable(f"the Plan has no input of the role {role}, expected one")
        if not found[role].rank or found[role].shape[0] != found["x"].shape[0] or found[role].shape[0] < 1:
            shown = ", ".join(f"{name} is {spec}" for name, spec in found.items())
            raise NotSeparable(f"{shown}; expected as many rows in both, at least one, in dimension 0")
    return found["x"].shape[0]


def _refuse_open_index(
    index: int, node: Node, specs: list[TensorSpec], states: list[State], bounds: list[int | None]
) -> None:
    """The second claim: an index that comes with the rows is in range for certain."""
    for ref, size in index_operands(node, specs):
        bound = bounds[ref.value]
        if states[ref.value] is not None and (bound is None or bound > size):
            raise NotSeparable(
                f"node {index} ({node.op}): an index that depends on the rows may be outside [0, {size}), and the "
                f"error would tell of one row; clamp it to 0..{size - 1} before",
                index,
            )


def _follow(index: int, node: Node, rows: int, specs: list[TensorSpec], states: list[State]) -> list[State]:
    """Where the rows lie in the node's results."""
    given = [states[used] for arg in node.args for used in refs(arg)]
    results: list[State] = [None] * len(node.outs)
    mixed = next((state for state in given if isinstance(state, Mixed)), None)
    if mixed is not None:
        results = [mixed] * len(node.outs)
    elif any(given):
        rule = RULES.get(node.op)
        try:
            if rule is None:
                raise Mixes("no rule says where this op leaves the rows")
            results = list(rule(rows, node.outs, *(_operand(arg, specs, states) for arg in node.args)))
        except Mixes as mixes:
            results = [Mixed(index, str(mixes))] * len(node.outs)
    # What has no elements depends on nothing.
    return [state if out.numel else None for state, out in zip(results, node.outs, strict=True)]


def _operand(arg: Arg, specs: list[TensorSpec], states: list[State]) -> Any:
    """The argument with each reference replaced by what a rule knows of it."""
    if isinstance(arg, Ref):
        state = states[arg.value]
        assert not isinstance(state, Mixed)  # then no rule is asked
        return Value(specs[arg.value], state)
    if isinstance(arg, tuple):
        return tuple(_operand(item, specs, states) for item in arg)
    return arg
