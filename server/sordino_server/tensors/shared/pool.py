"""Open sessions of a fleet's committees: a circuit that is used again finds its session open. The least recently used
is closed where an agent would have too many; all are, when the fleet is."""

from __future__ import annotations

import contextlib
from collections import OrderedDict
from collections.abc import Callable, Generator
from typing import TYPE_CHECKING, Any, Final, TypeVar

from sordino_common.errors import SordinoError
from sordino_server.conductor import Interrupted
from sordino_server.rounds.effects import Effect, Hear, Result, hear
from sordino_server.rounds.spdz_session import SessionLost

if TYPE_CHECKING:
    from sordino_server.tensors.shared.session import StepwiseSession

T = TypeVar("T")
OPEN_MOST: Final = 3  # an agent has four places by default (limits.sessions): one is left for others
_LET_OUT_S: Final = 0.25
Key = tuple[Any, ...]  # the parties first


class SessionPool:
    """`drive` runs a generator to its end."""

    def __init__(self, drive: Callable[[Generator[Effect, Result, Any]], Any]) -> None:
        self._drive = drive
        self._open: OrderedDict[Key, StepwiseSession] = OrderedDict()

    def __len__(self) -> int:
        return len(self._open)

    def find(self, key: Key) -> StepwiseSession | None:
        """The open session of that circuit, if there is one."""
        session = self._open.get(key)
        if session is not None and session.over:
            del self._open[key]
            return None
        if session is not None:
            self._open.move_to_end(key)
        return session

    def make_room(self) -> None:
        """Before another is opened: close the least recently used until there is a place."""
        while len(self._open) >= OPEN_MOST:
            key = next(iter(self._open))
            self.close(key)

    def put(self, key: Key, session: StepwiseSession) -> None:
        self._open[key] = session

    def drop(self, key: Key, why: BaseException) -> None:
        """A session that can't go on: its members are told, if they don't know."""
        session = self._open.pop(key, None)
        if session is not None:
            self.abort(session, why)
            self._let_out()

    def drop_of(self, parties: tuple[str, ...], why: Exception) -> None:
        """All sessions of these parties: one of them is not to be trusted."""
        for key in [key for key in self._open if key[0] == parties]:
            self.drop(key, why)

    def abort(self, session: StepwiseSession, why: BaseException) -> None:
        """Tell all members that it is over."""
        if session.over:
            return
        session.over = True
        error = why if isinstance(why, Exception) else Interrupted("interrupted")
        with contextlib.suppress(SordinoError):
            self._drive(session.abort(error))

    def _let_out(self) -> None:
        """Nothing runs between two calls: let what members are told go out now, since they may be waiting."""
        with contextlib.suppress(SordinoError, KeyboardInterrupt):
            self._drive(hear(Hear(purpose="the end of a session", wait_s=_LET_OUT_S)))

    def close(self, key: Key) -> None:
        """End a session in order."""
        session = self._open.pop(key)
        if session.over:
            return
        session.over = True
        try:
            self._drive(session.close())
        except SordinoError as error:
            self.abort(session, SessionLost(str(error)))

    def close_all(self) -> None:
        for key in list(self._open):
            self.close(key)
