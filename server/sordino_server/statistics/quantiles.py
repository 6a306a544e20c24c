"""Quantiles from a noised dyadic histogram: a tree whose node on level l counts the rows in one of 2^l equal bins.

Counts of one bin are estimated twice, from its own node and from its children; the best linear unbiased estimate that
makes every node the sum of its children is found by one pass up and one pass down (Hay, Rastogi, Miklau and Suciu,
PVLDB 3(1), 2010, section 4.2, for a binary tree whose root is not counted). A range of bins is then a sum of at most
2b nodes' worth of noise instead of 2^b. Legend: b levels, c counts per level [2^l].
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from sordino_common.errors import LocalError
from sordino_common.messages.statistics import RangedColumn

Real = NDArray[np.float64]


def levels_of(entries: Real, bits: int) -> list[Real]:
    """The tree's levels 1..b, level l with 2^l counts."""
    if len(entries) != (2 << bits) - 2:
        raise LocalError(f"dyadic: {len(entries)} entries, expected {(2 << bits) - 2}")
    return [entries[(1 << level) - 2 : (2 << level) - 2] for level in range(1, bits + 1)]


def consistent(levels: Sequence[Real]) -> Real:
    """The finest level's counts after constrained inference: the least squares solution, noise being alike everywhere.

    Up: z = (1 - a) c + a (sum of the children's z), a = (2^(h-1) - 1) / (2^h - 1) for a node of height h (leaves: 1).
    Down: a node's final value is its z plus half of what its parent has more than its children's z together."""
    best = [np.asarray(levels[-1], dtype=np.float64)]
    for height, counts in enumerate(reversed(levels[:-1]), start=2):
        share = (2.0 ** (height - 1) - 1.0) / (2.0**height - 1.0)
        best.append((1.0 - share) * counts + share * best[-1].reshape(-1, 2).sum(axis=1))
    best.reverse()
    final = best[0]
    for estimates in best[1:]:
        pairs = estimates.reshape(-1, 2)
        final = (pairs + ((final - pairs.sum(axis=1)) / 2.0)[:, None]).reshape(-1)
    return final


def quantiles(column: RangedColumn, entries: Real, bits: int, probabilities: Sequence[float]) -> list[float]:
    """For each probability the value below which that share of the rows lies, in the column's own unit.

    Between the edges of a bin by linear interpolation. The estimated distribution is made monotone by isotonic
    regression on its cumulative counts (the nearest that is a distribution at all)."""
    if not all(0.0 <= p <= 1.0 for p in probabilities):
        raise LocalError(f"quantiles: probabilities {list(probabilities)}; expected numbers from 0 to 1")
    cumulative = monotone(np.concatenate([[0.0], np.cumsum(consistent(levels_of(entries, bits)))]))
    cumulative = cumulative - cumulative[0]
    total = cumulative[-1]
    edges = np.linspace(column.low, column.high, (1 << bits) + 1)
    if total <= 0.0:  # nothing but noise: every value is as likely
        return [column.low + p * (column.high - column.low) for p in probabilities]
    found = []
    for p in probabilities:
        wanted = p * total
        bin_ = min(max(int(np.searchsorted(cumulative, wanted, side="left")), 1), 1 << bits)
        below, above = cumulative[bin_ - 1], cumulative[bin_]
        inside = 0.5 if above <= below else (wanted - below) / (above - below)
        found.append(float(edges[bin_ - 1] + inside * (edges[bin_] - edges[bin_ - 1])))
    return found


def monotone(values: Real) -> Real:
    """The nearest non-decreasing vector in the Euclidean norm, by pooling adjacent violators."""
    means: list[float] = []
    counts: list[int] = []
    for value in values.tolist():
        means.append(value)
        counts.append(1)
        while len(means) > 1 and means[-2] > means[-1]:
            mean, count = means.pop(), counts.pop()
            means[-1] = (means[-1] * counts[-1] + mean * count) / (counts[-1] + count)
            counts[-1] += count
    return np.repeat(np.array(means), counts)
