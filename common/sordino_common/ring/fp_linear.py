"""F_p: inner products, matrix times vector, by float64 GEMM over limbs; exact, since all sums stay below 2^53.

Vectors (`dots`, `mat_vec`) use 16-bit limbs, which are a plain view of the words: no splitting, one cast.
A signed 64-bit number is three unsigned limbs and a signed one. 2^128 = 2 mod p, so limb products at 2^(16 d), d >= 8,
come back at d - 8 with a factor 2, and a matrix needs its limbs side by side only:

    Σ_n T[m, n] v[n] = Σ_d 2^(16 d) Σ_(n, i) T_i[m, n] W[(n, i), d]
    W[(n, i), d] = v_(d - i)[n] if d >= i, else 2 v_(d - i + 8)[n]

is one GEMM of T's memory as it lies, [M, 4 N], by W [4 N, 8]. |sums| <= 2^33 * 4 N for int64, 2^33 * 8 N for F_p.

Products of two matrices use 21-bit limbs, fewer products: `fp_matmul`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final

import numpy as np

from sordino_common.errors import LocalError
from sordino_common.ring.fp_core import F64, I64, U64, Fp, P, check_fp, check_int64, fold_rows
from sordino_common.ring.limbs import Workspace

_LIMBS: Final = 8  # of 16 bits in an element
MAX_INNER: Final = 1 << 17  # 2^33 * 8 N <= 2^53
DOT_BLOCK: Final = 4096  # elements: the limbs of five words are 640 KiB
_DIAGONALS: Final = (np.add.outer(np.arange(8), np.arange(8)).reshape(64, 1) == np.arange(15)).astype(np.int64)
_MAX_PAIRED: Final = 1 << 9  # limb rows below 2^45 may be joined two by two and stay below 2^62
_WINDOWS: Final = 8 + np.arange(8) - np.arange(8).reshape(2, 4, 1)  # [word, limb of t, d] -> column d + 8 - limb
_CAST_BLOCK: Final = 1 << 15  # limbs of a matrix that are cast at a time


def dots(
    left: Sequence[Fp | I64],
    right: Sequence[Fp | I64],
    pairs: Sequence[tuple[int, int]],
    *,
    workspace: Workspace | None = None,
) -> list[list[int]]:
    """For (i, j) in pairs: Σ_n left[i][b, n] right[j][b, n] mod p, for each b. All are elements [2, B, N] or integers
    int64 [B, N], signed, of one shape.

    Every vector is cast to limbs once, however many pairs it is in; a pair is one GEMM for each b. Blocks that stay in
    the cache, in memory that is used again: fresh pages would cost more than the arithmetic."""
    operands = [_words("dots", x) for x in (*left, *right)]
    if any(x.ndim != 3 or x.shape[1:] != operands[0].shape[1:] for x in operands):
        shapes = ", ".join(str(x.shape[1:]) for x in operands)
        raise LocalError(f"fp.dots: expected batches of vectors of one shape, got {shapes}")
    batch, count = operands[0].shape[1:] if operands else (0, 0)
    space = workspace or Workspace()
    totals = np.zeros((len(pairs), batch, _LIMBS, _LIMBS), dtype=np.int64)
    step = max(1, DOT_BLOCK // max(1, batch))
    for start in range(0, count, step):
        tables = [
            _limb_table(
                x[..., start : start + step], space.floats(f"limbs {k}", (batch, min(step, count - start), 4 * len(x)))
            )
            for k, x in enumerate(operands)
        ]
        for total, (i, j) in zip(totals, pairs, strict=True):
            x, y = tables[i], tables[len(left) + j]
            total[:, : x.shape[2], : y.shape[2]] += np.matmul(x.swapaxes(1, 2), y).astype(np.int64)  # below 2^32 N
    lines = (totals.reshape(len(pairs) * batch, _LIMBS**2) @ _DIAGONALS).tolist()
    return [[_joined(line) for line in lines[k * batch : (k + 1) * batch]] for k in range(len(pairs))]


def mat_vec(t: I64, v: Fp) -> Fp:
    """t v mod p. t: int64 [..., M, N] signed, v: [2, N], or [2, ..., N] with the batch of t. Returns [2, ..., M]."""
    check_int64("mat_vec", t)
    check_fp("mat_vec", v)
    return _mat_vec("mat_vec", t[np.newaxis], v)


def mat_vec_fp(t: Fp, v: Fp) -> Fp:
    """t v mod p. t: [2, ..., M, N], v: [2, N], or [2, ..., N] with the batch of t. Returns [2, ..., M]."""
    check_fp("mat_vec_fp", t, v)
    return _mat_vec("mat_vec_fp", t, v)


def _words(what: str, x: Fp | I64) -> Fp | I64:
    """[2, n] or [1, n]."""
    if x.dtype == np.uint64:
        check_fp(what, x)
        return x
    check_int64(what, x)
    return x[np.newaxis]


def _interleaved(a: Fp) -> U64:
    """[n, 2]: the words of one element beside each other, so that its eight limbs are too."""
    out = np.empty((a.shape[1], 2), dtype=np.uint64)
    out[:, 0], out[:, 1] = a[0], a[1]  # many times as fast as a copy of the transposed array
    return out


def _limb_table(x: Fp | I64, out: F64) -> F64:
    """The limbs of vectors [words, B, N] as [B, N, 4 words]: those of one entry lie beside each other."""
    words = np.empty((*x.shape[1:], len(x)), dtype=np.int64)
    for k, word in enumerate(x.view(np.int64)):
        words[..., k] = word
    np.copyto(out, words.view(np.uint16))
    if x.dtype == np.int64:
        np.copyto(out[..., 3], words.view(np.int16)[..., 3])
    return out


def _joined(diagonals: Sequence[int]) -> int:
    """Σ diagonals[d] 2^(16 d) mod p."""
    result = 0
    for entry in reversed(diagonals):
        result = (result << 16) + entry
    return result % P


def _cast_limbs(words: U64 | I64, out: F64) -> None:
    """The 16-bit limbs of a C-contiguous [..., N] as [..., 4 N] floats; those of int64 end with a signed limb."""
    np.copyto(out, words.view(np.uint16))
    if words.dtype == np.int64:
        np.copyto(out[..., 3::4], words.view(np.int16)[..., 3::4])


def _batches(what: str, t: Fp | I64, v: Fp, inner_axis: int) -> tuple[tuple[int, ...], Fp | I64, Fp]:
    """The batch dimensions of t [W, ..., M, N]; t as [W, B, M, N]; v as [2, B or 1, K]."""
    batch = t.shape[1:-2]
    if t.ndim < 3 or v.ndim < 2 or v.shape[-1] != t.shape[inner_axis] or (v.ndim > 2 and v.shape[1:-1] != batch):
        raise LocalError(f"fp.{what}: a vector of shape {v.shape[1:]} does not fit a matrix of shape {t.shape[1:]}")
    if v.shape[-1] > MAX_INNER:
        raise LocalError(f"fp.{what}: inner dimension {v.shape[-1]} is over {MAX_INNER}; cut the product into parts")
    count = math.prod(batch)
    return batch, t.reshape(len(t), count, *t.shape[-2:]), v.reshape(2, count if v.ndim > 2 else 1, v.shape[-1])


def _mat_vec(what: str, t: Fp | I64, v: Fp) -> Fp:
    """t: [W, ..., M, N] with W = 1 (int64) or 2 words; v: [2, ..., N]."""
    batch, matrices, vectors = _batches(what, t, v, -1)
    if len(vectors[0]) == 1 and matrices.shape[1] != 1:  # one vector for all: one tall matrix
        matrices = matrices.reshape(len(t), 1, matrices.shape[1] * t.shape[-2], t.shape[-1])
    _, count, rows, inner = matrices.shape
    sums = np.zeros((count, rows, _LIMBS))
    step = max(1, _CAST_BLOCK // (4 * max(inner, 1)))
    floats = np.empty((min(step, rows), 4 * inner))
    for k in range(count if inner else 0):
        table = _toeplitz(vectors[:, k], len(t))
        for word, limbs in zip(matrices[:, k], table, strict=True):
            for start in range(0, rows, step):
                part = np.ascontiguousarray(word[start : start + step])
                _cast_limbs(part, floats[: len(part)])
                sums[k, start : start + step] += floats[: len(part)] @ limbs
    limb_rows = sums.reshape(-1, _LIMBS).T.astype(np.int64, order="C")
    return _folded(limb_rows, (*batch, t.shape[-2]), inner)


def _toeplitz(v: Fp, words: int) -> F64:
    """W of the module's text for a vector [2, N], cut by the matrix's words: [words, 4 N, 8]."""
    inner = v.shape[1]
    doubled = np.empty((inner, 2 * _LIMBS))  # 2 v_0 .. 2 v_7, v_0 .. v_7: what belongs to limb i of t is a window
    np.copyto(doubled[:, _LIMBS:], _interleaved(v).view(np.uint16))
    np.multiply(doubled[:, _LIMBS:], 2.0, out=doubled[:, :_LIMBS])
    table = np.empty((words, inner, 4, _LIMBS))
    for w in range(words):
        doubled.take(_WINDOWS[w], axis=1, out=table[w], mode="clip")  # other modes copy through a buffer
    return table.reshape(words, 4 * inner, _LIMBS)


def _folded(limb_rows: I64, shape: tuple[int, ...], inner: int) -> Fp:
    """Σ_d 2^(16 d) limb_rows[d] mod p. limb_rows: [8, elements], below 2^36 inner; destroyed."""
    out = np.empty((2, limb_rows.shape[1]), dtype=np.uint64)
    if inner <= _MAX_PAIRED:
        pairs = limb_rows[1::2]
        pairs <<= np.int64(16)
        pairs += limb_rows[::2]
        fold_rows(pairs, 32, out)
    else:
        fold_rows(limb_rows, 16, out)
    return out.reshape(2, *shape)
