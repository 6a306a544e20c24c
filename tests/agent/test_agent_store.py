"""The tensor store's budget and leases, and the cache that evicts by age of use."""

from __future__ import annotations

import pytest

from sordino_agent.errors import Conflict, UnknownTensor
from sordino_agent.store import ENTRY_BYTES, ByteCache, TensorStore
from sordino_common.errors import LimitExceeded
from sordino_common.messages import Array


def tensor(count: int, fill: bytes = b"\x01") -> Array:
    return Array("uint8", (count,), fill * count)


def ident(number: int) -> bytes:
    return number.to_bytes(16, "big")


def put(store: TensorStore, number: int, value: Array, *, now_s: float = 0.0, lease_s: float = 10.0) -> None:
    store.put([(ident(number), value)], made_by=None, lease_s=lease_s, now_s=now_s)


def test_budget_counts_values_and_entries_and_never_evicts() -> None:
    store = TensorStore(budget_bytes=2 * ENTRY_BYTES + 150)
    put(store, 1, tensor(100))
    with pytest.raises(LimitExceeded, match=r"limits\.store_bytes"):
        put(store, 2, tensor(51))
    put(store, 2, tensor(50))
    assert store.used_bytes == store.budget_bytes
    with pytest.raises(LimitExceeded):
        put(store, 3, tensor(0))  # empty tensors cost an entry
    assert store.get(ident(1), now_s=0.0).value == tensor(100)
    assert store.drop([ident(1), ident(1), ident(9)]) == 1
    assert store.used_bytes == ENTRY_BYTES + 50


def test_all_or_nothing() -> None:
    store = TensorStore(budget_bytes=3 * ENTRY_BYTES)
    with pytest.raises(LimitExceeded):
        store.put([(ident(1), tensor(10)), (ident(2), tensor(9000))], made_by=None, lease_s=1.0, now_s=0.0)
    assert len(store) == 0
    with pytest.raises(Conflict):
        store.put([(ident(1), tensor(1)), (ident(1), tensor(1))], made_by=None, lease_s=1.0, now_s=0.0)
    assert len(store) == 0
    assert store.used_bytes == 0


def test_leases_end_and_are_renewed_by_the_same_value() -> None:
    store = TensorStore(budget_bytes=10_000)
    put(store, 1, tensor(5), now_s=0.0, lease_s=10.0)
    put(store, 1, tensor(5), now_s=9.0, lease_s=10.0)
    assert store.get(ident(1), now_s=18.9).value == tensor(5)
    with pytest.raises(UnknownTensor, match="lease"):
        store.get(ident(1), now_s=19.0)
    assert store.used_bytes == 0


def test_another_value_under_a_live_id_is_a_conflict() -> None:
    store = TensorStore(budget_bytes=10_000)
    put(store, 1, tensor(5))
    with pytest.raises(Conflict):
        put(store, 1, tensor(5, b"\x02"))
    with pytest.raises(Conflict):
        store.put([(ident(1), tensor(5))], made_by=bytes(32), lease_s=1.0, now_s=0.0)  # would launder its origin
    put(store, 1, tensor(5, b"\x02"), now_s=10.0)  # the lease is over


def test_cache_drops_the_least_recently_used() -> None:
    cache: ByteCache[str, bytes] = ByteCache(budget_bytes=2 * (ENTRY_BYTES + 10), size_of=len)
    assert cache.put("a", bytes(10))
    assert cache.put("b", bytes(10))
    assert cache.get("a") is not None
    assert cache.put("c", bytes(10))
    assert (cache.get("a"), cache.get("b"), cache.get("c")) == (bytes(10), None, bytes(10))
    assert cache.used_bytes == cache.budget_bytes
    assert not cache.put("d", bytes(10_000))
    assert cache.get("a") == bytes(10)
    assert cache.put("a", bytes(3))
    assert cache.used_bytes == cache.budget_bytes - 7
    cache.clear()
    assert (len(cache), cache.used_bytes) == (0, 0)
