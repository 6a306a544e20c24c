"""The 64-bit draws of PCG64, bit for bit as `numpy.random.PCG64(seed).random_raw` gives them, without that package.

`numpy.random` comes with four other generators and their distributions: 2 MB of a worker that orders rows and draws
nothing else. No secret and no noise is drawn here; those come from `os.urandom`.

    seed      four 32-bit words hashed from the seed, and eight from those, make state and increment (SeedSequence)
    step      s -> A s + c mod 2^128; k steps at once are s -> A^k s + c (A^(k-1) + ... + 1)
    output    the two halves of s xored, turned right by its highest six bits

Sources: M. E. O'Neill, "PCG: A family of simple fast space-efficient statistically good algorithms for random number
generation", HMC-CS-2014-0905, section 6.3.3 (XSL RR); "Developing a seed_seq alternative", 2015, for the seeding.
NumPy keeps both for ever (NEP 19).
"""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray

Words = NDArray[np.uint64]

_A: Final = 0x2360ED051FC65DA44385DF649FCCF645
_MASK_32: Final = (1 << 32) - 1
_MASK_64: Final = (1 << 64) - 1
_MASK_128: Final = (1 << 128) - 1
_POOL: Final = 4  # words that a seed is hashed into
_FEW: Final = 64  # draws for which Python's integers are faster than sixteen calls of NumPy
_BLOCK: Final = 4096  # draws made at once: their steps on the way stay in a core's cache


class Pcg64:
    """A stream of draws; `seed` is any integer from 0."""

    def __init__(self, seed: int) -> None:
        initial, sequence = _hashed(seed)
        self._increment = (sequence << 1 | 1) & _MASK_128
        self._state = self._next(self._increment + initial)

    def random_raw(self, count: int) -> Words:
        """The next `count` draws."""
        draws = np.empty(count, dtype=np.uint64)
        if not count:
            return draws
        states = [self._next(self._state)]
        factor, offset = _A, self._increment  # of as many steps as there are states
        while len(states) < min(count, _FEW):
            states.append(self._next(states[-1]))
            factor, offset = factor * _A & _MASK_128, (offset * _A + self._increment) & _MASK_128
        high = np.array([state >> 64 for state in states], dtype=np.uint64)
        low = np.array([state & _MASK_64 for state in states], dtype=np.uint64)
        while len(low) < min(count, _BLOCK):
            more_high, more_low = _stepped(high, low, factor, offset)
            high, low = np.concatenate([high, more_high]), np.concatenate([low, more_low])
            factor, offset = factor * factor & _MASK_128, offset * (factor + 1) & _MASK_128
        for start in range(0, count, len(low)):
            if start:
                high, low = _stepped(high, low, factor, offset)
            piece = draws[start : start + len(low)]
            piece[:] = _turned(high, low)[: len(piece)]
        last = (count - 1) % len(low)
        self._state = int(high[last]) << 64 | int(low[last])
        return draws

    def _next(self, state: int) -> int:
        return (_A * state + self._increment) & _MASK_128


def _stepped(high: Words, low: Words, factor: int, offset: int) -> tuple[Words, Words]:
    """factor * s + offset mod 2^128 for every state s, from 32-bit halves: no product passes 64 bits."""
    mask, half = np.uint64(_MASK_32), np.uint64(32)
    factor_high, factor_low = np.uint64(factor >> 64), np.uint64(factor & _MASK_64)
    b1, b0 = factor_low >> half, factor_low & mask
    a1, a0 = low >> half, low & mask
    cross = a0 * b1
    middle = (a0 * b0 >> half) + (cross & mask) + a1 * b0  # at most 2^64 - 1
    carried = a1 * b1 + (cross >> half) + (middle >> half)
    new_low = low * factor_low + np.uint64(offset & _MASK_64)
    overflow = (new_low < np.uint64(offset & _MASK_64)).astype(np.uint64)
    new_high = high * factor_low + low * factor_high + carried + np.uint64(offset >> 64) + overflow
    return new_high, new_low


def _turned(high: Words, low: Words) -> Words:
    turn = high >> np.uint64(58)
    word = high ^ low
    back = (np.uint64(64) - turn) & np.uint64(63)
    return np.bitwise_or(word >> turn, word << back)


def _hashed(seed: int) -> tuple[int, int]:
    """(state, sequence) of 128 bits each, as NumPy's `SeedSequence(seed)` gives them to PCG64."""
    words = [seed >> shift & _MASK_32 for shift in range(0, seed.bit_length(), 32)]
    words += [0] * (_POOL - len(words))
    absorb = _Hash(0x43B0D7E5, 0x931E8875)
    pool = [absorb(word) for word in words[:_POOL]]
    for source in range(_POOL):
        for place in range(_POOL):
            if place != source:
                pool[place] = _mixed(pool[place], absorb(pool[source]))
    for word in words[_POOL:]:
        for place in range(_POOL):
            pool[place] = _mixed(pool[place], absorb(word))
    give = _Hash(0x8B51F9DD, 0x58F38DED)
    halves = [give(pool[place % _POOL]) for place in range(8)]
    given = [halves[place] | halves[place + 1] << 32 for place in range(0, 8, 2)]
    return given[0] << 64 | given[1], given[2] << 64 | given[3]


class _Hash:
    """Words of 32 bits, each hashed with the next constant of a sequence."""

    def __init__(self, constant: int, factor: int) -> None:
        self._constant = constant
        self._factor = factor

    def __call__(self, word: int) -> int:
        word ^= self._constant
        self._constant = self._constant * self._factor & _MASK_32
        word = word * self._constant & _MASK_32
        return word ^ word >> 16


def _mixed(one: int, other: int) -> int:
    word = (0xCA01F9DD * one - 0x4973F715 * other) & _MASK_32
    return word ^ word >> 16
