"""A value on an agent: stored there under an id, or the result of a step that has not been sent.

Values never change. What a write changes is a `Cell`, the memory that pointers and their views share.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from sordino_common.plan.spec import TensorSpec
from sordino_server.tensors.errors import RemoteFailure
from sordino_server.trace.origins import Origin

Key = tuple[Any, ...]


@dataclass(frozen=True, slots=True)
class Slot:
    """Stands for an operand: its number among the step's operands."""

    index: int


@dataclass(frozen=True, slots=True)
class Number:
    """Stands for a Python number that may change from step to step: its number among the step's numbers."""

    index: int


@dataclass(frozen=True, slots=True)
class Scalar:
    """A tensor of no dimensions that was here: a constant of the step."""

    value: float | int | bool
    dtype: Any


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Facts:
    """What steps of one form share: op, argument template, and the specs of what it gives (None: nothing there).

    `single`: the op gives a tensor, not a sequence. Compared by identity: there is one for each form."""

    op: Any
    args: Key
    kwargs: tuple[tuple[str, Any], ...]
    outs: tuple[TensorSpec | None, ...]
    single: bool


class Step:
    """One recorded operation."""

    __slots__ = ("facts", "line", "number", "numbers", "operands")

    def __init__(
        self, facts: Facts, operands: tuple[Value, ...], numbers: tuple[float, ...], number: int, line: Origin
    ) -> None:
        self.facts, self.operands, self.numbers, self.number, self.line = facts, operands, numbers, number, line


class Value:
    """A tensor on an agent, by what made it or by its id there."""

    __slots__ = ("__weakref__", "failure", "index", "spec", "step", "tensor_id")

    def __init__(self, spec: TensorSpec, *, step: Step | None = None, index: int = 0) -> None:
        self.spec = spec
        self.step = step
        self.index = index
        self.tensor_id: bytes | None = None
        self.failure: RemoteFailure | None = None

    def stored(self, tensor_id: bytes, forget: Callable[[bytes], None]) -> None:
        """It is on the agent now, under this id, which `forget` is told when nobody here has the value any more."""
        self.tensor_id, self.step = tensor_id, None
        weakref.finalize(self, forget, tensor_id).atexit = False


class Cell:
    """What pointers that share memory share. `value` is what is in it now."""

    __slots__ = ("__weakref__", "number", "value")

    def __init__(self, value: Value, number: int) -> None:
        self.value = value
        self.number = number
