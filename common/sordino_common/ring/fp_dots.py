"""F_p: inner products of a few vectors, in many pairs, by float64 GEMM over limbs of 16 bits.

A limb of 16 bits is a plain view of a word: no splitting, one cast. A signed 64-bit number is three unsigned limbs and
a signed one, an element of F_p eight unsigned ones. With x = Σ_i x_i 2^(16 i) and y likewise,

    Σ_n x[n] y[n] = Σ_(i, j) 2^(16 (i + j)) Σ_n x_i[n] y_j[n]

and all sums over n are one GEMM of [limbs, N] by [N, limbs].

Why it is exact: |x_i y_j| < 2^32, and float64 adds integers exactly up to 2^53, in whatever order: N <= 2^21 = `INNER`.
Sums of longer vectors' parts are int64. 2^128 = 2 mod p, so at 2^(16 d) stand those with i + j = d and twice those with
i + j = d + 8: fifteen at most, below 15 * 2^32 N < 2^63 for N <= 2^27 = `MAX_INNER`.
"""

from __future__ import annotations

from collections.abc import Sequence
from operator import mul
from typing import Final

import numpy as np

from sordino_common.errors import LocalError
from sordino_common.ring.fp_core import F64, I64, Fp, P, check_fp, check_int64
from sordino_common.ring.limbs import Workspace

INNER: Final = 1 << 21
MAX_INNER: Final = 1 << 27
DOT_BLOCK: Final = 1 << 13  # entries: six vectors' limbs are 1.5 MiB. Shorter blocks cost more in calls than they save
_LIMBS: Final = 8  # of 16 bits in an element
_PLACES: Final = tuple(1 << 16 * d for d in range(_LIMBS))
_MEETING: Final = np.add.outer(np.arange(_LIMBS), np.arange(_LIMBS)).reshape(-1, 1)  # i + j
_DIAGONALS: Final = (np.arange(_LIMBS) == _MEETING % _LIMBS) * (1 + _MEETING // _LIMBS)  # how often (i, j) counts at d


def dots(
    left: Sequence[Fp | I64],
    right: Sequence[Fp | I64],
    pairs: Sequence[tuple[int, int]],
    *,
    workspace: Workspace | None = None,
) -> list[list[int]]:
    """For (i, j) in pairs: Σ_n left[i][b, n] right[j][b, n] mod p, for each b. All are elements [2, B, N] or integers
    int64 [B, N], signed, of one shape; N <= `MAX_INNER`.

    Every vector is cast to limbs once, however many pairs it is in; a pair is one GEMM for each b. In memory that is
    used again: fresh pages would cost more than the arithmetic."""
    x, y = [_words(each) for each in left], [_words(each) for each in right]
    batch, count = _shape((*x, *y))
    space = workspace or Workspace()
    diagonals = np.zeros((len(pairs) * batch, _LIMBS), dtype=np.int64)
    partners: list[list[tuple[int, int]]] = [[] for _ in x]
    for k, (i, j) in enumerate(pairs):
        partners[i].append((k, j))
    for start in range(0, count if diagonals.size else 0, INNER):
        at = slice(start, start + INNER)
        sums = _sums([each[..., at] for each in x], [each[..., at] for each in y], partners, len(pairs), space)
        diagonals += sums.reshape(-1, _LIMBS**2).astype(np.int64) @ _DIAGONALS
    found = [sum(map(mul, line, _PLACES)) % P for line in diagonals.tolist()]
    return [found[k * batch : (k + 1) * batch] for k in range(len(pairs))]


def _sums(
    x: Sequence[I64], y: Sequence[I64], partners: Sequence[Sequence[tuple[int, int]]], pairs: int, space: Workspace
) -> F64:
    """Of the products of all limbs, [pairs, B, 8, 8]. partners[i]: each pair that x[i] is in, and of which y."""
    _, batch, count = x[0].shape
    products: dict[int, F64] = {}
    step = max(1, DOT_BLOCK // batch)
    for start in range(0, count, step):
        at = slice(start, start + step)
        columns = [_limbs(each[..., at], space, f"right {j}") for j, each in enumerate(y)]
        for each, taken in zip(x, partners, strict=True):
            rows = _limbs(each[..., at], space, "left").swapaxes(1, 2)
            for k, j in taken:
                product = np.matmul(rows, columns[j])
                products[k] = np.add(products[k], product, out=product) if start else product
    sums = np.zeros((pairs, batch, _LIMBS, _LIMBS))
    for k, product in products.items():
        sums[k, :, : product.shape[1], : product.shape[2]] = product
    return sums


def _words(x: Fp | I64) -> I64:
    """[2, B, N] or [1, B, N]."""
    if x.dtype == np.uint64:
        check_fp("dots", x)
        return x.view(np.int64)
    if x.dtype != np.int64:
        check_int64("dots", x)
    return x.view(np.int64)[np.newaxis]


def _shape(operands: Sequence[I64]) -> tuple[int, int]:
    if not operands:
        return 0, 0
    shape = operands[0].shape[1:]
    if len(shape) != 2 or [x.shape[1:] for x in operands] != [shape] * len(operands):
        shapes = ", ".join(str(x.shape[1:]) for x in operands)
        raise LocalError(f"fp.dots: expected batches of vectors of one shape, got {shapes}")
    if shape[1] > MAX_INNER:
        raise LocalError(f"fp.dots: vectors of {shape[1]} entries, {MAX_INNER} at most; cut them into parts")
    return shape[0], shape[1]


def _limbs(x: I64, space: Workspace, slot: str) -> F64:
    """[B, N, 4 words]: the limbs of one entry lie beside each other. Void when the slot is taken again."""
    count, batch, length = x.shape
    table = space.floats(slot, (batch, length, 4 * count))
    if count == 1:
        word = x[0] if x.strides[-1] == x.itemsize else np.ascontiguousarray(x[0])
        table.reshape(batch, -1)[...] = word.view(np.uint16)
        table[..., 3] = word.view(np.int16)[..., 3::4]
    else:
        words = space.integers("words", (batch, length, count))
        words[..., 0], words[..., 1] = x[0], x[1]  # many times as fast as a copy of the transposed array
        table[...] = words.view(np.uint16)
    return table
