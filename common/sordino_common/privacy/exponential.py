"""exp(-γ) for rational γ >= 0, enclosed by integers, and the exact decision whether a uniform real is below a multiple.

How an exact decision is made with words. A real U, uniform in [0, 1), is known by its first bits, exp(-γ) by an
enclosure: where the two don't overlap the decision is made; else more bits of U are drawn and exp(-γ) is enclosed more
narrowly until they don't. This ends, for 64 bits more leave them overlapping with a chance near 2^-64; an enclosure's
width costs time, never exactness. The comparison of a lazily drawn uniform number with an enclosure is as in Karney
2016 (arXiv 1303.6257).
"""

from __future__ import annotations

from typing import Final

from sordino_common.privacy.words import Words

_MORE_BITS: Final = 64


def exp_bounds(numerator: int, denominator: int, bits: int) -> tuple[int, int]:
    """(low, high), a few units apart, with low <= exp(-numerator/denominator) 2^bits <= high, for a fraction >= 0."""
    halvings = max(0, (numerator // denominator).bit_length() + 1)
    scale = bits + 2 * halvings + 32
    z = (numerator << scale) // (denominator << halvings)  # γ / 2^halvings, at most 1/2, between z and z + 1
    low, high = _series(z + 1, scale)[0], _series(z, scale)[1]
    for _ in range(halvings):
        low, high = (low * low) >> scale, ((high * high) >> scale) + 1
    return low >> (scale - bits), (high >> (scale - bits)) + 1


def below_exp(words: Words, drawn: int, bits: int, factor: tuple[int, int], gamma: tuple[int, int]) -> bool:
    """Whether Y < factor · exp(-gamma), fractions > 0 and >= 0, for the real Y >= 0 whose first bits are `drawn`
    2^-bits and whose others are taken from `words` as they are needed."""
    numerator, denominator = factor
    guard = numerator.bit_length()
    while True:
        low, high = exp_bounds(*gamma, bits + guard)
        if ((drawn + 1) * denominator) << guard <= numerator * low:
            return True
        if (drawn * denominator) << guard >= numerator * high:
            return False
        drawn, bits = (drawn << _MORE_BITS) | int(words.take(1)[0]), bits + _MORE_BITS


def _series(z: int, scale: int) -> tuple[int, int]:
    """Bounds of exp(-z 2^-scale) 2^scale by its Taylor series, for z <= 2^(scale-1) + 1. Each term is below the true
    one by less than 4 units, and what is left out is less than the last."""
    total, term, number = 0, 1 << scale, 0
    while term:
        total += -term if number % 2 else term
        number += 1
        term = ((term * z) >> scale) // number
    slack = 4 * (number + 1)
    return max(0, total - slack), total + slack
