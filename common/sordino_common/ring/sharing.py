"""Additive sharing in Z_2^64: x = x^1 + ... + x^n mod 2^64; any n - 1 shares are uniform and independent of x.

All shares but one are expansions of 32-byte seeds; the party at `corrected` holds the correction
x - sum of the others, the only vector that has to travel. Bytes: 32 to each party, 8 an element to one of them.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from sordino_common.errors import LocalError
from sordino_common.ring.prg import Seed, expand_ring

I64 = npt.NDArray[np.int64]


def correction(x: I64, seeds: Sequence[Seed], info: bytes, *, out: I64 | None = None) -> I64:
    """x - sum_j PRG(seeds[j], info) mod 2^64: the share of the party without a seed. Shape of x; `out` may be x."""
    if x.dtype != np.int64:
        raise LocalError(f"sharing: expected int64, got {x.dtype}")
    result = np.array(x, copy=True, order="C") if out is None else out
    if result is not x:
        np.copyto(result, x)
    scratch = np.empty(x.shape, dtype="<i8")
    for seed in seeds:
        np.subtract(result, expand_ring(seed, info, x.shape, scratch), out=result)
    return result


def reconstruct(shares: Sequence[I64]) -> I64:
    """Sum of the shares mod 2^64. Raises `LocalError` if there is none or if their shapes differ."""
    if not shares:
        raise LocalError("sharing: no shares")
    if any(share.shape != shares[0].shape or share.dtype != np.int64 for share in shares):
        raise LocalError("sharing: shares differ in shape, or are not int64")
    total = shares[0].copy()
    for share in shares[1:]:
        np.add(total, share, out=total)
    return total
