"""F_p: products of many matrices by 63-bit vectors, as a MAC check has them, by float64 GEMM over planes of 21 bits.

A signed word is three limbs at 2^0, 2^21, 2^42, the last of 22 bits and signed. They lie in planes, so that BLAS reads a
plane as the matrix lies. All jobs' matrices are split together, in parts that stay in the cache; v's
limbs are laid out so that column d gathers what stands at 2^(21 d): one GEMM a plane, [M, N] x [N, 5], |sums of three
planes| <= 2^44 * 512; and all products are folded together.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from sordino_common.errors import LocalError
from sordino_common.ring.fp_core import F64, I64, Fp, check_int64, fold_rows
from sordino_common.ring.limbs import Workspace

INNER: Final = 512
_MATRIX_BLOCK: Final = 1 << 14  # elements of matrices that are split at a time: planes of 1.1 MiB
_LIMB: Final = 21
_LIMBS: Final = 3  # of a word
_DIAGONALS: Final = 5
_MASK: Final = np.int64((1 << _LIMB) - 1)


def vectors(v: I64) -> F64:
    """Vectors for `mat_vecs`, as many as there are, one after the other: int64 [n], 0 <= v < 2^63. [3, n, 5]."""
    check_int64("vectors", v)
    limbs = _split(v, Workspace())
    table = np.zeros((_LIMBS, len(v), _DIAGONALS))
    for i in range(_LIMBS):
        table[i, :, i : i + _LIMBS] = limbs.T
    return table


def mat_vecs(jobs: Sequence[tuple[I64, F64]], *, workspace: Workspace | None = None) -> Fp:
    """A v mod p for every (A, v), all jobs' one after the other: [2, n].

    A: int64 [..., M, N] signed; v: part of `vectors`, [3, N, 5], or [3, ..., N, 5] with the batch of A."""
    space = workspace or Workspace()
    pieces: list[_Piece] = []
    end = 0
    for a, v in jobs:
        check_int64("mat_vecs", a)
        if a.ndim < 2 or v.shape[-2] != a.shape[-1] or v.ndim not in (3, a.ndim + 1):
            raise LocalError(f"fp.mat_vecs: a vector of shape {v.shape[1:-1]} does not fit a matrix {a.shape}")
        pieces += _cut(a, v, end)
        end += math.prod(a.shape[:-1])
    rows = np.zeros((_DIAGONALS, end), dtype=np.int64)
    for first, last in _groups(pieces):
        _multiply_group(pieces[first:last], rows, space)
    return fold_rows(rows, _LIMB, np.empty((2, end), dtype=np.uint64))


@dataclass(frozen=True, slots=True)
class _Piece:
    """A part of a job that is split at once; its products are added to rows `at`."""

    a: I64
    v: F64
    at: slice


def _cut(a: I64, v: F64, start: int) -> list[_Piece]:
    """A job, or, if that is large, parts of it of at most 512 columns."""
    *batch, rows, inner = a.shape
    if a.size <= _MATRIX_BLOCK and inner <= INNER:
        if batch and v.ndim == 3:
            v = v.reshape(_LIMBS, *(1,) * len(batch), *v.shape[1:])
        return [_Piece(a, v, slice(start, start + math.prod(batch) * rows))]
    if batch:
        pieces = []
        for k in range(batch[0]):
            pieces += _cut(a[k], v[:, k] if v.ndim > 3 else v, start + k * math.prod(a.shape[1:-1]))
        return pieces
    height = max(1, _MATRIX_BLOCK // min(inner, INNER))
    return [
        _Piece(
            a[top : top + height, left : left + INNER],
            v[:, left : left + INNER],
            slice(start + top, start + min(top + height, rows)),
        )
        for top in range(0, rows, height)
        for left in range(0, inner, INNER)
    ]


def _groups(pieces: Sequence[_Piece]) -> Iterator[tuple[int, int]]:
    """Runs of pieces that are split together: rows one after the other, not too large."""
    first, size = 0, 0
    for k, piece in enumerate(pieces):
        if k > first and (size + piece.a.size > _MATRIX_BLOCK or piece.at.start != pieces[k - 1].at.stop):
            yield first, k
            first, size = k, 0
        size += piece.a.size
    if pieces:
        yield first, len(pieces)


def _multiply_group(pieces: Sequence[_Piece], rows: I64, space: Workspace) -> None:
    """rows [5, n] += the products of pieces whose rows follow one another."""
    words = space.integers("words", (sum(piece.a.size for piece in pieces),))
    start = 0
    for piece in pieces:
        words[start : start + piece.a.size].reshape(piece.a.shape)[...] = piece.a
        start += piece.a.size
    planes = _split(words, space)
    first, stop = pieces[0].at.start, pieces[-1].at.stop
    products = space.floats("products", (_LIMBS, stop - first, _DIAGONALS))
    start = 0
    for piece in pieces:
        factor = planes[:, start : start + piece.a.size].reshape(_LIMBS, *piece.a.shape)
        out = products[:, piece.at.start - first : piece.at.stop - first]
        np.matmul(factor, piece.v, out=out.reshape(_LIMBS, *piece.a.shape[:-1], _DIAGONALS))
        start += piece.a.size
    rows[:, first:stop] += products.sum(axis=0).T.astype(np.int64)


def _split(words: I64, space: Workspace) -> F64:
    """Limbs [3, n] of signed words [n]. Void when `space` is used for the next ones."""
    planes = space.floats("planes", (_LIMBS, *words.shape))
    limbs = space.integers("limbs", words.shape)
    np.copyto(planes[0], np.bitwise_and(words, _MASK, out=limbs))
    np.right_shift(words, _LIMB, out=limbs)
    np.copyto(planes[1], np.bitwise_and(limbs, _MASK, out=limbs))
    np.copyto(planes[2], np.right_shift(words, 2 * _LIMB, out=limbs))
    return planes
