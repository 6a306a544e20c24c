"""F_p, p = 2^127 - 1, on NumPy: representation, and the reduction that every operation ends with.

An array of field elements of shape S is uint64 of shape (2, *S): [0] the low words, [1] the high words, canonical
(value < p). Planes instead of pairs: each pass of a ufunc runs over contiguous memory, and a view of the logical shape
is a view of axes 1... The machine is little-endian (x86-64, aarch64), so a word's halves, 16-bit limbs and bytes are
views of it.

Reduction is cheap because 2^127 = 1 mod p: bits 127 and up are added at bit 0. One fold brings what our kernels
produce to less than 2^127 but for values next to 0, next to 2^127 and p itself. All of those have a high word that is
2^63 - 1 or more, so one maximum tells whether any element needs the slow mending (`canonical`). The mending's time
depends on data; for uniform elements (all that is secret: masks, MAC shares) its chance is about 2^-63 an element.
"""

from __future__ import annotations

from typing import Final, TypeAlias

import numpy as np
import numpy.typing as npt

from sordino_common.errors import LocalError

Fp: TypeAlias = npt.NDArray[np.uint64]
U64: TypeAlias = npt.NDArray[np.uint64]
I64: TypeAlias = npt.NDArray[np.int64]
F64: TypeAlias = npt.NDArray[np.float64]

P: Final = (1 << 127) - 1
FP_BYTES: Final = 16

HIGH_MASK: Final = np.uint64((1 << 63) - 1)
HALF_MASK: Final = np.uint64((1 << 32) - 1)
HALF: Final = np.uint64(32)
_SIGN: Final = np.uint64(63)
_NEGATIVE: Final = np.uint64(3 << 62)


def check_fp(what: str, *operands: npt.NDArray[np.generic]) -> None:
    """Raises `LocalError` unless every operand is uint64 of shape (2, ...)."""
    for a in operands:
        if a.dtype != np.uint64 or a.ndim < 1 or a.shape[0] != 2:
            raise LocalError(f"fp.{what}: expected uint64 of shape (2, ...), got {a.dtype}{list(a.shape)}")


def check_int64(what: str, *operands: npt.NDArray[np.generic]) -> None:
    for v in operands:
        if v.dtype != np.int64:
            raise LocalError(f"fp.{what}: expected int64, got {v.dtype}{list(v.shape)}")


def check_same(what: str, a: tuple[int, ...], b: tuple[int, ...]) -> None:
    if a != b:
        raise LocalError(f"fp.{what}: shapes {a} and {b} differ")


def check_scalar(what: str, alpha: int) -> None:
    if not 0 <= alpha < P:
        raise LocalError(f"fp.{what}: the scalar is not in 0..p-1")


def new(shape: tuple[int, ...]) -> Fp:
    """Room for elements of logical shape `shape`."""
    return np.empty((2, *shape), dtype=np.uint64)


def canonical(low: U64, high: U64) -> None:
    """In place: any value in [-2^63, 2^127 + 2^65), written as high 2^64 + low mod 2^128, to its residue below p."""
    if not high.size or high.max() < HIGH_MASK:
        return
    at = high >= HIGH_MASK
    lo, hi = low[at], high[at]
    over = hi >> _SIGN
    over[hi >= _NEGATIVE] = np.uint64((1 << 64) - 1)  # -1: a negative value, 2^128 + v; v = -2^127 + its low 127 bits
    borrow = hi >= _NEGATIVE
    hi &= HIGH_MASK
    lo += over
    hi += lo < over
    hi -= borrow
    is_p = (lo == np.uint64((1 << 64) - 1)) & (hi == HIGH_MASK)
    lo[is_p] = 0
    hi[is_p] = 0
    low[at], high[at] = lo, hi


def fold(low: U64, high: U64, over: U64, *, signed: bool, flag: npt.NDArray[np.bool_] | None = None) -> None:
    """In place: low + 2^64 (high mod 2^63) + over mod p, canonical. `over`: bits 127 and up, an int64 in disguise if
    `signed`; it is destroyed. `flag`: room for as many booleans."""
    np.bitwise_and(high, HIGH_MASK, out=high)
    np.add(low, over, out=low)
    carry = np.less(low, over, out=flag)
    np.add(high, carry, out=high)
    if signed:  # the carry above counted a negative `over` as 2^64 more than it is
        np.subtract(high, np.right_shift(over, _SIGN, out=over), out=high)
    canonical(low, high)


def fold_rows(rows: I64, bits: int, out: Fp) -> Fp:
    """Σ_j rows[j] 2^(bits j) mod p into `out`. rows: int64 [J, *S], |rows| < 2^62, bits (J - 1) < 127; destroyed.

    Where sums of limb products end: carries run up through the rows, and what passes 2^127 comes back at the bottom.
    With the prefix sums c_j = floor(c_(j-1) / 2^bits) + rows[j], bits 64 and up of the value are
    floor(c_(h-1) / 2^(64 - bits (h-1))) + Σ_(j >= h) rows[j] 2^(bits j - 64), h the first row with bits h >= 64."""
    low, high = out[0, ...], out[1, ...]
    words, first_high = rows.view(np.uint64), -(-64 // bits)
    np.copyto(low, words[0])
    carry = rows[0, ...]
    for j in range(1, first_high):
        low += words[j] << np.uint64(bits * j)
    for j in range(1, len(rows)):
        if j == first_high:
            np.right_shift(carry, np.int64(64 - bits * (j - 1)), out=high.view(np.int64))
        if j >= first_high:
            high += words[j] << np.uint64(bits * j - 64)
        carry >>= np.int64(bits)
        above = rows[j, ...]
        above += carry
        carry = above
    carry >>= np.int64(127 - bits * (len(rows) - 1))
    fold(low, high, carry.view(np.uint64), signed=True)
    return out
