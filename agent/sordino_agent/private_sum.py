"""One step of DP-SGD up to its noise: f(S) = Σ_{b in S} clip(g_b) over a Poisson sample S, as exact integers.

Legend: R rows of the split, B rows of a batch, C clip norm, g grid_bits, P entries of all gradients together, q
sampling rate, k bits of a factor, s = 2k - g.

**Sample.** Every row is in S independently with probability q = threshold / 2^32: 32 bits of the generator per row,
compared with the threshold. |S| is random, zero included; S is fed in batches of B rows, the last one filled up with
rows whose outputs are ignored.

**Row.** From the Plan's outputs g_b (float32) come norms in float64, and the factor min(1, C/|g_b|). A row whose norm
is NaN or infinite counts as zero. One grid unit is C / 2^g.

- `WholeRows`: v = trunc(clipped entries in grid units).
- `OuterRows` A_b ⊗ C_b: a = trunc(2^k · (clipped A_b |C_b|) / C) and c = trunc(2^k · C_b/|C_b|), two integer vectors;
  the row's entry is a_i c_j in units of 2^-s of the grid, and its norm² is |a|² |c|² without ever making the matrix.

**The bound is checked, not assumed.** t = Σ |v|² + Σ |a|²|c|² / 4^s is computed in float64 from the integers; a row
with t > 4^g (1 - 2^-24) is dropped (floats never bring one there: factors are smaller by 2^-20). The sum of n terms has
a relative error below (n + 3) 2^-53, so for n <= 2^28 entries the true integer norm² of a row that stays is <= 4^g.

**The sum is exact.** |a_i c_j| <= 2^2k, so Σ over a batch stays below B 2^2k <= 2^53, where a float64 product of
matrices is exact in whatever order it adds: k = min(20, (53 - log2 B)/2). Over batches int64 holds 2^(62-2k) rows; more
are refused. At the end fine entries are shifted to the grid, F >> s (floor).

So with and without a row, the same coins for all others, the results differ by at most `privacy.rows.row_bound` in
squared L2 norm, as integers. What this rests on besides: the Plan's output for row b is a function of that row (proven
for the Plan by `require_separable`; in floats also of its place in the batch as far as the linear algebra library's
last digits depend on it). What it does not hide: time, which grows with |S|.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from sordino_agent.errors import BadCommand
from sordino_common.errors import LimitExceeded, LocalError
from sordino_common.plan.gradients import OuterRows, RowGradients, WholeRows
from sordino_common.privacy.mechanism import FULL_SAMPLING
from sordino_common.privacy.rows import MAX_ROW_GRID_BITS, row_bound

RandomBytes = Callable[[int], bytes]
Ints = NDArray[np.int64]
Rows = NDArray[np.int64]

_FACTOR_BITS: Final = 20
_SHRINK: Final = 1.0 - 2.0**-20
_LIMIT: Final = 1.0 - 2.0**-24
_MOST_ENTRIES: Final = 1 << 28


def poisson_sample(rows: int, threshold: int, random: RandomBytes = os.urandom) -> Rows:
    """Ascending row numbers in [0, rows), each taken independently with probability `threshold` / 2^32, exactly."""
    if not 1 <= threshold <= FULL_SAMPLING or rows < 0:
        raise LocalError(f"poisson_sample: threshold in [1, 2^32] and rows >= 0, got {threshold} and {rows}")
    coins = np.frombuffer(random(4 * rows), dtype="<u4").astype(np.uint64)
    return np.flatnonzero(coins < np.uint64(threshold))


def batches_of(sample: Rows, batch_rows: int) -> Iterator[tuple[Rows, int]]:
    """(B row numbers, how many of them count): the sample in order; the last batch repeats its last row."""
    for begin in range(0, len(sample), batch_rows):
        part = sample[begin : begin + batch_rows]
        filled = len(part)
        if filled < batch_rows:
            part = np.concatenate([part, np.full(batch_rows - filled, part[-1])])
        yield part, filled


class RowSum:
    """f(S) of one Plan's gradients: `add` batch after batch, then `take`. Raises `BadCommand` for what it can't do
    exactly: more than 2^28 entries, batches of more than 2^33 rows, a grid finer than 2^-20."""

    def __init__(self, gradients: RowGradients, *, clip_norm: float, grid_bits: int) -> None:
        self.length: Final = sum(math.prod(block.shape) for block in gradients.blocks)
        if not 1 <= grid_bits <= MAX_ROW_GRID_BITS or not 1e-30 <= clip_norm <= 1e30:
            raise BadCommand(
                f"clipping rows: grid_bits from 1 to {MAX_ROW_GRID_BITS} and clip_norm from 1e-30 to 1e30 are taken, "
                f"got {grid_bits} and {clip_norm}"
            )
        bits = (53 - (gradients.rows - 1).bit_length()) // 2
        if self.length > _MOST_ENTRIES or bits < grid_bits // 2 + 1:
            raise BadCommand(
                f"clipping rows: gradients of {self.length} entries in batches of {gradients.rows} rows can't be added "
                f"exactly on a grid of {grid_bits} bits; at most 2^28 entries, and smaller batches"
            )
        self.sensitivity_squared: Final = row_bound(self.length, grid_bits)
        self._blocks = gradients.blocks
        self._bits = min(_FACTOR_BITS, bits)
        self._shift = 2 * self._bits - grid_bits
        self._clip_norm = clip_norm
        self._unit = 2.0**grid_bits
        self._most_rows = 1 << (62 - 2 * self._bits)
        self.clear()

    def clear(self) -> None:
        """Begin a new sum."""
        self._rows = 0
        self._sums: list[Ints] = [np.zeros(block.shape, dtype=np.int64) for block in self._blocks]

    def add(self, outs: Sequence[NDArray[Any]], filled: int) -> None:
        """Add the first `filled` rows of a run of the gradient Plan, whose outputs are `outs`."""
        if self._rows + filled > self._most_rows:
            raise LimitExceeded(
                f"a sample of more than {self._most_rows} rows can't be added exactly; split the dataset"
            )
        with np.errstate(all="ignore"):  # what overflows or is NaN is dropped below
            parts = [_Part(block, outs, filled) for block in self._blocks]
            norms = np.sqrt(np.sum([part.squares for part in parts], axis=0))
            alive = np.isfinite(norms)
            factor = np.minimum(1.0, self._clip_norm / norms)  # norm 0: C/0 = inf, factor 1
            factor = np.where(alive, factor, 0.0) * (_SHRINK / self._clip_norm)
            total = np.zeros(filled)
            for part in parts:
                total += part.quantise(factor, alive, unit=self._unit, bits=self._bits, shift=self._shift)
            kept = total <= self._unit * self._unit * _LIMIT
        self._rows += filled
        for sums, part in zip(self._sums, parts, strict=True):
            sums += part.sum(kept).reshape(sums.shape)

    def take(self) -> Ints:
        """int64[P], blocks in order, each flattened, in grid units. Begins a new sum."""
        flat = [
            (sums >> self._shift if isinstance(block, OuterRows) else sums).reshape(-1)
            for block, sums in zip(self._blocks, self._sums, strict=True)
        ]
        self.clear()
        return np.concatenate(flat)


class _Part:
    """One parameter's gradients of one batch: float64 at first, then integers in float64."""

    def __init__(self, block: WholeRows | OuterRows, outs: Sequence[NDArray[Any]], filled: int) -> None:
        if isinstance(block, WholeRows):
            self._left = _float64(outs[block.output], filled)
            self._right = None
            self.squares = np.einsum("bi,bi->b", self._left, self._left)
        else:
            self._left = _float64(outs[block.left], filled)
            self._right = _float64(outs[block.right], filled)
            self._right_squares = np.einsum("bi,bi->b", self._right, self._right)
            self.squares = np.einsum("bi,bi->b", self._left, self._left) * self._right_squares

    def quantise(
        self, factor: NDArray[np.float64], alive: NDArray[np.bool_], *, unit: float, bits: int, shift: int
    ) -> NDArray[np.float64]:
        """Turn into integers, and give each row's norm² in grid units. `factor`: clip factor / C; 0 for a dead row,
        whose entries (NaN times 0 is NaN) become 0."""
        left, right = self._left, self._right
        if right is None:
            left *= (factor * unit)[:, None]
        else:
            norms = np.sqrt(self._right_squares)
            left *= (factor * norms * 2.0**bits)[:, None]
            right *= np.where(norms > 0.0, 2.0**bits / norms, 0.0)[:, None]
            np.trunc(right, out=right)
            right[~alive] = 0.0
        np.trunc(left, out=left)
        left[~alive] = 0.0
        squares: NDArray[np.float64] = np.einsum("bi,bi->b", left, left)
        if right is not None:
            squares = squares * np.einsum("bi,bi->b", right, right) * 4.0**-shift
        return squares

    def sum(self, kept: NDArray[np.bool_]) -> Ints:
        """Σ over the rows that are kept: exact, see the module's text."""
        if not kept.all():
            self._left[~kept] = 0.0
        total = self._left.sum(axis=0) if self._right is None else self._left.T @ self._right
        return total.astype(np.int64)


def _float64(values: NDArray[Any], filled: int) -> NDArray[np.float64]:
    """The first `filled` rows as a fresh float64 [filled, entries]."""
    return np.array(values[:filled], dtype=np.float64, order="C").reshape(filled, -1)
