"""A value on an agent: stored there under an id, or the result of a step that has not been sent.

Values never change. What a write changes is a `Cell`, the memory that pointers and their views share.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Final

import msgspec

from sordino_common.plan.spec import TensorSpec
from sordino_server.tensors.errors import RemoteFailure
from sordino_server.tensors.lines import Line
from sordino_server.trace.draft import DTYPES

Key = tuple[Any, ...]
TORCH_DTYPES: Final = {name: dtype for dtype, name in DTYPES.items()}


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


@cache
def interned(spec: TensorSpec) -> TensorSpec:
    """The one object of that dtype and shape: what is looked up at every operation is looked up by identity."""
    return spec


class Step(msgspec.Struct, frozen=True, eq=False):
    """One recorded operation. `number` grows from step to step of an agent, by at least the number of results."""

    facts: Facts
    operands: Sequence[Value]
    numbers: Sequence[float]
    number: int
    line: Line


class Stored:
    """That a tensor is on the agent under an id; `forget` is told the id when nobody here has the value any more."""

    __slots__ = ("_forget", "tensor_id")

    def __init__(self, tensor_id: bytes, forget: Callable[[bytes], None]) -> None:
        self.tensor_id = tensor_id
        self._forget = forget

    def __del__(self) -> None:
        self._forget(self.tensor_id)


class Value(msgspec.Struct, eq=False, weakref=True):
    """A tensor on an agent, by what made it or by its id there. `spec` is interned. `place`: see `script`."""

    spec: TensorSpec
    step: Step | None = None
    index: int = 0
    place: int = -1
    failure: RemoteFailure | None = None
    stored: Stored | None = None

    @property
    def tensor_id(self) -> bytes | None:
        """Its id on the agent; None before it is there."""
        return None if self.stored is None else self.stored.tensor_id


class Cell(msgspec.Struct, eq=False, weakref=True):
    """What pointers that share memory share. `value` is what is in it now.

    `gradient`: it was made in a backward pass. `waited`: a flush has left it out once (`Recorder.request`)."""

    value: Value
    number: int
    gradient: bool = False
    waited: bool = False
