"""Statistics for tests of private mechanisms. Every threshold here has a false-alarm chance below 1e-7."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]
_X = 16.5  # e^-16.5 = 6.8e-8
SIGMAS = 5.4  # P(|N(0,1)| > 5.4) = 6.7e-8


def seeded(seed: int | str) -> Callable[[int], bytes]:
    """In place of os.urandom: every call gives the next bytes of a stream that `seed` fixes."""
    counter = 0

    def random(count: int) -> bytes:
        nonlocal counter
        counter += 1
        return hashlib.shake_256(f"{seed}/{counter}".encode()).digest(count)

    return random


def gaussian_bins(sigma_squared: int) -> tuple[Ints, npt.NDArray[np.float64]]:
    """(upper ends of bins, the last one open; their exact probabilities) of N_Z(0, σ²)."""
    sigma = math.sqrt(sigma_squared)
    if sigma < 2000:  # sum the pmf itself
        reach = int(40 * sigma) + 10
        support = np.arange(-reach, reach + 1)
        pmf = np.exp(-(support.astype(float) ** 2) / (2 * sigma_squared))
        cdf = np.cumsum(pmf / pmf.sum())
        step = max(1, int(sigma / 8))
        ends = np.arange(-int(3 * sigma) - step, int(3 * sigma) + 2 * step, step)
        below = cdf[ends + reach]
    else:  # the lattice sum is the integral but for terms of order 1/σ² < 1e-6
        ends = np.round(np.linspace(-3.2, 3.2, 65) * sigma).astype(np.int64)
        below = np.array([0.5 * math.erfc(-(int(end) + 0.5) / sigma / math.sqrt(2)) for end in ends])
    return ends.astype(np.int64), np.diff(np.concatenate([[0.0], below, [1.0]]))


def chi_square_excess(samples: Ints, sigma_squared: int) -> float:
    """χ² of `samples` against N_Z(0, σ²), as a multiple of the threshold: above 1 is a rejection.

    Threshold: P(χ²_k >= k + 2 √(k x) + 2 x) <= e^-x (Laurent, Massart 2000, Lemma 1)."""
    ends, chances = gaussian_bins(sigma_squared)
    counts = np.bincount(np.searchsorted(ends, samples, side="left"), minlength=chances.size)
    usable = chances * samples.size >= 25
    observed = np.append(counts[usable], counts[~usable].sum())
    expected = np.append(chances[usable], chances[~usable].sum()) * samples.size
    keep = expected > 5
    chi = float(((observed[keep] - expected[keep]) ** 2 / expected[keep]).sum())
    k = int(keep.sum()) - 1
    return chi / (k + 2 * math.sqrt(k * _X) + 2 * _X)


def correlation_excess(a: npt.NDArray[np.float64], b: npt.NDArray[np.float64]) -> float:
    """|correlation| √n / 5.4: above 1 is a rejection of independence."""
    a, b = a - a.mean(), b - b.mean()
    return float(abs((a * b).mean()) / math.sqrt((a * a).mean() * (b * b).mean()) * math.sqrt(a.size) / SIGMAS)


def frequency_excess(hits: int, trials: int, chance: float) -> float:
    """|hits - expected| in units of 5.4 standard deviations (plus one hit, for the tails of small counts)."""
    return abs(hits - trials * chance) / (SIGMAS * math.sqrt(trials * chance * (1 - chance)) + 1)
