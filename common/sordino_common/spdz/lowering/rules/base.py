"""A rule: what an op of the table becomes on secret values. `RULES[op](walk, node, args)` -> its values.

The arguments are the node's, each reference replaced by its value: `Lazy` if secret, an ndarray if public. A rule is
called only if at least one of them is secret; what is public throughout is computed by the op's own kernel.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final, NoReturn, TypeAlias

import numpy as np
import numpy.typing as npt

from sordino_common.errors import LocalError
from sordino_common.plan.ops import OPS, resolve
from sordino_common.plan.spec import TensorSpec
from sordino_common.plan.values import Arg, Node, Ref
from sordino_common.spdz.lowering.lazy import Lazy, moved
from sordino_common.spdz.lowering.settings import LoweringError
from sordino_common.spdz.lowering.sketch import Sketch

Array: TypeAlias = npt.NDArray[Any]
Value: TypeAlias = Lazy | Array


class Walk:
    """Where the walk over the Plan stands: the sketch, the values so far, the node at hand."""

    def __init__(self, sketch: Sketch, specs: list[TensorSpec], preactivations: float | None) -> None:
        self.sketch = sketch
        self.specs = specs
        self.preactivations = preactivations
        # (wire, |c|) of what is raised to a power of 3 or more, c · wire -> the Plan's node
        self.powers: dict[tuple[int, float], int] = {}
        self.values: list[Value] = []
        self.index = -1
        self.op = ""

    def refuse(self, text: str) -> NoReturn:
        raise LoweringError(f"node {self.index} ({self.op}): {text}", node=self.index)

    def value(self, arg: Arg) -> Any:
        if isinstance(arg, Ref):
            return self.values[arg.value]
        if isinstance(arg, tuple):
            return tuple(self.value(item) for item in arg)
        return arg


Rule: TypeAlias = Callable[[Walk, Node, tuple[Any, ...]], list[Value]]

_TABLE: Final[dict[str, Rule]] = {}
RULES: Final = _TABLE


def rule(*ops: str) -> Callable[[Rule], Rule]:
    """Put a rule into the table. Used by the family modules when they are loaded, by nobody else."""

    def put(function: Rule) -> Rule:
        for op in ops:
            if op in _TABLE or op not in OPS:
                raise LocalError(f"rule for op {op!r}: there is one already, or no such op")
            _TABLE[op] = function
        return function

    return put


def computed(node: Node, args: tuple[Any, ...], specs: list[TensorSpec]) -> list[Value]:
    """What the op's own kernel gives for public values."""
    arrays = [
        item for arg in args for item in (arg if isinstance(arg, tuple) else (arg,)) if isinstance(item, np.ndarray)
    ]
    made = OPS[node.op].kernel(node.outs, *resolve(node.args, specs))(*arrays)
    results = made if len(node.outs) != 1 else (made,)
    return [np.asarray(result) for result in results]


def number(value: Any) -> float | None:
    """The number that a public value is everywhere; None for a secret or a tensor of several."""
    if isinstance(value, bool | int | float):
        return float(value)
    if isinstance(value, np.ndarray) and value.size and bool((value == value.flat[0]).all()):
        return float(value.flat[0])
    return None


def secret(value: Any) -> bool:
    return isinstance(value, Lazy)


def is_secret_float(spec: TensorSpec) -> bool:
    return spec.dtype in ("float32", "float64")


def lifted(walk: Walk, value: Any, shape: tuple[int, ...]) -> Lazy:
    """A secret or public value as a lazy one of that shape: broadcast."""
    if isinstance(value, Lazy):
        return broadcast(walk, value, shape)
    same = number(value)
    if same is not None:
        return Lazy(shape=shape, terms=(), constant=same)
    tensor = np.broadcast_to(np.asarray(value, np.float64), shape)
    if not np.isfinite(tensor).all():
        walk.refuse("a constant is infinite or NaN")
    return Lazy(shape=shape, terms=(), constant=np.asarray(tensor, order="C") if shape else float(tensor))


def broadcast(walk: Walk, value: Lazy, shape: tuple[int, ...]) -> Lazy:
    if value.shape == shape:
        return value
    return moved(
        walk.sketch,
        value,
        lambda wire: walk.sketch.expand(wire, shape),
        shape,
        lambda array: np.broadcast_to(array, shape),
    )
