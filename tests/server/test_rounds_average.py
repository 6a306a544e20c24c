"""The weighted mean against exact rational arithmetic, and its independence of order."""

from __future__ import annotations

from fractions import Fraction

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings

from sordino_common import messages as m
from sordino_common.errors import LocalError
from sordino_common.plan.arrays import from_numpy
from sordino_server.rounds.average import averaged


def reply(rows: int, *updates: np.ndarray) -> m.Trained:
    arrays = tuple(from_numpy(np.asarray(update, np.float32)) for update in updates)
    return m.Trained(run="r", round=1, attempt=0, rows=rows, steps=1, update=arrays, loss_sum=0.0, seconds=0.0)


@settings(deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(1, 1000), st.lists(st.floats(-100, 100, width=32), min_size=3, max_size=3)),
        min_size=1,
        max_size=8,
    ),
    st.randoms(use_true_random=False),
)
def test_equals_exact_arithmetic_in_any_order(entries: list[tuple[int, list[float]]], rng) -> None:  # type: ignore[no-untyped-def]
    start = np.array([0.5, -2.0, 1e-3], np.float32)
    named = [(f"agent-{k}", reply(rows, np.array(update, np.float32))) for k, (rows, update) in enumerate(entries)]
    (result,) = averaged((start,), dict(named))
    rng.shuffle(named)
    assert averaged((start,), dict(named))[0].tobytes() == result.tobytes()
    total = sum(rows for rows, _ in entries)
    for k in range(3):
        exact = Fraction(float(start[k])) + sum(Fraction(u[k]) * rows for rows, u in entries) / total
        assert abs(Fraction(float(result[k])) - exact) <= abs(exact) * Fraction(2) ** -23 + Fraction(2) ** -40


def test_shapes_and_dtypes_are_kept() -> None:
    params = (np.array(1.0, np.float32), np.zeros((0, 4), np.float32), np.arange(6, dtype=np.float32).reshape(2, 3).T)
    updates = [np.asarray(np.ones(p.shape), np.float32) for p in params]
    result = averaged(params, {"a": reply(3, *updates), "b": reply(1, *updates)})
    for before, after in zip(params, result, strict=True):
        assert isinstance(after, np.ndarray)
        assert (after.shape, after.dtype) == (before.shape, before.dtype)
        assert after.flags.c_contiguous
        np.testing.assert_array_equal(after, before + 1)


def test_no_rows_is_our_own_mistake() -> None:
    with pytest.raises(LocalError):
        averaged((np.zeros(2, np.float32),), {})
