"""What is shown of long waits: on a terminal, or when it is asked for; on stderr, never on stdout."""

from __future__ import annotations

import io

import pytest
import torch

import sordino_server as sordino
from sordino_common.clock import VirtualLoop
from sordino_server.rounds.events import Waiting
from sordino_server.tensors.watch import Watch, words

WAITING = Waiting(purpose="tensors", names=("alice", "bob"), have=1, quorum=3, waited_s=12.2, left_s=318.0)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def watched(stream: io.StringIO, shown: bool | None, seconds: float) -> str:
    loop = VirtualLoop()
    with Watch(loop, lambda: WAITING, shown=shown, stream=stream).over():
        loop.advance(seconds)
    loop.advance(100.0)  # nothing is left of it
    return stream.getvalue()


def test_words() -> None:
    assert words(WAITING) == "tensors: 1/3 answered, waiting for alice, bob (12 s; 318 s left)"


def test_a_short_wait_shows_nothing_and_a_long_one_a_line_every_ten_seconds() -> None:
    assert watched(io.StringIO(), True, 1.9) == ""
    assert watched(io.StringIO(), True, 23.0).splitlines() == [words(WAITING)] * 3


def test_without_a_terminal_nothing_is_shown_unless_it_is_asked_for() -> None:
    assert watched(io.StringIO(), None, 60.0) == ""
    assert watched(Terminal(), False, 60.0) == ""
    shown = watched(Terminal(), None, 4.0)
    assert shown.count(words(WAITING)) >= 4  # one line, drawn again and again
    assert shown.endswith("\x1b[2K")  # and taken away in the end


def test_a_long_evaluation_is_shown_on_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    with sordino.simulate(agents=1, board="pi-zero2", progress=True) as fleet:
        x = fleet["alice"].send(torch.ones(700, 700))
        y = x
        for _ in range(6):  # 4 s on that board
            y = (y @ x) / 700
        assert y.sum().get() == 700.0**2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "tensors: waiting for alice (2 s; " in captured.err
