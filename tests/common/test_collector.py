"""What is there for good is set aside from the cycle collector, and comes back."""

from __future__ import annotations

import gc
import weakref

import pytest

from sordino_common.daemon.collector import old_set_aside


class _Knot:
    def __init__(self) -> None:
        self.itself = self


@pytest.fixture(autouse=True)
def _nothing_frozen() -> None:
    gc.unfreeze()


def test_what_is_new_is_collected_and_what_is_old_is_not_looked_at() -> None:
    old = _Knot()
    old_is_there = weakref.ref(old)
    with old_set_aside():
        assert gc.get_freeze_count() > 0
        new = _Knot()
        new_is_there = weakref.ref(new)
        del old, new
        gc.collect()
        assert new_is_there() is None
        assert old_is_there() is not None
    assert gc.get_freeze_count() == 0
    gc.collect()
    assert old_is_there() is None


def test_it_comes_back_after_an_error() -> None:
    with pytest.raises(ZeroDivisionError), old_set_aside():
        raise ZeroDivisionError
    assert gc.get_freeze_count() == 0


def test_what_somebody_else_has_set_aside_stays_so() -> None:
    gc.freeze()
    try:
        with old_set_aside():
            pass
        assert gc.get_freeze_count() > 0
    finally:
        gc.unfreeze()
