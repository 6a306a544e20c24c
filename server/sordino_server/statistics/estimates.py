"""From a query's noised integers to real numbers. All of it is post-processing: it costs no privacy.

Legend: C columns, w the query's weight, b its bits, s the standard deviation of the noise in the query's own unit:
every entry of the sum carries noise of standard deviation σ (all aggregators together), so s = σ / w.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sordino_common.messages.statistics import RangedColumn, RowQuery

Real = NDArray[np.float64]
_NORMAL_95 = 1.959964  # two-sided 95 % point of the normal distribution; the discrete Gaussian's tails are no heavier


@dataclass(frozen=True, slots=True, kw_only=True)
class ColumnMoments:
    """Mean and variance of a column in its own unit; `mean_error`: standard error of the mean from the noise alone."""

    name: str
    mean: float
    variance: float
    mean_error: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Histogram:
    """`counts` of equal bins between `edges` [bins + 1]; an estimate may be negative. `error`: 95 % of the noise."""

    name: str
    edges: tuple[float, ...]
    counts: tuple[float, ...]
    error: float


def moments_of(query: RowQuery, columns: Sequence[RangedColumn], entries: Real, noise: float) -> list[ColumnMoments]:
    """For u' = 2u - 1 in [-1, 1]: mean Σs / n, variance Σs²/n - mean², n the noised count, moved into what is possible.

    `entries`: the query's integers divided by its weight; `noise`: s."""
    unit = float(1 << query.bits)
    rows = max(entries[0] / unit, 1.0)
    found = []
    for place, column in enumerate(columns):
        mean = min(max(entries[1 + 2 * place] / unit / rows, -1.0), 1.0)
        square = min(max(entries[2 + 2 * place] / unit / rows, mean * mean), 1.0)
        half = column.high / 2 - column.low / 2
        found.append(
            ColumnMoments(
                name=column.name,
                mean=column.low / 2 + column.high / 2 + half * mean,
                variance=half * half * (square - mean * mean),
                mean_error=half * noise / unit / rows * math.sqrt(1.0 + mean * mean),
            )
        )
    return found


def scaling_of(moments: Sequence[ColumnMoments], columns: Sequence[RangedColumn]) -> dict[str, list[float] | float]:
    """What a job's `data` block takes with `standardize: given` and `target_standardize: given`; the last column is the
    target. A deviation that drowns in the noise (an estimate of 0) is replaced by half of the public range."""
    offset = [float(one.mean) for one in moments]
    scale = [
        math.sqrt(one.variance) if one.variance > 0.0 else column.high / 2 - column.low / 2
        for one, column in zip(moments, columns, strict=True)
    ]
    return {"offset": offset[:-1], "scale": scale[:-1], "target_offset": offset[-1], "target_scale": scale[-1]}


def histogram_of(query: RowQuery, column: RangedColumn, entries: Real, noise: float) -> Histogram:
    edges = np.linspace(column.low, column.high, (1 << query.bits) + 1)
    return Histogram(
        name=column.name,
        edges=tuple(edges.tolist()),
        counts=tuple(entries.tolist()),
        error=_NORMAL_95 * noise,
    )
