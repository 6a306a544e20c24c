"""`trace`: a PyTorch function -> a Plan, its bytes and its identity.

    capture   make_fx on fake tensors, core aten decompositions, functionalization       capture.py, origins.py
    lower     each aten overload -> ops of the table; known tensors folded              lowering.py
    factor    gradients of rows that are outer products become their two factors        outer.py
    write     equal operations once, dead ones dropped, values renumbered               draft.py
    encode    validated canonical CBOR; its SHA-256 is the Plan's identity              plan.plan
    prove     the Plan run on the examples gives what the function gives there

The same function on examples of the same shapes gives the same bytes, in any process: nothing in a Plan comes from the
examples' values, from addresses or from the order of a set.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from sordino_common.errors import LocalError, PlanError
from sordino_common.plan.interpreter import NumpyProgram
from sordino_common.plan.plan import DEFAULT_PLAN_LIMITS, encode_plan, plan_id
from sordino_common.plan.values import Input, Plan, PlanLimits, Ref
from sordino_server.trace.capture import Function, capture
from sordino_server.trace.draft import Draft, spec_of
from sordino_server.trace.lowering import lower
from sordino_server.trace.origins import ModulePaths
from sordino_server.trace.outer import factored, multiplied


@dataclass(frozen=True, slots=True, kw_only=True)
class TracedPlan:
    """A Plan, its canonical bytes and their SHA-256.

    `origins[i]` is the model's line behind node i. It is no part of the Plan.
    """

    plan: Plan
    data: bytes
    plan_id: bytes
    origins: tuple[str, ...]


def trace(
    fn: Function,
    example_inputs: Sequence[Tensor],
    *,
    inputs: Sequence[tuple[str, str]],
    outputs: Sequence[tuple[str, str]],
    name: str,
    model: nn.Module | None = None,
    limits: PlanLimits = DEFAULT_PLAN_LIMITS,
) -> TracedPlan:
    """The Plan of `fn`: tensors -> sequence of tensors, for inputs shaped like the examples.

    `inputs` and `outputs` give (name, role) for each. `model` gives errors the path of the module they happened in.
    Raises `PlanError` for an op outside the table, a data-dependent program, or a Plan over `limits`.
    """
    if len(inputs) != len(example_inputs):
        raise LocalError(f"trace {name!r}: {len(example_inputs)} example inputs, but {len(inputs)} (name, role) pairs")
    examples = [example.detach() for example in example_inputs]
    modules = ModulePaths(model)
    graph = capture(fn, examples, modules=modules, name=name)
    draft = Draft(
        [
            Input(label, role, spec_of(example, f"{name}: input {label!r}"))
            for (label, role), example in zip(inputs, examples, strict=True)
        ]
    )
    results: list[Ref] = lower(graph, draft, name=name, by_rows=any(role == "row-gradient" for _, role in outputs))
    if len(results) != len(outputs):
        raise LocalError(
            f"trace {name!r}: the function returns {len(results)} tensors, but {len(outputs)} outputs are named"
        )
    named = [(label, role, ref) for (label, role), ref in zip(outputs, results, strict=True)]
    plan, origins = draft.finish(name, factored(draft, named))
    data = encode_plan(plan, limits)
    _prove(fn, plan, examples)
    return TracedPlan(plan=plan, data=data, plan_id=plan_id(data), origins=tuple(map(str, origins)))


# Rounding apart, the two sides agree to about 1e-5. A wrong program differs nearly everywhere; rounding alone can
# differ by much at a few places where the program jumps (a ReLU at 0, Adam's first step, which is the sign of the
# gradient).
_RELATIVE = 1e-3
_ABSOLUTE = 1e-4
_SHARE = 0.05


def _prove(fn: Function, plan: Plan, examples: Sequence[Tensor]) -> None:
    """Run function and Plan on the examples. They differ where the function used a tensor's values behind the tracer's
    back (through NumPy, say), so that one call's values are baked into the Plan."""
    with torch.no_grad():
        expected = fn(*[example.clone() for example in examples])
    found = NumpyProgram(plan).run([example.numpy() for example in examples])
    for (entry, got), want in zip(multiplied(plan.outputs, found), expected, strict=True):
        close = np.isclose(want.detach().numpy(), got, rtol=_RELATIVE, atol=_ABSOLUTE, equal_nan=True)
        if close.size and (~close).mean() > _SHARE:
            raise PlanError(
                f"{plan.name}: output {entry.name!r} of the Plan differs from what the model computes; somewhere the "
                f"model takes "
                f"values out of a tensor (.numpy(), .data, a global counter) or is not the same function at every call"
            )
