"""A Plan while it is being written: append operations, share equal ones, drop what nothing needs.

A value of a draft is either `Held` (a tensor known at trace time) or a `Ref` to a numbered input or result.
`Draft.finish` keeps what the outputs need and renumbers it as `plan.values` says: inputs, constants, results in order.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sordino_common.errors import PlanError
from sordino_common.messages.array import Array
from sordino_common.plan.arrays import from_numpy
from sordino_common.plan.ops import infer_outs
from sordino_common.plan.spec import TensorSpec
from sordino_common.plan.values import Arg, Input, Node, Output, Plan, Ref, refs
from sordino_server.trace.origins import UNKNOWN, Origin

DTYPES = {
    torch.float32: "float32",
    torch.float64: "float64",
    torch.int32: "int32",
    torch.int64: "int64",
    torch.uint8: "uint8",
    torch.bool: "bool",
}


def spec_of(tensor: Tensor, place: str) -> TensorSpec:
    """The spec of a (fake or real) tensor; `PlanError` for a dtype that Plans don't have."""
    if tensor.dtype not in DTYPES:
        known = ", ".join(DTYPES.values())
        raise PlanError(f"{place}: dtype {str(tensor.dtype).removeprefix('torch.')} is not one of {known}")
    if not all(isinstance(dim, int) for dim in tensor.shape):  # a symbol: known only once the data is
        raise PlanError(
            f"{place}: the shape of this result depends on the values of a tensor, but shapes in a Plan are static; "
            f"weigh the rows with torch.where instead of choosing some"
        )
    return TensorSpec(DTYPES[tensor.dtype], tuple(tensor.shape))


class Held:
    """A tensor whose values are known while tracing."""

    __slots__ = ("_scalar", "tensor")

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor
        self._scalar: tuple[float | int | bool | None] | None = None

    @property
    def scalar(self) -> float | int | bool | None:
        """The number that all its elements equal, if they do."""
        if self._scalar is None:
            flat = self.tensor.reshape(-1) if self.tensor.numel() <= 1 else self.tensor.flatten()
            same = flat.numel() > 0 and bool((flat == flat[0]).all())
            self._scalar = (flat[0].item() if same else None,)
        return self._scalar[0]


DraftValue = Ref | Held


@dataclass(frozen=True, slots=True)
class _Step:
    op: str
    args: tuple[Arg, ...]
    outs: tuple[int, ...]
    origin: Origin


class Draft:
    """Operations on numbered values, each distinct (op, arguments) once."""

    def __init__(self, inputs: Sequence[Input]) -> None:
        self._inputs = tuple(inputs)
        self.specs: list[TensorSpec] = [entry.spec for entry in inputs]
        self._constants: dict[int, Array] = {}
        self._steps: list[_Step] = []
        self._made: dict[str, tuple[int, ...]] = {}
        self._maker: dict[int, _Step] = {}

    def spec(self, ref: Ref) -> TensorSpec:
        return self.specs[ref.value]

    def maker(self, ref: Ref) -> tuple[str, tuple[Arg, ...]] | None:
        """The op and arguments that made this value; None for an input or a constant."""
        step = self._maker.get(ref.value)
        return None if step is None or len(step.outs) != 1 else (step.op, step.args)

    def origin(self, ref: Ref) -> Origin:
        """Where the operation that made this value comes from."""
        step = self._maker.get(ref.value)
        return UNKNOWN if step is None else step.origin

    def infer(self, op: str, args: tuple[Arg, ...]) -> TensorSpec:
        """The spec that `op` would give; nothing is appended."""
        return infer_outs(op, args, self.specs)[0]

    def constant(self, held: Held) -> Ref:
        """A value for a known tensor: the same number for the same bytes."""
        array = from_numpy(held.tensor.detach().contiguous().numpy())  # bool becomes uint8
        key = f"constant {array.dtype} {array.shape} {hashlib.sha256(array.data).hexdigest()}"
        if key not in self._made:
            self._constants[len(self.specs)] = array
            self._made[key] = (len(self.specs),)
            self.specs.append(TensorSpec(array.dtype, array.shape))
        return Ref(self._made[key][0])

    def emit(self, op: str, args: tuple[Arg, ...], origin: Origin) -> tuple[Ref, ...]:
        """The results of `op` on complete positional arguments; computed once if asked for twice."""
        key = f"{op} {args!r}"  # the repr keeps 1, 1.0 and True apart, which compare equal
        if key not in self._made:
            try:
                inferred = infer_outs(op, args, self.specs)
            except PlanError as error:
                raise PlanError(f"{origin}: {error}") from None
            numbers = tuple(range(len(self.specs), len(self.specs) + len(inferred)))
            self.specs += inferred
            self._made[key] = numbers
            step = _Step(op, args, numbers, origin)
            self._steps.append(step)
            for number in numbers:
                self._maker[number] = step
        return tuple(Ref(number) for number in self._made[key])

    def finish(self, name: str, outputs: Sequence[tuple[str, str, Ref]]) -> tuple[Plan, tuple[Origin, ...]]:
        """The Plan of these (name, role, value) outputs, and the origin of each of its nodes."""
        needed = {ref.value for _, _, ref in outputs}
        kept: list[_Step] = []
        for step in reversed(self._steps):
            if needed.intersection(step.outs):
                kept.append(step)
                needed.update(used for arg in step.args for used in refs(arg))
        kept.reverse()
        constants = [number for number in self._constants if number in needed]
        order = [*range(len(self._inputs)), *constants, *(number for step in kept for number in step.outs)]
        renumbered = {old: new for new, old in enumerate(order)}
        plan = Plan(
            name=name,
            inputs=self._inputs,
            constants=tuple(self._constants[number] for number in constants),
            nodes=tuple(
                Node(
                    step.op,
                    tuple(_renumber(arg, renumbered) for arg in step.args),
                    tuple(self.specs[number] for number in step.outs),
                )
                for step in kept
            ),
            outputs=tuple(Output(label, role, renumbered[ref.value]) for label, role, ref in outputs),
        )
        return plan, tuple(step.origin for step in kept)


def _renumber(arg: Arg, numbers: dict[int, int]) -> Arg:
    if isinstance(arg, Ref):
        return Ref(numbers[arg.value])
    if isinstance(arg, tuple):
        return tuple(_renumber(item, numbers) for item in arg)
    return arg
