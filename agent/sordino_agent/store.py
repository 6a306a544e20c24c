"""What the daemon keeps in memory, each kind under a byte budget: tensors with leases, Plans, answers already given.

State is passed the time (`now_s`, a monotonic clock); nothing here reads a clock or sets a timer.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from typing import Final, Generic, TypeVar

from sordino_agent.errors import Conflict, UnknownTensor
from sordino_common.errors import LimitExceeded, PolicyRefusal
from sordino_common.messages import Array

# Beside its bytes, an entry costs this much for keys and objects; it also bounds the number of empty tensors.
ENTRY_BYTES: Final = 512


@dataclass(frozen=True, slots=True, kw_only=True)
class Shared:
    """Of a masked value m that a committee keeps: who has the same m, who has the mask, and which value it is (see
    `spdz.spec.origin_of`). It is of use in another session of these very parties only."""

    parties: tuple[str, ...]
    dealer: str
    security: str
    origin: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredTensor:
    """A tensor with the Plan (SHA-256) that made it, None if none did, and the time its lease is over.

    `lineage`: None if no row of a dataset is in it; else all Plans between the rows and it (none: it is rows).
    `datasets`: whose rows these are. `shared`: it is a masked value of a committee, which never leaves the device."""

    value: Array
    made_by: bytes | None
    until_s: float
    lineage: frozenset[bytes] | None = None
    datasets: frozenset[str] = frozenset()
    shared: Shared | None = None


class TensorStore:
    """Tensors by id, each under a lease, together at most `budget_bytes` (values plus `ENTRY_BYTES` each).

    A full store refuses; it never evicts a tensor whose lease runs."""

    def __init__(self, *, budget_bytes: int) -> None:
        self.budget_bytes: Final = budget_bytes
        self.used_bytes = 0
        self._tensors: dict[bytes, StoredTensor] = {}

    def __len__(self) -> int:
        return len(self._tensors)

    def put(
        self,
        tensors: Sequence[tuple[bytes, Array]],
        *,
        made_by: bytes | None,
        lease_s: float,
        now_s: float,
        lineage: frozenset[bytes] | None = None,
        datasets: frozenset[str] = frozenset(),
        shared: Sequence[Shared] = (),
    ) -> None:
        """Store all of `tensors`, or raise and store none. The same value again renews its lease; another value
        under a live id raises `Conflict`; no room raises `LimitExceeded`. `shared`: of each tensor, if they are masked
        values of a committee; those are never there before."""
        self.expire(now_s)
        added = 0
        for tensor_id, value in tensors:
            present = self._tensors.get(tensor_id)
            if present is None:
                added += value.nbytes + ENTRY_BYTES
            elif (
                bool(shared)
                or present.value != value
                or (present.made_by, present.lineage, present.datasets) != (made_by, lineage, datasets)
            ):
                raise Conflict(f"tensor {tensor_id.hex()} is there with another value; drop it first, or take a new id")
        if len({tensor_id for tensor_id, _ in tensors}) != len(tensors):
            raise Conflict("one command stores the same tensor id twice")
        self.require_room(added)
        for number, (tensor_id, value) in enumerate(tensors):
            self._tensors[tensor_id] = StoredTensor(
                value=value,
                made_by=made_by,
                until_s=now_s + lease_s,
                lineage=lineage,
                datasets=datasets,
                shared=shared[number] if shared else None,
            )
        self.used_bytes += added

    def require_room(self, added: int) -> None:
        """Raise `LimitExceeded` unless so many bytes more fit (values plus `ENTRY_BYTES` each)."""
        if self.used_bytes + added > self.budget_bytes:
            raise LimitExceeded(
                f"tensor store: {added} bytes do not fit, {self.used_bytes} of {self.budget_bytes} are used "
                "(limits.store_bytes on the device); drop tensors first"
            )

    def require_free(self, tensor_ids: Sequence[bytes], *, now_s: float) -> None:
        """Raise `Conflict` if one of these ids is taken."""
        self.expire(now_s)
        for tensor_id in tensor_ids:
            if tensor_id in self._tensors:
                raise Conflict(f"tensor {tensor_id.hex()} is there already; what is kept on shares takes a new id")

    def get(self, tensor_id: bytes, *, now_s: float) -> StoredTensor:
        """The tensor of that id. Raises `UnknownTensor`; `PolicyRefusal` for a committee's masked value: whoever asks
        has the mask."""
        tensor = self._get(tensor_id, now_s)
        if tensor.shared is not None:
            raise PolicyRefusal(
                f"tensor {tensor_id.hex()} is a masked value that this device keeps for a committee; it is an input of "
                "sessions of that committee, and leaves for nobody"
            )
        return tensor

    def get_shared(self, tensor_id: bytes, shared: Shared, *, now_s: float) -> StoredTensor:
        """The masked value of that id. Raises `UnknownTensor`, and `Conflict` if it is another one than `shared` says:
        another committee's, dealer's or session's."""
        tensor = self._get(tensor_id, now_s)
        if tensor.shared != shared:
            raise Conflict(
                f"tensor {tensor_id.hex()} is not the shared value that it is said to be: it was kept by another "
                "committee, under another dealer or security, or is the output of another session or step"
            )
        return tensor

    def _get(self, tensor_id: bytes, now_s: float) -> StoredTensor:
        self.expire(now_s)
        try:
            return self._tensors[tensor_id]
        except KeyError:
            raise UnknownTensor(
                f"tensor {tensor_id.hex()} is not here: never put, dropped, or its lease is over"
            ) from None

    def renew(self, tensor_ids: Sequence[bytes], *, lease_s: float, now_s: float) -> tuple[bytes, ...]:
        """Give these tensors a new lease; returns those that are there."""
        self.expire(now_s)
        there = tuple(tensor_id for tensor_id in tensor_ids if tensor_id in self._tensors)
        for tensor_id in there:
            self._tensors[tensor_id] = replace(self._tensors[tensor_id], until_s=now_s + lease_s)
        return there

    def drop(self, tensor_ids: Sequence[bytes]) -> int:
        """Forget these tensors; returns how many were there."""
        return sum(self._forget(tensor_id) for tensor_id in tensor_ids)

    def drop_shared(self, parties: tuple[str, ...]) -> int:
        """Forget every masked value of this committee; returns how many there were."""
        return self.drop([key for key, one in self._tensors.items() if one.shared and one.shared.parties == parties])

    def expire(self, now_s: float) -> None:
        """Forget what is out of lease."""
        for tensor_id in [key for key, tensor in self._tensors.items() if tensor.until_s <= now_s]:
            self._forget(tensor_id)

    def _forget(self, tensor_id: bytes) -> bool:
        tensor = self._tensors.pop(tensor_id, None)
        if tensor is None:
            return False
        self.used_bytes -= tensor.value.nbytes + ENTRY_BYTES
        return True


K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


class ByteCache(Generic[K, V]):
    """The most recently used values that fit into `budget_bytes`; `size_of` says what a value takes.

    A value larger than the budget is not kept, and `put` says so."""

    def __init__(self, *, budget_bytes: int, size_of: Callable[[V], int]) -> None:
        self.budget_bytes: Final = budget_bytes
        self.used_bytes = 0
        self._size_of = size_of
        self._values: OrderedDict[K, V] = OrderedDict()

    def __len__(self) -> int:
        return len(self._values)

    def get(self, key: K) -> V | None:
        if key in self._values:
            self._values.move_to_end(key)
        return self._values.get(key)

    def put(self, key: K, value: V) -> bool:
        """Keep `value`, at the cost of the least recently used. False if it can't fit at all."""
        size = self._size_of(value) + ENTRY_BYTES
        self.drop(key)
        if size > self.budget_bytes:
            return False
        while self.used_bytes + size > self.budget_bytes:
            _, old = self._values.popitem(last=False)
            self.used_bytes -= self._size_of(old) + ENTRY_BYTES
        self._values[key] = value
        self.used_bytes += size
        return True

    def drop(self, key: K) -> None:
        old = self._values.pop(key, None)
        if old is not None:
            self.used_bytes -= self._size_of(old) + ENTRY_BYTES

    def drop_where(self, which: Callable[[K], bool]) -> None:
        """Those whose key `which` says; looks at all."""
        for key in [key for key in self._values if which(key)]:
            self.drop(key)

    def clear(self) -> None:
        self._values.clear()
        self.used_bytes = 0
