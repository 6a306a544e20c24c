"""How much one row can change the clipped integer sum of a step of DP-SGD. Plain Python.

Legend: g grid_bits, C clip norm, P entries of all gradients together, s bits of the shift.

A step's sum is formed by `sordino_agent.private_sum`. One grid unit is C / 2^g. Per row b there is an integer vector
v_b, for some parameters already on the grid, for the others (rank-one gradients) in units of 2^-s of the grid, and
|v_b|₂ <= 2^g in grid units is made sure of. The sum over rows is exact, then the fine entries are shifted: F >> s.

With and without row b, F differs by v_b, and an entry of the result by v/2^s + ρ with |ρ| < 1 (two roundings to
integers, of which each is off by less than one in the same direction). So the L2 distance is at most 2^g + √P, and

    Δ² = 4^g + P + ceil(2^(g+1) √P).

Neighbouring relation: one row added or removed, the same sampling coins for all others.
"""

from __future__ import annotations

import math
from typing import Final

from sordino_common.errors import LocalError

MAX_ROW_GRID_BITS: Final = 20  # half of the bits that exact products leave (see `private_sum`)
MAX_LENGTH: Final = 1 << 32


def row_bound(length: int, grid_bits: int) -> int:
    """Δ², in grid units, of one step's sum of P = `length` entries. Raises `LocalError` out of range."""
    if not 1 <= length <= MAX_LENGTH or not 1 <= grid_bits <= MAX_ROW_GRID_BITS:
        raise LocalError(
            f"row_bound: 1 to 2^32 entries and 1 to {MAX_ROW_GRID_BITS} grid_bits, got {length} and {grid_bits}"
        )
    cross = (4 << (2 * grid_bits)) * length  # (2^(g+1) √P)²
    return (1 << (2 * grid_bits)) + length + math.isqrt(cross - 1) + 1
