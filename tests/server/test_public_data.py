"""The public data sets, and how they are split."""

from __future__ import annotations

from importlib import metadata

import numpy as np
import pytest

from sordino_common.errors import ConfigError
from sordino_server.public_data import PUBLIC_NAMES, load_public, split_rows

FACTS = {"boston": (506, 14, "MEDV"), "pima": (768, 9, "test"), "mnist": (5000, 2, "digit")}


@pytest.mark.parametrize("name", PUBLIC_NAMES)
def test_rows_and_columns(name: str) -> None:
    table = load_public(name)
    rows, columns, target = FACTS[name]
    assert (table.rows, len(table.columns)) == (rows, columns)
    assert target in table.columns
    assert all(len(column) == rows and np.isfinite(column).all() for column in table.columns.values())


def test_contents() -> None:
    boston, pima, mnist = (load_public(name) for name in ("boston", "pima", "mnist"))
    assert boston.columns["MEDV"].mean() == pytest.approx(22.5328, abs=1e-4)  # Harrison, Rubinfeld 1978
    assert boston.columns["CRIM"][0] == pytest.approx(0.00632)
    assert sorted(np.unique(pima.columns["test"])) == [0.0, 1.0]
    assert pima.columns["test"].sum() == 268
    assert mnist.columns["image"].shape == (5000, 1, 28, 28)
    assert mnist.columns["image"].dtype == np.uint8
    assert np.bincount(mnist.columns["digit"]).tolist() == [500] * 10


@pytest.mark.parametrize("rows", [1, 2, 3, 10, 506])
def test_a_split_takes_every_row_once(rows: int) -> None:
    train, test = split_rows(rows, 0.2, 3)
    assert sorted([*train, *test]) == list(range(rows))
    assert len(train) >= 1
    assert len(test) >= (1 if rows > 1 else 0)
    again = split_rows(rows, 0.2, 3)
    assert np.array_equal(again[0], train)
    assert rows < 10 or not np.array_equal(split_rows(rows, 0.2, 4)[1], test)


def test_unknown_and_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"no public data set 'wine'; known: boston, mnist, pima"):
        load_public("wine")

    def absent(name: str) -> None:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "files", absent)
    with pytest.raises(ConfigError, match=r"pip install --no-deps faraway"):
        load_public("pima")
    monkeypatch.setattr(metadata, "files", lambda name: [])
    with pytest.raises(ConfigError, match=r"has no file data/boston_housing.csv"):
        load_public("boston")
