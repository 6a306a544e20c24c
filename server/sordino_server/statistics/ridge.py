"""Linear regression from one noised Gram matrix: AdaSSP (Wang, "Revisiting differentially private linear regression",
UAI 2018, algorithm 2) with a single release.

The fleet's answer is G = Σ z zᵀ, z = (bias, x, y) bounded (`sordino_common.privacy.row_queries`), every entry of its
upper triangle with noise of standard deviation s. In G stand XᵀX and Xᵀy. AdaSSP regularises by as much as the noise
makes necessary,

    θ = (XᵀX + E + λ I)⁻¹ (Xᵀy + e),        λ = max(0, s·√(d·ln(2d²/ρ)) - λ_min)

with a lower bound λ_min of XᵀX's smallest eigenvalue. Where the paper spends a third of the budget on λ_min, we read
it from the noised matrix, which costs nothing: by Weyl's inequality λ_min(XᵀX) >= λ_min(XᵀX + E) - |E|, and
|E| <= s·√(2d) + s·√(2 ln(1/ρ)) with probability 1 - ρ for a symmetric Gaussian E (Vershynin, High-Dimensional
Probability, corollary 4.4.8 and exercise 4.4.10 give the shape; the constants are checked by a test). All of it is
post-processing: it costs no privacy whatever ρ is.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sordino_common.errors import LocalError
from sordino_common.messages.statistics import RowQuery
from sordino_common.privacy.row_queries import gram_bounds

Real = NDArray[np.float64]
FAILURE: float = 0.05  # ρ of the paper: how often the regularisation may be too small for the noise


@dataclass(frozen=True, slots=True, kw_only=True)
class Ridge:
    """y' = weights · x' + intercept, in the units of the query: x' and y' in [-1, 1] over the columns' ranges.

    `regularization`: λ as used; `smallest`: the lower bound of XᵀX's smallest eigenvalue; both over 4^bits: real."""

    weights: Real
    intercept: float
    regularization: float
    smallest: float


def ridge(query: RowQuery, entries: Real, noise: float) -> Ridge:
    """`entries`: the query's integers (upper triangle, row by row) divided by its weight; `noise`: s, in that unit."""
    beta, _, _ = gram_bounds(query)
    width = len(query.columns) + (beta > 0)
    if len(entries) != width * (width + 1) // 2:
        raise LocalError(f"ridge: {len(entries)} entries, expected {width * (width + 1) // 2}")
    gram = np.zeros((width, width))
    gram[np.triu_indices(width)] = entries
    gram = gram + np.triu(gram, 1).T
    scale = float(4**query.bits)
    matrix, vector, real_noise = gram[:-1, :-1] / scale, gram[:-1, -1] / scale, noise / scale
    size = width - 1
    smallest = max(float(np.linalg.eigvalsh(matrix)[0]) - spectral_bound(real_noise, size), 0.0)
    wanted = real_noise * math.sqrt(size * math.log(2.0 * size * size / FAILURE))
    regularization = max(wanted - smallest, 0.0)
    theta = _solve(matrix, vector, regularization)
    if beta == 0:
        return Ridge(weights=theta, intercept=0.0, regularization=regularization, smallest=smallest)
    bias = beta / float(1 << query.bits)
    return Ridge(weights=theta[1:], intercept=float(theta[0]) * bias, regularization=regularization, smallest=smallest)


def spectral_bound(noise: float, size: int) -> float:
    """|E| of a symmetric matrix whose upper triangle is independent noise of deviation `noise`, but for FAILURE."""
    return noise * (2.0 * math.sqrt(size) + math.sqrt(2.0 * math.log(1.0 / FAILURE)))


def _solve(matrix: Real, vector: Real, regularization: float) -> Real:
    """(M + λ I)⁻¹ v with M's eigenvalues below zero, which only noise can cause, counted as zero."""
    values, vectors = np.linalg.eigh(matrix)
    values = np.maximum(values, 0.0) + regularization
    floor = max(values[-1], 1.0) * 1e-12  # without noise and with columns that depend on one another: least norm
    inverse = np.where(values > floor, 1.0 / np.maximum(values, floor), 0.0)
    return np.asarray(vectors @ (inverse * (vectors.T @ vector)), dtype=np.float64)
