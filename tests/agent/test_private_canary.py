"""A canary attack on the real path: what is measured is never above what is claimed, and broken noise is found out.

The data with the canary hold a row whose gradient is as large as the clip lets it be, all in one entry; those without
it lack this row; all other rows have gradient zero. The attacker sees that entry of the noised sum, or of the update.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
from numpy.typing import NDArray

from helpers_canary import RUNS, Ints, RandomBytes, epsilon_lower_bound
from helpers_private import linear_apply_plan, linear_gradient_plan
from sordino_agent import private_step
from sordino_agent.private_step import Applier, PrivateSums, gradient_layout, train_private
from sordino_common.plan.executors import load_program
from sordino_common.privacy.discrete_gaussian import discrete_gaussian
from sordino_common.privacy.mechanism import FULL_SAMPLING, Mechanism
from sordino_common.privacy.rdp import curve, epsilon_of
from sordino_common.privacy.rows import row_bound

SOAK = bool(os.environ.get("SORDINO_SOAK"))
DELTA = 1e-2
GRID = 10
ROWS = 6
THRESHOLD = FULL_SAMPLING // 2
SIGMA_SQUARED = row_bound(4, GRID)  # a noise multiplier of 1
STEPS = 2
RATE = 1e-3  # learning rate: so small that the canary's gradient stays beyond the clip wherever b goes

Noise = Callable[..., NDArray[np.int64]]


class Buffered:
    """A sampler's own samples, drawn many at a time: most of what a small draw takes is its beginning."""

    def __init__(self, noise: Noise) -> None:
        self._noise = noise
        self._left: NDArray[np.int64] = np.empty(0, dtype=np.int64)

    def __call__(self, sigma_squared: int, count: int, source: RandomBytes) -> NDArray[np.int64]:
        if len(self._left) < count:
            self._left = self._noise(sigma_squared, 50_000, source)
        taken, self._left = self._left[:count], self._left[count:]
        return taken


# --- the worlds ----------------------------------------------------------------------------------------------------


PROGRAM = load_program(linear_gradient_plan())
LAYOUT = gradient_layout(linear_gradient_plan())


def sums_of(canary: bool, source: RandomBytes) -> PrivateSums:
    rows = ROWS + canary
    y = np.zeros((rows, 1), np.float32)
    y[ROWS:] = 1e6  # b's gradient is -2e6 before clipping, and x = 0 leaves none for w
    return PrivateSums(
        PROGRAM,
        LAYOUT,
        x=np.zeros((rows, 3), np.float32),
        y=y,
        clip_norm=1.0,
        grid_bits=GRID,
        threshold=THRESHOLD,
        random=source,
    )


ZERO = [np.zeros((3, 1), np.float32), np.zeros(1, np.float32)]


class World:
    """A release of `helpers_canary`. Every price that the code under test named is kept in `prices`."""

    def __init__(self, noise: Noise) -> None:
        self._noise = noise
        self.prices: set[Mechanism] = set()

    @property
    def claimed(self) -> float:
        (price,) = self.prices  # a price that told the worlds apart would be an attack of its own
        return epsilon_of(curve(price), DELTA)

    def measured(self, runs: int) -> float:
        return epsilon_lower_bound(self, random.Random(1).randbytes, delta=DELTA, runs=runs)

    def __call__(self, present: bool, source: RandomBytes, runs: int) -> Ints:
        raise NotImplementedError


class AggregateWorld(World):
    """One step's sum with the noise of one honest aggregator; the last entry is b's."""

    def __call__(self, present: bool, source: RandomBytes, runs: int) -> Ints:
        noise = Buffered(self._noise)
        scores = np.empty(runs, dtype=np.int64)
        for run in range(runs):
            sums = sums_of(present, source)
            scores[run] = (sums.draw(ZERO) + noise(SIGMA_SQUARED, sums.length, source))[-1]
            self.prices.add(sums.mechanism(SIGMA_SQUARED))
        return scores


class DeviceWorld(World):
    """The update of STEPS local steps with full noise in each, by the code that trains; b's entry, in grid units."""

    def __call__(self, present: bool, source: RandomBytes, runs: int) -> Ints:
        step = load_program(linear_apply_plan(lr=RATE))
        scores = np.empty(runs, dtype=np.int64)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(private_step, "discrete_gaussian", Buffered(self._noise))
            for run in range(runs):
                update, price = train_private(
                    sums_of(present, source),
                    Applier(step, PROGRAM.plan, LAYOUT),
                    params=ZERO,
                    steps=STEPS,
                    sigma_squared=SIGMA_SQUARED,
                    unit=1.0 / 2**GRID,
                    expected_rows=1.0,
                    random=source,
                )
                scores[run] = round(float(update[1][0]) / RATE * 2**GRID)
                self.prices.add(price)
        return scores


def removed(sigma_squared: int, count: int, source: RandomBytes) -> NDArray[np.int64]:
    return np.zeros(count, dtype=np.int64)


def halved(sigma_squared: int, count: int, source: RandomBytes) -> NDArray[np.int64]:
    return discrete_gaussian(sigma_squared // 4, count, source)


def after(wasted: list[int], sigma_squared: int, count: int, source: RandomBytes) -> NDArray[np.int64]:
    """The notebook's mistake: noise is drawn, but what was stepped on and sent is the gradient without it."""
    wasted.append(int(discrete_gaussian(sigma_squared, count, source)[0]))
    return np.zeros(count, dtype=np.int64)


@pytest.mark.soak
@pytest.mark.parametrize(("kind", "runs"), [(AggregateWorld, RUNS // 5), (DeviceWorld, RUNS // 20)])
def test_what_is_measured_is_not_above_what_is_claimed(kind: type[World], runs: int) -> None:
    world = kind(discrete_gaussian)
    runs = 5 * runs if SOAK else runs
    measured = world.measured(runs)
    print(f"{kind.__name__}: {runs} runs measure epsilon {measured:.3f}, claimed {world.claimed:.3f} at delta {DELTA}")
    assert measured <= world.claimed


@pytest.mark.parametrize("kind", [AggregateWorld, DeviceWorld])
def test_noise_that_was_removed_is_caught(kind: type[World]) -> None:
    world = kind(removed)
    assert world.measured(500) > world.claimed


def test_noise_that_was_halved_is_caught() -> None:
    world = AggregateWorld(halved)
    assert world.measured(6_000) > world.claimed


def test_noise_that_comes_after_the_step_is_caught() -> None:
    wasted: list[int] = []
    world = DeviceWorld(partial(after, wasted))
    assert world.measured(500) > world.claimed
    assert wasted
