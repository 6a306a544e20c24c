"""Steps -> Plan. The steps are replayed under the tracer, so that what a pointer can do is what a Plan can do.

A `Structure` says all that the Plan depends on: the form of each step, who its operands are, which results leave.
Two flushes of equal structure are one Plan. Numbers that were the same the first two times are part of the Plan; one
that was not is an input of it from then on (as Adam's corrected step size, which is another one at every step).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Final

import torch
from torch import Tensor
from torch.fx import GraphModule

from sordino_common.plan.plan import encode_plan, plan_id
from sordino_common.plan.spec import FLOATS, TensorSpec
from sordino_common.plan.values import Input
from sordino_server.tensors.calls import Form
from sordino_server.tensors.lines import Line
from sordino_server.tensors.values import TORCH_DTYPES, Facts, Key, Number, Scalar, Slot, interned
from sordino_server.trace.capture import capture
from sordino_server.trace.draft import Draft
from sordino_server.trace.lowering import lower
from sordino_server.trace.origins import UNKNOWN, ModulePaths, Origin
from sordino_server.trace.tracing import TracedPlan

NAME: Final = "tensors"
_INCLUDED: Final = torch._C._dispatch_tls_local_include_set()
_EXCLUDED: Final = torch._C._dispatch_tls_local_exclude_set()

# (producer, result): producer -1 for the inputs, else the step's place in the structure
Place = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Structure:
    """`steps`: (facts, operands). `inputs`: specs of the stored tensors that are read. `outputs`: what leaves."""

    inputs: tuple[TensorSpec, ...]
    steps: tuple[tuple[Facts, tuple[Place, ...]], ...]
    outputs: tuple[Place, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Compiled:
    """A Plan, and which of the structure's numbers it takes as its last inputs (with their dtypes). `steps`: of each
    node the step that it comes from, -1 for none; another program of this structure has its steps on other lines."""

    traced: TracedPlan
    steps: tuple[int, ...]
    lifted: tuple[tuple[int, str], ...]


@contextmanager
def _as_if_called_from_outside() -> Iterator[None]:
    """PyTorch's dispatch state as it is before any operation.

    A step is recorded inside `__torch_dispatch__`, where the keys above are masked; the tracer needs them. Every
    program starts with the same two sets."""
    with torch._C._ForceDispatchKeyGuard(_INCLUDED, _EXCLUDED), torch.enable_grad():
        yield


@dataclass(slots=True)
class Family:
    """The Plans of one structure. `first`: its numbers the first time; `lifted`: those that were others since."""

    structure: Structure
    first: tuple[float, ...]
    lifted: set[int] = field(default_factory=set)
    plans: dict[tuple[Any, ...], Compiled] = field(default_factory=dict)


class Compiler:
    """Plans by structure. One for all agents of a connection: equal programs are one Plan everywhere."""

    def __init__(self) -> None:
        self.facts: dict[Key, Facts] = {}  # what a form of step gives, by the form
        self.forms: dict[Key, Form] = {}  # the same, by what a call is recognized by
        self._families: dict[Key, Family] = {}
        self.traces = 0

    def family(self, key: Key, structure: Callable[[], Structure], numbers: tuple[float, ...]) -> Family:
        """The Plans of a structure, which `key` stands for."""
        family = self._families.get(key)
        if family is None:
            family = self._families[key] = Family(structure(), numbers)
        return family

    def compiled(self, family: Family, numbers: tuple[float, ...], lines: Sequence[Line]) -> Compiled:
        """The Plan with these numbers. Raises `PlanError` with the user's line."""
        if numbers != family.first:
            family.lifted.update(i for i, (a, b) in enumerate(zip(family.first, numbers, strict=True)) if a != b)
        kept = tuple([(i, repr(value)) for i, value in enumerate(numbers) if i not in family.lifted])
        found = family.plans.get(kept)
        if found is None:
            self.traces += 1
            found = family.plans[kept] = _compile(family.structure, numbers, frozenset(family.lifted), lines)
        return found


def _compile(
    structure: Structure, numbers: tuple[float, ...], lifted: frozenset[int], lines: Sequence[Line]
) -> Compiled:
    dtypes = _number_dtypes(structure)
    inputs = [Input(f"i{k}", "value", spec) for k, spec in enumerate(structure.inputs)]
    taken = tuple((i, dtypes[i]) for i in sorted(lifted))
    inputs += [Input(f"n{k}", "value", TensorSpec(dtype, ())) for k, (_, dtype) in enumerate(taken)]
    # An object for each step, by which its nodes are known afterwards.
    places = [replace(line.origin) for line in lines]

    def held(lifted: Sequence[Tensor]) -> list[Any]:
        found: list[Any] = list(numbers)
        for (index, _), tensor in zip(taken, lifted, strict=True):
            found[index] = tensor
        return found

    draft = Draft(inputs)
    refs = lower(capture_steps(structure, inputs, held, places), draft, name=NAME)
    plan, origins = draft.finish(NAME, [(f"o{k}", "value", ref) for k, ref in enumerate(refs)])
    data = encode_plan(plan)
    traced = TracedPlan(plan=plan, data=data, plan_id=plan_id(data), origins=tuple(map(str, origins)))
    numbers_of = {id(origin): k for k, origin in enumerate(places)}
    steps = tuple(numbers_of.get(id(origin), -1) for origin in origins)
    return Compiled(traced=traced, steps=steps, lifted=taken)


def capture_steps(
    structure: Structure,
    inputs: Sequence[Input],
    numbers: Callable[[Sequence[Tensor]], Sequence[Any]],
    places: Sequence[Origin],
) -> GraphModule:
    """The graph of a structure's steps. `inputs`: those of the structure, and perhaps more, from which `numbers` makes
    all numbers of the steps; `places`: where each step comes from."""
    place = [UNKNOWN]

    def replay(*tensors: Tensor) -> list[Tensor]:
        held = numbers(tensors[len(structure.inputs) :])
        results: list[Sequence[Any]] = []
        start = 0
        for k, (facts, operands) in enumerate(structure.steps):
            place[0] = places[k]
            found = [tensors[index] if step < 0 else results[step][index] for step, index in operands]
            count = _count(facts)
            result = call(facts, found, held[start : start + count])
            start += count
            results.append((result,) if facts.single else result)
        return [tensors[index] if step < 0 else results[step][index] for step, index in structure.outputs]

    examples = [torch.empty(entry.spec.shape, dtype=TORCH_DTYPES[entry.spec.dtype]) for entry in inputs]
    with _as_if_called_from_outside():
        return capture(replay, examples, modules=ModulePaths(None), name=NAME, origin=lambda: place[0])


def infer(facts_of: Callable[..., Facts], specs: Sequence[TensorSpec], numbers: Sequence[float], line: Origin) -> Facts:
    """The facts of a form of step, tried out alone: what it gives, or `PlanError` if no Plan has it."""
    shape: dict[str, Any] = {}

    def alone(*tensors: Tensor) -> list[Tensor]:
        result = call(facts_of(outs=(), single=True), list(tensors), list(numbers))
        shape["single"] = isinstance(result, Tensor)
        results = [result] if shape["single"] else list(result)
        shape["there"] = [isinstance(entry, Tensor) for entry in results]
        return [entry for entry in results if isinstance(entry, Tensor)]

    draft = Draft([Input(f"i{k}", "value", spec) for k, spec in enumerate(specs)])
    examples = [torch.empty(spec.shape, dtype=TORCH_DTYPES[spec.dtype]) for spec in specs]
    with _as_if_called_from_outside():
        graph = capture(alone, examples, modules=ModulePaths(None), name=NAME, origin=lambda: line)
    found = iter([draft.spec(ref) for ref in lower(graph, draft, name=NAME)])
    outs = tuple(interned(next(found)) if there else None for there in shape["there"])
    return facts_of(outs=outs, single=shape["single"])


def call(facts: Facts, operands: Sequence[Any], numbers: Sequence[Any]) -> Any:
    """Run one step on tensors. A number that is a tensor (it was lifted) takes the place that PyTorch gives it.

    What it gives is contiguous, as pointers are: a decomposition must not choose by strides. A Plan has none."""
    result = _run(facts, operands, numbers)
    if isinstance(result, Tensor):
        return result.contiguous()
    return [entry.contiguous() if isinstance(entry, Tensor) else entry for entry in result]


def _run(facts: Facts, operands: Sequence[Any], numbers: Sequence[Any]) -> Any:
    args = [_filled(entry, operands, numbers) for entry in facts.args]
    kwargs = {name: _filled(entry, operands, numbers) for name, entry in facts.kwargs}
    name = facts.op.name()
    if name in (
        "aten::copy",
        "aten::fill.Tensor",
    ):  # into what is overwritten: its shape and dtype are all that is left of it
        return args[1].to(args[0].dtype).expand(args[0].shape)
    alpha = kwargs.get("alpha")
    if isinstance(alpha, Tensor):
        del kwargs["alpha"]
        args[1] = alpha * args[1]
    value = kwargs.get("value")
    if isinstance(value, Tensor):
        # In the order in which PyTorch's own kernels multiply.
        scaled = value * args[1]
        return args[0] + (scaled * args[2] if name == "aten::addcmul" else scaled / args[2])
    return facts.op(*args, **kwargs)


def _filled(entry: Any, operands: Sequence[Any], numbers: Sequence[Any]) -> Any:
    match entry:
        case Slot(index=index):
            return operands[index]
        case Number(index=index):
            return numbers[index]
        case Scalar(value=value, dtype=dtype):
            return torch.scalar_tensor(value, dtype=dtype)
        case tuple():
            return [_filled(item, operands, numbers) for item in entry]
    return entry


def _count(facts: Facts) -> int:
    return sum(isinstance(entry, Number) for entry in (*facts.args, *(entry for _, entry in facts.kwargs)))


def _number_dtypes(structure: Structure) -> list[str]:
    """For each number the dtype of its step's result: a lifted number must widen nothing."""
    dtypes: list[str] = []
    for facts, _ in structure.steps:
        count = _count(facts)
        if count:
            out = facts.outs[0]
            assert out is not None
            assert out.dtype in FLOATS
            dtypes += [out.dtype] * count
    return dtypes
