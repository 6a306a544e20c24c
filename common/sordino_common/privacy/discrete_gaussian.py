"""Exact samples of the discrete Gaussian N_Z(0, σ²): P(x) ∝ exp(-x²/(2σ²)) for x in Z. Integers only.

Canonne, Kamath, Steinke 2020 (arXiv 2004.00010), Algorithms 1 to 3, on vectors. With t = floor(σ) + 1:

    U uniform in {0..t-1}, kept with probability exp(-U/t);  V = number of successes of Bernoulli(1/e) in a row;
    Y = ± (U + t V), where -0 is rejected:                    discrete Laplace of scale t              (Algorithm 2)
    kept with probability exp(-γ),  γ = (|Y| - σ²/t)²/(2σ²):  N_Z(0, σ²)                              (Algorithm 3)

Every candidate is independent of every other, so the first n that are kept are n independent samples. The chances are
decided exactly (`bernoulli`): here γ and U/t are enclosed in intervals of integers, with the exact fraction at hand.

Why no floats: rounding in a textbook sampler shows through in the low bits and breaks privacy (Mironov 2012); on
integers the distribution is the one that the proof speaks of.

Enclosure of γ. Let d = | |Y| - σ²/t | and c = 1/(σ √2), so γ = (d c)². |Y| < 257 t (V <= 256; more has a chance of
e^-257 and raises) and t <= 2σ, so d c < 257 √2 < 2^8.51. With 2^j d in [D, D+1] for integers D < 2^31 and 2^k c in
[C, C+1] for C < 2^32, (D C) >> s and (((D+1)(C+1)) >> s) + 1 enclose w = d c 2^22, where s = j + k - 22; w < 2^30.6,
and w² < 2^61.1 encloses γ 2^44. All products fit in uint64.

Bounds: 1 <= σ² <= 2^80. Samples are int64: |x| < 257 · (2^40 + 1) < 2^49. Memory: blocks of 2^16 candidates, and the
result. Not constant-time: how long it takes depends on the rejections.
"""

from __future__ import annotations

import math
import os
from typing import Final

import numpy as np
import numpy.typing as npt

from sordino_common.errors import LocalError
from sordino_common.privacy.bernoulli import FRACTION_BITS, bernoulli_exp, geometric
from sordino_common.privacy.mechanism import MAX_SIGMA_SQUARED
from sordino_common.privacy.words import U64, RandomBytes, Words

_MAX_V: Final = 256
_ROOT_BITS: Final = FRACTION_BITS // 2
_BLOCK: Final = 1 << 16
_DIGIT: Final = 22  # bits of a quotient at a time: a remainder below 2^41 shifted by 22 stays below 2^63


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
        # About 0.48 of the candidates are kept; one and a half times too many is cheaper than a second pass.
        got = _block(words, shape, min(_BLOCK, 5 * (count - filled) // 2 + 64))[: count - filled]
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
    """The constants of one σ²: t, and how γ is enclosed (see the module's text)."""

    def __init__(self, sigma_squared: int) -> None:
        self.sigma_squared = sigma_squared
        self.t = math.isqrt(sigma_squared) + 1
        self.whole, self.part = divmod(sigma_squared, self.t)  # σ²/t = whole + part/t
        self.j = 31 - ((_MAX_V + 1) * self.t).bit_length()
        # The largest k with c 2^k < 2^32: c² 2^(2k) = 2^(2k) / (2σ²) < 2^64.
        self.k = (64 + (2 * sigma_squared).bit_length() - 1) // 2
        self.c = math.isqrt((1 << (2 * self.k)) // (2 * sigma_squared))
        # |Y| - whole - part/t times 2^j, floored part: part 2^j / t when j > 0.
        self.part_scaled = (self.part << self.j) // self.t if self.j > 0 else 0
        self.s = self.j + self.k - _ROOT_BITS

    def gamma(self, y: U64) -> tuple[U64, U64]:
        """(low, high) with low <= γ 2^44 <= high."""
        # |Y| - σ²/t lies in (e - 1, e] with e = |Y| - whole, and is e - part/t exactly.
        whole = np.uint64(self.whole)
        above = y > whole
        e = np.where(above, y - whole, whole - y)
        if self.j > 0:
            j, part = np.uint64(self.j), np.uint64(self.part_scaled)
            # above: 2^j e - 2^j part/t in [2^j e - part_scaled - 1, 2^j e - part_scaled]; below: the sum.
            least = np.where(above, (e << j) - part - np.uint64(1), (e << j) + part)
        else:
            down = np.uint64(-self.j)
            # above: (e - part/t) >> -j in [(e-1) >> -j, (e >> -j) + 1]; below: e + part/t < e + 1.
            least = np.where(above, e - np.uint64(1), e) >> down
        width = np.uint64(1 if self.j > 0 else 2)
        c, s = np.uint64(self.c), np.uint64(self.s)
        low = (least * c) >> s
        high = (((least + width) * (c + np.uint64(1))) >> s) + np.uint64(1)
        return low * low, high * high

    def exact(self, y: int) -> tuple[int, int]:
        """γ as a fraction: (y t - σ²)² / (2 σ² t²)."""
        return (y * self.t - self.sigma_squared) ** 2, 2 * self.sigma_squared * self.t**2


def _block(words: Words, shape: _Enclosure, candidates: int) -> npt.NDArray[np.int64]:
    t = shape.t
    u = words.below(t, candidates)
    low, exact_division = _scaled_quotient(u, t)
    u = u[bernoulli_exp(words, low, low + ~exact_division, lambda at: (int(u[at]), t))]
    y = u + np.uint64(t) * geometric(words, u.size, most=_MAX_V)
    negative = (words.take(y.size) >> np.uint64(63)).astype(np.bool_)
    kept = ~(negative & (y == np.uint64(0)))
    y, negative = y[kept], negative[kept]
    low, high = shape.gamma(y)
    kept = bernoulli_exp(words, low, high, lambda at: shape.exact(int(y[at])))
    out: npt.NDArray[np.int64] = y[kept].astype(np.int64)
    out[negative[kept]] *= -1
    return out


def _scaled_quotient(u: U64, t: int) -> tuple[U64, npt.NDArray[np.bool_]]:
    """(floor(u 2^44 / t), whether the division was exact) for u < t <= 2^40 + 1, by long division."""
    divisor, digit = np.uint64(t), np.uint64(_DIGIT)
    quotient, rest = np.zeros_like(u), u
    for _ in range(FRACTION_BITS // _DIGIT):
        shifted = rest << digit
        part = shifted // divisor
        quotient, rest = (quotient << digit) | part, shifted - part * divisor
    return quotient, rest == np.uint64(0)
