"""Matrix products in Z_2^64, bit-exact: C = A B mod 2^64 on signed 64-bit arrays.

Two back ends, chosen by size:

`direct`  NumPy's integer loop. No set-up cost, no SIMD multiply for 64-bit integers: about 1 ns per product.
`limbs`   three balanced 22-bit limbs per operand, float64 GEMM. With a = a0 + a1 2^22 + a2 2^44 (|a0|, |a1| <= 2^21,
          |a2| <= 2^19 mod 2^20) only the diagonals i + j <= 2 survive mod 2^64:

              A B = A0 B0 + 2^22 (A0 B1 + A1 B0) + 2^44 (A0 B2 + A1 B1 + A2 B0)   mod 2^64

          The products of one diagonal are one GEMM, the limbs laid side by side along the inner dimension: 3 calls for
          6 products. Exactness: a diagonal sums at most 3 K terms of size <= 2^42, and float64 adds integers exactly
          up to 2^53, so K <= 2^53 / (3 * 2^42) = 682; we block at 512.

The crossover is measured: a float64 GEMM costs what the BLAS and the SIMD width say, the integer loop costs the same
everywhere (`benchmarks/bench_ring.py` prints both).
"""

from __future__ import annotations

from typing import Final, Literal

import numpy as np
import numpy.typing as npt

from sordino_common.errors import LocalError

I64 = npt.NDArray[np.int64]
F64 = npt.NDArray[np.float64]
Backend = Literal["direct", "limbs"]

LIMB_BITS: Final = 22
INNER_BLOCK: Final = 512  # largest power of two under 2^53 / (3 * 2^42) = 682

# The limbs pay off when the products (M K N) outweigh splitting and joining (M K + K N + M N elements). Measured on
# x86-64 with AVX-512 and OpenBLAS, one thread; see `bench_ring.py`.
_MIN_PRODUCTS: Final = 200_000
_MIN_PRODUCTS_PER_ELEMENT: Final = 16.0


def choose_backend(rows: int, inner: int, columns: int) -> Backend:
    """The faster back end for an [rows, inner] by [inner, columns] product on this kind of machine."""
    products = rows * inner * columns
    elements = rows * inner + inner * columns + 2 * rows * columns
    big = products >= _MIN_PRODUCTS and products >= _MIN_PRODUCTS_PER_ELEMENT * elements
    return "limbs" if big else "direct"


def matmul(a: I64, b: I64, *, backend: Backend | None = None) -> I64:
    """a @ b mod 2^64. a: [..., M, K], b: [..., K, N], int64, batch dimensions broadcast. Returns int64 [..., M, N].

    Raises `LocalError` for other dtypes or shapes that don't fit."""
    if a.dtype != np.int64 or b.dtype != np.int64:
        raise LocalError(f"matmul: expected int64 operands, got {a.dtype} and {b.dtype}")
    if a.ndim < 2 or b.ndim < 2 or a.shape[-1] != b.shape[-2]:
        raise LocalError(f"matmul: shapes {a.shape} and {b.shape} do not fit")
    rows, inner, columns = a.shape[-2], a.shape[-1], b.shape[-1]
    chosen = backend or choose_backend(rows, inner, columns)
    if chosen == "direct":
        product: I64 = np.matmul(a, b)
        return product
    out: I64 | None = None
    for start in range(0, max(inner, 1), INNER_BLOCK):
        part = _limb_product(a[..., start : start + INNER_BLOCK], b[..., start : start + INNER_BLOCK, :])
        out = part if out is None else np.add(out, part, out=out)
    assert out is not None
    return out


def split_balanced(x: I64) -> tuple[F64, F64, F64]:
    """x = x0 + x1 2^22 + x2 2^44 mod 2^64 with |x0|, |x1| <= 2^21 and |x2| <= 2^19, as float64 arrays."""
    half, mask = np.int64(1 << (LIMB_BITS - 1)), np.int64((1 << LIMB_BITS) - 1)
    limbs: list[F64] = []
    rest = x
    for _ in range(2):
        low = ((rest + half) & mask) - half
        limbs.append(low.astype(np.float64))
        # rest - low may wrap past 2^63; the shift then is off by 2^42 = 2^64 / 2^22, which is 0 in the ring.
        rest = (rest - low) >> np.int64(LIMB_BITS)
    top = ((rest + np.int64(1 << 19)) & np.int64((1 << 20) - 1)) - np.int64(1 << 19)  # only 64 - 44 bits count
    limbs.append(top.astype(np.float64))
    return limbs[0], limbs[1], limbs[2]


def _limb_product(a: I64, b: I64) -> I64:
    a0, a1, a2 = split_balanced(a)
    b0, b1, b2 = split_balanced(b)
    a_all = np.concatenate((a0, a1, a2), axis=-1)
    inner = a.shape[-1]
    total: I64 = np.matmul(a0, b0).astype(np.int64)
    middle = np.matmul(a_all[..., : 2 * inner], np.concatenate((b1, b0), axis=-2))
    total += middle.astype(np.int64) << np.int64(LIMB_BITS)
    high = np.matmul(a_all, np.concatenate((b2, b1, b0), axis=-2))
    total += high.astype(np.int64) << np.int64(2 * LIMB_BITS)
    return total
