"""Bernoulli(exp(-γ)) for vectors of rational γ >= 0: exact, on integers only.

Canonne, Kamath, Steinke 2020, Algorithm 1: K = 1, 2, ... until a Bernoulli(γ/K) fails; the answer is whether K is odd.
For γ > 1: one Bernoulli(exp(-1)) after the other, then the rest.

How an exact comparison is made with words. A real U in [0, 1) is drawn bit by bit; it is below γ/K or it is not. Of U
we draw u, its first B = 44 bits; γ is known as an interval, lo <= γ 2^B <= hi. Then

    (u+1) K <= lo  =>  U < γ/K,            u K >= hi  =>  U >= γ/K,

and what lies between (a few in a million) is decided by drawing U on and comparing with γ itself, as Python integers.
So the interval's width costs time, never exactness.

Overflow: u < 2^44 and K <= 2^10, so u K < 2^54; γ < 2^18, so hi < 2^62. K > 2^10 has a chance below 1/1024!, and
raises. Running time depends on what is drawn: this is not constant-time code.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import numpy as np
import numpy.typing as npt

from sordino_common.errors import LocalError
from sordino_common.privacy.words import U64, Words

FRACTION_BITS: Final = 44
_MORE_BITS: Final = 64
_MAX_K: Final = 1 << 10

Bools = npt.NDArray[np.bool_]
Indices = npt.NDArray[np.intp]
# The exact γ of one element, by its index: (numerator, denominator).
Exact = Callable[[int], tuple[int, int]]


def bernoulli_exp(words: Words, low: U64, high: U64, exact: Exact, *, bits: int = FRACTION_BITS) -> Bools:
    """bool[n]: element i is true with probability exp(-γ_i), exactly.

    low, high: uint64[n], low <= γ 2^bits <= high < 2^62. `exact(i)` gives γ_i as a fraction. `bits` <= 44 is there so
    that tests can make the intervals wide."""
    one = np.uint64(1 << bits)
    whole_low, whole_high = low >> np.uint64(bits), high >> np.uint64(bits)
    low, high = low & (one - np.uint64(1)), high & (one - np.uint64(1))
    for at in np.flatnonzero(whole_low != whole_high):  # the interval holds an integer: settle it exactly
        numerator, denominator = exact(int(at))
        whole, rest = divmod(numerator, denominator)
        scaled, remainder = divmod(rest << bits, denominator)
        whole_low[at], low[at], high[at] = whole, scaled, scaled + bool(remainder)
    alive = np.ones(low.shape, dtype=np.bool_)
    waiting = np.flatnonzero(whole_low)
    round_ = np.uint64(0)
    while waiting.size:  # one factor exp(-1) for each whole unit of γ, as long as none has failed
        ones = np.full(waiting.shape, one)
        passed = _below_one(words, ones, ones, lambda _: (1, 1), bits)
        alive[waiting[~passed]] = False
        round_ += np.uint64(1)
        waiting = waiting[passed]
        waiting = waiting[whole_low[waiting] > round_]
    rest_of = np.flatnonzero(alive)

    def remainder_of(at: int) -> tuple[int, int]:
        numerator, denominator = exact(int(rest_of[at]))
        return numerator % denominator, denominator

    alive[rest_of] = _below_one(words, low[rest_of], high[rest_of], remainder_of, bits)
    return alive


def geometric(words: Words, count: int, *, most: int) -> U64:
    """uint64[count]: how many Bernoulli(exp(-1)) in a row come out true. Raises `LocalError` above `most`, which has
    a chance of exp(-most) an element."""
    out = np.zeros(count, dtype=np.uint64)
    running = np.arange(count)
    one = np.uint64(1 << FRACTION_BITS)
    for _ in range(most + 1):
        ones = np.full(running.shape, one)
        running = running[_below_one(words, ones, ones, lambda _: (1, 1), FRACTION_BITS)]
        if not running.size:
            return out
        out[running] += np.uint64(1)
    raise LocalError(f"{most + 1} events of chance 1/e in a row: the random source is broken")


def _below_one(words: Words, low: U64, high: U64, exact: Exact, bits: int) -> Bools:
    """Bernoulli(exp(-γ)) for γ in [0, 1]; low <= γ 2^bits <= high <= 2^bits."""
    odd = np.zeros(low.shape, dtype=np.bool_)
    running = np.arange(low.size)
    for k in range(1, _MAX_K):
        passed = _less(words, low[running], high[running], k, running, exact, bits)
        if k % 2:
            odd[running[~passed]] = True
        running = running[passed]
        if not running.size:
            return odd
    raise LocalError(f"a Bernoulli(exp(-γ)) took {_MAX_K} draws: the random source is broken")


def _less(words: Words, low: U64, high: U64, k: int, index: Indices, exact: Exact, bits: int) -> Bools:
    """Bernoulli(γ/k) for each element; `index`: which elements of `exact` they are."""
    u = words.take(low.size) >> np.uint64(64 - bits)
    times = np.uint64(k)
    less = (u + np.uint64(1)) * times <= low
    open_ = np.flatnonzero(~less & (u * times < high))
    for at in open_:
        numerator, denominator = exact(int(index[at]))
        less[at] = _finish(words, int(u[at]), bits, numerator, denominator * k)
    return less


def _finish(words: Words, drawn: int, bits: int, numerator: int, denominator: int) -> bool:
    """Whether the real U whose first `bits` bits are `drawn` is below numerator/denominator."""
    while True:
        edge = numerator << bits  # U 2^bits lies in [drawn, drawn + 1); compare with edge / denominator
        if (drawn + 1) * denominator <= edge:
            return True
        if drawn * denominator >= edge:
            return False
        drawn = (drawn << _MORE_BITS) | int(words.take(1)[0])
        bits += _MORE_BITS
