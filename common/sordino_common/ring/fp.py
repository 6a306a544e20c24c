"""F_p vectors for p = 2^127 - 1: where MACs live (DESIGN.md, section 7). p > 2^65, so no error |e| < 2^64 is 0 mod p.

An array of shape S is uint64 of shape (2, *S), canonical; see `fp_core`. Every function is exact. Here: expansion of
seeds. `fp_elementwise`: sums and products entry by entry. `fp_dots`: inner products of a few vectors, in many pairs.
`fp_mat_vecs`: many matrices times 63-bit vectors.
"""

from __future__ import annotations

import numpy as np

from sordino_common.ring.fp_core import FP_BYTES, HIGH_MASK, Fp, P, canonical, new
from sordino_common.ring.fp_dots import dots
from sordino_common.ring.fp_elementwise import add, mul_exact, mul_int64, scale, scale_fp, sub
from sordino_common.ring.fp_mat_vecs import mat_vecs, vectors
from sordino_common.ring.prg import Seed, expand_bytes

__all__ = [
    "FP_BYTES",
    "Fp",
    "P",
    "add",
    "dots",
    "expand_fp",
    "mat_vecs",
    "mul_exact",
    "mul_int64",
    "scale",
    "scale_fp",
    "sub",
    "vectors",
]


def expand_fp(seed: Seed, info: bytes, shape: tuple[int, ...]) -> Fp:
    """Elements of F_p from the stream of (seed, info), uniform to within 2^-126: the stream fills all low words, then
    all high words; the top bit is cleared, and p is read as 0."""
    result = new(shape)
    if result.size:
        expand_bytes(seed, info, result.reshape(-1).view(np.uint8).data)
        np.bitwise_and(result[1, ...], HIGH_MASK, out=result[1, ...])
        canonical(result[0, ...], result[1, ...])
    return result
