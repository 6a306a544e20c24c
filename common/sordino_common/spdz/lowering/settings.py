"""What lowering is told beside the Plan, and what it gives back."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from sordino_common.errors import ConfigError, PlanError
from sordino_common.ring.fixed import FRACTION_BITS
from sordino_common.spdz.circuit import Circuit

_FEWEST_BITS = 4
_MOST_BITS = 24
_RING_ROOM = 63


class LoweringError(PlanError):
    """A Plan that can't be run on secret shares as it is. `node`: which of its nodes, for whoever knows the model's
    line behind it."""

    def __init__(self, text: str, *, node: int = -1) -> None:
        super().__init__(text)
        self.node = node


class CoefficientRefused(LoweringError):
    """No scale within the bound gives a gate's coefficients well enough. `output`: what output of the Plan the gate was
    made for, or ""."""

    def __init__(self, text: str, *, node: int, output: str) -> None:
        super().__init__(text, node=node)
        self.output = output


@dataclass(frozen=True, slots=True, kw_only=True)
class Ranges:
    """Bounds on sizes of real values, stated by the job: they hold, or the run aborts.

    x, y, params, state: of the inputs of that role. `values`: of every intermediate result of a matrix product,
    convolution, sum or difference in the Plan (activations and their derivatives have the bounds of their polynomials).
    `updates`: what a parameter or state moves by at most in one step; by default twice its own range. `preactivations`:
    of what goes into a power of 3 or more, which is how polynomial activations are written."""

    x: float = 8.0
    y: float = 8.0
    params: float = 4.0
    state: float = 4.0
    values: float = math.inf
    updates: float | None = None
    preactivations: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """`fraction_bits`: f. `interval`: where the polynomial activations were fitted. `steps`: how many steps the
    parameters will be carried through. `inputs`: ranges by input name, where they differ from the role's. `rooms`: by
    input name, the bits of masks and masked values that are kept from an earlier circuit: |m|, |λ| <= 2^bits. By
    default those of a value that its owner masks. `exactness`: how far off a coefficient may be, relatively, but for
    changes of carried inputs (a learning rate); where one gate can't, there are two, one after the other. None: as far
    as is bearable in training, 2^-6."""

    fraction_bits: int = FRACTION_BITS
    ranges: Ranges = Ranges()
    interval: float | None = None
    steps: int = 1 << 16
    inputs: Mapping[str, float] = field(default_factory=dict)
    rooms: Mapping[str, int] = field(default_factory=dict)
    exactness: float | None = None

    def __post_init__(self) -> None:
        if not _FEWEST_BITS <= self.fraction_bits <= _MOST_BITS:
            raise ConfigError(f"fraction_bits is {self.fraction_bits}, expected {_FEWEST_BITS}..{_MOST_BITS}")
        if self.steps < 1:
            raise ConfigError(f"steps is {self.steps}, expected at least 1")
        if not all(0 < bits < _RING_ROOM for bits in self.rooms.values()):
            raise ConfigError(f"the room of a kept value is 1..{_RING_ROOM - 1} bits")
        stated = (self.ranges.x, self.ranges.y, self.ranges.params, self.ranges.state, *self.inputs.values())
        if not all(0 < bound < math.inf for bound in stated):
            raise ConfigError("the ranges of x, y, params and state are finite numbers above 0")
        if not all(
            bound is None or bound > 0
            for bound in (
                *(self.ranges.values, self.ranges.updates, self.ranges.preactivations),
                *(self.interval, self.exactness),
            )
        ):
            raise ConfigError("ranges are numbers above 0")

    def of_input(self, role: str, name: str) -> float:
        """What |input| is stated not to pass."""
        if name in self.inputs:
            return self.inputs[name]
        ranges = self.ranges
        return {"x": ranges.x, "y": ranges.y, "param": ranges.params, "state": ranges.state}.get(role, ranges.x)

    def of_update(self, role: str, name: str) -> float:
        """What a carried input moves by at most in one step."""
        own = 2.0 * self.of_input(role, name)
        return own if self.ranges.updates is None else min(own, self.ranges.updates)


@dataclass(frozen=True, slots=True, kw_only=True)
class GateNote:
    """For people: what gate `wire` is. `node`: the Plan's; `output`: the Plan's output that it was made for, or "";
    `text`: its formula's form; `error`: the largest relative error of its coefficients."""

    wire: int
    node: int
    op: str
    output: str
    text: str
    round: int
    elements: int
    bound_bits: int
    shift: int
    magnitude: float
    error: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Lowered:
    """`max_steps`: how often the outputs can be fed back before a mask might leave int64."""

    circuit: Circuit
    digest: bytes
    notes: tuple[GateNote, ...]
    max_steps: int

    @property
    def retry_chance(self) -> float:
        """An upper bound on the chance that a step must be run again: Σ over opened elements of 2^(bits - 63)."""
        gates = sum(note.elements * 2.0 ** (note.bound_bits - 63) for note in self.notes)
        given = sum(entry.wire.numel * 2.0 ** (entry.bound_bits - 63) for entry in self.circuit.inputs)
        return gates + given
