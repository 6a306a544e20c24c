"""F_p: inner products, matrix times vector, by float64 GEMM over limbs; exact, since all sums stay below 2^53.

Vectors (`dot`, `mat_vec`, `vec_mat`) use 16-bit limbs, which are a plain view of the words: no splitting, one cast.
A signed 64-bit number is three unsigned limbs and a signed one. 2^128 = 2 mod p, so limb products at 2^(16 d), d >= 8,
come back at d - 8 with a factor 2, and a matrix needs its limbs side by side only:

    Σ_n T[m, n] v[n] = Σ_d 2^(16 d) Σ_(n, i) T_i[m, n] W[(n, i), d]
    W[(n, i), d] = v_(d - i)[n] if d >= i, else 2 v_(d - i + 8)[n]

is one GEMM of T's memory as it lies, [M, 4 N], by W [4 N, 8]. |sums| <= 2^33 * 4 N for int64, 2^33 * 8 N for F_p.

Products of two matrices use 21-bit limbs, fewer products: `fp_matmul`.
"""

from __future__ import annotations

import math
from typing import Final

import numpy as np

from sordino_common.errors import LocalError
from sordino_common.ring.fp_core import F64, I64, U64, Fp, P, check_fp, check_int64, fold_rows

_LIMBS: Final = 8  # of 16 bits in an element
MAX_INNER: Final = 1 << 17  # 2^33 * 8 N <= 2^53
_DOT_BLOCK: Final = 2048  # elements: both operands' limbs are 256 KiB
_MAX_PAIRED: Final = 1 << 9  # limb rows below 2^45 may be joined two by two and stay below 2^62
_WINDOWS: Final = 8 + np.arange(8) - np.arange(8).reshape(2, 4, 1)  # [word, limb of t, d] -> column d + 8 - limb
_CAST_BLOCK: Final = 1 << 15  # limbs of a matrix that are cast at a time


def dot(a: Fp, b: Fp) -> int:
    """Σ a_i b_i mod p. a, b: [2, n]."""
    check_fp("dot", a, b)
    _check_vectors("dot", a.shape[1:], b.shape[1:])
    return _dot(a, b)


def dot_int64(a: Fp, v: I64) -> int:
    """Σ a_i v_i mod p. a: [2, n], v: int64 [n], signed."""
    check_fp("dot_int64", a)
    check_int64("dot_int64", v)
    _check_vectors("dot_int64", a.shape[1:], v.shape)
    return _dot(a, v[np.newaxis])


def mat_vec(t: I64, v: Fp) -> Fp:
    """t v mod p. t: int64 [..., M, N] signed, v: [2, N], or [2, ..., N] with the batch of t. Returns [2, ..., M]."""
    check_int64("mat_vec", t)
    check_fp("mat_vec", v)
    return _mat_vec("mat_vec", t[np.newaxis], v)


def mat_vec_fp(t: Fp, v: Fp) -> Fp:
    """t v mod p. t: [2, ..., M, N], v: [2, N], or [2, ..., N] with the batch of t. Returns [2, ..., M]."""
    check_fp("mat_vec_fp", t, v)
    return _mat_vec("mat_vec_fp", t, v)


def vec_mat(v: Fp, t: I64) -> Fp:
    """v^T t mod p. v: [2, M], or [2, ..., M] with the batch of t; t: int64 [..., M, N] signed. Returns [2, ..., N]."""
    check_int64("vec_mat", t)
    check_fp("vec_mat", v)
    return _vec_mat("vec_mat", v, t[np.newaxis])


def vec_mat_fp(v: Fp, t: Fp) -> Fp:
    """v^T t mod p. v: [2, M], or [2, ..., M] with the batch of t; t: [2, ..., M, N]. Returns [2, ..., N]."""
    check_fp("vec_mat_fp", v, t)
    return _vec_mat("vec_mat_fp", v, t)


def _check_vectors(what: str, a: tuple[int, ...], b: tuple[int, ...]) -> None:
    if len(a) != 1 or a != b:
        raise LocalError(f"fp.{what}: expected two vectors of one length, got shapes {a} and {b}")


def _interleaved(a: Fp) -> U64:
    """[n, 2]: the words of one element beside each other, so that its eight limbs are too."""
    out = np.empty((a.shape[1], 2), dtype=np.uint64)
    out[:, 0], out[:, 1] = a[0], a[1]  # many times as fast as a copy of the transposed array
    return out


def _dot(a: Fp, b: Fp | I64) -> int:
    """Σ over elements and limbs. a: uint64 [2, n]; b: uint64 [2, n] or int64 [1, n]. Small blocks throughout: fresh
    memory of the operands' size would cost more, page by page, than the arithmetic."""
    words, count = b.shape
    size, width = min(_DOT_BLOCK, count), 4 * words + _LIMBS
    left, right = np.empty((size, _LIMBS)), np.empty((size, 4 * words))
    a_block, b_block = np.empty((2, size, 2), dtype=np.uint64)
    total = np.zeros((_LIMBS, width), dtype=np.int64)
    for start in range(0, count, _DOT_BLOCK):
        n = min(_DOT_BLOCK, count - start)
        at = slice(start, start + n)
        a_block[:n, 0], a_block[:n, 1] = a[0, at], a[1, at]
        np.copyto(left[:n], a_block[:n].view(np.uint16))
        if words == 1:
            _cast_limbs(np.ascontiguousarray(b[0, at].view(np.int64)).reshape(n, 1), right[:n])
        else:
            b_block[:n, 0], b_block[:n, 1] = b[0, at], b[1, at]
            _cast_limbs(b_block[:n], right[:n])
        total[:, : 4 * words] += (left[:n].T @ right[:n]).astype(np.int64)  # below 2^32 n
    # Entry (i, j) stands at 2^(16 (i + j)): read with rows one shorter, the table has it in column i + j.
    skewed = total.reshape(-1)[: _LIMBS * (width - 1)].reshape(_LIMBS, width - 1)
    result = 0
    for entry in reversed(skewed.sum(axis=0).tolist()):
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


def _vec_mat(what: str, v: Fp, t: Fp | I64) -> Fp:
    """v: [2, ..., M]; t: [W, ..., M, N] with W = 1 (int64) or 2 words."""
    if t.ndim > 2 and t[0].swapaxes(-1, -2).flags.c_contiguous and not t[0].flags.c_contiguous:
        return _mat_vec(what, t.swapaxes(-1, -2), v)  # a transposed view: its memory is the other product's
    batch, matrices, vectors = _batches(what, t, v, -2)
    _, count, inner, columns = matrices.shape
    limb_rows = np.zeros((count, _LIMBS, columns), dtype=np.int64)
    step = max(1, _CAST_BLOCK // (4 * max(columns, 1)))
    floats = np.empty((min(step, inner), 4 * columns))
    for k in range(count):
        limbs = _interleaved(vectors[:, k if len(vectors[0]) > 1 else 0]).view(np.uint16).astype(np.float64)
        for w, word in enumerate(matrices[:, k]):
            products = np.zeros((_LIMBS, 4 * columns))  # v's limb, then column and t's limb; below 2^32 M
            for start in range(0, inner, step):
                part = np.ascontiguousarray(word[start : start + step])
                _cast_limbs(part, floats[: len(part)])
                products += limbs[start : start + step].T @ floats[: len(part)]
            _add_diagonals(products.reshape(_LIMBS, columns, 4).astype(np.int64), 4 * w, limb_rows[k])
    if count == 1:
        return _folded(limb_rows[0], (*batch, columns), inner)
    return _folded(np.ascontiguousarray(limb_rows.swapaxes(0, 1)).reshape(_LIMBS, -1), (*batch, columns), inner)


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


def _add_diagonals(products: I64, first: int, rows: I64) -> None:
    """rows[(j + i) mod 8] += products[j, :, i - first], doubled where j + i >= 8."""
    for i in range(4):
        shift = first + i
        rows[shift:] += products[: _LIMBS - shift, :, i]
        if shift:
            rows[:shift] += 2 * products[_LIMBS - shift :, :, i]
