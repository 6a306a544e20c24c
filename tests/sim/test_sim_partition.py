"""Every row exactly once, whatever the split."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sordino_common.errors import ConfigError
from sordino_sim.partition import class_labels, partition_dirichlet, partition_iid


@given(rows=st.integers(1, 300), agents=st.integers(1, 40), seed=st.integers(0, 2**32))
def test_iid_gives_every_row_once_in_nearly_equal_parts(rows: int, agents: int, seed: int) -> None:
    if rows < agents:
        with pytest.raises(ConfigError, match=f"at most {rows} agents"):
            partition_iid(rows, agents=agents, seed=seed)
        return
    parts = partition_iid(rows, agents=agents, seed=seed)
    assert sorted(np.concatenate(parts).tolist()) == list(range(rows))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


@given(
    rows=st.integers(20, 300),
    agents=st.integers(1, 10),
    classes=st.integers(1, 6),
    alpha=st.floats(1e-3, 100.0),
    seed=st.integers(0, 2**32),
    min_rows=st.integers(0, 2),
)
def test_dirichlet_gives_every_row_once_and_min_rows_to_all(
    rows: int, agents: int, classes: int, alpha: float, seed: int, min_rows: int
) -> None:
    targets = np.random.default_rng(seed).integers(classes, size=rows)
    parts = partition_dirichlet(targets, agents=agents, alpha=alpha, seed=seed, min_rows=min_rows)
    assert len(parts) == agents
    assert sorted(np.concatenate(parts).tolist()) == list(range(rows))
    assert min(map(len, parts)) >= min_rows


def test_small_alpha_skews_the_labels_more_than_large_alpha() -> None:
    targets = np.repeat(np.arange(10), 200)

    def largest_share(alpha: float) -> float:
        parts = partition_dirichlet(targets, agents=10, alpha=alpha, seed=3, min_rows=5)
        return float(np.mean([np.bincount(targets[part], minlength=10).max() / len(part) for part in parts]))

    assert largest_share(0.05) > 0.6 > 0.25 > largest_share(100.0)


def test_regression_targets_are_binned_by_quantiles() -> None:
    values = np.random.default_rng(0).normal(size=1000)
    labels = class_labels(values)
    assert np.bincount(labels).tolist() == [100] * 10
    assert all(values[labels == k].max() <= values[labels == k + 1].min() for k in range(9))


def test_one_seed_gives_one_split() -> None:
    targets = np.arange(100) % 7
    for _ in range(2):
        a, b = (partition_dirichlet(targets, agents=5, alpha=0.5, seed=9) for _ in range(2))
        assert all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))
    other = partition_dirichlet(targets, agents=5, alpha=0.5, seed=10)
    assert not all(np.array_equal(x, y) for x, y in zip(a, other, strict=True))


@pytest.mark.parametrize("alpha", [0.0, -1.0, float("nan")])
def test_alpha_must_be_positive(alpha: float) -> None:
    with pytest.raises(ConfigError, match="alpha"):
        partition_dirichlet(np.zeros(10, dtype=int), agents=2, alpha=alpha, seed=0)
