"""The Plan as a value: numbered inputs, constants, nodes and outputs in static single assignment.

Values are numbered in one row: the inputs first, then the constants, then every node's results in order. A node refers
to values with smaller numbers only, so a Plan has no cycles and runs from top to bottom.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final, TypeAlias

from sordino_common.errors import PlanError
from sordino_common.messages.array import Array
from sordino_common.plan.spec import TensorSpec

# gradient: of the parameter of that name, for a step of an optimizer alone.
INPUT_ROLES: Final = frozenset({"param", "state", "gradient", "x", "y", "value"})
# row: a number (or more) for each row. row-gradient: the gradient of each row by the parameter of that name; row-left,
# row-right: its two factors, where it is an outer product (see `gradients`).
OUTPUT_ROLES: Final = frozenset({"param", "state", "loss", "row", "row-gradient", "row-left", "row-right", "value"})


@dataclass(frozen=True, slots=True)
class Ref:
    """A reference to the value of that number."""

    value: int


Arg: TypeAlias = "Ref | int | float | bool | str | tuple[Arg, ...] | None"


@dataclass(frozen=True, slots=True)
class Input:
    """A tensor that is handed in: `role` (one of `INPUT_ROLES`) says by whom and what for."""

    name: str
    role: str
    spec: TensorSpec


@dataclass(frozen=True, slots=True)
class Output:
    """A value that is handed out under `name`; `role` is one of `OUTPUT_ROLES`."""

    name: str
    role: str
    value: int


@dataclass(frozen=True, slots=True)
class Node:
    """One op of the table (`sordino_common.plan.ops`) with its complete positional arguments and its results."""

    op: str
    args: tuple[Arg, ...]
    outs: tuple[TensorSpec, ...]


@dataclass(frozen=True, slots=True)
class Plan:
    """A program. Building one checks nothing; `validate_plan` and `decode_plan` do."""

    name: str
    inputs: tuple[Input, ...]
    constants: tuple[Array, ...]
    nodes: tuple[Node, ...]
    outputs: tuple[Output, ...]

    def first_node_value(self) -> int:
        """Number of the first node's first result."""
        return len(self.inputs) + len(self.constants)

    def specs(self) -> list[TensorSpec]:
        """The declared spec of every value, by number."""
        specs = [entry.spec for entry in self.inputs]
        specs += [constant_spec(constant) for constant in self.constants]
        for node in self.nodes:
            specs += node.outs
        return specs


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanLimits:
    """What a device takes. The defaults suit a device with 1 GB of memory."""

    nodes: int = 20_000  # an Adam step over a few hundred parameters
    entries: int = 10_000  # inputs, constants, outputs: each
    value_bytes: int = 256 * 1024 * 1024
    peak_bytes: int = 512 * 1024 * 1024
    flops: int = 10**13  # hours on a small device; the executor's own clock is the tighter limit
    encoded_bytes: int = 16 * 1024 * 1024  # as messages.PlanPut


def constant_spec(constant: Array) -> TensorSpec:
    """A constant's spec. A bool constant travels as uint8 and is cast by a `to` node."""
    if constant.dtype == "uint64":
        raise PlanError("a constant can't be uint64; use int64")
    return TensorSpec(constant.dtype, constant.shape)


def refs(arg: Arg) -> Iterator[int]:
    """The value numbers in `arg`, left to right."""
    if isinstance(arg, Ref):
        yield arg.value
    elif isinstance(arg, tuple):
        for item in arg:
            yield from refs(item)
