"""Datasets of agents, by column: pointers to data that this process never sees."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from sordino_common.messages import ColumnInfo, DatasetInfo
from sordino_common.plan.spec import TensorSpec
from sordino_server.tensors.errors import WrongPlace
from sordino_server.tensors.pointer import PointerTensor

if TYPE_CHECKING:
    from sordino_server.tensors.fleet import RemoteAgent

Dtype = Literal["float32", "float64", "int64"]


@dataclass(frozen=True, slots=True, kw_only=True)
class RemoteDataset:
    """A dataset of one agent, one of its splits. `dataset["x"]` is a pointer to that column over all rows of the split,
    `dataset[["a", "b"]]` to several joined along the last axis; each is loaded on the agent when it is asked for.

    No row of it can be fetched; what is computed of it can, if the agent's policy says so (SECURITY.md)."""

    agent: RemoteAgent
    info: DatasetInfo
    split: Literal["train", "test"] = "train"
    dtype: Dtype = "float32"

    @property
    def name(self) -> str:
        return self.info.name

    @property
    def columns(self) -> tuple[str, ...]:
        return tuple(column.name for column in self.info.columns)

    @property
    def rows(self) -> int:
        return self.info.train_rows if self.split == "train" else self.info.test_rows

    def test(self) -> RemoteDataset:
        """The same dataset's held-out rows."""
        return replace(self, split="test")

    def to(self, dtype: Dtype) -> RemoteDataset:
        """The same dataset, its columns loaded as numbers of `dtype`."""
        return replace(self, dtype=dtype)

    def __len__(self) -> int:
        return self.rows

    def __getitem__(self, names: str | Sequence[str]) -> PointerTensor:
        columns = (names,) if isinstance(names, str) else tuple(names)
        found = [self._column(name) for name in columns]
        if len(found) == 1:
            entry: tuple[int, ...] = found[0].shape
        elif found and all(len(column.shape) <= 1 for column in found):
            entry = (sum(column.shape[0] if column.shape else 1 for column in found),)
        else:
            raise WrongPlace(f"dataset {self.name!r}: name one column, or several whose entries are numbers or vectors")
        spec = TensorSpec(self.dtype, (self.rows, *entry))
        return self.agent.fleet.load(self.agent, self.name, columns, self.split, spec)

    def _column(self, name: str) -> ColumnInfo:
        for column in self.info.columns:
            if column.name == name:
                return column
        raise WrongPlace(f"dataset {self.name!r} on {self.agent.name} has no column {name!r}; it has {self.columns}")
