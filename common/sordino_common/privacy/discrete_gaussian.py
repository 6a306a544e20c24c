"""Exact samples of the discrete Gaussian N_Z(0, σ²): P(x) ∝ exp(-x²/(2σ²)) for x in Z. Integers only.

By rejection from the discrete Laplace distribution, as in Canonne, Kamath, Steinke 2020 (arXiv 2004.00010, Algorithms
2 and 3), with both of its rejections made at once. t = 2^τ is the power of two with σ²/2 <= t² < 2σ², and

    U uniform in {0..t-1};   V = v with probability ∝ exp(-v);   |Y| = U + t V, with a random sign, -0 rejected;
    Y is kept with probability exp(-γ),   γ = Y²/(2σ²) + σ²/(2t²) - V = U/t + (|Y| - σ²/t)²/(2σ²) >= 0.

Each y comes from one (U, V, sign), so P(Y = y is drawn and kept) ∝ exp(-V) exp(-γ) ∝ exp(-y²/(2σ²)): as it should
be, for every such t. Between 0.41 and 0.48 of the candidates are kept. Every candidate is independent of every other,
so the first n that are kept are n independent samples. The chances are decided exactly (`exponential`): γ is enclosed
in an interval of integers, with the exact fraction at hand.

Why no floats: rounding in a textbook sampler shows through in the low bits and breaks privacy (Mironov 2012); on
integers the distribution is the one that the proof speaks of.

Enclosure of γ 2^50. With c = 1/(σ √2), Y²/(2σ²) = (Y c)². |Y| < 61 t (V <= 60) and t < √2 σ, so |Y| c < 61 < 2^6.
With y = |Y| >> j below 2^31 (exact for j = 0) and C = floor(2^k c) <= 2^32, (y C) >> s and (((y+w)(C+1)) >> s) + 1
enclose |Y| c 2^25, where s = k - j - 25 and w = 1 if j > 0; their squares stay below 61² 2^50 (1 + 2^-20) < 2^62.

Bounds: 1 <= σ² <= 2^80. Samples are int64: |x| < 61 · 2^40 < 2^46. Memory: blocks of 2^14 candidates, and the result.
A block's time hardly depends on what is drawn; the number of blocks does.
"""

from __future__ import annotations

import math
import os
from typing import Final

import numpy as np
import numpy.typing as npt

from sordino_common.errors import LocalError
from sordino_common.privacy.exponential import GAMMA_BITS, I64, MAX_FLOOR, decide, floor_log
from sordino_common.privacy.mechanism import MAX_SIGMA_SQUARED
from sordino_common.privacy.words import RandomBytes, Words

_BLOCK: Final = 1 << 14  # what a block works on stays in a processor's cache
_ROOT_BITS: Final = GAMMA_BITS // 2


def discrete_gaussian(sigma_squared: int, count: int, random: RandomBytes = os.urandom) -> npt.NDArray[np.int64]:
    """int64[count]: independent samples of N_Z(0, `sigma_squared`), exact.

    `random(n)` gives n random bytes; 32 of them key the stream that everything is drawn from. Raises `LocalError` for
    a σ² that is no int in [1, 2^80], or a negative count."""
    if type(sigma_squared) is not int or not 1 <= sigma_squared <= MAX_SIGMA_SQUARED:
        raise LocalError(f"discrete Gaussian: sigma_squared is an int in [1, 2^80], got {sigma_squared!r}")
    if count < 0:
        raise LocalError(f"discrete Gaussian: a count is not negative, got {count}")
    words = Words(random)
    shape = _Enclosure(sigma_squared)
    out = np.empty(count, dtype=np.int64)
    filled = 0
    while filled < count:
        # At least 0.41 of the candidates are kept; some too many are cheaper than a second pass.
        got = _block(words, shape, min(_BLOCK, 11 * (count - filled) // 4 + 64))[: count - filled]
        out[filled : filled + got.size] = got
        filled += got.size
    return out


def noise_bound(sigma_squared: int, length: int, aggregators: int = 1, *, chance_bits: int = 60) -> int:
    """The integer m such that a sum of `aggregators` vectors int64[length] of noise has an entry beyond ±m with a
    chance below 2^-chance_bits.

    N_Z(0, σ²) is subgaussian as the continuous one is (Canonne, Kamath, Steinke 2020, Proposition 25):
    P(|X| >= m) <= 2 exp(-m²/(2 k σ²)) for a sum of k, and a union bound over the entries. ln 2 < 6932/10000."""
    if length < 1 or aggregators < 1 or sigma_squared < 1:
        raise LocalError("noise_bound: sigma_squared, length and aggregators are at least 1")
    log2 = chance_bits + 1 + length.bit_length()
    squared = -(-2 * aggregators * sigma_squared * log2 * 6932 // 10_000)
    return math.isqrt(squared) + 1


class _Enclosure:
    """The constants of one σ²: t = 2^tau, and how γ is enclosed (see the module's text)."""

    def __init__(self, sigma_squared: int) -> None:
        self.sigma_squared = sigma_squared
        self.tau = (-(-sigma_squared // 2) - 1).bit_length() + 1 >> 1  # the least with 2 · 4^tau >= σ²
        self.j = max(0, self.tau + MAX_FLOOR.bit_length() - 31)
        # The largest k with c 2^k <= 2^32: c² 2^(2k) = 2^(2k) / (2σ²) <= 2^64.
        self.k = (64 + (2 * sigma_squared).bit_length() - 1) // 2
        self.c = math.isqrt((1 << (2 * self.k)) // (2 * sigma_squared))
        self.s = self.k - self.j - _ROOT_BITS
        self.constant = (sigma_squared << GAMMA_BITS) >> (2 * self.tau + 1)  # σ²/(2t²), floor

    def gamma(self, y: I64, v: I64) -> tuple[I64, I64]:
        """(low, high) with low <= γ 2^50 <= high, for y = |Y| and v = V."""
        c, s = np.uint64(self.c), np.uint64(self.s)
        least = y.view(np.uint64) >> np.uint64(self.j)
        low = ((least * c) >> s).view(np.int64)
        most = least + np.uint64(1 if self.j else 0)
        high = (((most * (c + np.uint64(1))) >> s) + np.uint64(1)).view(np.int64)
        rest = np.int64(self.constant) - (v << np.int64(GAMMA_BITS))
        return low * low + rest, high * high + (rest + np.int64(1))

    def exact(self, y: int) -> tuple[int, int]:
        """γ as a fraction: (y² t² + σ⁴ - 2 σ² t² V) / (2 σ² t²)."""
        square = 1 << (2 * self.tau)
        double = 2 * self.sigma_squared * square
        return y * y * square + self.sigma_squared**2 - double * (y >> self.tau), double


def _block(words: Words, shape: _Enclosure, candidates: int) -> I64:
    first, second, third = words.take(3 * candidates).reshape(3, candidates)
    v = floor_log(words, second)
    y = (first & np.uint64((1 << shape.tau) - 1)).view(np.int64) + (v << np.int64(shape.tau))
    signs = first.view(np.int64) >> np.int64(63)  # -1 or 0, by a bit that U doesn't use
    low, high = shape.gamma(y, v)
    kept = decide(words, third, low, high, lambda at: shape.exact(int(y[at])))
    kept &= (y | ~signs) != np.int64(0)  # -0 is rejected
    y, signs = y[kept], signs[kept]
    out: I64 = (y ^ signs) - signs
    return out
