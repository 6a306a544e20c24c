"""What one row adds to the fleet's statistics: against a slow oracle, and never more than the stated sensitivity."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sordino_common.errors import CodecError, LocalError
from sordino_common.messages.statistics import RangedColumn, RowQuery
from sordino_common.privacy import row_queries, row_sums

COLUMNS = (
    RangedColumn(name="a", low=-1.0, high=1.0),
    RangedColumn(name="b", low=0.0, high=1000.0),
    RangedColumn(name="c", low=-1e308, high=1e308),
)
QUERIES = (
    RowQuery(kind="count", columns=(), bits=0, weight=5),
    RowQuery(kind="moments", columns=(0, 1, 2), bits=9, weight=3),
    RowQuery(kind="histogram", columns=(1,), bits=4, weight=1 << 20),
    RowQuery(kind="dyadic", columns=(2,), bits=5, weight=7),
    RowQuery(kind="gram", columns=(0, 1, 2), bits=10, weight=2, row_norm=0.9, target_norm=0.5, bias=0.25),
    RowQuery(kind="gram", columns=(2, 0), bits=3, weight=1, row_norm=2.0, target_norm=1.0),
)
EDGES = [0.0, -0.0, 1.0, -1.0, 0.5, 1000.0, 1e308, -1e308, 5e-324, math.inf, -math.inf, math.nan, 999.9999999999999]
NUMBERS = st.one_of(st.sampled_from(EDGES), st.floats(width=64))


def table(rows: list[tuple[float, float, float]]) -> dict[str, Any]:
    values = np.array(rows, dtype=np.float64).reshape(len(rows), 3)
    return {column.name: values[:, place] for place, column in enumerate(COLUMNS)}


def oracle(row: tuple[float, ...]) -> list[int]:
    """v(row)·w by Python, query after query, in exact arithmetic where the definition is exact."""
    if not all(map(math.isfinite, row)):
        return [0] * row_queries.length_of(QUERIES)
    units = []
    for value, column in zip(row, COLUMNS, strict=True):
        inside = min(max(value, column.low), column.high)
        units.append(min(max((inside / 2 - column.low / 2) / (column.high / 2 - column.low / 2), 0.0), 1.0))
    found: list[int] = []
    for query in QUERIES:
        mine = [units[place] for place in query.columns]
        match query.kind:
            case "count":
                part = [1]
            case "moments":
                part = [1 << query.bits]
                for unit in mine:
                    s = math.trunc((2 * unit - 1) * 2**query.bits)
                    part += [s, s * s >> query.bits]
            case "histogram":
                part = [0] * 2**query.bits
                part[min(math.floor(Fraction(mine[0]) * 2**query.bits), 2**query.bits - 1)] = 1
            case "dyadic":
                part = []
                for level in range(1, query.bits + 1):
                    ones = [0] * 2**level
                    ones[min(math.floor(Fraction(mine[0]) * 2**level), 2**level - 1)] = 1
                    part += ones
            case "gram":
                x = [2 * unit - 1 for unit in mine]
                norm = math.sqrt(sum(v * v for v in x[:-1]))
                factor = min(1.0, query.row_norm / max(norm, 5e-300))
                s_ = [math.trunc(v * factor * 2**query.bits) for v in x[:-1]]
                t = math.trunc(min(max(x[-1], -query.target_norm), query.target_norm) * 2**query.bits)
                beta, _, _ = row_queries.gram_bounds(query)
                z = [beta] * (beta > 0) + [*s_, t]
                part = [z[i] * z[j] for i in range(len(z)) for j in range(i, len(z))]
        found += [query.weight * entry for entry in part]
    return found


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(NUMBERS, NUMBERS, NUMBERS), max_size=6))
def test_the_answer_is_the_sum_of_what_each_row_gives(rows: list[tuple[float, float, float]]) -> None:
    got = row_sums.answer(COLUMNS, table(rows), QUERIES)
    assert got.dtype == np.int64
    want = np.array([oracle(row) for row in rows], dtype=object).reshape(len(rows), row_queries.length_of(QUERIES))
    # The norm of a row is summed in another order than the oracle's: a last bit may move one truncation.
    assert np.abs(got - want.sum(axis=0)).max(initial=0) <= 4096 * len(rows)
    exact = len(row_sums.answer((), {"a": np.zeros(1)}, QUERIES[:1]))
    head = sum(map(row_queries.entries_of, QUERIES[:4]))
    assert exact == 1
    assert (got[:head] == want.sum(axis=0)[:head]).all()


@settings(max_examples=500, deadline=None)
@given(st.tuples(NUMBERS, NUMBERS, NUMBERS), st.lists(st.tuples(NUMBERS, NUMBERS, NUMBERS), max_size=3))
def test_no_row_moves_the_answer_further_than_the_sensitivity(
    row: tuple[float, float, float], others: list[tuple[float, float, float]]
) -> None:
    with_it = row_sums.answer(COLUMNS, table([*others, row]), QUERIES)
    without = row_sums.answer(COLUMNS, table(others), QUERIES)
    moved = [int(entry) for entry in with_it - without]
    assert sum(entry * entry for entry in moved) <= row_queries.sensitivity_squared(QUERIES)
    parts = row_sums.split(QUERIES, with_it - without)
    for query, part in zip(QUERIES, parts, strict=True):
        size = sum(int(entry) ** 2 for entry in part)
        assert size <= query.weight**2 * row_queries.norm_squared(query), query.kind


@pytest.mark.parametrize("query", QUERIES, ids=lambda query: query.kind)
def test_the_sensitivity_is_not_far_from_what_some_row_does(query: RowQuery) -> None:
    """A bound that is much too large would drown the answer in noise."""
    rng = np.random.Generator(np.random.PCG64(1))
    largest = 0
    for corner in [*rng.choice([0.0, 0.5, 1.0], size=(200, 3)).tolist(), [1.0, 1.0, 1.0], [0.5, 1.0, 1.0]]:
        row = tuple(column.low * (1 - unit) + column.high * unit for unit, column in zip(corner, COLUMNS, strict=True))
        got = row_sums.answer(COLUMNS, table([row]), (query,))  # type: ignore[list-item]
        largest = max(largest, sum(int(entry) ** 2 for entry in got))
    assert largest >= 0.6 * query.weight**2 * row_queries.norm_squared(query)


def test_a_row_with_a_number_that_is_none_gives_nothing() -> None:
    got = row_sums.answer(COLUMNS, table([(0.1, 3.0, math.nan), (math.inf, 3.0, 0.0)]), QUERIES)
    assert not got.any()


def test_entries_stay_below_the_stated_bound() -> None:
    rng = np.random.Generator(np.random.PCG64(2))
    rows = [tuple(row) for row in (rng.random((300, 3)) * [2, 1000, 2e308 / 2] - [1, 0, 5e307]).tolist()]
    got = row_sums.answer(COLUMNS, table(rows), QUERIES)  # type: ignore[arg-type]
    assert np.abs(got).max() <= row_queries.entry_bound(QUERIES, 300)


def test_what_can_not_be_asked_is_refused_before_anything_is_computed() -> None:
    two = {"a": np.zeros(2), "b": np.zeros(3)}
    with pytest.raises(LocalError, match="beyond the 1 given"):
        row_sums.answer(COLUMNS[:1], two, (RowQuery(kind="histogram", columns=(1,), bits=2),))
    with pytest.raises(LocalError, match="different numbers of rows"):
        row_sums.answer(COLUMNS[:2], two, (QUERIES[0],))
    with pytest.raises(LocalError, match="'c' is missing"):
        row_sums.answer(COLUMNS, two, (QUERIES[0],))
    with pytest.raises(LocalError, match="could pass 2\\^62"):
        row_queries.check(COLUMNS, (RowQuery(kind="count", columns=(), bits=0, weight=1 << 32),), 1 << 31)
    with pytest.raises(LocalError, match="entries, at most"):
        row_queries.check(COLUMNS, (RowQuery(kind="histogram", columns=(0,), bits=16),) * 257, 1)


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"kind": "gram", "columns": (0, 1), "bits": 4}, "row_norm and a target_norm"),
        ({"kind": "histogram", "columns": (0,), "bits": 4, "row_norm": 1.0, "target_norm": 1.0}, "and no other"),
        ({"kind": "histogram", "columns": (0, 1), "bits": 4}, "expected 1 to 1"),
        ({"kind": "moments", "columns": (0, 0), "bits": 4}, "named twice"),
        ({"kind": "moments", "columns": (0,), "bits": 4, "bias": 1.0}, "only the query gram"),
        ({"kind": "count", "columns": (), "bits": 4}, "count has 0"),
        ({"kind": "dyadic", "columns": (0,), "bits": 0}, "at least 1"),
    ],
)
def test_malformed_queries_are_refused(fields: dict[str, Any], text: str) -> None:
    with pytest.raises(CodecError, match=text):
        RowQuery(**fields)


@pytest.mark.parametrize(("low", "high"), [(1.0, 1.0), (2.0, 1.0), (math.nan, 1.0), (0.0, math.inf)])
def test_malformed_ranges_are_refused(low: float, high: float) -> None:
    with pytest.raises(CodecError, match="expected finite, low < high"):
        RangedColumn(name="a", low=low, high=high)


@pytest.mark.parametrize(("low", "high"), [(0.0, 5e-324), (-5e-324, 0.0), (1.5e-323, 2e-323), (-0.0, 0.0), (1.0, 1.0)])
def test_bounds_that_nothing_can_be_scaled_by_are_no_message(low: float, high: float) -> None:
    """Half their width is 0: every value became NaN, NaN the smallest int64, and a sum told noiselessly whether its
    rows are odd in number."""
    with pytest.raises(CodecError, match="expected finite, low < high"):
        RangedColumn(name="a", low=low, high=high)


@given(low=st.floats(allow_nan=False, allow_infinity=False), high=st.floats(allow_nan=False, allow_infinity=False))
@settings(deadline=None)
def test_whatever_bounds_are_taken_no_row_adds_more_than_is_claimed(low: float, high: float) -> None:
    try:
        column = RangedColumn(name="a", low=low, high=high)
    except CodecError:
        return
    for query in (RowQuery(kind="moments", columns=(0,), bits=9), RowQuery(kind="dyadic", columns=(0,), bits=5)):
        for value in (low, high, np.nextafter(low, high), low / 2 + high / 2, *EDGES):
            found = row_sums.answer((column,), {"a": np.array([value])}, (query,))
            assert sum(int(entry) ** 2 for entry in found) <= row_queries.norm_squared(query)
