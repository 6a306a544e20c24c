"""The bound of `grid.clip_to_grid`, by itself and without NumPy: daemons price a clipped update with it."""

from __future__ import annotations

import math
from typing import Final

from sordino_common.errors import LocalError

MAX_GRID_BITS: Final = 28
MAX_LENGTH: Final = 1 << 32  # (2^28 + 2^16)² < 2^57: no sum of squares leaves int64
_SPREAD: Final = 3  # sqrt(2 log(1/β)), see `grid`


def grid_bound(length: int, grid_bits: int) -> int:
    """The squared L2 norm, in grid units, that no vector of `clip_to_grid` passes: its `sensitivity_squared`."""
    if not 1 <= length <= MAX_LENGTH or not 1 <= grid_bits <= MAX_GRID_BITS:
        raise LocalError(
            f"the grid takes 1 to 2^32 entries and 1 to {MAX_GRID_BITS} grid_bits, got {length} and {grid_bits}"
        )
    radius = 1 << grid_bits
    root = math.isqrt(length - 1) + 1  # ceil(√d)
    likely = radius**2 + -(-length // 4) + _SPREAD * (radius + -(-root // 2))
    return min(likely, (radius + root) ** 2)


def entry_bound(grid_bits: int) -> int:
    """No entry of a vector of `clip_to_grid` is larger in size: 2^g, and rounding adds less than one."""
    return (1 << grid_bits) + 1
