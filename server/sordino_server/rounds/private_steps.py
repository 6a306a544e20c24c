"""From a noised sum to parameters: what a private round does with the one vector that it gets.

    record   g = s · sum / (q · R);  θ, state <- the optimizer's step on g        s = clip_norm / 2^grid_bits
    device   θ <- θ + s · sum / |U|

R: train rows of the devices in the sum, as they state them; q: sampling rate; |U|: how many devices are in it.

Why these divisors. The noise hides a row (a device) in the sum; a divisor that depended on it as well would have to be
noised too. q · R is the expected size of the sample, not the size drawn (which is nobody's to know). R and |U| are
public: who takes part, and how many rows each device states, are metadata that the server is told in the clear, and
the guarantee is for what a row (a device) holds: it compares a run with one where that row's gradient (that device's
update) counts as zero and the metadata are the same. Whether a device takes part is not hidden by any divisor: the
server talks to it.

Dividing and stepping are post-processing: they cost no privacy, whatever the optimizer.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sordino_common.errors import ConfigError, LocalError
from sordino_common.plan.interpreter import NumpyProgram
from sordino_common.plan.values import Plan
from sordino_server.rounds.effects import Params

Vector = NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerStep:
    """The optimizer's step as a Plan (`plan.gradients`), run here: it sees nothing but noised sums."""

    program: NumpyProgram
    params: int
    states: tuple[tuple[int, ...], ...]
    gradients: tuple[tuple[int, ...], ...]

    @classmethod
    def of(cls, plan: Plan) -> ServerStep:
        """Of an `apply` Plan."""

        def shapes(role: str) -> tuple[tuple[int, ...], ...]:
            return tuple(entry.spec.shape for entry in plan.inputs if entry.role == role)

        return cls(
            program=NumpyProgram(plan),
            params=len(shapes("param")),
            states=shapes("state"),
            gradients=shapes("gradient"),
        )

    @property
    def length(self) -> int:
        """Entries of all gradients together."""
        return sum(math.prod(shape) for shape in self.gradients)

    def start(self) -> Params:
        """The optimizer's state before the first step."""
        return tuple(np.zeros(shape, np.float32) for shape in self.states)

    def __call__(self, params: Params, state: Params, gradient: Params) -> tuple[Params, Params]:
        """(parameters, state) after one step."""
        results = self.program.run([*params, *state, *gradient])
        return tuple(results[: self.params]), tuple(results[self.params :])


def mean_gradient(total: Vector, shapes: Sequence[tuple[int, ...]], *, step: float, rate: float, rows: int) -> Params:
    """g of the module's head as float32 tensors of these shapes."""
    if rows < 1 or not 0.0 < rate <= 1.0:
        raise LocalError(f"mean_gradient: {rows} rows at a sampling rate of {rate}")
    return tuple(
        part.astype(np.float32) for part in _parts(np.multiply(total, step / (rate * rows), dtype=np.float64), shapes)
    )


def moved(params: Params, total: Vector, *, step: float, members: int, trainable: Sequence[bool]) -> Params:
    """θ of the module's head for the unit device. Tensors that are not trained stay as they are: what is in their
    entries is noise."""
    if members < 1:
        raise LocalError("moved: nobody is in the sum")
    changes = _parts(np.multiply(total, step / members, dtype=np.float64), [param.shape for param in params])
    return tuple(
        np.asarray(np.add(param, change, dtype=np.float64), dtype=param.dtype, order="C") if trained else param
        for param, change, trained in zip(params, changes, trainable, strict=True)
    )


def require_finite(params: Params, number: int) -> None:
    """Raise `ConfigError` if the training diverges."""
    if not all(np.isfinite(param).all() for param in params):
        raise ConfigError(
            f"round {number}: the parameters are not finite: the training diverges. Lower optimizer.lr. The last "
            "checkpoint is kept."
        )


def _parts(flat: NDArray[np.float64], shapes: Sequence[tuple[int, ...]]) -> list[NDArray[np.float64]]:
    sizes = [math.prod(shape) for shape in shapes]
    if flat.shape != (sum(sizes),):
        raise LocalError(f"a sum of {flat.size} entries for tensors of {sum(sizes)}")
    edges = np.cumsum(sizes)[:-1]
    return [part.reshape(shape) for part, shape in zip(np.split(flat, edges), shapes, strict=True)]
