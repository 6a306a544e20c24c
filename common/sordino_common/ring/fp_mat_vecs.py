"""F_p: products of many matrices by vectors of 63 bits, as a MAC check has them, by float64 GEMM.

An entry of a matrix is two limbs of 32 bits, the upper one signed, an entry of a vector eight of 8 bits: as many
products as with limbs of 16 bits, but half as many for the matrix, which is larger. Both are plain views, without any
splitting. With A = A_0 + A_1 2^32 and v = Σ_j v_j 2^(8 j),

    A v = Σ_(i, j) 2^(32 i + 8 j) A_i v_j

is one GEMM of [M, N] by [N, 8] for each A_i. All jobs' matrices are cast together, in parts, and all products are
folded together.

Why it is exact: |A_i v_j| < 2^40, and float64 adds integers exactly up to 2^53, in whatever order: N <= 2^13. Sums
become int64, those of two neighbours j are put together, and two of these at most meet at every 2^(16 d): below
2 * (2^40 + 2^48) N, which `fold_rows` wants below 2^62: N <= 2^12 = `INNER`. Of wider matrices so many columns are
multiplied at a time, and the products added mod p.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Final

import numpy as np

from sordino_common.errors import LocalError
from sordino_common.ring.fp_core import F64, I64, Fp, check_int64, fold_rows, new
from sordino_common.ring.fp_elementwise import add
from sordino_common.ring.limbs import Workspace

INNER: Final = 1 << 12
MATRIX_BLOCK: Final = 1 << 15  # elements of matrices that are cast at a time: limbs of 512 KiB
_LIMBS: Final = 2  # of an entry of a matrix
_BYTES: Final = 8  # of an entry of a vector
_ROWS: Final = 6  # of 16 bits

_Piece = tuple[I64, F64, slice]  # a part of a job that is cast at once, and the places of its products


def vectors(v: I64) -> F64:
    """Vectors for `mat_vecs`, as many as there are, one after the other: int64 [n], 0 <= v < 2^63. [1, n, 8]."""
    check_int64("vectors", v)
    if v.size and v.min() < 0:
        raise LocalError("fp.vectors: expected numbers from 0 to 2^63 - 1, got a negative one")
    return np.ascontiguousarray(v).view(np.uint8).astype(np.float64).reshape(1, len(v), _BYTES)


def mat_vecs(jobs: Sequence[tuple[I64, F64]], *, workspace: Workspace | None = None) -> Fp:
    """A v mod p for every (A, v), all jobs' one after the other: [2, n].

    A: int64 [..., M, N] signed; v: part of `vectors`, [1, N, 8], or [1, ..., N, 8] with the batch of A."""
    space = workspace or Workspace()
    pieces: list[_Piece] = []
    places: list[slice] = []
    end = 0
    for a, v in jobs:
        check_int64("mat_vecs", a)
        if a.ndim < 2 or v.shape[-2] != a.shape[-1] or (v.ndim > 3 and v.shape[1:-2] != a.shape[:-2]):
            raise LocalError(f"fp.mat_vecs: a vector of shape {v.shape[1:-1]} does not fit a matrix {a.shape}")
        pieces += _cut(a[..., :INNER], v[0, ..., :INNER, :], end)
        places.append(slice(end, end + math.prod(a.shape[:-1])))
        end = places[-1].stop
    products = space.floats("products", (_LIMBS, end, _BYTES))
    for first, last in _groups(pieces):
        _multiply_group(pieces[first:last], products, space)
    total = _folded(products)
    for (a, v), at in zip(jobs, places, strict=True):
        for left in range(INNER, a.shape[-1], INNER):
            part = a[..., left : left + INNER], v[..., left : left + INNER, :]
            total[:, at] = add(total[:, at], mat_vecs([part], workspace=space))
    return total


def _cut(a: I64, v: F64, start: int) -> list[_Piece]:
    """A job, or, if that is large, parts of it."""
    *batch, rows, inner = a.shape
    if a.size <= MATRIX_BLOCK:
        return [(a, v, slice(start, start + math.prod(batch) * rows))]
    if batch:
        pieces = []
        for k in range(batch[0]):
            pieces += _cut(a[k], v[k] if v.ndim > 2 else v, start + k * math.prod(a.shape[1:-1]))
        return pieces
    height = MATRIX_BLOCK // inner
    return [
        (a[top : top + height], v, slice(start + top, start + min(top + height, rows)))
        for top in range(0, rows, height)
    ]


def _groups(pieces: Sequence[_Piece]) -> Iterator[tuple[int, int]]:
    """Runs of pieces that are cast together."""
    first, size = 0, 0
    for k, (a, _, _) in enumerate(pieces):
        if k > first and size + a.size > MATRIX_BLOCK:
            yield first, k
            first, size = k, 0
        size += a.size
    if pieces:
        yield first, len(pieces)


def _multiply_group(pieces: Sequence[_Piece], products: F64, space: Workspace) -> None:
    """Write the products of the pieces' limbs, [2, n, 8]."""
    size = sum(a.size for a, _, _ in pieces)
    words, limbs = space.integers("words", (size,)), space.floats("limbs", (_LIMBS, size))
    start = 0
    for a, _, _ in pieces:
        words[start : start + a.size].reshape(a.shape)[...] = a
        start += a.size
    limbs[0] = words.view(np.uint32)[::2]
    limbs[1] = words.view(np.int32)[1::2]
    start = 0
    for a, v, at in pieces:
        factor = limbs[:, start : start + a.size].reshape(_LIMBS, *a.shape)
        np.matmul(factor, v, out=products[:, at].reshape(_LIMBS, *a.shape[:-1], _BYTES))
        start += a.size


def _folded(products: F64) -> Fp:
    """Σ_(i, j) 2^(32 i + 8 j) products[i, :, j] mod p. [2, n, 8], integers below 2^52."""
    size = products.shape[1]
    sums = np.empty((_LIMBS, _BYTES, size), dtype=np.int64)
    sums[...] = products.swapaxes(1, 2)
    pairs = sums[:, 1::2]
    pairs <<= np.int64(8)
    pairs += sums[:, ::2]
    rows = np.zeros((_ROWS, size), dtype=np.int64)
    rows[:4] = pairs[0]
    rows[2:] += pairs[1]
    return fold_rows(rows, 16, new((size,)))
