"""Canaries in a scalar job: what they show is never above the claimed ε, and broken noise is caught.

The job: a record adds a gradient of norm >= the clip norm; every run is one DP-SGD step (or several) on a scalar
parameter from the real sampler and the real grid. `SORDINO_SOAK` runs it 10^5 times, `make test` a part of them."""

from __future__ import annotations

import math

import numpy as np
import pytest

from helpers_canary import Ints, RandomBytes, Release, clopper_pearson, epsilon_lower_bound, sampler_faults
from helpers_privacy import seeded
from sordino_common.privacy.discrete_gaussian import discrete_gaussian
from sordino_common.privacy.grid import clip_to_grid
from sordino_common.privacy.grid_bound import grid_bound
from sordino_common.privacy.mechanism import FULL_SAMPLING, Mechanism, threshold_of
from sordino_common.privacy.words import Words
from sordino_server.accounting.accountant import account

GRID_BITS = 10
CLIP_NORM = 0.5
DELTA = 1e-5


def claimed(multiplier: float, q: float, steps: int) -> Mechanism:
    sensitivity_squared = grid_bound(1, GRID_BITS)
    return Mechanism(
        unit="record",
        sensitivity_squared=sensitivity_squared,
        sigma_squared=math.ceil(multiplier**2 * sensitivity_squared),
        sampling_threshold=threshold_of(q),
        count=steps,
    )


def job(mechanism: Mechanism, *, fault: str = "") -> Release:
    """Parameter after `count` noised steps on other rows of gradient 0 and, if present, a canary of a huge one."""

    def release(present: bool, random: RandomBytes, runs: int) -> Ints:
        parameter = np.zeros(runs, dtype=np.int64)
        sigma_squared = mechanism.sigma_squared
        if fault == "half the standard deviation":
            sigma_squared //= 4
        for _ in range(mechanism.count):
            gradient = np.array([1e6 if present else 0.0])  # clipped to the clip norm, a grid point: one value for all
            clipped, _ = clip_to_grid(gradient, clip_norm=CLIP_NORM, grid_bits=GRID_BITS, random=random)
            if fault == "no clipping" and present:
                clipped = np.array([4 << GRID_BITS])
            drawn = Words(random).take(runs) >> np.uint64(32) < np.uint64(mechanism.sampling_threshold)
            if fault == "every row in every step":
                drawn[:] = True
            clipped = clipped * drawn
            noise = discrete_gaussian(sigma_squared, runs, random)
            if fault == "no noise":
                noise[:] = 0
            stepped = parameter + clipped + noise
            if fault == "noise added after the step":
                stepped = parameter + clipped
                _ = clipped + noise  # drawn, and added to what nobody reads any more
            parameter = stepped
        return parameter

    return release


# (noise multiplier, q, steps); ε from 0.9 to 9
JOBS = [(1.0, 1.0, 1), (4.0, 1.0, 1), (2.0, 0.5, 4), (0.8, 0.2, 3)]


@pytest.mark.soak
@pytest.mark.parametrize(("multiplier", "q", "steps"), JOBS)
def test_canaries_never_show_more_than_is_claimed(multiplier: float, q: float, steps: int) -> None:
    mechanism = claimed(multiplier, q, steps)
    shown = epsilon_lower_bound(job(mechanism), seeded(f"{multiplier}"), delta=DELTA)
    found = account([mechanism], DELTA)
    assert shown <= found.epsilon
    if q == 1.0:
        assert shown >= 0.25 * found.epsilon  # the attack has teeth


FAULTS = ["no noise", "noise added after the step", "half the standard deviation", "no clipping"]


@pytest.mark.soak
@pytest.mark.parametrize("fault", FAULTS)
def test_broken_noise_is_caught(fault: str) -> None:
    # At a large δ the claimed ε is near what a threshold test can show: half of the noise is out by far.
    mechanism, delta = claimed(5.0, 1.0, 1), 0.01
    claim = account([mechanism], delta).epsilon
    assert epsilon_lower_bound(job(mechanism, fault=fault), seeded(fault), delta=delta) > 1.2 * claim
    assert epsilon_lower_bound(job(mechanism), seeded(fault), delta=delta) <= claim


def test_a_step_without_sampling_is_caught() -> None:
    mechanism = claimed(2.0, 0.05, 1)
    fault = "every row in every step"
    shown = epsilon_lower_bound(job(mechanism, fault=fault), seeded(fault), delta=DELTA)
    assert shown > account([mechanism], DELTA).epsilon


def test_an_attack_on_nothing_shows_nothing() -> None:
    def release(present: bool, random: RandomBytes, runs: int) -> Ints:
        return discrete_gaussian(100, runs, random)

    assert epsilon_lower_bound(release, seeded("nothing"), delta=DELTA) < 0.05


def test_a_release_of_another_kind_is_refused() -> None:
    with pytest.raises(AssertionError, match=r"release with: expected int\[20\], got float64\[20\]"):
        epsilon_lower_bound(lambda _present, _random, runs: np.zeros(runs), seeded(1), delta=DELTA, runs=10)  # type: ignore[arg-type,return-value]


def test_clopper_pearson() -> None:
    # Exact binomial tails at the bounds: P(X >= 7 | low) = P(X <= 7 | high) = α.
    low, high = clopper_pearson(7, 50, 1e-3)
    above = sum(math.comb(50, k) * low**k * (1 - low) ** (50 - k) for k in range(7, 51))
    below = sum(math.comb(50, k) * high**k * (1 - high) ** (50 - k) for k in range(8))
    assert above == pytest.approx(1e-3, rel=1e-6)
    assert below == pytest.approx(1e-3, rel=1e-6)
    assert clopper_pearson(0, 50)[0] == 0.0
    assert clopper_pearson(50, 50)[1] == 1.0


# --- Poisson samplers ----------------------------------------------------------------------------------------------

Q = 0.25


def poisson(steps: int, rows: int, random: RandomBytes) -> np.ndarray:
    words = Words(random).take(steps * rows).reshape(steps, rows) >> np.uint64(32)
    return words < np.uint64(int(Q * FULL_SAMPLING))


def fixed_size(steps: int, rows: int, random: RandomBytes) -> np.ndarray:
    order = Words(random).take(steps * rows).reshape(steps, rows).argsort(axis=1)
    return order < int(Q * rows)


def shuffled(steps: int, rows: int, random: RandomBytes) -> np.ndarray:
    """Passes over shuffled rows, a batch of rows Q a step: what a data loader does."""
    per_pass = int(1 / Q)
    order = Words(random).take(-(-steps // per_pass) * rows).reshape(-1, rows).argsort(axis=1)
    return np.concatenate([(order // int(Q * rows)) == at for at in range(per_pass)], axis=1).reshape(-1, rows)[:steps]


def kept(steps: int, rows: int, random: RandomBytes) -> np.ndarray:
    return np.repeat(poisson(steps // 2, rows, random), 2, axis=0)


def whole_batches(steps: int, rows: int, random: RandomBytes) -> np.ndarray:
    """All rows or none: every row has probability q."""
    return np.repeat(poisson(steps, 1, random), rows, axis=1)


def paired(steps: int, rows: int, random: RandomBytes) -> np.ndarray:
    drawn = poisson(steps, rows, random)
    drawn[:, 1] = drawn[:, 0]
    return drawn


def other_rate(steps: int, rows: int, random: RandomBytes) -> np.ndarray:
    return poisson(steps, rows, random) | (poisson(steps, rows, random) & poisson(steps, rows, random)[:, ::-1])


def test_a_poisson_sampler_passes() -> None:
    assert sampler_faults(poisson, q=Q, random=seeded("poisson")) == []


@pytest.mark.parametrize(
    ("sampler", "fault"),
    [
        (fixed_size, "pairs: "),
        (fixed_size, "batch sizes: variance"),
        (shuffled, "pairs: "),
        (shuffled, "one row in two steps: "),
        (kept, "one row in two steps: "),
        (whole_batches, "pairs of rows: "),
        (paired, "pairs of rows: "),
        (other_rate, "rows: "),
    ],
)
def test_other_samplers_are_caught(sampler: object, fault: str) -> None:
    faults = sampler_faults(sampler, q=Q, random=seeded("other"))  # type: ignore[arg-type]
    assert any(fault in found for found in faults), faults


def test_a_sampler_of_another_shape_is_refused() -> None:
    faults = sampler_faults(lambda steps, rows, _: np.zeros((rows, steps), dtype=bool), q=Q, random=seeded(1))
    assert faults == ["expected bool[40000, 24], got bool[24, 40000]"]
