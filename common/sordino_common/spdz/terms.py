"""The linear part of a gate over the integers: r or -D, plus Σ k_l w_l and c, as two words.

    value = low + 2^64 high,    low signed, in 64 bits: what wrapping arithmetic gives

high is an integer, and float64 says which: ((the value in float64) - low) / 2^64 is off by less than 1/4.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from sordino_common.errors import LocalError
from sordino_common.spdz.circuit import Gate

I64 = npt.NDArray[np.int64]
_FLOAT_BITS: Final = 114  # each of (terms + 4) roundings is within 2^-53 of the value: 2^61 in all


def has_terms(gate: Gate) -> bool:
    """Whether the gate has a linear part. Raises `LocalError` if `add_terms` could be wrong for some w of 64 bits."""
    largest = abs(gate.addend) + (sum(abs(term.coefficient) for term in gate.terms) + 1 << 63)
    if largest * (len(gate.terms) + 4) >> _FLOAT_BITS:
        raise LocalError(
            f"a gate of node {gate.node}: its terms are up to {largest.bit_length()} bits long; with {len(gate.terms)} "
            f"terms, float64 tells the high words of at most {_FLOAT_BITS - (len(gate.terms) + 4).bit_length()} apart"
        )
    return bool(gate.terms) or gate.addend != 0


def add_terms(low: I64, terms: Sequence[tuple[int, npt.NDArray[Any]]], addend: int) -> I64:
    """low += Σ k w + addend mod 2^64, in place; returns `high`. w: int64 of low's shape."""
    about = np.asarray(low, dtype=np.float64)
    for coefficient, wire in terms:
        low += wire * np.int64(coefficient)
        about = about + wire * float(coefficient)
    if addend:
        low += np.int64(addend)
        about = about + float(addend)
    return np.asarray(np.rint((about - low) * 2.0**-64), dtype=np.int64)
