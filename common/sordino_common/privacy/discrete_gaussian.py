"""Exact samples of the discrete Gaussian N_Z(0, σ²): P(x) ∝ exp(-x²/(2σ²)) for x in Z. Integers only.

By rejection from rectangles that cover the curve, as in Marsaglia and Tsang's ziggurat (2000), but with a whole number
of equal cells over each of many narrow bins, and on integers (`gaussian_cells` has the legend and the table):

    a cell, uniform of 2^T;   x uniform in its bin;   U uniform in [0, 1);   x is kept if c + U < κ f(x),  c its layer

Every x of a bin lies in each of the bin's n_q >= κ f(x) cells with the same chance, so P(x is drawn and kept) =
2^-T w^-1 κ f(x), for every x alike: that is N_Z(0, σ²). Every candidate is independent of every other, so the first n
that are kept are n independent samples. A cell under the curve needs no U, and these are nearly all. For the others
κ f(x) is enclosed in an interval of integers, by a line; where that does not decide (a chance of 10^-4 a candidate) an
enclosure of exp as narrow as needed does, on Python's integers (`exponential.below_exp`).

The two tails, x >= X = Q w and x <= -X - 1, have a cell each. With t = 2^τ, t X >= σ², there x = X + z or -X - 1 - z,

    z = R + t V,  R uniform in {0..t-1},  V = v with probability 2^-(v+1);   kept with probability
    κ f(x) t 2^(V+1) / w  <=  2 κ t f(X) (2/e)^V / w  <=  1,     since |x| >= X + t V, so f(x) <= f(X) exp(-V),

by a bound on 2 κ t f(X) that the table has made sure of. So P(x) is 2^-T w^-1 κ f(x) there, too.

Why no floats: rounding in a textbook sampler shows through in the low bits and breaks privacy (Mironov 2012); on
integers the distribution is the one that the proof speaks of. Canonne, Kamath, Steinke 2020 (arXiv 2004.00010) define
it, and say what it gives.

Bounds: 1 <= σ² <= 2^80. Samples are int64: |x| < 5 · 2^40 + 2^40 · 130 < 2^48. Memory: blocks of 2^14 candidates, the
table, and the result. A block's time hardly depends on what is drawn, but for the few candidates that Python's integers
settle (20 to 100 us each): they lie all over the curve, and those of the tails' cells are mostly rejected.
"""

from __future__ import annotations

import math
import os
from typing import Final

import numpy as np
import numpy.typing as npt

from sordino_common.errors import LocalError
from sordino_common.privacy.exponential import below_exp
from sordino_common.privacy.gaussian_cells import CELL_BITS, HEIGHT_BITS, LINE_BITS, Cells, cells_of
from sordino_common.privacy.mechanism import MAX_SIGMA_SQUARED
from sordino_common.privacy.words import RandomBytes, Words

I64 = npt.NDArray[np.int64]
_BLOCK: Final = 1 << 14  # what a block works on stays in a processor's cache
_DRAWN_FROM: Final = 64 - CELL_BITS - LINE_BITS  # the place of U's first bits in a word
_MAX_STEPS: Final = 128  # of a tail


def discrete_gaussian(sigma_squared: int, count: int, random: RandomBytes = os.urandom) -> I64:
    """int64[count]: independent samples of N_Z(0, `sigma_squared`), exact.

    `random(n)` gives n random bytes; 32 of them key the stream that everything is drawn from. Raises `LocalError` for
    a σ² that is no int in [1, 2^80], or a negative count."""
    if type(sigma_squared) is not int or not 1 <= sigma_squared <= MAX_SIGMA_SQUARED:
        raise LocalError(f"discrete Gaussian: sigma_squared is an int in [1, 2^80], got {sigma_squared!r}")
    if count < 0:
        raise LocalError(f"discrete Gaussian: a count is not negative, got {count}")
    words = Words(random)
    cells = cells_of(sigma_squared)
    out = np.empty(count, dtype=np.int64)
    filled = 0
    while filled < count:
        # Fewer than 3 of 100 candidates are rejected; some too many are cheaper than a second pass.
        left = count - filled
        got = _block(words, cells, min(_BLOCK, left + left // 32 + 16))[:left]
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


def _block(words: Words, cells: Cells, candidates: int) -> I64:
    """Those of so many candidates that are kept. Of a word, the first T bits choose a cell, the last j bits x in its
    bin, and U begins with the 30 in between, or with as many as there are."""
    first = words.take(candidates)
    cell = (first >> (64 - CELL_BITS)).view(np.int64)
    x = cells.bins.take(cell).astype(np.int64)
    x <<= cells.width_bits
    first &= (1 << (64 - CELL_BITS)) - 1
    rest = first.view(np.int64)
    inside = (1 << cells.width_bits) - 1
    x |= rest & inside
    (edges,) = (cell >= cells.under).nonzero()
    if not edges.size:
        return x
    cell, rest = cell[edges], rest[edges]
    cell -= cells.under
    # How far the line is above c + U: at least `above` minus what U's further bits can add.
    above = (rest & inside) >> (cells.width_bits - cells.place_bits)
    above *= cells.rise[cell]
    above >>= cells.place_bits
    above += cells.line[cell]
    rest >>= _DRAWN_FROM
    rest &= -1 << cells.unknown_bits
    above -= rest
    fine = above > cells.margin + (1 << cells.unknown_bits)
    open_ = (above >= -cells.margin) ^ fine
    open_ |= cell >= cells.tail
    for at in open_.nonzero()[0].tolist():
        edge = int(edges[at])
        if cell[at] < cells.tail:
            fine[at] = _below(words, cells, int(x[edge]), int(cell[at]), int(rest[at]))
        else:
            x[edge], fine[at] = _beyond(words, cells, negative=int(cell[at]) > cells.tail)
    keep = np.ones(candidates, dtype=np.bool_)
    keep[edges] = fine
    return x[keep]


def _below(words: Words, cells: Cells, x: int, cell: int, drawn: int) -> bool:
    """Whether c + U < κ f(x), U's first bits being those of `drawn` that are known."""
    known = ((int(cells.layers[cell]) << LINE_BITS) + drawn) >> cells.unknown_bits
    factor, gamma = (cells.height, 1 << HEIGHT_BITS), (x * x, 2 * cells.sigma_squared)
    return below_exp(words, known, LINE_BITS - cells.unknown_bits, factor, gamma)


def _beyond(words: Words, cells: Cells, *, negative: bool) -> tuple[int, bool]:
    """(a candidate beyond the bins, whether it is kept)."""
    steps, word = 0, int(words.take(1)[0])
    while not word:  # 64 zeros
        steps, word = steps + 64, int(words.take(1)[0])
        if steps > _MAX_STEPS:
            raise LocalError("discrete Gaussian: 192 zero bits in a row: the random source is broken")
    steps += 64 - word.bit_length()  # V: the zeros before the first one
    rest = int(words.take(1)[0]) & ((1 << cells.tail_bits) - 1)
    x = (cells.half << cells.width_bits) + rest + (steps << cells.tail_bits)
    size = x + negative
    factor = (cells.height << (cells.tail_bits + steps + 1), 1 << (HEIGHT_BITS + cells.width_bits))
    kept = below_exp(words, int(words.take(1)[0]), 64, factor, (size * size, 2 * cells.sigma_squared))
    return -size if negative else x, kept
