"""Elements of F_p from Python integers, and back: what the tests of `ring.fp` compare with."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from sordino_common.ring.fp import Fp, P

_WORD = (1 << 64) - 1


def from_ints(values: Sequence[int], shape: tuple[int, ...]) -> Fp:
    """Any integers, reduced mod p, in row order."""
    assert len(values) == math.prod(shape)
    residues = [value % P for value in values]
    words = [[r & _WORD for r in residues], [r >> 64 for r in residues]]
    return np.array(words, dtype=np.uint64).reshape(2, *shape)


def to_ints(a: Fp) -> list[int]:
    """Of canonical elements: 0..p-1 in row order. Anything else than canonical fails."""
    assert a.dtype == np.uint64
    assert a.shape[0] == 2
    values = [hi << 64 | lo for lo, hi in zip(a[0].ravel().tolist(), a[1].ravel().tolist(), strict=True)]
    assert all(value < P for value in values)
    return values


def residues(a: np.ndarray) -> np.ndarray:
    """Python integers in the logical shape; int64 arrays as they are."""
    if a.dtype == np.int64:
        return a.astype(object)
    return np.array(to_ints(a), dtype=object).reshape(a.shape[1:])


def same(a: Fp, exact: np.ndarray) -> bool:
    """Whether `a` is canonical, of the logical shape of `exact`, and equal to it mod p."""
    return a.shape[1:] == exact.shape and to_ints(a) == [int(value) % P for value in exact.ravel()]
