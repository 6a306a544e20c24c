"""The reactor: timers in order, sockets by turns, nothing swallowed, woken by signals."""

from __future__ import annotations

import math
import os
import signal
import socket
import threading
from collections.abc import Iterator

import pytest

from sordino_common.errors import LocalError
from sordino_common.transport.reactor import READ, WRITE, Reactor

SOON_S = 10.0


@pytest.fixture
def reactor() -> Iterator[Reactor]:
    with Reactor() as reactor:
        yield reactor


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    left, right = socket.socketpair()
    with left, right:
        yield left, right


def test_timers_run_in_order_of_time_and_then_of_asking(reactor: Reactor) -> None:
    ran: list[str] = []
    now_s = reactor.now_s()
    for name, delay_s in (("c", 0.02), ("a", 0.0), ("d", 0.02), ("b", 0.01)):
        reactor.call_at(now_s + delay_s, lambda name=name: ran.append(name))
    reactor.call_at(now_s + 0.015, lambda: ran.append("never")).cancel()
    assert reactor.run_until(lambda: len(ran) == 4, deadline_s=now_s + SOON_S)
    assert ran == ["a", "b", "c", "d"]
    assert reactor.now_s() >= now_s + 0.02


def test_run_until_ends_at_its_deadline(reactor: Reactor) -> None:
    reactor.call_at(math.inf, lambda: None)
    began_s = reactor.now_s()
    assert not reactor.run_until(lambda: False, deadline_s=began_s + 0.02)
    assert reactor.now_s() >= began_s + 0.02
    assert reactor.run_until(lambda: True, deadline_s=0.0)


def test_time_that_is_no_number_is_refused(reactor: Reactor) -> None:
    with pytest.raises(LocalError, match="NaN"):
        reactor.call_at(math.nan, lambda: None)


def test_a_timer_that_sets_itself_again_starves_nobody(
    reactor: Reactor, pair: tuple[socket.socket, socket.socket]
) -> None:
    left, right = pair
    heard: list[bytes] = []
    fired: list[str] = []

    def again() -> None:
        reactor.call_at(0.0, again)

    again()
    reactor.call_at(reactor.now_s() + 0.01, lambda: fired.append("other"))
    reactor.register(right, READ, lambda ready: heard.append(right.recv(10)))
    left.send(b"x")
    assert reactor.run_until(lambda: bool(heard and fired), deadline_s=reactor.now_s() + SOON_S)


def test_sockets_are_watched_modified_and_let_go(reactor: Reactor, pair: tuple[socket.socket, socket.socket]) -> None:
    left, right = pair
    seen: list[int] = []
    reactor.register(right, READ, seen.append)
    reactor.run_once(0.0)
    assert seen == []
    reactor.modify(right, READ | WRITE)
    left.send(b"x")
    reactor.run_once(SOON_S)
    assert seen == [READ | WRITE]
    with pytest.raises(LocalError):
        reactor.register(right, READ, seen.append)
    reactor.unregister(right)
    for wrong in (lambda: reactor.unregister(right), lambda: reactor.modify(right, READ)):
        with pytest.raises(LocalError):
            wrong()
    reactor.run_once(0.0)
    assert seen == [READ | WRITE]


def test_what_is_unregistered_in_a_round_is_not_called_in_it(reactor: Reactor) -> None:
    pairs = [socket.socketpair() for _ in range(2)]
    called: list[int] = []

    def callback(index: int) -> None:
        called.append(index)
        for _, right in pairs:
            reactor.unregister(right)

    for index, (left, right) in enumerate(pairs):
        left.send(b"x")
        reactor.register(right, READ, lambda ready, index=index: callback(index))
    reactor.run_once(SOON_S)
    reactor.run_once(0.0)
    assert len(called) == 1
    for left, right in pairs:
        left.close()
        right.close()


def test_an_exception_comes_out_and_the_rest_runs_later(
    reactor: Reactor, pair: tuple[socket.socket, socket.socket]
) -> None:
    left, right = pair
    ran: list[str] = []

    def fail(*_: object) -> None:
        raise RuntimeError("on purpose")

    reactor.call_at(0.0, fail)
    reactor.call_at(0.0, lambda: ran.append("next"))
    with pytest.raises(RuntimeError, match="on purpose"):
        reactor.run_once(0.0)
    reactor.run_once(0.0)
    assert ran == ["next"]
    reactor.register(right, READ, fail)
    left.send(b"x")
    for _ in range(2):  # it is still there, and still ready
        with pytest.raises(RuntimeError, match="on purpose"):
            reactor.run_once(SOON_S)


def test_a_signal_handler_wakes_it(reactor: Reactor) -> None:
    heard: list[int] = []

    def handler(number: int, _frame: object) -> None:
        heard.append(number)
        reactor.wake()

    before = signal.signal(signal.SIGALRM, handler)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.05)
        began_s = reactor.now_s()
        assert reactor.run_until(lambda: bool(heard), deadline_s=began_s + 60)
        assert reactor.now_s() - began_s < 30
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def test_the_wakeup_descriptor_serves_the_signal_module(reactor: Reactor) -> None:
    heard: list[int] = []
    before = signal.signal(signal.SIGALRM, lambda number, frame: heard.append(number))
    before_fd = signal.set_wakeup_fd(reactor.wakeup_fd, warn_on_full_buffer=False)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.05)
        began_s = reactor.now_s()
        assert reactor.run_until(lambda: bool(heard), deadline_s=began_s + 60)
        assert reactor.now_s() - began_s < 30
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.set_wakeup_fd(before_fd)
        signal.signal(signal.SIGALRM, before)


def test_wake_never_blocks_and_counts_once(reactor: Reactor) -> None:
    for _ in range(100_000):  # more than a pipe holds
        reactor.wake()
    reactor.run_once(SOON_S)
    began_s = reactor.now_s()
    reactor.run_once(0.01)
    assert reactor.now_s() - began_s >= 0.009, "the pipe was emptied"
    thread = threading.Thread(target=reactor.wake)
    thread.start()
    reactor.run_once(SOON_S)
    thread.join()


def test_cancelled_timers_do_not_pile_up(reactor: Reactor) -> None:
    kept = reactor.call_at(reactor.now_s() + 3600, lambda: None)
    for _ in range(10_000):
        reactor.call_at(reactor.now_s() + 3600, lambda: None).cancel()
    assert len(reactor._heap) < 200
    kept.cancel()
    kept.cancel()
    reactor.run_once(0.0)


def test_close_frees_its_descriptors() -> None:
    reactor = Reactor()
    wakeup_fd = reactor.wakeup_fd
    reactor.close()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(wakeup_fd)
