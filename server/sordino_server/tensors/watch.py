"""What a program shows while it waits long for agents: on stderr, on a terminal or when asked for.

Nothing runs beside the wait: a timer of the same loop draws it, and is gone when the wait is over.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Final, TextIO

from rich.console import Console
from rich.live import Live
from rich.text import Text

from sordino_common.clock import Loop, Timer
from sordino_server.progress import some
from sordino_server.rounds.events import Waiting

_FIRST_S: Final = 2.0  # shorter waits are not worth a line
_LIVE_EVERY_S: Final = 0.5
_LINE_EVERY_S: Final = 10.0  # where lines stay
_UNSEEN: Final = nullcontext()


def words(waiting: Waiting) -> str:
    """For whom, for what, since when, and for how long at most."""
    there = f"{waiting.have}/{waiting.quorum} answered, " if waiting.quorum > 1 else ""
    return (
        f"{waiting.purpose}: {there}waiting for {some(waiting.names) or 'nobody'} "
        f"({waiting.waited_s:.0f} s; {max(waiting.left_s, 0.0):.0f} s left)"
    )


class Watch:
    """`shown`: None shows it on a terminal only. `stream`: stderr unless told otherwise."""

    def __init__(
        self,
        loop: Loop,
        waiting: Callable[[], Waiting | None],
        *,
        shown: bool | None = None,
        stream: TextIO | None = None,
    ) -> None:
        self._loop, self._waiting = loop, waiting
        self._console = Console(file=stream or sys.stderr, highlight=False, soft_wrap=True)
        self._shown = self._console.is_terminal if shown is None else shown
        self._timer: Timer | None = None
        self._live: Live | None = None

    def over(self) -> AbstractContextManager[None]:
        """Watch one wait."""
        return self._over() if self._shown else _UNSEEN

    @contextmanager
    def _over(self) -> Iterator[None]:
        self._timer = self._loop.call_at(self._loop.now_s() + _FIRST_S, self._tick)
        try:
            yield
        finally:
            self._timer.cancel()
            if self._live is not None:
                self._live.stop()
                self._live = None

    def _tick(self) -> None:
        waiting = self._waiting()
        if waiting is not None:
            self._show(Text(words(waiting), style="dim"))
        every_s = _LIVE_EVERY_S if self._console.is_terminal else _LINE_EVERY_S
        self._timer = self._loop.call_at(self._loop.now_s() + every_s, self._tick)

    def _show(self, text: Text) -> None:
        if not self._console.is_terminal:
            self._console.print(text)
        elif self._live is None:
            self._live = Live(text, console=self._console, auto_refresh=False, transient=True)
            self._live.start(refresh=True)
        else:
            self._live.update(text, refresh=True)
