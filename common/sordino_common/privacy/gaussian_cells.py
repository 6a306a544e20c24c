"""Cells under and over the curve of a discrete Gaussian: what `discrete_gaussian` draws its candidates from. Integers.

Legend: f(x) = exp(-x²/(2σ²)), w = 2^j the width of a bin, κ = K / 2^6 the height of the curve over 0, T = 16.

    bin q holds x = q w .. q w + w - 1, for q = -Q .. Q - 1;   a cell is a bin and a layer c = 0, 1, ...: w wide, 1 high

Bin q has the cells c < n_q, n_q >= κ f(x) for every x of it, so that its cells cover the curve. A cell with
c + 1 <= κ f(x) for every x of the bin lies *under* the curve; there are u_q of them. Cells lie in one table of 2^T:
those under the curve first, then the others, then cells of no bin, whose layer lies over every curve, and at the end
two for what is left beyond ±Q w, about 5 σ. w is the largest power of two up to σ/128, but at least 1; 94 of 100
cells, or more, lie under the curve.

Powers. f(q w) comes by f_(q+1) = f_q g_q, g_(q+1) = g_q exp(-w²/σ²) in units of 2^-128, each step rounded down. All
values are at most 1, so a product is below the truth by less than its factors are, together, plus one unit. The first
two powers are by less than 4, so g_q is by less than 5 (q + 1) units and f_q by less than 3 (q + 1)², which for
q < 2^11 is less than 2^24. Hence F_q = floor(f_q 2^40) <= f(q w) 2^40 < F_q + 2.

Lines. Between the ends of a bin the curve is a line but for w²/8 · max |κ f''| <= κ w²/(8 σ²). In units of 2^-30, with
a = floor(κ F_q) at the left end, rise = the difference to the right end's, and v the first 30 bits of x's place in the
bin, a + (rise v >> bits of v) is below or above κ f(x) by no more than `margin`: that, 2 κ 2^-10 for the F of the ends,
and 8 for what is rounded here (each end by less than 1, v by less than |rise| 2^-30 < 2, the shift by less than 1).
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Final

import numpy as np
import numpy.typing as npt

from sordino_common.errors import LocalError
from sordino_common.privacy.exponential import exp_bounds

I64 = npt.NDArray[np.int64]

CELL_BITS: Final = 16
LINE_BITS: Final = 30
HEIGHT_BITS: Final = 6  # of κ, after the point
_BINS_A_SIGMA_BITS: Final = 7
_REACH: Final = 5  # sigmas that bins cover; `Cells` makes sure that the rest fits its cells
_POWER_BITS: Final = 128
_VALUE_BITS: Final = 40
_OVER: Final = 1 << 40  # how far the layer of a cell of no bin lies above the curve, in lines' units


class Cells:
    """The table of one σ². Nothing in it is secret."""

    def __init__(self, sigma_squared: int) -> None:
        sigma = math.isqrt(sigma_squared)
        self.sigma_squared: Final = sigma_squared
        self.width_bits: Final = max(0, (sigma >> _BINS_A_SIGMA_BITS).bit_length() - 1)  # j
        half = (math.isqrt(_REACH * _REACH * sigma_squared) >> self.width_bits) + 2  # Q
        values = _values(sigma_squared, self.width_bits, half)
        bins = np.arange(-half, half)
        # F at a bin's ends, by the side that is nearer to 0; a bin of one x has but one value.
        left = values[np.abs(bins)]
        right = values[np.abs(bins + 1)] if self.width_bits else left
        nearer, farther = np.maximum(left, right), np.minimum(left, right)
        room = (1 << CELL_BITS) - bins.size - 2
        shift = _VALUE_BITS + HEIGHT_BITS
        # Each bin's cells are rounded up, by less than one: `room` has left one for each.
        self.height: Final = (room << shift) // int((nearer + 2).sum())  # K
        cells = -(-self.height * (nearer + 2) >> shift)
        under = self.height * farther >> shift
        self.under: Final = int(under.sum())
        self.half: Final = half
        over = cells - under
        places = np.repeat(bins, over)
        first = np.cumsum(over) - over
        layers = np.arange(places.size) - np.repeat(first, over) + np.repeat(under, over)
        edges = (1 << CELL_BITS) - self.under  # cells that are not under the curve
        self.bins: Final = np.zeros(1 << CELL_BITS, dtype=np.int16)
        self.bins[: self.under] = np.repeat(bins, under)
        self.bins[self.under : self.under + places.size] = places
        # Of those cells: the layer, the line minus the layer's floor, and the line's rise.
        self.layers: Final = layers
        fine = shift - LINE_BITS
        a, b = self.height * left >> fine, self.height * right >> fine
        self.line: Final = np.full(edges, -_OVER, dtype=np.int64)
        self.line[: places.size] = np.repeat(a, over) - (layers << LINE_BITS)
        self.rise: Final = np.zeros(edges, dtype=np.int64)
        self.rise[: places.size] = np.repeat(b - a, over)
        self.tail: Final = edges - 2
        curved = (self.height << (LINE_BITS - HEIGHT_BITS + 2 * self.width_bits)) // (8 * sigma_squared) + 1
        self.margin: Final = curved * bool(self.width_bits) + (2 * self.height >> fine) + 8
        self.place_bits: Final = min(self.width_bits, LINE_BITS)
        # A word has 64 - T bits for the place in a bin and for U: of U's first 30 bits so many may be missing.
        self.unknown_bits: Final = max(0, self.width_bits + LINE_BITS + CELL_BITS - 64)
        # Beyond the bins: steps of t = 2^tail_bits with t Q w >= σ², so that f halves, and more, with each of them.
        start = half << self.width_bits
        self.tail_bits: Final = (-(-sigma_squared // start) - 1).bit_length()
        self._check(start)

    def _check(self, start: int) -> None:
        """`LocalError` unless the tails' cells cover them, and no line leaves its integers: a bug here."""
        likely = exp_bounds(start * start, 2 * self.sigma_squared, 64)[1]
        # 2 κ t f(Q w) <= w: see `discrete_gaussian`
        covered = (2 * self.height * likely) << self.tail_bits <= 1 << (64 + HEIGHT_BITS + self.width_bits)
        steep = int(np.abs(self.rise).max()) >> (LINE_BITS + 1)
        if not covered or steep or self.half >= 1 << 11 or self.under < 1:
            raise LocalError(f"discrete Gaussian: no table for sigma_squared {self.sigma_squared}: a bug here")


@lru_cache(maxsize=4)
def cells_of(sigma_squared: int) -> Cells:
    """Made once, in about a millisecond, and kept for the sigmas used last."""
    return Cells(sigma_squared)


def _values(sigma_squared: int, width_bits: int, half: int) -> I64:
    """F_0 .. F_half, see the module's text."""
    square = 1 << (2 * width_bits)
    f = 1 << _POWER_BITS
    g = exp_bounds(square, 2 * sigma_squared, _POWER_BITS)[0]
    ratio = exp_bounds(square, sigma_squared, _POWER_BITS)[0]
    values = np.empty(half + 1, dtype=np.int64)
    for at in range(half + 1):
        values[at] = f >> (_POWER_BITS - _VALUE_BITS)
        f, g = (f * g) >> _POWER_BITS, (g * ratio) >> _POWER_BITS
    return values
