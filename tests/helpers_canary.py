"""Canary attacks: what an observer can tell about one unit's presence, as a lower bound on ε; and Poisson samplers.

A *release* is the code under test, run many times over: `release(present, random, runs)` gives int64[runs], one scalar
for each run of the mechanism on data that hold the canary or don't. The attack guesses from the scalar by a threshold
that half of the runs choose and the other half judges, so the bound is honest whatever the threshold.

An (ε, δ)-DP mechanism has TPR <= e^ε FPR + δ and TNR <= e^ε FNR + δ for every test. With Clopper-Pearson bounds that
each fail with a chance below 5e-8, ε >= log((TPR_low - δ) / FPR_high) and the same for the other side; so a correct
mechanism is accused with a chance below 2e-7.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from typing import Final

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]
RandomBytes = Callable[[int], bytes]
Release = Callable[[bool, RandomBytes, int], Ints]
# Rows in or out: bool[steps, rows], by the sampler under test, at the probability q.
Sampler = Callable[[int, int, RandomBytes], npt.NDArray[np.bool_]]

RUNS: Final = 100_000 if os.environ.get("SORDINO_SOAK") else 30_000
_ALPHA: Final = 5e-8
_THRESHOLDS: Final = 200


def clopper_pearson(hits: int, trials: int, alpha: float = _ALPHA) -> tuple[float, float]:
    """(low, high): each is on the wrong side of the true chance with a probability of at most `alpha`."""
    from scipy.stats import beta

    low = float(beta.ppf(alpha, hits, trials - hits + 1)) if hits else 0.0
    high = float(beta.isf(alpha, hits + 1, trials - hits)) if hits < trials else 1.0
    return low, high


def epsilon_lower_bound(release: Release, random: RandomBytes, *, delta: float, runs: int = RUNS) -> float:
    """What ε is at least, shown by `runs` runs with and `runs` without the canary; 0 if nothing is shown."""
    with_, without = release(True, random, 2 * runs), release(False, random, 2 * runs)
    for name, values in (("with", with_), ("without", without)):
        if values.shape != (2 * runs,) or values.dtype.kind != "i":
            raise AssertionError(f"release {name}: expected int[{2 * runs}], got {values.dtype}{list(values.shape)}")
    sign = 1 if with_[:runs].mean() >= without[:runs].mean() else -1
    with_, without = sign * with_, sign * without
    cuts = np.unique(np.quantile(np.concatenate([with_[:runs], without[:runs]]), np.linspace(0, 1, _THRESHOLDS)))
    best = max(cuts, key=lambda cut: _bound(with_[:runs], without[:runs], float(cut), delta))
    return _bound(with_[runs:], without[runs:], float(best), delta)


def _bound(with_: Ints, without: Ints, cut: float, delta: float) -> float:
    runs = with_.size
    true_positive, _ = clopper_pearson(int((with_ >= cut).sum()), runs)
    _, false_positive = clopper_pearson(int((without >= cut).sum()), runs)
    true_negative, _ = clopper_pearson(int((without < cut).sum()), runs)
    _, false_negative = clopper_pearson(int((with_ < cut).sum()), runs)
    bounds = [0.0]
    for true_, false_ in ((true_positive, false_positive), (true_negative, false_negative)):
        if true_ > delta:
            bounds.append(math.log((true_ - delta) / false_))
    return max(bounds)


def sampler_faults(sample: Sampler, *, q: float, random: RandomBytes, rows: int = 24, steps: int = 40_000) -> list[str]:
    """What is wrong with a sampler that should include each row with probability q, independently; [] if nothing.

    Counts of single rows against q, of pairs of rows in one step against q², of the same row in consecutive steps
    against q², and the variance of the batch size against rows q (1-q): shuffled or fixed-size batches miss the pairs
    and the variance, a draw that is kept misses the steps. Normal approximation; together a false-alarm chance below
    1e-6 (the thresholds are divided among all comparisons)."""
    drawn = sample(steps, rows, random)
    if drawn.shape != (steps, rows) or drawn.dtype != np.bool_:
        return [f"expected bool[{steps}, {rows}], got {drawn.dtype}{list(drawn.shape)}"]
    faults = []
    x = drawn.astype(np.int64)
    together = x.T @ x
    pairs = together[np.triu_indices(rows, 1)]
    comparisons = 2 * rows + pairs.size + 2
    limit = math.sqrt(2 * math.log(2 * comparisons / 5e-7))  # P(|N| > limit) <= 5e-7 / comparisons
    for name, counts, chance, trials in (
        ("rows", np.diag(together), q, steps),
        ("pairs of rows", pairs, q * q, steps),
        ("one row in two steps", (x[1::2] & x[: 2 * (steps // 2) : 2]).sum(axis=0), q * q, steps // 2),
    ):
        worst = float(np.abs(counts - trials * chance).max() / math.sqrt(trials * chance * (1 - chance)))
        if worst > limit:
            faults.append(f"{name}: {worst:.1f} standard deviations from {chance:.4g}, allowed {limit:.1f}")
    # All pairs together: a small dependence shows in their sum first. Var(Σ pairs) over steps is measured.
    per_step = x.sum(axis=1)
    in_step = per_step * (per_step - 1) / 2
    expected = rows * (rows - 1) / 2 * q * q
    # Under independence: Var C(S,2) for S ~ Binomial(rows, q), exactly.
    sizes = np.arange(rows + 1)
    chances = np.array([math.comb(rows, s) * q**s * (1 - q) ** (rows - s) for s in range(rows + 1)])
    spread = math.sqrt(float(((sizes * (sizes - 1) / 2 - expected) ** 2 * chances).sum()) / steps)
    worst = abs(float(in_step.mean()) - expected) / spread
    if worst > limit:
        faults.append(f"all pairs: {worst:.1f} standard deviations from {expected:.4g} a step, allowed {limit:.1f}")
    variance = rows * q * (1 - q)
    fourth = float(((sizes - rows * q) ** 4 * chances).sum())
    worst = abs(float(((per_step - rows * q) ** 2).mean()) - variance) / math.sqrt((fourth - variance**2) / steps)
    if worst > limit:
        faults.append(f"batch sizes: variance {worst:.1f} standard deviations from {variance:.4g}, allowed {limit:.1f}")
    return faults
