"""Exact products of big-integer matrices by float64 GEMM: limbs side by side, one GEMM per diagonal.

With A = Σ A_i 2^(w i) and B = Σ B_j 2^(w j), the products that meet at 2^(w d) are one GEMM: A_i for i = lo..hi lie
side by side along the inner dimension ([M, L, K]), B_j in descending j below one another ([L', K, N]), so that every
diagonal is a slice of both, without a copy. float64 adds integers exactly up to 2^53; the inner dimension is cut into
blocks accordingly, and blocks are added up as int64.

Two splits of a signed 64-bit x:

`split_wrapping`  w = 22, balanced, for products mod 2^64: x = x0 + x1 2^22 + x2 2^44 mod 2^64, |x0|, |x1| <= 2^21,
                  |x2| <= 2^19. Diagonals 0..2 (6 products) are all that survives. A diagonal sums 3 K terms of 2^42:
                  K <= 682.
`split_exact`     w = 21, for products over the integers: x = x0 + x1 2^21 + x2 2^42, 0 <= x0, x1 < 2^21,
                  -2^21 <= x2 < 2^21; nothing to balance, half the passes. 9 products on 5 diagonals; K <= 682.
                  An element of F_p is six such limbs, the last one of 22 bits: 18 products on 8 diagonals, where one
                  term of 2^43 and two of 2^42 meet: K <= 512.
"""

from __future__ import annotations

from typing import Final, TypeAlias

import numpy as np
import numpy.typing as npt

I64: TypeAlias = npt.NDArray[np.int64]
U64: TypeAlias = npt.NDArray[np.uint64]
F64: TypeAlias = npt.NDArray[np.float64]

INNER_BLOCK: Final = 512
WRAPPING_BITS: Final = 22
EXACT_BITS: Final = 21


class Workspace:
    """Scratch memory that is used again: one array per slot, as large as the largest request so far. Not for two
    threads at once; what it gave for a slot is void when the slot is taken again."""

    __slots__ = ("_slots",)

    def __init__(self) -> None:
        self._slots: dict[str, npt.NDArray[np.uint8]] = {}

    def floats(self, slot: str, shape: tuple[int, ...]) -> F64:
        return self._bytes(slot, shape).view(np.float64).reshape(shape)

    def integers(self, slot: str, shape: tuple[int, ...]) -> I64:
        return self._bytes(slot, shape).view(np.int64).reshape(shape)

    def _bytes(self, slot: str, shape: tuple[int, ...]) -> npt.NDArray[np.uint8]:
        needed = 8
        for size in shape:
            needed *= size
        held = self._slots.get(slot)
        if held is None or held.size < needed:
            held = self._slots[slot] = np.empty(needed, dtype=np.uint8)
        return held[:needed]

    @property
    def held_bytes(self) -> int:
        return sum(slot.size for slot in self._slots.values())


def split_wrapping(x: I64, limbs: tuple[F64, F64, F64], scratch: I64, rest: I64) -> None:
    """See the module's text. `limbs` are written; `scratch` and `rest` have the shape of x."""
    half, bits, up = np.int64(1 << 21), np.int64(22), np.int64(42)
    np.copyto(limbs[0], _signed_low(x, up, scratch))
    np.add(x, half, out=rest)  # may wrap past 2^63: then `rest` is off by 2^42 = 2^64 / 2^22, which is 0 in the ring
    np.right_shift(rest, bits, out=rest)
    np.copyto(limbs[1], _signed_low(rest, up, scratch))
    np.add(rest, half, out=rest)
    np.right_shift(rest, bits, out=rest)
    np.copyto(limbs[2], rest)


def _signed_low(x: I64, up: np.int64, out: I64) -> I64:
    np.left_shift(x, up, out=out)
    return np.right_shift(out, up, out=out)


def split_exact(x: I64, limbs: tuple[F64, F64, F64], scratch: I64) -> None:
    mask = np.int64((1 << 21) - 1)
    np.copyto(limbs[0], np.bitwise_and(x, mask, out=scratch))
    np.right_shift(x, np.int64(21), out=scratch)
    np.copyto(limbs[1], np.bitwise_and(scratch, mask, out=scratch))
    np.copyto(limbs[2], np.right_shift(x, np.int64(42), out=scratch))


def split_field(low: U64, high: U64, limbs: tuple[F64, ...], scratch: I64) -> None:
    """Six limbs of high 2^64 + low < 2^127."""
    mask, words = np.uint64((1 << 21) - 1), scratch.view(np.uint64)

    def put(limb: F64) -> None:
        np.copyto(limb, scratch)  # as int64, which casts faster than uint64

    np.bitwise_and(low, mask, out=words)
    put(limbs[0])
    np.right_shift(low, np.uint64(21), out=words)
    np.bitwise_and(words, mask, out=words)
    put(limbs[1])
    np.right_shift(low, np.uint64(42), out=words)
    np.bitwise_and(words, mask, out=words)
    put(limbs[2])
    np.left_shift(high, np.uint64(1), out=words)  # bit 63 of the value
    np.bitwise_or(words, low >> np.uint64(63), out=words)
    np.bitwise_and(words, mask, out=words)
    put(limbs[3])
    np.right_shift(high, np.uint64(20), out=words)  # bit 84
    np.bitwise_and(words, mask, out=words)
    put(limbs[4])
    np.right_shift(high, np.uint64(41), out=words)  # bit 105
    put(limbs[5])


def diagonal_product(left: F64, right: F64, diagonals: int, product: F64, out: I64, *, first: bool) -> None:
    """out[d] (+)= Σ_i A_i B_(d - i) for d < diagonals; sets if `first`, adds if not.

    left: [..., M, L, K] with A_i at [..., i, :]; right: [..., L', K, N] with B_j at [..., L' - 1 - j, :, :]; both
    C-contiguous. product: scratch [..., M, N]; out: int64 [diagonals, ..., M, N]."""
    limbs_a, inner = left.shape[-2:]
    limbs_b, columns = right.shape[-3], right.shape[-1]
    for d in range(diagonals):
        lo, hi = max(0, d - limbs_b + 1), min(limbs_a - 1, d)
        at = limbs_b - 1 - d + lo
        width = (hi - lo + 1) * inner
        a = left[..., lo : hi + 1, :].reshape(*left.shape[:-2], width)
        b = right[..., at : at + hi - lo + 1, :, :].reshape(*right.shape[:-3], width, columns)
        np.matmul(a, b, out=product)
        if first:
            np.copyto(out[d], product, casting="unsafe")
        else:
            out[d] += product.astype(np.int64)
