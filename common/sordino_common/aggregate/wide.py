"""Numbers that are wider than an entry of a vector, as a few entries of 16 bits each: v = Σ_k 2^(16 k) limb_k.

All limbs but the last are in [0, 2^16), the last is signed. Limbs add up entry by entry, and `joined` of the sums is
the sum of the numbers, exactly.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from sordino_common.errors import LocalError

LIMB_BITS: Final = 16
LIMB_BOUND: Final = 1 << LIMB_BITS  # no limb is larger in size
_MASK: Final = LIMB_BOUND - 1

# What a `sum-update` that is weighted by rows carries behind the update.
ROWS_LIMBS: Final = 3
LOSS_LIMBS: Final = 4  # of rows · mean loss · 2^LOSS_FRACTION_BITS
LOSS_FRACTION_BITS: Final = 20
EXTRAS: Final = ROWS_LIMBS + LOSS_LIMBS


def limbs(value: int, count: int) -> list[int]:
    """`value` as `count` limbs. Raises `LocalError` unless -2^(16 count) <= value < 2^(16 count)."""
    if not -(1 << LIMB_BITS * count) <= value < 1 << LIMB_BITS * count:
        raise LocalError(f"limbs: {value.bit_length()} bits do not fit {count} limbs of {LIMB_BITS}")
    low = [(value >> LIMB_BITS * k) & _MASK for k in range(count - 1)]
    return [*low, value >> LIMB_BITS * (count - 1)]


def joined(sums: Sequence[int]) -> int:
    """The number that these limbs, or sums of limbs, stand for."""
    return sum(int(limb) << LIMB_BITS * k for k, limb in enumerate(sums))
