"""One step of DP-SGD up to its noise: f(S) = Σ_{b in S} clip(g_b) over a Poisson sample S, as exact integers.

Legend: R rows of the split, B rows of a batch, C clip norm, g grid_bits, P entries of all gradients together, q
sampling rate, k bits of a factor, s = 2k - g.

**Sample.** Every row is in S independently with probability q = threshold / 2^32: 32 bits of the generator per row,
compared with the threshold. |S| is random, zero included. Row r is always fed at place r mod B of a batch of B rows:
floats may have other last digits at another place, so a row's place must not depend on who else is in S. A batch has
one row of S at most for each place; places without one hold rows whose outputs are ignored.

**Row.** From the Plan's outputs g_b (float32) come norms in float64, and the factor f = min(1, C/|g_b|)/C. A row whose
norm is NaN or infinite counts as zero. One grid unit is C / 2^g.

- `WholeRows`: v = trunc(2^g f g_b), integers in grid units.
- `OuterRows` A_b ⊗ C_b: a = trunc(2^k √f A_b) and c = trunc(2^k √f C_b), two integer vectors; the row's entry is
  a_i c_j in units of 2^-s of the grid, and its norm² is |a|² |c|² without ever making the matrix.
- A bias whose rows are the left factors themselves (`WholeRows.rides`) joins its matrix: a ⊗ (c, u), u = trunc(2^k √f),
  of norm² |a|² (|c|² + u²).

**The bound is checked, not assumed.** t = Σ |v|² + Σ |a|²(|c|² + u²) / 4^s is computed in float64 from the integers; a
row with t > 4^g (1 - 2^-24) is dropped (floats never bring one there: factors are smaller by 2^-20). The sum of n terms
has a relative error below (n + 3) 2^-53, so for n <= 2^28 entries the true integer norm² of a row that stays is <= 4^g.

**The sum is exact.** |a_i c_j| <= 2^2k, so Σ over a batch stays below B 2^2k <= 2^53, where a float64 product of
matrices is exact in whatever order it adds, and over batches Σ stays below R 2^2k <= 2^62, R the rows of the split:
k = min(20, (53 - log2 B)/2, (62 - log2 R)/2). At the end all entries, in units of 2^-s, are shifted to the grid,
F >> s (floor).

**Cost.** A small model's step is made of NumPy calls of a microsecond each. So all factors of all layers lie side by
side in one matrix, and each step above is one call for all of them; `benchmarks/privacy.py` measures it.

So with and without a row, the same coins for all others, the results differ by at most `privacy.rows.row_bound` in
squared L2 norm, as integers. What this rests on besides: the Plan's output for row b is a function of that row (proven
for the Plan by `require_separable`) and of its place, whatever else is in the batch (tried out by `private_apart`).
What it does not hide: time, which grows with |S|.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final, TypeGuard

import numpy as np
from numpy.typing import NDArray

from sordino_agent.errors import BadCommand
from sordino_common.errors import LocalError
from sordino_common.plan.gradients import OuterRows, RowBlock, RowGradients, WholeRows
from sordino_common.privacy.mechanism import FULL_SAMPLING
from sordino_common.privacy.rows import MAX_ROW_GRID_BITS, row_bound

RandomBytes = Callable[[int], bytes]
Ints = NDArray[np.int64]
Floats = NDArray[np.float64]
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


def batches_of(sample: Rows, batch_rows: int, rows: int) -> Iterator[tuple[Rows, NDArray[np.bool_]]]:
    """(B row numbers, which of them count): the ascending `sample` of `rows` rows, row r at place r mod B. Batch k has
    the k-th row of the sample for each place, and where there is none the place's first row, which does not count."""
    first = np.minimum(np.arange(batch_rows), max(0, rows - 1))
    places = sample % batch_rows
    order = np.argsort(places, kind="stable")
    found = np.bincount(places, minlength=batch_rows)
    # Place by place: how many of its rows came before.
    ranks = np.arange(len(sample)) - np.repeat(np.cumsum(found) - found, found)
    for rank in range(int(found.max(initial=0))):
        part = sample[order[ranks == rank]]
        batch, counted = first.copy(), np.zeros(batch_rows, dtype=np.bool_)
        batch[part % batch_rows] = part
        counted[part % batch_rows] = True
        yield batch, counted


def expected_batches(rows: int, batch_rows: int, threshold: int) -> int:
    """About how many batches a sample takes: the fullest of B places, each with a Poisson number of rows."""
    mean = rows / batch_rows * threshold / FULL_SAMPLING
    fullest = mean + math.sqrt(2.0 * mean * math.log(batch_rows + 1.0)) + 1.0
    return max(1, min(-(-rows // batch_rows), math.ceil(fullest)))


class RowSum:
    """f(S) of one Plan's gradients: `add` batch after batch, then `take`. No sample has more than `most_rows`: the rows
    of the split, a number that is public. Raises `BadCommand` for what it can't do exactly: more than 2^28 entries,
    batches of more than 2^33 rows, a split of more than 2^40, a grid finer than 2^-20."""

    def __init__(self, gradients: RowGradients, *, clip_norm: float, grid_bits: int, most_rows: int) -> None:
        self.length: Final = sum(math.prod(block.shape) for block in gradients.blocks)
        if any(0 in block.shape for block in gradients.blocks):
            raise BadCommand("clipping rows: a parameter without entries has no gradient")
        if not 1 <= grid_bits <= MAX_ROW_GRID_BITS or not 1e-30 <= clip_norm <= 1e30:
            raise BadCommand(
                f"clipping rows: grid_bits from 1 to {MAX_ROW_GRID_BITS} and clip_norm from 1e-30 to 1e30 are taken, "
                f"got {grid_bits} and {clip_norm}"
            )
        bits = min((53 - (gradients.rows - 1).bit_length()) // 2, (62 - max(0, most_rows - 1).bit_length()) // 2)
        if self.length > _MOST_ENTRIES or bits < grid_bits // 2 + 1:
            raise BadCommand(
                f"clipping rows: gradients of {self.length} entries of {most_rows} rows in batches of {gradients.rows} "
                f"can't be added exactly on a grid of {grid_bits} bits; at most 2^28 entries, and smaller batches"
            )
        self.sensitivity_squared: Final = row_bound(self.length, grid_bits)
        self._bits = min(_FACTOR_BITS, bits)
        self._shift = 2 * self._bits - grid_bits
        self._clip_norm = clip_norm
        self._grid_bits = grid_bits
        self._most_rows = most_rows
        self._flat = np.zeros(self.length)  # the sum of one batch, in units of 2^-s of the grid
        places = _places(gradients.blocks, self._flat)
        self._pairs = _Pairs(gradients, places)
        self._others = _Others(gradients, places)
        self.clear()

    def clear(self) -> None:
        """Begin a new sum."""
        self._rows = 0
        self._total: Ints = np.zeros(self.length, dtype=np.int64)

    def add(self, outs: Sequence[NDArray[Any]], counted: NDArray[np.bool_]) -> None:
        """Add the `counted` [B] rows of a run of the gradient Plan, whose outputs are `outs`; they are only read."""
        count = int(np.count_nonzero(counted))
        if self._rows + count > self._most_rows:
            raise LocalError(f"a sample of more than the {self._most_rows} rows that there are")
        pairs, others, clip_norm = self._pairs, self._others, self._clip_norm
        with np.errstate(all="ignore"):  # what overflows or is NaN is dropped below
            squares = pairs.load(outs) + others.load(outs)
            factor = np.maximum(squares, clip_norm * clip_norm)
            np.sqrt(factor, out=factor)
            np.divide(_SHRINK, factor, out=factor)  # f: 0 or NaN where the norm is
            if count < len(counted):
                factor[~counted] = 0.0
            ours = pairs.quantise(factor, 2.0**self._bits) * 4.0**-self._shift
            total: Floats = np.asarray(ours + others.quantise(factor, 2.0**self._grid_bits))
            limit = 4.0**self._grid_bits * _LIMIT
            if not np.maximum.reduce(total, initial=0.0) <= limit:  # NaN is not
                dropped = np.logical_not(total <= limit)
                pairs.drop(dropped)
                others.drop(dropped)
        pairs.sum()
        others.sum(2.0**self._shift)
        self._rows += count
        self._total += self._flat.astype(np.int64)

    def integers(self) -> list[NDArray[Any]]:
        """What each row of the batch that was added last has given, [B, ...]."""
        return [self._pairs.whole.copy(), self._others.values.copy()]

    def take(self) -> Ints:
        """int64[P], blocks in order, each flattened, in grid units. Begins a new sum."""
        total: Ints = self._total >> self._shift
        self.clear()
        return total


def _places(blocks: Sequence[RowBlock], flat: Floats) -> dict[str, Floats]:
    """Where in `flat` each block's sum belongs, in the block's shape."""
    places: dict[str, Floats] = {}
    begin = 0
    for block in blocks:
        end = begin + math.prod(block.shape)
        places[block.name] = flat[begin:end].reshape(block.shape)
        begin = end
    return places


class _Pairs:
    """All outer products of a batch. Columns of the matrices: the lefts of all pairs, then the rights, each followed by
    a one if a bias rides on the pair."""

    def __init__(self, gradients: RowGradients, places: dict[str, Floats]) -> None:
        pairs = [block for block in gradients.blocks if isinstance(block, OuterRows)]
        riders = {block.rides: block for block in gradients.blocks if _rides(block)}
        self._ones = np.ones((gradients.rows, 1), dtype=np.float32)
        self._lefts = [block.left for block in pairs]
        self._rights: list[int | None] = []  # None: the column of ones
        self._count = len(pairs)
        width = sum(sum(block.shape) + (block.left in riders) for block in pairs)
        self._given = np.zeros((gradients.rows, width))
        self.whole = np.zeros_like(self._given)
        self._squares = np.zeros_like(self._given)
        self._products: list[tuple[Floats, Floats, Floats]] = []
        lefts: list[int] = []
        rights: list[int] = []
        left, right = 0, sum(block.shape[0] for block in pairs)
        for block in pairs:
            m, n = block.shape
            lefts.append(left)
            rights.append(right)
            columns = self.whole[:, left : left + m].T
            self._products.append((columns, self.whole[:, right : right + n], places[block.name]))
            self._rights.append(block.right)
            left, right = left + m, right + n
            rider = riders.get(block.left)
            if rider is not None:
                self._products.append((columns, self.whole[:, right], places[rider.name]))
                self._rights.append(None)
                right += 1
        self._begins = np.array(lefts + rights)

    def load(self, outs: Sequence[NDArray[Any]]) -> Floats | float:
        """Take a batch; Σ |A_b|² (|C_b|² + 1 for a rider), [B]."""
        if not self._count:
            return 0.0
        parts = [outs[place] for place in self._lefts]
        parts += [self._ones if place is None else outs[place] for place in self._rights]
        np.concatenate(parts, axis=1, out=self._given)
        return self._norms(self._given)

    def quantise(self, factor: Floats, unit: float) -> Floats | float:
        """Integers unit · √f · value, toward zero; their Σ |a|² (|c|² + u²), [B]."""
        if not self._count:
            return 0.0
        scale = np.sqrt(factor)
        scale *= unit
        np.multiply(self._given, scale[:, None], out=self.whole)
        np.trunc(self.whole, out=self.whole)
        return self._norms(self.whole)

    def _norms(self, values: Floats) -> Floats:
        """Σ |left|² |right|² over the pairs. By `reduceat`: the last digits of a product of matrices would depend on a
        row's place in the batch, and so on which other rows are there."""
        np.multiply(values, values, out=self._squares)
        sums = np.add.reduceat(self._squares, self._begins, axis=1)
        norms: Floats = np.einsum("bp,bp->b", sums[:, : self._count], sums[:, self._count :])
        return norms

    def drop(self, dropped: NDArray[np.bool_]) -> None:
        self.whole[dropped] = 0.0

    def sum(self) -> None:
        """Σ over the rows, each to its place: exact, see the module's text."""
        for left, right, place in self._products:
            np.matmul(left, right, out=place)


class _Others:
    """The rows of all other blocks, side by side."""

    def __init__(self, gradients: RowGradients, places: dict[str, Floats]) -> None:
        blocks = [block for block in gradients.blocks if isinstance(block, WholeRows) and not _rides(block)]
        self._outs = [block.output for block in blocks]
        self.values = np.zeros((gradients.rows, sum(math.prod(block.shape) for block in blocks)))
        self._places: list[tuple[slice, Floats]] = []
        begin = 0
        for block in blocks:
            end = begin + math.prod(block.shape)
            self._places.append((slice(begin, end), places[block.name].reshape(-1)))
            begin = end

    def load(self, outs: Sequence[NDArray[Any]]) -> Floats | float:
        """Take a batch; Σ |g_b|², [B]."""
        if not self._outs:
            return 0.0
        rows = len(self.values)
        np.concatenate([outs[place].reshape(rows, -1) for place in self._outs], axis=1, out=self.values)
        return self._norms()

    def quantise(self, factor: Floats, unit: float) -> Floats | float:
        """Integers unit · f · value, toward zero; their Σ |v|², [B]."""
        if not self._outs:
            return 0.0
        self.values *= (factor * unit)[:, None]
        np.trunc(self.values, out=self.values)
        return self._norms()

    def _norms(self) -> Floats:
        norms: Floats = np.einsum("bi,bi->b", self.values, self.values)
        return norms

    def drop(self, dropped: NDArray[np.bool_]) -> None:
        self.values[dropped] = 0.0

    def sum(self, unit: float) -> None:
        """Σ over the rows, in units of 1 / `unit`, each block to its place."""
        if self._outs:
            total = self.values.sum(axis=0)
            for part, place in self._places:
                np.multiply(total[part], unit, out=place)


def _rides(block: RowBlock) -> TypeGuard[WholeRows]:
    return isinstance(block, WholeRows) and block.rides is not None
