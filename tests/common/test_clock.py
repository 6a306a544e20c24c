"""Virtual time: in order, deterministic, never back."""

from __future__ import annotations

import math

import pytest

from sordino_common.clock import VirtualLoop
from sordino_common.errors import LocalError


def test_callbacks_run_in_order_of_time_then_of_asking() -> None:
    loop = VirtualLoop()
    seen: list[tuple[str, float]] = []
    for name, when_s in (("b", 2.0), ("a", 1.0), ("c", 2.0)):
        loop.call_at(when_s, lambda name=name: seen.append((name, loop.now_s())))
    while loop.step():
        pass
    assert seen == [("a", 1.0), ("b", 2.0), ("c", 2.0)]
    assert not loop.step()


def test_a_time_in_the_past_means_now() -> None:
    loop = VirtualLoop(start_s=10.0)
    seen: list[float] = []
    loop.call_at(3.0, lambda: seen.append(loop.now_s()))
    loop.advance(1.0)
    assert seen == [10.0]
    assert loop.now_s() == 11.0
    assert loop.wall_s() == 1_700_000_001.0


def test_cancelled_timers_do_not_run() -> None:
    loop = VirtualLoop()
    timer = loop.call_at(1.0, lambda: pytest.fail("cancelled"))
    timer.cancel()
    timer.cancel()
    loop.advance(5.0)


def test_run_until_stops_at_its_deadline() -> None:
    loop = VirtualLoop()
    count = 0

    def again() -> None:
        nonlocal count
        count += 1
        loop.call_at(loop.now_s() + 1.0, again)

    again()
    assert not loop.run_until(lambda: False, deadline_s=4.5)
    assert (count, loop.now_s()) == (5, 4.5)
    assert loop.run_until(lambda: count == 7, deadline_s=100.0)
    assert loop.now_s() == 6.0


def test_nan_is_refused() -> None:
    with pytest.raises(LocalError, match="NaN"):
        VirtualLoop().call_at(math.nan, lambda: None)


def test_cancelled_timers_are_not_kept_until_their_time() -> None:
    loop = VirtualLoop()
    ran: list[int] = []
    loop.call_at(1e6, lambda: ran.append(0))
    for index in range(10_000):
        timer = loop.call_at(1e6, lambda: ran.append(1))
        loop.call_at(float(index), lambda: None)
        loop.step()
        timer.cancel()
        timer.cancel()
    assert len(loop._heap) < 200
    loop.advance(2e6)
    assert ran == [0]
