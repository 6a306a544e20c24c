"""F_p elementwise: sums, differences, products by 64-bit integers and by one field element.

A product of a (127 bits) by v (64 bits) is schoolbook multiplication over 32-bit halves, in passes over blocks that
stay in the L2 cache. With a = Σ a_i 2^(32 i), v = v0 + v1 2^32 (v1 signed if v is), column by column:

    t1 = a1 v0 + (a0 v0 >> 32)      s1 = a0 v1 + (t1 mod 2^32)
    t2 = a2 v0 + (t1 >> 32)         s2 = a1 v1 + (t2 mod 2^32) + (s1 >> 32)
    t3 = a3 v0 + (t2 >> 32)         s3 = a2 v1 + (t3 mod 2^32) + (s2 >> 32)
                                    top = a3 v1 + (t3 >> 32) + (s3 >> 32)          (bits 128 and up)

No term overflows: with h = 2^32 - 1 each t is at most h^2 + h < 2^64, each s at most h^2 + 2h = 2^64 - 1, or for a
signed v1 between -2^63 and h (2^31 - 1) + h + 2^31 - 1 = 2^63 - 1. The low and high words need no columns: they are
a_lo v and a_hi v + a1 v1 + (t1 >> 32) + (s1 >> 32) mod 2^64. No BLAS is involved, so threads and its rounding are no
concern.
"""

from __future__ import annotations

from typing import Final, TypeAlias

import numpy as np
import numpy.typing as npt

from sordino_common.ring.fp_core import (
    HALF,
    HALF_MASK,
    HIGH_MASK,
    I64,
    U64,
    Fp,
    check_fp,
    check_int64,
    check_same,
    check_scalar,
    fold,
    new,
)

BLOCK: Final = 16384  # elements a pass: long enough to hide the calls, 1 MiB of scratch memory
_ROWS: Final = 8
_ONE: Final = np.uint64(1)
_SIGN: Final = np.uint64(63)
_WORD: Final = (1 << 64) - 1

Factor: TypeAlias = npt.NDArray[np.uint64] | np.uint64  # an array, or one number for all


def add(a: Fp, b: Fp) -> Fp:
    """a + b mod p, shapes equal."""
    check_fp("add", a, b)
    check_same("add", a.shape[1:], b.shape[1:])
    result = new(a.shape[1:])
    low, high = result[0, ...], result[1, ...]
    np.add(a[1], b[1], out=high)
    np.add(a[0], b[0], out=low)
    np.add(high, np.less(low, b[0]), out=high)  # a, b < 2^127: no carry out of the high word
    fold(low, high, np.asarray(high >> _SIGN), signed=False)
    return result


def sub(a: Fp, b: Fp) -> Fp:
    """a - b mod p, shapes equal. Canonical without a check: a negative difference gets p added."""
    check_fp("sub", a, b)
    check_same("sub", a.shape[1:], b.shape[1:])
    result = new(a.shape[1:])
    low, high = result[0, ...], result[1, ...]
    borrow = np.less(a[0], b[0])
    np.subtract(a[0], b[0], out=low)
    np.subtract(a[1], b[1], out=high)
    np.subtract(high, borrow, out=high)
    negative = np.asarray(high >> _SIGN)  # 1 where a < b: then the value is this minus 2^128, and p = 2^127 - 1
    np.bitwise_and(high, HIGH_MASK, out=high)
    np.subtract(high, np.less(low, negative), out=high)
    np.subtract(low, negative, out=low)
    return result


def scale(alpha: int, v: I64) -> Fp:
    """alpha v mod p for one field element and an int64 array of any shape."""
    check_scalar("scale", alpha)
    check_int64("scale", v)
    return _multiply((np.uint64(alpha & _WORD), np.uint64(alpha >> 64)), v, signed=True)


def mul_int64(a: Fp, v: I64) -> Fp:
    """a v mod p elementwise, shapes equal; v: int64, signed."""
    check_fp("mul_int64", a)
    check_int64("mul_int64", v)
    check_same("mul_int64", a.shape[1:], v.shape)
    return _multiply((a[0], a[1]), v, signed=True)


def scale_fp(alpha: int, a: Fp) -> Fp:
    """alpha a mod p for one field element and an array of them: alpha a_lo + 2^64 (alpha a_hi)."""
    check_scalar("scale_fp", alpha)
    check_fp("scale_fp", a)
    both = _multiply((np.uint64(alpha & _WORD), np.uint64(alpha >> 64)), a, signed=False)  # [2, *a.shape]
    return add(both[:, 0], _times_word(both[:, 1]))


def mul_exact(a: I64, b: I64) -> Fp:
    """a b mod p elementwise, shapes equal: the integer product of two signed arrays, not wrapped at 2^64."""
    check_int64("mul_exact", a, b)
    check_same("mul_exact", a.shape, b.shape)
    return _narrow(a, b)


def _times_word(x: Fp) -> Fp:
    """2^64 x mod p in place: 2^128 = 2, so the words change places, bit 63 of the low one going around."""
    low = (x[1] << _ONE) | (x[0] >> _SIGN)
    x[1] = x[0] & HIGH_MASK
    x[0] = low
    return x


def _flat(x: npt.NDArray[np.uint64] | npt.NDArray[np.int64]) -> U64:
    return np.ascontiguousarray(x).reshape(-1).view(np.uint64)


def _flat_factor(x: Factor) -> Factor:
    return _flat(x) if isinstance(x, np.ndarray) else x


def _part(x: Factor, at: slice) -> Factor:
    return x[at] if isinstance(x, np.ndarray) else x


def _multiply(a: tuple[Factor, Factor], v: U64 | I64, *, signed: bool) -> Fp:
    """(a[0] + 2^64 a[1]) v mod p, block by block. a: words of canonical elements, arrays of v's shape or scalars."""
    factor, out = _flat(v), new(v.shape)
    low, high = out.reshape(2, -1) if out.size else out.reshape(2, 0)
    words = (_flat_factor(a[0]), _flat_factor(a[1]))
    size = min(BLOCK, factor.size)
    scratch, flags = np.empty((_ROWS, size), dtype=np.uint64), np.empty(size, dtype=np.bool_)
    for start in range(0, factor.size, BLOCK):
        at = slice(start, min(start + BLOCK, factor.size))
        n = at.stop - start
        _multiply_block(
            (_part(words[0], at), _part(words[1], at)), factor[at], signed, low[at], high[at], scratch[:, :n], flags[:n]
        )
    return out


def _multiply_block(
    a: tuple[Factor, Factor],
    v: U64,
    signed: bool,
    low: U64,
    high: U64,
    scratch: U64,
    flag: npt.NDArray[np.bool_],
) -> None:
    """See the module's text. 46 passes for a scalar a, 50 for an array."""
    v0, v1, t, s, product, half_lo, half_hi, part = scratch
    a_lo, a_hi = a
    np.bitwise_and(v, HALF_MASK, out=v0)
    _shift(v, v1, signed)
    a0, a1 = _halves(a_lo, half_lo, half_hi)
    np.multiply(a0, v0, out=product)
    np.right_shift(product, HALF, out=product)
    np.multiply(a1, v0, out=t)
    np.add(t, product, out=t)
    np.multiply(a0, v1, out=s)
    np.bitwise_and(t, HALF_MASK, out=part)
    np.add(s, part, out=s)
    np.right_shift(t, HALF, out=t)
    _shift(s, s, signed)
    np.multiply(a1, v1, out=product)
    np.add(s, product, out=s)
    np.multiply(a_lo, v, out=low)
    np.multiply(a_hi, v, out=high)
    np.add(high, t, out=high)
    np.add(high, s, out=high)
    a2, a3 = _halves(a_hi, half_lo, half_hi)
    np.multiply(a2, v0, out=product)
    np.add(t, product, out=t)
    np.bitwise_and(t, HALF_MASK, out=part)
    np.add(s, part, out=s)
    np.right_shift(t, HALF, out=t)
    _shift(s, s, signed)
    np.multiply(a3, v0, out=product)
    np.add(t, product, out=t)
    np.bitwise_and(t, HALF_MASK, out=part)
    np.add(s, part, out=s)
    np.multiply(a2, v1, out=product)
    np.add(s, product, out=s)
    np.right_shift(t, HALF, out=t)
    _shift(s, s, signed)
    np.multiply(a3, v1, out=product)
    np.add(t, product, out=t)
    np.add(t, s, out=t)  # bits 128 and up
    np.left_shift(t, _ONE, out=t)
    np.right_shift(high, _SIGN, out=s)
    np.bitwise_or(t, s, out=t)
    fold(low, high, t, signed=signed, flag=flag)


def _shift(x: U64, out: U64, signed: bool) -> None:
    """floor(x / 2^32), x read as signed or not."""
    if signed:
        np.right_shift(x.view(np.int64), np.int64(32), out=out.view(np.int64))
    else:
        np.right_shift(x, HALF, out=out)


def _halves(word: Factor, low: U64, high: U64) -> tuple[Factor, Factor]:
    if isinstance(word, np.ndarray):
        return np.bitwise_and(word, HALF_MASK, out=low), np.right_shift(word, HALF, out=high)
    return word & HALF_MASK, word >> HALF


def _narrow(x: I64, v: I64) -> Fp:
    """x v mod p for 64-bit factors (|x v| < 2^127): the first two columns alone, 25 passes."""
    left, right, out = _flat(x), _flat(v), new(v.shape)
    low, high = out.reshape(2, -1) if out.size else out.reshape(2, 0)
    size = min(BLOCK, right.size)
    scratch, flags = np.empty((6, size), dtype=np.uint64), np.empty(size, dtype=np.bool_)
    for start in range(0, right.size, BLOCK):
        at = slice(start, min(start + BLOCK, right.size))
        n = at.stop - start
        x0, x1, v0, v1, t, s = scratch[:, :n]
        hi = high[at]
        np.bitwise_and(left[at], HALF_MASK, out=x0)
        _shift(left[at], x1, True)
        np.bitwise_and(right[at], HALF_MASK, out=v0)
        _shift(right[at], v1, True)
        np.multiply(x0, v0, out=t)
        np.right_shift(t, HALF, out=t)
        np.multiply(x1, v0, out=v0)
        np.add(t, v0, out=t)  # |x1 v0| <= 2^63 - 2^31 leaves room
        np.multiply(x0, v1, out=s)
        np.bitwise_and(t, HALF_MASK, out=x0)
        np.add(s, x0, out=s)
        np.multiply(x1, v1, out=hi)
        _shift(t, t, True)
        _shift(s, s, True)
        np.add(hi, t, out=hi)
        np.add(hi, s, out=hi)
        np.multiply(left[at], right[at], out=low[at])
        np.right_shift(hi.view(np.int64), np.int64(63), out=t.view(np.int64))  # bits 127 and up: 0 or -1
        fold(low[at], hi, t, signed=True, flag=flags[:n])
    return out
