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

What computes v(row) is `row_sums`. No NumPy here: the daemon prices a question before anything is computed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from sordino_common.errors import LocalError
from sordino_common.messages.statistics import RangedColumn, RowQuery

MOST_ENTRIES: Final = 1 << 24
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


def check(columns: Sequence[RangedColumn], queries: Sequence[RowQuery], rows: int) -> None:
    """Raise `LocalError` unless every query names columns that are there, and no sum can overflow."""
    for query in queries:
        if any(place >= len(columns) for place in query.columns):
            raise LocalError(f"query {query.kind}: names a column beyond the {len(columns)} given")
    if length_of(queries) > MOST_ENTRIES:
        raise LocalError(f"statistics: {length_of(queries)} entries, at most {MOST_ENTRIES}")
    if entry_bound(queries, max(rows, 1)) >> _HEADROOM_BITS:
        raise LocalError(f"statistics: an entry of a sum over {rows} rows could pass 2^{_HEADROOM_BITS}")


def _ceil_scaled(value: float, bits: int) -> int:
    numerator, denominator = value.as_integer_ratio()  # exact: a float is a dyadic rational
    return -((-numerator << bits) // denominator)
