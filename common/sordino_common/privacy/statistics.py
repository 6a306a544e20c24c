"""Sufficient statistics as sums of bounded integer vectors: what one row adds, and how far it can move the sum.

Every row gives, for every query, an integer vector v(row); a device sends Σ_rows w·v, and the sensitivity of the whole
answer under adding or removing one row is

    Δ² = Σ_queries w² · max over rows of |v(row)|²                                          (grid units, an integer)

which `sensitivity_squared` computes from the queries alone: no data enter. With u = (value - low) / (high - low), moved
into [0, 1], s = trunc((2u - 1)·2^b) in [-2^b, 2^b], b = `bits`:

    count      (1)                                                                          |v|² = 1
    moments    (2^b, s_1, ⌊s_1²/2^b⌋, s_2, ...)   for C columns                             |v|² <= (2C + 1) 4^b
    histogram  one 1 among 2^b equal bins of [low, high]                                    |v|² = 1
    dyadic     for each level l = 1..b one 1 among 2^l equal bins                           |v|² = b
    gram       upper triangle of z zᵀ, z = (β, s, t): see `gram_bounds`                 |v|² <= (R⁴ + β⁴ + M + T⁴) / 2

For gram, x = 2u - 1 of the D features is scaled down where its Euclidean norm passes `row_norm`, the target cut to
±`target_norm`, and both become integers by truncation toward zero, so that exactly Σ s² <= B², |s_i| <= 2^b, |t| <= T,
with B² = min(⌈row_norm·2^b⌉², D·4^b), T = min(⌈target_norm·2^b⌉, 2^b), β = ⌈bias·2^b⌉, R² = β² + B² + T². Then, since
every pair i < j counts once, and Σ s⁴ <= M = B²·min(B², 4^b),

    Σ_{i<=j} z_i² z_j² = ((Σ z_i²)² + Σ z_i⁴) / 2 <= (R⁴ + β⁴ + M + T⁴) / 2

A row with a value that is not finite gives nothing. A row is looked at on its own, in float64, before it becomes
integers; from there on there is no floating point. Legend: R rows, C columns, Q entries of a query.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from sordino_common.errors import LocalError
from sordino_common.messages.statistics import RangedColumn, RowQuery

Vector = NDArray[np.int64]
MOST_ENTRIES: Final = 1 << 24
_ROWS_AT_ONCE: Final = 4096
_HEADROOM_BITS: Final = 62  # |sum| of a device stays below 2^62


def entries_of(query: RowQuery) -> int:
    """How many integers a query's answer has."""
    match query.kind:
        case "count":
            return 1
        case "moments":
            return 2 * len(query.columns) + 1
        case "histogram":
            return 1 << query.bits
        case "dyadic":
            return (2 << query.bits) - 2
        case "gram":
            width = len(query.columns) + (query.bias > 0.0)
            return width * (width + 1) // 2


def length_of(queries: Sequence[RowQuery]) -> int:
    """Entries of the whole answer, query after query."""
    return sum(map(entries_of, queries))


def gram_bounds(query: RowQuery) -> tuple[int, int, int]:
    """(β, B², T): the bias entry, the bound of the features' squared norm, the bound of the target's size."""
    if query.kind != "gram":
        raise LocalError(f"gram_bounds of a query of kind {query.kind}")
    beta, norm, target = (_ceil_scaled(value, query.bits) for value in (query.bias, query.row_norm, query.target_norm))
    features = len(query.columns) - 1
    return beta, min(norm**2, features << (2 * query.bits)), min(target, 1 << query.bits)


def norm_squared(query: RowQuery) -> int:
    """The most that |v(row)|² can be, without the weight."""
    match query.kind:
        case "count" | "histogram":
            return 1
        case "moments":
            return (2 * len(query.columns) + 1) << (2 * query.bits)
        case "dyadic":
            return query.bits
        case "gram":
            beta, square, target = gram_bounds(query)
            radius = beta**2 + square + target**2
            fourth = square * min(square, 1 << (2 * query.bits))
            return (radius**2 + beta**4 + fourth + target**4 + 1) // 2


def sensitivity_squared(queries: Sequence[RowQuery]) -> int:
    """Δ² of the whole answer under adding or removing one row."""
    return sum(query.weight**2 * norm_squared(query) for query in queries)


def entry_bound(queries: Sequence[RowQuery], rows: int) -> int:
    """No entry of a sum over `rows` rows is larger in size."""
    largest = 0
    for query in queries:
        match query.kind:
            case "count" | "histogram" | "dyadic":
                one = 1
            case "moments":
                one = 1 << query.bits
            case "gram":
                beta, square, target = gram_bounds(query)
                one = max(beta**2, square, target**2)
        largest = max(largest, query.weight * one)
    return largest * rows


def answer(columns: Sequence[RangedColumn], values: Mapping[str, NDArray[Any]], queries: Sequence[RowQuery]) -> Vector:
    """Σ_rows w·v(row), int64 [length_of(queries)]. `values`: the columns by name, each [R].

    Raises `LocalError` if a column is missing or not [R], a query names a column that is not there, or the sum could
    pass 2^62: the caller checks what a peer sent first (`check`)."""
    arrays = [_column(values, column) for column in columns]
    rows = len(arrays[0]) if arrays else max((len(array) for array in values.values()), default=0)
    check(columns, queries, rows)
    if any(len(array) != rows for array in arrays):
        raise LocalError("statistics: the columns have different numbers of rows")
    fine = np.ones(rows, dtype=bool)
    for array in arrays:
        fine &= np.isfinite(array)
    # Half the width first: high - low can be too large for float64 where high/2 - low/2 is not.
    units = [_unit(array[fine], column) for array, column in zip(arrays, columns, strict=True)]
    total = int(fine.sum())
    parts = [_sum(query, [units[place] for place in query.columns], total) * query.weight for query in queries]
    return np.concatenate(parts)


def check(columns: Sequence[RangedColumn], queries: Sequence[RowQuery], rows: int) -> None:
    """Raise `LocalError` unless every query names columns that are there, and no sum can overflow."""
    for query in queries:
        if any(place >= len(columns) for place in query.columns):
            raise LocalError(f"query {query.kind}: names a column beyond the {len(columns)} given")
    if length_of(queries) > MOST_ENTRIES:
        raise LocalError(f"statistics: {length_of(queries)} entries, at most {MOST_ENTRIES}")
    if entry_bound(queries, max(rows, 1)) >> _HEADROOM_BITS:
        raise LocalError(f"statistics: an entry of a sum over {rows} rows could pass 2^{_HEADROOM_BITS}")


def split(queries: Sequence[RowQuery], vector: Vector) -> list[Vector]:
    """The entries of each query, in order."""
    if len(vector) != length_of(queries):
        raise LocalError(f"statistics: {len(vector)} entries, expected {length_of(queries)}")
    cuts = np.cumsum([entries_of(query) for query in queries])[:-1]
    return list(np.split(vector, cuts))


def _ceil_scaled(value: float, bits: int) -> int:
    numerator, denominator = value.as_integer_ratio()  # exact: a float is a dyadic rational
    return -((-numerator << bits) // denominator)


def _column(values: Mapping[str, NDArray[Any]], column: RangedColumn) -> NDArray[np.float64]:
    if column.name not in values or values[column.name].ndim != 1:
        raise LocalError(f"statistics: column {column.name!r} is missing, or not one number a row")
    return values[column.name].astype(np.float64)


def _unit(values: NDArray[np.float64], column: RangedColumn) -> NDArray[np.float64]:
    """u in [0, 1]."""
    inside = np.clip(values, column.low, column.high) / 2
    return np.clip((inside - column.low / 2) / (column.high / 2 - column.low / 2), 0.0, 1.0)


def _sum(query: RowQuery, units: list[NDArray[np.float64]], rows: int) -> Vector:
    match query.kind:
        case "count":
            return np.array([rows], dtype=np.int64)
        case "moments":
            parts = [np.array([rows << query.bits], dtype=np.int64)]
            for unit in units:
                number = _signed(2.0 * unit - 1.0, query.bits)
                parts.append(np.array([number.sum(), ((number * number) >> query.bits).sum()], dtype=np.int64))
            return np.concatenate(parts)
        case "histogram":
            return _bins(units[0], query.bits)
        case "dyadic":
            finest = _bins(units[0], query.bits)
            return np.concatenate([finest.reshape(1 << level, -1).sum(axis=1) for level in range(1, query.bits + 1)])
        case "gram":
            return _gram(query, units, rows)


def _signed(real: NDArray[np.float64], bits: int) -> Vector:
    """trunc(real·2^bits), toward zero."""
    return np.trunc(real * float(1 << bits)).astype(np.int64)


def _bins(unit: NDArray[np.float64], bits: int) -> Vector:
    place = np.minimum((unit * float(1 << bits)).astype(np.int64), (1 << bits) - 1)
    return np.bincount(place, minlength=1 << bits).astype(np.int64)


def _gram(query: RowQuery, units: list[NDArray[np.float64]], rows: int) -> Vector:
    beta, square, target = gram_bounds(query)
    width = len(units) + (beta > 0)
    total = np.zeros((width, width), dtype=np.int64)
    for begin in range(0, rows, _ROWS_AT_ONCE):
        piece = slice(begin, begin + _ROWS_AT_ONCE)
        x = np.stack([2.0 * unit[piece] - 1.0 for unit in units[:-1]], axis=1)
        norms = np.sqrt(np.square(x).sum(axis=1))
        factor = np.minimum(1.0, query.row_norm / np.maximum(norms, np.finfo(np.float64).tiny))
        y = np.clip(2.0 * units[-1][piece] - 1.0, -query.target_norm, query.target_norm)
        s = _signed(x * factor[:, None], query.bits)
        t = np.clip(_signed(y, query.bits), -target, target)
        # Truncation never lengthens a row, but float64's last bit might: such a row counts as zeros.
        s[np.square(s).sum(axis=1) > square] = 0
        columns = [s, t[:, None]] if beta == 0 else [np.full((len(t), 1), beta, dtype=np.int64), s, t[:, None]]
        z = np.concatenate(columns, axis=1)
        total += z.T @ z
    return total[np.triu_indices(width)]
