"""What the server makes of noised sums: without noise the plain answers, with noise answers as good as is stated."""

from __future__ import annotations

import numpy as np
import pytest

from sordino_common.errors import LocalError
from sordino_common.messages.statistics import RangedColumn, RowQuery
from sordino_common.privacy import row_sums
from sordino_server.statistics.estimates import histogram_of, moments_of
from sordino_server.statistics.quantiles import consistent, levels_of, monotone, quantiles
from sordino_server.statistics.ridge import FAILURE, ridge, spectral_bound

COLUMN = RangedColumn(name="v", low=10.0, high=30.0)


def entries(query: RowQuery, columns: tuple[RangedColumn, ...], *values: np.ndarray) -> np.ndarray:
    named = {column.name: value for column, value in zip(columns, values, strict=True)}
    return row_sums.answer(columns, named, (query,)) / query.weight


def test_moments_without_noise_are_mean_and_variance() -> None:
    rng = np.random.Generator(np.random.PCG64(3))
    values = rng.normal(18.0, 2.0, size=5000).clip(10, 30)
    query = RowQuery(kind="moments", columns=(0,), bits=12, weight=9)
    (found,) = moments_of(query, (COLUMN,), entries(query, (COLUMN,), values), 0.0)
    assert found.mean == pytest.approx(values.mean(), abs=0.01)
    assert found.variance == pytest.approx(values.var(), rel=0.02)
    assert found.mean_error == 0.0


def test_moments_of_nothing_but_noise_stay_in_their_range() -> None:
    query = RowQuery(kind="moments", columns=(0,), bits=4)
    for wild in ([-50.0, 900.0, -900.0], [3.0, -7e9, 7e9], [1e-9, 1.0, 0.0]):
        (found,) = moments_of(query, (COLUMN,), np.array(wild), 1.0)
        assert 10.0 <= found.mean <= 30.0
        assert 0.0 <= found.variance <= 100.0


def test_a_histogram_has_edges_in_the_columns_unit() -> None:
    query = RowQuery(kind="histogram", columns=(0,), bits=2, weight=4)
    found = histogram_of(query, COLUMN, entries(query, (COLUMN,), np.array([10.0, 14.9, 15.0, 30.0, 99.0])), 2.0)
    assert found.edges == (10.0, 15.0, 20.0, 25.0, 30.0)
    assert found.counts == (2.0, 1.0, 0.0, 2.0)
    assert found.error == pytest.approx(3.92, abs=0.01)


def test_quantiles_without_noise_are_those_of_the_rows_to_a_bin() -> None:
    rng = np.random.Generator(np.random.PCG64(4))
    values = rng.gamma(2.0, 3.0, size=4000).clip(0, 20) + 10.0
    query = RowQuery(kind="dyadic", columns=(0,), bits=9)
    wanted = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)
    found = quantiles(COLUMN, entries(query, (COLUMN,), values), 9, wanted)
    assert np.abs(np.array(found) - np.quantile(values, wanted)).max() <= 20.0 / 512 * 1.5


def test_consistent_counts_add_up_and_are_the_least_squares_solution() -> None:
    rng = np.random.Generator(np.random.PCG64(5))
    bits = 4
    noisy = rng.normal(size=(2 << bits) - 2)
    leaves = consistent(levels_of(noisy, bits))
    # The design matrix of the tree: node = sum of its leaves; least squares by NumPy.
    rows = [np.repeat(np.eye(1 << level), 1 << (bits - level), axis=1) for level in range(1, bits + 1)]
    best, *_ = np.linalg.lstsq(np.concatenate(rows), noisy, rcond=None)
    np.testing.assert_allclose(leaves, best, atol=1e-9)


def test_the_tree_beats_the_leaves_for_ranges() -> None:
    rng = np.random.Generator(np.random.PCG64(6))
    bits = 8
    errors = np.array(
        [(rng.normal(size=256).cumsum()[128], consistent(levels_of(rng.normal(size=510), bits))[:128].sum())
         for _ in range(300)]
    )  # fmt: skip
    assert errors[:, 1].std() < errors[:, 0].std() / 2


def test_quantiles_of_nothing_but_noise_are_ordered_and_in_range() -> None:
    rng = np.random.Generator(np.random.PCG64(7))
    for _ in range(50):
        found = quantiles(COLUMN, rng.normal(scale=1e3, size=62), 5, (0.1, 0.5, 0.9))
        assert found == sorted(found)
        assert all(10.0 <= value <= 30.0 for value in found)
    with pytest.raises(LocalError, match="expected numbers from 0 to 1"):
        quantiles(COLUMN, np.zeros(62), 5, (1.5,))
    with pytest.raises(LocalError, match="60 entries, expected 62"):
        quantiles(COLUMN, np.zeros(60), 5, (0.5,))


def test_monotone_is_the_nearest_non_decreasing_vector() -> None:
    np.testing.assert_allclose(monotone(np.array([3.0, 1.0, 2.0, 5.0, 4.0])), [2.0, 2.0, 2.0, 4.5, 4.5])


def _regression(bias: float) -> tuple[RowQuery, np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.Generator(np.random.PCG64(8))
    x = rng.uniform(-0.5, 0.5, size=(3000, 4))
    y = x @ np.array([0.5, -0.3, 0.2, 0.1]) + (0.1 if bias else 0.0) + rng.normal(scale=0.02, size=3000)
    columns = tuple(RangedColumn(name=f"x{k}", low=-1.0, high=1.0) for k in range(5))
    query = RowQuery(kind="gram", columns=(0, 1, 2, 3, 4), bits=10, row_norm=1.0, target_norm=1.0, bias=bias)
    return query, entries(query, columns, *x.T, y), x, y


@pytest.mark.parametrize("bias", [0.0, 0.5])
def test_without_noise_ridge_is_least_squares(bias: float) -> None:
    query, found, x, y = _regression(bias)
    line = ridge(query, found, 0.0)
    design = np.concatenate([x, np.ones((len(x), 1))], axis=1) if bias else x
    best, *_ = np.linalg.lstsq(design, y, rcond=None)
    np.testing.assert_allclose(line.weights, best[:4], atol=2e-3)
    assert line.intercept == pytest.approx(best[4] if bias else 0.0, abs=2e-3)
    assert line.regularization == 0.0


def test_noise_raises_the_regularisation_and_never_breaks_the_solution() -> None:
    query, found, _, _ = _regression(0.5)
    rng = np.random.Generator(np.random.PCG64(9))
    last = -1.0
    for noise in (0.0, 1e6, 1e8, 1e10):
        line = ridge(query, found + rng.normal(scale=max(noise, 1e-30), size=len(found)), noise)
        assert line.regularization >= last
        last = line.regularization
        assert np.isfinite(line.weights).all()
        assert np.abs(line.weights).max() < 3.0


def test_a_column_that_another_one_repeats_does_not_break_least_squares() -> None:
    columns = tuple(RangedColumn(name=name, low=-1.0, high=1.0) for name in ("a", "b", "y"))
    rng = np.random.Generator(np.random.PCG64(10))
    a = rng.uniform(-0.5, 0.5, size=500)
    query = RowQuery(kind="gram", columns=(0, 1, 2), bits=10, row_norm=2.0, target_norm=1.0)
    line = ridge(query, entries(query, columns, a, a, a), 0.0)
    np.testing.assert_allclose(line.weights, [0.5, 0.5], atol=1e-6)


def test_the_spectral_bound_holds_as_often_as_stated() -> None:
    """1,000 symmetric matrices: more than FAILURE + 5 standard errors would pass the bound by chance 3e-7."""
    rng = np.random.Generator(np.random.PCG64(11))
    for size in (2, 5, 14, 40):
        above = 0
        for _ in range(1000):
            upper = np.triu(rng.normal(size=(size, size)))
            above += np.abs(np.linalg.eigvalsh(upper + np.triu(upper, 1).T)).max() > spectral_bound(1.0, size)
        assert above <= 1000 * FAILURE + 5 * (1000 * FAILURE * (1 - FAILURE)) ** 0.5, size


def test_entries_that_do_not_fit_are_refused() -> None:
    query, found, _, _ = _regression(0.0)
    with pytest.raises(LocalError, match="14 entries, expected 15"):
        ridge(query, found[1:], 1.0)
