"""Exact products of matrices mod 2^64 by float64 GEMM: limbs side by side, one GEMM per diagonal. Scratch memory.

A signed 64-bit x is split into balanced limbs of w = 22 bits: x = x_0 + x_1 2^22 + x_2 2^44 mod 2^64, where x_0 and x_1
are from -2^21 to 2^21 and |x_2| <= 2^19. With A = Σ A_i 2^(w i) and B = Σ B_j 2^(w j), the products that meet at
2^(w d) are one GEMM: A_i in ascending i lie side by side along the inner dimension ([M, L, K]), B_j in descending j
below one another ([L, K, N]), so that every diagonal is a slice of both, without a copy. Diagonals 0..2 (6 products)
are all that survives mod 2^64.

float64 adds integers exactly up to 2^53, and a diagonal sums 3 K terms of 2^42: K <= 682. The inner dimension is cut
into blocks of 512 accordingly, and blocks are added up as int64.
"""

from __future__ import annotations

import math
from typing import Final, TypeAlias

import numpy as np
import numpy.typing as npt

I64: TypeAlias = npt.NDArray[np.int64]
F64: TypeAlias = npt.NDArray[np.float64]

INNER_BLOCK: Final = 512
WRAPPING_BITS: Final = 22
_VIEWS: Final = 256


class Workspace:
    """Scratch memory that is used again: one array per slot, as large as the largest request so far. Not for two
    threads at once; what it gave for a slot is void when the slot is taken again."""

    __slots__ = ("_floats", "_integers", "_slots")

    def __init__(self) -> None:
        self._slots: dict[str, npt.NDArray[np.uint8]] = {}
        # Views that were given before: a program asks for the same few again and again.
        self._floats: dict[tuple[str, tuple[int, ...]], F64] = {}
        self._integers: dict[tuple[str, tuple[int, ...]], I64] = {}

    def floats(self, slot: str, shape: tuple[int, ...]) -> F64:
        found = self._floats.get((slot, shape))
        if found is None:
            memory = self._bytes(slot, shape)
            found = self._floats[slot, shape] = memory.view(np.float64).reshape(shape)
        return found

    def integers(self, slot: str, shape: tuple[int, ...]) -> I64:
        found = self._integers.get((slot, shape))
        if found is None:
            memory = self._bytes(slot, shape)
            found = self._integers[slot, shape] = memory.view(np.int64).reshape(shape)
        return found

    def _bytes(self, slot: str, shape: tuple[int, ...]) -> npt.NDArray[np.uint8]:
        needed = 8 * math.prod(shape)
        held = self._slots.get(slot)
        grows = held is None or held.size < needed
        if grows or len(self._floats) + len(self._integers) >= _VIEWS:  # they hold memory that is no slot's any more
            self._floats.clear()
            self._integers.clear()
        if held is None or grows:
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


def diagonal_product(left: F64, right: F64, product: F64, out: I64, *, first: bool) -> None:
    """out[d] (+)= Σ_i A_i B_(d - i) for d < L; sets if `first`, adds if not.

    left: [..., M, L, K] with A_i at [..., i, :]; right: [..., L, K, N] with B_j at [..., L - 1 - j, :, :]; both
    C-contiguous. product: scratch [..., M, N]; out: int64 [L, ..., M, N]."""
    limbs, inner = left.shape[-2:]
    columns = right.shape[-1]
    for d in range(limbs):
        a = left[..., : d + 1, :].reshape(*left.shape[:-2], (d + 1) * inner)
        b = right[..., limbs - 1 - d :, :, :].reshape(*right.shape[:-3], (d + 1) * inner, columns)
        np.matmul(a, b, out=product)
        if first:
            np.copyto(out[d], product, casting="unsafe")
        else:
            out[d] += product.astype(np.int64)
