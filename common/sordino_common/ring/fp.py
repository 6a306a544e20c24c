"""F_p vectors for p = 2^127 - 1: where MACs live (DESIGN.md, section 7). p > 2^65, so no error |e| < 2^64 is 0 mod p.

An array of shape S is uint64 of shape (2, *S), canonical; see `fp_core`. Every function is exact. Here: conversions,
expansion of seeds, sums. `fp_elementwise`: sums and products entry by entry. `fp_linear`: inner products, matrix
times vector. `fp_planes`: many matrices times 63-bit vectors. `fp_matmul`: products of matrices.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from sordino_common.errors import LocalError
from sordino_common.ring.fp_core import (
    FP_BYTES,
    HALF,
    HALF_MASK,
    HIGH_MASK,
    U64,
    Fp,
    P,
    canonical,
    check_fp,
    fold_rows,
    from_int64,
    take_out,
)
from sordino_common.ring.fp_elementwise import (
    add,
    mul,
    mul_exact,
    mul_int64,
    mul_uint64,
    neg,
    scale,
    scale_fp,
    sub,
    weighted,
)
from sordino_common.ring.fp_linear import (
    dots,
    mat_vec,
    mat_vec_fp,
)
from sordino_common.ring.fp_matmul import matmul_exact, matmul_fp, matmul_int64
from sordino_common.ring.fp_planes import mat_vecs, vectors
from sordino_common.ring.prg import Seed, expand_bytes

__all__ = [
    "FP_BYTES",
    "Fp",
    "P",
    "add",
    "dots",
    "expand_fp",
    "from_int64",
    "from_ints",
    "from_uint64",
    "mat_vec",
    "mat_vec_fp",
    "mat_vecs",
    "matmul_exact",
    "matmul_fp",
    "matmul_int64",
    "mul",
    "mul_exact",
    "mul_int64",
    "mul_uint64",
    "neg",
    "scale",
    "scale_fp",
    "sub",
    "sum_",
    "to_ints",
    "vectors",
    "weighted",
    "zeros",
]

_WORD = (1 << 64) - 1


def zeros(shape: tuple[int, ...]) -> Fp:
    return np.zeros((2, *shape), dtype=np.uint64)


def from_uint64(u: U64, out: Fp | None = None) -> Fp:
    """u mod p for public 64-bit coefficients."""
    if u.dtype != np.uint64:
        raise LocalError(f"fp.from_uint64: expected uint64, got {u.dtype}{list(u.shape)}")
    result = take_out("from_uint64", u.shape, out)
    result[0], result[1] = u, 0
    return result


def from_ints(values: Sequence[int], shape: tuple[int, ...]) -> Fp:
    """Any Python integers, reduced mod p, in row order. For tests and single elements: about 1 us each."""
    if len(values) != math.prod(shape):
        raise LocalError(f"fp.from_ints: {len(values)} values do not fill shape {shape}")
    residues = [value % P for value in values]
    words = [[r & _WORD for r in residues], [r >> 64 for r in residues]]
    return np.array(words, dtype=np.uint64).reshape(2, *shape)


def to_ints(a: Fp) -> list[int]:
    """The residues 0..p-1 in row order."""
    check_fp("to_ints", a)
    return [hi << 64 | lo for lo, hi in zip(a[0].ravel().tolist(), a[1].ravel().tolist(), strict=True)]


def sum_(a: Fp, axes: tuple[int, ...], *, keepdims: bool = False) -> Fp:
    """Sum mod p over logical `axes` (negative ones count from the end). Exact below 2^30 addends a sum."""
    check_fp("sum_", a)
    rank = a.ndim - 1
    if any(not -rank <= axis < rank for axis in axes):
        raise LocalError(f"fp.sum_: axes {axes} do not fit {rank} dimensions")
    over = tuple(sorted({axis % rank for axis in axes}))
    axes_of_words = tuple(axis + 1 for axis in over)
    low = np.asarray(np.sum(a & HALF_MASK, axis=axes_of_words, keepdims=keepdims))
    high = np.asarray(np.sum(a >> HALF, axis=axes_of_words, keepdims=keepdims))
    rows = np.empty((4, *low.shape[1:]), dtype=np.uint64)
    rows[::2], rows[1::2] = low, high
    return fold_rows(rows.view(np.int64), 32, np.empty((2, *rows.shape[1:]), dtype=np.uint64))


def expand_fp(seed: Seed, info: bytes, shape: tuple[int, ...], out: Fp | None = None) -> Fp:
    """Elements of F_p from the stream of (seed, info), uniform to within 2^-126: the stream fills all low words, then
    all high words; the top bit is cleared, and p is read as 0."""
    result = take_out("expand_fp", shape, out)
    if result.size:
        expand_bytes(seed, info, result.reshape(-1).view(np.uint8).data)
        np.bitwise_and(result[1, ...], HIGH_MASK, out=result[1, ...])
        canonical(result[0, ...], result[1, ...])
    return result
