"""`federated_loader`: batches of rows that lie on several agents, each batch on one of them.

Legend: R rows of an agent, B rows of a batch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
from torch import Tensor

from sordino_common.messages import encode
from sordino_server.tensors.datasets import RemoteDataset
from sordino_server.tensors.errors import WrongPlace
from sordino_server.tensors.fleet import RemoteAgent
from sordino_server.tensors.pointer import PointerTensor

Source = RemoteDataset | Sequence[PointerTensor]
Columns = Sequence[str | Sequence[str]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """`tensors`: pointers of B rows each, on `agent`. Unpacks into them: `x, y = batch`."""

    agent: RemoteAgent
    tensors: tuple[PointerTensor, ...]

    def __iter__(self) -> Iterator[PointerTensor]:
        return iter(self.tensors)


class FederatedLoader:
    """Iterate for one epoch: the agents take turns, each gives the next batch of its rows, until all have given theirs.

    Every batch has B rows, whatever R is, so that a loop over it is one Plan. Rows that are left at the end of an epoch
    begin the next one's first batch (with R < B a batch takes several epochs); with `drop_last` they are left out, and
    every epoch begins anew. In which order rows come is public: it is drawn here, a permutation for each agent and
    epoch, and sent once an epoch; the rows are picked there. `agents`: who has rows, in the order of their turns."""

    def __init__(
        self, parts: Sequence[tuple[PointerTensor, ...]], *, batch_rows: int, shuffle: bool, seed: int, drop_last: bool
    ) -> None:
        self.epoch = 0
        self._streams = [
            _Stream(tensors, place, batch_rows=batch_rows, shuffle=shuffle, seed=seed, drop_last=drop_last)
            for place, tensors in enumerate(parts)
        ]

    @property
    def agents(self) -> tuple[RemoteAgent, ...]:
        return tuple(stream.agent for stream in self._streams)

    @property
    def rows(self) -> dict[str, int]:
        """How many rows each agent has: the weights of an average."""
        counts: dict[str, int] = {}
        for stream in self._streams:
            counts[stream.agent.name] = counts.get(stream.agent.name, 0) + stream.rows
        return counts

    def __len__(self) -> int:
        """Batches of the next epoch."""
        return sum(stream.count for stream in self._streams)

    def __iter__(self) -> Iterator[Batch]:
        epoch, self.epoch = self.epoch, self.epoch + 1
        waiting = [stream.epoch(epoch) for stream in self._streams]
        while waiting:
            left = []
            for batches in waiting:
                batch = next(batches, None)
                if batch is not None:
                    left.append(batches)
                    yield batch
            waiting = left


class _Stream:
    """The rows of one source. On the agent: a table of row numbers, a line for each batch of an epoch, and the number
    of the line that is due, which counts itself up. So a batch costs no message and is the same operations each
    time."""

    def __init__(
        self,
        tensors: tuple[PointerTensor, ...],
        place: int,
        *,
        batch_rows: int,
        shuffle: bool,
        seed: int,
        drop_last: bool,
    ) -> None:
        agent = tensors[0].owner
        assert isinstance(agent, RemoteAgent)
        self.agent: Final = agent
        self.rows: Final = tensors[0].shape[0]
        self._tensors: Final = tensors
        self._place, self._batch_rows = place, batch_rows
        self._shuffle, self._seed, self._drop_last = shuffle, seed, drop_last
        self._left = np.empty(0, dtype=np.int64)

    @property
    def count(self) -> int:
        """Batches of the next epoch."""
        return (len(self._left) + self.rows) // self._batch_rows

    def _order(self, epoch: int) -> np.ndarray:
        """Row numbers of one epoch. The order of 64-bit draws of PCG64, seeded by SHA-256 of canonical CBOR of
        ["sordino/loader", seed, epoch, place, agent]; what is ordered alike keeps its order."""
        if not self._shuffle:
            return np.arange(self.rows)
        digest = hashlib.sha256(encode(["sordino/loader", self._seed, epoch, self._place, self.agent.name])).digest()
        draws = np.random.PCG64(int.from_bytes(digest, "big")).random_raw(self.rows)
        return np.argsort(draws, kind="stable")

    def epoch(self, number: int) -> Iterator[Batch]:
        rows = np.concatenate([self._left, self._order(number)])
        count, size = len(rows) // self._batch_rows, self._batch_rows
        self._left = np.empty(0, dtype=np.int64) if self._drop_last else rows[count * size :]
        if not count:
            return
        # As many lines as an epoch can ever have: one shape, one Plan.
        lines = np.zeros(((self.rows + size - 1) // size, size), dtype=np.int64)
        lines[:count] = rows[: count * size].reshape(count, size)
        table = self.agent.send(torch.from_numpy(lines))
        due = self.agent.send(torch.tensor([-1]))
        for _ in range(count):
            yield self._batch(table, due)

    def _batch(self, table: Tensor, due: Tensor) -> Batch:
        with torch.no_grad():
            due += 1
            numbers = table.index_select(0, due).reshape(-1)
            picked = tuple([tensor.index_select(0, numbers) for tensor in self._tensors])
        return Batch(agent=self.agent, tensors=picked)  # type: ignore[arg-type]  # of pointers there come pointers


def federated_loader(
    sources: Iterable[Source],
    columns: Columns = (),
    *,
    batch_rows: int,
    shuffle: bool = True,
    seed: int = 0,
    drop_last: bool = False,
) -> FederatedLoader:
    """A loader over rows of several agents: `sources` are datasets (`fleet.search("housing")`) with the `columns` to
    load of each, one entry for each tensor of a batch (`["x", "y"]`, `[["RM", "LSTAT"], "MEDV"]`), or tuples of
    pointers that agree in their first dimension.

    See `FederatedLoader` for what an epoch is. Raises `WrongPlace` for sources that don't fit together, and what
    loading a column raises."""
    if batch_rows < 1:
        raise WrongPlace(f"federated_loader: batch_rows is {batch_rows}; a batch has at least one row")
    parts = [_tensors(number, source, columns) for number, source in enumerate(sources)]
    if not parts:
        raise WrongPlace("federated_loader: no sources; fleet.search(tag) found none, perhaps")
    first = parts[0]
    for number, part in enumerate(parts):
        if [(t.shape[1:], t.dtype) for t in part] != [(t.shape[1:], t.dtype) for t in first]:
            raise WrongPlace(
                f"federated_loader: source {number} has rows of {', '.join(map(repr, part))}, but source 0 of "
                f"{', '.join(map(repr, first))}; their entries must have the same shapes and dtypes"
            )
        rows = part[0].shape[0]
        if rows < 1 or (drop_last and rows < batch_rows):
            raise WrongPlace(
                f"federated_loader: source {number} on {part[0].owner.name} has {rows} rows and would never give a "
                f"batch of {batch_rows}" + ("; take smaller batches, or drop_last=False" if rows else "")
            )
    return FederatedLoader(parts, batch_rows=batch_rows, shuffle=shuffle, seed=seed, drop_last=drop_last)


def _tensors(number: int, source: Source, columns: Columns) -> tuple[PointerTensor, ...]:
    if isinstance(source, RemoteDataset):
        if not columns:
            raise WrongPlace(
                f"federated_loader: name the columns of dataset {source.name!r}: one entry for each tensor of a batch; "
                f"it has {source.columns}"
            )
        return tuple([source[names] for names in columns])
    if columns:
        raise WrongPlace(f"federated_loader: source {number} is a tuple of pointers; columns are of datasets")
    tensors = tuple(source)
    if not tensors or not all(type(tensor) is PointerTensor and tensor.dim() for tensor in tensors):
        shown = ", ".join(repr(t) if isinstance(t, PointerTensor) else type(t).__name__ for t in tensors) or "nothing"
        raise WrongPlace(f"federated_loader: source {number} is {shown}; expected a dataset or pointers to rows")
    if len({tensor.owner.name for tensor in tensors}) > 1 or len({tensor.shape[0] for tensor in tensors}) > 1:
        raise WrongPlace(
            f"federated_loader: source {number} has {', '.join(map(repr, tensors))}; the tensors of a source are on "
            f"one agent and have as many rows"
        )
    return tensors
