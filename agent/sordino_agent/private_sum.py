"""One step of DP-SGD up to its noise: f(S) = Σ_{b in S} clip(g_b) over a Poisson sample S, as exact integers.

Legend: R rows of the split, B rows of a batch, C clip norm, g grid_bits, P entries of all gradients together, q
sampling rate, k bits of a factor, s = 2k - g.

**Sample.** Every row is in S independently with probability q = threshold / 2^32: 32 bits of the generator per row,
compared with the threshold. |S| is random, zero included. Row r is always fed at place r mod B of a batch of B rows:
floats may have other last digits at another place, so a row's place must not depend on who else is in S. A batch has
one row of S at most for each place; places without one hold rows whose outputs are ignored.

**Row.** From the Plan's outputs g_b (float32) come N = |g_b|² in float64, f = min(1, C/√N)/C, and one scale
for all of the row: y = 4^k f, z = √y. A row whose N is NaN or infinite counts as zero. One grid unit is C / 2^g.

- `WholeRows`: v = trunc(2^g f g_b) = trunc(y 2^(g-2k) g_b), integers in grid units.
- `OuterRows` A_b ⊗ C_b: a = trunc(z A_b) and c = trunc(z C_b), two integer vectors; the row's entry is a_i c_j in
  units of 2^-s of the grid, and its norm² is |a|² |c|² without ever making the matrix.
- A bias whose rows are the left factors themselves (`WholeRows.rides`) joins its matrix: a ⊗ (c, u), u = trunc(z), of
  norm² |a|² (|c|² + u²).

**The bound is computed, row by row.** t = y² N, in units of 2^-4k of a squared clip norm, comes in float64 from the
very scale and the very numbers that are made integers of. A row with t > 2^4k (1 - 2^-24), or NaN, is dropped (floats
never bring one there but for NaN: factors are smaller by 2^-20). What t says holds for the integers: rounding toward
zero lengthens nothing, so an integer's size is at most that of the float product, z |x| (1 + 2^-53) with
z <= √y (1 + 2^-53), or y |x| (1 + 2^-53); a sum of n squares loses at most a part of (n + 3) 2^-53, t's own two
products 2 · 2^-53. So the true integer norm² is below t (1 + (n + 14) 2^-53) 4^(g-2k), and for n <= 2^28 entries that
of a row that stays is at most 4^g. `tests/agent/test_private_sum.py` holds the integers themselves against it, by
Python's arithmetic.

**Behind the Plan a row has no place.** Of a batch that is not full, the rows that count wait until there are B of them,
so that a sample of some B rows is clipped and added about once, however many batches the Plan takes for it. What is
done with a row does not depend on where it waits: each entry is rounded by itself, as IEEE has it, sums of integers are
exact, and Σ squares of a factor is a library's call for that row alone, of one shape and, as rows are padded to 64
bytes, of one alignment.

**The sum is exact.** |a_i c_j| <= 2^2k, so Σ over a batch stays below B 2^2k <= 2^53, where a float64 product of
matrices is exact in whatever order it adds, and over batches Σ stays below R 2^2k <= 2^62, R the rows of the split:
k = min(20, (53 - log2 B)/2, (62 - log2 R)/2). At the end all entries, in units of 2^-s, are shifted to the grid,
F >> s (floor).

**Cost.** All factors of all L layers lie side by side in one matrix of W columns, so that scaling and rounding are one
call each, and a bias is one column more of its matrix's product. What a batch takes, call by call: 2L to load the
matrix (float32 to float64) and as many for N, L for the ones of biases, L to put N together, 4 for the scales, 2 to
scale and round, L products of matrices, 3 to hold the bounds against the limit, 3 to make int64 of the sum, to order
and to shift it. For a small batch these are some 30 calls of half a microsecond to three; for a large one, 52 bytes for
each of B W entries that the passes move, and products that read 8 bytes where a plain step's read 4.
`benchmarks/privacy.py` measures it, beside the fewest calls that any such sum takes.

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
_SHRINK: Final = 1.0 - 2.0**-21  # of z, so 2^-20 of f
_LIMIT: Final = 1.0 - 2.0**-24
_MOST_ENTRIES: Final = 1 << 28
_FEW_ENTRIES: Final = 1 << 16
_LINE: Final = 8  # float64 in 64 bytes


def poisson_sample(rows: int, threshold: int, random: RandomBytes = os.urandom) -> Rows:
    """Ascending row numbers in [0, rows), each taken independently with probability `threshold` / 2^32, exactly."""
    if not 1 <= threshold <= FULL_SAMPLING or rows < 0:
        raise LocalError(f"poisson_sample: threshold in [1, 2^32] and rows >= 0, got {threshold} and {rows}")
    coins = np.frombuffer(random(4 * rows), dtype="<u4")
    return np.flatnonzero(coins <= np.uint32(threshold - 1))


def batches_of(sample: Rows, batch_rows: int, rows: int) -> Iterator[tuple[Rows, NDArray[np.bool_]]]:
    """(B row numbers, which of them count): the ascending `sample` of `rows` rows, row r at place r mod B. Batch k has
    the k-th row of the sample for each place, and where there is none the place's first row, which does not count."""
    if not len(sample):
        return
    places = sample % batch_rows
    order = np.argsort(places, kind="stable")
    found = np.bincount(places, minlength=batch_rows)
    # Place by place: how many of its rows came before.
    ranks = np.arange(len(sample)) - np.repeat(np.cumsum(found) - found, found)
    where = ranks * batch_rows + places[order]
    batches = int(ranks.max()) + 1
    table = np.empty((batches, batch_rows), dtype=np.int64)
    table[:] = np.minimum(np.arange(batch_rows), rows - 1)
    counted = np.zeros((batches, batch_rows), dtype=np.bool_)
    table.put(where, sample[order])
    counted.put(where, True)
    yield from zip(table, counted, strict=True)


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
        self._most_rows = most_rows
        self._least = clip_norm * clip_norm
        self._whole = _SHRINK * _SHRINK * 4.0**self._bits
        self._limit = 16.0**self._bits * _LIMIT
        self._scale = np.zeros(gradients.rows)  # z² and then z
        self._length = np.zeros(gradients.rows)  # t
        self._stays = np.zeros(gradients.rows, dtype=np.bool_)
        self._batch = gradients.rows
        self._flat = np.zeros(self.length)  # the sum of one batch, in units of 2^-s of the grid
        self._total: Ints = np.zeros(self.length, dtype=np.int64)  # of all batches so far
        self._pairs = _Pairs(gradients, self._flat, self._scale)
        unit = 2.0 ** (grid_bits - 2 * self._bits)
        self._others = _Others(gradients, self._flat[self._pairs.length :], self._scale, unit)
        # The blocks' parts of the total, in the blocks' order; and where their entries lie in it, if they are few.
        self._parts = self._in_order(gradients, self._total)
        few = self.length <= _FEW_ENTRIES
        self._order = np.concatenate(self._in_order(gradients, np.arange(self.length)), axis=None) if few else None
        self.clear()

    def clear(self) -> None:
        """Begin a new sum."""
        self._rows = self._waiting = 0
        self._begun = False  # until then `_total` is of the sum before

    def add(self, outs: Sequence[NDArray[Any]], counted: NDArray[np.bool_]) -> None:
        """Add the `counted` [B] rows of a run of the gradient Plan, whose outputs are `outs`; they are only read.

        To be called with NumPy's floating-point warnings off (`np.errstate`, once for many batches): rows that
        overflow or are NaN are no errors, they are dropped."""
        count = len(counted) - counted.tobytes().count(0)  # a quarter of what NumPy's own count takes for so few
        if self._rows + count > self._most_rows:
            raise LocalError(f"a sample of more than the {self._most_rows} rows that there are")
        if self._waiting + count > self._batch:
            self._settle()
        if count == self._batch:
            self._pairs.load(outs)
            self._others.load(outs)
        elif count:
            rows, places = np.flatnonzero(counted), slice(self._waiting, self._waiting + count)
            self._pairs.load_some(outs, rows, places)
            self._others.load_some(outs, rows, places)
        self._rows += count
        self._waiting += count
        if self._waiting == self._batch:
            self._settle()

    def _settle(self) -> None:
        """Clip the rows that wait, and add them to the total. Places behind them hold rows that were settled before."""
        pairs, others, z, t = self._pairs, self._others, self._scale, self._length
        squares = pairs.squares() + others.squares()
        np.maximum(squares, self._least, out=z)
        np.sqrt(z, out=z)
        np.divide(self._whole, z, out=z)  # z²: 0 or NaN where the norm is infinite or NaN
        if self._waiting < self._batch:
            z[self._waiting :] = 0.0
        np.multiply(z, z, out=t)
        np.multiply(t, squares, out=t)
        others.quantise()
        np.sqrt(z, out=z)
        pairs.quantise()
        stays = np.less_equal(t, self._limit, out=self._stays)  # NaN is not
        if 0 in stays.tobytes():
            pairs.drop(~stays)
            others.drop(~stays)
        pairs.sum()
        others.sum()
        # The entries are integers below 2^53: as such they are added.
        if self._begun:
            np.add(self._total, self._flat, out=self._total, dtype=np.int64, casting="unsafe")
        else:
            self._total[:] = self._flat
        self._begun = True
        self._waiting = 0

    def integers(self) -> list[NDArray[Any]]:
        """What each row of a whole batch that was added last has given, [B, ...]."""
        return [self._pairs.rows.copy(), self._others.rows.copy()]

    def take(self) -> Ints:
        """int64[P], blocks in order, each flattened, in grid units. Begins a new sum."""
        if self._waiting:
            with np.errstate(all="ignore"):
                self._settle()
        if not self._begun:
            self._total.fill(0)
        # One call for all parts costs less than one for each, but it takes a table as large as the sum.
        order, total = self._order, self._total
        total = np.concatenate(self._parts, axis=None) if order is None else total.take(order)
        np.right_shift(total, self._shift, out=total)
        self.clear()
        return total

    def _in_order(self, gradients: RowGradients, total: Ints) -> list[Ints]:
        """The parts of such a vector as the sum is written to, in the blocks' order."""
        places = self._pairs.places(total) | self._others.places(total[self._pairs.length :])
        return [places[block.name] for block in gradients.blocks]


class _Pairs:
    """All outer products of a batch. Columns of the matrix: the lefts of all pairs, then the rights, each followed by a
    one if a bias rides on the pair. The sum is an [M, N] or [M, N + 1] for each pair, one after the other in `flat`."""

    def __init__(self, gradients: RowGradients, flat: Floats, scale: Floats) -> None:
        """`scale` [B]: where the rows' scales will be found."""
        pairs = [block for block in gradients.blocks if isinstance(block, OuterRows)]
        riders = {block.rides: block for block in gradients.blocks if _rides(block)}
        self._count = len(pairs)
        self._scale = scale[:, None]
        self._shapes: list[tuple[str, tuple[int, int], str | None]] = []  # matrix, its shape with a bias, the bias
        for block in pairs:
            rider = riders.get(block.left)
            m, n = block.shape
            self._shapes.append((block.name, (m, n + (rider is not None)), None if rider is None else rider.name))
        lefts, rights = ([shape[side] for _, shape, _ in self._shapes] for side in (0, 1))
        self._whole = _lines(gradients.rows, sum(lefts) + sum(rights))
        self.rows = self._whole[:, : sum(lefts) + sum(rights)]
        factors = np.split(self.rows, np.cumsum([*lefts, *rights])[:-1], axis=1)
        # By factor: where it lies in a run's outputs, and in the matrix; a rider's ones stand right of it.
        sources = [block.left for block in pairs] + [block.right for block in pairs]
        widths = [block.shape[side] for side in (0, 1) for block in pairs]
        self._loads = [(source, all_[:, :width]) for source, all_, width in zip(sources, factors, widths, strict=False)]
        self._ones = [all_[:, width:] for all_, width in zip(factors, widths, strict=False) if all_.shape[1] > width]
        # Each factor's Σ squares, [2 pairs, B]: all lefts before all rights.
        norms = np.zeros((2 * len(pairs), gradients.rows))
        self._squares = list(zip(factors, norms, strict=False))
        self._left_norms, self._right_norms = norms[: len(pairs)], norms[len(pairs) :]
        self._norms = np.zeros((len(pairs), gradients.rows))
        self._norm, self._more = self._norms[0] if pairs else self._norms, list(self._norms[1:])
        self._products: list[tuple[Floats, Floats, Floats]] = []
        self.length = 0
        for (_, (m, n), _), left, right in zip(self._shapes, factors, factors[len(pairs) :], strict=False):
            place = flat[self.length : self.length + m * n].reshape(m, n)
            self._products.append((left.T, right, place))
            self.length += m * n

    def places(self, flat: Ints) -> dict[str, Ints]:
        """By block: its part of such a vector as the sum is written to, in the block's shape."""
        places: dict[str, Ints] = {}
        begin = 0
        for name, (m, n), rider in self._shapes:
            part = flat[begin : begin + m * n].reshape(m, n)
            places[name] = part if rider is None else part[:, :-1]
            if rider is not None:
                places[rider] = part[:, -1]
            begin += m * n
        return places

    def load(self, outs: Sequence[NDArray[Any]]) -> None:
        """Take a batch."""
        for place, part in self._loads:
            part[:] = outs[place]

    def load_some(self, outs: Sequence[NDArray[Any]], rows: Rows, places: slice) -> None:
        """Take `rows` of a batch to `places`."""
        for place, part in self._loads:
            part[places] = outs[place].take(rows, axis=0)

    def squares(self) -> Floats | float:
        """Σ |A_b|² (|C_b|² + 1 for a rider), [B]. Row by row: the last digits of a product of matrices would depend on
        a row's place."""
        if not self._count:
            return 0.0
        for part in self._ones:
            part.fill(1.0)
        for factor, squares in self._squares:
            np.vecdot(factor, factor, out=squares)
        np.multiply(self._left_norms, self._right_norms, out=self._norms)
        for more in self._more:
            np.add(self._norm, more, out=self._norm)
        return self._norm

    def quantise(self) -> None:
        """Integers z · value, toward zero."""
        if self._count:
            np.multiply(self._whole, self._scale, out=self._whole)
            np.trunc(self._whole, out=self._whole)

    def drop(self, dropped: NDArray[np.bool_]) -> None:
        self._whole[dropped] = 0.0

    def sum(self) -> None:
        """Σ over the rows, each to its place: exact, see the module's text."""
        for left, right, place in self._products:
            np.matmul(left, right, out=place)


class _Others:
    """The rows of all other blocks, side by side."""

    def __init__(self, gradients: RowGradients, flat: Floats, scale: Floats, unit: float) -> None:
        """`scale` [B]: where the squares of the rows' scales will be found; `unit`: what they are multiplied by."""
        self._blocks = [block for block in gradients.blocks if isinstance(block, WholeRows) and not _rides(block)]
        ends = np.cumsum([0, *(math.prod(block.shape) for block in self._blocks)])
        self._values = _lines(gradients.rows, int(ends[-1]))
        self.rows = self._values[:, : int(ends[-1])]
        parts = np.split(self.rows, ends[1:-1], axis=1)
        self._loads = [(block.output, part) for block, part in zip(self._blocks, parts, strict=False)]
        self._flat = flat
        self._scale = scale
        self._unit = unit

    def places(self, flat: Ints) -> dict[str, Ints]:
        """By block: its part of such a vector as the sum is written to."""
        ends = np.cumsum([math.prod(block.shape) for block in self._blocks])
        return {block.name: part for block, part in zip(self._blocks, np.split(flat, ends), strict=False)}

    def load(self, outs: Sequence[NDArray[Any]]) -> None:
        """Take a batch."""
        for place, part in self._loads:
            part[:] = outs[place].reshape(part.shape)

    def load_some(self, outs: Sequence[NDArray[Any]], rows: Rows, places: slice) -> None:
        """Take `rows` of a batch to `places`."""
        for place, part in self._loads:
            part[places] = outs[place].take(rows, axis=0).reshape(len(rows), -1)

    def squares(self) -> Floats | float:
        """Σ |g_b|², [B]."""
        if not self._blocks:
            return 0.0
        norms: Floats = np.einsum("bi,bi->b", self._values, self._values)
        return norms

    def quantise(self) -> None:
        """Integers z² · unit · value, toward zero."""
        if self._blocks:
            self._values *= (self._scale * self._unit)[:, None]
            np.trunc(self._values, out=self._values)

    def drop(self, dropped: NDArray[np.bool_]) -> None:
        self._values[dropped] = 0.0

    def sum(self) -> None:
        """Σ over the rows, in units of 2^-s of the grid, to its place."""
        if self._blocks:
            np.add.reduce(self.rows, axis=0, out=self._flat)
            self._flat /= self._unit


def _lines(rows: int, width: int) -> Floats:
    """Zeros [rows, width or a few more]: every row begins at the same place of a cache line, so that a library that
    goes by where a vector lies does the same to each."""
    return np.zeros((rows, -(-width // _LINE) * _LINE))


def _rides(block: RowBlock) -> TypeGuard[WholeRows]:
    return isinstance(block, WholeRows) and block.rides is not None
