"""When a dealer deals: spread over the time that the parties take, and at once where they could come to wait."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from sordino_server.dealer.pace import Pace

AHEAD, EVERY = 64, 16


class Run:
    """Parties that take `step_s` for a step and report every `EVERY` of them."""

    def __init__(self) -> None:
        self.pace = Pace(first=0, ahead=AHEAD)
        self.now_s = 100.0
        self.confirmed = self.dealt = 0

    def deal(self, until_s: float) -> Iterator[float]:
        """Times at which a step is dealt, until then or until the window is full."""
        while self.dealt < self.confirmed + AHEAD:
            wait_s = self.pace.wait_s(self.now_s, confirmed=self.confirmed, dealt=self.dealt)
            if self.now_s + wait_s > until_s:
                break
            self.now_s += wait_s
            self.pace.dealt()
            self.dealt += 1
            yield self.now_s
        self.now_s = until_s

    def interval(self, step_s: float) -> list[float]:
        """What is dealt between two reports, in steps' times since the first; the second report is in."""
        began_s, end_s = self.now_s, self.now_s + EVERY * step_s
        times = [(at_s - began_s) / step_s for at_s in self.deal(end_s)]
        self.confirmed += EVERY
        return times


def test_nobody_waits_while_the_pace_is_not_known() -> None:
    run = Run()
    assert run.interval(0.01) == [0.0] * AHEAD
    assert run.interval(0.01) == [0.0] * EVERY  # one report says when, two say how fast


def test_dealing_is_spread_and_over_before_the_next_report() -> None:
    run = Run()
    for _ in range(2):
        run.interval(0.01)
    for step_s in (0.01, 0.02, 0.005):
        for _ in range(2):
            run.interval(step_s)
        times = run.interval(step_s)
        assert len(times) == EVERY
        assert times == pytest.approx([0.75 * k for k in range(EVERY)])


@pytest.mark.parametrize("faster", [2.0, 10.0, 1000.0])
def test_parties_that_grow_faster_never_wait(faster: float) -> None:
    run = Run()
    for _ in range(4):
        run.interval(0.2)
    stocks = []
    for _ in range(6):
        run.interval(0.2 / faster)
        stocks.append(run.dealt - run.confirmed)
    assert min(stocks) >= AHEAD // 2 - EVERY  # dealt, and not used by those who report now
    assert stocks[-1] == AHEAD - EVERY


def test_a_pause_is_no_pace() -> None:
    """A day later nobody waits for as long."""
    run = Run()
    for _ in range(3):
        run.interval(0.01)
    run.interval(3600.0)
    began_s = run.now_s
    assert list(run.deal(began_s + 1000.0))[-1] - began_s < EVERY * 0.25


def test_what_is_dealt_anew_is_dealt_at_once() -> None:
    run = Run()
    for _ in range(3):
        run.interval(0.01)
    list(run.deal(run.now_s + 1.0))
    run.dealt = run.confirmed + 2  # all later ones are thrown away
    began_s = run.now_s
    times = [at_s - began_s for at_s in run.deal(began_s + 1.0)]
    assert times[: AHEAD // 2 - 2] == [0.0] * (AHEAD // 2 - 2)
    assert len(times) == AHEAD - 2
