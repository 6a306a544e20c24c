"""The catalogue: datasets by name, read when first used, kept while there is room. In the simulator: arrays at hand."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol, TypeVar

from sordino_agent.data.files import load_table
from sordino_agent.data.table import Table
from sordino_agent.datasets import DatasetSpec
from sordino_agent.errors import DatasetError, UnknownData
from sordino_agent.store import ByteCache
from sordino_agent.tasks import DatasetList, DatasetProblem


class Catalogue(Protocol):
    """Where a worker finds its rows."""

    def describe(self) -> DatasetList: ...

    def table(self, name: str) -> Table:
        """Raises `UnknownData` for a name that is not there, `DatasetError` if the files can't be used."""
        ...


class MemoryCatalogue:
    """Tables that are already there."""

    def __init__(self, tables: Sequence[Table]) -> None:
        self._tables: Mapping[str, Table] = {table.name: table for table in tables}

    def describe(self) -> DatasetList:
        return DatasetList(datasets=tuple(table.info() for table in self._tables.values()))

    def table(self, name: str) -> Table:
        return _look_up(self._tables, name)


class FileCatalogue:
    """Tables from files, the recently used ones kept in at most `max_bytes`."""

    def __init__(
        self,
        specs: Sequence[DatasetSpec],
        *,
        max_bytes: int,
        load: Callable[..., Table] = load_table,
    ) -> None:
        self._specs = {spec.name: spec for spec in specs}
        self._max_bytes = max_bytes
        self._load = load
        self._cache: ByteCache[str, Table] = ByteCache(budget_bytes=max_bytes, size_of=lambda table: table.nbytes)

    def describe(self) -> DatasetList:
        infos, problems = [], []
        for name in self._specs:
            try:
                infos.append(self.table(name).info())
            except DatasetError as error:
                problems.append(DatasetProblem(dataset=name, detail=str(error)))
        return DatasetList(datasets=tuple(infos), problems=tuple(problems))

    def table(self, name: str) -> Table:
        spec = _look_up(self._specs, name)
        table = self._cache.get(name)
        if table is None:
            table = self._load(spec, max_bytes=self._max_bytes)
            self._cache.put(name, table)
        return table


T = TypeVar("T")


def _look_up(things: Mapping[str, T], name: str) -> T:
    try:
        return things[name]
    except KeyError:
        raise UnknownData(f"no dataset {name!r} here; there are: {', '.join(things) or 'none'}") from None
