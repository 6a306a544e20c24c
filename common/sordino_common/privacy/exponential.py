"""Coins of chance exp(-γ) for vectors of rational γ >= 0, and floor(-ln U): exact, on integers only.

How an exact decision is made with words. A real U, uniform in [0, 1), is known by its first bits, exp(-γ) by an
enclosure: where the two don't overlap the decision is made; else (about one in a million) more bits of U are drawn and
exp(-γ) is enclosed more narrowly, as Python integers, until they don't. exp(-γ) is irrational for rational γ > 0, so
this ends, and an enclosure's width costs time, never exactness.

Legend: E = 31 bits of a probability, x = γ in units of 2^-30 (floor), r = its last 12 bits, ulp = 2^-31.

    exp(-x) = T1[x >> 24] · T2[(x >> 12) mod 2^12] · exp(-r 2^-30)             T1 in steps of 2^-6 up to 32, T2 of 2^-18

Enclosure of exp(-x). The tables' entries are below the truth by less than an ulp (and 2^-100). So their product,
floored, is below it by less than 4 ulp; 1 - r 2^-30 is below exp(-r 2^-30) by less than 2^-37; one more floor: in all
less than 8 ulp, never above. From 32 on the product is 0 and the truth below an ulp. For γ in [x, x + w]: exp(-γ) is at
most exp(-x) and at least exp(-x) (1 - w).

Every element does the same work whatever was drawn; only what is settled by Python integers takes longer.

This decides what Algorithm 1 of Canonne, Kamath, Steinke 2020 (arXiv 2004.00010) decides by a random number of coins,
in one step; the comparison of a lazily drawn uniform number with an enclosure is as in Karney 2016 (arXiv 1303.6257).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Final

import numpy as np
import numpy.typing as npt

from sordino_common.errors import LocalError
from sordino_common.privacy.words import U64, Words

GAMMA_BITS: Final = 50
MAX_FLOOR: Final = 60

_UNIT_BITS: Final = 30  # of x
_CHANCE_BITS: Final = 31  # of a probability
_SLACK: Final = 8
_COARSE: Final = 6  # T1's steps are 2^-6
_FINE: Final = 18  # T2's are 2^-18
_TOP: Final = 32 << _COARSE
_MORE_BITS: Final = 64
_TABLE_BITS: Final = 160

Bools = npt.NDArray[np.bool_]
I64 = npt.NDArray[np.int64]
# The exact γ of one element, by its index: (numerator, denominator).
Exact = Callable[[int], tuple[int, int]]


def bernoulli_exp(words: Words, low: I64, high: I64, exact: Exact) -> Bools:
    """bool[n]: element i is true with probability exp(-γ_i), exactly.

    low, high: int64[n], low <= γ 2^50 <= high < 2^62; what is below 0 counts as 0. `exact(i)` gives γ_i as a fraction.
    Uses one word an element, and more for those that it settles one by one."""
    return decide(words, words.take(low.size), low, high, exact)


def decide(words: Words, first: U64, low: I64, high: I64, exact: Exact) -> Bools:
    """`bernoulli_exp`, with the first bits of each U at the top of `first`: uint64[n], fresh, used for nothing else."""
    coarse, fine = _tables()
    least = np.maximum(low, np.int64(0))
    least >>= np.int64(GAMMA_BITS - _UNIT_BITS)  # x
    width = (high >> np.int64(GAMMA_BITS - _UNIT_BITS)) + np.int64(1)
    width -= least
    np.minimum(width, np.int64(1 << _UNIT_BITS), out=width)
    chance = coarse[np.minimum(least >> np.int64(_UNIT_BITS - _COARSE), np.int64(_TOP))]
    chance *= fine[(least >> np.int64(_UNIT_BITS - _FINE)) & np.int64((1 << (_FINE - _COARSE)) - 1)]
    chance >>= np.int64(_CHANCE_BITS)
    chance *= np.int64(1 << _UNIT_BITS) - (least & np.int64((1 << (_UNIT_BITS - _FINE)) - 1))
    chance >>= np.int64(_UNIT_BITS)  # at most _SLACK below exp(-x)
    u = (first >> np.uint64(64 - _CHANCE_BITS)).view(np.int64)
    width *= chance
    width >>= np.int64(_UNIT_BITS)
    # U < exp(-γ) for certain: u + 1 <= chance - width - 1
    answer: Bools = u + np.int64(2) <= chance - width
    open_ = ~answer & (u < chance + np.int64(_SLACK))
    for at in np.flatnonzero(open_):
        answer[at] = _below(words, int(u[at]), _CHANCE_BITS, *exact(int(at)))
    return answer


def floor_log(words: Words, first: U64) -> I64:
    """int64[n]: floor(-ln U), so V with probability exp(-V) (1 - 1/e); the first 64 bits of each U are `first`.

    Raises `LocalError` above `MAX_FLOOR`, which has a chance of exp(-61) an element."""
    ascending, following = _thresholds()
    most = ascending.size
    out = np.int64(most) - np.searchsorted(ascending, first, side="right")
    # exp(-(V+1)) lies where U does: within the same 2^-64. With V at the table's end every smaller one may.
    for at in np.flatnonzero(following[out] == first):
        value, drawn, bits = int(out[at]), int(first[at]), 64
        while True:
            low, high = exp_bounds(value + 1, 1, bits)
            if drawn >= high:
                break
            if drawn + 1 <= low:
                value += 1
                if value > MAX_FLOOR:
                    raise LocalError(f"-ln U > {MAX_FLOOR}: the random source is broken")
                continue
            drawn, bits = _longer(words, drawn, bits)
        out[at] = value
    return out


def exp_bounds(numerator: int, denominator: int, bits: int) -> tuple[int, int]:
    """(low, high), a few units apart, with low <= exp(-numerator/denominator) 2^bits <= high, for a fraction >= 0."""
    halvings = max(0, (numerator // denominator).bit_length() + 1)
    scale = bits + 2 * halvings + 32
    z = (numerator << scale) // (denominator << halvings)  # γ / 2^halvings, at most 1/2, between z and z + 1
    low, high = _series(z + 1, scale)[0], _series(z, scale)[1]
    for _ in range(halvings):
        low, high = (low * low) >> scale, ((high * high) >> scale) + 1
    return low >> (scale - bits), (high >> (scale - bits)) + 1


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


def _below(words: Words, drawn: int, bits: int, numerator: int, denominator: int) -> bool:
    """Whether the real U whose first `bits` bits are `drawn` is below exp(-numerator/denominator)."""
    if numerator == 0:
        return True
    while True:
        low, high = exp_bounds(numerator, denominator, bits)
        if drawn + 1 <= low:
            return True
        if drawn >= high:
            return False
        drawn, bits = _longer(words, drawn, bits)


def _longer(words: Words, drawn: int, bits: int) -> tuple[int, int]:
    return (drawn << _MORE_BITS) | int(words.take(1)[0]), bits + _MORE_BITS


@lru_cache(maxsize=1)
def _tables() -> tuple[I64, I64]:
    """floor(exp(-i 2^-6) 2^31) for i up to 32 · 2^6, where it is 0; floor(exp(-i 2^-18) 2^31) for i < 2^12."""
    return _powers(1 << _COARSE, _TOP + 1), _powers(1 << _FINE, 1 << (_FINE - _COARSE))


def _powers(parts: int, count: int) -> I64:
    step, power = exp_bounds(1, parts, _TABLE_BITS)[0], 1 << _TABLE_BITS
    entries = np.empty(count, dtype=np.int64)
    for at in range(count):
        entries[at] = power >> (_TABLE_BITS - _CHANCE_BITS)
        power = (power * step) >> _TABLE_BITS  # below the truth by less than 4 count 2^-160
    return entries


@lru_cache(maxsize=1)
def _thresholds() -> tuple[U64, U64]:
    """(floor(exp(-k) 2^64) for k = 44..1, ascending; the same by V = k - 1 = 0..44, the last of them 0)."""
    falling = [exp_bounds(k, 1, _TABLE_BITS)[0] >> (_TABLE_BITS - 64) for k in range(1, 46)]
    return np.array(falling[:-1][::-1], dtype=np.uint64), np.array(falling, dtype=np.uint64)
