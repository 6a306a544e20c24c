"""Fixed point: a real v stands in Z_2^64 as round(v * 2^f), signed; f = 14 fractional bits unless a wire says else.

Rounding is to nearest, ties to even; the error of encoding is at most 2^-(f+1). Values that do not fit, NaN and
infinity are refused: a silent wrap would be a wrong answer of size 2^(64-f).
"""

from __future__ import annotations

from typing import Final

import numpy as np
import numpy.typing as npt

from sordino_common.errors import LocalError

FRACTION_BITS: Final = 14
MAX_FRACTION_BITS: Final = 40


def encode_fixed(
    values: npt.NDArray[np.floating], fraction_bits: int = FRACTION_BITS, *, bound_bits: int = 62
) -> npt.NDArray[np.int64]:
    """round(v 2^f) as int64 of the same shape. Raises `LocalError` where |v 2^f| >= 2^bound_bits or v is not finite."""
    _check_bits(fraction_bits)
    scaled = np.rint(np.ldexp(values.astype(np.float64), fraction_bits))
    if not bool(np.all(np.abs(scaled) < 2.0**bound_bits)):  # NaN compares false
        raise LocalError(
            f"fixed point: a value is not finite or not below 2^{bound_bits - fraction_bits} in size "
            f"(f = {fraction_bits})"
        )
    return scaled.astype(np.int64)


def decode_fixed(encoded: npt.NDArray[np.int64], fraction_bits: int = FRACTION_BITS) -> npt.NDArray[np.float64]:
    """v = m 2^-f as float64 of the same shape; exact for |m| <= 2^53."""
    _check_bits(fraction_bits)
    return np.ldexp(encoded.astype(np.float64), -fraction_bits)


def _check_bits(fraction_bits: int) -> None:
    if not 0 <= fraction_bits <= MAX_FRACTION_BITS:
        raise LocalError(f"fixed point: fraction bits must be 0..{MAX_FRACTION_BITS}, got {fraction_bits}")
