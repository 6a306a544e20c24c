"""Matrix products over F_p, and over the integers: 21-bit limbs and float64 GEMM (`limbs`), carried into F_p.

Products of inner dimension 1 are elementwise ones, those with one column are matrix times vector: both cost less.
"""

from __future__ import annotations

import numpy as np

from sordino_common.ring.fp_core import I64, Fp, check_fp, check_int64, fold_rows, from_int64
from sordino_common.ring.fp_elementwise import mul_exact, mul_int64
from sordino_common.ring.fp_linear import MAX_INNER, mat_vec, mat_vec_fp
from sordino_common.ring.limbs import (
    EXACT_BITS,
    F64,
    INNER_BLOCK,
    Workspace,
    diagonal_product,
    split_exact,
    split_field,
)
from sordino_common.ring.matmul import matmul, matrix_shape, product_shape

_INT64_LIMBS = 3
_FIELD_LIMBS = 6


def matmul_int64(a: I64, b: Fp, *, workspace: Workspace | None = None) -> Fp:
    """a b mod p. a: int64 [..., M, K] signed, b: [2, ..., K, N]. Returns [2, ..., M, N]."""
    check_int64("matmul_int64", a)
    check_fp("matmul_int64", b)
    shape = matrix_shape("fp.matmul_int64", a.shape, b.shape[1:])
    if a.shape[-1] == 1:
        return mul_int64(_spread(b, shape), np.broadcast_to(a, shape))
    if b.ndim == 3 and b.shape[2] == 1 and b.shape[1] <= MAX_INNER:
        return mat_vec(a, b[..., 0])[..., np.newaxis]
    return _from_diagonals(_diagonals(a, b, shape, workspace))


def matmul_fp(a: Fp, b: I64, *, workspace: Workspace | None = None) -> Fp:
    """a b mod p. a: [2, ..., M, K], b: int64 [..., K, N] signed. Returns [2, ..., M, N]."""
    check_fp("matmul_fp", a)
    check_int64("matmul_fp", b)
    shape = matrix_shape("fp.matmul_fp", a.shape[1:], b.shape)
    if b.shape[-2] == 1:
        return mul_int64(_spread(a, shape), np.broadcast_to(b, shape))
    if b.ndim == 2 and b.shape[1] == 1 and len(b) <= MAX_INNER:
        return mat_vec_fp(a, from_int64(b[:, 0]))[..., np.newaxis]
    return _from_diagonals(_diagonals(a, b, shape, workspace))


def matmul_exact(a: I64, b: I64, *, workspace: Workspace | None = None) -> tuple[I64, Fp]:
    """The integer product of signed matrices twice: mod 2^64 (int64 [..., M, N]) and mod p ([2, ..., M, N]), for little
    more than the price of one. a: int64 [..., M, K], b: int64 [..., K, N]."""
    shape = product_shape("fp.matmul_exact", a, b)
    if a.shape[-1] == 1:
        return np.multiply(a, b), mul_exact(np.broadcast_to(a, shape), np.broadcast_to(b, shape))
    if b.ndim == 2 and b.shape[1] == 1 and len(b) <= MAX_INNER:
        return matmul(a, b, workspace=workspace), mat_vec(a, from_int64(b[:, 0]))[..., np.newaxis]
    rows = _diagonals(a, b, shape, workspace)
    ring = rows[3] << np.int64(EXACT_BITS)  # Horner's rule mod 2^64; row 4 stands at 2^84
    for d in (2, 1, 0):
        ring += rows[d]
        if d:
            ring <<= np.int64(EXACT_BITS)
    return ring, _from_diagonals(rows)


def _diagonals(a: Fp | I64, b: Fp | I64, shape: tuple[int, ...], workspace: Workspace | None) -> I64:
    """Sums of limb products by diagonal, int64 [5 or 8, *shape]; an operand is an element of F_p if it is uint64."""
    space = workspace or Workspace()
    limbs_a, limbs_b = _limb_count(a), _limb_count(b)
    count, inner = limbs_a + limbs_b - 1, a.shape[-1]
    rows = space.integers("diagonals", (count, *shape))
    if not inner or not rows.size:
        rows[...] = 0
        return rows
    product = space.floats("product", shape)
    for start in range(0, inner, INNER_BLOCK):
        x, y = a[..., start : start + INNER_BLOCK], b[..., start : start + INNER_BLOCK, :]
        x_shape, y_shape = _logical(x), _logical(y)
        left = space.floats("left", (*x_shape[:-1], limbs_a, x_shape[-1]))
        right = space.floats("right", (*y_shape[:-2], limbs_b, *y_shape[-2:]))
        _split(x, tuple(left[..., i, :] for i in range(limbs_a)), space.integers("scratch", x_shape))
        _split(y, tuple(right[..., limbs_b - 1 - j, :, :] for j in range(limbs_b)), space.integers("scratch", y_shape))
        diagonal_product(left, right, count, product, rows, first=start == 0)
    return rows


def _spread(x: Fp, shape: tuple[int, ...]) -> Fp:
    """x seen at logical shape `shape`, by the rules of broadcasting."""
    return np.broadcast_to(x.reshape(2, *(1,) * (len(shape) - x.ndim + 1), *x.shape[1:]), (2, *shape))


def _limb_count(x: Fp | I64) -> int:
    return _FIELD_LIMBS if x.dtype == np.uint64 else _INT64_LIMBS


def _logical(x: Fp | I64) -> tuple[int, ...]:
    return x.shape[1:] if x.dtype == np.uint64 else x.shape


def _split(x: Fp | I64, limbs: tuple[F64, ...], scratch: I64) -> None:
    if x.dtype == np.uint64:
        split_field(x[0], x[1], limbs, scratch)
    else:
        split_exact(x.view(np.int64), (limbs[0], limbs[1], limbs[2]), scratch)


def _from_diagonals(rows: I64) -> Fp:
    """Σ_d rows[d] 2^(21 d) mod p; `rows` are destroyed. Row 7 stands at 2^147 = 2^20: its halves go to row 1, the odd
    bit to row 0."""
    if len(rows) == _INT64_LIMBS + _FIELD_LIMBS - 1:
        rows[0] += (rows[7] & np.int64(1)) << np.int64(20)
        rows[1] += rows[7] >> np.int64(1)
        rows = rows[:7]
    return fold_rows(rows, EXACT_BITS, np.empty((2, *rows.shape[1:]), dtype=np.uint64))
