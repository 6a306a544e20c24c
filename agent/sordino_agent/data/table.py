"""`Table`: named columns with rows along the first axis, split into rows to train on and rows to test on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from sordino_agent.errors import DatasetError, UnknownData
from sordino_agent.pcg64 import Pcg64
from sordino_common.messages import ColumnInfo, DatasetInfo

Column = NDArray[Any]
Rows = NDArray[np.int64]
Split = Literal["train", "test"]

_KINDS = "iufb"  # integers, unsigned, floats, bool


@dataclass(frozen=True, slots=True, kw_only=True, eq=False, repr=False)
class Table:
    """`columns[name]` has shape [rows, ...]; `train` and `test` are disjoint sorted row numbers."""

    name: str
    tags: tuple[str, ...]
    columns: Mapping[str, Column]
    train: Rows
    test: Rows

    def rows(self, split: Split) -> Rows:
        return self.train if split == "train" else self.test

    def column(self, name: str) -> Column:
        """Raises `UnknownData` with the columns that there are."""
        try:
            return self.columns[name]
        except KeyError:
            there = ", ".join(list(self.columns)[:40])
            raise UnknownData(f"dataset {self.name!r} has no column {name!r}; it has {there}") from None

    @property
    def nbytes(self) -> int:
        return sum(column.nbytes for column in self.columns.values()) + self.train.nbytes + self.test.nbytes

    def info(self) -> DatasetInfo:
        """Names, dtypes, shapes and row counts; no values."""
        return DatasetInfo(
            name=self.name,
            tags=self.tags,
            train_rows=len(self.train),
            test_rows=len(self.test),
            columns=tuple(
                ColumnInfo(name=name, dtype=column.dtype.name, shape=column.shape[1:])
                for name, column in self.columns.items()
            ),
        )


def table_of(
    name: str,
    columns: Mapping[str, Column],
    *,
    tags: Sequence[str] = (),
    test_fraction: float = 0.0,
    split_seed: int = 0,
    test_rows: int = 0,
    test_columns: Mapping[str, Column] | None = None,
) -> Table:
    """A table from arrays; the split as in `DatasetSpec`. Raises `DatasetError`."""
    if not columns:
        raise DatasetError(f"dataset {name!r}: no columns", dataset=name)
    if test_columns is not None:
        train_count = _row_count(name, columns)
        test_count = _row_count(name, {key: _in_test(name, test_columns, key) for key in columns})
        joined = {}
        for key, column in columns.items():
            other = test_columns[key]
            if other.shape[1:] != column.shape[1:]:
                raise DatasetError(
                    f"dataset {name!r}: column {key!r} has entries of shape {list(column.shape[1:])} in the train file "
                    f"and {list(other.shape[1:])} in the test file",
                    dataset=name,
                )
            joined[key] = np.concatenate([column, other])
        train, test = np.arange(train_count), np.arange(train_count, train_count + test_count)
        return Table(name=name, tags=tuple(tags), columns=joined, train=train, test=test)
    rows = _row_count(name, columns)
    if test_rows:
        if test_rows >= rows:
            raise DatasetError(f"dataset {name!r}: test_rows is {test_rows}, the file has {rows} rows", dataset=name)
        train, test = np.arange(rows - test_rows), np.arange(rows - test_rows, rows)
    else:
        train, test = split_rows(rows, test_fraction=test_fraction, seed=split_seed)
    return Table(name=name, tags=tuple(tags), columns=dict(columns), train=train, test=test)


def split_rows(rows: int, *, test_fraction: float, seed: int) -> tuple[Rows, Rows]:
    """Sorted (train, test) row numbers: `test_fraction` of them, at least one if it is above 0, are the first of a
    permutation seeded by `seed`. Stable over NumPy's versions (see `batches.permutation`)."""
    if test_fraction <= 0.0 or rows < 2:
        return np.arange(rows), np.arange(0)
    count = min(max(1, round(test_fraction * rows)), rows - 1)
    order = np.argsort(Pcg64(seed).random_raw(rows), kind="stable")
    return np.sort(order[count:]), np.sort(order[:count])


def _row_count(name: str, columns: Mapping[str, Column]) -> int:
    counts = set()
    for key, column in columns.items():
        if column.ndim == 0 or column.dtype.kind not in _KINDS:
            raise DatasetError(
                f"dataset {name!r}: column {key!r} is {column.dtype}{list(column.shape)}; numbers with rows along the "
                "first axis are expected",
                dataset=name,
            )
        counts.add(len(column))
    if len(counts) != 1:
        lengths = ", ".join(f"{key} {len(column)}" for key, column in list(columns.items())[:20])
        raise DatasetError(f"dataset {name!r}: columns differ in length: {lengths}", dataset=name)
    return int(counts.pop())


def _in_test(name: str, columns: Mapping[str, Column], key: str) -> Column:
    if key not in columns:
        raise DatasetError(f"dataset {name!r}: the test file lacks the column {key!r}", dataset=name)
    return columns[key]
