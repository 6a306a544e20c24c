"""DP-SGD on the device: steps of a gradient Plan on Poisson samples, discrete Gaussian noise, the apply Plan.

One step (Abadi et al., arXiv 1607.00133, Algorithm 1, on integers):

    S ~ Poisson(q)       v = Σ_{b in S} clip(g_b)  in Z^P        w = v + N_Z(0, σ² I)
    gradient = w · (C / 2^g) / (q R)             params, state = apply(params, state, gradient)

Unit of privacy: a record. Neighbouring relation: one row added or removed, R known (the divisor q R is public, never
|S|). Everything after w is post-processing: neither a loss nor |S| is told, and an update that is NaN or infinite is
sent as it is, because a refusal that depends on rows would be a release of its own.

`mechanism` counts the samples that were really drawn; whoever answers charges it first (`ledger.py`).
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from sordino_agent.errors import BadCommand
from sordino_agent.flat_step import FlatStep
from sordino_agent.private_sum import Ints, RandomBytes, RowSum, batches_of, poisson_sample
from sordino_common.errors import LocalError
from sordino_common.plan.executors import Program
from sordino_common.plan.gradients import RowGradients, require_apply, row_gradients
from sordino_common.plan.interpreter import NumpyProgram
from sordino_common.plan.values import Plan
from sordino_common.privacy.discrete_gaussian import discrete_gaussian
from sordino_common.privacy.mechanism import Mechanism

Values = NDArray[Any]
Check = Callable[[], None]

AHEAD: Final = 1 << 14  # samples of noise that are drawn at a time, if a step takes fewer


@dataclass(frozen=True, slots=True, kw_only=True)
class GradientLayout:
    """Where a gradient Plan takes what, and what it gives."""

    params: tuple[int, ...]
    x: int
    y: int
    gradients: RowGradients


def gradient_layout(plan: Plan) -> GradientLayout:
    """Raises `PlanError` unless the Plan gives separate gradients per row (proven here), and `BadCommand` unless it
    takes parameters of floats, one x, one y and nothing else."""
    gradients = row_gradients(plan)
    places: dict[str, list[int]] = {"param": [], "x": [], "y": []}
    for index, entry in enumerate(plan.inputs):
        if entry.role not in places:
            raise BadCommand(f"Plan {plan.name!r}: a gradient Plan has no input of role {entry.role} ({entry.name!r})")
        places[entry.role].append(index)
    if len(places["x"]) != 1 or len(places["y"]) != 1:
        raise BadCommand(f"Plan {plan.name!r}: one input of role x and one of role y are expected")
    for index in (places["x"][0], places["y"][0]):
        if plan.inputs[index].spec.shape[:1] != (gradients.rows,):
            raise BadCommand(f"Plan {plan.name!r}: x and y must have the same first dimension, the batch")
    return GradientLayout(params=tuple(places["param"]), x=places["x"][0], y=places["y"][0], gradients=gradients)


class PrivateSums:
    """f(S) for fresh samples S of the rows x, y, and what releasing it costs."""

    def __init__(
        self,
        program: Program,
        layout: GradientLayout,
        *,
        x: Values,
        y: Values,
        clip_norm: float,
        grid_bits: int,
        threshold: int,
        random: RandomBytes = os.urandom,
    ) -> None:
        """Raises `BadCommand` for bounds that can't be had exactly."""
        self._program = program
        self._layout = layout
        self._x = x
        self._y = y
        self._threshold = threshold
        self._random = random
        self._sum = RowSum(layout.gradients, clip_norm=clip_norm, grid_bits=grid_bits, most_rows=len(x))
        self._drawn = 0
        self.length = self._sum.length

    def draw(self, params: Sequence[Values], check: Check | None = None) -> Ints:
        """int64[P] in grid units: the sum of the clipped gradients at `params` of one fresh sample, exact."""
        self._drawn += 1
        feeds: list[Values] = [np.empty(0)] * len(self._program.plan.inputs)
        for index, value in zip(self._layout.params, params, strict=True):
            feeds[index] = value
        sample = poisson_sample(len(self._x), self._threshold, self._random)
        self._sum.clear()
        with np.errstate(all="ignore"):  # rows that are NaN or infinite are dropped by the sum
            for rows, counted in batches_of(sample, self._layout.gradients.rows, len(self._x)):
                feeds[self._layout.x] = self._x[rows]
                feeds[self._layout.y] = self._y[rows]
                self._sum.add(self._program.run(feeds, check=check, own=False, quiet=True), counted)
        return self._sum.take()

    def mechanism(self, sigma_squared: int) -> Mechanism:
        """All sums that were drawn so far, each with N_Z(0, `sigma_squared`) added to every entry."""
        if self._drawn == 0:
            raise LocalError("PrivateSums.mechanism: nothing was drawn")
        return Mechanism(
            unit="record",
            sensitivity_squared=self._sum.sensitivity_squared,
            sigma_squared=sigma_squared,
            sampling_threshold=self._threshold,
            count=self._drawn,
        )


class Applier:
    """An optimizer's step as a Plan: parameters and state move by a gradient. Optimizer state starts at zero."""

    def __init__(self, program: Program, gradient: Plan, layout: GradientLayout) -> None:
        """Raises `PlanError` or `BadCommand` unless the Plan is a step on the gradients of the Plan `gradient`."""
        plan = program.plan
        require_apply(plan, layout.gradients)
        places = {gradient.inputs[index].name: at for at, index in enumerate(layout.params)}
        for entry in plan.inputs:
            if entry.role == "param" and (
                entry.name not in places or gradient.inputs[layout.params[places[entry.name]]].spec != entry.spec
            ):
                raise BadCommand(
                    f"Plan {plan.name!r}: {entry.spec} {entry.name!r} is no parameter of the gradient Plan"
                )
        step = FlatStep.of(plan) if isinstance(program, NumpyProgram) else FlatStep.unchanged(plan)
        self._program = program if step.plan is plan else NumpyProgram(step.plan)
        self._kept: list[Values] = [np.zeros(e.spec.shape, dtype=e.spec.dtype) for e in step.plan.inputs]
        # The outputs are parameters and states in the order of these inputs: `require_apply` made sure of it.
        self._carried: list[tuple[int, list[_Piece]]] = []
        # The gradients are views of one vector, in the order of the blocks.
        self._gradient = np.zeros(sum(math.prod(b.shape) for b in layout.gradients.blocks), dtype=np.float32)
        start = 0
        for index, (entry, made_of) in enumerate(zip(step.plan.inputs, step.inputs, strict=True)):
            if entry.role == "gradient":
                end = start + math.prod(entry.spec.shape)
                self._kept[index] = self._gradient[start:end].reshape(entry.spec.shape)
                start = end
            else:
                self._carried.append((index, _pieces(plan, made_of, places) if entry.role == "param" else []))
        self._now: list[Values] = []

    def step(self, params: list[Values], total: Ints, unit: float, check: Check | None = None) -> list[Values]:
        """The parameters (in the gradient Plan's order) after one step by the gradient `total` [P] · `unit`. To be
        called with NumPy's floating-point warnings off. `params` are only read, unless they are what the last step
        gave: a step may write to that, and gives the same list again."""
        if params is not self._now:
            self._take(params)
        np.multiply(total, unit, out=self._gradient, casting="same_kind")  # in float64, then rounded to float32
        outs = self._program.run(self._kept, check=check, quiet=True)
        for value, (index, pieces) in zip(outs, self._carried, strict=True):
            if len(pieces) > 1:  # there are views of it
                self._kept[index][:] = value
                continue
            self._kept[index] = value
            if pieces:
                self._now[pieces[0].at] = value
        return self._now

    def _take(self, params: list[Values]) -> None:
        """Go on from `params`. Those of one vector become views of it."""
        now = list(params)
        for index, pieces in self._carried:
            if len(pieces) == 1:
                self._kept[index] = params[pieces[0].at]
            elif pieces:
                vector = self._kept[index] = np.concatenate([params[piece.at] for piece in pieces], axis=None)
                for piece in pieces:
                    now[piece.at] = vector[piece.begin : piece.end].reshape(piece.shape)
        self._now = now


@dataclass(frozen=True, slots=True, kw_only=True)
class _Piece:
    """Where in a vector of several parameters one of them lies, and which it is in the gradient Plan's order."""

    at: int
    begin: int
    end: int
    shape: tuple[int, ...]


def _pieces(plan: Plan, made_of: Sequence[int], places: dict[str, int]) -> list[_Piece]:
    pieces: list[_Piece] = []
    end = 0
    for index in made_of:
        entry = plan.inputs[index]
        begin, end = end, end + math.prod(entry.spec.shape)
        pieces.append(_Piece(at=places[entry.name], begin=begin, end=end, shape=entry.spec.shape))
    return pieces


class StepNoise:
    """The noise of `steps` steps, a fresh int64[length] of N_Z(0, `sigma_squared`) for each. Small vectors are drawn
    for several steps at once: beginning a draw costs as much as some thousand samples. No sample is given twice."""

    def __init__(self, sigma_squared: int, length: int, steps: int, random: RandomBytes = os.urandom) -> None:
        self._sigma_squared = sigma_squared
        self._length = length
        self._steps = steps
        self._random = random
        self._drawn: list[Ints] = []

    def take(self) -> Ints:
        """One step's noise. Raises `LocalError` after the last step's."""
        if not self._drawn:
            if not self._steps:
                raise LocalError("StepNoise: more steps than were named")
            ahead = max(1, min(self._steps, AHEAD // self._length))
            self._steps -= ahead
            drawn = discrete_gaussian(self._sigma_squared, ahead * self._length, self._random)
            self._drawn = list(drawn.reshape(ahead, self._length))
        return self._drawn.pop()


def train_private(
    sums: PrivateSums,
    applier: Applier,
    *,
    params: Sequence[Values],
    steps: int,
    sigma_squared: int,
    unit: float,
    expected_rows: float,
    random: RandomBytes = os.urandom,
    check: Check | None = None,
) -> tuple[list[Values], Mechanism]:
    """(parameters after minus before, what it costs) of `steps` steps with full noise in each.

    `unit`: the real value of one grid unit, C / 2^g. `expected_rows`: q R, by which sums are divided."""
    now = list(params)
    noise = StepNoise(sigma_squared, sums.length, steps, random)
    with np.errstate(all="ignore"):
        for _ in range(steps):
            noised = sums.draw(now, check)
            noised += noise.take()
            now = applier.step(now, noised, unit / expected_rows, check)
        update = [after - before for after, before in zip(now, params, strict=True)]
    return update, sums.mechanism(sigma_squared)
