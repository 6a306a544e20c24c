"""Everything that must hold of a Plan before it may run, whoever built it.

Order matters: cheap and structural first, then shapes by the ops' own rules, then what it would cost. Nothing is
allocated on the word of a Plan. After `validate_plan` a run can fail only for what the data says (an index out of
range), and then with a `PlanError`.
"""

from __future__ import annotations

import math
from typing import Final

from sordino_common.errors import PlanError
from sordino_common.plan.analysis import PlanCost, analyse
from sordino_common.plan.ops import infer_outs
from sordino_common.plan.spec import TensorSpec
from sordino_common.plan.values import INPUT_ROLES, OUTPUT_ROLES, Arg, Plan, PlanLimits, Ref, constant_spec

MAX_ARG_DEPTH: Final = 3  # a list of index tensors is 2
_MAX_NAME: Final = 200  # as messages.Label
_MAX_INT: Final = (1 << 63) - 1


def validate_plan(plan: Plan, limits: PlanLimits) -> PlanCost:
    """What running `plan` costs. Raises `PlanError`, naming node and op, on anything malformed or too large."""
    _check_counts(plan, limits)
    specs = [entry.spec for entry in plan.inputs] + [constant_spec(constant) for constant in plan.constants]
    for spec in specs:
        _check_size(spec, limits, "an input or constant")
    for index, node in enumerate(plan.nodes):
        where = f"node {index} ({str(node.op)[:40]})"
        for arg in node.args:
            _check_arg(arg, len(specs), where, MAX_ARG_DEPTH)
        try:
            inferred = infer_outs(node.op, node.args, specs)
        except PlanError as error:
            raise PlanError(f"node {index}: {error}") from None
        if inferred != node.outs:
            declared = ", ".join(map(str, node.outs))
            raise PlanError(f"{where}: declares {declared or 'nothing'}, the op gives {', '.join(map(str, inferred))}")
        for spec in inferred:
            _check_size(spec, limits, where)
        specs += inferred
    _check_outputs(plan, len(specs))
    cost = analyse(plan)
    if cost.peak_bytes > limits.peak_bytes:
        raise PlanError(
            f"Plan {plan.name!r} needs {cost.peak_bytes} bytes at its peak, at most {limits.peak_bytes} are allowed;"
            " a smaller batch needs less"
        )
    if cost.flops > limits.flops:
        raise PlanError(f"Plan {plan.name!r} takes {cost.flops} operations, at most {limits.flops} are allowed")
    return cost


def _check_counts(plan: Plan, limits: PlanLimits) -> None:
    if len(plan.nodes) > limits.nodes:
        raise PlanError(f"{len(plan.nodes)} nodes, at most {limits.nodes} are allowed")
    for what, entries in (("inputs", plan.inputs), ("constants", plan.constants), ("outputs", plan.outputs)):
        if len(entries) > limits.entries:
            raise PlanError(f"{len(entries)} {what}, at most {limits.entries} are allowed")
    _check_name(plan.name, "the Plan's name")
    for entry in plan.inputs:
        _check_name(entry.name, "an input's name")
        if entry.role not in INPUT_ROLES:
            raise PlanError(f"input {entry.name!r}: role {str(entry.role)[:40]!r} is not one of {sorted(INPUT_ROLES)}")
    # A parameter and its gradient may share a name, two inputs of one role may not.
    if len({(entry.role, entry.name) for entry in plan.inputs}) != len(plan.inputs):
        raise PlanError("two inputs have the same role and name")


def _check_outputs(plan: Plan, values: int) -> None:
    if not plan.outputs:
        raise PlanError("the Plan has no outputs")
    for entry in plan.outputs:
        _check_name(entry.name, "an output's name")
        if entry.role not in OUTPUT_ROLES:
            raise PlanError(
                f"output {entry.name!r}: role {str(entry.role)[:40]!r} is not one of {sorted(OUTPUT_ROLES)}"
            )
        if type(entry.value) is not int or not 0 <= entry.value < values:
            raise PlanError(f"output {entry.name!r} refers to value {str(entry.value)[:30]}, there are {values}")
    if len({(entry.role, entry.name) for entry in plan.outputs}) != len(plan.outputs):
        raise PlanError("two outputs have the same role and name")


def _check_name(name: object, what: str) -> None:
    if not isinstance(name, str) or not 0 < len(name) <= _MAX_NAME or not name.isprintable():
        raise PlanError(f"{what} is 1 to {_MAX_NAME} printable characters, got {str(name)[:80]!r}")


def _check_size(spec: TensorSpec, limits: PlanLimits, where: str) -> None:
    if spec.nbytes > limits.value_bytes:
        raise PlanError(f"{where}: {spec} takes {spec.nbytes} bytes, at most {limits.value_bytes} are allowed")


def _check_arg(arg: Arg, known: int, where: str, depth: int) -> None:
    """Only the types of `Arg`, exactly; integers of 64 bits; no NaN; references to earlier values only."""
    kind = type(arg)
    if kind is Ref:
        assert isinstance(arg, Ref)
        if type(arg.value) is not int or not 0 <= arg.value < known:
            raise PlanError(f"{where}: refers to value {str(arg.value)[:30]}, but only {known} values come before it")
    elif kind is tuple:
        assert isinstance(arg, tuple)
        if depth == 0:
            raise PlanError(f"{where}: arguments are nested deeper than {MAX_ARG_DEPTH}")
        for item in arg:
            _check_arg(item, known, where, depth - 1)
    elif kind is int:
        assert isinstance(arg, int)
        if not -_MAX_INT <= arg <= _MAX_INT:
            raise PlanError(f"{where}: an integer of more than 64 bits")
    elif kind is float:
        assert isinstance(arg, float)
        if math.isnan(arg):
            raise PlanError(f"{where}: NaN is no argument")
    elif kind is not str and kind is not bool and arg is not None:
        raise PlanError(f"{where}: {kind.__name__} is no argument")
