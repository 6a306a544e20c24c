"""Σ over rows of what each row gives to a query (`row_queries` defines it and bounds it), as int64.

A row is looked at on its own, in float64, until it becomes integers; from there on there is no floating point. A row
with a value that is not finite gives nothing. Legend: R rows, C columns.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from sordino_common.errors import LocalError
from sordino_common.messages.statistics import RangedColumn, RowQuery, half_width
from sordino_common.privacy.row_queries import check, entries_of, gram_bounds, length_of

Vector = NDArray[np.int64]
_ROWS_AT_ONCE: Final = 4096


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
    units = [_unit(array[fine], column) for array, column in zip(arrays, columns, strict=True)]
    total = int(fine.sum())
    parts = [_sum(query, [units[place] for place in query.columns], total) * query.weight for query in queries]
    return np.concatenate(parts)


def split(queries: Sequence[RowQuery], vector: Vector) -> list[Vector]:
    """The entries of each query, in order."""
    if len(vector) != length_of(queries):
        raise LocalError(f"statistics: {len(vector)} entries, expected {length_of(queries)}")
    cuts = np.cumsum([entries_of(query) for query in queries])[:-1]
    return list(np.split(vector, cuts))


def _column(values: Mapping[str, NDArray[Any]], column: RangedColumn) -> NDArray[np.float64]:
    if column.name not in values or values[column.name].ndim != 1:
        raise LocalError(f"statistics: column {column.name!r} is missing, or not one number a row")
    return values[column.name].astype(np.float64)


def _unit(values: NDArray[np.float64], column: RangedColumn) -> NDArray[np.float64]:
    """u in [0, 1], whatever finite number a value is; so what follows are integers of the size that is claimed."""
    inside = np.clip(values, column.low, column.high) / 2
    unit = np.clip((inside - column.low / 2) / half_width(column.low, column.high), 0.0, 1.0)
    if not np.isfinite(unit).all():
        raise LocalError(f"statistics: column {column.name!r} can't be scaled by its bounds")
    return unit


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
