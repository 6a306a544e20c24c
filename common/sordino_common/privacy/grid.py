"""Clipping real vectors to integer vectors whose L2 norm is bounded by a computed number.

Real value = integer * step, step = C / 2^g, C the clip norm, g = `grid_bits`. The bound speaks of the integers that
are released, so no float has a part in what privacy rests on: floats bring a vector near the ball of radius 2^g, are
rounded, and then the *integer* norm² is compared with the bound, exactly.

Rounding is stochastic (up with the probability of the fraction), so sums of many devices keep small values. It makes
vectors longer: by Hoeffding, with x the scaled vector, |x| <= 2^g, in d entries (Kairouz, Liu, Steinke, ICML 2021,
Proposition 22, γ = 1),

    |R(x)|² <= 2^2g + d/4 + sqrt(2 log(1/β)) (2^g + √d/2)     with probability 1 - β,
    |R(x)|  <= 2^g + √d                                        always.

The bound is the smaller of the two at sqrt(2 log(1/β)) = 3, β = 0.011. A vector that passes it is rounded anew, with
fresh bits, at most 4 times in all; after that (a chance below 2e-8) it is rounded toward zero, which makes no entry
larger. Conditional rounding keeps the bias below β times a rounding error; their Lemma 23.

The bound depends on g and d only, never on data, and not on C: it is in units of the grid.
"""

from __future__ import annotations

import math
import os
from typing import Final

import numpy as np
import numpy.typing as npt

from sordino_common.errors import LocalError
from sordino_common.privacy.grid_bound import grid_bound
from sordino_common.privacy.words import RandomBytes, Words

_TRIES: Final = 4

Floats = npt.NDArray[np.float32] | npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]


def clip_to_grid(
    values: Floats, *, clip_norm: float, grid_bits: int, random: RandomBytes = os.urandom
) -> tuple[Ints, int]:
    """(int64 vectors on the grid, the bound on the squared norm of each): clip to |x|₂ <= clip_norm, scale, round.

    values: float32 or float64 [d] or [n, d], each row a vector of its own. A row with a NaN or an infinity becomes
    the zero vector: a refusal would tell the data, the zero vector is covered by the bound (and by add/remove).
    `random(n)` gives n bytes; 32 key the rounding. Raises `LocalError` for other shapes and dtypes, for a clip norm
    outside [1e-30, 1e30], and as `grid_bound` does."""
    if values.ndim not in (1, 2) or values.dtype not in (np.float32, np.float64):
        raise LocalError(f"clip_to_grid: float32 or float64 [d] or [n, d], got {values.dtype}{list(values.shape)}")
    if not 1e-30 <= clip_norm <= 1e30:
        raise LocalError(f"clip_to_grid: clip_norm lies in [1e-30, 1e30], got {clip_norm}")
    bound = grid_bound(values.shape[-1], grid_bits)
    words = Words(random)
    rows = np.atleast_2d(values)
    out = np.empty(rows.shape, dtype=np.int64)
    for row, to in zip(rows, out, strict=True):
        to[:] = _round(_scaled(row.astype(np.float64), clip_norm, float(1 << grid_bits)), bound, words)
    return out.reshape(values.shape), bound


def norm_squared(vector: Ints) -> int:
    """|v|₂² of an integer vector, exact whatever its entries."""
    size = max(abs(int(vector.max())), abs(int(vector.min()))) if vector.size else 0
    if size and vector.size * size * size >= 1 << 63:
        return sum(int(entry) ** 2 for entry in vector)
    return int(np.dot(vector, vector))


def _scaled(x: npt.NDArray[np.float64], clip_norm: float, radius: float) -> npt.NDArray[np.float64]:
    """x clipped and scaled to norm <= radius, but for the last digits; zero if an entry is not finite."""
    largest = float(np.max(np.abs(x)))
    if not math.isfinite(largest) or largest == 0.0:
        return np.zeros_like(x)
    unit = x / largest  # entries in [-1, 1]: squares neither overflow nor, where they matter, underflow
    norm = math.sqrt(float(np.dot(unit, unit)))  # in [1, √d]
    # largest * norm may overflow to infinity: then it is above the clip norm, as it should be.
    return unit * (radius / norm) if largest * norm > clip_norm else unit * (largest / clip_norm * radius)


def _round(x: npt.NDArray[np.float64], bound: int, words: Words) -> Ints:
    floor = np.floor(x)
    # The fraction in units of 2^-53; a fraction that rounds to 1 is always rounded up.
    fraction = ((x - floor) * float(1 << 53)).astype(np.uint64)
    whole = floor.astype(np.int64)
    for _ in range(_TRIES):
        up = words.take(x.size) >> np.uint64(11) < fraction
        rounded = whole + up
        if norm_squared(rounded) <= bound:
            return rounded
    rounded = np.trunc(x).astype(np.int64)
    if norm_squared(rounded) > bound:
        raise LocalError("clip_to_grid: a clipped vector is outside the ball it was clipped to: a bug here")
    return rounded
