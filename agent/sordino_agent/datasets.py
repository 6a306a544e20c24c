"""How the configuration names a dataset. No NumPy here: the daemon reads this; the worker reads the files."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

from sordino_agent.budget import BudgetSpec
from sordino_common.messages.base import Label, Name

Columns = Annotated[tuple[Label, ...], msgspec.Meta(min_length=1, max_length=4096)]


class DatasetSpec(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One dataset on this device.

    `format`: `csv` (a header row, then numbers), `npz` (one array per column, first axis = rows), `npy` (one array:
    with several `columns` a table [rows, columns]; with one, that column, whatever its shape); default: by the file's
    ending. `columns`: what is offered; absent means all (of an npy table it is required). `features` and `target`
    together are another way to say `columns`. Rows for testing are chosen in one of three ways: `test_fraction` of the
    rows by a shuffle seeded with `split_seed`, the last `test_rows` rows, or all rows of `test_path`. `budget`: all
    that may ever be learnt from the rows (see `BudgetSpec`); with one, nothing about train rows leaves without noise.
    Two datasets are two budgets: don't offer the same rows under two names."""

    name: Name
    path: str
    format: Literal["csv", "npz", "npy"] | None = None
    columns: Columns | None = None
    features: Columns | None = None
    target: Label | None = None
    tags: Annotated[tuple[Label, ...], msgspec.Meta(max_length=32)] = ()
    test_fraction: Annotated[float, msgspec.Meta(ge=0.0, lt=1.0)] = 0.0
    split_seed: Annotated[int, msgspec.Meta(ge=0, le=(1 << 63) - 1)] = 0
    test_rows: Annotated[int, msgspec.Meta(ge=0, le=1 << 40)] = 0
    test_path: str | None = None
    budget: BudgetSpec | None = None

    def __post_init__(self) -> None:
        # A ValueError here becomes a validation error with the entry's file, line and column.
        if sum((self.test_fraction > 0, self.test_rows > 0, self.test_path is not None)) > 1:
            raise ValueError("give one of test_fraction, test_rows and test_path")
        if self.columns is not None and (self.features is not None or self.target is not None):
            raise ValueError("give either columns, or features and target")
        if (self.features is None) != (self.target is None):
            raise ValueError("features and target come together")
        offered = self.offered
        if offered is not None and len(set(offered)) != len(offered):
            raise ValueError("a column is named twice")
        if self.format is None and self.path.rpartition(".")[2].lower() not in ("csv", "npz", "npy"):
            raise ValueError(f"format is not given and the ending of {self.path!r} is not csv, npz or npy")

    @property
    def offered(self) -> tuple[str, ...] | None:
        """The columns on offer, in order; None for all that the file has."""
        if self.features is not None and self.target is not None:
            return (*self.features, self.target)
        return self.columns

    @property
    def file_format(self) -> str:
        return self.format or self.path.rpartition(".")[2].lower()
